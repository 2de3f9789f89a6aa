"""Prices that explain measured times: a factor for the kernels of each scheme, and the price of borders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from scipy.optimize import nnls

from bitalloy.core.plans import BorderCost, CostTable
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitGraph
from bitalloy.measure.prices import borders_us, latency_us
from bitalloy.targets.placement import Conversion, all_conversions, borders


@dataclass(frozen=True)
class PriceFit:
    """Prices that explain measured times: times of kernels in each scheme, and of borders."""

    schemes: tuple[str, ...]
    scales: np.ndarray
    """(schemes,): wall time over kernel time."""
    borders: tuple[BorderCost, ...]
    residual_percent: float
    left_out_percent: tuple[float, ...]


def fit_prices(
    units: UnitGraph,
    schemes: Sequence[str],
    plans: Sequence[Plan],
    kernel: Mapping[str, Mapping[str, float]],
    wall: np.ndarray,
) -> PriceFit:
    """Fit wall time = kernels in each scheme, scaled, + price of borders; the pure variants weigh most.

    Both directions of the conversions into and out of a scheme have one price.
    """
    kinds: dict[str, list[Conversion]] = {}
    for conversion in all_conversions(tuple(units.scheme(name) for name in schemes)):
        lowered = [end for end in (conversion.sink, conversion.source) if end not in ("", BASELINE)]
        kinds.setdefault(lowered[0], []).append(conversion)
    crossed = [borders(units, plan) for plan in plans]
    columns = [
        [sum(kernel[u.id].get(name, 0.0) for u in units.units if plan.scheme_of(u.id) == name) for plan in plans]
        for name in schemes
    ]
    columns += [
        [sum(found[c][part] for c in conversions if c in found) for found in crossed]
        for conversions in kinds.values()
        for part in (0, 1)
    ]
    design = np.array(columns, np.float64).T
    weight = np.where(np.arange(len(plans)) < len(schemes), 10.0, 1.0) / wall
    prices, _ = nnls(design * weight[:, None], wall * weight)
    predicted = design @ prices
    found = []
    for i, conversions in enumerate(kinds.values()):
        per_element, each = (float(p) for p in prices[len(schemes) + 2 * i : len(schemes) + 2 * i + 2])
        found += [BorderCost(source=c.source, sink=c.sink, us_per_element=per_element, us=each) for c in conversions]
    return PriceFit(
        schemes=tuple(schemes),
        scales=prices[: len(schemes)],
        borders=tuple(found),
        residual_percent=round(float(np.mean(np.abs(predicted / wall - 1))) * 100, 2),
        left_out_percent=tuple(round(100 * e, 2) for e in _left_out(design, weight, wall, len(schemes))),
    )


def _left_out(design: np.ndarray, weight: np.ndarray, wall: np.ndarray, pure: int) -> list[float]:
    """Return the error of each mixture over its time by a fit without it; the pure variants stay in all fits."""
    found = []
    for index in range(pure, len(wall)):
        others = np.arange(len(wall)) != index
        prices, _ = nnls(design[others] * weight[others, None], wall[others] * weight[others])
        found.append(float(design[index] @ prices / wall[index] - 1))
    return found


def corrected_table(table: CostTable, units: UnitGraph, plan: Plan, measured_ratio: float) -> CostTable:
    """Correct a table so that it reproduces a measured plan: it scales the price of borders, the least certain part.

    Args:
        table: the table that predicted the plan.
        units: the units of the model.
        plan: the plan that was measured.
        measured_ratio: the latency of the plan over that of the float model.
    """
    found = borders(units, plan)
    count, price = sum(number for _, number in found.values()), borders_us(table, units, plan)
    missing = measured_ratio * table.float_us - (latency_us(table, units, plan) - price)
    if missing <= 0 or count == 0:
        return table
    if price <= 0:
        changed = [msgspec.structs.replace(b, us=missing / count) for b in table.borders]
    else:
        scale = missing / price
        changed = [
            msgspec.structs.replace(b, us=b.us * scale, us_per_element=b.us_per_element * scale) for b in table.borders
        ]
    return msgspec.structs.replace(table, borders=tuple(changed))
