"""What is known about units that would compute in a format of less range and precision, and whether they may."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.records import TensorRange
from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.units import Evidence, Unit, UnitGraph
from bitalloy.formats import find_format
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, constant, is_float, static_shape
from bitalloy.targets.base import Core, Offer, all_operators
from bitalloy.targets.patterns import stored_matrix

HALF_PRECISION = Offer(
    scheme=Scheme(name="fp16", activation="float16", weight="float16", cast=True),
    refuse=all_operators(ops.LOWERABLE, "FP16"),
)
"""The offer of targets with FP16 kernels for all of these operators, written as Cast."""


def stored_beside_half(
    name: str, weight: str, block: int, *, kernel: str = "", refuse: Callable[[Core, Sequence[ir.Node]], str]
) -> Offer:
    """Offer products in FP16 with weights that are stored in blocks along the reduction, as the target asks.

    Args:
        name: of the scheme.
        weight: format of the weights.
        block: number of weights that share a scale, which is an FP16 number.
        kernel: operator of the runtime that computes the product; empty for a DequantizeLinear on the weight.
        refuse: why the kernel does not take a product with a stored matrix; empty where it does.
    """

    def refused(core: Core, nodes: Sequence[ir.Node]) -> str:
        return stored_matrix(core, nodes) or HALF_PRECISION.refuse(core, nodes) or refuse(core, nodes)

    scheme = Scheme(
        name=name,
        activation="float16",
        weight=weight,
        granularity=Granularity.BLOCK,
        block=block,
        kernel=kernel,
        cast=True,
    )
    return Offer(scheme=scheme, refuse=refused, usual=False)


def judge(graph: Graph, units: UnitGraph, ranges: Mapping[str, TensorRange]) -> UnitGraph:
    """Record the evidence of every unit that could compute in another format, and refuse that where it is not safe.

    Args:
        graph: the model.
        units: the units of the model on a target.
        ranges: the ranges of all tensors of these units, from `tensors_to_judge`.
    """
    casts = [scheme for scheme in units.schemes if scheme.cast]
    changed = []
    for unit in units.units:
        for scheme in (s for s in casts if s.name in unit.allowed):
            found = examine(graph, unit, ranges)
            error, reason = find_format(scheme.activation).safe(found)
            found = msgspec.structs.replace(found, error=round(error, 6), reason=reason)
            if reason:
                unit = unit.without(scheme.name, reason)
            unit = msgspec.structs.replace(unit, evidence={**unit.evidence, scheme.name: found})
        changed.append(unit)
    return msgspec.structs.replace(units, units=tuple(changed))


def tensors_to_judge(graph: Graph, units: UnitGraph) -> set[str]:
    """Name the tensors that calibration must see: all that units read or write which may compute in a format."""
    casts = {scheme.name for scheme in units.schemes if scheme.cast}
    nodes = (graph.node[n] for u in units.units if casts.intersection(u.allowed) for n in (*u.core, *u.tail))
    return {str(v.name) for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and _computed(v)}


def examine(graph: Graph, unit: Unit, ranges: Mapping[str, TensorRange]) -> Evidence:
    """Collect what calibration and weights say about one unit."""
    nodes = [graph.node[n] for n in (*unit.core, *unit.tail)]
    seen = {str(v.name): v for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and is_float(v)}
    for node in nodes:
        for slot in ops.full_slots(node.op_type):
            if slot < len(node.inputs) and node.inputs[slot] is not None:
                seen.pop(str(node.inputs[slot].name), None)  # type: ignore[union-attr]
    known = [ranges[name] for name, v in seen.items() if _computed(v)]
    arrays = [array for v in seen.values() if (array := constant(v)) is not None]
    constants = [np.abs(a).max(initial=0.0, where=np.isfinite(a)) for a in arrays]  # infinity stays what it is
    magnitude = float(max([*(r.magnitude for r in known), *map(float, constants)], default=0.0))
    subnormal = max((r.subnormal for r in known), default=0.0)
    sums = [_sum_of(node, ranges) for node in nodes]
    depth, partial = max(d for d, _ in sums), max(p for _, p in sums)
    return Evidence(magnitude=magnitude, partial_sum=partial, subnormal=subnormal, depth=depth)


def _sum_of(node: ir.Node, ranges: Mapping[str, TensorRange]) -> tuple[int, float]:
    """Return (products per output element, largest running sum) of a product of matrices or a convolution."""
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
