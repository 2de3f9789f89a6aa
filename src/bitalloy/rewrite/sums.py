"""Convolutions and products of rounded numbers that write FP16, for runtimes whose kernels write what a graph says.

With weights per channel, TensorRT for RTX computes Conv(DQ(x), DQ(w)) by a kernel that writes float32, and multiplies
by the channels' scales in the kernel behind it, which rounds for the next layer. Where both DequantizeLinear make FP16
on one scale each, the first kernel writes FP16: half as much is written, and read again. So a sum of rounded numbers

    y = Conv(DQ(x, s), DQ(w, t), b)                      in float32, t per channel

becomes, with the same numbers but for the rounding of each sum to FP16,

    y = Cast(Conv(DQ(x, p), DQ(w, q))) * (s t / p q) + b

where p and q are powers of two, so that no sum can leave FP16: their product times the number of products, the largest
number of either format and 2 is at most 65504. The smallest sum of integers stays a normal number up to 32000 products.
Conv, MatMul and Gemm with stored weights are written so; others, and those with a zero point, stay as they are.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.formats import find_format
from bitalloy.formats.base import cast_type
from bitalloy.model.metadata import TAG
from bitalloy.model.opset import raise_opset
from bitalloy.model.read import attribute, constant
from bitalloy.model.write import add_initializer, drop_unread, insert_behind, namer, node_namer
from bitalloy.rewrite.cast import stored_reader

SUMS = "float16"
"""Format of the sums."""
LEAST_OPSET = 19
"""First version of ONNX's operators whose DequantizeLinear makes FP16."""
LARGEST_SUM, ROOM = float(np.finfo(np.float16).max), 2.0
TENSOR_EXPONENT = -5
"""Of the scale p, the same for all, so that layers that read one tensor share what reads it."""


def halve_sums(model: ir.Model) -> None:
    """Let kernels of rounded numbers write FP16, in place.

    A model whose operators have no later version that means the same stays as it is.

    Args:
        model: as a plan rewrote it.
    """
    found = [(node, scales) for node in model.graph if (scales := _scales(node)) is not None]
    if not found:
        return
    try:
        raise_opset(model, LEAST_OPSET)
    except ModelError:
        return
    writer = _SumWriter(model)
    for node, scales in found:
        writer.rewrite(node, *scales)
    for reader in {reader for _, scales in found for reader in scales}:
        if not reader.outputs[0].uses() and not reader.outputs[0].is_graph_output():
            model.graph.remove(reader, safe=True)
    drop_unread(model.graph)


