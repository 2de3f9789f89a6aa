"""Frozen records that cross the borders between stages.

Every record is a `msgspec.Struct`: typed, immutable, with unknown fields refused on decoding, so a
file written by another version fails loudly instead of being half understood. Units are in the field names.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

AGAIN = " again"
"""Suffix of the site where values that were rounded already are rounded once more."""
HALF = " in fp16"
"""Suffix of a unit that runs in FP16: in the set of a plan's lowered units, and as its column of the probe matrix."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: immutable, keyword-only, strict on decoding."""


class Precision(StrEnum):
    """Arithmetic that a unit runs in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Placement(StrEnum):
    """Where INT8 units of a target round a tensor between two units."""

    ENDS = "ends"
    """Where it starts in an INT8 unit or enters one: the kernels read and write integers."""
    ENTRY = "entry"
    """Only where it enters an INT8 unit: kernels read integers, and what they write is rounded by the next one."""
    NONE = "none"
    """Nowhere: it is made inside the kernel, or the unit, that reads it."""


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
    """Whose relevance weighs the errors (`bitalloy.model.relevance`); empty where all elements count alike."""
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


class Offset(Record, frozen=True, kw_only=True):
    """What is added to a constant bias where the weight behind which it stands is rounded."""

    node: str
    """That adds the bias."""
    values: tuple[float, ...]
    """Per channel."""


class HalfSafety(Record, frozen=True, kw_only=True):
    """What calibration and weights say about a unit in FP16."""

    magnitude: float
    """Largest absolute value of all tensors and constants of the unit; above 65504 FP16 overflows."""
    partial_sum: float
    """Largest absolute value that a running sum of products inside the unit could reach; 0 without such sums."""
    subnormal: float
    """Largest share, over the unit's tensors, of non-zero values below 6.1e-5, which FP16 stores with fewer bits."""
    depth: int
    """Products that are summed up for one output element; 0 without such sums."""
    error: float
    """Expected relative rounding of such a sum in FP16: sqrt(depth) / 2048."""
    reason: str
    """Why FP16 is refused; empty where it is allowed."""


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
    half: HalfSafety | None = None
    """Evidence for or against FP16, on targets that have it."""

    def without(self, precision: Precision, reason: str) -> Unit:
        """The unit where a precision is refused."""
        allowed = tuple(p for p in self.allowed if p is not precision)
        if precision is Precision.INT8:
            return msgspec.structs.replace(self, allowed=allowed, inner=(), weights=(), reason=reason)
        return msgspec.structs.replace(self, allowed=allowed, reason=self.reason or reason)

    @property
    def lowest(self) -> str | None:
        """The member of a plan's lowered units that puts the unit into its lowest precision; None in FP32."""
        if Precision.INT8 in self.allowed:
            return self.id
        return self.id + HALF if Precision.FP16 in self.allowed else None


