"""Schemes, in which a unit of a model can run, and plans, which give every unit one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum

from bitalloy.core.records import Record

BASELINE = "fp32"
"""Name of the scheme of the model as it is. Every unit can run in it, and a plan need not name the units that do."""


class Granularity(StrEnum):
    """Which weights share a scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    """Weights of one output channel share a scale."""
    BLOCK = "block"
    """Neighbours along the reduction share a scale, as many as the scheme says, within one output channel."""


class Scheme(Record, frozen=True, kw_only=True):
    """How a target stores the numbers of a unit; formats and roundings are named as in `bitalloy.formats`."""

    name: str
    activation: str | None = None
    """How tensors are rounded, by a format or, where that is `dynamic`, at run time; None where they are not."""
    weight: str | None = None
    """Format of constant operands; None where they are not rounded."""
    bias: str | None = None
    """Format of a bias behind rounded operands, in steps of the product of their scales; None where it stays float."""
    granularity: Granularity = Granularity.CHANNEL
    block: int = 0
    """Number of weights along the reduction that share a scale, where they are rounded by block."""
    dynamic: bool = False
    """Whether the kernel rounds what it reads on ranges of its own, in place of calibrated ones. It writes floats."""
    kernel: str = ""
    """Operator of the runtime that computes the product and rounds inside; empty where the graph says it all in pairs
    of QuantizeLinear and DequantizeLinear."""
    gather: str = ""
    """Operator that looks rows up in a stored table and reads them as floats, see `rewrite.kernels`; empty where a
    DequantizeLinear of the table stands before the Gather."""
    cast: bool = False
    """Whether the nodes of a unit compute in the format of `activation`, with a Cast where tensors enter and leave it.
    Otherwise they are given numbers that were rounded to it. Weights may be stored in another format and be widened to
    it where they are read."""
    pair_limit: int | None = None
    """Largest safe |a| + |b| of two neighbouring integer weights, where kernels add pairs of products in 16 bits and
    saturate; None where they do not."""

    @property
    def rounds(self) -> bool:
        """Whether tensors are rounded one by one on their way into and out of a unit."""
        return self.activation is not None and not self.cast

    @property
    def weights_only(self) -> bool:
        """Whether weights are stored in fewer bits than what nodes compute in, to which they are widened again."""
        return self.weight is not None and (self.activation is None or (self.cast and self.weight != self.activation))

    @property
    def sited(self) -> bool:
        """Whether weights have sites, because each is stored on scales of its own."""
        return self.gated or self.weights_only

    @property
    def hands_on(self) -> bool:
        """Whether a unit may write what it makes in rounded numbers, for others to read."""
        return self.rounds and not self.dynamic

    def operator(self, op_type: str) -> str:
        """Return the operator of the runtime that takes the place of a node with a stored weight; empty without one."""
        return self.gather if op_type == "Gather" else self.kernel

    @property
    def gated(self) -> bool:
        """Whether every rounding is a site of its own, which exact measurement can switch."""
        return not self.cast and (self.activation is not None or self.weight is not None)


class Plan(Mapping[str, str]):
    """unit -> scheme, for the units that do not run in `BASELINE`. Plans are immutable, and equal ones hash alike.

    >>> plan = Plan({"conv": "int8", "add": "fp32"})
    >>> dict(plan), plan.scheme_of("conv"), plan.scheme_of("add"), plan.scheme_of(None)
    ({'conv': 'int8'}, 'int8', 'fp32', 'fp32')
    """

    __slots__ = ("_hash", "_schemes")

    def __init__(self, schemes: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> None:
        self._schemes = {unit: scheme for unit, scheme in dict(schemes).items() if scheme != BASELINE}
        self._hash = hash(frozenset(self._schemes.items()))

    @staticmethod
    def of(scheme: str, *units: str) -> Plan:
        """Make the plan that puts some units into one scheme."""
        return Plan(dict.fromkeys(units, scheme))

    def __getitem__(self, unit: str) -> str:
        return self._schemes[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._schemes == other._schemes

    def __repr__(self) -> str:
        return f"Plan({self._schemes!r})"

    def scheme_of(self, unit: str | None) -> str:
        """Return the scheme of a unit; `BASELINE` for what belongs to none, such as an input of the graph."""
        return self._schemes.get(unit or "", BASELINE)

    def units_in(self, scheme: str) -> frozenset[str]:
        """Return the units that the plan puts into a scheme other than `BASELINE`."""
        return frozenset(unit for unit, given in self._schemes.items() if given == scheme)

    def moved(self, unit: str, scheme: str) -> Plan:
        """Return the plan with one unit in another scheme."""
        return Plan({**self._schemes, unit: scheme})

    def counts(self) -> dict[str, int]:
        """Count the units in each scheme, the most frequent scheme first; `BASELINE` is left out."""
        return dict(Counter(self._schemes.values()).most_common())

    @property
    def listed(self) -> list[tuple[str, str]]:
        """(unit, scheme) in order of the units: what decides a plan, for the key of a result."""
        return sorted(self._schemes.items())
