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
from bitalloy.core.outcome import Resolution
from bitalloy.core.records import Record, TensorSpec
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import Dataset, Samples, drawn_order
from bitalloy.data.images import ImageSpec, file_hash
from bitalloy.model.graphs.again import graph_opening
from bitalloy.model.load import Graph
from bitalloy.rewrite.calibrated import ArtefactParts, Environment, ExecutedNetwork
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Session
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets.recipe import recipe_opening
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import (
    RunModel,
    Seen,
    Task,
    TaskData,
    TaskResult,
    image_hashes,
    image_input,
    pack_seen,
    unpack_seen,
)
from bitalloy.tasks.bootstrap import RESAMPLES
from bitalloy.tasks.open import interface_of, runner
from bitalloy.tasks.resolution import DISTURBANCES, RESAMPLES_EACH, resolution_of

SHARD = 32
"""Number of samples whose observations are stored together."""
STREAMS = 4
"""Largest number of samples that are in memory at the same time."""
UNLABELLED, LEAST_UNSEEN = 32, 8
"""Number of images without labels that are evaluated where no limit is given, and the number of them that the analysis
has not seen below which those that it has seen are taken too."""
JUDGED_MODELS = 4
"""Largest number of models whose judgements stay in memory: those that were used last."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    plan: tuple[tuple[str, str], ...] | None
    """Pairs of unit and scheme; None for the float model."""
    model: Opening
    """Plain data from which a job makes the model."""


@dataclass(frozen=True)
class _Labelled:
    """Labelled samples, with the plain data from which jobs open them."""

    data: TaskData
    samples: Sequence[int]
    """Samples that are evaluated."""
    images: Sequence[str]
    """SHA-256 of the image of each of them."""
    fingerprint: str
    opening: Opening

    def shards(self) -> list[tuple[int, ...]]:
        """Return the samples in shards of about `SHARD`, each spread over all of them, so that any few are typical."""
        count = max(1, -(-len(self.samples) // SHARD))
        return [tuple(self.samples[start::count]) for start in range(count)]


class ObservationInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides what is observed of a model."""

    given: str
    """Identity of the float model, which is the reference, see `Graph.identity`."""
    shapes: tuple[TensorSpec, ...]
    network: ExecutedNetwork | None
    """The network that is rounded; None for the float model."""
    plan: tuple[tuple[str, str], ...] | None
    """Pairs of unit and scheme; None for the float model."""
    labels: str
    """Key of the labelled samples, see `TaskData.inputs`."""
    environment: Environment


class ResultInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metrics of models side by side."""

    seen: tuple[tuple[str, ObservationInputs], ...]
    """Names of the models with what is observed of them; the first is the reference."""
    shards: int
    """Number of shards that are evaluated."""
    resamples: int
    seed: int
    """Seed of the bootstrap."""


class ResolutionInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides what labelled samples can resolve."""

    seen: ObservationInputs
    disturbance: str
    """What is done to the answers of the float model."""
    repeats: int
    resamples: int
    seed: int


