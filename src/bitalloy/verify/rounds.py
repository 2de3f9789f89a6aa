"""What a measurement says about a budget: how far it is missed, and what to search with next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from bitalloy.core.planned import Measured, Planned, ratio_limit
from bitalloy.core.plans import MOST_DB, Budget, CostTable
from bitalloy.core.schemes import BASELINE
from bitalloy.core.units import UnitGraph
from bitalloy.measure.bench import TOLERANCE
from bitalloy.measure.fit import corrected_table
from bitalloy.model.heads import is_divergence

DEFAULT_RATIO = 0.7
"""What is aimed at where nobody limits anything, over the time that people pay anyway."""
MARGIN_DB = 0.2
"""SQNR by which a floor is raised beyond the gap to it."""


@dataclass(frozen=True)
class MeasuredStanding:
    """What was measured of a plan and counts for the budget."""

    ratio: float
    """Latency over that of the float model."""
    milliseconds: float
    size_bytes: int
    sqnr_db: dict[str, float]
    """Head -> measured SQNR, divergences left out."""


def plain_sqnr(planned: Planned, measured: Measured) -> dict[str, float]:
    """Return the measured SQNR in dB of the heads of a plan, divergences left out."""
    pairs = zip(planned.plan.heads, measured.sqnr_mixed, strict=True)
    return {head.head: estimate.value for head, estimate in pairs if not is_divergence(head.head)}


def shortfall(budget: Budget, sqnr_db: dict[str, float]) -> dict[str, float]:
    """Return by head the dB that are missing to its floor; heads at or above their floor are left out."""
    floors = {head: budget.floor_db(head) for head in sqnr_db}
    return {h: f - sqnr_db[h] for h, f in floors.items() if f is not None and f > sqnr_db[h]}


def budget_misfit(budget: Budget, found: MeasuredStanding, *, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Rate a plan: how far it misses the budget, then its damage or, under a floor, its latency; less is better."""
    miss = 0.0
    if budget.latency_ratio is not None:
        miss += max(0.0, found.ratio / (budget.latency_ratio * tolerance) - 1)
    if budget.latency_ms is not None:
        miss += max(0.0, found.milliseconds / (budget.latency_ms * tolerance) - 1)
    miss += missed_size(budget, found.size_bytes)
    miss += max(shortfall(budget, found.sqnr_db).values(), default=0.0)
    return miss, found.ratio if seeks_speed(budget) else -float(np.mean(list(found.sqnr_db.values())))


def missed_size(budget: Budget, size_bytes: float) -> float:
    """Return the part of a limit on the size by which a plan misses it; 0 where it keeps it or there is none."""
    return max(0.0, size_bytes / budget.size_bytes - 1) if budget.size_bytes is not None else 0.0


def fits_best(budget: Budget, found: Sequence[MeasuredStanding]) -> int:
    """Return the position of the plan that fits a budget best.

    It is the first by `budget_misfit`, unless that only misses the size by less: a plan that is better on everything
    else takes its place then.
    """
    best = min(range(len(found)), key=lambda i: budget_misfit(budget, found[i]))
    for index in sorted(range(len(found)), key=lambda i: budget_misfit(budget, found[i])):
        if missed_size(budget, found[best].size_bytes) and _better_but_for_size(found[index], found[best]):
            best = index
    return best


def _better_but_for_size(one: MeasuredStanding, other: MeasuredStanding) -> bool:
    pairs = [(other.ratio, one.ratio), *((one.sqnr_db[h], other.sqnr_db[h]) for h in other.sqnr_db)]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def default_ratio(units: UnitGraph, table: CostTable) -> float:
    """Return the latency over float that is aimed at where nobody limits anything."""
    before = table.pure_us[units.usual] / table.float_us if units.usual != BASELINE else 1.0
    return round(DEFAULT_RATIO * before, 4)


def nearer_default(budget: Budget, wanted: float, measured: float) -> Budget:
    """Return a budget that nobody asked for with an aim as near to the default as a measured plan reaches.

    Its first aim is what the cost table reaches. A plan that turns out faster shows that more is in reach.

    Args:
        budget: the budget of the search.
        wanted: see `default_ratio`.
        measured: latency over float of a plan, as measured.
    """
    if not budget.by_default or budget.latency_ratio is None:
        return budget
    reached = max(wanted, min(budget.latency_ratio, measured))
    return msgspec.structs.replace(budget, latency_ratio=round(reached, 4))


def seeks_speed(budget: Budget) -> bool:
    """Tell whether the fastest plan above a floor is wanted, not the least damaging one within limits."""
    return budget.has_floor and budget.latency_ratio is None and budget.latency_ms is None and budget.size_bytes is None


def next_search(
    units: UnitGraph, asked: Budget, budget: Budget, planned: Planned, measured: Measured, *, repaired: bool = False
) -> tuple[Budget, CostTable] | None:
    """Say what to search with next, or None where the measurement meets the user's budget and uses it.

    Case 1. Too slow: the cost table is corrected by the measured plan. Under a floor on SQNR alone, this is a plan that
            is slower than the float model.
    Case 2. Too much damage: the floors are raised by the gaps, except where the tables were repaired: they predict the
            measured damage now.
    Case 3. Faster than a limit asks for, where the least damage within it is sought: the limit of the search is raised
            by the ratio, so that the time left buys accuracy.
    """
    before, table = asked, planned.cost
    limit = ratio_limit(budget, planned)
    if limit is None and budget.size_bytes is None:
        limit = 1.0
    if planned.cost.estimated:
        limit = None  # an estimate has nothing to correct it by
    if limit is not None and measured.ratio > limit * TOLERANCE:
        table = corrected_table(table, units, planned.plan.chosen, measured.ratio)
        asked = msgspec.structs.replace(asked, latency_ratio=budget.latency_ratio, latency_ms=budget.latency_ms)
    elif limit is not None and not budget.has_floor and measured.ratio * TOLERANCE < limit:
        asked = _slower(asked, limit / measured.ratio)
    missing = {} if repaired else shortfall(budget, plain_sqnr(planned, measured))
    if missing:
        higher = {h: (asked.floor_db(h) or 0.0) + gap + MARGIN_DB for h, gap in missing.items()}
        raised = {h: min(round(floor, 3), MOST_DB) for h, floor in higher.items()}
        asked = msgspec.structs.replace(asked, head_sqnr_db={**asked.head_sqnr_db, **raised})
    changed = asked != before or table is not planned.cost
    return (asked, table) if changed else None


def _slower(asked: Budget, factor: float) -> Budget:
    """Raise the limits of a budget on latency."""
    ratio, milliseconds = (
        None if value is None else round(value * factor, 4) for value in (asked.latency_ratio, asked.latency_ms)
    )
    return msgspec.structs.replace(asked, latency_ratio=ratio, latency_ms=milliseconds)
