"""TensorRT 10 and 11 with strongly typed networks: the precision of every layer is written in the graph.

INT8 and FP8 are a QuantizeLinear/DequantizeLinear pair, FP16 a Cast. Facts from NVIDIA's documentation ("Explicit
Quantization": processing of Q/DQ networks, placement recommendations, limitations):

Case 1. Conv, ConvTranspose, Gemm and MatMul with constant weights: a pair on the input, and int8 weights per output
        channel. What they make is not rounded: the next layer in INT8 does that, and TensorRT moves its Q into the
        kernel before it. An activation behind them, and a constant bias of a MatMul, is part of the same kernel.
Case 2. The residual Add behind such a layer (and a Relu behind the Add) runs inside that layer's kernel. A pair goes on
        the other operand alone; one between layer and Add would force them apart.
Case 3. MatMul of two activations: a pair on both operands. Queries, keys, probabilities and values of an attention are
        rounded that way, and Softmax and scaling between the two products are not, which is the pattern that fuses.
Case 4. Concat and operators that only move data commute with Q and DQ. They round nothing: TensorRT moves the Q of the
        layer that reads them in front of them.
Case 5. Biases stay float: TensorRT refuses quantized ones.
Case 6. Everything else (pointwise operators such as GELU, Softmax, normalization, pooling) runs in FP32 or FP16, where
        it fuses with the kernels beside it.
Case 7. FP8 (E4M3) is rounded where INT8 is: Conv, Gemm, MatMul and residual Add. Not so where its kernels are missing
        or slower than FP16: convolutions in groups (release notes, "limitations"; TensorRT issue 4524), ConvTranspose,
        convolutions with 16 channels or fewer on a side or with a window of more than 32 elements, products of a matrix
        and a vector or with fewer than 16 rows or columns on the right. All but groups are NVIDIA's own choice in
        ModelOpt 0.47 (modelopt/onnx/quantization). Devices have FP8 from SM89 on (`targets.devices`).
Case 8. INT4 is for weights alone ("Working with Quantized Types": "INT4 (signed 4-bit integer, weight-only
        quantization)"): a DequantizeLinear in blocks along the reduction (opset 21, zero point 0; IDequantizeLayer:
        only symmetric, blocks in one of the last two dimensions) in front of a MatMul or Gemm with a constant matrix.
        It makes numbers of the type of its scales, so that scales in FP16 make the product one in FP16, with nothing in
        between: a Cast behind the DequantizeLinear gets a kernel of its own that writes all weights in FP16. Blocks of
        64 (`w4`) or 128 (`w4-128`), which must divide the reduction. TensorRT for RTX 1.7.1 accepts both for SM86 and
        SM89, and its engine has one kernel that reads the INT4 weights, for one row and for many. INT4 exists on all
        devices here (ModelOpt, feature support matrix: Ampere and later).
Case 9. BF16 (`bf16`) is a Cast, as FP16: for units whose values FP16 does not hold, at the same rate on Ampere and
        later (data sheets) with three bits less. TensorRT for RTX 1.7.1 accepts 58 of 60 operators in it, each alone,
        for SM89; it refuses HardSwish ("Only FLOAT, HALF or INT8 input is supported") and builds no ConvTranspose.
        Models rise to opset 22, the first that defines all of them for it.
Case 10. A Gather that looks rows up in a constant table (an embedding) also runs with the table in INT8, one scale for
         each row (`w8-row`): a DequantizeLinear stands before the Gather, because TensorRT refuses a quantized constant
         anywhere else (tried with TensorRT for RTX 1.7: "Quantized constant is only allowed before DQ").

INT8 and FP8 are symmetric with zero point 0, per tensor for activations and per channel for weights. Q and DQ compute
in float32, because QuantizeLinear takes nothing else below opset 19; next to a unit in FP16 stands a Cast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.schemes import Scheme
from bitalloy.core.units import Edge, Placement
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, constant, name_of, node_weight_axes, static_shape
from bitalloy.runtime import tensorrt
from bitalloy.runtime.ort import ORT
from bitalloy.targets.base import Core, Offer, Target, all_operators, whole_kernel
from bitalloy.targets.devices import A10
from bitalloy.targets.patterns import (
    divided_depth,
    match_matmul,
    match_table,
    moves,
    only_reader,
    silu_of,
    stored_operand,
    table_by_row,
)
from bitalloy.targets.safety import HALF_PRECISION, stored_beside_half

TENSORRT_FUSED_ACTIVATIONS = frozenset({"Clip", "Gelu", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
NO_BRAIN_FLOAT = frozenset({"ConvTranspose", "HardSwish"})
"""Operators of case 9 without a kernel."""
FEW_CHANNELS, LARGEST_WINDOW, LEAST_DEPTH = 16, 32, 16
"""Channels of a convolution up to which FP8 is slower than FP16, largest number of elements of its window, and least
number of rows and of columns of the right operand of a product."""


def _match(node: ir.Node, graph: Graph) -> Core:
    match node.op_type:
        case "Conv":
            return _weighted(node, axis=0)
        case "ConvTranspose" if attribute(node, "group", 1) == 1:
            return _weighted(node, axis=1)
        case "Gemm" if attribute(node, "transA", 0) == 0:
            return _weighted(node, axis=0 if attribute(node, "transB", 0) else 1)
        case "MatMul":
            return _matmul(node)
        case "Add":
            return _residual(node, graph)
        case "Gather" if table := match_table(node):
            return table
        case op if op in ops.MOVERS or op == "Concat":
            return _plain(node, "only moves data; the layer that reads it rounds")
        case op:
            return _plain(node, f"TensorRT runs {op} in floating point, fused with the layers beside it")


def _plain(node: ir.Node, reason: str) -> Core:
    return Core(node.op_type, (node,), unfit=reason)


def _weighted(node: ir.Node, *, axis: int) -> Core:
    if constant(node.inputs[1]) is None:
        return _plain(node, "the weights are computed at run time")
    return Core(node.op_type, (node, *_behind(node)), weights=(stored_operand(node, 1, axis),))


def _matmul(node: ir.Node) -> Core:
    core = match_matmul(node)
    if not core.weights:
        return core
    bias = only_reader(node.outputs[0])
    if bias is not None and bias.op_type == "Add" and any(constant(v) is not None for v in bias.inputs):
        return replace(core, nodes=(node, bias, *_behind(bias)))
    return replace(core, nodes=(node, *_behind(node)))


def _residual(node: ir.Node, graph: Graph) -> Core:
    """Case 2. Of two operands that could run with the Add in one kernel, the later one does."""
    if any(constant(v) is not None for v in node.inputs):
        return _plain(node, "TensorRT runs Add in floating point, fused with the layers beside it")
    order = {name_of(n): i for i, n in enumerate(graph.nodes)}
    made = [
        (order[name_of(maker)], slot)
        for slot, v in enumerate(node.inputs)
        if v is not None and (maker := v.producer()) is not None and _from_weights(v)
    ]
    if not made or node.inputs[0] is node.inputs[1]:
        return _plain(node, "no layer with weights makes an operand for this Add alone, so it fuses with none")
    _, slot = max(made)
    inside = Edge(tensor=str(node.inputs[slot].name), node=name_of(node), slot=slot)  # type: ignore[union-attr]
    after = only_reader(node.outputs[0])
    relu = (after,) if after is not None and after.op_type == "Relu" else ()
    return Core("Add", (node, *relu), joined=(inside,))


def _from_weights(value: ir.Value) -> bool:
    """Tell whether a tensor comes from a layer with constant weights, through its activation, to one reader alone."""
    node = value.producer()
    if node is None or only_reader(value) is None:
        return False
    if node.op_type == "Mul" and (gate := _gate_of(node)) is not None:
        node = gate.inputs[0].producer()  # type: ignore[union-attr]
    elif node.op_type in TENSORRT_FUSED_ACTIVATIONS:
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    if node is not None and node.op_type == "Add":
        node = next((v.producer() for v in node.inputs if v is not None and constant(v) is None), None)
    return node is not None and node.op_type in ops.WEIGHTED and constant(node.inputs[1]) is not None


def _behind(node: ir.Node) -> tuple[ir.Node, ...]:
    """Find the activation that a kernel applies to what it makes: one operator, or x * Sigmoid(x)."""
    after = only_reader(node.outputs[0])
    if after is not None:
        return (after,) if after.op_type in TENSORRT_FUSED_ACTIVATIONS else ()
    return silu_of(node.outputs[0]) or ()


def _gate_of(product: ir.Node) -> ir.Node | None:
    """Find the Sigmoid of x * Sigmoid(x), read by nothing else."""
    for value, other in (tuple(product.inputs), tuple(product.inputs)[::-1]):
        gate = value.producer() if value is not None else None
        if gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is other and only_reader(value):  # type: ignore[arg-type]
            return gate
    return None


def _without_fp8(core: Core, nodes: Sequence[ir.Node]) -> str:
    """Case 7."""
    node = core.nodes[0]
    if core.unfit:
        return core.unfit
    match node.op_type:
        case "Conv":
            return _slow_convolution(node)
        case "Gemm" | "MatMul":
            return _slow_product(node)
        case "Add":
            return ""
        case op:
            return f"TensorRT has no FP8 kernel for {op}"


def _slow_convolution(node: ir.Node) -> str:
    made, read, *window = static_shape(node.inputs[1])  # type: ignore[arg-type]
    if attribute(node, "group", 1) != 1:
        return "TensorRT has no optimized FP8 kernel for convolutions in groups, where INT8 has one"
    if min(made, read) <= FEW_CHANNELS:
        return f"with {FEW_CHANNELS} channels or fewer FP8 is slower than FP16, and one side has {min(made, read)}"
    if math.prod(window) > LARGEST_WINDOW:
        return f"FP8 kernels take windows of at most {LARGEST_WINDOW} elements, and this one has {math.prod(window)}"
    return ""


def _slow_product(node: ir.Node) -> str:
    left, right = (static_shape(v) for v in node.inputs[:2])  # type: ignore[arg-type]
    if min(len(left), len(right)) < 2:
        return "one operand is a vector, which does not use the tensor cores"
    depth, columns = (right[axis] for axis in node_weight_axes(node))
    rows = left[-2] if constant(node.inputs[1]) is None else math.prod(left[:-1])
    if min(rows, columns) == 1:
        return "one operand is a vector, which does not use the tensor cores"
    if min(depth, columns) < LEAST_DEPTH:
        return f"FP8 needs {LEAST_DEPTH} rows and columns in the right operand to pay, and it has {depth} and {columns}"
    return ""


def _blocks(name: str, block: int) -> Offer:
    """Case 8."""

    def refuse(core: Core, nodes: Sequence[ir.Node]) -> str:
        return divided_depth(core, block, "TensorRT")

    return stored_beside_half(name, "int4", block, refuse=refuse)


TENSORRT = Target(
    name="tensorrt",
    usual=HALF_PRECISION.scheme.name,
    describe="TensorRT 10 and 11, strongly typed: FP16; INT8 and, from SM89 on, FP8 in Q/DQ form, weights per channel; "
    "with --schemes BF16, and products in w4, w4-128 (INT4 weights alone)",
    runtime=ORT,
    offers=(
        HALF_PRECISION,
        Offer(
            scheme=Scheme(name="bf16", activation="bfloat16", weight="bfloat16", cast=True),
            refuse=all_operators(ops.LOWERABLE - NO_BRAIN_FLOAT, "BF16"),
            usual=False,
            rare=True,
        ),
        table_by_row(""),
        Offer(scheme=Scheme(name="fp8", activation="float8e4m3fn", weight="float8e4m3fn"), refuse=_without_fp8),
        _blocks("w4", 64),
        _blocks("w4-128", 128),
        Offer(scheme=Scheme(name="int8", activation="int8", weight="int8"), refuse=whole_kernel),
    ),
    placement=Placement.ENTRY,
    slow_softmax=False,
    device=A10,
    native=tensorrt.TENSORRT_RUNTIME,
    missing=tensorrt.missing,
    compiled=True,
    match=_match,
    follows=moves,
)
