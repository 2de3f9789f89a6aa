"""Files that jobs name: what lies where, and how it comes to a node that has not the same files at the same paths."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitalloy.core import files
from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.ownership import temporary_root
from bitalloy.core.records import Record
from bitalloy.data.images import IMAGE_SUFFIXES, file_hash
from bitalloy.model.external import external_files
from bitalloy.model.file import PROGRAM_FILE, parse

PATH_FIELDS = ("path", "paths", "folder", "labels")
"""Fields of the specifications of jobs in which paths of files and folders stand."""


class Cargo(Record, frozen=True, kw_only=True):
    """A file or folder that jobs name, with all files that are read with it."""

    root: str
    """The absolute path that jobs name."""
    files: dict[str, str]
    """Absolute path of each file -> SHA-256 of its content, in hexadecimal."""


def named_paths(spec: Any) -> Iterator[str]:
    """Give the absolute paths that a specification in plain data names."""
    if isinstance(spec, Mapping):
        for name, value in spec.items():
            if name in PATH_FIELDS:
                yield from (p for p in _texts(value) if Path(p).is_absolute())
            yield from named_paths(value)
    elif isinstance(spec, (list, tuple)):
        for value in spec:
            yield from named_paths(value)


def moved(spec: Any, places: Mapping[str, str]) -> Any:
    """Return a specification in plain data with other paths in place of those that it names."""
    if isinstance(spec, Mapping):
        return {
            name: _placed(value, places) if name in PATH_FIELDS else moved(value, places)
            for name, value in spec.items()
        }
    if isinstance(spec, (list, tuple)):
        return [moved(value, places) for value in spec]
    return spec


def load_cargo(root: str) -> Cargo:
    """List and hash the files that are read where a job names a path.

    A model comes with its external data, a `program.json` with its folder, and a file of labels with the images in its
    folder.

    Raises:
        DataError: a file cannot be read.
    """
    path = Path(root)
    if path.is_dir():
        found = [file for file in files.walk(path) if file.is_file()]
    elif path.suffix.lower() == ".onnx":
        found = [path, *external_files(parse(path)[0], path)]
    elif path.name == PROGRAM_FILE:
        found = [file for file in files.walk(path.parent) if file.is_file()]
    elif path.suffix.lower() in (".json", ".jsonl"):
        found = [path, *(file for file in files.walk(path.parent) if file.suffix.lower() in IMAGE_SUFFIXES)]
    else:
        found = [path]
    return Cargo(root=root, files={str(file): file_hash(file) for file in found})


def lies_here(cargo: Cargo) -> bool:
    """Tell whether this machine has the same files at the same paths, as on a shared file system."""
    return all(_is(Path(path), sha256) for path, sha256 in cargo.files.items())


class Warehouse:
    """The files of jobs on a node, under the hashes of their contents; what is there once serves every run.

    Args:
        folder: where they lie; by default a folder of this user among the system's temporary ones.

    Raises:
        BitalloyError: the folder belongs to someone else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else 0
        self._folder = folder or temporary_root() / f"bitalloy-files-{user}"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and self._folder.stat().st_uid != user:
            raise BitalloyError(f"'{self._folder}' belongs to another user. Set TMPDIR to a folder of your own.")

    def lacking(self, cargo: Cargo) -> list[str]:
        """List the hashes of the contents that are missing here."""
        return sorted({sha256 for sha256 in cargo.files.values() if not _is(self._content(sha256), sha256)})

    def store(self, cargo: Cargo, fetch: Callable[[str], bytes]) -> str:
        """Lay the files out as they lie where they come from, below a folder here; return the path of the root.

        Args:
            cargo: the files.
            fetch: gives the content of a hash that is missing here.

        Raises:
            BitalloyError: a content that came has not its hash.
        """
        for sha256 in self.lacking(cargo):
            data = fetch(sha256)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise BitalloyError(f"A file arrived damaged: its SHA-256 is not {sha256[:12]}.... Start again.")
            self._write(self._content(sha256), lambda place, data=data: place.write_bytes(data))  # type: ignore[misc]
        name = hashlib.sha256("\n".join(f"{s} {p}" for p, s in sorted(cargo.files.items())).encode()).hexdigest()[:24]
        tree = self._folder / "trees" / name
        for path, sha256 in cargo.files.items():
            place, content = tree / Path(path).relative_to(Path(path).anchor), self._content(sha256)
            if not _is(place, sha256):
                self._write(place, lambda new, content=content: os.link(content, new))  # type: ignore[misc]
        return str(tree / Path(cargo.root).relative_to(Path(cargo.root).anchor))

    def _content(self, sha256: str) -> Path:
        return self._folder / "contents" / sha256

    @staticmethod
    def _write(place: Path, make: Callable[[Path], object]) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f".{secrets.token_hex(8)}")
        try:
            make(new)
            new.replace(place)
        finally:
            with suppress(OSError):  # a link to the same content is left by `replace`
                new.unlink()


def _is(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and file_hash(path) == sha256
    except (OSError, DataError):
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (one for one in value if isinstance(one, str))


def _placed(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return places.get(value, value)
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return [places.get(one, one) for one in value]
    return moved(value, places)
