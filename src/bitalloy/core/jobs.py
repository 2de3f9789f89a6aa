"""Work as data: a job says what to do in plain data, so that any process can do it and get the same bytes.

A job names its kind, and its specification says how to open what the work needs (a model file with its hash, samples
with their fingerprint, the ranges of a target) and on which part of it to work. What must be opened is described by an
`Opening`. `Contexts` keeps opened things under the hash of their openings, so that many jobs share one of each, and a
stage puts what it has in memory already there: nothing is opened twice.

`JOB_KINDS` says which function does a kind of job, or opens a kind of thing. A closed list of names, and not code in
the job, decides what runs: a job that comes from elsewhere can do nothing else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from threading import RLock
from typing import Any, Protocol, Self

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError
from bitalloy.core.records import Record
from bitalloy.core.store import key_of

JOB_KINDS: dict[str, str] = {
    "calibrate": "bitalloy.calibrate.gather:collect_shard",
    "exact": "bitalloy.sensitivity.measuring:measure_sites",
    "metric": "bitalloy.tasks.metric:measure_precision",
    "observed": "bitalloy.tasks.observing:observe_shard",
    "probe": "bitalloy.sensitivity.probing:probe_sample",
    "artefact": "bitalloy.rewrite.calibrated:open_artefact",
    "files": "bitalloy.data.datasets:open_files",
    "graph": "bitalloy.rewrite.equalize:open_graph",
    "labels": "bitalloy.tasks.observing:open_labels",
    "measurement": "bitalloy.sensitivity.measuring:open_measurement",
    "observer": "bitalloy.tasks.observing:open_observer",
    "prober": "bitalloy.sensitivity.probing:open_prober",
    "program-files": "bitalloy.tasks.open:open_program_files",
    "recipe": "bitalloy.targets.recipe:open_recipe",
    "resident": "bitalloy.core.jobs:refuse_resident",
    "samples": "bitalloy.data.datasets:open_samples_again",
    "subset": "bitalloy.data.datasets:open_subset",
    "switchboard": "bitalloy.sensitivity.switchboards:open_switchboard",
}
"""Kind -> `module:function`, imported when it is first needed: first the kinds of jobs, which are also the names of the
stages under which their results are stored, then the kinds of things that jobs open. The function takes the
specification, a record whose type its first parameter names, and the `Contexts`. Of a job it returns bytes."""


class Opening(Record, frozen=True, kw_only=True, dict=True):
    """How a thing that jobs share is opened, e.g. a model file or the sessions of a prober."""

    kind: str
    """A name from `JOB_KINDS`."""
    spec: Any
    """A record, or what JSON makes of one."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the thing."""
        return key_of(self)


class Resident(Record, frozen=True, kw_only=True):
    """A thing that plain data cannot describe, such as a user's own data set: it lives in one process only."""

    what: str
    """The thing in words, e.g. `the data set 'street'`."""
    key: str
    """Tells it from others."""


class Job(Record, frozen=True, kw_only=True):
    """A unit of work whose result is stored by itself."""

    kind: str
    """A name from `JOB_KINDS`; the result is stored under the stage of this name."""
    key: str
    """The hash of all that decides the results of the stage."""
    shard: str
    """Name of this job's part among the results of the stage."""
    spec: Any
    """A record of plain data, or what JSON makes of one: what is opened, and the part of the work."""
    group: str = ""
    """Neighbouring jobs of the same group share what the first of them opens: they run in order, at one place."""
    steps: int = 1
    """Steps that the job counts in the progress that is shown."""

    def to_bytes(self) -> bytes:
        """Write the job as JSON."""
        return to_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a job that `to_bytes` wrote."""
        return msgspec.json.decode(data, type=cls)


class Contexts:
    """Opened things under the hash of what opens them; things opened in an inner scope are gone behind it.

    Args:
        scratch: folder for large temporary files; the system's own where there is none.
        outer: a scope whose things are found here, too.
    """

    def __init__(self, scratch: Path | None = None, outer: Contexts | None = None) -> None:
        self.scratch = scratch
        self._outer = outer
        self._things: dict[str, object] = {}
        self._lock = RLock()

    def find(self, opening: Opening) -> Any:
        """Return the thing that an opening describes, or None where it is not open."""
        scope: Contexts | None = self
        while scope is not None:
            if opening.digest in scope._things:
                return scope._things[opening.digest]
            scope = scope._outer
        return None

    def open(self, opening: Opening) -> Any:
        """Return the thing that an opening describes, and open it now where it is not open yet.

        Raises:
            BitalloyError: it cannot be opened, or is not what it was when the job was made.
        """
        with self._lock:
            found = self.find(opening)
            if found is None:
                found = self._things[opening.digest] = _call(opening.kind, opening.spec, self)
            return found

    def keep(self, opening: Opening, thing: object) -> None:
        """Let jobs use a thing that is open already."""
        self._things[opening.digest] = thing

    @contextmanager
    def holding(self, *things: tuple[Opening, object]) -> Iterator[None]:
        """Let jobs use things that are open already, until the end of the block."""
        former = dict(self._things)
        self._things.update({opening.digest: thing for opening, thing in things})
        try:
            yield
        finally:
            for opening, _ in things:
                self._things.pop(opening.digest, None)
                if opening.digest in former:
                    self._things[opening.digest] = former[opening.digest]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Forget at the end of the block what was opened in it, and close what of that has a method `close`."""
        former = dict(self._things)
        try:
            yield
        finally:
            new = [thing for digest, thing in self._things.items() if former.get(digest) is not thing]
            self._things = former
            for thing in reversed(new):
                close = getattr(thing, "close", None)
                if close is not None:
                    close()

    @contextmanager
    def inner(self, scratch: Path | None = None) -> Iterator[Contexts]:
        """Make an inner scope, and close at its end what was opened in it and has a method `close`."""
        scope = Contexts(scratch or self.scratch, self)
        with scope.passing():
            yield scope


