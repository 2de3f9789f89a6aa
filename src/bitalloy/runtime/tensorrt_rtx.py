"""TensorRT for RTX: NVIDIA's compiler, which builds an engine for a GPU on a machine that has none.

The compiler is the extra `bitalloy[tensorrt-rtx]`. It runs in a process of its own (`runtime.rtx_builder`), with a time
limit. Running and timing an engine needs the GPU, and is not done here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.core.ownership import temporary
from bitalloy.runtime import rtx_builder
from bitalloy.runtime.engine_text import EngineKernel, read_engine

PACKAGE = "tensorrt_rtx"
CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""Compute capabilities for which it compiles, of version 1.7."""
LIMIT_S = 600.0
"""Seconds after which a compilation is given up."""
MESSAGES, MESSAGE_LENGTH = 20, 400
"""Number of messages of the compiler that are kept, and of characters of each."""

Profile = Mapping[str, tuple[tuple[int, ...], ...]]
"""Input with open sizes -> its least, usual and largest shape."""


@dataclass(frozen=True)
class CompiledEngine:
    """What the compiler made of a model."""

    kernels: tuple[EngineKernel, ...]
    size_bytes: int
    seconds: float
    """Time that the compiler took, without reading the model."""
    messages: tuple[str, ...]
    """Warnings and errors, equal ones once with their number."""


def has_compiler() -> bool:
    """Tell whether the compiler is installed, without importing it."""
    return importlib.util.find_spec(PACKAGE) is not None


def missing_compiler() -> str:
    """Return why nothing can be compiled here, with the install line; empty where it can."""
    return "" if has_compiler() else f"{PACKAGE}, its compiler, is not installed: pip install 'bitalloy[tensorrt-rtx]'"


def compiler_version() -> str:
    """Return the installed version.

    Raises:
        MissingExtraError: the compiler is not installed.
    """
    if not has_compiler():
        raise MissingExtraError(PACKAGE, "tensorrt-rtx", "Compiling for an NVIDIA GPU")
    return importlib.metadata.version(PACKAGE)


def nearest_capability(capability: int) -> int:
    """Return the capability to compile for: that of the device, or the highest below it that the compiler knows.

    >>> nearest_capability(89), nearest_capability(90)
    (89, 89)
    """
    return max((c for c in CAPABILITIES if c <= capability), default=CAPABILITIES[0])


def compile_engine(
    model: Path, capability: int, profile: Profile | None = None, *, limit_s: float = LIMIT_S
) -> CompiledEngine:
    """Compile an ONNX file for a GPU.

    Args:
        model: the file, with its weights beside it where they are apart.
        capability: compute capability, one of `CAPABILITIES`.
        profile: shapes of the inputs with open sizes; such a model is refused without.
        limit_s: seconds after which the compilation is given up.

    Raises:
        MissingExtraError: the compiler is not installed.
        ModelError: the compiler refuses the model, crashes, or takes too long.
    """
    version = compiler_version()
    refused = f"TensorRT for RTX {version} did not compile '{model.name}' for SM{capability}"
    with temporary() as folder:
        asked, said, engine = (folder / part for part in ("asked.json", "said.json", "engine"))
        content = {"model": str(model), "engine": str(engine), "capability": capability, "profile": profile or {}}
        asked.write_text(json.dumps(content))
        command = [sys.executable, "-m", rtx_builder.__name__, str(asked), str(said)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"{refused} within {limit_s:g} s.") from error
        if not said.is_file():
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
            raise ModelError(f"{refused}: its process ended with {done.returncode}. {last[0][:MESSAGE_LENGTH]}".strip())
        found = json.loads(said.read_text())
        messages = _shortened(found["messages"])
        if found["error"]:
            raise ModelError(f"{refused}: {found['error'][:MESSAGE_LENGTH]}. {' '.join(messages)}".strip())
        data = engine.read_bytes()
    return CompiledEngine(read_engine(data), len(data), found["seconds"], messages)


def _shortened(messages: list[str]) -> tuple[str, ...]:
    counted = Counter(message[:MESSAGE_LENGTH] for message in messages)
    told = [f"{text} ({count} times)" if count > 1 else text for text, count in counted.items()]
    more = [f"{len(told) - MESSAGES} more"] if len(told) > MESSAGES else []
    return (*told[:MESSAGES], *more)
