"""What a plan keeps in float, and ONNX Runtime's optimizer would round or compute in integers; its prevention.

Facts from ONNX Runtime 1.32 (core/optimizer), each with a test that reads the optimized graph
(`tests/rewrite/test_floats.py`). The prevention is a DequantizeLinear whose scale and zero point are vectors of equal
values: the same numbers, but the passes in question ask for scalars.

Case 1. WeightBiasQuantization rounds the float weights of a Conv, ConvTranspose or Gemm to INT8, with one scale for
        all, and its bias to INT32, between a DequantizeLinear and a QuantizeLinear. Prevented.
Case 2. The same of a MatMul with a bias, which MatMulAddFusion makes a Gemm. Prevented.
Case 3. The same where an operator stands between that another pass moves or takes into the product (QDQPropagation;
        fusions of Pad, Add, Mul, BatchNormalization). Prevented.
Case 4. Softmax between such nodes, past what moves, becomes QLinearSoftmax, which is up to a step off. Prevented.
Case 5. AveragePool between such nodes becomes QLinearAveragePool, vectors or not: wrong with ceil_mode and
        count_include_pad, refused with dilations. Prevented there by a Sum of one operand behind it, which no pass
        takes.
Case 6. Other operators become integer kernels with the numbers that the graph says (Add, Mul, Sigmoid, LeakyRelu,
        Concat, Where, GlobalAveragePool, MatMul of two tensors), or run on the integers (MaxPool, Transpose and the
        like; Resize only where its mode is nearest). Left to the runtime.
Case 7. DoubleQDQPairsRemover makes one rounding of two in a row, on the narrower of both ranges. Plans round twice on
        equal scales alone, where it changes nothing.
Case 8. ReluQuantFusion and ClipQuantFusion drop an activation whose bounds are those of the rounding: the same numbers.
Case 9. DequantizeLinear of INT4 blocks before a MatMul becomes MatMulNBits, which rounds the tensor to INT8 at run
        time. Plans write that operator themselves (`rewrite.kernels`), and no such DequantizeLinear.
Case 10. OpenVINO 2026.4 (src/common/low_precision_transformations) rounds no float weights, and computes in float what
        a plan keeps in float, in all of these cases. Nothing is prevented there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.metadata import TAG
from bitalloy.model.read import Consumer, constant, consumers, is_float
from bitalloy.model.write import add_initializer, drop_unread, insert_behind, namer, node_namer
from bitalloy.targets.ort_cpu import pool_fault

MOVED = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators past which QDQPropagation moves roundings."""
TAKEN = frozenset({"Add", "BatchNormalization", "Clip", "Mul", "Relu"})
"""Operators behind a product that are taken into it, or into the rounding; Add and Mul of a constant alone."""
SUMMED = frozenset({"Add", "BatchNormalization"})
"""What makes a Gemm of a MatMul."""


def keep_floats(model: ir.Model) -> None:
    """Let ONNX Runtime with default options compute in float what a plan keeps in float, in place.

    Args:
        model: as a plan rewrote it.
    """
    keeper = _Keeper(model)
    for node in list(model.graph):
        entry = _entry(node)
        if entry is None:
            continue
        way = _way_out(node) if node.op_type == "Softmax" else None
        if _weight_is_rounded(node) or (way is not None and MOVED.issuperset(way)):
            keeper.read_by_channel(*entry)
        elif node.op_type == "AveragePool" and pool_fault(node) and _way_out(node) is not None:
            keeper.set_apart(node)
    drop_unread(model.graph)


def _entry(node: ir.Node) -> tuple[Consumer, ir.Node] | None:
    """Find the DequantizeLinear with one scale that a node reads, past what moves, and what reads it on that way."""
    use = Consumer(node, 0)
    while True:
        value = use.node.inputs[use.slot] if use.node.inputs else None
        producer = value.producer() if value is not None else None
        if producer is None:
            return None
        if producer.op_type == "DequantizeLinear":
            scale = constant(producer.inputs[1])
            return (use, producer) if scale is not None and scale.size == 1 else None
        if producer.op_type not in MOVED | {"Pad"}:
            return None
        use = Consumer(producer, 0)


