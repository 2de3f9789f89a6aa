"""What each device can do: units, allowed precisions, and where roundings happen."""

from bitalloy.core.errors import BitalloyError
from bitalloy.targets.base import Target
from bitalloy.targets.openvino_cpu import OPENVINO_CPU
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.ort_cuda import ORT_CUDA
from bitalloy.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {t.name: t for t in (ORT_CPU, OPENVINO_CPU, ORT_CUDA, TENSORRT)}


def target(name: str) -> Target:
    """Look a target up by name.

    Raises:
        BitalloyError: no such target.
    """
    if name not in TARGETS:
        raise BitalloyError(f"Unknown target '{name}'. Available: {', '.join(TARGETS)}.")
    return TARGETS[name]


__all__ = ["TARGETS", "Target", "target"]
