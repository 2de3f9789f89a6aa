"""What each scheme would cost on a device that is not here: an estimate from peak rates, never a measurement.

A kernel takes the longer of two times, that of its arithmetic at the device's peak and that of its memory traffic at
full bandwidth, and a fixed time to start. Real kernels reach neither peak, and fuse more or less than the target's
rules say: the table ranks schemes and borders, and its microseconds are not what a device will show.
"""

from __future__ import annotations

import msgspec
import numpy as np

from bitalloy.core.plans import BorderCost, CostTable, UnitCost
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Placement, Unit, UnitGraph
from bitalloy.formats import find_format, weight_bits
from bitalloy.measure.prices import latency_us
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, is_float, static_shape
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.targets.devices import Device
from bitalloy.targets.placement import all_conversions

FLOAT_BYTES, LEAST_WRITTEN = 4.0, 2.0
"""Size of a float32 number; and of the smallest number that a kernel which rounds what it reads hands on."""


def estimate_costs(graph: Graph, units: UnitGraph, device: Device) -> CostTable:
    """Estimate the cost table of a device that is not here; the table says that it is estimated.

    Args:
        graph: the model.
        units: the units of the model on a target of that device.
        device: peak rates.
    """
    rows = tuple(_unit(graph, unit, units, device) for unit in units.units)
    # kernels that round what they read belong to a compiler that fuses conversions with their neighbours
    start = device.start_us if any(e.placement is Placement.ENDS for e in units.edges) else 0.0
    per_byte, borders = 1e6 / device.bytes_per_second, []
    for conversion in all_conversions(units.schemes):
        size = sum(number_bytes(units.scheme(end or BASELINE)) for end in (conversion.source, conversion.sink))
        price = BorderCost(source=conversion.source, sink=conversion.sink, us_per_element=size * per_byte, us=start)
        borders.append(price)
    table = CostTable(
        target=units.target,
        device=f"{device.name} (estimated from peak rates)",
        threads=0,
        units=rows,
        borders=tuple(borders),
        fixed_us=0.0,
        pure_us={},
        residual_percent=0.0,
        estimated=True,
        float_bytes=Artefact({ONLY: graph.model}).size_bytes,
    )
    pure = {scheme.name: Plan.of(scheme.name, *units.able(scheme.name)) for scheme in units.schemes}
    return msgspec.structs.replace(table, pure_us={n: latency_us(table, units, plan) for n, plan in pure.items()})


def number_bytes(scheme: Scheme) -> float:
    """Return the size of one number of a tensor in a scheme."""
    if scheme.activation is None or scheme.dynamic:
        return FLOAT_BYTES
    return find_format(scheme.activation).bits / 8


def _unit(graph: Graph, unit: Unit, units: UnitGraph, device: Device) -> UnitCost:
    nodes = [graph.node[name] for name in unit.core]
    made = {v for n in nodes for v in n.outputs}
    read = {v for n in nodes for v in n.inputs if v is not None and v not in made and is_float(v)}
    weights = sum(int(np.prod(static_shape(v))) for v in read if constant(v) is not None)
    rounded = sum(site.elements for site in unit.weights)
    entering = sum(int(np.prod(static_shape(v))) for v in read if constant(v) is None)
    leaving = int(np.prod(static_shape(graph.value[unit.root])))

    def weight_bytes(scheme: Scheme) -> float:
        """Return the size of the constants; a unit that reads rounded numbers keeps its bias and others as they are."""
        size = weight_bits(scheme) / 8
        return weights * size if scheme.cast else (weights - rounded) * FLOAT_BYTES + rounded * size

    def us(scheme: Scheme) -> float:
        # a layer that reads rounded numbers hands on floats, which the next one rounds
        size = number_bytes(scheme)
        moved = entering * size + weight_bytes(scheme) + leaving * max(size, LEAST_WRITTEN)
        arithmetic = 2 * unit.macs / device.operations_per_second[scheme.name]
        return round(max(arithmetic, moved / device.bytes_per_second) * 1e6 + device.start_us, 3)

    known = [units.scheme(name) for name in (BASELINE, *unit.choices)]
    return UnitCost(
        unit=unit.id,
        us={scheme.name: us(scheme) for scheme in known},
        bytes={scheme.name: round(weight_bytes(scheme)) for scheme in known},
    )
