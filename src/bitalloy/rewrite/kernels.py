"""Products whose kernel rounds what it reads: ONNX Runtime's operators in place of a stored weight and a product.

`rewrite.apply` stores the weight of such a unit behind a DequantizeLinear, leaves what enters it as it is, and marks
the node with the operator that is to compute it (`metadata.KERNEL`). That form has the names and operands of the float
graph, so a graph with open sizes can take it over; here it becomes what the runtime executes.

Case 1. MatMulNBits (com.microsoft): weights of 4 or 8 bits in blocks along the reduction, packed row by row, with zero
        points unless all are in the middle. With accuracy level 4 it rounds the tensor to INT8 by block
        (`formats.runtime.DynamicBlocks`); with level 1 it does not. A bias of a Gemm is an operand.
Case 2. DynamicQuantizeMatMul (com.microsoft): written as DynamicQuantizeLinear, MatMulInteger, Cast and Mul, and Add
        for a bias, which ONNX Runtime fuses (MatMulIntegerToFloatFusion, DynamicQuantizeMatMulFusion) and which other
        runtimes know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.core.schemes import Scheme
from bitalloy.model.metadata import KERNEL, TAG
from bitalloy.model.read import attribute, constant, name_of
from bitalloy.model.write import add_initializer, drop_unread, namer, node_namer

DOMAIN = "com.microsoft"
ROUNDS_BLOCKS, KEEPS_FLOATS = 4, 1
"""Accuracy levels of MatMulNBits."""


def lower_kernels(model: ir.Model) -> None:
    """Replace every marked product by the operators of its kernel, in place.

    Raises:
        ModelError: a marked node does not read a stored weight.
    """
    marked = [node for node in model.graph if KERNEL in node.metadata_props]
    if not marked:
        return
    writer = _Lowering(model)
    for node in marked:
        name, _, rounding = str(node.metadata_props[KERNEL]).partition(" ")
        KERNELS[name](writer, _stored_product(node, rounds=bool(rounding)))
    drop_unread(model.graph)


@dataclass(frozen=True)
class _StoredProduct:
    """A product with a stored weight, in the orientation of a matrix product: the reduction first, channels last."""

    node: ir.Node
    reader: ir.Node
    """The DequantizeLinear of the weight."""
    integers: np.ndarray
    """(K, N)."""
    scale: np.ndarray
    """(blocks, N), or (N,) without blocks."""
    zero_point: np.ndarray
    """Of the shape of the scale."""
    block: int
    bias: ir.Value | None
    rounds: bool
    """Whether the kernel rounds what it reads."""


def _stored_product(node: ir.Node, *, rounds: bool) -> _StoredProduct:
    value = node.inputs[1]
    reader = value.producer() if value is not None else None
    operands = [constant(v) for v in reader.inputs] if reader is not None else []
    if reader is None or reader.op_type != "DequantizeLinear" or any(array is None for array in operands):
        raise ModelError(f"'{node.name}' reads no stored weight, which its kernel needs.")
    integers, scale, zero_point = operands
    assert integers is not None and scale is not None and zero_point is not None
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        integers, scale, zero_point = integers.T, scale.T, zero_point.T
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    block = int(attribute(reader, "block_size", 0))  # type: ignore[call-overload]
    return _StoredProduct(node, reader, integers, scale, zero_point, block, bias, rounds)


def mark_kernel(node: ir.Node, scheme: Scheme) -> None:
    """Say by which kernel a product with a stored weight is to be computed."""
    node.metadata_props[KERNEL] = f"{scheme.kernel} {scheme.activation if scheme.rounds else ''}".strip()


class _Lowering:
    """Writes kernels into a model."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._graph = model, model.graph
        self._fresh, self._fresh_node = namer(model), node_namer(model)

    def constant(self, node: ir.Node, role: str, array: np.ndarray) -> ir.Value:
        """Store a constant of a node."""
        return add_initializer(self._graph, self._fresh(f"{node.name}/{role}"), np.ascontiguousarray(array))

    def node(
        self,
        like: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        outputs: int = 1,
        attributes: Mapping[str, int] | None = None,
    ) -> Sequence[ir.Value]:
        """Insert a node before another, for the same unit."""
        name = self._fresh_node(f"{like.name}/{op_type}")
        made = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
        for number, value in enumerate(made.outputs):
            value.name = self._fresh(f"{name}/{number}")
        if TAG in like.metadata_props:
            made.metadata_props[TAG] = like.metadata_props[TAG]
        self._graph.insert_before(like, made)
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        return made.outputs

    def finish(self, product: _StoredProduct, result: ir.Value) -> None:
        """Put a value in the place of what the product made, under its name, and remove the product."""
        node = product.node
        old, maker = node.outputs[0], result.producer()
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        name, node_name = old.name, name_of(node)
        self._graph.remove(node, safe=True)
        if not product.reader.outputs[0].uses():
            self._graph.remove(product.reader, safe=True)
        old.name, result.name = None, name
        assert maker is not None
        maker.name = node_name