class UnitEdge(Record, frozen=True, kw_only=True):
    """A tensor on its way from one unit into another: where a border between precisions may lie.

    Where INT8 units round it, `placement` says: when the producer is INT8 (`rooted`) or the consumer is, or only then.
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
    placement: Placement = Placement.ENDS

    @property
    def id(self) -> str:
        """`tensor->unit`, unique in a graph."""
        return f"{self.tensor}->{self.consumer or '(output)'}"

    def crossing(self, *, leaving: bool) -> bool:
        """Whether INT8 ends (`leaving`) or begins here at a price: kernels that round what they read write floats."""
        return self.placement is Placement.ENDS or (self.placement is Placement.ENTRY and not leaving)

    def rounds(self, int8: frozenset[str]) -> bool:
        """Whether some plan that takes its INT8 units from `int8` rounds here a value that is not rounded already."""
        if self.placement is not Placement.ENDS:
            return self.placement is Placement.ENTRY and self.consumer in int8
        return self.consumer in int8 or (self.rooted and self.producer in int8)

    def site(self, int8: frozenset[str]) -> str | None:
        """Id of the site that a plan rounds here, or None."""
        if self.placement is not Placement.ENDS:
            return self.id if self.placement is Placement.ENTRY and self.consumer in int8 else None
        if self.rooted and self.producer in int8:
            return self.id + AGAIN if self.passed_on else self.id
        return self.id if self.consumer in int8 and self.producer not in int8 else None


class UnitGraph(Record, frozen=True, kw_only=True):
    """The model as the search sees it on one target.

    A plan is the set of its lowered units: the id of every unit in INT8, and the id with `HALF` of every one in FP16.
    """

    target: str
    model_sha256: str
    units: tuple[Unit, ...]
    edges: tuple[UnitEdge, ...]

    def quantizable(self) -> frozenset[str]:
        """Ids of the units that may run in INT8."""
        return frozenset(u.id for u in self.units if Precision.INT8 in u.allowed)

    def lowest(self) -> frozenset[str]:
        """The plan that puts every unit into the lowest precision that it may take."""
        return frozenset(u.lowest for u in self.units if u.lowest is not None)

    def rounded(self, lowered: frozenset[str]) -> frozenset[str]:
        """Ids of the sites at which a plan rounds.

        Of INT8 units: weights, inner edges, and edges beside them. A unit in FP16 is one site with all its roundings.
        """
        inside = [u for u in self.units if u.id in lowered]
        sites = {w.id for u in inside for w in u.weights} | {e.id for u in inside for e in u.inner}
        sites.update(site for e in self.edges if (site := e.site(lowered)) is not None)
        sites.update(member for member in lowered if member.endswith(HALF))
        return frozenset(sites)

    def borders(self, lowered: frozenset[str]) -> tuple[float, float]:
        """Elements on, and number of, tensors that cross into or out of INT8, once per tensor and direction."""
        crossing: dict[tuple[str, bool], int] = {}
        for edge in self.edges:
            source, sink = edge.producer in lowered, edge.consumer in lowered
            if source != sink and edge.crossing(leaving=source):
                crossing[edge.tensor, source] = edge.elements
        return float(sum(crossing.values())), float(len(crossing))

    def casts(self, lowered: frozenset[str]) -> tuple[float, float]:
        """The same of tensors that cross between FP32 and FP16."""
        crossing: dict[tuple[str, bool], int] = {}
        for edge in self.edges:
            if edge.producer in lowered or edge.consumer in lowered:
                continue
            source, sink = f"{edge.producer or ''}{HALF}" in lowered, f"{edge.consumer or ''}{HALF}" in lowered
            if source != sink:
                crossing[edge.tensor, source] = edge.elements
        return float(sum(crossing.values())), float(len(crossing))


class TensorRange(Record, frozen=True, kw_only=True):
    """Calibrated range of one activation tensor."""

    tensor: str
    low: float
    high: float
    method: str
    magnitude: float
    """Largest absolute value that was seen, whatever the method cuts off."""
    subnormal: float
    """Share of the non-zero values below 6.1e-5, which FP16 stores with fewer than 11 bits."""
    others: dict[str, tuple[float, float]] = {}
    """Low and high by other methods that are compared with this one; those that hardly differ are left out."""


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


class RangeChoice(Record, frozen=True, kw_only=True):
    """What came of choosing a range per tensor: the all-INT8 model, executed with these ranges and without."""

    heads: tuple[str, ...]
    methods: dict[str, int]
    """Number of tensors by chosen method."""
    samples: int
    first_db: tuple[Estimate, ...]
    """SQNR of every head where all tensors are calibrated by the first method."""
    chosen_db: tuple[Estimate, ...]
    kept: bool
    """Whether the choice does better in the mean of the heads; the first method's ranges are taken otherwise."""


class Sensitivity(Record, frozen=True, kw_only=True):
    """What rounding one thing alone does to one head."""

    id: str
    scope: str
    """`site`, `unit` or `region`."""
    part: str
    """What is rounded: `all`, `weights` or `activations` of it in INT8, or of a unit `fp16`: all of it in FP16."""
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

    targets: tuple[str, ...] = ("ort-cpu",)
    """Names from `bitalloy targets`. One analysis serves all; the first is the one that `Analysis` stands for."""
    calibration_samples: int = 64
    range_method: str = "auto"
    """`minmax`, `moving`, `percentile`, `entropy`, `mse`, or `auto`: of these, but for `moving`, the one that disturbs
    the outputs least, for every tensor on its own; `minmax` where nothing is probed."""
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
    equalize: bool = True
    """Whether channels are scaled between layers where measurement says that it pays (`bitalloy.rewrite.equalize`)."""
    bias_correction: bool = True
    """Whether the mean error of INT8 layers is taken out of their biases where measurement says that it pays."""


def part_of(info: DataInfo, count: int) -> DataInfo:
    """The same data, of which `count` samples were used."""
    return msgspec.structs.replace(info, count=count)
