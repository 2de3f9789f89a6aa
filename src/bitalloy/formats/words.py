"""What runtimes call the types of tensors, as the schemes in which kernels compute that read them."""

from __future__ import annotations

KERNEL_SCHEMES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "f32": "fp32",
    "float": "fp32",
    "fp32": "fp32",
    "f16": "fp16",
    "float16": "fp16",
    "fp16": "fp16",
    "half": "fp16",
    "f8e4m3": "fp8",
    "float8": "fp8",
    "float8e4m3fn": "fp8",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "i8": "int8",
    "int8": "int8",
    "u8": "int8",
    "uint8": "int8",
}
"""Word of ONNX Runtime, OpenVINO or TensorRT -> scheme; a type that is missing keeps the runtime's own word."""