def _way_out(node: ir.Node) -> list[str] | None:
    """List the operators between a node and the QuantizeLinear that alone reads it; None where there is no such way."""
    found = list[str]()
    while True:
        readers = {use.node for use in consumers(node.outputs[0])}
        if len(readers) != 1:
            return None
        (node,) = readers
        if node.op_type == "QuantizeLinear":
            return found
        if node.op_type not in MOVED | TAKEN:
            return None
        if node.op_type in ("Add", "Mul") and all(constant(v) is None for v in node.inputs):
            return None
        found.append(node.op_type)


def _weight_is_rounded(node: ir.Node) -> bool:
    """Tell whether the float weights of a node that reads rounded numbers would be rounded: cases 1 to 3."""
    weight = node.inputs[1] if node.op_type in ops.WEIGHTED else None
    if weight is None or not is_float(weight) or constant(weight) is None:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and ((array := constant(bias)) is None or array.ndim != 1):
        return False
    way = _way_out(node)
    return way is not None and (node.op_type != "MatMul" or bool(SUMMED.intersection(way)))


class _Keeper:
    """Writes what the passes do not take."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._fresh, self._fresh_node = namer(model), node_namer(model)
        self._made: dict[ir.Value, ir.Value] = {}

    def read_by_channel(self, use: Consumer, pair: ir.Node) -> None:
        """Let an operand be read by a DequantizeLinear with a vector of scales; a tensor of one element stays."""
        kept = pair.inputs[0]
        assert kept is not None
        if kept not in self._made:
            axis, size = _longer_axis(kept, pair)
            if not size:
                return
            scale, zero = (
                add_initializer(self._graph, self._fresh(f"{kept.name}/{role}s"), np.full(size, constant(operand)))
                for role, operand in (("scale", pair.inputs[1]), ("zero_point", pair.inputs[2]))
            )
            self._made[kept] = self._insert("DequantizeLinear", [kept, scale, zero], pair, {"axis": axis})
        use.node.replace_input_with(use.slot, self._made[kept])
        if not consumers(pair.outputs[0]) and not pair.outputs[0].is_graph_output():
            self._graph.remove(pair, safe=True)

    def set_apart(self, node: ir.Node) -> None:
        """Put a Sum of one operand behind a node."""
        value, uses = node.outputs[0], consumers(node.outputs[0])
        apart = self._insert("Sum", [value], node, {})
        for use in uses:
            use.node.replace_input_with(use.slot, apart)

    def _insert(self, op_type: str, inputs: list[ir.Value], like: ir.Node, attributes: dict[str, int]) -> ir.Value:
        """Insert a node behind what it reads; it belongs to the unit of another, and makes a tensor of its shape."""
        made = ir.node(op_type, inputs, attributes, name=self._fresh_node(f"{like.name}/{op_type}"))
        value, source = made.outputs[0], like.outputs[0]
        value.name, value.type, value.shape = self._fresh(f"{source.name}/apart"), source.type, source.shape
        if TAG in like.metadata_props:
            made.metadata_props[TAG] = like.metadata_props[TAG]
        insert_behind(self._graph, inputs[0].producer(), [made])
        return value


def _longer_axis(kept: ir.Value, pair: ir.Node) -> tuple[int, int]:
    """Choose an axis of a stored tensor for a vector of scales, and its size; a vector of one counts as a scalar.

    It is the one of the channels where there are several, or else the first that has several elements; size 0 without.
    """
    source = kept.producer()
    known = [pair.outputs[0], kept, *(source.inputs[:1] if source is not None else ())]
    shape = next((v.shape for v in known if v is not None and v.shape is not None), ())
    sizes = [(axis, size) for axis, size in enumerate(shape) if isinstance(size, int) and size > 1]
    return next((found for found in sizes if found[0] == 1), sizes[0] if sizes else (0, 0))
