"""The headline of a run, which leads with what the user pays and gets."""

from __future__ import annotations

from collections.abc import Iterator

from bitalloy.core.outcome import Summary
from bitalloy.core.records import Estimate
from bitalloy.report.text import Speed, interval_words, speed_of, status_text, time_text, usual_is_kept
from bitalloy.sensitivity.matrix import CEILING_DB


def headline_of(summary: Summary) -> str:
    """Say what the mixed model takes and loses, and what that means for the limits; then the details.

    It leads with time, points lost and size against the given file, and says first if the mixed model is not faster.

    Args:
        summary: its headline is not read; its status is.
    """
    paid = [*_loss(summary), _size(summary)]
    interval = summary.latency_ratio_interval
    known = [interval_words(interval, 2)] if interval is not None else []
    plain = summary.rewritten_latency_ratio
    if plain is not None and unrounded_share(plain, summary.latency_ratio):
        known.append(f"{plain.value:.2f}x without any rounding")
    ends = f" ({'; '.join(known)})" if known else ""
    time = f"{summary.latency_ratio:.2f}x of float's time{ends}"
    speed = speed_of(summary)
    beside = summary.usual_latency_ratio
    if beside is not None:
        between = interval_words(beside, 2)
        if summary.latency_estimated:
            between = f"not measured: {beside.low:.2f} to {beside.high:.2f}"
        time += f", {beside.value:.2f}x of {summary.usual_scheme.upper()}'s ({between})"
    if beside is not None and usual_is_kept(summary):
        lead = _kept(summary, beside, _listed([time, *paid]))
    elif not summary.schemes and plain is not None and plain.high < 1:
        lead = f"Nothing is lowered: the mixed model is float, rewritten, and runs in {_listed([time, *paid])}"
    elif not summary.schemes:
        lead = "Nothing is lowered, so the mixed model is NOT faster than float: deploy the float model"
    elif speed is Speed.NOT_FASTER:
        lead = f"The mixed model is NOT faster than float: it takes {_listed([time, *paid])}; deploy the float model"
    elif speed is Speed.FASTER:
        runs = "is estimated to run" if summary.latency_estimated else "runs"
        lead = f"The mixed model {runs} in {_listed([time, *paid])}"
    else:
        lead = (
            f"The mixed model is NOT measurably faster than float: it takes {_listed([time, *paid])}; timing on this "
            "machine does not tell which to deploy"
        )
    return f"{lead}; {status_text(summary.status)}. {'; '.join(_details(summary))}."


def _kept(summary: Summary, beside: Estimate, paid: str) -> str:
    """Say that the usual scheme is to be kept, and why."""
    name = summary.usual_scheme.upper()
    if set(summary.schemes) <= {summary.usual_scheme}:
        why = f"no plan that keeps the limits does better, so the model that is shipped is in {name} where it can"
    else:
        why = f"the mixed model takes {beside.value:.2f}x of the time of {name} as a whole, which is no win"
    return f"Keep {name}: {why}; it {'is estimated to run' if summary.latency_estimated else 'runs'} in {paid}"


def unrounded_share(rewritten: Estimate | None, ratio: float) -> float:
    """Return the part of the saved time that comes without any rounding, from 0 to 1.

    It is 0 where timing does not tell that the rewritten float model is faster than float.

    Args:
        rewritten: latency over float of the float model after the graph rewrites of the mixed one, where measured.
        ratio: latency over float of the mixed model.
    """
    if rewritten is None or rewritten.high >= 1:
        return 0.0
    return 1.0 if ratio >= rewritten.value else (1 - rewritten.value) / (1 - ratio)


def _listed(parts: list[str]) -> str:
    """Join the parts of a list as people write it."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _loss(summary: Summary) -> Iterator[str]:
    """Say what the first task metric loses, or without any how close the worst output stays to that of float."""
    if summary.metrics:
        name, metric = next(iter(summary.metrics.items()))
        estimate = summary.drop_estimates.get(name)
        drop = estimate.drop if estimate is not None else metric.drop_mixed
        told = estimate is not None and not metric.against_float
        by = " by labels and agreement" if told and any(m.agreement for m in summary.metrics.values()) else ""
        if drop is None:
            yield f"reaches {metric.mixed.value:.4f} of {name} against {metric.reference.value:.4f} in float"
        elif metric.higher_is_better:
            change, verb = (drop, "loses") if drop.value >= 0 else (drop.negated, "gains")
            yield f"{verb} {change.value:.4f} of {name}{by} ({interval_words(change, 4)})"
        else:
            change, verb = (drop, "raises") if drop.value >= 0 else (drop.negated, "lowers")
            yield f"{verb} {name} by {change.value:.4f}{by} ({interval_words(change, 4)})"
    elif summary.sqnr_db:
        head, pair = min(summary.sqnr_db.items(), key=lambda item: item[1].mixed.measured)
        interval = summary.sqnr_interval_db.get(head)
        ends = f" ({interval_words(interval, 1)})" if interval is not None and interval.low < CEILING_DB else ""
        which = "" if len(summary.sqnr_db) == 1 else "its worst output, "
        yield f"leaves {_decibels(pair.mixed.measured)} on {which}{head}{ends}"


def _decibels(value: float) -> str:
    return "no error" if value >= CEILING_DB else f"{value:.1f} dB"


def _size(summary: Summary) -> str:
    size = summary.size_bytes
    return f"has {size.mixed / size.reference:.2f}x of the given file's size"


def _details(summary: Summary) -> Iterator[str]:
    time, size = summary.latency_ms, summary.size_bytes
    yield f"Medians: {time_text(time.mixed)} against {time_text(time.reference)} in float"
    yield f"{size.mixed / 1e6:.4g} MB against {size.reference / 1e6:.4g} MB as given"
    for name, pair in summary.sqnr_db.items():
        yield f"{name} {_decibels(pair.mixed.measured)}"
    for name, metric in summary.metrics.items():
        yield f"{name} {metric.mixed.value:.4f} against {metric.reference.value:.4f}"
