"""The float form of a quantized model, node by node: what `model.quantized` writes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitalloy.core.errors import ModelError
from bitalloy.model.contrib import MICROSOFT

Array: TypeAlias = NDArray[Any]
_POSITIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Sqrt", "Softplus"})
_MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "AveragePool", "GlobalAveragePool"}
)
_CARRIES = _MOVES | {"Gather"}
_KEPT: Mapping[str, frozenset[str]] = {
    "Conv": frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"}),
    "AveragePool": frozenset({"auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"}),
    "Gemm": frozenset({"alpha", "transA", "transB"}),
    "LeakyRelu": frozenset({"alpha"}),
    "Softmax": frozenset({"axis"}),
    "Concat": frozenset({"axis"}),
}
"""Attributes that a float operator has in common with the one on integers."""
_BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})
_SIX = 6.0
_CLOSE = 1e-3


@dataclass(frozen=True, eq=False)
class GivenWeight:
    """How a quantized file stores a weight."""

    numbers: Array
    """In the shape of the weight."""
    scale: Array
    zero_point: Array
    axis: int | None
    """Axis of the scales; None where there is one for all."""
    block: int = 0
    """Numbers along the axis that share a scale; 0 for one."""


@dataclass(frozen=True)
class GivenTensor:
    """The grid that a quantized file rounds a tensor to."""

    scale: float
    zero_point: float
    least: float
    """Smallest integer."""
    most: float
    """Largest integer."""

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest number of the grid."""
        return (self.least - self.zero_point) * self.scale, (self.most - self.zero_point) * self.scale


@dataclass(frozen=True)
class GivenRoundings:
    """What a quantized file rounds, by the names of its float form."""

    tensors: Mapping[str, GivenTensor] = field(default_factory=dict)
    """Tensor -> what it is rounded to."""
    at_run_time: frozenset[str] = frozenset()
    """Tensors whose range is taken at run time."""
    weights: Mapping[str, GivenWeight] = field(default_factory=dict)
    """Constant -> how it is stored."""

    def __bool__(self) -> bool:
        return bool(self.tensors or self.weights or self.at_run_time)