def _write_nbits(writer: _Lowering, product: _StoredProduct) -> None:
    node, block = product.node, product.block
    bits = product.reader.inputs[0].dtype.bitwidth  # type: ignore[union-attr]
    depth, channels = product.integers.shape
    middle = 2 ** (bits - 1)
    signed = product.reader.inputs[0].dtype.is_signed()  # type: ignore[union-attr]
    shift = middle if signed else 0
    rows = (product.integers.T.astype(np.int16) + shift).astype(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, -depth % block)), constant_values=middle).reshape(channels, -1, block)
    zeros = (product.zero_point.T.astype(np.int16) + shift).astype(np.uint8)
    inputs = [
        node.inputs[0],
        writer.constant(node, "packed", _nibbles(rows) if bits == 4 else rows),
        writer.constant(node, "scales", product.scale.T.reshape(-1)),
        None if (zeros == middle).all() else writer.constant(node, "zero_points", _packed_zeros(zeros, bits)),
        None,
        product.bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    level = ROUNDS_BLOCKS if product.rounds else KEEPS_FLOATS
    sizes = {"K": depth, "N": channels, "bits": bits, "block_size": block, "accuracy_level": level}
    (result,) = writer.node(node, "MatMulNBits", inputs, domain=DOMAIN, attributes=sizes)
    writer.finish(product, result)


def _packed_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Pack zero points (N, blocks) row by row, two of 4 bits in a byte."""
    if bits == 8:
        return zeros.reshape(-1)
    return _nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))).reshape(-1)


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """Pack neighbours of the last axis into bytes, the first one low."""
    return np.asarray(numbers[..., 0::2] | (numbers[..., 1::2] << 4))


def _write_dynamic(writer: _Lowering, product: _StoredProduct) -> None:
    node = product.node
    rounded, scale, zero = writer.node(node, "DynamicQuantizeLinear", [node.inputs[0]], outputs=3)
    weight = writer.constant(node, "integers", product.integers)
    zeros = writer.constant(node, "zero_points", product.zero_point)
    (sums,) = writer.node(node, "MatMulInteger", [rounded, weight, zero, zeros])
    (floats,) = writer.node(node, "Cast", [sums], attributes={"to": int(ir.DataType.FLOAT)})
    (steps,) = writer.node(node, "Mul", [scale, writer.constant(node, "scales", product.scale)])
    (result,) = writer.node(node, "Mul", [floats, steps])
    if product.bias is not None:
        (result,) = writer.node(node, "Add", [result, product.bias])
    writer.finish(product, result)


KERNELS: Mapping[str, Callable[[_Lowering, _StoredProduct], None]] = {
    "MatMulNBits": _write_nbits,
    "DynamicQuantizeMatMul": _write_dynamic,
}
"""Operator of the runtime -> what writes it."""
