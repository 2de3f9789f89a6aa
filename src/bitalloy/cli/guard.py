"""The bound on memory of a command, which ends the process where nothing else can."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from bitalloy.cli.console import REFUSED

MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="AMOUNT",
        help="Largest amount of memory, such as `8GB` or `60%` of the machine's: what files declare beyond it is "
        "refused before it is allocated, and the command ends where it needs more. Default: BITALLOY_MEMORY_LIMIT, or "
        "80% of the machine or container.",
    ),
]
"""Option for a bound on memory."""


def limit_in_bytes(given: str | None) -> int | None:
    """Read `--memory-limit`; None where it is not given.

    Raises:
        BitalloyError: it is no amount of memory.
    """
    from bitalloy.core.limits import memory_bytes

    return None if given is None else memory_bytes(given)


def end_for_memory(told: str) -> None:
    """End this process and its children at once with one message; its temporary files are removed."""
    from bitalloy.core.files import walk
    from bitalloy.core.ownership import ELSEWHERE, Lock, discard, mark, temporary_root

    sys.stderr.write(f"Error: {told}\n")
    sys.stderr.flush()
    for child in _children():
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    for folder in (file.parent for file in Lock.held()):
        for path in [path for path in walk(folder) if mark() in path.name]:
            discard(path)
    for path in temporary_root().glob(f"{ELSEWHERE}{mark()}*"):
        discard(path)
    os._exit(REFUSED)


def _children() -> Iterator[int]:
    """The processes that this one started, on Linux; none elsewhere."""
    for tasks in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, tasks.read_text().split())
