"""Keep a line that a C library prints whatever its options say away from standard output."""

from __future__ import annotations

import ctypes
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
    descriptor is closed, no file can be made, or the C library is out of reach (Windows), nothing is left out.

    Args:
        beginning: of the lines.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        try:
            flush = ctypes.CDLL(None).fflush
            caught = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(STDOUT)
        except (AttributeError, OSError, TypeError):
            yield
            return
        flush(None)  # what C code wrote before is not held back
        os.dup2(caught.fileno(), STDOUT)
        try:
            yield
        finally:
            flush(None)
            os.dup2(saved, STDOUT)
            os.close(saved)
            caught.seek(0)
            rest = b"".join(line for line in caught if not line.startswith(beginning))
            while rest:
                rest = rest[os.write(STDOUT, rest) :]
