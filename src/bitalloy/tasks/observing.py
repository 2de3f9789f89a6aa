"""Models that run over labelled samples: opening labels, and the jobs that observe what a model does on them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.jobs import Contexts, Opening
from bitalloy.core.ownership import temporary
from bitalloy.core.records import Record
from bitalloy.core.store import key_of
from bitalloy.data.images import ImageSpec
from bitalloy.model.load import Graph
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Session
from bitalloy.runtime.ort import available_cores
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import RunModel, Seen, Task, TaskData, image_hashes, image_input, pack_seen
from bitalloy.tasks.open import interface_of, runner
from bitalloy.tasks.own import OwnData

STREAMS = 4
"""Largest number of samples that are in memory at the same time."""


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
        task = data.task if isinstance(data, OwnData) else find_task(interface_of(graph))
        assert task is not None, "labels are opened by a task"
        self._task, self._graph, self._data = task, graph, data
        streams = 1 if graph.large or task.plain else min(available_cores(), STREAMS)
        self._sessions: dict[str, Session] = {}
        with ExitStack() as stack:
            folder = stack.enter_context(temporary(scratch))
            self._pool = stack.enter_context(ThreadPoolExecutor(streams))
            for name, model in models.items():
                session = model.placed(Path(folder) / name).session(streams=streams)
                stack.callback(session.close)
                self._sessions[name] = session
            self._opened = stack.pop_all()

    def observe(self, samples: Sequence[int]) -> list[Seen]:
        """Run the model on samples, and return what was observed of it on each."""
        models: dict[str, RunModel] = {
            name: session.run if self._task.plain else _for_each_thread(self._graph, session)
            for name, session in self._sessions.items()
        }

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
