"""OpenVINO on a CPU: which patterns its low-precision transformations turn into integer kernels.

Facts from OpenVINO 2026.4: read from the execution graphs of small models (`tests/targets/test_openvino_cpu.py` repeats
this), with the names of the transformations that make them (openvino/src/common/low_precision_transformations). A pair
of QuantizeLinear and DequantizeLinear is read as one FakeQuantize. An integer kernel may write float, so tensors are
rounded only where they enter one, and a unit whose consumers are float adds no rounding. Biases stay float.

Case 1. Conv with constant weights, of any rank, grouped, depthwise, strided or dilated: one Convolution kernel that
        reads uint8 and int8 weights per output channel (ConvolutionTransformation). An activation behind it runs in the
        kernel: x * Sigmoid(x), Relu, Clip, LeakyRelu, Sigmoid, Tanh, HardSwish, Elu, Mish, Gelu. The rounding for the
        next kernel does too, where the result has one reader.
Case 2. MatMul and Gemm with a constant matrix, MatMul with several too: one FullyConnected kernel, per column; a bias
        that is added behind a MatMul and an activation as in case 1 run inside (MatMulTransformation). Where there are
        few rows, several such products after each other may become a single Subgraph kernel, which the plugin calls
        float.
Case 3. A Concat over the channels (axis 1 before Conv, the last one before MatMul and Gemm) that a case 1 or 2 alone
        reads joins that unit: the rounding behind it is moved before it, so that it joins integers
        (MoveFakeQuantize, ConcatTransformation). There is one scale for all of its operands and one rounding.
Case 4. Conv, MatMul or Gemm behind a Concat over another axis stays in float: ConcatTransformation makes a scale for
        every index of that axis, with which a Conv runs in float and a MatMul is refused by the compiler.
Case 5. Other Concats, nodes that only move data, Add, Mul, pools and the like follow what surrounds them: they have no
        precision of their own, nothing is rounded for them. Elementwise ones fuse with the next rounding (Subgraph).
Case 6. MatMul of two activations stays in float, and so does one with a constant on the left: MatMulTransformation
        wants its second operand in int8 with zero point 0, and the formats here are uint8.
Case 7. A product with a constant matrix also runs with its weights compressed, in blocks of 8 or 4 bits (`w8`,
        `w4-16`, `w4`, `w4-64`, `w4-128`) or in 8 bits per column (`w8-channel`): a DequantizeLinear on the weight stays
        as it is (ConvertedWeights, decompression in FullyConnected). Blocks must divide the reduction: the importer
        refuses others. What it reads is not rounded on CPUs without VNNI; with VNNI the plugin rounds it to INT8 in
        groups of 32 (DYNAMIC_QUANTIZATION_GROUP_SIZE) unless that is switched off, as it is here, so that the numbers
        are the same everywhere.
Case 8. ConvTranspose without groups: one Deconvolution kernel that reads uint8 with zero point 0, so what it reads must
        never be negative, as behind a Relu, and int8 weights per output channel
        (ConvolutionBackpropDataTransformation). In groups it is computed in float, whatever it reads. Everything else
        stays in float as well.
Case 9. Ranges taken at run time are not offered. DynamicQuantizeLinear and MatMulInteger are imported as elementwise
        nodes and a product of the integers converted to float: the execution graph has Convert, Reduce and a
        FullyConnected in f32, and no integer kernel. On a CPU with AVX2 and without VNNI, three products of 2048 x 5632
        take 1.08, 1.34 and 1.41 times as long as in float with 1, 16 and 256 rows. The plugin's own rounding of what a
        compressed product reads (case 7) does not run there either: group sizes of 32 and 128 change no number.
Case 10. BF16 is not offered. On a processor without native bfloat16 (avx512_bf16, amx_bf16) the plugin drops a Cast to
        bfloat16 and the one back, and computes what is between in float32 with the numbers of the float model, whatever
        INFERENCE_PRECISION_HINT says. What becomes of it on others has not been tried.
Case 11. A Gather that looks rows up in a constant table (an embedding): in `w8` the INT8 numbers of the rows are
         gathered, and their scales, and multiplied behind, which keeps the table in INT8 in memory. In `w4` and
         `w4-128` a DequantizeLinear stands before the Gather, since ONNX has no Gather of 4 bits: the file is small,
         and the plugin unpacks a table in blocks when it loads it. The same holds for FP16 (`w16`).

On x86 CPUs without VNNI the uint8 x int8 kernels (oneDNN) saturate as those of ONNX Runtime do; see `pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.units import Edge, Placement
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, constant, consumers, moved_from, name_of, static_shape
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.targets.base import Core, Offer, Target, whole_kernel
from bitalloy.targets.ort_cpu import ORT_CPU
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
    silu_of,
    stored_matrix,
    stored_sizes,
    stored_weights,
)

INTEGER_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
OPENVINO_FUSED_ACTIVATIONS = frozenset({
    "Clip", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Mish", "Relu", "Sigmoid", "Tanh",
})  # fmt: skip
NO_KERNEL = "OpenVINO has no integer kernel for it here"
NEVER_NEGATIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"})


def _match(node: ir.Node, graph: Graph) -> Core:
    if node.op_type in INTEGER_PRODUCTS:
        return _fused(_product(node))
    if node.op_type == "ConvTranspose":
        return _transposed(node)
    if (table := match_table(node)) is not None:
        return table
    if node.op_type == "Concat":
        reader = only_reader(node.outputs[0])
        if reader is not None and reader.op_type in INTEGER_PRODUCTS and not (core := _product(reader)).unfit:
            return _joined(node, _fused(core))
        return Core("Concat", (node,), unfit="takes the precision of what reads it")
    return Core(node.op_type, (node,), unfit=NO_KERNEL)


def _product(node: ir.Node) -> Core:
    """Match a weighted node alone, in float where a rule forbids INT8."""
    match node.op_type:
        case "Conv":
            core = match_weighted(node, axis=0)
        case "Gemm":
            core = match_gemm(node, OPENVINO.name)
        case _:
            core = match_matmul(node, Constants.COLUMNS)
    if not core.unfit and not core.weights:
        return replace(core, unfit="both operands are activations")
    if not core.unfit and not _channels_joined(node):
        return replace(core, unfit="reads a Concat over another axis than the channels")
    return core


def _transposed(node: ir.Node) -> Core:
    """Match a ConvTranspose alone, in float where its kernel does not take what it reads: case 8."""
    if attribute(node, "group", 1) != 1:
        return Core(node.op_type, (node,), unfit="OpenVINO has no integer kernel for a ConvTranspose in groups")
    value = node.inputs[0]
    assert value is not None
    producer = [value, *moved_from(value, ops.MOVERS)][-1].producer()
    if producer is None or producer.op_type not in NEVER_NEGATIVE:
        reason = "OpenVINO's integer ConvTranspose wants a zero point of 0, and what it reads may be negative"
        return Core(node.op_type, (node,), unfit=reason)
    return match_weighted(node, axis=1)


def _channels_joined(node: ir.Node) -> bool:
    """Tell whether a weighted node reads no Concat, or one over the axis that the node sums over."""
    value = node.inputs[0]
    assert value is not None
    producer = value.producer()
    if producer is None or producer.op_type != "Concat":
        return True
    rank = len(static_shape(value))
    axis = int(attribute(producer, "axis", 0)) % rank  # type: ignore[call-overload]
    return bool(axis == ops.channel_axis(node.op_type, rank))


def _fused(core: Core) -> Core:
    """Match a product with what runs inside its kernel: the bias of a MatMul, then one activation."""
    if core.unfit:
        return core
    nodes = list(core.nodes)
    bias = only_reader(nodes[-1].outputs[0])
    if core.kind == "MatMul" and bias is not None and bias.op_type == "Add" and _adds_vector(bias):
        nodes.append(bias)
    if silu := silu_of(nodes[-1].outputs[0]):
        nodes += silu
    elif (next_ := only_reader(nodes[-1].outputs[0])) is not None and next_.op_type in OPENVINO_FUSED_ACTIVATIONS:
        nodes.append(next_)
    return replace(core, nodes=tuple(nodes))


def _adds_vector(node: ir.Node) -> bool:
    fixed = [array for value in node.inputs if (array := constant(value)) is not None]
    return len(fixed) == 1 and fixed[0].ndim == 1


def _joined(concat: ir.Node, core: Core) -> Core:
    value, reader = concat.outputs[0], core.nodes[0]
    inner = Edge(tensor=str(value.name), node=name_of(reader), slot=consumers(value)[0].slot)
    return replace(core, nodes=(concat, *core.nodes), inner=(inner,), reader=reader)


def _whole_blocks(core: Core, block: int) -> str:
    """Say why weights cannot be cut into blocks of a size, where one would be left over, and what can be done."""
    depth, _ = stored_sizes(core)
    if depth % block == 0:
        return ""
    whole = "the row" if core.kind == "Gather" else "the reduction"
    fitting = [s for s in OPENVINO_CPU.schemes if s.block and depth % s.block == 0]
    instead = ", ".join(f"{s.name.upper()} has blocks of {s.block}, which do" for s in fitting) or (
        f"nor does any other size here; the target {ORT_CPU.name} takes a shorter last block"
    )
    return f"OpenVINO takes blocks that divide {whole}, and {block} does not divide {depth}: {instead}"


def _blocks(name: str, weight: str, block: int, *, gather: str = "", rare: bool = False) -> Offer:
    def refuse(core: Core, nodes: Sequence[ir.Node]) -> str:
        return stored_weights(core, nodes) or _whole_blocks(core, block)

    scheme = Scheme(name=name, weight=weight, granularity=Granularity.BLOCK, block=block, gather=gather)
    return Offer(scheme=scheme, refuse=refuse, usual=False, rare=rare)


OPENVINO_CPU = Target(
    name="openvino-cpu",
    describe="OpenVINO, CPU: uint8 activations, int8 weights per channel, float between; with --schemes products also "
    "in w8, w8-channel, w4-16, w4, w4-64, w4-128 (weights alone), tables of a Gather in most of these and w16; "
    "needs the extra [openvino]",
    runtime=OPENVINO,
    offers=(
        TABLES_IN_HALF,
        _blocks("w8", "int8", 32, gather="Gather"),
        Offer(scheme=Scheme(name="w8-channel", weight="int8"), refuse=stored_matrix, usual=False, rare=True),
        _blocks("w4-16", "uint4", 16, rare=True),
        _blocks("w4", "uint4", 32),
        _blocks("w4-64", "uint4", 64, rare=True),
        _blocks("w4-128", "uint4", 128),
        Offer(
            scheme=Scheme(name="int8", activation="uint8", weight="int8", pair_limit=None if has_vnni() else 128),
            refuse=whole_kernel,
        ),
    ),
    match=_match,
    follows=moves,
    placement=Placement.ENTRY,
    lacks={
        "int8-dynamic": "OpenVINO computes MatMulInteger in float, slower than the float model (1.1 to 1.4 times as "
        "long); choose --target ort-cpu",
        "bf16": "OpenVINO drops the Casts and computes in float32 where a processor has no native bfloat16 "
        "(avx512_bf16, amx_bf16), and elsewhere this has not been tried; choose --target tensorrt",
    },
    single_reader=True,
    slow_softmax=False,
    refuses_branches="OpenVINO converts no layer that needs the rank of what a branch or loop gives",
)