class Executor(Protocol):
    """Does jobs, in this process or elsewhere."""

    @property
    def contexts(self) -> Contexts:
        """Things that are open in this process."""
        ...

    def map(
        self,
        jobs: Sequence[Job],
        *,
        keep: Callable[[Job, bytes], object],
        at_once: int = 1,
        scratch: Path | None = None,
    ) -> Generator[bytes]:
        """Do jobs, and give their results in the order of the jobs.

        An executor may work ahead of whoever takes the results; it stops where the iterator is closed.

        Args:
            jobs: what to do.
            keep: called with each job and its result as soon as that is there, perhaps from another thread.
            at_once: groups of jobs that may run at the same time in one process.
            scratch: folder for large temporary files on this machine.
        """
        ...


class LocalExecutor:
    """Does jobs in this process: one after the other as results are taken, or some groups at the same time."""

    def __init__(self) -> None:
        self.contexts = Contexts()

    def map(
        self,
        jobs: Sequence[Job],
        *,
        keep: Callable[[Job, bytes], object],
        at_once: int = 1,
        scratch: Path | None = None,
    ) -> Generator[bytes]:
        """Do jobs in this process; see `Executor.map`."""
        groups = [list(some) for _, some in groupby(jobs, key=lambda job: job.group)]
        if at_once == 1 or len(groups) == 1:
            for group in groups:
                yield from self._one_group(group, keep, scratch)
            return
        whole = partial(self._whole_group, keep=keep, scratch=scratch)
        with ThreadPoolExecutor(at_once) as pool:
            for results in pool.map(whole, groups):
                yield from results

    def _one_group(
        self, jobs: Sequence[Job], keep: Callable[[Job, bytes], object], scratch: Path | None
    ) -> Generator[bytes]:
        with self.contexts.inner(scratch) as scope:
            for job in jobs:
                result = perform(job, scope)
                keep(job, result)
                yield result

    def _whole_group(
        self, jobs: Sequence[Job], keep: Callable[[Job, bytes], object], scratch: Path | None
    ) -> list[bytes]:
        return list(self._one_group(jobs, keep, scratch))


def perform(job: Job, contexts: Contexts | None = None) -> bytes:
    """Do a job; a process that has nothing but the job's bytes can do it, unless the job has `residents`.

    Args:
        job: what to do.
        contexts: what is open in this process already.

    Raises:
        BitalloyError: something that the job needs cannot be opened here, or is not what it was.
    """
    result: bytes = _call(job.kind, job.spec, contexts or Contexts())
    return result


def residents(job: Job) -> tuple[str, ...]:
    """Name the things that bind a job to the process where they live; a job without any can be done anywhere."""
    found: dict[str, None] = {}

    def look(part: object) -> None:
        if isinstance(part, dict):
            if part.get("kind") == "resident" and "spec" in part:
                found[str(part["spec"]["what"])] = None
            for inside in part.values():
                look(inside)
        elif isinstance(part, (list, tuple)):
            for inside in part:
                look(inside)

    look(msgspec.to_builtins(job.spec))
    return tuple(found)


def refuse_resident(spec: Resident, contexts: Contexts) -> object:
    """Refuse to open a resident thing: it is found among the contexts of its own process, or nowhere."""
    raise BitalloyError(
        f"This job can run only in the process that made it, because {spec.what} lives in that process's memory. Give "
        "the model and the data as files to run jobs elsewhere."
    )


def _call(kind: str, spec: object, contexts: Contexts) -> Any:
    if kind not in JOB_KINDS:
        raise BitalloyError(f"Unknown kind of work '{kind}'. Known are: {', '.join(sorted(JOB_KINDS))}.")
    module, _, name = JOB_KINDS[kind].partition(":")
    function = getattr(importlib.import_module(module), name)
    wanted = next(iter(inspect.signature(function, eval_str=True).parameters.values())).annotation
    return function(spec if isinstance(spec, wanted) else msgspec.convert(spec, wanted), contexts)
