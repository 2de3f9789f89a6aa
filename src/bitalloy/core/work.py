"""Where the stages keep results and show progress."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bitalloy.core.store import RunDirectory


class Progress(Protocol):
    """Where long work reports to."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` steps where known."""
        ...

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current stage are done."""
        ...

    def finish(self, note: str = "") -> None:
        """The current stage is over."""
        ...


class Silent:
    """Reports nothing."""

    def start(self, stage: str, total: int | None) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def finish(self, note: str = "") -> None: ...


@dataclass(frozen=True)
class Workspace:
    """Where results are kept and progress is shown; both may be absent."""

    store: RunDirectory | None = None
    progress: Progress = field(default_factory=Silent)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage, all of its results together; 0 where everything was stored."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Sessions and the like that several stages use, under the key of what decides them."""

    def cached(self, stage: str, key: str, make: Callable[[], bytes]) -> bytes:
        """The stored result of a stage, made now where it is missing."""
        start = time.perf_counter()
        found = self.store.get(stage, key) if self.store else None
        if found is not None:
            self.seconds.setdefault(stage, 0.0)
            return found
        data = make()
        if self.store:
            self.store.put(stage, key, data)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
        return data

    def shard(self, stage: str, key: str, name: str, make: Callable[[], bytes]) -> bytes:
        """One part of a sharded stage."""
        found = self.store.get(stage, key, name) if self.store else None
        if found is None:
            found = make()
            if self.store:
                self.store.put(stage, key, found, name)
        return found

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for large files that are of no use afterwards; in the run directory, where there is one."""
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=self.store.cache if self.store else None) as name:
            yield Path(name)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Progress]:
        """Show a stage while it runs."""
        self.progress.start(name, total)
        try:
            yield self.progress
        finally:
            self.progress.finish()
