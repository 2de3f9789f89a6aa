"""ONNX Runtime's CUDA execution provider: FP16 written as Cast, and MatMulNBits.

Facts from ONNX Runtime 1.32:

Case 1. Operators with a float16 kernel on CUDA run in FP16 (docs/OperatorKernels.md, section CUDAExecutionProvider).
Case 2. INT8 is not offered. The fusion of Q/DQ pairs into integer kernels names the providers that it serves
        (core/optimizer/qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc), and CUDA is not among
        them: a quantized model would dequantize everything and compute in float, slower than without. For INT8 on a GPU
        there is the target `tensorrt`.
Case 3. Operators that only move data follow the unit that feeds them.
Case 4. MatMul and Gemm with a constant matrix also run in FP16 with weights in blocks of 4 or 8 bits (`w4`, `w4-128`,
        `w8`: MatMulNBits, contrib_ops/cuda/quantization/matmul_nbits.cc). Only weights are rounded: the kernel takes
        float32, float16 and bfloat16, and does not read `accuracy_level`, by which ONNX Runtime's CPU kernel rounds
        tensors. It is written with 1, at which the CPU kernel rounds none either. Scales are FP16 numbers, as the
        tensors. For one row there is a kernel that reads weights as they are stored, in blocks of 16, 32, 64 or 128,
        where the number of columns is a multiple of 8 and the reduction one of the block (matmul_4bits.cu,
        matmul_8bits_m1_impl.cuh). For more rows the kernel may widen all weights to FP16 before a product by cuBLAS:
        then its gain is the size of the file, and time is lost.
Case 5. Products that the kernel for one row does not take stay as they are: every token would widen all of their
        weights.
Case 6. A Gather that looks rows up in a constant table (an embedding) also runs with the table in INT8, one scale for
        each row (`w8-row`): the numbers of the rows are gathered, and their scales, and multiplied behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.load import Graph
from bitalloy.runtime.ort import ORT, ORT_GPU, cuda_missing
from bitalloy.targets.base import Core, Offer, Target
from bitalloy.targets.devices import A10
from bitalloy.targets.patterns import divided_depth, match_gemm, match_matmul, match_table, stored_sizes, table_by_row
from bitalloy.targets.safety import HALF_PRECISION, stored_beside_half

KERNEL_COLUMNS = 8
"""What the number of columns must be a multiple of (case 4)."""


def _match(node: ir.Node, graph: Graph) -> Core:
    match node.op_type:
        case "MatMul":
            return match_matmul(node)
        case "Gemm":
            return match_gemm(node, ORT_GPU.name)
        case "Gather" if table := match_table(node):
            return table
        case op:
            return Core(op, (node,))


def _without_kernel(core: Core, nodes: Sequence[ir.Node], *, block: int) -> str:
    """Case 5."""
    _, columns = stored_sizes(core)
    if columns % KERNEL_COLUMNS:
        return (
            f"{ORT_GPU.name} multiplies one row only with multiples of {KERNEL_COLUMNS} columns, and here are {columns}"
        )
    return divided_depth(core, block, ORT_GPU.name)


def _blocks(name: str, weight: str, block: int) -> Offer:
    return stored_beside_half(name, weight, block, kernel="MatMulNBits", refuse=partial(_without_kernel, block=block))


ORT_CUDA = Target(
    name="ort-cuda",
    usual=HALF_PRECISION.scheme.name,
    describe="ONNX Runtime, CUDA provider: FP16; with --schemes products also in w8, w4, w4-128 (MatMulNBits, weights "
    "alone), tables of a Gather in w8-row; no INT8, for which the provider has no kernels",
    runtime=ORT,
    offers=(
        HALF_PRECISION,
        table_by_row("Gather"),
        _blocks("w8", "int8", 32),
        _blocks("w4", "uint4", 32),
        _blocks("w4-128", "uint4", 128),
    ),
    lacks={
        "int8": "ONNX Runtime has no INT8 kernels for Q/DQ models on CUDA; choose --target tensorrt",
        "int8-dynamic": "ONNX Runtime has no DynamicQuantizeMatMul on CUDA; choose --target ort-cpu",
        "fp8": "ONNX Runtime has no FP8 kernels for Q/DQ models on CUDA; choose --target tensorrt --device l4",
        "bf16": "FP16 is as fast there and keeps three more bits; for values that FP16 does not hold choose --target "
        "tensorrt",
    },
    slow_softmax=False,
    device=A10,
    native=ORT_GPU,
    missing=cuda_missing,
    match=_match,
    follows=lambda node: node.op_type in ops.MOVERS,
)
