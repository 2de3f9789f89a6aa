"""What a run says: the facts of its summary record, with the judgement on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from bitalloy.core.outcome import (
    Comparison,
    HeadComparison,
    LatencySpread,
    Summary,
    Triple,
    UsedSamples,
)
from bitalloy.core.records import Estimate, part_of
from bitalloy.core.schemes import Plan
from bitalloy.core.status import Status, Verdict
from bitalloy.core.store import versions
from bitalloy.measure.roofline import ratio_interval
from bitalloy.measure.workload import told_workload, workload_of
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.heads import KL, is_divergence
from bitalloy.runtime.ort import ORT
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import decibel, draws, estimate_sqnr
from bitalloy.targets.placement import rounded
from bitalloy.verify.headline import headline_of
from bitalloy.verify.notes import notes_of
from bitalloy.verify.shipped import MeasuredPlan
from bitalloy.verify.status import status_of


def predicted_sqnr(analysis: Analysis, plan: Plan) -> tuple[Estimate, ...]:
    """Predict the SQNR in dB of every head of a plan by the tables of an analysis."""
    matrix = analysis.matrix
    chosen = matrix.select(rounded(analysis.units, plan))
    return estimate_sqnr(matrix, chosen, draws(matrix.samples, analysis.settings.seed), analysis.secant)


def expected(corrected: Analysis, plan: Plan, measured: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """Estimate the SQNR in dB of every head of a plan that was measured, on samples that no part of the run has seen.

    The tables, corrected by all that was measured, rest on the samples of the probe, the measurement on those of
    verification. The relative error energies of both are averaged by their numbers of samples, so that an outlier in
    either counts; the half-widths of their intervals add in squares.

    Args:
        corrected: the analysis with its tables as corrected last.
        plan: the plan.
        measured: what was measured of it, in dB, per head.
    """
    counts = np.array([[corrected.matrix.samples], [len(corrected.parts.verification)]])
    predicted, shares = predicted_sqnr(corrected, plan), counts / counts.sum()
    rows = [[[e.value, e.low, e.high] for e in some] for some in (predicted, measured)]
    value, most, least = np.moveaxis(10 ** (-np.array(rows) / 10), 2, 0)
    mean = (shares * value).sum(axis=0)
    above, below = (np.sqrt(((shares * (end - value)) ** 2).sum(axis=0)) for end in (most, least))
    ends = decibel(np.stack([mean, mean + above, np.maximum(mean - below, 0)]))
    return tuple(Estimate(value=v, low=low, high=high) for v, low, high in np.round(ends, 3).T.tolist())


def _compared(analysis: Analysis, corrected: Analysis, shipped: MeasuredPlan) -> dict[str, HeadComparison]:
    """Put the predictions of every head beside what was measured."""
    planned, measured = shipped.planned, shipped.measured

    def column(plan: Plan, found: Sequence[Estimate]) -> list[Comparison]:
        rows = zip(predicted_sqnr(analysis, plan), found, expected(corrected, plan, found), strict=True)
        return [Comparison(predicted=p.value, measured=m.value, corrected=c.value) for p, m, c in rows]

    lowest = column(analysis.units.lowest(), measured.sqnr_lowest)
    single = None
    if shipped.single is not None and measured.sqnr_single is not None:
        single = column(shipped.single, measured.sqnr_single)
    rewritten = [Comparison(predicted=None, measured=found.value) for found in measured.sqnr_rewritten or ()]
    return {
        head.head: HeadComparison(
            rewritten=rewritten[i] if rewritten else None,
            lowest=lowest[i],
            single=single[i] if single is not None else None,
            mixed=Comparison(
                predicted=head.predicted_db.value,
                measured=measured.sqnr_mixed[i].value,
                corrected=head.corrected_db.value if head.corrected_db is not None else None,
            ),
        )
        for i, head in enumerate(planned.plan.heads)
    }


def summarize_run(
    analysis: Analysis, corrected: Analysis, shipped: MeasuredPlan, seconds: Mapping[str, float]
) -> Summary:
    """Put predictions and measurements of a run side by side.

    Args:
        analysis: what was known about the model before any plan was verified.
        corrected: the same with the tables as corrected by what was measured since.
        shipped: the plan that is shipped, with its measurements.
        seconds: wall time per stage.
    """
    facts = _facts(analysis, corrected, shipped, seconds)
    judged = msgspec.structs.replace(facts, status=status_of(facts))
    return msgspec.structs.replace(judged, headline=headline_of(judged))


def _facts(analysis: Analysis, corrected: Analysis, shipped: MeasuredPlan, seconds: Mapping[str, float]) -> Summary:
    """Collect all but the judgement."""
    matrix, units = analysis.matrix, analysis.units
    planned, measured, metrics, sizes = shipped.planned, shipped.measured, shipped.metrics, shipped.sizes
    sqnr = _compared(analysis, corrected, shipped)
    divergences = {name: sqnr.pop(name) for name in list(sqnr) if is_divergence(name)}
    return Summary(
        headline="",
        status=Status(verdict=Verdict.NO_LIMITS),
        model=analysis.graph.info.name,
        model_sha256=analysis.graph.info.sha256,
        target=analysis.target.name,
        device=planned.cost.device,
        threads=planned.cost.threads,
        budget=planned.plan.budget,
        latency_ms=_medians(measured.latency),
        latency_ratio=measured.ratio,
        latency_ratio_interval=None if planned.cost.estimated else measured.ratio_mixed,
        lowest_latency_ratio=None if planned.cost.estimated else measured.ratio_lowest,
        single_latency_ratio=None if planned.cost.estimated else measured.ratio_single,
        rewritten_latency_ratio=measured.ratio_rewritten,
        single_formats=shipped.singles,
        predicted_latency_ratio=round(planned.predicted_ratio, 4),
        **_ratios(analysis, shipped),
        latency_spread_ms=measured.latency,
        size_bytes=_total(sizes),
        sqnr_db=sqnr,
        sqnr_interval_db={
            h.head: e for h, e in zip(planned.plan.heads, measured.sqnr_mixed, strict=True) if h.head in sqnr
        },
        metrics=metrics.metrics,
        confidence_shift=metrics.confidence_shift,
        units=len(units.lowest()),
        schemes=planned.plan.chosen.counts(),
        samples=matrix.samples,
        probes=int(sum(r.shape[1] for r in matrix.rows)),
        settled=analysis.table.settled,
        flagged_units=tuple(sorted({r.id for r in analysis.table.rows if r.flagged and r.scope == "unit"})),
        half_margin=analysis.calibration.half_margin,
        calibration=analysis.calibration.data,
        analysis=part_of(analysis.info, matrix.samples),
        seconds=dict(seconds),
        rounds=shipped.rounds,
        **_judged(shipped),
        seed=analysis.settings.seed,
        versions=versions() | _runtime(analysis),
        notes=notes_of(analysis, shipped),
        graphs=dict(sizes) if isinstance(analysis.graph, Joined) else {},
        protected_units=planned.protected,
        kl_nats={name.removesuffix(KL): _nats(pair) for name, pair in divergences.items()},
        workload=_workload(analysis),
        steps=measured.steps,
        peak_memory_mb=shipped.memory,
        ranges=analysis.choice,
        latency_estimated=planned.cost.estimated,
        kernel_effects=shipped.kernel_effects,
        given=shipped.given,
        sizes=shipped.sizes_tried,
        corrections=analysis.corrections,
        parts=_used(analysis),
        steadiness=shipped.steadiness,
    )


def _ratios(analysis: Analysis, shipped: MeasuredPlan) -> dict[str, Any]:
    """Collect latency as predicted, and against what people run on the target anyway."""
    units, planned, found = analysis.units, shipped.planned, shipped.measured
    chosen, usual = planned.plan.chosen, units.usual
    plain = next((Plan.of(s.scheme, *units.able(s.scheme)) for s in shipped.singles if s.scheme == usual), None)
    told = {"predicted_latency_ratio_interval": planned.predicted_ratio_interval, "usual_scheme": usual}
    device = analysis.target.device
    if planned.cost.estimated and device is not None:
        workload = workload_of(analysis.graph, analysis.settings.workload)
        apart = analysis.target.rounds_apart
        between = partial(ratio_interval, analysis.graph, units, device, chosen, workload=workload, rounds_apart=apart)
        told["predicted_latency_ratio_interval"] = between(Plan())
        told["usual_latency_ratio"] = None if plain is None else between(plain)
    elif plain is not None and found.ratio_single is not None:
        mixed, single = found.ratio_mixed, found.ratio_single
        rows = (mixed.value / single.value, mixed.low / single.high, mixed.high / single.low)
        value, low, high = (round(row, 4) for row in rows)
        told["usual_latency_ratio"] = Estimate(value=value, low=low, high=high)
    return told


def _judged(shipped: MeasuredPlan) -> dict[str, Any]:
    """Collect what the task says beside the metrics themselves."""
    return {
        "evaluations": shipped.evaluations,
        "resolution": shipped.resolution,
        "drop_estimates": dict(shipped.drop_estimates),
        "box_overlap": shipped.metrics.box_overlap,
    }


def _medians(latency: LatencySpread) -> Triple:
    return Triple(
        reference=latency.reference.median_ms,
        lowest=latency.lowest.median_ms,
        mixed=latency.mixed.median_ms,
        single=latency.single.median_ms if latency.single is not None else None,
        rewritten=latency.rewritten.median_ms if latency.rewritten is not None else None,
    )


def _used(analysis: Analysis) -> UsedSamples:
    parts = analysis.parts
    parts = msgspec.structs.replace(parts, probe=parts.probe[: analysis.matrix.samples])
    calibration, probe, verification = (
        tuple(map(analysis.data.name, part)) for part in (parts.calibration, parts.probe, parts.verification)
    )
    return UsedSamples(
        available=parts.available,
        calibration=calibration,
        probe=probe,
        verification=verification,
        disjoint=parts.disjoint,
        told=parts.describe(),
    )


def _runtime(analysis: Analysis) -> dict[str, str]:
    runtime = analysis.target.runtime
    return {} if runtime is ORT else {runtime.name: runtime.version()}


def _nats(pair: HeadComparison) -> HeadComparison:
    """Convert divergences from dB below 1 nat to nats, with four digits."""

    def nats(decibels: float) -> float:
        return float(f"{10 ** (-decibels / 10):.4g}")

    def convert(one: Comparison) -> Comparison:
        predicted, corrected = (None if v is None else nats(v) for v in (one.predicted, one.corrected))
        return Comparison(predicted=predicted, measured=nats(one.measured), corrected=corrected)

    single, rewritten = (None if one is None else convert(one) for one in (pair.single, pair.rewritten))
    return HeadComparison(lowest=convert(pair.lowest), mixed=convert(pair.mixed), single=single, rewritten=rewritten)


def _total(sizes: Mapping[str, Triple]) -> Triple:
    """Sum the bytes of all graphs."""
    single = [s.single for s in sizes.values() if s.single is not None]
    rewritten = [s.rewritten for s in sizes.values() if s.rewritten is not None]
    return Triple(
        reference=sum(s.reference for s in sizes.values()),
        lowest=sum(s.lowest for s in sizes.values()),
        mixed=sum(s.mixed for s in sizes.values()),
        single=sum(single) if single else None,
        rewritten=sum(rewritten) if rewritten else None,
    )


def _workload(analysis: Analysis) -> str:
    return told_workload(analysis.graph, workload_of(analysis.graph, analysis.settings.workload))
