"""The judgement on a run: the status that follows from the facts of its summary."""

from __future__ import annotations

from collections.abc import Iterator

from bitalloy.core.outcome import MetricComparison, Summary
from bitalloy.core.plans import FIRST
from bitalloy.core.records import Estimate
from bitalloy.core.status import (
    LimitStatus,
    Status,
    Verdict,
    ceiling_verdict,
    chance_verdict,
    chance_within,
    confidence_of_each,
    of_few_samples,
    worst_verdict,
)
from bitalloy.measure.bench import TOLERANCE
from bitalloy.report.text import interval_words

SHARE = round(TOLERANCE - 1, 4)
"""Part of a latency limit by which a measured latency may exceed it."""
ESTIMATED, UNMEASURED = "estimated, not measured", "not measured"
UNKNOWN_ERROR = "the metric is one number for a whole model, whose error is unknown"


def status_of(summary: Summary) -> Status:
    """Judge a run by its budget and by what was measured of the delivered model.

    Case 1. Latency: met up to the limit, met within tolerance up to `SHARE` beyond it, because medians of two runs
            differ by as much; missed beyond that. Its interval is shown, and decides nothing. An estimate is undecided.
            What the search aimed at because nothing was asked is shown, and is no limit.
    Case 2. Size: exact.
    Case 3. SQNR: the measured value against the floor. Its interval is shown, and decides nothing.
    Case 4. Drop of a task metric, and lost agreement: by the probability that it is within the limit, see
            `chance_verdict`; where plans were judged by it, by labels and agreement together (`DropEstimate`). Where
            its error is unknown, it is undecided.
    Case 5. A metric of the labels without a limit that drops by more than its noise (the interval lies above 0): a
            warning.

    Args:
        summary: its headline, and any status in it, are not read.
    """
    limits = (*_latency(summary), *_size(summary), *_floors(summary), *_drops(summary))
    return Status(
        verdict=worst_verdict(limit.verdict for limit in limits),
        limits=limits,
        warnings=tuple(_uncovered(summary, {limit.metric for limit in limits})),
    )


def _latency(summary: Summary) -> Iterator[LimitStatus]:
    budget, mixed = summary.budget, summary.latency_spread_ms.mixed
    for kind, name, asked, got, interval in (
        (
            "latency_ratio",
            "latency over float",
            budget.latency_ratio,
            summary.latency_ratio,
            summary.latency_ratio_interval,
        ),
        ("latency_ms", "latency", budget.latency_ms, mixed.median_ms, mixed.interval_ms),
    ):
        if asked is not None:
            estimated = summary.latency_estimated
            yield LimitStatus(
                name=name,
                kind=kind,
                asked=asked,
                got=got,
                interval=None if estimated else interval,
                tolerance=SHARE,
                verdict=_judged_latency(summary, got, asked),
                reason=ESTIMATED if estimated else "",
            )


def _judged_latency(summary: Summary, got: float, asked: float) -> Verdict:
    if summary.budget.by_default:
        return Verdict.NO_LIMITS
    return Verdict.UNDECIDED if summary.latency_estimated else ceiling_verdict(got, asked, tolerance=SHARE)


def _size(summary: Summary) -> Iterator[LimitStatus]:
    asked, got = summary.budget.size_bytes, summary.size_bytes.mixed
    if asked is not None:
        yield LimitStatus(name="size", kind="size_bytes", asked=asked, got=got, verdict=ceiling_verdict(got, asked))


def _floors(summary: Summary) -> Iterator[LimitStatus]:
    measured = {head: pair.mixed.measured for head, pair in summary.sqnr_db.items()}
    floor = summary.budget.min_sqnr_db
    if floor is not None:
        head = min(measured, key=measured.__getitem__, default="")
        yield _floor(summary, "min_sqnr_db", "SQNR of every output", head, floor)
    for head, floor in summary.budget.head_sqnr_db.items():
        yield _floor(summary, "head_sqnr_db", f"SQNR of {head}", head, floor)


def _floor(summary: Summary, kind: str, name: str, head: str, asked: float) -> LimitStatus:
    pair = summary.sqnr_db.get(head)
    if pair is None:
        return LimitStatus(
            name=name, kind=kind, head=head, asked=asked, got=None, verdict=Verdict.UNDECIDED, reason=UNMEASURED
        )
    got = pair.mixed.measured
    verdict = Verdict.MET if got >= asked else Verdict.MISSED
    interval = summary.sqnr_interval_db.get(head)
    return LimitStatus(name=name, kind=kind, head=head, asked=asked, got=got, interval=interval, verdict=verdict)


def _drops(summary: Summary) -> Iterator[LimitStatus]:
    """Limits on the task, by the estimate from labels and agreement where there is one, else by the drop alone."""
    asked = [("max_drop", name, most) for name, most in summary.budget.max_drop.items()]
    if summary.budget.min_agreement is not None:
        names = [name for name, metric in summary.metrics.items() if metric.agreement]
        asked += [("min_agreement", name, 1 - summary.budget.min_agreement) for name in names or ["agreement"]]
    confidence = confidence_of_each(summary.budget.confidence, len(asked))
    for kind, limited, most in asked:
        metric = next(iter(summary.metrics), limited) if limited == FIRST else limited
        found, estimate = summary.metrics.get(metric), summary.drop_estimates.get(metric)
        drop = found.drop_mixed if found is not None else None
        if estimate is not None:
            drop = estimate.drop
        chance = None if drop is None or found is None else chance_within(_known(summary, found, drop), most)
        if estimate is not None and estimate.limit == most:
            chance = estimate.probability
        verdict, reason = _judged_drop(chance, confidence)
        got = None if drop is None else drop.value
        if drop is None and found is not None:
            got, reason = (
                found.lost,
                f"{'within' if found.lost <= most else 'beyond'} the limit as measured, but {UNKNOWN_ERROR}",
            )
        yield LimitStatus(
            name=f"drop of {metric}",
            kind=kind,
            metric=metric,
            asked=most,
            got=got,
            interval=drop,
            verdict=verdict,
            reason=reason,
        )


def _judged_drop(chance: float | None, confidence: float) -> tuple[Verdict, str]:
    if chance is None:
        return Verdict.UNDECIDED, UNMEASURED
    verdict = chance_verdict(chance, confidence)
    if verdict != Verdict.UNDECIDED:
        return verdict, ""
    return verdict, f"it is within the limit with a probability of {chance:.0%}, and {confidence:.0%} was asked for"


def _uncovered(summary: Summary, limited: set[str]) -> Iterator[str]:
    for name, metric in summary.metrics.items():
        drop = metric.drop_mixed
        if name in limited or metric.against_float or drop is None:
            continue
        if _known(summary, metric, drop).low > 0:
            yield _told_drop(name, metric, drop)


def _known(summary: Summary, metric: MetricComparison, drop: Estimate) -> Estimate:
    """The drop with the error that few samples leave; a model that is float has none."""
    if not summary.schemes:
        return drop
    return of_few_samples(drop, metric.mixed.n, metric.reference.value, metric.mixed.value)


def _told_drop(name: str, metric: MetricComparison, drop: Estimate) -> str:
    verb = "drops" if metric.higher_is_better else "rises"
    return (
        f"{name} {verb} by {drop.value:.4f} ({interval_words(drop, 4)}), which is more than the "
        f"noise of its {metric.mixed.n} samples, and no limit was set on it. Set one with --max-drop."
    )
