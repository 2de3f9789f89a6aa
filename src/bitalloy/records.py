"""Frozen records that cross the borders between stages.

Every record is a `msgspec.Struct`: typed, immutable, with unknown fields refused on decoding, so a
file written by another version fails loudly instead of being half understood. Units are in the field names.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

AGAIN = " again"
"""Suffix of the site where values that were rounded already are rounded once more."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: immutable, keyword-only, strict on decoding."""


class Precision(StrEnum):
    """Arithmetic that a unit runs in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class TensorSpec(Record, frozen=True, kw_only=True):
    """A graph input or output; symbolic dimensions are strings."""

    name: str
    dtype: str
    """ONNX name, e.g. `FLOAT`."""
    shape: tuple[int | str, ...]


class ModelInfo(Record, frozen=True, kw_only=True):
    """What identifies a model and what it looks like from outside."""

    name: str
    sha256: str
    """Of the file's bytes, followed by its external data files in order of their names."""
    size_bytes: int
    opset: int
    nodes: int
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class DataInfo(Record, frozen=True, kw_only=True):
    """Which samples a number rests on."""

    name: str
    count: int
    seed: int
    sha256: str
    """Over the sample identifiers and file contents, in order."""
    preprocessing: str
    """In words, e.g. `letterbox 640x640 pad 114, RGB, /255`."""


class Head(Record, frozen=True, kw_only=True):
    """One part of the outputs with a meaning of its own, e.g. boxes or class scores.

    `tensor` carries it inside the graph: the output itself, or one operand of the `Concat` that makes it.
    """

    name: str
    output: str
    tensor: str
    axis: int | None = None
    start: int = 0
    stop: int | None = None
    """`output[start:stop]` along `axis`; the whole output where `axis` is None."""
    scores: tuple[int, int] | None = None
    """Of boxes weighed by relevance: where the class scores lie along `axis`."""
    family: str = ""
    """Whose relevance weighs the errors (`bitalloy.relevance`); empty where all elements count alike."""
    kind: str = ""
    """`categorical` or `bernoulli` where errors are KL divergences of predictions, empty for squared errors."""
    given: str = ""
    """Of a distribution: whether the head holds `logits`, `probabilities` or their `logarithms`."""
    classes: int | None = None
    """Of a categorical distribution: axis of the output along which probabilities add up to one."""


class Edge(Record, frozen=True, kw_only=True):
    """An activation site: tensor `tensor` as it enters input `slot` of node `node`.

    `node` is the empty string where the tensor leaves as graph output number `slot`.
    """

    tensor: str
    node: str
    slot: int

    @property
    def id(self) -> str:
        """`tensor->node#slot`, unique in a graph."""
        return f"{self.tensor}->{self.node or '(output)'}#{self.slot}"


class WeightSite(Record, frozen=True, kw_only=True):
    """A constant operand of `node` that is stored in low precision, rounded along `axis` (None: per tensor)."""

    tensor: str
    node: str
    slot: int
    axis: int | None
    elements: int

    @property
    def id(self) -> str:
        """`weight->node#slot`, unique in a graph."""
        return f"{self.tensor}->{self.node}#{self.slot}"


class Unit(Record, frozen=True, kw_only=True):
    """The smallest set of nodes that shares one precision on a target.

    `tail` nodes only move data (Reshape, Split, MaxPool ...): they follow the precision of the unit's
    core and carry its scale, so no rounding happens inside a unit after `root`.
    """

    id: str
    """Name of the first core node."""
    kind: str
    """Operator pattern, e.g. `Conv`, `SiLU`, `Add`."""
    region: str
    """Path in the region tree, e.g. `model.4/m.0/cv1`."""
    core: tuple[str, ...]
    tail: tuple[str, ...]
    root: str
    """Tensor that the core produces."""
    inner: tuple[Edge, ...]
    """Edges between core nodes that INT8 rounds as well, e.g. sigmoid -> multiply."""
    weights: tuple[WeightSite, ...]
    allowed: tuple[Precision, ...]
    macs: int
    reason: str = ""
    """Why `allowed` is narrower than the target's formats, where it is."""