class Dequantizer:
    """Takes the nodes of a model one after another, in their order, and writes the float form."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._constants: dict[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self._constants[node.output[0]] = node.attribute[0].t
        kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
        self._inputs = kinds.keys() - {t.name for t in model.graph.initializer}
        self._integers = {name for name in self._inputs if kinds[name] in _BYTES}
        self._outputs = {v.name for v in model.graph.output}
        every = (names for node in model.graph.node for names in (node.input, node.output))
        self._names = {*self._constants, *kinds, *self._outputs, *(name for names in every for name in names)}
        self._made: list[onnx.NodeProto] = []
        self._by: dict[str, onnx.NodeProto] = {}
        """Tensor -> the node that makes it, of those written so far."""
        self._floats: dict[str, Array] = {}
        """Constants of the float form."""
        self._stored: dict[tuple[str, ...], str] = {}
        self._dequantized: dict[tuple[str, ...], str] = {}
        """Integers with their scales and zero points -> their floats."""
        self._weights: dict[str, GivenWeight] = {}
        self._tensors: dict[str, GivenTensor] = {}
        self._late: set[str] = set()
        self._alias: dict[str, str] = {}
        self._folded: set[str] = set()
        """Results of products of integers, whose scales are still to come."""

    def finish(self) -> tuple[onnx.ModelProto, GivenRoundings]:
        """Put the float form in place of the nodes of the file."""
        graph = self.model.graph
        for value in graph.output:
            if value.type.tensor_type.elem_type in _BYTES and self.of(value.name) != value.name:
                raise ModelError(
                    f"The output '{value.name}' gives rounded integers. Quantize the model with a DequantizeLinear in "
                    "front of its outputs, or give the float model."
                )
        made = self._with_output_names()
        del graph.node[:], graph.value_info[:]
        graph.node.extend(made)
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self._floats.items())
        read = {name for node in made for name in node.input} | self._outputs
        kept = [t for t in graph.initializer if t.name in read]
        dropped = {t.name for t in graph.initializer} - {t.name for t in kept}
        inputs = [v for v in graph.input if v.name not in dropped]
        kept = [TensorProto.FromString(t.SerializeToString()) for t in kept]
        inputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in inputs]
        del graph.initializer[:], graph.input[:]
        graph.initializer.extend(kept)
        graph.input.extend(inputs)
        if not any(node.domain == MICROSOFT for node in made):
            imports = [o for o in self.model.opset_import if o.domain != MICROSOFT]
            del self.model.opset_import[:]
            self.model.opset_import.extend(imports)
        given = GivenRoundings(self._tensors, frozenset(self._late), self._weights)
        return self.model, given

    def _with_output_names(self) -> list[onnx.NodeProto]:
        """Give an output's name to the tensor that it became, where that is free to take it."""
        renamed: dict[str, str] = {}
        copies = []
        for value in self.model.graph.output:
            source = self.of(value.name)
            if source == value.name:
                continue
            if source in self._inputs | self._outputs or source in renamed or source in self._floats:
                copies.append(helper.make_node("Identity", [source], [value.name], name=f"{value.name}/Identity"))
            else:
                renamed[source] = value.name
        for node in self._made:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed.get(name, name)
        self._tensors = {renamed.get(name, name): grid for name, grid in self._tensors.items()}
        self._late = {renamed.get(name, name) for name in self._late}
        return [*self._made, *copies]

    def of(self, name: str) -> str:
        """The tensor of the float form that stands for one of the file."""
        while name in self._alias:
            name = self._alias[name]
        return name

    def take(self, name: str, *others: str) -> None:
        """Let tensors of the file be read as this one."""
        self._alias.update({other: name for other in others if other != name})

    def add(self, op_type: str, inputs: list[str], output: str, like: onnx.NodeProto, **attributes: Any) -> str:
        """Write a node of the float form."""
        name = like.name if op_type in like.op_type else f"{output}/{op_type}"
        node = helper.make_node(op_type, inputs, [output], name=name, **attributes)
        for attribute in like.attribute:
            if attribute.name in _KEPT.get(op_type, ()):
                node.attribute.append(attribute)
        self._made.append(node)
        self._by[output] = node
        return output

    def keep(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Cast" and self.of(node.input[0]) in self._folded:
            self._folded.add(self.of(node.input[0]))
            self.take(self.of(node.input[0]), node.output[0])
            return
        if (node.op_type == "Mul" and self._scales(node)) or (node.op_type == "Add" and self._adds_steps(node)):
            return
        self._follow(node)
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        for index, name in enumerate(kept.input):
            kept.input[index] = self.of(name)
        self._made.append(kept)
        self._by.update(dict.fromkeys(kept.output, kept))

    def _follow(self, node: onnx.NodeProto) -> None:
        """Know the constant that a node makes of another one, such as a weight that is stored in half precision."""
        numbers = self.constant(node.input[0]) if node.op_type in ("Cast", "Identity", "Transpose") else None
        if numbers is None:
            return
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Cast":
            numbers = numbers.astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
        elif node.op_type == "Transpose":
            numbers = numbers.transpose(attributes.get("perm"))
        self.store(node.output[0], np.ascontiguousarray(numbers))

    def _scales(self, node: onnx.NodeProto) -> bool:
        """Take a Mul by scales of integers into the weight that they belong to (case 3)."""
        names = [self.of(name) for name in node.input]
        arrays = [self.constant(name) for name in names]
        first, second = arrays
        if first is not None and second is not None:
            self._floats[node.output[0]] = np.asarray(first * second, np.float32)
            return True
        at = next((i for i in (0, 1) if names[i] in self._folded and arrays[1 - i] is not None), None)
        if at is None:
            return False
        product = self._by[names[at]]
        weight, scale = product.input[1], arrays[1 - at]
        assert scale is not None
        if product.op_type == "Conv":  # [1, C, 1, 1] behind the product is [C, 1, 1, 1] of its weight
            scale = scale.reshape(-1)
            scale = scale.reshape(-1, *(1,) * (self._floats[weight].ndim - 1))
        self._floats[weight] = self._floats[weight] * scale
        stored = self._weights[weight]
        flat = np.broadcast_to(scale.reshape(-1), (stored.numbers.shape[self._channels(product)],)) * stored.scale
        axis = self._channels(product) % stored.numbers.ndim
        zeros = np.broadcast_to(stored.zero_point, flat.shape)
        self._weights[weight] = GivenWeight(stored.numbers, flat.astype(np.float32), zeros, axis)
        self._folded.discard(names[at])
        self.take(names[at], node.output[0])
        return True

    def _adds_steps(self, node: onnx.NodeProto) -> bool:
        """Take a bias that is made of whole steps, and added to integers, into the convolution of floats in front."""
        names = [self.of(name) for name in node.input]
        at = next((i for i in (0, 1) if names[i] in self._folded), None)
        source = None if at is None else self._by.get(names[1 - at])
        for step in ("Reshape", "Cast", "Floor"):
            if source is not None and source.op_type == step:
                source = self._by.get(source.input[0])
        if at is None or source is None or source.op_type != "Div" or self.constant(source.input[0]) is None:
            return False
        self._by[names[at]].input.append(source.input[0])
        self.take(names[at], node.output[0])
        return True

    @staticmethod
    def _channels(product: onnx.NodeProto) -> int:
        return 0 if product.op_type == "Conv" else -1

    def constant(self, name: str) -> Array | None:
        """The numbers of a constant; None for other tensors."""
        name = self.of(name)
        if name in self._floats:
            return self._floats[name]
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def operand(
        self, node: onnx.NodeProto, tensor: str, scale: str, zero: str, *, axis: int = 1, block: int = 0, own: str = ""
    ) -> str:
        """What stands for a tensor of integers with their scale and zero point; `own` keeps a constant to one node."""
        scales, zeros = self.constant(scale), self.constant(zero) if zero else np.zeros((), np.uint8)
        if scales is None or zeros is None:
            raise ModelError(f"{label(node)} has a scale or zero point that is computed. Give the float model.")
        numbers = self.constant(tensor)
        if numbers is not None:
            return self._constant(tensor, numbers, scales, zeros, axis, block, own)
        tensor = self.of(tensor)
        carrier, root = None, tensor
        while root in self._by and self._by[root].op_type in _CARRIES:
            carrier = self._by[root]
            root = carrier.input[0]
        if root in self._integers:
            return self._arithmetic(tensor, scales, zeros, axis, node)
        numbers = self.constant(root)
        if carrier is not None and numbers is not None and numbers.dtype.kind in "iu":  # rows of a stored table
            if scales.size > 1:
                return self._arithmetic(tensor, scales, zeros, axis, node)
            carrier.input[0] = self._constant(root, numbers, scales, zeros, axis, block, own)
        return tensor

    def _constant(
        self,
        tensor: str,
        numbers: Array,
        scales: Array,
        zeros: Array,
        axis: int,
        block: int,
        own: str,
    ) -> str:
        key = (tensor, scales.tobytes().hex(), zeros.tobytes().hex(), str(axis), own)
        if key not in self._stored:
            name = self._free(tensor)
            scales = scales.astype(np.float32)
            grid = [spread(a, numbers, axis, block) for a in (scales, zeros.astype(np.float32))]
            self._floats[name] = np.asarray((numbers.astype(np.float32) - grid[1]) * grid[0], np.float32)
            if numbers.dtype.itemsize == 1:
                steps, levels = np.broadcast_arrays(*(a.reshape(()) if a.size == 1 else a for a in (scales, zeros)))
                place = None if steps.ndim == 0 else axis % numbers.ndim
                self._weights[name] = GivenWeight(numbers, steps, levels.astype(numbers.dtype), place, block)
            self._stored[key] = name
        return self._stored[key]

    def _free(self, name: str) -> str:
        """The name of a tensor of integers for its float form."""
        found = name.removesuffix("_quantized")
        while found in self._names or found in self._floats or found in self._by:
            found += "/float"
        return found

    def _arithmetic(self, tensor: str, scales: Array, zeros: Array, axis: int, node: onnx.NodeProto) -> str:
        """Dequantize integers that the model reads or looks up (case 5).

        Raises:
            ModelError: there is one scale per channel, and the file does not tell how many axes stand behind theirs.
        """
        if max(scales.size, zeros.size) > 1:
            rank = self._ranks.get(tensor)
            if axis >= 0 and rank is None:
                raise ModelError(
                    f"{label(node)} scales each channel of '{tensor}', whose rank is unknown. Infer shapes."
                )
            behind = -axis - 1 if axis < 0 or rank is None else rank - axis - 1
            scales, zeros = (a if a.size == 1 else a.reshape(-1, *(1,) * behind) for a in (scales, zeros))
        key = (tensor, scales.tobytes().hex(), zeros.tobytes().hex(), str(scales.shape))
        known = len(self._dequantized)
        made = self._dequantized.setdefault(key, f"{tensor}/dequantized" + (f"/{known}" if known else ""))
        if made not in self._by:
            zero, scale = f"{made}/zero", f"{made}/scale"
            self._floats[zero], self._floats[scale] = zeros.astype(np.float32), scales.astype(np.float32)
            self.add("Cast", [tensor], f"{made}/Cast", node, to=TensorProto.FLOAT)
            self.add("Sub", [f"{made}/Cast", zero], f"{made}/Sub", node)
            self.add("Mul", [f"{made}/Sub", scale], made, node)
        return made

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """Tensor of the file -> number of its axes, where the file or its operators tell."""
        graph = onnx.shape_inference.infer_shapes(self.model).graph
        kinds = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
        return {name: len(kind.shape.dim) for name, kind in kinds.items() if kind.HasField("shape")}

    def rounds(self, node: onnx.NodeProto, tensor: str, scale: str, zero: str) -> str:
        """Note that a tensor is rounded; returns what is read behind it (case 4)."""
        scales, zeros = self.constant(scale), self.constant(zero) if zero else zero_of(node)
        tensor = self.of(tensor)
        if scales is None or zeros is None or scales.size != 1:
            raise ModelError(
                f"{label(node)} rounds '{tensor}' with a scale that is computed, or one per channel. Give the float "
                "model."
            )
        grid = _grid(zeros.dtype, float(scales.reshape(())), float(zeros.astype(np.float32).reshape(())))
        low, high = grid.limits
        if low == 0.0 and self._may_be_negative(tensor):
            clipped = f"{tensor}/positive"
            if abs(high - _SIX) < _CLOSE * _SIX:
                least, most = f"{clipped}/least", f"{clipped}/most"
                self._floats[least], self._floats[most] = np.zeros((), np.float32), np.full((), _SIX, np.float32)
                self.add("Clip", [tensor, least, most], clipped, node)
            else:
                self.add("Relu", [tensor], clipped, node)
            tensor = clipped
        self._tensors[tensor] = grid
        return tensor

    def _may_be_negative(self, tensor: str) -> bool:
        node = self._by.get(tensor)
        while node is not None and node.op_type in _MOVES:
            node = self._by.get(node.input[0])
        if node is None or node.op_type in _POSITIVE:
            return False
        if node.op_type == "Clip":
            least = self.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
            return least is None or bool(least.reshape(()) < 0)
        return True

    def rounded(self, node: onnx.NodeProto, op_type: str, inputs: list[str], scale: str, zero: str) -> None:
        """Write a float operator, whose result is rounded where there is a scale."""
        made = self.add(op_type, inputs, self._free(node.output[0]), node)
        self.take(self.rounds(node, made, scale, zero) if scale else made, node.output[0])

    def plain(self, node: onnx.NodeProto, inputs: list[str], bias: str) -> None:
        """Write a product of floats, and an Add for its bias."""
        if not bias:
            self.add("MatMul", inputs, node.output[0], node)
            return
        made = self.add("MatMul", inputs, self._free(node.output[0]), node)
        self.add("Add", [made, self.of(bias)], node.output[0], node)

    def bias(self, node: onnx.NodeProto, bias: str, *scales: str, factor: float = 1.0) -> str:
        """A bias of whole steps as floats; a step is the product of the scales and the factor."""
        numbers, steps = self.constant(bias), [s for scale in scales if (s := self.constant(scale)) is not None]
        if numbers is None or len(steps) < len(scales):
            raise ModelError(f"{label(node)} has a bias that is computed. Give the float model.")
        name = self._free(bias)
        step = np.prod([np.asarray(s, np.float32).reshape(-1) for s in np.broadcast_arrays(*steps)], axis=0)
        self._floats[name] = np.asarray(numbers.astype(np.float32) * step * np.float32(factor), np.float32)
        return name

    def store(self, name: str, numbers: Array) -> None:
        """Let a tensor of the file be this constant."""
        self._constants[name] = numpy_helper.from_array(numbers, name)

    def hold(self, name: str, numbers: Array) -> str:
        """Store a constant of the float form for one of the file; returns its name."""
        made = self._free(name)
        self._floats[made] = np.ascontiguousarray(numbers, np.float32)
        return made

    def late(self, tensor: str) -> str:
        """Note that a tensor is rounded in a range that is taken at run time."""
        tensor = self.of(tensor)
        self._late.add(tensor)
        return tensor

    def unit_scale(self, name: str) -> None:
        """Let a scale that is taken at run time be 1: nothing is rounded."""
        self._floats[name] = np.ones((), np.float32)

    def integers(self, node: onnx.NodeProto, op_type: str, zero: str) -> str:
        """Write a product of integers as one of floats, with a weight whose scale is still 1."""
        one = f"{node.output[0]}/one"
        self._floats[one] = np.ones((), np.float32)
        axis = self._channels(helper.make_node(op_type, [], []))
        weight = self.operand(node, node.input[1], one, zero, axis=axis, own=node.output[0])
        self.add(op_type, [self.of(node.input[0]), weight], node.output[0], node)
        if weight in self._weights:
            self._folded.add(node.output[0])
        return str(node.output[0])


def zero_of(node: onnx.NodeProto) -> Array:
    """The zero point of a node that gives none: 0, of the type that its attribute names, or else of 8 bits."""
    kind = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    return np.zeros((), helper.tensor_dtype_to_np_dtype(kind) if kind else np.uint8)


def label(node: onnx.NodeProto) -> str:
    return f"The model is quantized: node '{node.name or next(iter(node.output), '')}' ({node.op_type})"


def spread(array: Array, numbers: Array, axis: int, block: int) -> Array:
    """Bring scales to the shape of what they scale."""
    if array.size == 1:
        return array.reshape(())
    axis %= numbers.ndim
    if block:
        return np.repeat(array, block, axis=axis).take(np.arange(numbers.shape[axis]), axis=axis)
    return array.reshape([-1 if i == axis else 1 for i in range(numbers.ndim)])


def _grid(kind: np.dtype[Any], scale: float, zero: float) -> GivenTensor:
    """A grid of integers of a type."""
    try:
        info = np.iinfo(kind)
    except ValueError as error:
        raise ModelError(f"The model is rounded to {kind}, of which the float form is not known here.") from error
    return GivenTensor(scale, zero, float(info.min), float(info.max))
