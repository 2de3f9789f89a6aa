"""Records of costs, budgets and plans: what the search reads and writes."""

from __future__ import annotations

import msgspec

from bitalloy.core.records import HALF, Estimate, Precision, Record
from bitalloy.core.units import UnitGraph

FIRST = "(first)"
"""In a budget: the first metric of the task, whatever it is called."""

T_95 = (0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t, two-sided 95 %, by degrees of freedom."""


class UnitCost(Record, frozen=True, kw_only=True):
    """Time of a unit alone in each precision, borders excluded."""

    unit: str
    fp32_us: float
    int8_us: float | None
    fp32_bytes: int
    int8_bytes: int
    fp16_us: float | None = None
    fp16_bytes: int = 0

    def us(self, lowered: frozenset[str]) -> float:
        """Time in the precision that a plan gives the unit."""
        if self.int8_us is not None and self.unit in lowered:
            return self.int8_us
        return self.fp16_us if self.fp16_us is not None and self.unit + HALF in lowered else self.fp32_us

    def saved_bytes(self, lowered: frozenset[str]) -> int:
        """Weight bytes that a plan saves against float32."""
        if self.unit in lowered:
            return self.fp32_bytes - self.int8_bytes
        return self.fp32_bytes - self.fp16_bytes if self.unit + HALF in lowered else 0


class CostTable(Record, frozen=True, kw_only=True):
    """Cost on one machine, measured; or on a device that is not here, estimated."""

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
    cast_us_per_element: float = 0.0
    """The same prices of a border between FP32 and FP16."""
    cast_us: float = 0.0
    estimated: bool = False
    """True where nothing was measured: times follow from peak rates of `device`."""
    left_out_percent: tuple[float, ...] = ()
    """Error of each random variant over its time (positive: predicted too slow), by a fit that has not seen it."""

    def latency_us(self, units: UnitGraph, lowered: frozenset[str]) -> float:
        """Predicted latency of a plan."""
        inside = sum(c.us(lowered) for c in self.units)
        elements, count = units.borders(lowered)
        total = self.fixed_us + inside + elements * self.border_us_per_element + count * self.border_us
        if self.cast_us or self.cast_us_per_element:
            elements, count = units.casts(lowered)
            total += elements * self.cast_us_per_element + count * self.cast_us
        return float(total)

    def latency_interval_us(self, units: UnitGraph, lowered: frozenset[str]) -> Estimate | None:
        """The same with a 95 % prediction interval from the variants that were left out of fits (Student's t).

        None where nothing was measured.
        """
        if not self.left_out_percent:
            return None
        value = self.latency_us(units, lowered)
        count = len(self.left_out_percent)
        spread = sum(e * e for e in self.left_out_percent) / count
        reach = value * T_95[min(count, len(T_95) - 1)] * spread**0.5 / 100
        return Estimate(value=round(value, 2), low=round(max(value - reach, 0.0), 2), high=round(value + reach, 2))

    @property
    def all_float_us(self) -> float:
        """Predicted latency of the float model."""
        return self.fixed_us + sum(c.fp32_us for c in self.units)

    def saved_bytes(self, lowered: frozenset[str]) -> int:
        """Weight bytes that a plan saves against float."""
        return sum(c.saved_bytes(lowered) for c in self.units)


class Keep(Record, frozen=True, kw_only=True):
    """A pattern of units that run in one precision, whatever measurement says.

    It matches unit ids, node names, regions and operator types as a shell glob; `{4..20}` is any number of a range.
    """

    precision: Precision
    pattern: str

    def __str__(self) -> str:
        return f"{self.precision}:{self.pattern}"


class Budget(Record, frozen=True, kw_only=True):
    """What a plan must respect. All given limits hold together."""

    latency_ratio: float | None = None
    """Of the float model's latency, e.g. 0.7."""
    latency_ms: float | None = None
    size_bytes: int | None = None
    min_sqnr_db: float | None = None
    """Floor on the SQNR of every head."""
    head_sqnr_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Floors on the SQNR of single heads, by name; where both are given the higher one holds."""
    max_drop: dict[str, float] = msgspec.field(default_factory=dict)
    """Largest drop of task metrics against float, by name, in the metric's own unit: 0.003 of AP50-95 is 0.3 points.
    The name `FIRST` is the first metric of the task."""
    keep: tuple[Keep, ...] = ()
    """Units that run in a given precision; of several patterns that name a unit the last one holds."""

    @property
    def limited(self) -> bool:
        """Whether anything but precisions is asked for."""
        return msgspec.structs.replace(self, keep=()) != Budget()

    def floor_db(self, head: str) -> float | None:
        """The floor on the SQNR of one head; None without one."""
        floors = [f for f in (self.min_sqnr_db, self.head_sqnr_db.get(head)) if f is not None]
        return max(floors) if floors else None

    @property
    def has_floor(self) -> bool:
        """Whether the SQNR of any head has a floor."""
        return self.min_sqnr_db is not None or bool(self.head_sqnr_db)


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
    fp16_units: tuple[str, ...] = ()
    optimality_gap: float = 0.0
    """As of the plan: what the solver left open for this latency."""
    measured_ratio: float | None = None
    """Latency over float, in one interleaved sitting with the neighbours on the front; None where not measured."""
    measured_db: tuple[float, ...] | None = None
    """SQNR per head, measured beside it."""

    def lowered(self) -> frozenset[str]:
        """The plan as the set of its lowered units."""
        return frozenset((*self.int8_units, *(u + HALF for u in self.fp16_units)))


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
    """Part of what was minimized that the solver did not prove to be optimal, before the local search: of the additive
    damage, or under a floor alone of the time that INT8 saves."""
    solved: bool = True
    """False where the solver stopped at its limit of nodes, for the plan or on the front, before the gap was small."""
    pareto: tuple[ParetoPoint, ...]

    def int8_units(self) -> frozenset[str]:
        """Ids of the units that run in INT8."""
        return frozenset(c.unit for c in self.choices if c.precision is Precision.INT8)

    def fp16_units(self) -> frozenset[str]:
        """Ids of the units that run in FP16."""
        return frozenset(c.unit for c in self.choices if c.precision is Precision.FP16)

    def lowered(self) -> frozenset[str]:
        """All of them as the set of lowered units (`UnitGraph`)."""
        return self.int8_units() | {u + HALF for u in self.fp16_units()}
