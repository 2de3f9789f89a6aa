"""Operators of ONNX Runtime's own domain, and of its own versions, in standard ones.

What they compute is in ONNX Runtime's docs/ContribOperators.md. Written are those that its optimizers and exporters
leave in files and that standard operators define. Two normalizations stand in the standard domain below opset 17.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bitalloy.core.errors import ModelError

MICROSOFT = "com.microsoft"
Expansion: TypeAlias = Callable[["ContribCall"], None]


class ContribCall:
    """One node that is replaced, and the nodes that replace it."""

    def __init__(self, node: onnx.NodeProto, opset: int, constants: Mapping[str, onnx.TensorProto]) -> None:
        self.node, self.opset, self._constants = node, opset, constants
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._base = node.name or node.output[0]

    def input(self, index: int) -> str:
        """Name of an input; empty where it is left out."""
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    def given(self, index: int) -> np.ndarray | None:
        """Value of an input that is a constant."""
        tensor = self._constants.get(self.input(index))
        return None if tensor is None else numpy_helper.to_array(tensor)

    def attribute(self, name: str, default: object) -> object:
        found = self._attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def number(self, name: str, default: float) -> float:
        return float(self.attribute(name, default))  # type: ignore[arg-type]

    def constant(self, array: np.ndarray) -> str:
        name = f"{self._base}/constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def add(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; its result is that of the call where `output` says so."""
        name = f"{self._base}/{op_type}_{len(self.nodes)}"
        made = helper.make_node(op_type, list(inputs), [output or f"{name}/output"], name=name, **attributes)
        self.nodes.append(made)
        return str(made.output[0])

    def finish(self, op_type: str, *inputs: str, **attributes: Any) -> None:
        """Add the node that makes the result; it keeps the name of the node that is replaced."""
        self.add(op_type, *inputs, output=str(self.node.output[0]), **attributes)
        self.nodes[-1].name = self._base

    def result(self, value: str) -> None:
        self.finish("Identity", value)

    def reduce_mean(self, value: str, axes: Sequence[int]) -> str:
        if self.opset < 18:
            return self.add("ReduceMean", value, axes=list(axes), keepdims=1)
        return self.add("ReduceMean", value, self.constant(np.array(axes, np.int64)), keepdims=1)

    def refuse(self, why: str) -> ModelError:
        return ModelError(
            f"Node '{self._base}' ({self.node.op_type} of {self.node.domain or 'ONNX'}) cannot be written in standard "
            f"operators: {why}. Export the model with standard ONNX operators, without ONNX Runtime's optimizations."
        )


def _activate(call: ContribCall, value: str) -> None:
    """Add the activation that a fused operator names."""
    name = str(call.attribute("activation", ""))
    given: Sequence[float] = call.attribute("activation_params", ())  # type: ignore[assignment]
    match name:
        case "":
            call.result(value)
        case "Relu" | "Sigmoid" | "Tanh":
            call.finish(name, value)
        case "LeakyRelu":
            call.finish(name, value, alpha=float(given[0]) if given else 0.01)
        case "Clip" if len(given) == 2:
            call.finish(name, value, *(call.scalar(v) for v in given))
        case "HardSigmoid" if len(given) == 2:
            call.finish(name, value, alpha=float(given[0]), beta=float(given[1]))
        case _:
            raise call.refuse(f"its activation '{name}' is unknown")


def _fused_conv(call: ContribCall) -> None:
    skipped = {"activation", "activation_params"}
    kept: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in call.node.attribute if a.name not in skipped}
    value = call.add("Conv", *(v for v in (call.input(i) for i in range(3)) if v), **kept)
    if call.input(3):
        value = call.add("Add", value, call.input(3))
    _activate(call, value)


def _fused_gemm(call: ContribCall) -> None:
    kept: dict[str, Any] = {
        n: call.attribute(n, d) for n, d in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))
    }
    _activate(call, call.add("Gemm", *(v for v in (call.input(i) for i in range(3)) if v), **kept))


def _fused_matmul(call: ContribCall) -> None:
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise call.refuse("it transposes a batch")
    sides = []
    for index, name in enumerate(("transA", "transB")):
        value, array = call.input(index), call.given(index)
        if call.attribute(name, 0):
            if array is None:
                raise call.refuse("it transposes an operand whose rank the file does not tell")
            value = call.constant(np.ascontiguousarray(np.swapaxes(array, -1, -2)))
        sides.append(value)
    alpha = call.number("alpha", 1.0)
    if alpha == 1.0:
        call.finish("MatMul", *sides)
    else:
        call.finish("Mul", call.add("MatMul", *sides), call.scalar(alpha))


def _gelu(call: ContribCall, value: str) -> None:
    """X / 2 * (1 + erf(x / sqrt(2)))."""
    inner = call.add("Erf", call.add("Div", value, call.scalar(math.sqrt(2))))
    gate = call.add("Mul", value, call.add("Add", inner, call.scalar(1.0)))
    call.finish("Mul", gate, call.scalar(0.5))


def _plain_gelu(call: ContribCall) -> None:
    _gelu(call, call.input(0))


