"""Keep a line that a C library prints whatever its options say away from standard output."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

STDOUT = 1
_ONE_AT_A_TIME = threading.Lock()
"""Two that overlap could each put back what the other had set."""


@contextmanager
def withheld(beginning: bytes) -> Iterator[None]:
    """Leave out lines that begin so from what this process writes to standard output.

    Such a line comes from printf, below anything that Python can replace, so the file descriptor leads to a temporary
    file meanwhile. It belongs to all threads: what others write is passed on in the end, late but whole. Where the
    descriptor is closed, no file can be made, or descriptors work otherwise (Windows), nothing is left out.

    Args:
        beginning: how the lines begin.
    """
    with _ONE_AT_A_TIME, ExitStack() as files, ExitStack() as redirection:
        try:
            from wurlitzer import Wurlitzer  # cannot be imported on Windows

            caught = files.enter_context(tempfile.TemporaryFile())
            redirection.enter_context(Wurlitzer(stdout=caught))
        except (AttributeError, ImportError, OSError):
            yield
            return
        try:
            yield
        finally:
            redirection.close()
            caught.seek(0)
            rest = b"".join(line for line in caught if not line.startswith(beginning))
            while rest:
                rest = rest[os.write(STDOUT, rest) :]
