"""What the pipeline needs to know of any task.

A task recognises its models by their inputs and outputs and opens labels for one. It observes models on one labelled
sample at a time, and measures several models by what was observed of them. What is observed is small and says all that
metrics need, so that a model is executed once however often it is compared. A model is a function from feeds to
outputs: a session's `run`, or several graphs wired together behind one function.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.records import Estimate, MetricValue, Record, TensorSpec
from bitalloy.data.images import ImageSpec

__all__ = [
    "Interface",
    "Judge",
    "Measure",
    "Observe",
    "ProgressStep",
    "RunModel",
    "Seen",
    "Task",
    "TaskData",
    "TaskMetric",
    "TaskResult",
    "Tokenizer",
    "few_images",
    "image_input",
    "pack_seen",
    "unpack_seen",
]

RunModel = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Feeds of one sample -> outputs in graph order."""
ProgressStep = Callable[[int], None]
"""Told 1 after each model on each sample."""
Seen = Mapping[str, np.ndarray]
"""What is kept of a model's outputs on one sample, e.g. its detections: some kilobytes."""
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
        """Return the token ids of a text, without those that start and end it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return text of token ids."""
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

    @property
    def paired(self) -> bool:
        """Whether what is observed of a model depends on the reference, which then runs beside it."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over labels, names and preprocessing, hexadecimal: equal for data that gives equal metrics."""
        ...

    def choose(self, limit: int | None, seed: int) -> Sequence[int]:
        """Return numbers of at most `limit` samples, ascending; None takes all."""
        ...


DataT = TypeVar("DataT", bound=TaskData)
DataIn = TypeVar("DataIn", bound=TaskData, contravariant=True)


class Observe(Protocol[DataIn]):
    """Run models on one sample."""

    def __call__(self, models: Mapping[str, RunModel], data: DataIn, sample: int, /) -> dict[str, Seen]:
        """What each model does on a sample.

        Args:
            models: by name, run in this order; where the data is `paired` the first is the reference.
            data: labelled samples.
            sample: one of `data.choose`.
        """
        ...


class Judge(Protocol[DataIn]):
    """What can be said of a model without the others."""

    def __call__(self, seen: Sequence[Seen], data: DataIn, samples: Sequence[int], /) -> Any:
        """Match what was observed of one model with the labels; what `measure` takes."""
        ...


class Measure(Protocol[DataIn]):
    """Metrics of models that were judged."""

    def __call__(
        self,
        judged: Mapping[str, Any],
        data: DataIn,
        samples: Sequence[int],
        /,
        *,
        seed: int = ...,
        resamples: int = ...,
    ) -> TaskResult:
        """Put models side by side.

        Args:
            judged: by name, the first of them the reference.
            data: labelled samples.
            samples: which of them were observed.
            seed: of the bootstrap.
            resamples: its draws; with 0 the intervals have no width.
        """
        ...


def as_seen(seen: Sequence[Seen], _: TaskData, __: Sequence[int], /) -> Sequence[Seen]:
    """All that is said of a model is said beside the others."""
    return seen


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
    observe: Observe[DataT]
    measure: Measure[DataT]
    judge: Judge[DataT] = as_seen
    """By default what was observed itself."""

    def evaluate(
        self,
        models: Mapping[str, RunModel],
        data: DataT,
        *,
        limit: int | None = None,
        seed: int = 0,
        progress: ProgressStep | None = None,
    ) -> TaskResult:
        """Observe models on the same samples, one sample after the other, and measure them.

        Args:
            models: by name; the first is the reference.
            data: labelled samples.
            limit: largest number of images; None takes all.
            seed: of the choice of images and of the bootstrap.
            progress: told about each run.

        Raises:
            DataError: no model, or models, labels and samples do not fit each other.
        """
        if not models:
            raise DataError("No model to evaluate. Give at least one; the first is the reference.")
        samples = data.choose(limit, seed)
        seen: dict[str, list[Seen]] = {name: [] for name in models}
        for sample in samples:
            for name, one in self.observe(models, data, sample).items():
                seen[name].append(one)
                if progress is not None:
                    progress(1)
        judged = {name: self.judge(one, data, samples) for name, one in seen.items()}
        return self.measure(judged, data, samples, seed=seed)


def pack_seen(seen: Sequence[Seen]) -> bytes:
    """Return what was observed on some samples as an .npz without pickled objects."""
    buffer = io.BytesIO()
    arrays = {f"{i}/{name}": value for i, one in enumerate(seen) for name, value in one.items()}
    np.savez(buffer, count=np.array(len(seen)), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack_seen(data: bytes) -> list[Seen]:
    """The inverse of `pack_seen`."""
    with np.load(io.BytesIO(data)) as arrays:
        found: list[dict[str, np.ndarray]] = [{} for _ in range(int(arrays["count"]))]
        for key in arrays.files:
            if key != "count":
                number, name = key.split("/", 1)
                found[int(number)][name] = arrays[key]
    return list(found)


def image_input(model: Interface) -> TensorSpec | None:
    """Return the input (batch, 3, h, w) that takes an image."""
    return next((i for i in model.inputs if len(i.shape) == 4 and i.shape[1] == 3), None)


def few_images(n: int) -> tuple[str, ...]:
    """Return a note where intervals rest on few images."""
    return (f"Intervals rest on {n} images only and are rough.",) if n < FEW else ()
