"""Task metrics of the models, and the fastest plan of a front that keeps one.

What a task observes of a model on the labelled samples is stored, and metrics are computed from it: over a whole run,
no model is executed on a sample twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.schemes import Plan
from bitalloy.core.store import key_of
from bitalloy.core.work import Workspace
from bitalloy.model.load import Graph
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Session
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import RunModel, Seen, Task, TaskData, TaskResult, pack_seen, unpack_seen
from bitalloy.tasks.bootstrap import RESAMPLES
from bitalloy.tasks.open import interface_of, runner

SHARD = 32
"""Samples that are stored together."""
STREAMS = 4
"""Samples that are in memory at the same time, at most."""
JUDGED = 4
"""Models of which what is known stays in memory."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    identity: tuple[str, ...]
    """What decides it beside the target: equal for models that do the same."""
    make: Callable[[], Artefact]


class Evaluator:
    """Runs models over labelled samples, each at most once, and compares them.

    Args:
        analysis: of the model.
        labels: for the model's task.
        limit: evaluate at most so many samples.
        work: where to keep and show results.

    Raises:
        DataError: labels are broken, or no task fits the model.
    """

    def __init__(self, analysis: Analysis, labels: Sequence[Path], limit: int | None, work: Workspace) -> None:
        self._analysis, self._limit, self._work = analysis, limit, work
        interface = interface_of(analysis.graph)
        task = find_task(interface)
        if task is None:
            outputs = [list(o.shape) for o in analysis.graph.info.outputs]
            raise DataError(
                f"No task metric fits this model with outputs {outputs}. Box AP needs a detector with output (1, 4 + "
                f"classes, n); the tasks are {', '.join(t.name for t in TASKS)}. Leave out --eval."
            )
        self._task: Task[TaskData] = task
        self._data: list[TaskData] = [task.open(path, interface) for path in labels]
        self._kept: dict[tuple[str, str], bytes] = {}
        self._judged: dict[str, Any] = {}

    @property
    def reference(self) -> Subject:
        """The float model."""
        return Subject(("float",), self._analysis.original)

    def subject(self, plan: Plan) -> Subject:
        """The model of a plan, made when it is needed."""

        def make() -> Artefact:
            return self._analysis.executable(self._analysis.artefact(plan))

        return Subject((self._analysis.key, *(f"{unit} in {scheme}" for unit, scheme in plan.listed)), make)

    def results(self, subjects: Mapping[str, Subject], stage: str, *, resamples: int = RESAMPLES) -> list[TaskResult]:
        """What the task measures on each file of labels; the first model is the reference, and it is the float model.

        Args:
            subjects: by name.
            stage: under whose name results are kept and shown.
            resamples: draws of the bootstrap; 0 where only the values count.
        """
        return [self._result(data, subjects, stage, resamples) for data in self._data]

    def _result(self, data: TaskData, subjects: Mapping[str, Subject], stage: str, resamples: int) -> TaskResult:
        seed = self._analysis.settings.seed
        samples = data.choose(self._limit, seed)
        keys = {name: self._key(data, subject) for name, subject in subjects.items()}

        def make() -> bytes:
            judged = {n: self._judged_of(data, samples, keys[n], subject, stage) for n, subject in subjects.items()}
            return msgspec.json.encode(self._task.measure(judged, data, samples, seed=seed, resamples=resamples))

        key = key_of(seen=keys, resamples=resamples)
        return msgspec.json.decode(self._work.cached(stage, key, make), type=TaskResult)

    def _key(self, data: TaskData, subject: Subject) -> str:
        """Of what is observed of a model."""
        analysis = self._analysis
        return key_of(
            model=analysis.graph.info.sha256,
            shapes=analysis.graph.info.inputs,
            subject=subject.identity,
            target=None if subject.identity == self.reference.identity else analysis.target.name,
            labels=data.fingerprint(),
            limit=self._limit,
            seed=analysis.settings.seed,
            runner=analysis.target.runtime.name,
            **analysis.execution,
        )

    def _judged_of(self, data: TaskData, samples: Sequence[int], key: str, subject: Subject, stage: str) -> Any:
        """What is known of one model; the last few are kept, and the reference, which is always among them."""
        if key not in self._judged:
            self._judged[key] = self._task.judge(self._seen(data, samples, key, subject, stage), data, samples)
        self._judged[key] = self._judged.pop(key)
        for old in list(self._judged)[:-JUDGED]:
            del self._judged[old]
        return self._judged[key]

    def _seen(self, data: TaskData, samples: Sequence[int], key: str, subject: Subject, stage: str) -> list[Seen]:
        """Of one model on all samples, from shards where they exist; the model is made where one is missing."""
        found: list[Seen] = []
        with self._opened(data, subject) as run, self._work.stage(stage, len(samples)) as progress:
            for start in range(0, len(samples), SHARD):
                part = samples[start : start + SHARD]
                raw = self._shard(key, f"{start:06d}", partial(run, part))
                found += unpack_seen(raw)
                progress.advance(len(part))
        return found

    def _shard(self, key: str, name: str, make: Callable[[], bytes]) -> bytes:
        """Of a run without a directory, in memory."""
        if self._work.store is not None:
            return self._work.shard("observed", key, name, make)
        if (key, name) not in self._kept:
            self._kept[key, name] = make()
        return self._kept[key, name]

    @contextmanager
    def _opened(self, data: TaskData, subject: Subject) -> Iterator[Callable[[Sequence[int]], bytes]]:
        """A function that observes a model on some samples; sessions are opened on its first call.

        Samples run side by side, each on its part of the cores, where models are small: that gives the same results
        in less time.
        """
        graph = self._analysis.graph
        streams = 1 if graph.large else min(available_cores(), STREAMS)
        sessions: dict[str, Session] = {}
        with self._work.scratch() as folder, ThreadPoolExecutor(streams) as pool:

            def observe(samples: Sequence[int]) -> bytes:
                if not sessions:
                    parts = {"model": subject}
                    if data.paired and subject.identity != self.reference.identity:
                        parts = {"reference": self.reference, **parts}
                    for name, one in parts.items():
                        sessions[name] = one.make().placed(folder / name).session(streams=streams)
                models = {name: _for_each_thread(graph, session) for name, session in sessions.items()}
                found = pool.map(lambda i: self._task.observe(models, data, i)["model"], samples)
                return pack_seen(list(found))

            try:
                yield observe
            finally:
                for session in sessions.values():
                    session.close()


def _for_each_thread(graph: Graph, session: Session) -> RunModel:
    """A `runner` of its own in every thread: it keeps what belongs to the sample at hand."""
    own = threading.local()

    def run(feeds: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not hasattr(own, "run"):
            own.run = runner(graph, session)
        found: Mapping[str, np.ndarray] = own.run(feeds)
        return found

    return run
