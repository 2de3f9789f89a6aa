"""What each precision would cost on a device that is not here: an estimate from peak rates, never a measurement.

A kernel takes the longer of two times, that of its arithmetic at the device's peak and that of its memory traffic at
full bandwidth, and a fixed time to start. Real kernels reach neither peak, and fuse more or less than the target's
rules say: the table ranks precisions and borders, and its microseconds are not what a device will show.
"""

from __future__ import annotations

import msgspec
import numpy as np

from bitalloy.core.plans import CostTable, UnitCost
from bitalloy.core.records import Precision
from bitalloy.core.units import Placement, Unit, UnitGraph
from bitalloy.model.load import Graph, constant, is_float, static_shape
from bitalloy.targets.base import Device

BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.INT8: 1}


def estimate(graph: Graph, units: UnitGraph, device: Device) -> CostTable:
    """A cost table for a device, marked as estimated.

    Args:
        graph: the model.
        units: its units on a target of that device.
        device: peak rates.
    """
    rows = tuple(_unit(graph, unit, device) for unit in units.units)
    per_byte = 1e6 / device.bytes_per_second
    # kernels that round what they read belong to a compiler that fuses conversions with their neighbours
    start = device.start_us if any(e.placement is Placement.ENDS for e in units.edges) else 0.0
    table = CostTable(
        target=units.target,
        device=device.name,
        threads=0,
        units=rows,
        border_us_per_element=(BYTES[Precision.FP32] + BYTES[Precision.INT8]) * per_byte,
        border_us=start,
        cast_us_per_element=(BYTES[Precision.FP32] + BYTES[Precision.FP16]) * per_byte,
        cast_us=start,
        fixed_us=0.0,
        float_us=0.0,
        int8_us=0.0,
        residual_percent=0.0,
        estimated=True,
    )
    float_us, int8_us = (table.latency_us(units, plan) for plan in (frozenset[str](), units.lowest()))
    return msgspec.structs.replace(table, float_us=float_us, int8_us=int8_us)


def _unit(graph: Graph, unit: Unit, device: Device) -> UnitCost:
    nodes = [graph.node[name] for name in unit.core]
    made = {v for n in nodes for v in n.outputs}
    read = {v for n in nodes for v in n.inputs if v is not None and v not in made and is_float(v)}
    weights = sum(int(np.prod(static_shape(v))) for v in read if constant(v) is not None)
    rounded = sum(site.elements for site in unit.weights)
    entering = sum(int(np.prod(static_shape(v))) for v in read if constant(v) is None)
    leaving = int(np.prod(static_shape(graph.value[unit.root])))

    def us(precision: Precision) -> float:
        size = BYTES[precision]
        # a layer in INT8 reads integers, keeps its bias and hands on floats, which the next one rounds
        kept = (weights - rounded) * 4 + rounded * size if precision is Precision.INT8 else weights * size
        moved = entering * size + kept + leaving * max(size, BYTES[Precision.FP16])
        arithmetic = 2 * unit.macs / device.operations_per_second[precision]
        return round(max(arithmetic, moved / device.bytes_per_second) * 1e6 + device.start_us, 3)

    return UnitCost(
        unit=unit.id,
        fp32_us=us(Precision.FP32),
        fp16_us=us(Precision.FP16) if Precision.FP16 in unit.allowed else None,
        int8_us=us(Precision.INT8) if Precision.INT8 in unit.allowed else None,
        fp32_bytes=4 * weights,
        fp16_bytes=2 * weights,
        int8_bytes=rounded + 4 * (weights - rounded),
    )
