"""Evaluation of task metrics of several models on labelled samples.

What a task observes of a model on the labelled samples is stored, and metrics are computed from it: over a whole run,
no model is executed on a sample twice.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import DataError
from bitalloy.core.jobs import Contexts, Job, Opening
from bitalloy.core.records import Record
from bitalloy.core.schemes import Plan
from bitalloy.core.store import key_of
from bitalloy.core.work import Workspace
from bitalloy.model.graphs.again import graph_opening
from bitalloy.model.load import Graph
from bitalloy.rewrite.calibrated import ArtefactParts
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Session
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets.recipe import recipe_opening
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import RunModel, Seen, Task, TaskData, TaskResult, pack_seen, unpack_seen
from bitalloy.tasks.bootstrap import RESAMPLES
from bitalloy.tasks.open import interface_of, runner

SHARD = 32
"""Number of samples whose observations are stored together."""
STREAMS = 4
"""Largest number of samples that are in memory at the same time."""
JUDGED_MODELS = 4
"""Largest number of models whose judgements stay in memory: those that were used last."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    identity: tuple[str, ...]
    """Key of the model beside its target: equal for models that compute the same."""
    model: Opening
    """Plain data from which a job makes the model."""


@dataclass(frozen=True)
class _Labelled:
    """Labelled samples, with the plain data from which jobs open them."""

    data: TaskData
    fingerprint: str
    opening: Opening


class Evaluator:
    """Runs models over labelled samples, each at most once, and compares them.

    Args:
        analysis: analysis of the model.
        labels: labels for the model's task.
        limit: largest number of samples that are evaluated; None for all.
        work: where results are stored and progress is shown.

    Raises:
        DataError: the labels are broken, or no task fits the model.
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
        self._kept: dict[tuple[str, str], bytes] = {}
        self._judged: dict[str, Any] = {}
        self._recipe = analysis.recipe()
        self._parts = ArtefactParts(
            graph=graph_opening(analysis.graph),
            given=graph_opening(analysis.given),
            recipe=recipe_opening(self._recipe),
            schemes=None,
        )
        self._labelled = [self._opened(path, task.open(path, interface)) for path in labels]

    @property
    def reference(self) -> Subject:
        """The float model, as a subject of evaluation."""
        return Subject(("float",), Opening(kind="artefact", spec=self._parts))

    def subject(self, plan: Plan) -> Subject:
        """Return the model of a plan as a subject; it is made when it is needed."""
        spec = msgspec.structs.replace(self._parts, schemes=dict(plan.listed))
        listed = (f"{unit} in {scheme}" for unit, scheme in plan.listed)
        return Subject((self._analysis.key, *listed), Opening(kind="artefact", spec=spec))

    def results(self, subjects: Mapping[str, Subject], stage: str, *, resamples: int = RESAMPLES) -> list[TaskResult]:
        """Return the metrics of models on each file of labels; the first is the reference, the float model.

        Args:
            subjects: name -> model to be evaluated.
            stage: name of the stage under which results are stored and shown.
            resamples: number of bootstrap resamples; 0 where only the values count.
        """
        return [self._result(labels, subjects, stage, resamples) for labels in self._labelled]

    def _opened(self, path: Path, data: TaskData) -> _Labelled:
        spec = LabelFile(graph=self._parts.graph, path=str(path.absolute()), fingerprint=data.fingerprint())
        return _Labelled(data, spec.fingerprint, Opening(kind="labels", spec=spec))

    def _result(self, labels: _Labelled, subjects: Mapping[str, Subject], stage: str, resamples: int) -> TaskResult:
        seed, data = self._analysis.settings.seed, labels.data
        samples = data.choose(self._limit, seed)
        keys = {name: self._key(labels, subject) for name, subject in subjects.items()}

        def make() -> bytes:
            judged = {n: self._judged_of(labels, samples, keys[n], subject, stage) for n, subject in subjects.items()}
            return to_json(self._task.measure(judged, data, samples, seed=seed, resamples=resamples))

        key = key_of(seen=keys, resamples=resamples)
        return msgspec.json.decode(self._work.cached(stage, key, make), type=TaskResult)

    def _key(self, labels: _Labelled, subject: Subject) -> str:
        """Of what is observed of a model."""
        analysis = self._analysis
        return key_of(
            model=analysis.graph.info.sha256,
            shapes=analysis.graph.info.inputs,
            subject=subject.identity,
            target=None if subject.identity == self.reference.identity else analysis.target.name,
            labels=labels.fingerprint,
            limit=self._limit,
            seed=analysis.settings.seed,
            runner=analysis.target.runtime.name,
            **analysis.execution,
        )

    def _judged_of(self, labels: _Labelled, samples: Sequence[int], key: str, subject: Subject, stage: str) -> Any:
        """What is known of one model; the last few are kept, and the reference, which is always among them."""
        if key not in self._judged:
            seen = self._seen(labels, samples, key, subject, stage)
            self._judged[key] = self._task.judge(seen, labels.data, samples)
        self._judged[key] = self._judged.pop(key)
        for old in list(self._judged)[:-JUDGED_MODELS]:
            del self._judged[old]
        return self._judged[key]

    def _seen(self, labels: _Labelled, samples: Sequence[int], key: str, subject: Subject, stage: str) -> list[Seen]:
        """Of one model on all samples, from shards where they exist; the model is made where one is missing.

        Of a run without a directory shards are kept in memory.
        """
        parts, analysis = self._parts, self._analysis
        models = {"model": subject.model}
        if labels.data.paired and subject.identity != self.reference.identity:
            models = {"reference": self.reference.model, **models}
        observer = Opening(kind="observer", spec=ObserverParts(graph=parts.graph, labels=labels.opening, models=models))
        jobs = []
        for start in range(0, len(samples), SHARD):
            some = tuple(samples[start : start + SHARD])
            spec = ObservedSamples(observer=observer, samples=some)
            jobs.append(Job(kind="observed", key=key, shard=f"{start:06d}", spec=spec, steps=len(some)))
        held = self._work.executor.contexts.holding(
            (parts.given, analysis.given),
            (parts.graph, analysis.graph),
            (parts.recipe, self._recipe),
            (labels.opening, labels.data),
        )
        kept = self._kept if self._work.store is None else {}
        with self._work.stage(stage, len(samples)) as progress, held:
            missing = [job for job in jobs if (key, job.shard) not in kept]
            for job, raw in zip(missing, self._work.map(missing, progress), strict=True):
                kept[key, job.shard] = raw
        return [seen for job in jobs for seen in unpack_seen(kept[key, job.shard])]


class LabelFile(Record, frozen=True, kw_only=True):
    """Labelled samples for a model."""

    graph: Opening
    """The model, whose inputs and outputs decide the task."""
    path: str
    fingerprint: str
    """Fingerprint that the opened samples must have."""


class ObserverParts(Record, frozen=True, kw_only=True):
    """Arguments of `Observer`."""

    graph: Opening
    """The model in normal form, which tells how its executable model takes a task's feeds."""
    labels: Opening
    models: dict[str, Opening]
    """The executable `model`, and before it the `reference` where observations depend on that."""


