"""ONNX Runtime's CUDA execution provider: FP16 written as Cast.

Facts from ONNX Runtime 1.32:

Case 1. Operators with a float16 kernel on CUDA run in FP16 (docs/OperatorKernels.md, section CUDAExecutionProvider).
Case 2. INT8 is not offered. The fusion of Q/DQ pairs into integer kernels names the providers that it serves
        (core/optimizer/qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc), and CUDA is not among
        them: a quantized model would dequantize everything and compute in float, slower than without. For INT8 on a GPU
        there is the target `tensorrt`.
Case 3. Operators that only move data follow the unit that feeds them.
"""

from __future__ import annotations

import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.load import Graph
from bitalloy.runtime.ort import ORT, ORT_GPU, cuda_missing
from bitalloy.targets.base import Core, Target
from bitalloy.targets.devices import A10
from bitalloy.targets.safety import HALF_PRECISION


def _match(node: ir.Node, graph: Graph) -> Core:
    return Core(node.op_type, (node,))


ORT_CUDA = Target(
    name="ort-cuda",
    describe="ONNX Runtime, CUDA provider: FP16; no INT8, for which the provider has no kernels",
    runtime=ORT,
    offers=(HALF_PRECISION,),
    lacks={
        "int8": "ONNX Runtime has no INT8 kernels for Q/DQ models on CUDA; choose --target tensorrt",
        "fp8": "ONNX Runtime has no FP8 kernels for Q/DQ models on CUDA; choose --target tensorrt --device l4",
    },
    slow_softmax=False,
    device=A10,
    native=ORT_GPU,
    missing=cuda_missing,
    match=_match,
    follows=lambda node: node.op_type in ops.MOVERS,
)
