"""Reading of nodes and tensors of an `onnx_ir` graph as plain Python values."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy import ops


@dataclass(frozen=True, slots=True)
class Consumer:
    """One use of a tensor: input `slot` of `node`."""

    node: ir.Node
    slot: int


def name_of(node: ir.Node) -> str:
    """Return the name of a node in normal form."""
    assert node.name, "normal form gives every node a name"
    return node.name


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer, or None where the value is computed or absent."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def is_static(value: ir.Value) -> bool:
    """Return whether all sizes of a tensor are known."""
    return value.shape is not None and value.shape.is_static()


def elements(value: ir.Value) -> int:
    """Count the numbers of a tensor; 0 behind a selection, where that depends on the data."""
    return math.prod(static_shape(value)) if is_static(value) else 0


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a tensor in normal form, as integers."""
    assert value.shape is not None and is_static(value), f"{value.name} has no static shape"
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def is_float(value: ir.Value) -> bool:
    """Return whether a tensor carries float32 data."""
    return value.dtype == ir.DataType.FLOAT


def consumers(value: ir.Value) -> tuple[Consumer, ...]:
    """Return all uses of a tensor by nodes, in the order in which the graph registered them."""
    return tuple(Consumer(node, slot) for node, slot in value.uses())


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Return what a node reads, and what the graphs that it runs read of the graph around them."""
    yield from (v for v in node.inputs if v is not None)
    for item in node.attributes.values():
        if item.type == ir.AttributeType.GRAPH:
            inner = item.as_graph()
            own = {*inner.inputs, *inner.initializers.values(), *(v for part in inner for v in part.outputs)}
            read = (v for part in inner for v in read_values(part))
            yield from (v for v in (*read, *inner.outputs) if v not in own)


def attribute(node: ir.Node, name: str, default: object) -> object:
    """Return the value of a node attribute as plain Python (int, float, str, tuple), or `default`."""
    attr = node.attributes.get(name)
    if attr is None:
        return default
    value = attr.value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def bias_slot(node: ir.Node) -> int | None:
    """Return which operand of a Conv, Gemm or Add is a constant that it adds; None where none or both are."""
    slots = (0, 1) if node.op_type == "Add" else (2,)
    found = [s for s in slots if s < len(node.inputs) and constant(node.inputs[s]) is not None]
    return found[0] if len(found) == 1 else None


def beside_output(node: ir.Node, channels: np.ndarray) -> np.ndarray:
    """Return numbers per channel, shaped to be added to what a Conv, Gemm or MatMul gives."""
    rank = len(node.outputs[0].shape or ())
    return channels.reshape(-1, *(1,) * (rank - 1 - ops.channel_axis(node.op_type, rank)))


def node_weight_axes(node: ir.Node) -> tuple[int, int]:
    """Return the axes of a weight of a Conv, Gemm or the like: the axis of input and that of output channels."""
    weight = node.inputs[1]
    assert weight is not None, "a product has two operands"
    return ops.weight_axes(
        node.op_type, len(static_shape(weight)), {name: attribute(node, name, 0) for name in node.attributes}
    )


def moved_from(value: ir.Value, operators: Collection[str]) -> Iterator[ir.Value]:
    """Yield the tensors that one comes from by operators of these types, each the first operand, the nearest first."""
    source: ir.Value | None = value
    while source is not None and (node := source.producer()) is not None and node.op_type in operators:
        source = node.inputs[0]
        if source is not None:
            yield source