def _bias_gelu(call: ContribCall) -> None:
    _gelu(call, call.add("Add", call.input(0), call.input(1)))


def _fast_gelu(call: ContribCall) -> None:
    """X / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    value = call.add("Add", call.input(0), call.input(1)) if call.input(1) else call.input(0)
    cube = call.add("Mul", call.add("Mul", value, value), value)
    inner = call.add("Add", value, call.add("Mul", cube, call.scalar(0.044715)))
    gate = call.add("Tanh", call.add("Mul", inner, call.scalar(math.sqrt(2 / math.pi))))
    call.finish("Mul", call.add("Mul", value, call.add("Add", gate, call.scalar(1.0))), call.scalar(0.5))


def _quick_gelu(call: ContribCall) -> None:
    """X * sigmoid(alpha x)."""
    value = call.input(0)
    gate = call.add("Sigmoid", call.add("Mul", value, call.scalar(call.number("alpha", 1.702))))
    call.finish("Mul", value, gate)


def _normalize(call: ContribCall, value: str, scale: str, bias: str, *, centre: bool) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, the mean only with `centre`."""
    if int(call.number("axis", -1)) != -1:
        raise call.refuse("it normalizes over another axis than the last")
    epsilon = call.scalar(call.number("epsilon", 1e-5))
    if centre:
        value = call.add("Sub", value, call.reduce_mean(value, [-1]))
    square = call.reduce_mean(call.add("Mul", value, value), [-1])
    value = call.add("Div", value, call.add("Sqrt", call.add("Add", square, epsilon)))
    if bias:
        call.finish("Add", call.add("Mul", value, scale), bias)
    else:
        call.finish("Mul", value, scale)


def _layer_norm(call: ContribCall) -> None:
    _normalize(call, call.input(0), call.input(1), call.input(2), centre=True)


def _rms_norm(call: ContribCall) -> None:
    _normalize(call, call.input(0), call.input(1), "", centre=False)


def _skip(call: ContribCall, bias_at: int) -> str:
    value = call.add("Add", call.input(0), call.input(1))
    if call.input(bias_at):
        value = call.add("Add", value, call.input(bias_at))
    extra = [name for name in call.node.output[1:] if name]
    if extra[:-1] or (extra and call.node.output[-1] != extra[-1]) or (extra and len(call.node.output) != 4):
        raise call.refuse("its mean or variance is read")
    if extra:
        call.nodes[-1].output[0] = value = extra[-1]
    return value


def _skip_layer_norm(call: ContribCall) -> None:
    _normalize(call, _skip(call, 4), call.input(2), call.input(3), centre=True)


def _skip_rms_norm(call: ContribCall) -> None:
    _normalize(call, _skip(call, 3), call.input(2), "", centre=False)


def _nbits(call: ContribCall) -> None:
    """Weights in blocks become float weights: (N, blocks, block * bits / 8), the first of two in the low bits."""
    bits, block = int(call.number("bits", 4)), int(call.number("block_size", 32))
    depth, channels = int(call.number("K", 0)), int(call.number("N", 0))
    packed, scales, zeros = call.given(1), call.given(2), call.given(3)
    if bits not in (4, 8) or packed is None or scales is None or (call.input(3) and zeros is None):
        raise call.refuse("only constant weights of 4 or 8 bits are read")
    if call.input(4) or (zeros is not None and zeros.dtype != np.uint8):
        raise call.refuse("its weights are in another order, or their zero points are not whole numbers")
    blocks = -(-depth // block)
    integers = _unpacked(packed.reshape(channels, -1), bits)[:, : blocks * block].reshape(channels, blocks, block)
    middle = np.full((channels, blocks), 2 ** (bits - 1), np.uint8)
    points = middle if zeros is None else _unpacked(zeros.reshape(channels, -1), bits)[:, :blocks]
    steps = scales.reshape(channels, blocks, 1).astype(np.float32)
    weight = (integers.astype(np.float32) - points[:, :, None].astype(np.float32)) * steps
    matrix = np.ascontiguousarray(weight.reshape(channels, -1)[:, :depth].T)
    if call.input(5):
        call.finish("Add", call.add("MatMul", call.input(0), call.constant(matrix)), call.input(5))
    else:
        call.finish("MatMul", call.input(0), call.constant(matrix))


def _unpacked(rows: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return rows
    return np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)


EXPANSIONS: Mapping[tuple[str, str], Expansion] = {
    (MICROSOFT, "FusedConv"): _fused_conv,
    (MICROSOFT, "FusedGemm"): _fused_gemm,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "Gelu"): _plain_gelu,
    (MICROSOFT, "BiasGelu"): _bias_gelu,
    (MICROSOFT, "FastGelu"): _fast_gelu,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
    (MICROSOFT, "MatMulNBits"): _nbits,
    (MICROSOFT, "SkipLayerNormalization"): _skip_layer_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    ("", "LayerNormalization"): _layer_norm,
}
"""(domain, operator) -> how standard operators compute it, after ONNX Runtime's docs/ContribOperators.md."""
