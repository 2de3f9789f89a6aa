"""Devices as data: peak rates of those for which cost is estimated where they are not here.

Rates are dense, a multiply-accumulate counts as two operations, and those of a data sheet that quotes sparsity are
halved. FP32 stands for TF32, which is the default of TensorRT and of ONNX Runtime's CUDA provider. Where a data sheet
gives two rates, that with sums in FP32 is taken. BF16 has the rate of FP16 in all of these data sheets, and so have
schemes that store weights alone in fewer bits, because their products are computed in FP16. Sources, all of NVIDIA:

    T4          "NVIDIA T4 Tensor Core GPU" data sheet; it has no TF32, and TensorRT runs neither BF16 nor INT4 on it
    A100        "NVIDIA A100 Tensor Core GPU" data sheet, SXM, 80 GB
    A10         "NVIDIA A10 Tensor Core GPU" data sheet
    L4          "NVIDIA L4 Tensor Core GPU" data sheet (with sparsity)
    L40S        "NVIDIA L40S GPU" data sheet
    RTX 4090    "NVIDIA Ada GPU Architecture" whitepaper, appendix A
    RTX 5090    "NVIDIA RTX Blackwell GPU Architecture" whitepaper, appendix A
    Orin        "NVIDIA Jetson AGX Orin Series" technical brief, module of 64 GB: 170 sparse INT8 TOPS of the GPU alone;
                FP16 and TF32 at a half and a quarter of them, as for the other GPUs of its architecture
    H100        "NVIDIA H100 Tensor Core GPU" data sheet, SXM (with sparsity)
    B200        "NVIDIA HGX B200" data sheet, one of eight (with sparsity)
    GB10        "NVIDIA DGX Spark" data sheet: 1 PFLOPS of FP4 with sparsity; other rates in the ratios of the RTX 5090,
                whose architecture it has

A compute capability, such as `sm89`, stands for the first of these devices, in this order, that has it.

No data sheet tells the time between two kernels; 2 us is assumed for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitalloy.core.errors import BitalloyError, did_you_mean
from bitalloy.core.records import Record
from bitalloy.core.schemes import BASELINE


class Device(Record, frozen=True, kw_only=True):
    """Peak rates of a device."""

    id: str
    """As `--device` takes it."""
    name: str
    capability: int
    """Compute capability, e.g. 89 for SM89."""
    operations_per_second: dict[str, float]
    """Scheme -> dense operations; a scheme without a rate does not run there."""
    bytes_per_second: float
    start_us: float = 2.0
    """Assumed time between two kernels in microseconds."""


AT_HALF_RATE = ("bf16", "w8", "w4", "w4-128")
"""Schemes that are computed in FP16, or as fast."""


def _rates(
    *, fp32: float, fp16: float, int8: float, fp8: float | None = None, as_half: Sequence[str] = AT_HALF_RATE
) -> dict[str, float]:
    """Map schemes to the operations of a device, from those that its data sheet gives."""
    found = {BASELINE: fp32, "fp16": fp16, "int8": int8, **dict.fromkeys(as_half, fp16)}
    return found if fp8 is None else {**found, "fp8": fp8}


A10 = Device(
    id="a10",
    name="NVIDIA A10",
    capability=86,
    operations_per_second=_rates(fp32=62.5e12, fp16=125e12, int8=250e12),
    bytes_per_second=600e9,
)
DEVICES: dict[str, Device] = {
    device.id: device
    for device in (
        Device(
            id="t4",
            name="NVIDIA T4",
            capability=75,
            operations_per_second=_rates(fp32=8.1e12, fp16=65e12, int8=130e12, as_half=("w8",)),
            bytes_per_second=300e9,
        ),
        Device(
            id="a100",
            name="NVIDIA A100 SXM",
            capability=80,
            operations_per_second=_rates(fp32=156e12, fp16=312e12, int8=624e12),
            bytes_per_second=2039e9,
        ),
        A10,
        Device(
            id="l4",
            name="NVIDIA L4",
            capability=89,
            operations_per_second=_rates(fp32=60e12, fp16=121e12, fp8=242.5e12, int8=242.5e12),
            bytes_per_second=300e9,
        ),
        Device(
            id="l40s",
            name="NVIDIA L40S",
            capability=89,
            operations_per_second=_rates(fp32=183e12, fp16=362e12, fp8=733e12, int8=733e12),
            bytes_per_second=864e9,
        ),
        Device(
            id="rtx-4090",
            name="NVIDIA GeForce RTX 4090",
            capability=89,
            operations_per_second=_rates(fp32=82.6e12, fp16=165.2e12, fp8=330.3e12, int8=660.6e12),
            bytes_per_second=1008e9,
        ),
        Device(
            id="rtx-5090",
            name="NVIDIA GeForce RTX 5090",
            capability=120,
            operations_per_second=_rates(fp32=104.8e12, fp16=209.5e12, fp8=419e12, int8=838e12),
            bytes_per_second=1792e9,
        ),
        Device(
            id="orin",
            name="NVIDIA Jetson AGX Orin",
            capability=87,
            operations_per_second=_rates(fp32=21.25e12, fp16=42.5e12, int8=85e12),
            bytes_per_second=204.8e9,
        ),
        Device(
            id="h100",
            name="NVIDIA H100 SXM",
            capability=90,
            operations_per_second=_rates(fp32=494.5e12, fp16=989.5e12, fp8=1979e12, int8=1979e12),
            bytes_per_second=3350e9,
        ),
        Device(
            id="b200",
            name="NVIDIA B200",
            capability=100,
            operations_per_second=_rates(fp32=1.1e15, fp16=2.25e15, fp8=4.5e15, int8=4.5e15),
            bytes_per_second=8000e9,
        ),
        Device(
            id="gb10",
            name="NVIDIA GB10 (DGX Spark)",
            capability=121,
            operations_per_second=_rates(fp32=31.25e12, fp16=62.5e12, fp8=125e12, int8=250e12),
            bytes_per_second=273e9,
        ),
    )
}
"""What `--device` takes -> device."""


def find_device(name: str) -> Device:
    """Look a device up by its id or its compute capability, in any case.

    >>> find_device("L4").capability, find_device("sm86").id
    (89, 'a10')

    Raises:
        BitalloyError: no such device.
    """
    wanted = name.lower()
    if wanted in DEVICES:
        return DEVICES[wanted]
    for device in DEVICES.values():
        if wanted == f"sm{device.capability}":
            return device
    capabilities = sorted({device.capability for device in DEVICES.values()})
    raise BitalloyError(
        f"Unknown device '{name}'. Available: {', '.join(DEVICES)}; or a compute capability: "
        f"{', '.join(f'sm{c}' for c in capabilities)}.{did_you_mean(name, DEVICES)}"
    )


def lacking(device: Device, scheme: str, able: Sequence[Device]) -> str:
    """Say why a device does not run a scheme, and which others are able to."""
    known = scheme in device.operations_per_second
    told = f"{device.name} (SM{device.capability}) has no {scheme.upper()}{' kernels in this runtime' * known}"
    if not able:
        return told
    least = min(other.capability for other in able)
    return f"{told}, which needs SM{least}; choose --device {' or '.join(other.id for other in able)}"
