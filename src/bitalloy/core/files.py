"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from bitalloy.core.ownership import PARTIAL, make_temporary, mark

Lasting = TypeVar("Lasting")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose content takes the place of `path` at the end of the block, unless the block raises.

    The content lies on the disk before it takes that place, with the permissions of any new file.

    Args:
        path: a file in an existing folder.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=mark(), suffix=PARTIAL, delete=False) as file:
        temporary = Path(file.name)
        try:
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write(path: Path, data: bytes) -> Path:
    """Write a file, as a whole or not at all; returns its path.

    Raises:
        OSError: the folder cannot be written.
    """
    with replacing(path) as file:
        file.write(data)
    return path


def lasting_in(folder: Path | None, make: Callable[[Path], Lasting]) -> Lasting:
    """Make something whose files lie in a folder.

    Args:
        folder: the folder; None for a temporary one, which is removed when what was made is no longer used, or when it
            could not be made.
        make: makes it in that folder.
    """
    if folder is not None:
        return make(folder)
    place = make_temporary()
    try:
        made = make(place)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    weakref.finalize(made, shutil.rmtree, place, ignore_errors=True)
    return made


def walk(folder: Path) -> Iterator[Path]:
    """Give all files and folders in a folder, however deep; what another process removes meanwhile may be missing."""
    for place, folders, names in os.walk(folder):
        yield from (Path(place) / name for name in (*folders, *names))


def is_text(path: str | Path) -> bool:
    """Return whether a path is UTF-8: other bytes are surrogates in Python, which records and runtimes cannot take."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
