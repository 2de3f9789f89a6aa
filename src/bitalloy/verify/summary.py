"""What a run says: the facts of its summary record, with the judgement on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from bitalloy.core.outcome import (
    ONE_SCHEME,
    Comparison,
    DropEstimate,
    Evaluation,
    GivenModel,
    HeadComparison,
    KernelEffect,
    LatencySpread,
    PeakMemory,
    Resolution,
    Round,
    Steadiness,
    Summary,
    Triple,
    UsedSamples,
    VerifiedSize,
)
from bitalloy.core.planned import Measured, Metrics, Planned
from bitalloy.core.plans import SingleFormat
from bitalloy.core.records import Estimate, part_of
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.status import Status, Verdict
from bitalloy.core.store import versions
from bitalloy.measure.bench import UNSTEADY, unsteadiness
from bitalloy.measure.roofline import ratio_interval
from bitalloy.measure.workload import told_workload, workload_of
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.heads import KL, is_divergence
from bitalloy.model.load import Graph
from bitalloy.model.sizes import OpenSizes, told_shapes
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.ort import ORT
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import decibel, draws, estimate_sqnr, silent_heads
from bitalloy.targets.placement import rounded
from bitalloy.verify.headline import headline_of, unrounded_share
from bitalloy.verify.status import status_of
from bitalloy.verify.steadiness import told_drift

KERNEL_EFFECT_DB = 3.0
"""What a quantized file must lose by optimization to be told."""
GOOD_PART = 0.2
"""Part of the saved time from which on it is told that it comes without any rounding."""
HOW_TO_GET = f"To get that model, which loses nothing, put every unit in float: --keep {BASELINE}:'*' --max-drop-db 0."
MOSTLY_NOISE_DB = 3.01
MUCH_DB = 6.0
"""Loss of SQNR at another size that is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan:
    """The plan that is shipped, with all that was measured on the way to it."""

    planned: Planned
    measured: Measured
    sizes: Mapping[str, Triple]
    """Graph -> its size in bytes in the three models."""
    metrics: Metrics
    rounds: tuple[Round, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    resolution: tuple[Resolution, ...] = ()
    """What the labelled images resolve."""
    drop_estimates: Mapping[str, DropEstimate] = field(default_factory=dict)
    """Metric that is limited -> its drop by all that was evaluated."""
    single: Plan | None = None
    """The best plan of one scheme, measured beside it; None where it is one of the others, or there is none."""
    singles: tuple[SingleFormat, ...] = ()
    """Predictions of all plans of one scheme."""
    memory: PeakMemory | None = None
    """None where the target cannot run here."""
    kernel_effects: tuple[KernelEffect, ...] | None = None
    """What optimization changes; None where that was not examined."""
    given: GivenModel | None = None
    """The file itself, where it is quantized."""
    bound: Mapping[str, str] = field(default_factory=dict)
    """Graph whose file leaves sizes open, and which has those of the samples -> why."""
    sizes_tried: tuple[VerifiedSize, ...] = ()
    """Other sizes at which the plan was verified."""
    steadiness: Steadiness | None = None
    """Whether the machine stayed as it was; None where latency is estimated."""


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
        notes=_notes(analysis, shipped),
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
        between = partial(ratio_interval, analysis.graph, units, device, chosen, workload=workload)
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


def _notes(analysis: Analysis, shipped: MeasuredPlan) -> tuple[str, ...]:
    """List what a reader of the numbers must know."""
    planned, measured = shipped.planned, shipped.measured
    return (
        *analysis.notes,
        *_converted(analysis),
        *_given(shipped.given),
        *_unfit(analysis),
        *_special(analysis),
        *_single(shipped),
        *_open_sizes(analysis, shipped),
        *_busy(measured.latency),
        *told_drift(shipped.steadiness, measured.ratio_mixed),
        *_estimated(planned),
        *_rewritten(analysis, shipped),
        *_unresolved(planned, measured),
        *_optimized(analysis, shipped.kernel_effects or ()),
        *shipped.metrics.notes,
    )


def _runtime(analysis: Analysis) -> dict[str, str]:
    runtime = analysis.target.runtime
    return {} if runtime is ORT else {runtime.name: runtime.version()}


def _given(given: GivenModel | None) -> list[str]:
    """Say what a quantized file loses, and where most of it."""
    if given is None:
        return []
    measured, written = given.measured_db or {}, given.written_db or {}
    heads = [
        f"{head} {measured[head].value:.1f} dB (predicted {value:.1f})"
        if head in measured
        else f"{head} {value:.1f} dB"
        for head, value in given.predicted_db.items()
    ]
    took = f", in {given.latency_ratio.value:.2f}x of float's time" if given.latency_ratio is not None else ""
    worst = "; ".join(f"'{r.tensor}' ({r.head} {r.sqnr_db:.1f} dB, {r.share:.0%})" for r in given.worst[:3])
    notes = [f"The given file rounds {given.tensors} tensors: {', '.join(heads)}{took}. Most is lost at {worst}."]
    lost = {h: written[h].value - measured[h].value for h in measured if h in written}
    head = max(lost, key=lambda h: lost[h], default="")
    if head and lost[head] > KERNEL_EFFECT_DB:
        notes.append(
            f"{head}: a kernel effect. Node by node the given file leaves {written[head].value:.1f} dB, but as it is "
            f"optimized {measured[head].value:.1f} dB. Without VNNI, integer kernels add pairs of products in 16 bits, "
            "which saturate; models of plans keep clear of that."
        )
    return notes


def _unresolved(planned: Planned, measured: Measured) -> list[str]:
    """Report divergences so small that the rounding of float32 scores makes half of what is measured, or more."""
    rows = zip(planned.plan.heads, measured.sqnr_mixed, measured.float32, strict=True)
    return [
        f"{head.head}: {10 ** (-found.value / 10):.2g} nats were measured, about {10 ** (-least.value / 10):.2g} of "
        "which are float32 rounding of the scores themselves, which predictions leave out: the plan does less."
        for head, found, least in rows
        if is_divergence(head.head) and found.value > least.value - MOSTLY_NOISE_DB
    ]


def _optimized(analysis: Analysis, effects: Sequence[KernelEffect]) -> list[str]:
    """Say what the optimization of the runtime changes."""
    name = analysis.target.runtime.name
    return [
        f"{e.head}: a kernel effect. The mixed model reaches {e.optimized_db:.1f} dB as {name} optimizes it, and "
        f"{e.written_db:.1f} dB as its graph is written: {e.cause}."
        for e in effects
    ]


def _special(analysis: Analysis) -> list[str]:
    """Say of which heads the SQNR is not that of the output, or means nothing."""
    zero = silent_heads(analysis.matrix.heads, analysis.matrix.energy)
    logits = [h.name for h in analysis.heads if h.given and not h.kind]
    return [
        *(f"'{n}' is zero on all samples: its SQNR only tells whether anything changed it." for n in zero),
        *(f"'{n}' holds probabilities of a Softmax: its SQNR is that of their logits." for n in logits),
    ]


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


def _estimated(planned: Planned) -> tuple[str, ...]:
    if not planned.cost.estimated:
        return ()
    note = (
        f"{planned.plan.target} does not run on this machine. Latencies are estimated from peak rates for "
        f"{planned.cost.device.split(' (')[0]}; outputs were verified on ONNX Runtime's CPU provider, with every "
        "rounding as the model says."
    )
    return (note,)


def _rewritten(analysis: Analysis, shipped: MeasuredPlan) -> list[str]:
    """Say how much of the gain comes without any rounding."""
    if analysis.graph.large and not shipped.planned.cost.estimated:
        note = (
            "The float model with the same graph rewrites was not measured, because the model is large: part of the "
            "gain may come from these, without any rounding."
        )
        return [note]
    found, ratio = shipped.measured.ratio_rewritten, shipped.measured.ratio
    share = unrounded_share(found, ratio)
    if found is None or share < GOOD_PART:
        return []
    part = f"{share:.0%} of the time that the mixed model saves" if share < 1 else "All that is saved"
    how = f" {HOW_TO_GET}" if shipped.planned.plan.chosen else ""
    note = (
        f"{part} comes without any rounding: the float model with the same graph rewrites takes {found.value:.2f}x of "
        f"float's time, the mixed model {ratio:.2f}x.{how}"
    )
    return [note]


def _files(analysis: Analysis) -> tuple[Graph, ...]:
    """Return the files of the model as loaded: several of a program."""
    given = analysis.given
    return tuple(given.program.graphs.values()) if isinstance(given, Joined) else (given,)


def _converted(analysis: Analysis) -> list[str]:
    """Say what of the files was converted when they were read."""
    return [note for file in _files(analysis) for note in file.changes]


def _unfit(analysis: Analysis) -> list[str]:
    """Say which files do not stand for the float model themselves."""
    return [
        f"'{file.source.name}' as it is does not stand for the float model: {file.unfit}. What is compared with is the "
        "same network without that."
        for file in _files(analysis)
        if file.unfit
    ]


def _single(shipped: MeasuredPlan) -> list[str]:
    """Say where the plan that is shipped has one scheme because no mixed one did better."""
    if not any(r.shipped and r.source == ONE_SCHEME for r in shipped.rounds):
        return []
    name = next(s.scheme for s in shipped.singles if s.best).upper()
    return [f"The plan that is shipped puts all that can into {name}: it measured better than every mixed plan tried."]


def _open_sizes(analysis: Analysis, shipped: MeasuredPlan) -> list[str]:
    """Say which sizes stay open in the shipped model, and at which it was verified; or why they do not."""
    name = analysis.given.info.name
    notes = [
        f"The file of '{name if graph == ONLY else graph}' leaves sizes open; the shipped model has those of the "
        f"samples: {why}"
        for graph, why in shipped.bound.items()
    ]
    if not analysis.given.is_open or shipped.bound:
        return notes
    heads = [h.head for h in shipped.planned.plan.heads if not is_divergence(h.head)]
    own = {h: e.value for h, e in zip(heads, shipped.measured.sqnr_mixed, strict=False)}
    tried = [VerifiedSize(shapes=OpenSizes(analysis.given).bound(), sqnr_db=own), *shipped.sizes_tried]
    told = [f"{told_shapes(t.shapes)} ({_told_sqnr(t)})" for t in tried]
    few = " The float model itself runs at none of the other sizes that were tried." if len(tried) == 1 else ""
    notes.append(f"Open sizes stay open in the shipped model. Verified at {'; '.join(told)}.{few}")
    worse = [t for t in shipped.sizes_tried if t.failed or _loses(t, own)]
    if worse:
        notes.append(
            f"The shipped model does much worse at {'; '.join(told_shapes(t.shapes) for t in worse)} than at the sizes "
            "of the samples. Give these shapes too, each with a --shape of its own, so that ranges are taken there."
        )
    return notes


def _told_sqnr(tried: VerifiedSize) -> str:
    return f"fails: {tried.failed}" if tried.failed else ", ".join(f"{h} {v:.1f} dB" for h, v in tried.sqnr_db.items())


def _loses(tried: VerifiedSize, own: Mapping[str, float]) -> bool:
    """Tell whether a head lost more than `MUCH_DB` at another size, where parts of an output may have other names."""
    return any(value < own.get(head, min(own.values())) - MUCH_DB for head, value in tried.sqnr_db.items())


def _busy(latency: LatencySpread) -> tuple[str, ...]:
    worst = max(unsteadiness(one) for one in (latency.reference, latency.lowest, latency.mixed))
    if worst < UNSTEADY:
        return ()
    note = (
        f"The machine was busy: half of the inferences took at least {worst:.1f} times as long as the fastest tenth. "
        "All latencies here are worth little; give the same command again on a quiet machine, with another --out."
    )
    return (note,)