class ObservedSamples(Record, frozen=True, kw_only=True):
    """A job of the kind `observed`: what a model does on some labelled samples."""

    observer: Opening
    samples: tuple[int, ...]


def open_labels(spec: LabelFile, contexts: Contexts) -> TaskData:
    """Read labels for a model.

    Raises:
        DataError: the labels have changed, or do not fit the model.
    """
    interface = interface_of(contexts.open(spec.graph))
    task: Task[Any] | None = find_task(interface)
    if task is None:
        raise DataError(f"No task fits the model for which '{spec.path}' has labels.")
    data: TaskData = task.open(Path(spec.path), interface)
    if data.fingerprint() != spec.fingerprint:
        raise DataError(
            f"'{spec.path}' has changed since this job was made. Put the old labels back, or start the run again."
        )
    return data


def open_observer(spec: ObserverParts, contexts: Contexts) -> Observer:
    """Open sessions of the models."""
    graph, data = contexts.open(spec.graph), contexts.open(spec.labels)
    with contexts.inner() as inside:  # once there are sessions, the models are of no use
        models = {name: inside.open(model) for name, model in spec.models.items()}
        return Observer(graph, data, models, contexts.scratch)


def observe_shard(spec: ObservedSamples, contexts: Contexts) -> bytes:
    """Observe the model on the samples; the result is in the format of `pack_seen`."""
    observer: Observer = contexts.open(spec.observer)
    return pack_seen(observer.observe(spec.samples))


class Observer:
    """Sessions of a model, and perhaps of its reference, that run over labelled samples.

    Samples run side by side, each on its part of the cores, where models are small: that gives the same results in less
    time.

    Args:
        graph: the model in normal form.
        data: labelled samples.
        models: name -> model, as a task observes them.
        scratch: folder for the files of large models; None where there are none.
    """

    def __init__(self, graph: Graph, data: TaskData, models: Mapping[str, Artefact], scratch: Path | None) -> None:
        task = find_task(interface_of(graph))
        assert task is not None, "labels are opened by a task"
        self._task, self._graph, self._data = task, graph, data
        streams = 1 if graph.large else min(available_cores(), STREAMS)
        self._sessions: dict[str, Session] = {}
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="scratch-", dir=scratch))
            self._pool = stack.enter_context(ThreadPoolExecutor(streams))
            for name, model in models.items():
                session = model.placed(Path(folder) / name).session(streams=streams)
                stack.callback(session.close)
                self._sessions[name] = session
            self._opened = stack.pop_all()

    def observe(self, samples: Sequence[int]) -> list[Seen]:
        """Run the model on samples, and return what was observed of it on each."""
        models = {name: _for_each_thread(self._graph, session) for name, session in self._sessions.items()}
        found = self._pool.map(lambda i: self._task.observe(models, self._data, i)["model"], samples)
        return list(found)

    def close(self) -> None:
        """Release the sessions' memory and files."""
        self._opened.close()


def _for_each_thread(graph: Graph, session: Session) -> RunModel:
    """A `runner` of its own in every thread: it keeps what belongs to the sample at hand."""
    own = threading.local()

    def run(feeds: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not hasattr(own, "run"):
            own.run = runner(graph, session)
        found: Mapping[str, np.ndarray] = own.run(feeds)
        return found

    return run
