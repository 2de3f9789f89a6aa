"""Paths that files of strangers name: they must stay inside the folder of the file that names them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bitalloy.core.errors import BitalloyError

_SHOWN = 80
"""Characters of a path that a message repeats."""


def path_inside(folder: Path, name: str, what: str, kind: type[BitalloyError]) -> Path:
    """Return the path of a file that another file names, with symbolic links followed.

    Args:
        folder: folder in which it must lie; the folder itself may be a link to anywhere.
        name: the path as the file has it, relative to the folder.
        what: a sentence's beginning that says who names it, e.g. `Weight 'w' of 'a.onnx' is in the external file`.
        kind: error to raise.

    Raises:
        BitalloyError: it is empty, absolute, no path at all, or leads out of the folder by `..` or by a symbolic link;
            of the type `kind`.
    """
    shown = repr(name[:_SHOWN])
    try:
        root = folder.resolve()
        found = (root / name).resolve()
        inside = bool(name) and not Path(name).is_absolute() and found.is_relative_to(root)
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # for whoever opens it
            found.stat()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, or with a NUL
        raise kind(f"{what} {shown}, which no file can be called: {str(error)[:_SHOWN]}. Repair the file.") from error
    if not inside:
        raise kind(
            f"{what} {shown}, which leads outside of '{folder}'. Refused: a file may only name what lies beside it. "
            "Copy that there, and correct the path."
        )
    return found