class UnitEdge(Record, frozen=True, kw_only=True):
    """A tensor on its way from one unit into another: where a border between precisions may lie.

    It is rounded when the producer is INT8 (`rooted`) or the consumer is.
    """

    tensor: str
    uses: tuple[Edge, ...]
    """All inputs of the consumer that read the tensor; they are rounded together."""
    producer: str | None
    consumer: str | None
    """Unit ids; None for a graph input and a graph output."""
    root: str
    """Tensor whose scale the edge uses."""
    rooted: bool
    """True when the edge starts at the producer's root, so that an INT8 producer rounds it."""
    elements: int
    passed_on: bool = False
    """True where an INT8 producer (Concat) rounds values that are rounded already: a second site for that case."""
    entering: bool = False
    """True on targets whose INT8 kernels may write float: rounded where it enters an INT8 unit, whatever made it."""

    @property
    def id(self) -> str:
        """`tensor->unit`, unique in a graph."""
        return f"{self.tensor}->{self.consumer or '(output)'}"

    def site(self, int8: frozenset[str]) -> str | None:
        """Id of the site that a plan rounds here, or None."""
        if self.entering:
            return self.id if self.consumer in int8 else None
        if self.rooted and self.producer in int8:
            return self.id + AGAIN if self.passed_on else self.id
        return self.id if self.consumer in int8 and self.producer not in int8 else None


class UnitGraph(Record, frozen=True, kw_only=True):
    """The model as the search sees it on one target."""

    target: str
    model_sha256: str
    units: tuple[Unit, ...]
    edges: tuple[UnitEdge, ...]

    def quantizable(self) -> frozenset[str]:
        """Ids of the units that may run in INT8."""
        return frozenset(u.id for u in self.units if Precision.INT8 in u.allowed)

    def rounded(self, int8: frozenset[str]) -> frozenset[str]:
        """Ids of the sites at which a plan rounds: weights and inner edges of INT8 units, and edges beside them."""
        inside = [u for u in self.units if u.id in int8]
        sites = {w.id for u in inside for w in u.weights} | {e.id for u in inside for e in u.inner}
        sites.update(site for e in self.edges if (site := e.site(int8)) is not None)
        return frozenset(sites)

    def borders(self, int8: frozenset[str]) -> tuple[float, float]:
        """Elements on, and number of, tensors that cross between precisions, once per tensor and direction."""
        crossing: dict[tuple[str, bool], int] = {}
        for edge in self.edges:
            source, sink = edge.producer in int8, edge.consumer in int8
            if source != sink:
                crossing[edge.tensor, source] = edge.elements
        return float(sum(crossing.values())), float(len(crossing))


class TensorRange(Record, frozen=True, kw_only=True):
    """Calibrated range of one activation tensor."""

    tensor: str
    low: float
    high: float
    method: str


class Calibration(Record, frozen=True, kw_only=True):
    """Ranges of all tensors that may be rounded."""

    model_sha256: str
    data: DataInfo
    method: str
    ranges: tuple[TensorRange, ...]
    abs_max_fp16_margin: float
    """65504 divided by the largest magnitude seen in any tensor: below 1 FP16 overflows."""


class Estimate(Record, frozen=True, kw_only=True):
    """A number with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


class Sensitivity(Record, frozen=True, kw_only=True):
    """What rounding one thing alone does to one head."""

    id: str
    scope: str
    """`site`, `unit` or `region`."""
    part: str
    """`all`, `weights` or `activations`."""
    head: str
    sqnr_db: Estimate
    """10 log10(||y||^2 / ||J e||^2), higher is better. Of heads named `... KL`: 10 log10(1 nat / divergence)."""
    flagged: bool = False
    """True where the error left the linear regime in the local check, so the number may be off."""
    exact: bool = False
    """True where the number was measured by execution, False where the probe matrix predicts it."""


class SensitivityTable(Record, frozen=True, kw_only=True):
    """Sensitivities of one probe matrix, or of one series of exact measurements."""

    model_sha256: str
    data: DataInfo
    samples: int
    probes: int
    seed: int
    settled: bool
    """Whether the ranking of units was stable when sampling stopped."""
    rows: tuple[Sensitivity, ...]
    method: str = "probe"
    """`probe`, `one-at-a-time` or `leave-one-out`; with the last, SQNR is of all that is rounded without `id`."""


class Secant(Record, frozen=True, kw_only=True):
    """How the outputs really move on the way from the float to the all-INT8 network.

    The probe matrix is a tangent; where errors are large the network bends. Measured with all errors scaled alike.
    """

    heads: tuple[str, ...]
    fractions: tuple[float, ...]
    """Of every rounding error, e.g. (0.5, 1.0)."""
    damage: tuple[tuple[float, ...], ...]
    """Measured relative error energy, [fraction][head]."""
    linear: tuple[float, ...]
    """Relative error energy of the all-INT8 network that the probe matrix predicts on the same samples, per head."""
    samples: int


T_95 = (0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t, two-sided 95 %, by degrees of freedom."""


class UnitCost(Record, frozen=True, kw_only=True):
    """Time of a unit alone in each precision, borders excluded."""

    unit: str
    fp32_us: float
    int8_us: float | None
    fp32_bytes: int
    int8_bytes: int


