"""Evaluation of task metrics of several models on labelled samples.

What a task observes of a model on the labelled samples is stored, and metrics are computed from it: over a whole run,
no model is executed on a sample twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.examples import Examples
from bitalloy.core.jobs import Job, Opening, Resident
from bitalloy.core.outcome import Resolution
from bitalloy.core.records import TensorSpec
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import Dataset, Samples, drawn_order
from bitalloy.data.images import ImageSpec, file_hash
from bitalloy.model.graphs.again import graph_opening
from bitalloy.rewrite.calibrated import ArtefactParts, Environment, ExecutedNetwork
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets.recipe import recipe_opening
from bitalloy.tasks.base import Seen, Task, TaskData, TaskResult, image_hashes, unpack_seen
from bitalloy.tasks.bootstrap import RESAMPLES
from bitalloy.tasks.observing import LabelFile, ObservedSamples, ObserverParts, open_labelled
from bitalloy.tasks.own import OwnData
from bitalloy.tasks.resolution import DISTURBANCES, RESAMPLES_EACH, resolution_of
from bitalloy.tasks.shown import examples_of

SHARD = 32
"""Number of samples whose observations are stored together."""
UNLABELLED, LEAST_UNSEEN = 32, 8
"""Number of images without labels that are evaluated where nothing is decided by them, and the number of unseen ones
below which those that the analysis has seen are taken too."""
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
        labels: labels for the model's task, or what a metric of the user's own is measured on.
        limit: largest number of samples that are evaluated; None for all.
        work: where results are stored and progress is shown.
        image: how images are prepared; None takes what the model's file says, or else the task's own.
        deciding: whether a limit rests on the evaluation, so that images without labels are not few either.

    Raises:
        DataError: the labels are broken, no task fits the model, or two files measure the same metrics.
    """

    def __init__(
        self,
        analysis: Analysis,
        labels: Sequence[Path] | OwnData,
        limit: int | None,
        work: Workspace,
        image: ImageSpec | None = None,
        *,
        deciding: bool = False,
    ) -> None:
        self._analysis, self._limit, self._work, self._image = analysis, limit, work, image
        self._unlabelled = None if deciding else UNLABELLED
        self._kept: dict[tuple[str, str], bytes] = {}
        self._judged: dict[tuple[str, int], Any] = {}
        self._recipe = analysis.recipe()
        self._parts = ArtefactParts(
            graph=graph_opening(analysis.graph),
            given=graph_opening(analysis.given),
            recipe=recipe_opening(self._recipe),
            schemes=None,
        )
        if isinstance(labels, OwnData):
            self._task: Task[Any] = labels.task
            self._labelled = [self._own(labels)]
        else:
            self._task, opened = open_labelled(analysis.graph, labels, image)
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
        if self._task.disturb is None:
            return ()
        return tuple(one for labels in self._labelled for one in self._resolved(labels))

    def examples(self, plan: Plan) -> Examples | None:
        """Show the samples on which the model of a plan agrees least with the float model.

        What `results` observed is not executed again. Of several files of labels the first is shown.

        Returns:
            Pictures and texts; None where the task cannot show its samples.
        """
        if self._task.show is None:
            return None
        labels = self._labelled[0]
        shards = labels.shards()
        seen, judged = [], []
        for subject in (self.reference, self.subject(plan)):
            key = key_of(self._inputs(labels, subject))
            seen.append(self._seen(labels, shards, key, subject, "evaluate"))
            judged.append(self._judged_of(labels, shards, key, subject, "evaluate"))
        pairs = (seen[0], seen[1]), (judged[0], judged[1])
        return examples_of(self._task, labels.data, sorted(labels.samples), *pairs, self._analysis.settings.seed)

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

    def _own(self, data: OwnData) -> _Labelled:
        samples = list(data.choose(self._limit, self._analysis.settings.seed))
        images = image_hashes(data, samples)
        key = key_of(data.inputs(samples, images))
        spec = Resident(what=f"the metric '{data.metric.title}'", key=key)
        return _Labelled(data, samples, images, key, Opening(kind="resident", spec=spec))

    def _chosen(self, data: TaskData) -> list[int]:
        """Choose the samples; without labels some of those that the analysis has not seen, where there are enough."""
        seed = self._analysis.settings.seed
        every = list(data.choose(self._limit if data.labelled else None, seed))
        if data.labelled:
            return every
        parts, count = self._analysis.parts, self._limit or self._unlabelled
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
