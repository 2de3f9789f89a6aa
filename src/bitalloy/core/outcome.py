"""Records of the result of a run: what `summary.json` is made of."""

from __future__ import annotations

from collections import Counter

import msgspec

from bitalloy.core.plans import Budget
from bitalloy.core.records import DataInfo, Estimate, Latency, MetricValue, RangeChoice, Record

REFERENCE, LOWEST, MIXED = "float", "int8", "mixed"
"""Names of the three columns of `summary.json`: the float model, the one with all that it can in its lowest scheme, and
the mixed one. They are stable, whatever the schemes of the target."""


class MetricComparison(Record, frozen=True, kw_only=True):
    """One task metric on the three models, on the same samples."""

    reference: MetricValue = msgspec.field(name=REFERENCE)
    lowest: MetricValue = msgspec.field(name=LOWEST)
    """Of the model with all that it can in its lowest scheme."""
    mixed: MetricValue
    drop_lowest: Estimate | None = msgspec.field(name=f"drop_{LOWEST}", default=None)
    """float - lowest, with a paired 95 % bootstrap interval; None where the metric has no paired resamples."""
    drop_mixed: Estimate | None = None


class Comparison(Record, frozen=True, kw_only=True):
    """A prediction beside its measurement."""

    predicted: float | None
    measured: float


class HeadComparison(Record, frozen=True, kw_only=True):
    """SQNR in dB of one head, or its KL divergence in nats."""

    lowest: Comparison = msgspec.field(name=LOWEST)
    mixed: Comparison


class Triple(Record, frozen=True, kw_only=True):
    """A number for the float model, the one with all that it can in its lowest scheme, and the mixed one."""

    reference: float = msgspec.field(name=REFERENCE)
    lowest: float = msgspec.field(name=LOWEST)
    mixed: float


class LatencySpread(Record, frozen=True, kw_only=True):
    """Distribution of latency for the three models, in one interleaved measurement."""

    reference: Latency = msgspec.field(name=REFERENCE)
    lowest: Latency = msgspec.field(name=LOWEST)
    mixed: Latency


class Remeasured(Record, frozen=True, kw_only=True):
    """What units of a plan do by themselves, executed on the samples of the verification."""

    units: tuple[str, ...]
    """One, or a pair of units that was rounded together."""
    change_db: dict[str, float]
    """By head: measured over predicted damage in dB, above 0 where they do more than the probe matrix said."""


class Repair(Record, frozen=True, kw_only=True):
    """Why a measured plan differs from its prediction, and what was corrected."""

    gap_db: dict[str, float]
    """By head: measured minus predicted SQNR of the plan, below 0 where it is worse than predicted."""
    remeasured: tuple[Remeasured, ...]
    """Largest change first. The probe matrix was fitted to all of them, and to the plan as a whole."""
    left_db: dict[str, float]
    """By head: the gap after the correction."""


class Round(Record, frozen=True, kw_only=True):
    """One round of search, measurement and correction."""

    latency_ratio_limit: float | None
    min_sqnr_db: float | None
    predicted_ratio: float
    measured_ratio: float
    sqnr_db: tuple[float, ...]
    """Measured, of each head but divergences."""
    schemes: dict[str, int]
    """Scheme -> number of units in it, `BASELINE` left out."""
    predicted_db: tuple[float, ...] = ()
    """Of the same heads, before the plan was measured."""
    head_sqnr_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Floors on single heads."""
    source: str = "search"
    """Where the plan comes from: `search`; `front`, a neighbour that measured better; or `metric`, the fastest plan of
    the front that keeps the task metric."""
    repair: Repair | None = None
    """None where prediction and measurement agree."""
    shipped: bool = False
    """Whether this plan is the result."""


class Evaluation(Record, frozen=True, kw_only=True):
    """One plan of the front on the task, in the search for the fastest that keeps its metric."""

    schemes: dict[str, int]
    """Scheme -> number of units in it, `BASELINE` left out."""
    predicted_ratio: float
    """Latency over float."""
    drops: dict[str, float]
    """By metric that is limited: how much worse than float."""
    kept: bool
    """Whether all limits hold."""


class Correction(Record, frozen=True, kw_only=True):
    """A light correction of the model, decided by measurement."""

    name: str
    """`smoothing` or `cross-layer` (scaling between layers), or `bias`."""
    places: int
    """Tensors that are scaled, or layers that may be rounded and have a bias; it is corrected where they do."""
    kept: bool
    """Whether rounded models have it."""
    reason: str
    """Why it is kept or not."""
    without_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Measured SQNR by head of the model with all it can rounded, without divergences; empty where it was not tried."""
    with_db: dict[str, float] = msgspec.field(default_factory=dict)
    fitted_samples: int = 0
    """That decided the factors or offsets."""
    samples: int = 0
    """On which the SQNR was measured."""


class AuditedUnit(Record, frozen=True, kw_only=True):
    """A planned unit beside what the runtime ran for it."""

    unit: str
    kind: str
    planned: str
    """Scheme."""
    executed: str
    """Precision in which its work was done; another type in the runtime's words, or empty where no kernel is known."""
    kernels: tuple[str, ...]
    us: float
    cause: str
    """Likely cause of a difference, or where its work went where it has no kernel of its own; empty without either."""


class AuditedKernel(Record, frozen=True, kw_only=True):
    """One executed kernel."""

    op: str
    precision: str
    unit: str | None
    """None for rounding, layout changes and the like between units."""
    us: float
    graph: str = "model"
    """Of a program: its graph."""


