"""What the pipeline needs to know of any task.

A task recognises its models by their inputs and outputs, opens labels for one, and measures several models on the
same labelled samples. A model is a function from feeds to outputs: a session's `run`, or several graphs wired
together behind one function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import numpy as np

from bitalloy.data import ImageSpec
from bitalloy.errors import DataError
from bitalloy.records import Estimate, MetricValue, Record, TensorSpec

__all__ = [
    "Evaluate",
    "Interface",
    "Progress",
    "Run",
    "Task",
    "TaskData",
    "TaskMetric",
    "TaskResult",
    "Tokenizer",
    "check_models",
    "few_images",
    "image_input",
    "nothing",
]

Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Feeds of one sample -> outputs in graph order."""
Progress = Callable[[int], None]
"""Told 1 after each model on each sample."""
FEW = 20
"""Images below which a note warns that intervals are rough."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def bos(self) -> int | None:
        """Id that starts a text; None where there is none."""
        ...

    @property
    def eos(self) -> int:
        """Id that ends a text."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text, without those that start and end it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A model as a task sees it: of several graphs, what is fed from outside and what comes out at the end."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the ONNX file, e.g. `names` with class names."""
    image: ImageSpec | None = None
    """How images are prepared, where that is known; else the task's own way."""
    tokenizer: Tokenizer | None = None
    """Of a language model."""


class TaskMetric(Record, frozen=True, kw_only=True):
    """One metric of several models on the same samples."""

    name: str
    """E.g. `mIoU`."""
    values: dict[str, MetricValue]
    """By model, the reference first; `n` counts images."""
    drops: dict[str, Estimate]
    """By model other than the reference: how much worse it is, with a paired 95 % interval. Above 0 is worse also
    where lower values are better."""
    higher_is_better: bool = True


class TaskResult(Record, frozen=True, kw_only=True):
    """What a task measured."""

    task: str
    metrics: tuple[TaskMetric, ...]
    confidence_shift: dict[str, Estimate] = msgspec.field(default_factory=dict)
    """By model other than the reference: mean score of matched detections minus the reference's; detectors only."""
    notes: tuple[str, ...] = ()
    """What a reader must know."""


class TaskData(Protocol):
    """Labelled samples, opened for one model."""

    def fingerprint(self) -> str:
        """SHA-256 over labels, names and preprocessing, hexadecimal: equal for data that gives equal metrics."""
        ...


DataT = TypeVar("DataT", bound=TaskData)
DataIn = TypeVar("DataIn", bound=TaskData, contravariant=True)


class Evaluate(Protocol[DataIn]):
    """Measure models on the same samples."""

    def __call__(
        self,
        models: Mapping[str, Run],
        data: DataIn,
        /,
        *,
        limit: int | None = None,
        seed: int = 0,
        progress: Progress = ...,
    ) -> TaskResult:
        """Run every model on every sample, one sample after the other.

        Args:
            models: by name; the first is the reference.
            data: labelled samples.
            limit: largest number of images; None takes all.
            seed: of the choice of images and of the bootstrap.
            progress: told about each run.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[DataT]):
    """A task as the pipeline sees it."""

    name: str
    labels: str
    """What `open` takes, in words."""
    matches: Callable[[Interface], bool]
    """Whether a model looks like one for this task."""
    open: Callable[[Path, Interface], DataT]
    """Read labels for a model that matches. Raises DataError where they are broken or do not fit."""
    evaluate: Evaluate[DataT]


def nothing(_: int) -> None:
    """Progress that is not shown."""


def image_input(model: Interface) -> TensorSpec | None:
    """The input (batch, 3, h, w) that takes an image."""
    return next((i for i in model.inputs if len(i.shape) == 4 and i.shape[1] == 3), None)


def few_images(n: int) -> tuple[str, ...]:
    """A note where intervals rest on few images."""
    return (f"Intervals rest on {n} images only and are rough.",) if n < FEW else ()


def check_models(models: Mapping[str, Run]) -> None:
    """Raise where there is nothing to measure."""
    if not models:
        raise DataError("No model to evaluate. Give at least one; the first is the reference.")
