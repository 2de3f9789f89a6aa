"""The run directory: results under the hash of what they were made from, written whole or not at all.

    run/
      summary.json, report.html, mixed.onnx, plan.json, ...   what the user reads
      cache/<stage>-<key>                                     one result per stage and inputs
      cache/<stage>-<key>.d/<shard>                           parts of a sharded stage

What only reads, or adds results, shares the folder with a run; what writes files that people read holds its lock, which
is that of the file that marks it (`claimed`).

A key is the SHA-256 of everything that decides the result: a record of the stage's inputs, and the versions of all that
computes. So a changed input can never meet an old result, and the same command again finds all of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import msgspec

from bitalloy.core import files
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.ownership import PARTIAL, SCRATCH, HeldError, Lock, discard, sweep, sweep_root
from bitalloy.core.records import Record

MARKER = ".bitalloy-run"
FREED = "freed.json"
"""File in a cache that was freed: it tells what was in it."""
DECISIVE = ("bitalloy", "numpy", "onnx", "onnx-ir", "onnxruntime", "pillow", "pycocotools", "scipy")
"""Packages whose versions are part of every key."""


class RunDirectory:
    """A folder that keeps results across runs.

    Args:
        path: created where absent; a folder with other content is refused, so that nothing of the user's is mixed
            with results.

    Raises:
        RunDirectoryError: the folder cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not files.is_text(path):
            raise RunDirectoryError(f"The run directory {str(path)!a} is not UTF-8 text. Give another --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()) and not (self.path / MARKER).exists():
                raise RunDirectoryError(
                    f"'{self.path}' is not empty and is not a run directory of bitalloy. Give another --out."
                )
            (self.path / MARKER).touch()  # first: another process may make the same folder now
            self.cache = self.path / "cache"
            """Where results of the stages lie."""
            self.cache.mkdir(exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"The run directory '{self.path}' cannot be written: {error}") from error

    def get(self, stage: str, key: str, shard: str | None = None) -> bytes | None:
        """Return a stored result, or None where there is none."""
        path = self.place(stage, key, shard)
        return path.read_bytes() if path.is_file() else None

    def has(self, stage: str, key: str, shard: str | None = None) -> bool:
        """Tell whether a result is stored."""
        return self.place(stage, key, shard).is_file()

    def put(self, stage: str, key: str, data: bytes, shard: str | None = None) -> None:
        """Store a result."""
        self._write(self.place(stage, key, shard), data)

    def cached(self, stage: str, key: str, make: Callable[[], bytes]) -> bytes:
        """Return the stored result of a stage, made now where it is missing."""
        data = self.get(stage, key)
        if data is None:
            data = make()
            self.put(stage, key, data)
        return data

    def publish(self, name: str, data: bytes | str) -> Path:
        """Write a file that the user reads, at the top of the run directory."""
        path = self.path / name
        self._write(path, data.encode() if isinstance(data, str) else data)
        return path

    def publish_files(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let `write` put a file or folder, each file whole or not at all, at the top of the run directory."""
        path = self.path / name
        try:
            write(path)
        except OSError as error:
            raise RunDirectoryError(
                f"'{path}' cannot be written: {error}. Free space or give another --out."
            ) from error
        return path

    def place(self, stage: str, key: str, shard: str | None = None) -> Path:
        """Return the path of a result, stored or not."""
        name = f"{stage}-{key[:24]}"
        return self.cache / name if shard is None else self.cache / f"{name}.d" / shard

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, data)
        except OSError as error:
            raise RunDirectoryError(
                f"'{path}' cannot be written: {error}. Free space or give another --out."
            ) from error


@contextmanager
def claimed(path: str | Path) -> Iterator[RunDirectory]:
    """Hold a run directory alone until the end of the block; what holds it already in this process shares it.

    What processes left behind that are no more is removed first. A new folder that stays empty is removed in the end.

    Raises:
        RunDirectoryError: another process works there, the folder cannot be written, or holds something else.
    """
    is_new = not Path(path).exists()
    store = RunDirectory(path)
    lock = Lock(store.path / MARKER)
    try:
        first = lock.take()
    except HeldError as error:
        raise RunDirectoryError(
            f"'{store.path}' is in use by {error}. Wait until it ends, stop it, or give another --out."
        ) from error
    except OSError as error:
        raise RunDirectoryError(f"The run directory '{store.path}' cannot be written: {error}") from error
    try:
        if first:
            sweep(p for p in files.walk(store.path) if p.name.startswith(SCRATCH) or p.name.endswith(PARTIAL))
            sweep_root()
            (store.cache / FREED).unlink(missing_ok=True)
        yield store
    except KeyboardInterrupt:
        if first:
            _STOPPED[:] = [told_kept(store)]
        raise
    finally:
        if first and is_new and {p.name for p in files.walk(store.path)} == {MARKER, store.cache.name}:
            discard(store.path)
        lock.give()


def stored_results(cache: Path) -> Iterator[tuple[str, Path]]:
    """Give the stage and the path of each result in the cache of a run directory, of each part where it has several."""
    for path in files.walk(cache):
        place = path.relative_to(cache).parts
        stage, dash, _ = place[0].rpartition("-")
        if dash and not place[0].startswith(SCRATCH) and not path.name.endswith(PARTIAL) and path.is_file():
            yield stage, path


_STOPPED: list[str] = []


def told_stop() -> str:
    """Say what an interrupt left, in a sentence; what it interrupted was done in no run directory where that is new."""
    return _STOPPED[0] if _STOPPED else "Stopped. The same command goes on from here."


def told_kept(store: RunDirectory) -> str:
    """Say which results a run directory keeps for the next time."""
    counts = Counter(stage for stage, _ in stored_results(store.cache))
    found = ", ".join(f"{stage} {count}" if count > 1 else stage for stage, count in sorted(counts.items()))
    kept = f": '{store.path}' keeps what is done ({found})" if found else ""
    return f"Stopped. The same command goes on from here{kept}."


class StageInputs(Record, frozen=True, kw_only=True):
    """Base of the records from which keys are made, one for each stage that stores results.

    Its fields are all inputs of the stage: whatever the stage reads, and another value of which may give another
    result, is a field of it or of a record in it. Files stand in it as hashes of their contents.
    """


def key_of(inputs: Record) -> str:
    """Hash a record: SHA-256 over its type, the `versions`, and its canonical MessagePack.

    Unlike JSON, MessagePack tells NaN, infinities and None apart, and keeps every bit of a float.
    """
    content = (type(inputs).__qualname__, versions(), inputs)
    return hashlib.sha256(msgspec.msgpack.encode(content, order="sorted")).hexdigest()


@cache
def versions() -> dict[str, str]:
    """List the versions of everything that decides a number."""
    return {name: importlib.metadata.version(name) for name in DECISIVE}