class Evaluator:
    """Runs models over labelled samples, each at most once, and compares them.

    Args:
        analysis: analysis of the model.
        labels: labels for the model's task.
        limit: largest number of samples that are evaluated; None for all.
        work: where results are stored and progress is shown.
        image: how images are prepared; None takes what the model's file says, or else the task's own.

    Raises:
        DataError: the labels are broken, no task fits the model, or two files measure the same metrics.
    """

    def __init__(
        self,
        analysis: Analysis,
        labels: Sequence[Path],
        limit: int | None,
        work: Workspace,
        image: ImageSpec | None = None,
    ) -> None:
        self._analysis, self._limit, self._work, self._image = analysis, limit, work, image
        self._task, opened = open_labelled(analysis.graph, labels, image)
        self._kept: dict[tuple[str, str], bytes] = {}
        self._judged: dict[tuple[str, int], Any] = {}
        self._recipe = analysis.recipe()
        self._parts = ArtefactParts(
            graph=graph_opening(analysis.graph),
            given=graph_opening(analysis.given),
            recipe=recipe_opening(self._recipe),
            schemes=None,
        )
        self._labelled = [self._opened(path, data) for path, data in zip(labels, opened, strict=True)]

    @property
    def reference(self) -> Subject:
        """The float model, as a subject of evaluation."""
        return Subject(None, Opening(kind="artefact", spec=self._parts))

    def subject(self, plan: Plan) -> Subject:
        """Return the model of a plan as a subject; it is made when it is needed."""
        spec = msgspec.structs.replace(self._parts, schemes=dict(plan.listed))
        return Subject(tuple(plan.listed), Opening(kind="artefact", spec=spec))

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of shards of images, each three times the one before and the last one all, for growing batches."""
        most = max(len(labels.shards()) for labels in self._labelled)
        return (*(n for n in (3**i for i in range(9)) if n < most), most)

    def results(
        self, subjects: Mapping[str, Subject], stage: str, *, resamples: int = RESAMPLES, shards: int | None = None
    ) -> list[TaskResult]:
        """Return the metrics of models on each file of labels; the first is the reference, the float model.

        Args:
            subjects: name -> model to be evaluated.
            stage: name of the stage under which results are stored and shown.
            resamples: number of bootstrap resamples; 0 where only the values count.
            shards: number of shards of images that are evaluated; None for all.
        """
        return [self._result(labels, subjects, stage, resamples, shards) for labels in self._labelled]

    def resolution(self) -> tuple[Resolution, ...]:
        """Estimate what the images can resolve, from the float model alone; nothing for images without labels."""
        return tuple(one for labels in self._labelled for one in self._resolved(labels))

    @property
    def notes(self) -> tuple[str, ...]:
        """Say which evaluated images the analysis has seen too, by their content."""
        found, parts = [], self._analysis.parts
        for labels in self._labelled:
            evaluated = set(labels.images)
            shared = {
                name: len(evaluated & _hashes(self._analysis.data, part))
                for name, part in {
                    "calibration": parts.calibration,
                    "probing": parts.probe,
                    "verification": parts.verification,
                }.items()
            }
            told = " and ".join(f"{count} in {name}" for name, count in shared.items() if count)
            if told:
                found.append(
                    f"Of the {len(evaluated)} images that were evaluated, the analysis has seen some too: {told}. "
                    "On these the rounded models are not measured on unseen data."
                )
        return tuple(found)

    def _opened(self, path: Path, data: TaskData) -> _Labelled:
        samples = self._chosen(data)
        images = image_hashes(data, samples)
        spec = LabelFile(
            graph=self._parts.graph,
            path=str(path.absolute()),
            image=self._image,
            samples=tuple(samples),
            fingerprint=key_of(data.inputs(samples, images)),
        )
        return _Labelled(data, samples, images, spec.fingerprint, Opening(kind="labels", spec=spec))

    def _chosen(self, data: TaskData) -> list[int]:
        """Choose the samples; without labels some of those that the analysis has not seen, where there are enough."""
        seed = self._analysis.settings.seed
        every = list(data.choose(self._limit if data.labelled else None, seed))
        if data.labelled:
            return every
        parts, count = self._analysis.parts, self._limit or UNLABELLED
        known = _hashes(self._analysis.data, (*parts.calibration, *parts.probe, *parts.verification))
        unseen = [i for i, image in zip(every, image_hashes(data, every), strict=True) if image not in known]
        usable = unseen if len(unseen) >= LEAST_UNSEEN else every
        return sorted(usable[i] for i in drawn_order([str(i) for i in usable], seed)[:count])

    def _result(
        self, labels: _Labelled, subjects: Mapping[str, Subject], stage: str, resamples: int, shards: int | None
    ) -> TaskResult:
        seed, used = self._analysis.settings.seed, labels.shards()[:shards]
        samples = sorted(sample for shard in used for sample in shard)
        seen = {name: self._inputs(labels, subject) for name, subject in subjects.items()}

        def make() -> bytes:
            judged = {
                name: self._judged_of(labels, used, key_of(seen[name]), subject, stage)
                for name, subject in subjects.items()
            }
            return to_json(self._task.measure(judged, labels.data, samples, seed=seed, resamples=resamples))

        inputs = ResultInputs(seen=tuple(seen.items()), shards=len(used), resamples=resamples, seed=seed)
        return msgspec.json.decode(self._work.cached(stage, inputs, make), type=TaskResult)

    def _resolved(self, labels: _Labelled) -> tuple[Resolution, ...]:
        inputs, seed = self._inputs(labels, self.reference), self._analysis.settings.seed

        def make() -> bytes:
            seen = self._seen(labels, labels.shards(), key_of(inputs), self.reference, "resolution")
            return to_json(resolution_of(self._task, seen, labels.data, labels.samples, seed=seed))

        told = self._task.disturbance
        known = ResolutionInputs(
            seen=inputs, disturbance=told, repeats=DISTURBANCES, resamples=RESAMPLES_EACH, seed=seed
        )
        return msgspec.json.decode(self._work.cached("resolution", known, make), type=tuple[Resolution, ...])

    def _inputs(self, labels: _Labelled, subject: Subject) -> ObservationInputs:
        """Collect all that decides what is observed of a model."""
        analysis = self._analysis
        return ObservationInputs(
            given=analysis.given.identity,
            shapes=analysis.graph.info.inputs,
            network=None if subject.plan is None else analysis.executed,
            plan=subject.plan,
            labels=labels.fingerprint,
            environment=analysis.environment,
        )

    def _judged_of(
        self, labels: _Labelled, shards: Sequence[tuple[int, ...]], key: str, subject: Subject, stage: str
    ) -> Any:
        """What is known of one model; the last few are kept, and the reference, which is always among them."""
        known = (key, len(shards))
        if known not in self._judged:
            samples = sorted(sample for shard in shards for sample in shard)
            self._judged[known] = self._task.judge(
                self._seen(labels, shards, key, subject, stage), labels.data, samples
            )
        self._judged[known] = self._judged.pop(known)
        for old in list(self._judged)[:-JUDGED_MODELS]:
            del self._judged[old]
        return self._judged[known]

    def _seen(
        self, labels: _Labelled, shards: Sequence[tuple[int, ...]], key: str, subject: Subject, stage: str
    ) -> list[Seen]:
        """Of one model on the samples of some shards, in their order; the model is made where a shard is missing.

        Of a run without a directory shards are kept in memory.
        """
        parts, analysis = self._parts, self._analysis
        models = {"model": subject.model}
        if labels.data.paired and subject.plan is not None:
            models = {"reference": self.reference.model, **models}
        observer = Opening(kind="observer", spec=ObserverParts(graph=parts.graph, labels=labels.opening, models=models))
        jobs = []
        for number, some in enumerate(shards):
            spec = ObservedSamples(observer=observer, samples=some)
            jobs.append(Job(kind="observed", key=key, shard=f"{number:06d}", spec=spec, steps=len(some)))
        held = self._work.executor.contexts.holding(
            (parts.given, analysis.given),
            (parts.graph, analysis.graph),
            (parts.recipe, self._recipe),
            (labels.opening, labels.data),
        )
        kept = self._kept if self._work.store is None else {}
        with self._work.stage(stage, sum(map(len, shards))) as progress, held:
            missing = [job for job in jobs if (key, job.shard) not in kept]
            for job, raw in zip(missing, self._work.map(missing, progress), strict=True):
                kept[key, job.shard] = raw
        found = {
            sample: seen
            for job, some in zip(jobs, shards, strict=True)
            for sample, seen in zip(some, unpack_seen(kept[key, job.shard]), strict=True)
        }
        return [found[sample] for sample in sorted(found)]


def _hashes(data: Dataset, samples: Sequence[int]) -> frozenset[str]:
    """Hashes of the files of some samples."""
    return frozenset(file_hash(file) for sample in samples for file in _files(data, sample))


def _files(data: Dataset, sample: int) -> tuple[Path, ...]:
    return data.files(sample) if isinstance(data, Samples) else ()


def open_labelled(
    graph: Graph, labels: Sequence[Path], image: ImageSpec | None = None
) -> tuple[Task[Any], list[TaskData]]:
    """Find the task of a model, and open labels for it.

    Args:
        graph: the model.
        labels: files or folders of labels, each of another kind.
        image: how images are prepared; None takes what the model's file says, or else the task's own.

    Raises:
        DataError: the labels are broken, no task fits the model, or two files measure the same metrics.
    """
    known = interface_of(graph, image)
    picture = image_input(known)
    if picture is not None and isinstance(picture.shape[0], int) and picture.shape[0] > 1:
        raise DataError(
            f"Labels are evaluated one image at a time, but '{picture.name}' takes {picture.shape[0]}. Leave out "
            "--eval, or export the model with a batch of 1."
        )
    task: Task[Any] | None = find_task(known)
    if task is None:
        outputs = [list(o.shape) for o in graph.info.outputs]
        raise DataError(
            f"No task metric fits this model with outputs {outputs}. Box AP needs a detector with output (1, 4 + "
            f"classes, n); the tasks are {', '.join(t.name for t in TASKS)}. Leave out --eval."
        )
    opened = [task.open(path, known) for path in labels]
    of_kind: dict[type, Path] = {}
    for path, data in zip(labels, opened, strict=True):
        if type(data) in of_kind:
            raise DataError(
                f"'{of_kind[type(data)]}' and '{path}' both hold labels for the same metrics of task '{task.name}', "
                "of which a run has one value each. Give one --eval of a kind, or join the files."
            )
        of_kind[type(data)] = path
    return task, opened


class LabelFile(Record, frozen=True, kw_only=True):
    """Labelled samples for a model."""

    graph: Opening
    """The model, whose inputs and outputs decide the task."""
    path: str
    image: ImageSpec | None
    """How images are prepared; None takes what the model's file says, or else the task's own."""
    samples: tuple[int, ...]
    """Samples that are evaluated."""
    fingerprint: str
    """Key that the `TaskData.inputs` of these samples must have."""


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
    _, (data,) = open_labelled(contexts.open(spec.graph), [Path(spec.path)], spec.image)
    if key_of(data.inputs(spec.samples, image_hashes(data, spec.samples))) != spec.fingerprint:
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

        def observe(sample: int) -> Seen:
            found = self._task.observe(models, self._data, sample)["model"]
            return {**found, **self._task.alone(models["model"], self._data, sample)}

        return list(self._pool.map(observe, samples))

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
