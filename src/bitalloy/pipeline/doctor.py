"""What is available on this machine, with the install line for what is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from bitalloy.cost import device
from bitalloy.errors import MissingExtraError
from bitalloy.records import Record
from bitalloy.runtime import available_cores
from bitalloy.targets import TARGETS
from bitalloy.targets.patterns import has_vnni

EXTRAS = {
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "cuda-python"),
    "yolo": ("torch", "safetensors"),
    "segformer": ("torch", "transformers", "huggingface_hub", "safetensors"),
    "mobilesam": ("torch", "kornia"),
    "mobilevlm": ("torch", "transformers", "huggingface_hub", "safetensors", "sentencepiece"),
}
"""Extra -> packages, as in pyproject.toml (a test compares)."""
MODULES = {"cuda-python": "cuda"}
"""Package -> what is imported of it, where the names differ."""
CORE = ("bitalloy", "onnxruntime", "onnx", "onnx-ir", "numpy", "scipy")


class TargetCheck(Record, frozen=True, kw_only=True):
    """Whether a target can be measured here."""

    name: str
    runtime: str
    version: str | None
    """None where the runtime is not installed."""
    problem: str = ""
    """What is missing and the install line; empty where nothing is."""
    estimated: bool = False
    """Whether its latencies are estimates, and its models verified on the CPU."""


class ExtraCheck(Record, frozen=True, kw_only=True):
    """Whether the packages of an extra are installed."""

    name: str
    missing: tuple[str, ...]
    install: str


class Diagnosis(Record, frozen=True, kw_only=True):
    """The machine as bitalloy sees it."""

    device: str
    system: str
    python: str
    threads: int
    """That every runtime uses: the cores that this process may run on."""
    vnni: bool
    """Whether products of uint8 and int8 are added in 32 bits; without, INT8 gains less and weights are limited."""
    versions: dict[str, str]
    targets: tuple[TargetCheck, ...]
    extras: tuple[ExtraCheck, ...]


def doctor() -> Diagnosis:
    """Look at this machine. Nothing is imported that is not there, nothing is measured."""
    targets = []
    for target in TARGETS.values():
        version, problem = None, ""
        try:
            version = target.runtime.version()
        except MissingExtraError as error:
            problem = str(error)
        problem = problem or target.missing()
        targets.append(
            TargetCheck(
                name=target.name,
                runtime=target.runtime.name,
                version=version,
                problem=problem,
                estimated=target.device is not None,
            )
        )
    extras = []
    for name, packages in EXTRAS.items():
        missing = tuple(p for p in packages if importlib.util.find_spec(MODULES.get(p, p)) is None)
        extras.append(ExtraCheck(name=name, missing=missing, install=f"pip install 'bitalloy[{name}]'"))
    return Diagnosis(
        device=device(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        threads=available_cores(),
        vnni=has_vnni(),
        versions={name: importlib.metadata.version(name) for name in CORE},
        targets=tuple(targets),
        extras=tuple(extras),
    )
