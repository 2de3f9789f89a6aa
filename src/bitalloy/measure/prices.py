"""What a plan costs by a cost table."""

from __future__ import annotations

from scipy.special import stdtrit

from bitalloy.core.plans import CostTable
from bitalloy.core.records import Estimate
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.targets.placement import Conversion, borders


def latency_us(table: CostTable, units: UnitGraph, plan: Plan) -> float:
    """Predict the latency of a plan."""
    inside = sum(cost.us[plan.scheme_of(cost.unit)] for cost in table.units)
    return float(table.fixed_us + inside + borders_us(table, units, plan))


def borders_us(table: CostTable, units: UnitGraph, plan: Plan) -> float:
    """Predict the part of the latency that goes into conversions between schemes."""
    found = borders(units, plan)
    prices = {(price.source, price.sink): price for price in table.borders}
    return sum(prices[c.source, c.sink].price_us(*found[c]) for c in sorted(found) if (c.source, c.sink) in prices)


def latency_interval_us(table: CostTable, units: UnitGraph, plan: Plan) -> Estimate | None:
    """Predict the latency with a 95 % interval (Student's t) from the variants that were left out of fits.

    None where nothing was measured.
    """
    if not table.left_out_percent:
        return None
    value, count = latency_us(table, units, plan), len(table.left_out_percent)
    spread = sum(e * e for e in table.left_out_percent) / count
    reach = value * float(stdtrit(count, 0.975)) * spread**0.5 / 100
    return Estimate(value=round(value, 2), low=round(max(value - reach, 0.0), 2), high=round(value + reach, 2))


def saved_bytes(table: CostTable, plan: Plan) -> int:
    """Return the bytes of weights that a plan saves in the file against the float model, borders left out."""
    return sum(cost.saved_bytes(plan[cost.unit]) for cost in table.units if cost.unit in plan)


def border_bytes(table: CostTable, units: UnitGraph, plan: Plan) -> float:
    """Predict the bytes of the file that convert tensors between schemes."""
    found = borders(units, plan)
    prices = {Conversion(price.source, price.sink): price.bytes for price in table.borders}
    return float(sum(prices.get(conversion, 0.0) * count for conversion, (_, count) in found.items()))
