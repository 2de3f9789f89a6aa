"""Nodes whose kernel reads a stored weight itself: operators of a runtime in place of a weight, its reading and a node.

`rewrite.apply` stores the weight of such a unit behind a DequantizeLinear, leaves what enters it as it is, and marks
the node with the operator that is to compute it (`metadata.KERNEL`). That form has the names and operands of the float
graph, so a graph with open sizes can take it over; here it becomes what the runtime executes.

Case 1. MatMulNBits (com.microsoft): weights of 4 or 8 bits in blocks along the reduction, packed row by row, with zero
        points unless all are in the middle. With accuracy level 4 it rounds the tensor to INT8 by block
        (`formats.runtime.DynamicBlocks`); with level 1 it does not. A bias of a Gemm is an operand.
Case 2. DynamicQuantizeMatMul (com.microsoft): written as DynamicQuantizeLinear, MatMulInteger, Cast and Mul, and Add
        for a bias, which ONNX Runtime fuses (MatMulIntegerToFloatFusion, DynamicQuantizeMatMulFusion) and which other
        runtimes know.
Case 3. GatherBlockQuantized (com.microsoft): rows of a table in blocks of 4 or 8 bits, packed along the row. It
        computes what a DequantizeLinear of the rows would, bit by bit. An index out of range gives zeros, where Gather
        fails.
Case 4. Gather: rows are looked up as they are stored, with their scales, and become floats behind. Standard ONNX, of
        formats that its Gather takes (not of 4 bits), with blocks that divide the row.

A constant that several of them read in the same form is stored once: also where one reads the transpose of the other,
as an embedding and the head of a language model do. A table in blocks is then what the product packs, reshaped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.core.schemes import Scheme
from bitalloy.model.metadata import KERNEL, SOURCE, TAG
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
    for node in sorted(marked, key=lambda n: n.op_type == "Gather"):  # a table may be what a product packs
        name, _, rounding = str(node.metadata_props[KERNEL]).partition(" ")
        operand = _stored_operand(node, rounds=bool(rounding))
        writer.source = operand.reader.inputs[0].meta.get(SOURCE)  # type: ignore[union-attr]
        KERNELS[name](writer, operand)
    drop_unread(model.graph)


@dataclass(frozen=True)
class _StoredOperand:
    """A node with a stored weight, in the orientation of a matrix product: the reduction first, channels last.

    Of a table the rows are the channels.
    """

    node: ir.Node
    reader: ir.Node
    """What makes floats of the weight: a DequantizeLinear, or a Cast."""
    numbers: np.ndarray
    """(K, N), as they are stored."""
    scale: np.ndarray | None
    """(blocks, N), or (N,) without blocks; None of a floating-point format."""
    zero_point: np.ndarray | None
    """Of the shape of the scale."""
    block: int
    bias: ir.Value | None
    rounds: bool
    """Whether the kernel rounds what it reads."""

    @property
    def bits(self) -> int:
        """Of one number."""
        return int(self.reader.inputs[0].dtype.bitwidth)  # type: ignore[union-attr]


def _stored_operand(node: ir.Node, *, rounds: bool) -> _StoredOperand:
    looked_up = node.op_type == "Gather"
    value = node.inputs[0 if looked_up else 1]
    reader = value.producer() if value is not None else None
    operands = [constant(v) for v in reader.inputs] if reader is not None else []
    if reader is None or not operands or any(array is None for array in operands):
        raise ModelError(f"'{node.name}' reads no stored weight, which its kernel needs.")
    numbers, scale, zero_point = (*operands, None, None)[:3]
    assert numbers is not None
    if looked_up or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        numbers = numbers.T
        scale, zero_point = (None if array is None else array.T for array in (scale, zero_point))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    block = int(attribute(reader, "block_size", 0))  # type: ignore[call-overload]
    return _StoredOperand(node, reader, numbers, scale, zero_point, block, bias, rounds)


def mark_kernel(node: ir.Node, scheme: Scheme) -> None:
    """Say by which kernel a node with a stored weight is to be computed, where its scheme names one."""
    if kernel := scheme.operator(node.op_type):
        node.metadata_props[KERNEL] = f"{kernel} {scheme.activation if scheme.rounds else ''}".strip()


class _Lowering:
    """Writes kernels into a model."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._graph = model, model.graph
        self._fresh, self._fresh_node = namer(model), node_namer(model)
        self.source: tuple[str, str] | None = None
        """What the constants that are stored stand for, see `metadata.SOURCE`."""
        self._kept: dict[tuple[object, ...], ir.Value] = {}
        """Type, shape and hash of a constant -> where it is stored."""
        self._packed: dict[bytes, ir.Value] = {}
        """Hash of what a product packed -> where it is stored."""

    def constant(self, node: ir.Node, role: str, array: np.ndarray) -> ir.Value:
        """Store a constant of a node, or find it where another node has stored it."""
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, _digest(array))
        if key not in self._kept:
            self._kept[key] = add_initializer(self._graph, self._fresh(f"{node.name}/{role}"), array)
            if self.source is not None:
                self._kept[key].meta[SOURCE] = self.source
        return self._kept[key]

    def packed(self, node: ir.Node, array: np.ndarray) -> ir.Value:
        """Store the packed numbers of a product, so that a table of the same numbers can be found there."""
        kept = self.constant(node, "packed", array)
        self._packed[_digest(array)] = kept
        return kept

    def table(self, node: ir.Node, array: np.ndarray) -> ir.Value:
        """Store the packed numbers of a table, or reshape those of a product that has the same."""
        found = self._packed.get(_digest(array))
        if found is None:
            return self.constant(node, "table", array)
        shape = self.constant(node, "table_shape", np.array(array.shape, np.int64))
        return self.node(node, "Reshape", [found, shape])[0]

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

    def reshaped(self, node: ir.Node, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Give a tensor another shape; 0 keeps a size."""
        (found,) = self.node(node, "Reshape", [value, self.constant(node, "shape", np.array(shape, np.int64))])
        return found

    def finish(self, product: _StoredOperand, result: ir.Value) -> None:
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


def _write_nbits(writer: _Lowering, product: _StoredOperand) -> None:
    node, block = product.node, product.block
    bits = product.bits
    depth, channels = product.numbers.shape
    rows, zeros, middle = _unsigned(product)
    rows = np.pad(rows, ((0, 0), (0, -depth % block)), constant_values=middle).reshape(channels, -1, block)
    assert product.scale is not None
    inputs = [
        node.inputs[0],
        writer.packed(node, _nibbles(rows) if bits == 4 else rows),
        writer.constant(node, "scales", product.scale.T),
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


def _unsigned(operand: _StoredOperand) -> tuple[np.ndarray, np.ndarray, int]:
    """Return numbers and zero points as unsigned rows, one for each channel, and the middle of their range."""
    assert operand.zero_point is not None
    middle = 2 ** (operand.bits - 1)
    signed = operand.reader.inputs[0].dtype.is_signed()  # type: ignore[union-attr]
    shift = middle if signed else 0
    rows, zeros = (
        (array.T.astype(np.int16) + shift).astype(np.uint8) for array in (operand.numbers, operand.zero_point)
    )
    return rows, zeros, middle


def _packed_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Pack zero points (N, blocks) row by row, two of 4 bits in a byte."""
    return zeros if bits == 8 else _nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """Pack neighbours of the last axis into bytes, the first one low."""
    return np.asarray(numbers[..., 0::2] | (numbers[..., 1::2] << 4))


def _write_dynamic(writer: _Lowering, product: _StoredOperand) -> None:
    node = product.node
    assert product.scale is not None and product.zero_point is not None, "integers have a scale"
    rounded, scale, zero = writer.node(node, "DynamicQuantizeLinear", [node.inputs[0]], outputs=3)
    weight = writer.constant(node, "integers", product.numbers)
    zeros = writer.constant(node, "zero_points", product.zero_point)
    (sums,) = writer.node(node, "MatMulInteger", [rounded, weight, zero, zeros])
    (floats,) = writer.node(node, "Cast", [sums], attributes={"to": int(ir.DataType.FLOAT)})
    (steps,) = writer.node(node, "Mul", [scale, writer.constant(node, "scales", product.scale)])
    (result,) = writer.node(node, "Mul", [floats, steps])
    if product.bias is not None:
        (result,) = writer.node(node, "Add", [result, product.bias])
    writer.finish(product, result)


def _write_blocks(writer: _Lowering, table: _StoredOperand) -> None:
    node, bits, block = table.node, table.bits, table.block
    rows, zeros, middle = _unsigned(table)
    assert table.scale is not None
    inputs = [
        writer.table(node, _nibbles(rows) if bits == 4 else rows),
        node.inputs[1],
        writer.constant(node, "scales", table.scale.T),
    ]
    if not (zeros == middle).all():
        inputs.append(writer.constant(node, "zero_points", _packed_zeros(zeros, bits)))
    sizes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    (result,) = writer.node(node, "GatherBlockQuantized", inputs, domain=DOMAIN, attributes=sizes)
    writer.finish(table, result)


def _write_rows(writer: _Lowering, table: _StoredOperand) -> None:
    node, indices = table.node, table.node.inputs[1]
    kept = table.reader.inputs[0]
    (stored,) = writer.node(node, "Gather", [kept, indices])
    (result,) = writer.node(node, "Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)})
    if table.scale is not None:
        assert table.zero_point is not None and not table.zero_point.any(), "such tables lie around 0"
        steps = table.scale.T.reshape(table.numbers.shape[1], -1)
        kept_scale = table.reader.inputs[1] if table.block else writer.constant(node, "scales", steps)
        (scale,) = writer.node(node, "Gather", [kept_scale, indices])
        ahead = [0] * len(node.inputs[1].shape or ())  # type: ignore[union-attr]
        if steps.shape[1] > 1:
            result = writer.reshaped(node, result, [*ahead, steps.shape[1], table.block])
            scale = writer.reshaped(node, scale, [*ahead, steps.shape[1], 1])
        (result,) = writer.node(node, "Mul", [result, scale])
        if steps.shape[1] > 1:
            result = writer.reshaped(node, result, [*ahead, table.numbers.shape[0]])
    writer.finish(table, result)


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


KERNELS: Mapping[str, Callable[[_Lowering, _StoredOperand], None]] = {
    "MatMulNBits": _write_nbits,
    "DynamicQuantizeMatMul": _write_dynamic,
    "GatherBlockQuantized": _write_blocks,
    "Gather": _write_rows,
}
"""Operator of the runtime -> what writes it."""
