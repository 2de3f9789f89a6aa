"""What may run in FP16: which operators, and which units are safe in it.

A unit is refused FP16 where one of these holds:

Case 1. Overflow: a tensor or constant of the unit reaches half of 65504. Calibration sees samples, not all inputs.
Case 2. Overflow inside a sum of products: the largest possible running sum, from the ranges of its inputs and its own
        weights, exceeds 65504. Kernels may hold it in FP16.
Case 3. Subnormals: of a tensor more than half of the non-zero values lie below 6.1e-5, where FP16 loses bits.
Case 4. Accumulation: the expected relative error of a sum of n products in FP16, sqrt(n) / 2048 (Higham and Mary, "A
        New Approach to Probabilistic Rounding Error Analysis", 2019, with lambda = 1), exceeds 1/16: n > 16384.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.records import HalfSafety, Precision, TensorRange, Unit, UnitGraph
from bitalloy.formats.affine import FP16_MAX
from bitalloy.model.load import Graph, attribute, constant, is_float, static_shape

HEADROOM = 2.0
LARGEST_SUBNORMAL = 0.5
LARGEST_ERROR = 1 / 16


def judge(graph: Graph, units: UnitGraph, ranges: Mapping[str, TensorRange]) -> UnitGraph:
    """Record the evidence of every unit that could run in FP16, and take FP16 from those that are not safe.

    Args:
        graph: the model.
        units: its units on a target.
        ranges: of all tensors of these units, from `tensors`.
    """
    changed = []
    for unit in units.units:
        if Precision.FP16 in unit.allowed:
            safety = examine(graph, unit, ranges)
            if safety.reason:
                unit = unit.without(Precision.FP16, safety.reason)
            unit = msgspec.structs.replace(unit, half=safety)
        changed.append(unit)
    return msgspec.structs.replace(units, units=tuple(changed))


def tensors(graph: Graph, units: UnitGraph) -> set[str]:
    """Names of the tensors that calibration must see to judge: all that units read or write which may take FP16."""
    nodes = (graph.node[n] for u in units.units if Precision.FP16 in u.allowed for n in (*u.core, *u.tail))
    return {str(v.name) for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and _computed(v)}


def examine(graph: Graph, unit: Unit, ranges: Mapping[str, TensorRange]) -> HalfSafety:
    """Evidence for or against FP16 in one unit."""
    nodes = [graph.node[n] for n in (*unit.core, *unit.tail)]
    seen = {str(v.name): v for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and is_float(v)}
    for node in nodes:
        for slot in ops.full_slots(node.op_type):
            if slot < len(node.inputs) and node.inputs[slot] is not None:
                seen.pop(str(node.inputs[slot].name), None)  # type: ignore[union-attr]
    known = [ranges[name] for name, v in seen.items() if _computed(v)]
    constants = [np.abs(array).max(initial=0.0) for v in seen.values() if (array := constant(v)) is not None]
    magnitude = float(max([*(r.magnitude for r in known), *map(float, constants)], default=0.0))
    subnormal = max((r.subnormal for r in known), default=0.0)
    sums = [_sum_of(node, ranges) for node in nodes]
    depth, partial = max(d for d, _ in sums), max(p for _, p in sums)
    error = math.sqrt(depth) / 2048
    reason = ""
    if magnitude * HEADROOM > FP16_MAX:
        reason = f"FP16 would overflow: values reach {magnitude:.3g}, and it ends at 65504"
    elif partial > FP16_MAX:
        reason = f"FP16 could overflow while {depth} products are summed up: the sum may reach {partial:.3g}"
    elif subnormal > LARGEST_SUBNORMAL:
        reason = f"{100 * subnormal:.0f} % of a tensor lies below 6.1e-5, where FP16 loses bits"
    elif error > LARGEST_ERROR:
        reason = f"a sum of {depth} products would lose {100 * error:.1f} % in FP16"
    return HalfSafety(
        magnitude=magnitude, partial_sum=partial, subnormal=subnormal, depth=depth, error=round(error, 6), reason=reason
    )


def _sum_of(node: ir.Node, ranges: Mapping[str, TensorRange]) -> tuple[int, float]:
    """(products per output element, largest running sum) of a product of matrices or a convolution."""
    if node.op_type not in ops.WEIGHTED:
        return 0, 0.0
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    weight, shape = constant(right), static_shape(right)
    match node.op_type:
        case "Conv":
            axes: tuple[int, ...] = tuple(range(1, len(shape)))
        case "ConvTranspose":
            axes = (0, *range(2, len(shape)))
        case "Gemm":
            axes = (1,) if attribute(node, "transB", 0) else (0,)
        case _:
            axes = (max(len(shape) - 2, 0),)
    depth = math.prod(shape[a] for a in axes)
    if weight is None:
        return depth, depth * _magnitude(left, ranges) * _magnitude(right, ranges)
    return depth, float(np.abs(weight).sum(axis=axes, dtype=np.float64).max(initial=0.0)) * _magnitude(left, ranges)


def _magnitude(value: ir.Value, ranges: Mapping[str, TensorRange]) -> float:
    array = constant(value)
    return ranges[str(value.name)].magnitude if array is None else float(np.abs(array).max(initial=0.0))


def _computed(value: ir.Value) -> bool:
    return is_float(value) and constant(value) is None
