"""What a reader of the numbers of a run must know, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitalloy.core.outcome import (
    ONE_SCHEME,
    GivenModel,
    KernelEffect,
    LatencySpread,
    VerifiedSize,
)
from bitalloy.core.planned import Measured, Planned
from bitalloy.core.schemes import BASELINE
from bitalloy.measure.bench import disturbance
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.heads import is_divergence
from bitalloy.model.load import Graph
from bitalloy.model.sizes import OpenSizes, told_shapes
from bitalloy.rewrite.calibrated import unfit_reason
from bitalloy.runtime.base import ONLY
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import silent_heads
from bitalloy.verify.headline import unrounded_share
from bitalloy.verify.shipped import MeasuredPlan
from bitalloy.verify.steadiness import told_drift

KERNEL_EFFECT_DB = 3.0
"""What a quantized file must lose by optimization to be told."""
GOOD_PART = 0.2
"""Part of the saved time from which on it is told that it comes without any rounding."""
HOW_TO_GET = f"To get that model, which loses nothing, put every unit in float: --keep {BASELINE}:'*' --max-drop-db 0."
MOSTLY_NOISE_DB = 3.01
MUCH_DB = 6.0
"""Loss of SQNR at another size that is worth a warning."""


def notes_of(analysis: Analysis, shipped: MeasuredPlan) -> tuple[str, ...]:
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
        f"'{file.source.name}' as it is does not stand for the float model: {reason}. What is compared with is the "
        "same network without that."
        for file in _files(analysis)
        if (reason := unfit_reason(file, analysis.target))
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
    worst = disturbance(latency)
    if worst is None:
        return ()
    note = (
        f"The machine was busy: half of the inferences took at least {worst:.1f} times as long as the fastest tenth. "
        "All latencies here are worth little; give the same command again on a quiet machine, with another --out."
    )
    return (note,)
