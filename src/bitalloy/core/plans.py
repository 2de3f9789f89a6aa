"""Records of costs, budgets and plans: what the search reads and writes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property

import msgspec

from bitalloy.core.errors import BudgetError
from bitalloy.core.records import Estimate, Given, Record
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.tabular import Listing, Tabular

MOST_DB = 1000.0
"""Largest floor on an SQNR, and inverse of the lowest: powers of ten of it are finite numbers."""
DROP_CONFIDENCE = 0.8
"""Probability with which a drop of a task metric is to be within its limit, where no other is given."""
FIRST = "(first)"
"""The name in a budget for the first metric of the task, whatever it is called."""


def number_with_unit(text: str, option: str, example: str, units: Sequence[str]) -> tuple[float, str]:
    """Read a number above 0 with one of some units, whose case does not count.

    Args:
        text: what to read.
        option: what it was given as, for the message.
        example: how it could be written, for the message.
        units: the units.

    Raises:
        BudgetError: it is something else.

    >>> number_with_unit("12 MS", "--latency", "12ms", ("x", "ms"))
    (12.0, 'ms')
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    known = {unit.lower(): unit for unit in units}
    if match is None or match.group(2).lower() not in known or not 0 < float(match.group(1)) < math.inf:
        raise BudgetError(f"{option} is '{text}'; expected a number with a unit, such as {example}.")
    return float(match.group(1)), known[match.group(2).lower()]


class UnitCost(Record, frozen=True, kw_only=True):
    """What a unit costs in each scheme that it may run in, borders excluded."""

    unit: str
    us: dict[str, float]
    """Scheme -> time in microseconds."""
    bytes: dict[str, int]
    """Scheme -> size of all that stands for it alone in the file: nodes, weights, scales and metadata."""

    def saved_us(self, scheme: str) -> float:
        """Return the time that a scheme saves against `BASELINE`; it is negative where the scheme is slower."""
        return self.us[BASELINE] - self.us[scheme]

    def saved_bytes(self, scheme: str) -> int:
        """Return the bytes that a scheme saves in the file against `BASELINE`, borders left out."""
        return self.bytes[BASELINE] - self.bytes[scheme]


class BorderCost(Record, frozen=True, kw_only=True):
    """Price of converting a tensor between two schemes."""

    source: str
    """Scheme that it is made in; empty where the price is the same for all, because only the end counts."""
    sink: str
    """Scheme that reads it; empty likewise."""
    us_per_element: float
    us: float
    """Fixed price, beside the price per element."""
    bytes: float = 0.0
    """Size of the nodes, scales and metadata that convert one tensor."""

    def price_us(self, elements: float, count: float = 1.0) -> float:
        """Return the time that `count` such borders take with `elements` numbers in all."""
        return elements * self.us_per_element + count * self.us


class SharedWeight(Record, frozen=True, kw_only=True):
    """A constant that several units read, which the file holds once in each form that any of them needs."""

    tensors: tuple[str, ...]
    """Its name; several where the file has it, or its transpose, under several names."""
    forms: dict[str, dict[str, tuple[str, ...]]]
    """Unit -> scheme -> the forms that it reads then."""
    bytes: dict[str, int] = msgspec.field(default_factory=dict)
    """Form -> size in the file."""

    def size(self, plan: Plan) -> int:
        """Return the bytes of all forms that the units of a plan need together."""
        read = {form for unit, known in self.forms.items() for form in known.get(plan.scheme_of(unit), ())}
        return sum(self.bytes.get(form, 0) for form in read)


class CostTable(Tabular, Record, frozen=True, kw_only=True):
    """Cost on one machine, measured; or on a device that is not here, estimated. `measure.prices` sums it up."""

    target: str
    device: str
    threads: int
    units: tuple[UnitCost, ...]
    borders: tuple[BorderCost, ...]
    fixed_us: float
    """Time that no plan can change: nodes outside units and the runtime's own overhead."""
    pure_us: dict[str, float]
    """Scheme -> median time of the model with all that it can in that scheme, measured in one interleaved run."""
    residual_percent: float
    """Mean absolute error of the fitted table on the measured variants."""
    float_bytes: int = 0
    """Size of the float model as it is written, from which predicted sizes start; 0 where no model was written for this
    table, and they start from the size of the given file."""
    shared: tuple[SharedWeight, ...] = ()
    """Constants that several units read; they are no part of the bytes of `units`."""
    estimated: bool = False
    """True where nothing was measured: times follow from peak rates of `device`."""
    left_out_percent: tuple[float, ...] = ()
    """Error of each random variant over its time (positive: predicted too slow), by a fit that has not seen it."""
    given_us: float | None = None
    """Median time of the float model as it was given, in the same interleaved run as `pure_us`, whose models all have
    the graph rewrites of a plan; None where it was not measured."""

    def listing(self) -> Listing:
        """Return time and weight bytes of each unit in each scheme as a table."""
        rows = [(one.unit, scheme, us, one.bytes[scheme]) for one in self.units for scheme, us in one.us.items()]
        return Listing(f"costs on {self.device}", ("unit", "scheme", "us", "bytes"), rows)

    @property
    def float_us(self) -> float:
        """Latency of the float model as it was given, to which ratios refer.

        Where it was not measured it is what the table predicts of the model with all units in float.
        """
        if self.given_us is not None:
            return self.given_us
        return self.fixed_us + sum(c.us[BASELINE] for c in self.units)


