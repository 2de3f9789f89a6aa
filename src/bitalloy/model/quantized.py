"""Quantized models as the float models that they round, with the roundings that they had.

Case 1. QuantizeLinear, DequantizeLinear: a stored constant becomes floats, of other tensors the pair goes. What stands
        between the two (MaxPool, Reshape, Transpose, ...) then moves floats.
Case 2. QLinearConv and its kind (`QOPERATORS`): the float operator, on operands as in case 1.
Case 3. ConvInteger and MatMulInteger, with ranges taken at run time: the float operator; the scale of its weight, by
        which a Mul behind it multiplies, becomes part of the weight. DynamicQuantizeMatMul and MatMulIntegerToFloat are
        these operators in one.
Case 4. A rounding to numbers from 0 on stands for the Relu that quantizers take out in front of it, or for a Clip to 6
        where that is where it ends: it is put back where the tensor could be negative.
        DynamicQuantizeLSTM is an LSTM whose matrices are stored as integers, each transposed.
Case 5. Integers that come in as they are (an image) are dequantized by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import ml_dtypes
import numpy as np
import onnx

from bitalloy.core.errors import ModelError
from bitalloy.model.contrib import MICROSOFT
from bitalloy.model.dequantizer import Dequantizer, GivenRoundings, label, spread, zero_of

Rewrite: TypeAlias = Callable[[Dequantizer, onnx.NodeProto], None]


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Tell whether a graph rounds anything to integers."""
    return any(_name(node) in _REWRITES for node in proto.graph.node)


