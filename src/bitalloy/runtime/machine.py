"""This machine: what decides how fast models run on it, and which kernels of a runtime run them."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

from bitalloy.core.records import Record
from bitalloy.runtime.ort import available_cores

DECIDING = ("amx", "asimd", "avx", "bf", "f16c", "fma", "i8mm", "neon", "sse", "sve", "vnni")
"""Beginnings of the names of processor features by which runtimes choose their kernels."""


class Machine(Record, frozen=True, kw_only=True):
    """A processor, and how much of it this process may use."""

    processor: str
    """The processor by its own name."""
    features: tuple[str, ...]
    """Features that decide about kernels, e.g. `avx2`, in alphabetical order."""
    threads: int


def this_machine() -> Machine:
    """Describe the machine on which this process runs."""
    flags = sorted({str(flag) for flag in _cpu().get("flags", ())})
    return Machine(
        processor=machine_name(),
        features=tuple(flag for flag in flags if flag.startswith(DECIDING)),
        threads=available_cores(),
    )


def machine_name() -> str:
    """Return the processor of this machine by its own name."""
    found = str(_cpu().get("brand_raw", "")).strip()
    return found or platform.processor() or platform.machine()


@cache
def _cpu() -> dict[str, Any]:
    from cpuinfo import get_cpu_info  # asks other programs, which takes about a second

    return dict(get_cpu_info())