class Keep(Given, frozen=True, kw_only=True):
    """A pattern of units that run in one scheme, whatever measurement says.

    It matches unit ids, node names, regions and operator types as a shell glob; `{4..20}` is any number of a range.
    """

    scheme: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.scheme}:{self.pattern}"


class Budget(Given, frozen=True, kw_only=True):
    """What a plan must respect. All given limits hold together."""

    latency_ratio: float | None = None
    """Largest latency as a part of the float model's, e.g. 0.7."""
    latency_ms: float | None = None
    latency: str | msgspec.UnsetType | None = msgspec.UNSET
    """Either of them as text, `0.7x` or `12ms`, which is read at once and not kept."""
    size_bytes: int | None = None
    min_sqnr_db: float | None = None
    """Floor on the SQNR of every head."""
    head_sqnr_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Floors on the SQNR of single heads, by name; where both are given the higher one holds."""
    max_drop: dict[str, float] = msgspec.field(default_factory=dict)
    """Largest drop of task metrics against float, by name, in the metric's own unit: 0.003 of AP50-95 is 0.3 points.
    The name `FIRST` is the first metric of the task."""
    min_agreement: float | None = None
    """Least agreement with float on the task, a part in 0..1 that needs no labels, see `TaskMetric.agreement`."""
    confidence: float = DROP_CONFIDENCE
    """Probability, above 0.5 and below 1, with which limits on the task must hold, by all that was evaluated, to count
    as met, or not hold to count as missed; between both they are undecided."""
    keep: tuple[Keep, ...] = ()
    """Units that run in a given scheme; of several patterns that name a unit the last one holds."""
    by_default: bool = False
    """Whether nobody asked for the limits: the search aims at them, and no verdict follows from missing them."""

    def __post_init__(self) -> None:
        """Refuse limits that no arithmetic can carry."""
        super().__post_init__()
        if isinstance(self.latency, str):
            if self.latency_ratio is not None or self.latency_ms is not None:
                raise BudgetError("The budget limits the latency twice. Give latency, latency_ratio or latency_ms.")
            number, unit = number_with_unit(self.latency, "Budget(latency=...)", "0.7x or 12ms", ("x", "ms"))
            msgspec.structs.force_setattr(self, "latency_ratio" if unit == "x" else "latency_ms", number)
        msgspec.structs.force_setattr(self, "latency", msgspec.UNSET)
        above = [v for v in (self.latency_ratio, self.latency_ms, self.size_bytes) if v is not None]
        floors = [*self.head_sqnr_db.values(), 0.0 if self.min_sqnr_db is None else self.min_sqnr_db]
        said = {
            n: v for n, v in msgspec.structs.asdict(self).items() if v and n not in ("keep", "confidence", "by_default")
        }
        if not all(0 <= v < math.inf for v in above) or not all(map(math.isfinite, self.max_drop.values())):
            raise BudgetError(f"The budget {said} has a limit that is negative or not finite. Give finite numbers.")
        if not all(abs(f) <= MOST_DB for f in floors):
            raise BudgetError(f"The budget {said} has a floor that is not finite, or beyond {MOST_DB:g} dB.")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise BudgetError(f"The least agreement is {self.min_agreement:g}; expected a part in 0..1, such as 0.98.")
        if not 0.5 < self.confidence < 1:
            raise BudgetError(
                f"The confidence (--confidence) is {self.confidence:g}; expected a probability above 0.5 and below 1, "
                f"such as {DROP_CONFIDENCE:g}."
            )

    @property
    def limited(self) -> bool:
        """Whether it has limits, beside schemes of units."""
        return msgspec.structs.replace(self, keep=(), confidence=DROP_CONFIDENCE, by_default=False) != Budget()

    @property
    def on_task(self) -> bool:
        """Whether the task is limited, which only evaluation tells."""
        return bool(self.max_drop) or self.min_agreement is not None

    @property
    def on_task_alone(self) -> bool:
        """Whether the task is limited and nothing else is."""
        rest = msgspec.structs.replace(self, max_drop={}, min_agreement=None)
        return self.on_task and not rest.limited

    def floor_db(self, head: str) -> float | None:
        """Return the floor on the SQNR of one head; None without one."""
        floors = [f for f in (self.min_sqnr_db, self.head_sqnr_db.get(head)) if f is not None]
        return max(floors) if floors else None

    @property
    def has_floor(self) -> bool:
        """Whether the SQNR of any head has a floor."""
        return self.min_sqnr_db is not None or bool(self.head_sqnr_db)


class Choice(Record, frozen=True, kw_only=True):
    """Scheme of one unit, with the reason that the report shows."""

    unit: str
    scheme: str
    reason: str
    group: str = ""
    """Reason in few words, without numbers, under which units that stay in the baseline are summed up; else empty."""


class UnitDamage(Record, frozen=True, kw_only=True):
    """What rounding one unit alone does to the head that suffers most, divergences left out, as its table has it."""

    head: str
    sqnr_db: float
    exact: bool = False
    """Whether execution measured it; otherwise the probe matrix predicts it."""


class HeadDamage(Record, frozen=True, kw_only=True):
    """SQNR of one head in dB: predicted before anything was verified and, once verified, measured.

    Of heads named `... KL` it is 10 log10(1 nat / divergence).
    """

    head: str
    predicted_db: Estimate
    measured_db: Estimate | None = None
    corrected_db: Estimate | None = None
    """What samples that no part of the run has seen should give, by all that is known, see `verify.summary.expected`;
    None before anything was measured."""


class ParetoPoint(Record, frozen=True, kw_only=True):
    """One non-dominated plan of the search."""

    schemes: dict[str, str]
    """Unit -> scheme, of the units that do not run in `BASELINE`."""
    predicted_latency_us: float
    size_bytes: int
    damage: float
    """Relative output error energy, mean over heads."""
    sqnr_db: tuple[float, ...]
    """Predicted SQNR of each head, in the order of the heads."""
    optimality_gap: float = 0.0
    """What the solver left open for this latency, see `PlanReport.optimality_gap`."""
    measured_ratio: float | None = None
    """Latency over float, in one interleaved sitting with the neighbours on the front; None where not measured."""
    measured_db: tuple[float, ...] | None = None
    """SQNR per head, measured beside it."""

    @property
    def chosen(self) -> Plan:
        """The plan as a mapping."""
        return Plan(self.schemes)


class SingleFormat(Record, frozen=True, kw_only=True):
    """What is predicted of the plan that puts all units that can into one scheme, and leaves the others."""

    scheme: str
    units: int
    """Number of units in it."""
    predicted_ratio: float
    """Latency over float."""
    predicted_size_bytes: int
    predicted_db: dict[str, float]
    """Head -> SQNR in dB, of heads named `... KL` dB below 1 nat."""
    within: bool
    """Whether it keeps the limits of the budget by prediction; limits on task metrics are not predicted."""
    best: bool = False
    """Whether it is the best one for the budget, which is measured beside the mixed model."""


class PlanReport(Tabular, Record, frozen=True, kw_only=True, dict=True):
    """`plan.json`: a plan for one target and budget, with reasons, predictions and the front around it."""

    model_sha256: str
    target: str
    budget: Budget
    choices: tuple[Choice, ...]
    heads: tuple[HeadDamage, ...]
    predicted_latency_us: float
    predicted_latency_interval_us: Estimate | None = None
    """The same with a 95 % prediction interval, from errors of the cost table on variants that it has not seen."""
    predicted_size_bytes: int
    optimality_gap: float
    """Part of what was minimized that the solver did not prove to be optimal, before the local search: of the additive
    damage, or under a floor alone of the time that is saved."""
    solved: bool = True
    """False where the solver stopped at its limit of nodes, for the plan or on the front, before the gap was small."""
    pareto: tuple[ParetoPoint, ...]

    def listing(self) -> Listing:
        """Return the scheme of each unit, with its reason, as a table in graph order."""
        rows = [(one.unit, one.scheme, one.reason) for one in self.choices]
        return Listing(f"plan for {self.target}", ("unit", "scheme", "reason"), rows)

    def front(self) -> Listing:
        """Return the plans of the Pareto front as a table, fastest first: predicted, and measured where they were."""
        columns = (
            "chosen",
            "units",
            "latency_ms",
            "size_bytes",
            *(f"{h.head} dB" for h in self.heads),
            "measured_ratio",
        )
        rows = [
            (
                point.chosen == self.chosen,
                ", ".join(f"{count} {scheme}" for scheme, count in point.chosen.counts().items()) or "float",
                point.predicted_latency_us / 1e3,
                point.size_bytes,
                *point.sqnr_db,
                point.measured_ratio,
            )
            for point in sorted(self.pareto, key=lambda point: point.predicted_latency_us)
        ]
        return Listing("Pareto front", columns, rows)

    @cached_property
    def chosen(self) -> Plan:
        """The plan as a mapping."""
        return Plan((c.unit, c.scheme) for c in self.choices)
