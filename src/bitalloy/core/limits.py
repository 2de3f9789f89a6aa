"""How much memory may be used: what files declare is refused before it is allocated, and a watch bounds all else.

Case 1. Sizes that a file declares (tensors of a model, arrays, images) are added up and compared with the limit.
Case 2. What nothing declares, such as the working memory of a runtime, is watched by `watched`: the process ends with
        one message when its own memory passes the limit. The system's limit on address space (RLIMIT_AS) is no such
        bound: runtimes reserve far more addresses than they use, and fail in ways of their own where that is refused.

The limit is given with `limited`, or in the environment variable `BITALLOY_MEMORY_LIMIT`; else it is 80 % of the memory
of the machine or of the container.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from bitalloy.core.errors import BitalloyError

VARIABLE = "BITALLOY_MEMORY_LIMIT"
USUAL_SHARE = 0.8
"""Part of the machine's memory that may be used where nothing else is said."""
IMAGE_SHARE = 16
"""One image may take this part of the limit at most, as a divisor: other things need memory at the same time."""
INTERVAL_S = 0.2
"""Time between two looks at the memory in use."""
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_given: list[int] = []


def memory_bytes(text: str, where: str = "--memory-limit") -> int:
    """Read an amount of memory: a number with a unit, or a share of the machine's.

    >>> memory_bytes("1.5GB"), memory_bytes("20 mb")
    (1500000000, 20000000)

    Raises:
        BitalloyError: it is something else, or nothing.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*(%|[KMGT]B)", text.strip(), re.IGNORECASE)
    number = float(match[1]) if match else 0.0
    if match is None or not number or (match[2] == "%" and number > 100):
        raise BitalloyError(f"{where} is '{text[:80]}'; expected an amount of memory, such as 8GB, or a share, as 60%.")
    if match[2] == "%":
        return int(min(number / 100 * machine_memory(), sys.maxsize))
    return int(min(number * _UNITS[match[2].lower()], sys.maxsize))


@cache
def machine_memory() -> int:
    """Return the bytes of memory of the machine, or of the container; the largest number where that is not known."""
    found = [sys.maxsize]
    with suppress(AttributeError, OSError, ValueError):  # of systems that do not tell
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in _CONTAINER:
        with suppress(OSError, ValueError):  # absent, or `max`
            found.append(int(Path(place).read_text()))
    return min(size for size in found if size > 0)


def memory_limit() -> int:
    """Return the largest number of bytes of memory that may be used.

    Raises:
        BitalloyError: the environment variable is malformed.
    """
    if _given:
        return _given[-1]
    said = os.environ.get(VARIABLE, "").strip()
    return memory_bytes(said, VARIABLE) if said else int(USUAL_SHARE * machine_memory())


@contextmanager
def limited(limit: int | None) -> Iterator[None]:
    """Set the limit of this process until the end of the block; None leaves it as it is."""
    if limit is None:
        yield
        return
    _given.append(limit)
    try:
        yield
    finally:
        _given.pop()


def refuse_beyond(needed: float, what: str, kind: type[BitalloyError], *, divisor: int = 1) -> None:
    """Refuse what needs more memory than may be used.

    Args:
        needed: bytes.
        what: a sentence's beginning that says what needs them, e.g. `The image 'a.png' declares 1 x 2 pixels`.
        kind: error to raise.
        divisor: the part of the limit that it may take.

    Raises:
        BitalloyError: it needs more; of the type `kind`.
    """
    limit = memory_limit() // divisor
    if needed > limit:
        part = f"a {divisor}th of the memory that may be used" if divisor > 1 else "the memory that may be used"
        raise kind(
            f"{what}, which takes {amount(needed)}; the limit is {amount(limit)}, {part}. Give less, or raise it with "
            f"--memory-limit (or {VARIABLE}), such as {amount(needed * divisor, up=True)}."
        )


def refuse_contents(path: Path, kind: type[BitalloyError]) -> None:
    """Refuse a file that is larger than memory, or a ZIP archive (.npz, .pt) whose entries are when they are unpacked.

    Raises:
        BitalloyError: it is; of the type `kind`.
        OSError: it cannot be read.
        zipfile.BadZipFile: the archive is damaged.
    """
    refuse_beyond(path.stat().st_size, f"'{path}' is read as a whole", kind)
    import zipfile  # not at the top: the command line starts without it

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            needed = sum(entry.file_size for entry in archive.infolist())
        refuse_beyond(needed, f"'{path}' holds {needed} bytes when it is unpacked", kind)


def amount(size: float, *, up: bool = False) -> str:
    """Write a number of bytes for people, and so that `memory_bytes` reads it; `up` rounds up.

    >>> amount(1234567890), amount(1234567890, up=True)
    ('1.2GB', '1.3GB')
    """
    unit = next((unit for unit in ("TB", "GB", "MB") if size >= _UNITS[unit.lower()]), "KB")
    number = size / _UNITS[unit.lower()]
    return f"{number + 0.05 if up else number:.1f}{unit}"


def memory_used() -> int | None:
    """Return the bytes of memory that this process alone uses, files that it maps left out; None where unknown."""
    try:
        with open("/proc/self/status", "rb") as file:  # noqa: PTH123  several times a second
            found = re.search(rb"RssAnon:\s*(\d+) kB", file.read())
    except OSError:
        found = None
    if found is not None:
        return 1024 * int(found[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


@contextmanager
def watched(end: Callable[[str], object]) -> Iterator[None]:
    """Look at the memory in use until the end of the block.

    Args:
        end: called once, from another thread, with a message when the limit is passed; it must end the process.
    """
    memory_limit()  # which is refused where it is malformed
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            used = memory_used()
            if used is None:
                return
            if used > memory_limit():
                end(
                    f"{amount(used)} of memory are in use; the limit is {amount(memory_limit())}. Give smaller inputs, "
                    f"fewer --samples, or raise it with --memory-limit (or {VARIABLE})."
                )
                return

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
