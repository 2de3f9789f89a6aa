"""A cost table in which nothing has a price yet."""

from __future__ import annotations

from bitalloy.core.plans import BorderCost, CostTable, UnitCost
from bitalloy.core.schemes import BASELINE
from bitalloy.core.units import UnitGraph
from bitalloy.targets.placement import all_conversions


def empty_table(units: UnitGraph) -> CostTable:
    """All units and borders of a model, for nothing."""
    zeros = [dict.fromkeys(u.allowed, 0) for u in units.units]
    return CostTable(
        target=units.target,
        device="",
        threads=1,
        units=tuple(UnitCost(unit=u.id, us=z, bytes=z) for u, z in zip(units.units, zeros, strict=True)),  # type: ignore[arg-type]
        borders=tuple(
            BorderCost(source=c.source, sink=c.sink, us_per_element=0.0, us=0.0) for c in all_conversions(units.schemes)
        ),
        fixed_us=0.0,
        pure_us={BASELINE: 0.0},
        residual_percent=0.0,
    )
