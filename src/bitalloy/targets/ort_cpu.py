"""ONNX Runtime on a CPU: which patterns its QDQ fusion turns into integer kernels.

Facts from ONNX Runtime 1.32 (core/optimizer/qdq_transformer/selectors_actions) and from its profiles:

Case 1. Conv with constant weights, optionally followed by Relu or Clip: QLinearConv. uint8 activations, int8
        weights per output channel, int32 bias; the output must be quantized too.
Case 2. MatMul and Gemm: QLinearMatMul, QGemm; constant weights per column. Where nothing rounds what they make, they
        write floats (MatMulIntegerToFloat, and QGemm without a scale of its result): so run those that make an output.
        Before the Add of a bias a MatMul does not: with it, MatMulAddFusion would make a Gemm in float. A constant on
        the left of a MatMul, and several matrices on its right, have one scale and uint8 numbers, as tensors do: the
        kernels refuse vectors of scales there, and int8 on the left, and products of uint8 add no pairs (`pairs`).
Case 3. x * Sigmoid(x): QLinearSigmoid and QLinearMul; both take the unit's precision.
Case 4. Add and Mul of two activations, Concat, AveragePool, GlobalAveragePool, Sigmoid, LeakyRelu, Softmax:
        their QLinear kernels.
Case 5. MaxPool, Reshape, Transpose, Slice, Split and the like run on the integers as they are, with the scale of
        their input: they follow the unit that feeds them.
Case 6. AveragePool whose INT8 kernel is wrong stays in float: with ceil_mode and count_include_pad it divides the
        windows at the edge by another count than in float, and with dilations the fused node is refused.
Case 7. MatMul and Gemm with a constant matrix also run with weights in blocks of 4 or 8 bits (`w4` and `w8` of 32,
        others of as many as they say, as `w4-128`: MatMulNBits, which rounds what it reads to INT8 block by block), or
        with INT8 weights and ranges taken at run time (`int8-dynamic`: DynamicQuantizeMatMul). They write floats, so
        that a last product may run so, too. Few rows, as in a decoder that makes one token after another, gain from the
        former; many rows from the latter.
Case 8. Everything else stays in float. What the optimizer would round or fuse of it all the same: `rewrite.floats`.
Case 9. A Gather that looks rows up in a constant table (an embedding) runs with the table in blocks of 4 or 8 bits
        along the row (GatherBlockQuantized, which computes what a DequantizeLinear of its rows would), or in FP16
        (`w16`: rows in FP16, and a Cast behind). That saves bytes, and hardly any time.

On x86 CPUs without VNNI the uint8 x int8 kernels of `pairs` add pairs of products in 16 bits and saturate (ORT
documentation, "Quantize ONNX models"). The documented remedy, 7-bit weights, doubles the rounding error of every
weight; here the scale of a channel grows only as far as its own neighbouring weights need (`recipe.stored_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.units import Edge
from bitalloy.formats import find_format
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, constant, consumers, name_of, static_shape
from bitalloy.runtime.ort import ORT
from bitalloy.targets.base import Core, Offer, Target, whole_kernel
from bitalloy.targets.patterns import (
    TABLES_IN_HALF,
    Constants,
    has_vnni,
    match_gemm,
    match_matmul,
    match_table,
    match_weighted,
    moves,
    only_reader,
    stored_matrix,
    stored_weights,
)

SINGLE = frozenset({"AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"})
ORT_FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})


def _match(node: ir.Node, graph: Graph) -> Core:
    match node.op_type:
        case "Conv":
            return _activation(match_weighted(node, axis=0))
        case "MatMul":
            return match_matmul(node, Constants.TENSORS)
        case "Gemm":
            return _activation(match_gemm(node, "ONNX Runtime"))
        case "Sigmoid":
            return _silu(node) or Core("Sigmoid", (node,))
        case "Add" | "Mul":
            return _binary(node)
        case "Gather" if table := match_table(node):
            return table
        case "Concat":
            fixed = any(constant(v) is not None for v in node.inputs)
            return Core("Concat", (node,), unfit="one operand is constant" if fixed else "")
        case "AveragePool" if reason := pool_fault(node):
            return Core("AveragePool", (node,), unfit=reason)
        case op if op in SINGLE:
            return Core(op, (node,))
        case op:
            return Core(op, (node,), unfit=f"ONNX Runtime has no INT8 kernel for {op} on CPUs")


def pool_fault(node: ir.Node) -> str:
    """Say what is wrong with the INT8 kernel for an AveragePool; empty where nothing is."""
    if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
        return "ONNX Runtime's INT8 kernel differs at the edge, with ceil_mode and count_include_pad"
    if "dilations" in node.attributes:
        return "ONNX Runtime has no INT8 kernel for dilated AveragePool"
    return ""


def _activation(core: Core) -> Core:
    """Match a convolution with the activation that runs inside it."""
    following = only_reader(core.nodes[-1].outputs[0]) if not core.unfit else None
    if following is None or following.op_type not in ORT_FUSED_ACTIVATIONS:
        return core
    return replace(core, nodes=(*core.nodes, following))


def _silu(node: ir.Node) -> Core | None:
    x, y = node.inputs[0], node.outputs[0]
    uses = consumers(y)
    if len(uses) != 1 or y.is_graph_output() or uses[0].node.op_type != "Mul" or x not in uses[0].node.inputs:
        return None
    product = uses[0].node
    inner = Edge(tensor=str(y.name), node=name_of(product), slot=uses[0].slot)
    return Core("SiLU", (node, product), inner=(inner,))


def _binary(node: ir.Node) -> Core:
    if any(constant(v) is not None for v in node.inputs):
        return Core(node.op_type, (node,), unfit="one operand is constant")
    return Core(node.op_type, (node,))


def _blocks(name: str, weight: str, block: int, *, rare: bool = False) -> Offer:
    def refuse(core: Core, nodes: Sequence[ir.Node]) -> str:
        if reason := stored_weights(core, nodes):
            return reason
        columns = static_shape(core.nodes[0].inputs[0])[-1] if core.kind == "Gather" else 0  # type: ignore[arg-type]
        if columns % 2 and find_format(weight).bits == 4:
            return f"GatherBlockQuantized packs two numbers of 4 bits in a byte, and a row of the table has {columns}"
        return ""

    scheme = Scheme(
        name=name,
        activation=f"int8-block{block}",
        weight=weight,
        granularity=Granularity.BLOCK,
        block=block,
        dynamic=True,
        kernel="MatMulNBits",
        gather="GatherBlockQuantized",
    )
    return Offer(scheme=scheme, refuse=refuse, usual=False, rare=rare)


LARGEST_PAIR = None if has_vnni() else 128

ORT_CPU = Target(
    name="ort-cpu",
    describe="ONNX Runtime, CPU: uint8 activations, int8 weights per channel, QDQ fused to QLinear kernels; products "
    "also in int8-dynamic; with --schemes also in w8, w8-128, w4-16, w4, w4-64, w4-128 (MatMulNBits), tables of a "
    "Gather in blocks and w16",
    runtime=ORT,
    offers=(
        TABLES_IN_HALF,
        _blocks("w8", "int8", 32),
        _blocks("w8-128", "int8", 128, rare=True),
        Offer(
            scheme=Scheme(
                name="int8-dynamic",
                activation="uint8-dynamic",
                weight="int8",
                dynamic=True,
                kernel="DynamicQuantizeMatMul",
                pair_limit=LARGEST_PAIR,
            ),
            refuse=stored_matrix,
        ),
        _blocks("w4-16", "uint4", 16, rare=True),
        _blocks("w4", "uint4", 32),
        _blocks("w4-64", "uint4", 64, rare=True),
        _blocks("w4-128", "uint4", 128),
        Offer(
            scheme=Scheme(name="int8", activation="uint8", weight="int8", bias="int32", pair_limit=LARGEST_PAIR),
            refuse=whole_kernel,
        ),
    ),
    match=_match,
    follows=moves,
    writes_floats=frozenset({"MatMul", "Gemm"}),
    rounds_floats=True,
)
