"""Where the stages keep results and show progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.jobs import Executor, Job, LocalExecutor
from bitalloy.core.ownership import temporary
from bitalloy.core.shares import JobShare, RestMissingError
from bitalloy.core.store import RunDirectory, StageInputs, key_of


class Progress(Protocol):
    """Where long work reports to."""

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage of `total` steps; None where their number is not known."""
        ...

    def advance(self, steps: int = 1) -> None:
        """Count some steps of the current stage as done."""
        ...

    def finish(self, note: str = "") -> None:
        """End the current stage."""
        ...


class Silent:
    """Reports nothing."""

    def start(self, stage: str, total: int | None) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def finish(self, note: str = "") -> None: ...


def usual_progress() -> Progress:
    """Return where progress is shown if nothing else is said: in a notebook by a bar for each stage, else nowhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ != "ZMQInteractiveShell":
        return Silent()
    from bitalloy.core.progress import StageBars

    return StageBars()


@dataclass(frozen=True)
class Workspace:
    """Where results are kept, progress is shown and jobs are done; the first two may be absent."""

    store: RunDirectory | None = None
    progress: Progress = field(default_factory=usual_progress)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage, all of its results together; 0 where everything was stored."""
    executor: Executor = field(default_factory=LocalExecutor)
    """What does jobs. What is open in its contexts serves several stages."""
    share: JobShare | None = None
    """The part of the jobs that is done here; None for all of them. It needs a run directory."""

    def cached(self, stage: str, inputs: StageInputs, make: Callable[[], bytes]) -> bytes:
        """Return the stored result of a stage, made now where it is missing.

        Args:
            stage: name of the stage.
            inputs: all that decides the result.
            make: makes the result.
        """
        start, key = time.perf_counter(), key_of(inputs) if self.store else ""
        found = self.store.get(stage, key) if self.store else None
        if found is not None:
            self.seconds.setdefault(stage, 0.0)
            return found
        data = make()
        if self.store:
            self.store.put(stage, key, data)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
        return data

    def place(self, stage: str, inputs: StageInputs) -> Path | None:
        """Return the file in which the result of a stage is stored; None without a run directory."""
        return self.store.place(stage, key_of(inputs)).absolute() if self.store is not None else None

    def map(self, jobs: Sequence[Job], progress: Progress, *, at_once: int = 1) -> Generator[bytes]:
        """Give the results of jobs in their order: stored ones as they are, the others done now and stored one by one.

        Work stops where the iterator is closed.

        Args:
            jobs: what to do.
            progress: the progress of the stage, which every job advances.
            at_once: groups of jobs that may run at the same time.

        Raises:
            RestMissingError: results are missing that another part of the jobs makes.
        """
        store = self.store
        counted = self._do_share(self.share, jobs, progress, at_once) if self.share is not None and jobs else set()
        stored = [store is not None and store.has(job.kind, job.key, job.shard) for job in jobs]

        def keep(job: Job, result: bytes) -> None:
            if store is not None:
                store.put(job.kind, job.key, result, job.shard)
            progress.advance(job.steps)

        missing = [job for job, known in zip(jobs, stored, strict=True) if not known]
        scratch = store.cache if store is not None else None
        with closing(self.executor.map(missing, keep=keep, at_once=at_once, scratch=scratch)) as done:
            for job, known in zip(jobs, stored, strict=True):
                if store is None or not known:
                    yield next(done)
                    continue
                found = store.get(job.kind, job.key, job.shard)
                if found is None:
                    raise RunDirectoryError(f"A result vanished from '{store.path}' while it was in use. Run again.")
                if job.shard not in counted:
                    progress.advance(job.steps)
                yield found

    def _do_share(self, share: JobShare, jobs: Sequence[Job], progress: Progress, at_once: int) -> set[str]:
        """Do and store this part of the jobs, and return the shards that were done."""
        store, alone, done = self.store, replace(self, share=None), set[str]()
        assert store is not None, "parts of the jobs meet in a run directory"
        for numbers in share.turns(jobs[0].kind, len(jobs)):
            some = [job for number in numbers if not store.has((job := jobs[number]).kind, job.key, job.shard)]
            for _ in alone.map(some, progress, at_once=at_once):
                pass
            done |= {job.shard for job in some}
        stored = [store.has(job.kind, job.key, job.shard) for job in jobs]
        if missing := share.lacking(stored):
            raise RestMissingError(jobs[0].kind, missing, sum(stored), len(jobs))
        return done

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make a folder for large files that are of no use afterwards, in the run directory where there is one."""
        with temporary(self.store.cache if self.store else None) as folder:
            yield folder

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Progress]:
        """Show a stage while it runs."""
        self.progress.start(name, total)
        try:
            yield self.progress
        finally:
            self.progress.finish()