def _scales(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Find the two DequantizeLinear of a product that can be written so."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1):
        return None
    source, weight = node.inputs[0], stored_reader(node.inputs[1])
    entry = source.producer() if source is not None else None
    if entry is None or weight is None or entry.op_type != "DequantizeLinear" or constant(entry.inputs[0]) is not None:
        return None
    for reader in (entry, weight):
        scale, zero = constant(reader.inputs[1]), constant(reader.inputs[2]) if len(reader.inputs) > 2 else None
        blocks = attribute(reader, "block_size", 0)
        if scale is None or scale.dtype != np.float32 or blocks or zero is None or zero.astype(np.float32).any():
            return None
    across = constant(entry.inputs[1])
    assert across is not None
    return (entry, weight) if across.size == 1 else None


def _largest(reader: ir.Node) -> float:
    """Return the largest number that the format of a DequantizeLinear holds."""
    zero = constant(reader.inputs[2])
    assert zero is not None, "checked before"
    if np.issubdtype(zero.dtype, np.integer):
        return -float(np.iinfo(zero.dtype).min)
    return float(ml_dtypes.finfo(zero.dtype).max)  # type: ignore[no-untyped-call]


class _SumWriter:
    """Writes sums in FP16 into a model; readers of one tensor share a DequantizeLinear."""

    def __init__(self, model: ir.Model) -> None:
        self._graph, self._fresh, self._fresh_node = model.graph, namer(model), node_namer(model)
        self._kind = cast_type(find_format(SUMS))
        self._read: dict[tuple[ir.Value, int], ir.Value] = {}

    def rewrite(self, node: ir.Node, entry: ir.Node, weight: ir.Node) -> None:
        stored = constant(weight.inputs[0])
        step, steps = constant(entry.inputs[1]), constant(weight.inputs[1])
        assert stored is not None and step is not None and steps is not None, "checked before"
        channels = _channel_axis(node)
        depth = stored.size // stored.shape[channels]
        bound = LARGEST_SUM / (ROOM * depth * _largest(entry) * _largest(weight))
        exponent = math.floor(math.log2(bound))
        factor = step.astype(np.float64).reshape(()) * steps.astype(np.float64) / 2.0**exponent
        shape = (-1, *(1,) * (stored.ndim - 2)) if node.op_type == "Conv" and factor.size > 1 else factor.shape
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        node.replace_input_with(0, self._reader(entry, TENSOR_EXPONENT))
        node.replace_input_with(1, self._reader(weight, exponent - TENSOR_EXPONENT))
        made = node.outputs[0]
        uses = list(made.uses())
        numbers = factor.reshape(shape).astype(np.float32)
        last = self._behind(node, made, "Cast", to=int(ir.DataType.FLOAT))
        last = self._behind(node, last, "Mul", self._constant(f"{node.name}/steps", numbers))
        if bias is not None:
            node.resize_inputs(2)
            last = self._behind(node, last, "Add", self._bias(node, bias, stored.ndim))
        for use in uses:
            use.node.replace_input_with(use.idx, last)
        if made.is_graph_output():
            self._graph.outputs[list(self._graph.outputs).index(made)] = last
            made.name, last.name = self._fresh(f"{made.name}/sum"), made.name
        made.type = ir.TensorType(self._kind)

    def _bias(self, node: ir.Node, bias: ir.Value, rank: int) -> ir.Value:
        """Return a bias in the shape in which it can be added behind the node."""
        numbers = constant(bias)
        if node.op_type != "Conv" or numbers is None:
            return bias
        return self._constant(f"{node.name}/bias", numbers.reshape(-1, *(1,) * (rank - 2)))

    def _reader(self, before: ir.Node, exponent: int) -> ir.Value:
        """Read stored or rounded numbers as FP16, on a scale that is a power of two."""
        source = before.inputs[0]
        assert source is not None
        if (source, exponent) not in self._read:
            scale = self._constant(f"{before.name}/half_scale", np.array(2.0**exponent, self._kind.numpy()))
            zero = constant(before.inputs[2])
            assert zero is not None, "checked before"
            zeros = self._constant(f"{before.name}/half_zero", np.zeros((), zero.dtype))
            made = ir.node("DequantizeLinear", [source, scale, zeros], name=self._fresh_node(f"{before.name}/half"))
            made.metadata_props.update(before.metadata_props)
            result = made.outputs[0]
            result.name, result.shape = self._fresh(f"{before.name}/half"), before.outputs[0].shape
            result.type = ir.TensorType(self._kind)
            insert_behind(self._graph, before, [made])
            self._read[source, exponent] = result
        return self._read[source, exponent]

    def _behind(self, node: ir.Node, value: ir.Value, op_type: str, *others: ir.Value, **attributes: int) -> ir.Value:
        """Write an operator behind a tensor, for the unit of a node."""
        made = ir.node(op_type, [value, *others], attributes, name=self._fresh_node(f"{node.name}/{op_type}"))
        made.metadata_props.update({TAG: node.metadata_props[TAG]} if TAG in node.metadata_props else {})
        result = made.outputs[0]
        result.name, result.shape = self._fresh(f"{node.name}/{op_type.lower()}"), value.shape
        result.type = ir.TensorType(ir.DataType.FLOAT)
        insert_behind(self._graph, value.producer(), [made])
        return result

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, self._fresh(name), array)


def _channel_axis(node: ir.Node) -> int:
    """Return the axis of a weight along which its output channels run."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return -1
