"""Roundings of tensors that a kernel makes at run time, on ranges that it takes from the tensor itself.

Nothing of them is calibrated or stored; what they leave of a tensor depends on the tensor alone. They are written into
a graph to predict or to execute a rounding; the kernels of the shipped model contain them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitalloy.formats.base import QuantParams, Writer

_LEVELS = np.float32(255.0)
_REACH = np.float32(127.0)
_LEAST = np.float32(2.0**-100)
"""Blocks of smaller magnitude count as nothing beside others; its reciprocal is finite."""


@dataclass(frozen=True, kw_only=True)
class DynamicTensor:
    """UINT8 on the range of the whole tensor, widened to contain 0: DynamicQuantizeLinear.

    https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html; a tensor of zeros has the scale 1, as in ONNX
    Runtime.

    >>> DynamicTensor(name="uint8-dynamic").reference(np.float32([-1.0, 0.5, 4.0]))
    array([-1.        ,  0.50980395,  4.        ], dtype=float32)
    """

    name: str
    bits: int = 8
    opset: int = 13

    def of_range(self, low: float, high: float) -> None:
        """Return nothing: the range is that of the tensor."""

    def reference(self, x: NDArray[np.floating], params: QuantParams | None = None) -> NDArray[np.float32]:
        """Round a tensor of any shape."""
        x = np.asarray(x, np.float32)
        low, high = np.minimum(x.min(initial=0.0), np.float32(0)), np.maximum(x.max(initial=0.0), np.float32(0))
        scale = np.float32((high - low) / _LEVELS)
        scale = np.float32(1.0) if scale == 0 else scale
        zero = np.clip(np.rint(-low / scale), 0, 255)
        with np.errstate(over="ignore"):
            steps = np.clip(np.rint(x / scale) + zero, 0, 255)
        return np.asarray((steps - zero) * scale, np.float32)

    def write(self, writer: Writer, x: ir.Value, params: QuantParams | None = None) -> ir.Value:
        """Write the range, and a QuantizeLinear and a DequantizeLinear on it."""
        none = writer.constant(np.array(0, np.float32), "none")
        low = writer.node("Min", [writer.node("ReduceMin", [x], "least", shape=(), keepdims=0), none], "low")
        high = writer.node("Max", [writer.node("ReduceMax", [x], "greatest", shape=(), keepdims=0), none], "high")
        levels = writer.constant(np.array(_LEVELS), "levels")
        step = writer.node("Div", [writer.node("Sub", [high, low], "range"), levels], "step")
        nothing = writer.node("Equal", [step, none], "is_nothing")
        scale = writer.node("Where", [nothing, writer.constant(np.array(1, np.float32), "one"), step], "scale")
        place = writer.node(
            "Round", [writer.node("Div", [writer.node("Neg", [low], "below"), scale], "steps")], "place"
        )
        zero = writer.node("Cast", [place], "zero_point", to=int(ir.DataType.UINT8))
        stored = writer.node("QuantizeLinear", [x, scale, zero], "quantized")
        return writer.node("DequantizeLinear", [stored, scale, zero], "dequantized")


@dataclass(frozen=True, kw_only=True)
class DynamicBlocks:
    """INT8 with one scale for every block of the last axis, its largest magnitude over 127.

    As the kernels of MatMulNBits with accuracy level 4 round what they multiply (ONNX Runtime, MLAS,
    `QuantizeARow_CompInt8`). The last block may be shorter.

    >>> DynamicBlocks(name="int8-block2", block=2).reference(np.float32([[1.0, 127.0, 0.3]]))
    array([[  1. , 127. ,   0.3]], dtype=float32)
    """

    name: str
    block: int
    bits: int = 8
    opset: int = 13

    def of_range(self, low: float, high: float) -> None:
        """Return nothing: the ranges are those of the blocks."""

    def reference(self, x: NDArray[np.floating], params: QuantParams | None = None) -> NDArray[np.float32]:
        """Round a tensor of shape (..., K)."""
        x = np.asarray(x, np.float32)
        size = x.shape[-1]
        rows = np.pad(x.reshape(-1, size), ((0, 0), (0, -size % self.block)))
        blocks = rows.reshape(-1, self.block)
        top = np.abs(blocks).max(axis=1, keepdims=True)
        steps = np.rint(blocks * (_REACH / np.maximum(top, _LEAST)))
        return np.asarray((steps * (top / _REACH)).reshape(rows.shape)[:, :size].reshape(x.shape), np.float32)

    def write(self, writer: Writer, x: ir.Value, params: QuantParams | None = None) -> ir.Value:
        """Write the blocks as rows, and their rounding; the shape of `x` must be known."""
        assert x.shape is not None and x.shape.is_static(), "the shape of what is rounded in blocks is known"
        shape = tuple(int(d) for d in x.shape)  # type: ignore[arg-type]
        count, size = int(np.prod(shape[:-1])), shape[-1]
        more = -size % self.block
        blocks = (count * (size + more) // self.block, self.block)
        value = x
        if more:
            value = _reshape(writer, x, (count, size), "rows")
            pads = writer.constant(np.array([0, 0, 0, more], np.int64), "pads")
            value = writer.node("Pad", [value, pads], "padded", shape=(count, size + more))
        value = self._round(writer, _reshape(writer, value, blocks, "blocks"), blocks)
        if more:
            value = _reshape(writer, value, (count, size + more), "whole")
            parts = zip((0, size, 1), ("from", "to", "axis"), strict=True)
            bounds = [writer.constant(np.array([number], np.int64), role) for number, role in parts]
            value = writer.node("Slice", [value, *bounds], "kept", shape=(count, size))
        return _reshape(writer, value, shape, "result")

    @staticmethod
    def _round(writer: Writer, rows: ir.Value, shape: tuple[int, int]) -> ir.Value:
        """Write the rounding of every row; the largest magnitude as a pooling, which has one form in all versions."""
        column = (shape[0], 1)
        magnitude = _reshape(writer, writer.node("Abs", [rows], "magnitude"), (1, *shape), "apart")
        pooled = writer.node("MaxPool", [magnitude], "pooled", shape=(1, *column), kernel_shape=shape[1:])
        top, reach = _reshape(writer, pooled, column, "top"), writer.constant(np.array(_REACH), "reach")
        divisor = writer.node("Max", [top, writer.constant(np.array(_LEAST), "least")], "divisor", shape=column)
        inverse = writer.node("Div", [reach, divisor], "inverse", shape=column)
        steps = writer.node("Round", [writer.node("Mul", [rows, inverse], "scaled")], "steps")
        return writer.node("Mul", [steps, writer.node("Div", [top, reach], "scale")], "rounded")


UINT8_DYNAMIC = DynamicTensor(name="uint8-dynamic")
INT8_BLOCKS = tuple(DynamicBlocks(name=f"int8-block{block}", block=block) for block in (16, 32, 64, 128, 256))


def _reshape(writer: Writer, x: ir.Value, shape: tuple[int, ...], role: str) -> ir.Value:
    return writer.node("Reshape", [x, writer.constant(np.array(shape, np.int64), f"{role}_shape")], role, shape=shape)