class AuditedNode(Record, frozen=True, kw_only=True):
    """A node of a graph as the runtime rewrote it."""

    op: str
    units: tuple[str, ...]
    """Planned units whose work it does; none for rounding, layout changes and the like between units."""
    nodes: tuple[str, ...]
    """Nodes of the mixed model that it stands for; none for what the runtime added."""
    ran: bool
    """Whether the profile has it."""


class AuditedGraph(Record, frozen=True, kw_only=True):
    """A graph of the mixed model as the runtime rewrote it before its first run."""

    graph: str
    nodes: tuple[AuditedNode, ...] = ()
    unfused: tuple[str, ...] = ()
    """Nodes QuantizeLinear whose readers are DequantizeLinear alone: pairs that round, and that no kernel took in."""
    folded: tuple[str, ...] = ()
    """Nodes that became constants."""
    removed: tuple[str, ...] = ()
    """Nodes that nothing stands for."""
    unknown: str = ""
    """Why none of this is known."""

    def fused(self) -> dict[str, int]:
        """Operator -> how many nodes of it do the work of several nodes of the model, rounding included."""
        return dict(Counter(n.op for n in self.nodes if len(n.nodes) > 1).most_common())

    def sentence(self) -> str:
        """What became of it."""
        if self.unknown:
            return f"The graph that ran for '{self.graph}' is not known, only its profile: {self.unknown}"
        before = len({n for node in self.nodes for n in node.nodes} | {*self.folded, *self.removed})
        fused = ", ".join(f"{count} {op}" for op, count in self.fused().items())
        more = [
            f"{len(names)} {what}"
            for names, what in (
                (self.unfused, "pairs of QuantizeLinear and DequantizeLinear left unfused"),
                (self.folded, "nodes folded into constants"),
                (self.removed, "nodes removed"),
                ([n for n in self.nodes if not n.ran], "nodes that did not run"),
            )
            if names
        ]
        text = f"{before} nodes of '{self.graph}' became {len(self.nodes)}, of which several each in {fused or 'none'}"
        return "; ".join([text, *more]) + "."


class Audit(Record, frozen=True, kw_only=True):
    """`audit.json`: what the runtime ran."""

    runtime: str
    version: str
    units: tuple[AuditedUnit, ...]
    share_of_time: dict[str, float]
    """Precision that kernels read -> share of the time of all kernels."""
    kernels: tuple[AuditedKernel, ...]
    """In order of execution."""
    graphs: tuple[AuditedGraph, ...] = ()
    """Second evidence: what the runtime made of each graph. None where its kernels tell what they were made from."""
    note: str = ""
    """What a reader must know, such as that the target's own device was not there; empty without."""

    def differences(self) -> tuple[AuditedUnit, ...]:
        """Units whose work was done in another precision than planned."""
        return tuple(u for u in self.units if u.executed not in ("", u.planned))


class Summary(Record, frozen=True, kw_only=True):
    """`summary.json`: the result of a run. Names are stable; new ones may be added."""

    schema: int = 2
    headline: str
    """One sentence; says first if the mixed model is not faster than float."""
    model: str
    model_sha256: str
    target: str
    device: str
    threads: int
    budget: Budget
    latency_ms: Triple
    latency_ratio: float
    """mixed / float, from the medians of `latency_ms`."""
    predicted_latency_ratio: float
    latency_spread_ms: LatencySpread
    size_bytes: Triple
    sqnr_db: dict[str, HeadComparison]
    sqnr_interval_db: dict[str, Estimate]
    """Measured interval of the mixed model, per head."""
    metrics: dict[str, MetricComparison]
    confidence_shift: dict[str, Estimate]
    """Mean score of matched detections, model minus float; empty without a detection task."""
    units: int
    """That may run in another scheme than `BASELINE`."""
    schemes: dict[str, int]
    """Scheme -> number of units that the plan puts into it, `BASELINE` left out."""
    samples: int
    probes: int
    settled: bool
    flagged_units: tuple[str, ...]
    half_margin: float = msgspec.field(name="fp16_margin")
    """65504 divided by the largest magnitude seen in any tensor: below 1 half precision overflows."""
    calibration: DataInfo
    analysis: DataInfo
    seconds: dict[str, float]
    """Wall time per stage; 0 where a stored result was used."""
    rounds: tuple[Round, ...]
    """In order; the shipped plan is the best measured of them."""
    seed: int
    versions: dict[str, str]
    notes: tuple[str, ...]
    graphs: dict[str, Triple] = msgspec.field(default_factory=dict)
    """File size in bytes of each graph of a program; empty for a model of one graph."""
    protected_units: tuple[str, ...] = ()
    """Units that stay in float by advice of the model's family; the reasons are in the plan."""
    kl_nats: dict[str, HeadComparison] = msgspec.field(default_factory=dict)
    """KL(float || quantized) of the heads that give distributions: the sum over a sample where each element is its own
    (sigmoid), the mean over positions where classes exclude each other (softmax)."""
    evaluations: tuple[Evaluation, ...] = ()
    """Plans of the front that were evaluated for a limit on the drop of a task metric, in order."""
    predicted_latency_ratio_interval: Estimate | None = None
    """95 % prediction interval of `predicted_latency_ratio`."""
    workload: str = "one inference"
    """What the latency of one inference pays for."""
    ranges: RangeChoice | None = None
    """What choosing the range of every tensor by predicted damage brought; None where one method was asked for."""
    latency_estimated: bool = False
    """True where the target cannot run on this machine: all latencies follow from peak rates of `device`."""
    corrections: tuple[Correction, ...] = ()
    """Light corrections that were tried, in order; those that were switched off are left out."""
