"""Units: the parts of a model that share one scheme, and the tensors between them."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from bitalloy.core.records import AGAIN, HALF, Precision, Record


class Placement(StrEnum):
    """Where INT8 units of a target round a tensor between two units."""

    ENDS = "ends"
    """Where it starts in an INT8 unit or enters one: the kernels read and write integers."""
    ENTRY = "entry"
    """Only where it enters an INT8 unit: kernels read integers, and what they write is rounded by the next one."""
    NONE = "none"
    """Nowhere: it is made inside the kernel, or the unit, that reads it."""


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
