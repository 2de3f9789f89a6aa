"""Units: the parts of a model that share one scheme, and the tensors between them."""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property

import msgspec

from bitalloy.core.records import Record
from bitalloy.core.schemes import BASELINE, Plan, Scheme


class Placement(StrEnum):
    """Where a target rounds a tensor between two units."""

    ENDS = "ends"
    """Where it starts in a unit that rounds, or enters one: the kernels read and write rounded numbers."""
    ENTRY = "entry"
    """Only where it enters a unit that rounds: what its kernels write is rounded by the next one."""
    NONE = "none"
    """Nowhere: it is made inside the kernel, or the unit, that reads it."""


class Edge(Record, frozen=True, kw_only=True):
    """A use of a tensor: `tensor` as it enters input `slot` of node `node`.

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
    """The node that adds the bias."""
    values: tuple[float, ...]
    """One number per channel."""


class Evidence(Record, frozen=True, kw_only=True):
    """What calibration and weights say about a unit that would compute in a format of less range and precision."""

    magnitude: float
    """Largest absolute value of all tensors and constants of the unit."""
    partial_sum: float
    """Largest absolute value that a running sum of products inside the unit could reach; 0 without such sums."""
    subnormal: float
    """Largest share, over the unit's tensors, of non-zero values below the smallest normal number of FP16, 6.1e-5."""
    depth: int
    """Products that are summed up for one output element; 0 without such sums."""
    error: float = 0.0
    """Expected relative rounding of such a sum in the format."""
    reason: str = ""
    """Why the format is refused; empty where it is allowed."""


class Unit(Record, frozen=True, kw_only=True):
    """The smallest set of nodes that shares one scheme on a target.

    `tail` nodes only move data (Reshape, Split, MaxPool ...): they follow the scheme of the unit's core and carry its
    scale, so no rounding happens inside a unit after `root`.
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
    """Edges between core nodes that are rounded as well, e.g. sigmoid -> multiply."""
    weights: tuple[WeightSite, ...]
    allowed: tuple[str, ...]
    """Schemes that the unit may run in, in the order of the target: the lowest one last."""
    macs: int
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    """Scheme -> why the unit may not run in it."""
    reason: str = ""
    """Why the unit has no choice, where a pattern, advice or the user decided it."""
    evidence: dict[str, Evidence] = msgspec.field(default_factory=dict)
    """Scheme that computes in another format -> what is known for or against it."""

    def without(self, scheme: str, reason: str) -> Unit:
        """Return the unit with a scheme refused."""
        allowed = tuple(name for name in self.allowed if name != scheme)
        return msgspec.structs.replace(self, allowed=allowed, refused={**self.refused, scheme: reason})

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed schemes other than `BASELINE`, the lowest one first."""
        return tuple(name for name in reversed(self.allowed) if name != BASELINE)

    @property
    def why(self) -> str:
        """Why the unit does not run in the lowest scheme that it may not run in; empty where it may run in all."""
        return self.reason or next(reversed(self.refused.values()), "")


class UnitEdge(Record, frozen=True, kw_only=True):
    """A tensor on its way from one unit into another: where a border between schemes may lie.

    Which roundings are made there for a pair of schemes: `bitalloy.targets.placement`.
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
    """True when the edge starts at the producer's root, so that a producer that rounds its result rounds it."""
    elements: int
    passed_on: bool = False
    """True where a producer (Concat) rounds values that are rounded already: a second site for that case."""
    placement: Placement = Placement.ENDS

    @property
    def id(self) -> str:
        """`tensor->unit`, unique in a graph."""
        return f"{self.tensor}->{self.consumer or '(output)'}"


class UnitGraph(Record, frozen=True, kw_only=True, dict=True):
    """The model as the search sees it on one target."""

    target: str
    model_sha256: str
    units: tuple[Unit, ...]
    edges: tuple[UnitEdge, ...]
    schemes: tuple[Scheme, ...] = (Scheme(name=BASELINE),)
    """All schemes of the target, from the highest precision to the lowest; `BASELINE` first."""
    lacks: dict[str, str] = msgspec.field(default_factory=dict)
    """Scheme that the target does not have, and that people may ask for -> why, and what to do instead."""
    usual: str = BASELINE
    """Scheme in which people run whole models on the target, which a plan must beat; `BASELINE` where that is float."""

    @cached_property
    def allowed(self) -> dict[str, tuple[str, ...]]:
        """Unit -> schemes that it may run in."""
        return {u.id: u.allowed for u in self.units}

    def scheme(self, name: str) -> Scheme:
        """Look a scheme of the target up by its name."""
        return next(scheme for scheme in self.schemes if scheme.name == name)

    def able(self, scheme: str) -> frozenset[str]:
        """Return the ids of the units that may run in a scheme."""
        return frozenset(u.id for u in self.units if scheme in u.allowed)

    def lowest(self) -> Plan:
        """Return the plan that puts every unit into the lowest scheme that it may take."""
        return Plan({u.id: u.choices[0] for u in self.units if u.choices})

    @property
    def lowest_name(self) -> str:
        """The schemes of `lowest`, as people write them, e.g. `INT8`."""
        return "/".join(s.name.upper() for s in reversed(self.schemes) if s.name in set(self.lowest().values()))

    def lowest_gated(self) -> Plan:
        """Return the lowest plan among the schemes whose roundings are sites of their own, for exact measurement."""
        gated = {scheme.name for scheme in self.schemes if scheme.gated}
        found = ((u.id, next((name for name in u.choices if name in gated), BASELINE)) for u in self.units)
        return Plan(found)
