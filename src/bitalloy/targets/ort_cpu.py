"""ONNX Runtime on a CPU: which patterns its QDQ fusion turns into integer kernels.

Facts from ONNX Runtime 1.32 (core/optimizer/qdq_transformer/selectors_actions) and from its profiles:

Case 1. Conv with constant weights, optionally followed by Relu or Clip: QLinearConv. uint8 activations, int8
        weights per output channel, int32 bias; the output must be quantized too.
Case 2. MatMul and Gemm: QLinearMatMul, QGemm; constant weights per column.
Case 3. x * Sigmoid(x): QLinearSigmoid and QLinearMul; both take the unit's precision.
Case 4. Add and Mul of two activations, Concat, AveragePool, GlobalAveragePool, Sigmoid, LeakyRelu, Softmax:
        their QLinear kernels.
Case 5. MaxPool, Reshape, Transpose, Slice, Split and the like run on the integers as they are, with the scale of
        their input: they follow the unit that feeds them.
Case 6. AveragePool whose INT8 kernel is wrong stays in float: with ceil_mode and count_include_pad it divides the
        windows at the edge by another count than in float, and with dilations the fused node is refused.
Case 7. Everything else stays in float.

On x86 CPUs without VNNI the uint8 x int8 kernels add pairs of products in 16 bits and saturate (ORT documentation,
"Quantize ONNX models"). The documented remedy, 7-bit weights, doubles the rounding error of every weight; here the
scale of a channel grows only as far as its own neighbouring weights need (`base.weight_params`).
"""

from __future__ import annotations

import math
import platform
from pathlib import Path

import onnx_ir as ir

from bitalloy.graph import Graph, attribute, constant, consumers, name_of, static_shape
from bitalloy.records import Edge, WeightSite
from bitalloy.targets.base import Core, Target

MOVERS = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
SINGLE = frozenset({"AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"})
FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})


def _match(node: ir.Node, graph: Graph) -> Core:
    match node.op_type:
        case "Conv":
            return _weighted(node, axis=0)
        case "MatMul":
            return _matmul(node)
        case "Gemm":
            return _gemm(node)
        case "Sigmoid":
            return _silu(node) or Core("Sigmoid", (node,))
        case "Add" | "Mul":
            return _binary(node)
        case "Concat":
            fixed = any(constant(v) is not None for v in node.inputs)
            return Core("Concat", (node,), int8=not fixed, reason="one operand is constant" if fixed else "")
        case "AveragePool" if reason := _pool_fault(node):
            return Core("AveragePool", (node,), int8=False, reason=reason)
        case op if op in SINGLE:
            return Core(op, (node,))
        case op:
            return Core(op, (node,), int8=False, reason=f"ONNX Runtime has no INT8 kernel for {op} on CPUs")


def _pool_fault(node: ir.Node) -> str:
    """What is wrong with the INT8 kernel for an AveragePool; empty where nothing is."""
    if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
        return "ONNX Runtime's INT8 kernel differs at the edge, with ceil_mode and count_include_pad"
    if "dilations" in node.attributes:
        return "ONNX Runtime has no INT8 kernel for dilated AveragePool"
    return ""


def _weighted(node: ir.Node, *, axis: int) -> Core:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if constant(node.inputs[1]) is None or (bias is not None and constant(bias) is None):
        return Core(node.op_type, (node,), int8=False, reason="weights or bias are computed at run time")
    if bias is not None and len(static_shape(bias)) != 1:
        return Core(node.op_type, (node,), int8=False, reason="the bias is not a vector")
    site = _weight(node, axis)
    return Core(node.op_type, (node, *_activation(node)), weights=(site,))


def _weight(node: ir.Node, axis: int) -> WeightSite:
    value = node.inputs[1]
    assert value is not None
    elements = math.prod(static_shape(value))
    return WeightSite(tensor=str(value.name), node=name_of(node), slot=1, axis=axis, elements=elements)


def _activation(node: ir.Node) -> tuple[ir.Node, ...]:
    output = node.outputs[0]
    uses = consumers(output)
    if len(uses) == 1 and not output.is_graph_output() and uses[0].node.op_type in FUSED_ACTIVATIONS:
        return (uses[0].node,)
    return ()


def _matmul(node: ir.Node) -> Core:
    left, right = node.inputs
    assert left is not None and right is not None
    if constant(left) is not None:
        return Core("MatMul", (node,), int8=False, reason="the left operand is constant")
    if constant(right) is None:
        return Core("MatMul", (node,))
    rank = len(static_shape(right))
    if rank != 2:
        return Core("MatMul", (node,), int8=False, reason="the constant operand is not a matrix")
    return Core("MatMul", (node,), weights=(_weight(node, 1),))


def _gemm(node: ir.Node) -> Core:
    plain = (
        attribute(node, "transA", 0) == 0
        and attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
    )
    if not plain:
        return Core("Gemm", (node,), int8=False, reason="ONNX Runtime fuses only alpha = beta = 1 without transA")
    return _weighted(node, axis=0 if attribute(node, "transB", 0) else 1)


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
        return Core(node.op_type, (node,), int8=False, reason="one operand is constant")
    return Core(node.op_type, (node,))


def _follows(node: ir.Node) -> bool:
    if node.op_type == "Resize":
        return attribute(node, "mode", "nearest") == "nearest"
    if node.op_type == "Gather":
        return constant(node.inputs[1]) is not None
    return node.op_type in MOVERS


def _saturates() -> bool:
    """Whether this CPU's uint8 x int8 kernels can overflow: x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    info = Path("/proc/cpuinfo")
    return "vnni" not in info.read_text() if info.is_file() else True


ORT_CPU = Target(
    name="ort-cpu",
    describe="ONNX Runtime, CPU: uint8 activations, int8 weights per channel, QDQ fused to QLinear kernels",
    activation_signed=False,
    pair_limit=128 if _saturates() else None,
    match=_match,
    follows=_follows,
)
