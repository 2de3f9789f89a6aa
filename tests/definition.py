"""Quantization as the ONNX specification defines it, in a few lines of numpy that share nothing with the package.

QuantizeLinear: q = saturate(round(x / scale) + zero point), ties to even; DequantizeLinear: (q - zero point) * scale
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html). How scales come about is in the docstrings of `bitalloy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

Array = np.ndarray

MOVERS = {"MaxPool", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Flatten"}
"""Operators that only move data, so that what they give has the scale of what they read."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points: one number of each, or one for every channel along an axis."""

    scale: Array
    zero: Array
    axis: int = 0

    def integers(self, x: Array) -> Array:
        ends = np.iinfo(self.zero.dtype)
        steps = np.rint(x.astype(np.float32) / self._along(self.scale, x)) + self._along(self.zero, x)
        return np.clip(steps, ends.min, ends.max).astype(self.zero.dtype)

    def rounded(self, x: Array) -> Array:
        steps = self.integers(x).astype(np.int32) - self._along(self.zero, x).astype(np.int32)
        return steps.astype(np.float32) * self._along(self.scale, x)

    def _along(self, parameter: Array, x: Array) -> Array:
        shape = [-1 if d == self.axis else 1 for d in range(x.ndim)] if parameter.ndim else ()
        return parameter.reshape(shape)


def asymmetric(low: float, high: float) -> Grid:
    """uint8 from the smallest to the largest value; 0 is always one of the 256."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    return Grid(np.asarray(scale), np.asarray(np.rint(-low / np.float64(scale)), np.uint8))


def symmetric(low: float, high: float) -> Grid:
    """int8 from -127 to 127 steps, with 0 in the middle."""
    return Grid(np.asarray(np.float32(max(-low, high) / 127)), np.zeros((), np.int8))


@dataclass(frozen=True)
class Float8Grid(Grid):
    """Scales of E4M3: three bits of mantissa, exponents from -6 on, 448 the largest."""

    def integers(self, x: Array) -> Array:
        steps = (x.astype(np.float32) / self._along(self.scale, x)).astype(np.float64)
        exponent = np.maximum(np.frexp(steps)[1] - 1, -6)
        last = np.ldexp(1.0, exponent - 3)
        return np.clip(np.rint(steps / last) * last, -448, 448).astype(self.zero.dtype)


def eight_bit_float(low: float, high: float) -> Grid:
    """E4M3 with the largest magnitude at 448."""
    return Float8Grid(np.asarray(np.float32(max(-low, high) / 448)), np.zeros((), ml_dtypes.float8_e4m3fn))


def float8_per_channel(weight: Array, axis: int) -> Grid:
    """E4M3, the largest weight of every channel 448."""
    top = orders(weight, axis)[0].max(axis=1).astype(np.float64)
    return Float8Grid((top / 448).astype(np.float32), np.zeros(len(top), ml_dtypes.float8_e4m3fn), axis)


def per_channel(weight: Array, axis: int, pair_limit: int | None = None) -> Grid:
    """int8, the largest weight of every channel 127; with a limit, the largest sum of two neighbours is below it."""
    top = orders(weight, axis)[0].max(axis=1)
    if pair_limit is not None:
        for rows in orders(weight, axis):
            top = np.maximum(top, pair_sums(rows) * np.float32(127 / (pair_limit - 1)))
    return Grid((top.astype(np.float64) / 127).astype(np.float32), np.zeros(len(top), np.int8), axis)


def limit_of(node: onnx.NodeProto, weight: Array, pair_limit: int | None) -> int | None:
    """The limit, but for a convolution of one channel to one channel, whose kernel adds no pairs."""
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return None if node.op_type == "Conv" and weight.shape[:2] == (groups, 1) else pair_limit


def orders(weight: Array, axis: int) -> list[Array]:
    """Magnitudes of each channel's weights in the orders in which kernels may pair them."""
    rows = np.abs(np.moveaxis(weight, axis, 0).astype(np.float32))
    found = [rows.reshape(len(rows), -1)]
    if weight.ndim > 2:  # of a convolution, also with the channels of one position beside each other
        found.append(np.moveaxis(rows, 1, -1).reshape(len(rows), -1))
    return found


def pair_sums(rows: Array) -> Array:
    """Largest sum of two neighbours in every row."""
    return (rows[:, 1:] + rows[:, :-1]).max(axis=1, initial=0)


def root(model: onnx.ModelProto, tensor: str) -> str:
    """The tensor whose scale a tensor has: behind operators that move data, what they moved."""
    makers = {name: node for node in model.graph.node for name in node.output}
    while tensor in makers and makers[tensor].op_type in MOVERS:
        tensor = makers[tensor].input[0]
    return tensor


class Simulation:
    """A float model, executed operator by operator, in which the inputs and outputs of some nodes are rounded."""

    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._model, self._ranges = model, ranges
        self._weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
        self._kernels: dict[str, ort.InferenceSession] = {}

    def run(
        self, feeds: Mapping[str, Array], units: Sequence[Set[str]], made: Set[str], pair_limit: int | None
    ) -> Array:
        """The only output.

        Args:
            feeds: the inputs.
            units: nodes that are one kernel each: what enters it is rounded, and so are its weights and biases.
            made: tensors that are rounded where they are made, for everybody.
            pair_limit: of the weights.
        """
        values, maker = {**self._weights, **feeds}, dict[str, str]()
        for node in self._model.graph.node:
            maker |= dict.fromkeys(node.output, node.name)
            read = {name: values[name] for name in node.input if name}
            for unit in (u for u in units if node.name in u):
                first = node.input[0]
                entering = {n for n in read if n not in self._weights and maker.get(n) not in unit}
                for name in entering:
                    read[name] = self._grid(name).rounded(read[name])
                if node.op_type == "Conv":
                    weight = read[node.input[1]]
                    grid = per_channel(weight, 0, limit_of(node, weight, pair_limit))
                    read[node.input[1]] = grid.rounded(weight)
                    if len(node.input) > 2:
                        steps = self._grid(first).scale * grid.scale
                        bias = np.rint(read[node.input[2]].astype(np.float64) / steps).astype(np.int32)
                        read[node.input[2]] = bias.astype(np.float32) * steps
            for name, value in zip(node.output, self._kernel(node, read).run(None, read), strict=True):
                values[name] = self._grid(name).rounded(value) if name in made else value
        return values[self._model.graph.output[0].name]

    def _grid(self, tensor: str) -> Grid:
        return asymmetric(*self._ranges[root(self._model, tensor)])

    def _kernel(self, node: onnx.NodeProto, read: Mapping[str, Array]) -> ort.InferenceSession:
        if node.name not in self._kernels:
            kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in read.items()}
            graph = helper.make_graph(
                [node],
                "one",
                [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
                [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output],
            )
            alone = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=8)
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            kernel = ort.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
            self._kernels[node.name] = kernel
        return self._kernels[node.name]