class CostTable(Record, frozen=True, kw_only=True):
    """Measured cost on one machine."""

    target: str
    device: str
    threads: int
    units: tuple[UnitCost, ...]
    border_us_per_element: float
    border_us: float
    """Fixed price of a border, beside the price per element."""
    fixed_us: float
    """Time that no plan can change: nodes outside units and the runtime's own overhead."""
    float_us: float
    int8_us: float
    """Measured medians of the all-float and all-INT8 models, in the same interleaved run."""
    residual_percent: float
    """Mean absolute error of the fitted table on the measured variants."""
    left_out_percent: tuple[float, ...] = ()
    """Error of each random variant over its time (positive: predicted too slow), by a fit that has not seen it."""

    def latency_us(self, units: UnitGraph, int8: frozenset[str]) -> float:
        """Predicted latency of the plan that runs the units `int8` in INT8."""
        inside = sum(c.int8_us if c.unit in int8 and c.int8_us is not None else c.fp32_us for c in self.units)
        elements, count = units.borders(int8)
        return float(self.fixed_us + inside + elements * self.border_us_per_element + count * self.border_us)

    def latency_interval_us(self, units: UnitGraph, int8: frozenset[str]) -> Estimate:
        """The same with a 95 % prediction interval from the variants that were left out of fits (Student's t)."""
        value = self.latency_us(units, int8)
        count = len(self.left_out_percent)
        spread = sum(e * e for e in self.left_out_percent) / count if count else 0.0
        reach = value * T_95[min(count, len(T_95) - 1)] * spread**0.5 / 100
        return Estimate(value=round(value, 2), low=round(max(value - reach, 0.0), 2), high=round(value + reach, 2))

    @property
    def all_float_us(self) -> float:
        """Predicted latency of the float model."""
        return self.fixed_us + sum(c.fp32_us for c in self.units)

    def saved_bytes(self, int8: frozenset[str]) -> int:
        """Weight bytes that a plan saves against float."""
        return sum(c.fp32_bytes - c.int8_bytes for c in self.units if c.unit in int8)


class Budget(Record, frozen=True, kw_only=True):
    """What a plan must respect. All given limits hold together."""

    latency_ratio: float | None = None
    """Of the float model's latency, e.g. 0.7."""
    latency_ms: float | None = None
    size_bytes: int | None = None
    min_sqnr_db: float | None = None
    """Floor on the SQNR of every head."""


class Choice(Record, frozen=True, kw_only=True):
    """Precision of one unit, with the reason that the report shows."""

    unit: str
    precision: Precision
    reason: str


class HeadDamage(Record, frozen=True, kw_only=True):
    """SQNR of one head in dB: predicted by the probe matrix and, once verified, measured.

    Of heads named `... KL` it is 10 log10(1 nat / divergence).
    """

    head: str
    predicted_db: Estimate
    measured_db: Estimate | None = None


class ParetoPoint(Record, frozen=True, kw_only=True):
    """One non-dominated plan of the search."""

    int8_units: tuple[str, ...]
    predicted_latency_us: float
    size_bytes: int
    damage: float
    """Relative output error energy, mean over heads."""
    sqnr_db: tuple[float, ...]
    """Per head, in the order of the heads."""


class Plan(Record, frozen=True, kw_only=True):
    """unit -> precision, for one target and budget."""

    model_sha256: str
    target: str
    budget: Budget
    choices: tuple[Choice, ...]
    heads: tuple[HeadDamage, ...]
    predicted_latency_us: float
    predicted_latency_interval_us: Estimate | None = None
    """With a 95 % prediction interval, from the errors of the cost table on variants that it has not seen."""
    predicted_size_bytes: int
    optimality_gap: float
    """Relative gap that the solver proved for the additive model."""
    pareto: tuple[ParetoPoint, ...]

    def int8_units(self) -> frozenset[str]:
        """Ids of the units that run in INT8."""
        return frozenset(c.unit for c in self.choices if c.precision is Precision.INT8)


class Latency(Record, frozen=True, kw_only=True):
    """Distribution of single-inference wall time in one interleaved measurement."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int


class MetricValue(Record, frozen=True, kw_only=True):
    """A task metric on one model."""

    value: float
    low: float
    high: float
    n: int


class Settings(Record, frozen=True, kw_only=True):
    """What an analysis depends on beside model and data."""

    target: str = "ort-cpu"
    calibration_samples: int = 64
    range_method: str = "minmax"
    """`minmax`, `moving`, `percentile`, `entropy` or `mse`."""
    samples: int | None = None
    """Samples of the probe matrix; None stops when the ranking has settled, between 8 and 16."""
    probes: int = 8
    """Reverse passes per sample, shared out evenly among the heads, at least two for each; two more for every head
    that is also measured as a KL divergence."""
    seed: int = 0
    exclude: tuple[str, ...] = ()
    """Glob patterns over node names and regions that stay in float."""
    protect: bool = True
    """Whether what the model's family keeps in float stays so, unless measurement overrules it."""
