"""This machine: what decides how fast models run on it, and which kernels of a runtime run them."""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path
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


def busy_share(seconds: float = 1.0) -> float:
    """Measure which part of the time the cores of this machine are at work, whoever works; 0 where that is not told.

    Args:
        seconds: for how long that is watched.
    """
    first = _core_times()
    time.sleep(seconds)
    passed = [after - before for before, after in zip(first, _core_times(), strict=True)]
    return 1 - sum(passed[3:5]) / sum(passed) if sum(passed) else 0.0


def _core_times() -> list[int]:
    """Return ticks of all cores since the start on Linux: in user, nice, system, idle, waiting for a disk, and more."""
    try:
        return [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return []


def machine_name() -> str:
    """Return the processor of this machine by its own name."""
    found = str(_cpu().get("brand_raw", "")).strip()
    return found or platform.processor() or platform.machine()


@cache
def _cpu() -> dict[str, Any]:
    from cpuinfo import get_cpu_info  # asks other programs, which takes about a second

    return dict(get_cpu_info())