def dequantized(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, GivenRoundings]:
    """Return the float form of a quantized model, and the roundings that were taken out of it.

    Args:
        proto: the model with its weights; not changed.

    Raises:
        ModelError: a quantized operator has no float form here, or integers leave the model.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    to = Dequantizer(made)
    for node in list(made.graph.node):
        rewrite = _REWRITES.get(_name(node))
        if rewrite is not None:
            rewrite(to, node)
        elif node.op_type.startswith(("QLinear", "DynamicQuantize", "QAttention", "QEmbed")):
            raise ModelError(
                f"{label(node)} computes with integers and has no float form here. Give the float model, or one that "
                "was quantized without this operator."
            )
        else:
            to.keep(node)
    return to.finish()


def _name(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain == MICROSOFT else node.op_type


def _operands(node: onnx.NodeProto, count: int) -> list[str]:
    """All operands that a node may have; empty names for those left out."""
    return [*node.input, *[""] * (count - len(node.input))]


def _quantize(to: Dequantizer, node: onnx.NodeProto) -> None:
    scale, zero = node.input[1], node.input[2] if len(node.input) > 2 else ""
    numbers = to.constant(node.input[0])
    if numbers is not None:  # floats that are rounded when the model is opened
        scales, zeros = to.constant(scale), to.constant(zero) if zero else zero_of(node)
        if scales is None or zeros is None:
            raise ModelError(f"{label(node)} has a scale or zero point that is computed. Give the float model.")
        try:
            info = ml_dtypes.iinfo(zeros.dtype)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ModelError(f"{label(node)} rounds a constant to {zeros.dtype}. Give the float model.") from error
        axis = _axis(node)
        grid = [spread(a, numbers, axis, 0) for a in (scales, zeros.astype(np.float32))]
        stored = np.clip(np.rint(numbers / grid[0]) + grid[1], info.min, info.max).astype(zeros.dtype)
        to.store(node.output[0], stored)
        return
    to.take(to.rounds(node, node.input[0], scale, zero), node.output[0])


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _dequantize(to: Dequantizer, node: onnx.NodeProto) -> None:
    block = next((int(a.i) for a in node.attribute if a.name == "block_size"), 0)
    zero = node.input[2] if len(node.input) > 2 else ""
    made = to.operand(node, node.input[0], node.input[1], zero, axis=_axis(node), block=block)
    to.take(made, node.output[0])


def _dynamic_quantize(to: Dequantizer, node: onnx.NodeProto) -> None:
    to.take(to.late(node.input[0]), node.output[0])
    to.unit_scale(node.output[1])


def _conv(to: Dequantizer, node: onnx.NodeProto) -> None:
    x, xs, xz, w, ws, wz, ys, yz, *bias = node.input
    inputs = [to.operand(node, x, xs, xz), to.operand(node, w, ws, wz, axis=0)]
    if bias and bias[0]:
        inputs.append(to.bias(node, bias[0], xs, ws))
    to.rounded(node, "Conv", inputs, ys, yz)


def _matmul(to: Dequantizer, node: onnx.NodeProto) -> None:
    a, a_s, az, b, bs, bz, ys, yz = node.input
    to.rounded(node, "MatMul", [to.operand(node, a, a_s, az), to.operand(node, b, bs, bz, axis=-1)], ys, yz)


def _gemm(to: Dequantizer, node: onnx.NodeProto) -> None:
    a, a_s, az, b, bs, bz, c, *out = _operands(node, 9)
    swapped = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    inputs = [to.operand(node, a, a_s, az), to.operand(node, b, bs, bz, axis=0 if swapped else 1)]
    if c:
        alpha = next((attribute.f for attribute in node.attribute if attribute.name == "alpha"), 1.0)
        inputs.append(to.bias(node, c, a_s, bs, factor=alpha))
    to.rounded(node, "Gemm", inputs, *out)


def _pairwise(op_type: str) -> Rewrite:
    def rewrite(to: Dequantizer, node: onnx.NodeProto) -> None:
        a, a_s, az, b, bs, bz, ys, yz = _operands(node, 8)
        to.rounded(node, op_type, [to.operand(node, a, a_s, az), to.operand(node, b, bs, bz)], ys, yz)

    return rewrite


def _single(op_type: str) -> Rewrite:
    def rewrite(to: Dequantizer, node: onnx.NodeProto) -> None:
        x, xs, xz, ys, yz = _operands(node, 5)
        if any(a.name == "channels_last" and a.i for a in node.attribute):
            raise ModelError(f"{label(node)} has its channels last. Give the float model.")
        to.rounded(node, op_type, [to.operand(node, x, xs, xz)], ys, yz)

    return rewrite


def _concat(to: Dequantizer, node: onnx.NodeProto) -> None:
    ys, yz, *rest = node.input
    parts = [to.operand(node, *rest[i : i + 3]) for i in range(0, len(rest), 3)]
    to.rounded(node, "Concat", parts, ys, yz)


def _conv_integer(to: Dequantizer, node: onnx.NodeProto) -> None:
    to.integers(node, "Conv", node.input[3] if len(node.input) > 3 else "")


def _matmul_integer(to: Dequantizer, node: onnx.NodeProto) -> None:
    to.integers(node, "MatMul", node.input[3] if len(node.input) > 3 else "")


def _dynamic_matmul(to: Dequantizer, node: onnx.NodeProto) -> None:
    a, b, bs, bz, bias = _operands(node, 5)
    to.plain(node, [to.late(a), to.operand(node, b, bs, bz, axis=-1)], bias)


def _dynamic_lstm(to: Dequantizer, node: onnx.NodeProto) -> None:
    x, w, r, bias, lengths, h, c, peepholes, ws, wz, rs, rz = _operands(node, 12)
    matrices = [_transposed(to, node, *stored) for stored in ((w, ws, wz), (r, rs, rz))]
    inputs = [to.late(x), *matrices, bias, lengths, h, c, peepholes]
    lstm = onnx.helper.make_node("LSTM", inputs, node.output, name=node.name)
    lstm.attribute.extend(node.attribute)
    to.keep(lstm)


def _transposed(to: Dequantizer, node: onnx.NodeProto, matrix: str, scale: str, zero: str) -> str:
    """The matrices of an LSTM, one for each direction, with a scale for each or for each of their columns."""
    numbers, scales, zeros = (to.constant(name) for name in (matrix, scale, zero))
    if numbers is None or scales is None or zeros is None:
        raise ModelError(f"{label(node)} has a matrix, scale or zero point that is computed. Give the float model.")
    steps, levels = (a.astype(np.float32).reshape(len(numbers), 1, -1) for a in (scales, zeros))
    return to.hold(matrix, ((numbers.astype(np.float32) - levels) * steps).transpose(0, 2, 1))


def _matmul_to_float(to: Dequantizer, node: onnx.NodeProto) -> None:
    a, b, a_s, bs, az, bz, bias = _operands(node, 7)
    to.plain(node, [to.operand(node, a, a_s, az), to.operand(node, b, bs, bz, axis=-1)], bias)


QOPERATORS: Mapping[str, Rewrite] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    f"{MICROSOFT}.QGemm": _gemm,
    f"{MICROSOFT}.QLinearAdd": _pairwise("Add"),
    f"{MICROSOFT}.QLinearMul": _pairwise("Mul"),
    f"{MICROSOFT}.QLinearConcat": _concat,
    **{
        f"{MICROSOFT}.QLinear{op_type}": _single(op_type)
        for op_type in ("Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool")
    },
}
"""Operators on integers with scales and zero points as operands."""

_REWRITES: Mapping[str, Rewrite] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "ConvInteger": _conv_integer,
    "MatMulInteger": _matmul_integer,
    f"{MICROSOFT}.QuantizeLinear": _quantize,
    f"{MICROSOFT}.DequantizeLinear": _dequantize,
    f"{MICROSOFT}.DynamicQuantizeMatMul": _dynamic_matmul,
    f"{MICROSOFT}.DynamicQuantizeLSTM": _dynamic_lstm,
    f"{MICROSOFT}.MatMulIntegerToFloat": _matmul_to_float,
    **QOPERATORS,
}
