"""How much space a run directory takes, and the part of it that can be made again."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.files import walk
from bitalloy.core.ownership import discard
from bitalloy.core.records import Record
from bitalloy.core.store import FREED, MARKER, claimed, stored_results


class DiskUse(Record, frozen=True, kw_only=True):
    """What lies in a run directory."""

    run: str
    total_bytes: int
    """Size of all files."""
    cache_bytes: int
    """Size of stored results and of what processes left behind, which the same command makes again."""
    stages: dict[str, int]
    """Stage -> size of its stored results in bytes, the largest first."""
    freed: bool = False
    """Whether the cache was removed after this was measured."""

    def told(self) -> str:
        """Say it in a sentence."""
        return (
            f"'{self.run}' takes {self.total_bytes / 1e6:.1f} MB, of which {self.cache_bytes / 1e6:.1f} MB are stored "
            "results of its stages"
        )


class FreedCache(Record, frozen=True, kw_only=True):
    """Left in a cache that was freed: what the next command must compute again."""

    since: str
    stages: tuple[str, ...]


def disk_use(path: str | Path) -> DiskUse:
    """Measure a run directory.

    Raises:
        RunDirectoryError: it is none.
    """
    run = Path(path)
    if not (run / MARKER).is_file():
        raise RunDirectoryError(f"'{run}' is not a run directory of bitalloy. Name the --out of a `bitalloy run`.")
    stages: dict[str, int] = {}
    for stage, file in stored_results(run / "cache"):
        stages[stage] = stages.get(stage, 0) + _size([file])
    return DiskUse(
        run=str(run),
        total_bytes=_size(walk(run)),
        cache_bytes=sum(_size(walk(folder)) for folder in _caches(run)),
        stages=dict(sorted(stages.items(), key=lambda entry: -entry[1])),
    )


def clean_run(path: str | Path, *, dry_run: bool = False) -> DiskUse:
    """Remove the cache of a run directory; report, models, tables and summary stay.

    Args:
        path: run directory.
        dry_run: whether nothing is removed.

    Returns:
        What lay there before.

    Raises:
        RunDirectoryError: it is none, or a command works there.
    """
    found = disk_use(path)
    if dry_run:
        return found
    with claimed(path) as store:
        for folder in _caches(store.path):
            for content in folder.iterdir():
                discard(content)
        if found.stages:
            since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            store.publish(f"cache/{FREED}", to_json(FreedCache(since=since, stages=tuple(found.stages))))
    return msgspec.structs.replace(found, freed=True)


def told_freed(path: str | Path) -> str:
    """Say what must be computed again because the cache was freed; empty where it was not."""
    try:
        found = from_json((Path(path) / "cache" / FREED).read_bytes(), FreedCache)
    except (OSError, msgspec.MsgspecError):
        return ""
    return (
        f"The stored results of '{path}' were freed on {found.since}. Plans are searched again from the tables, which "
        f"stayed; `bitalloy run` and `bitalloy sensitivity` compute again: {', '.join(found.stages)}."
    )


def _caches(run: Path) -> list[Path]:
    """The caches of a run directory, and of those of further targets in it."""
    return [path.parent / "cache" for path in walk(run) if path.name == MARKER]


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.lstat().st_size if path.is_file() or path.is_symlink() else 0
        except OSError:  # removed meanwhile
            continue
    return total
