"""What a plan costs by a cost table."""

from __future__ import annotations

from scipy.special import stdtrit

from bitalloy.core.plans import BorderCost, CostTable
from bitalloy.core.records import Estimate
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.targets.placement import Conversion, borders


def latency_us(table: CostTable, units: UnitGraph, plan: Plan) -> float:
    """Predict the latency of a plan."""
    inside = sum(cost.us[plan.scheme_of(cost.unit)] for cost in table.units)
    return float(table.fixed_us + inside + borders_us(table, units, plan))


def conversion_prices(table: CostTable) -> dict[Conversion, BorderCost]:
    """Map each conversion to its price."""
    return {Conversion(price.source, price.sink): price for price in table.borders}


def borders_us(table: CostTable, units: UnitGraph, plan: Plan) -> float:
    """Predict the part of the latency that goes into conversions between schemes."""
    return sum(price.price_us(elements, count) for price, elements, count in _crossed(table, units, plan))


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
    own = sum(cost.saved_bytes(plan[cost.unit]) for cost in table.units if cost.unit in plan)
    return own + shared_bytes(table, Plan()) - shared_bytes(table, plan)


def shared_bytes(table: CostTable, plan: Plan) -> int:
    """Return the bytes of the weights that several units read, each once in every form that a plan needs."""
    return sum(shared.size(plan) for shared in table.shared)


def border_bytes(table: CostTable, units: UnitGraph, plan: Plan) -> float:
    """Predict the bytes of the file that convert tensors between schemes."""
    return sum(price.bytes * count for price, _, count in _crossed(table, units, plan))


def _crossed(table: CostTable, units: UnitGraph, plan: Plan) -> list[tuple[BorderCost, float, int]]:
    """List the prices of the conversions of a plan, each with the elements and the number of its tensors."""
    found, prices = borders(units, plan), conversion_prices(table)
    return [(prices[conversion], *found[conversion]) for conversion in sorted(found) if conversion in prices]
