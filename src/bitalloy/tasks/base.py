"""The interface between tasks and the pipeline.

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
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.examples import ClassPrecision, ExampleText
from bitalloy.core.records import Estimate, MetricValue, Record, TensorSpec
from bitalloy.core.store import StageInputs
from bitalloy.core.tabular import Listing, Tabular
from bitalloy.data.images import ImageSpec, file_hash

__all__ = [
    "Interface",
    "Disturb",
    "Judge",
    "Measure",
    "Observe",
    "ObserveAlone",
    "ProgressStep",
    "RunModel",
    "Seen",
    "ShowSample",
    "ShownSample",
    "Task",
    "TaskData",
    "TaskMetric",
    "TaskResult",
    "Tokenizer",
    "few_images",
    "image_input",
    "pack_seen",
    "refuse_fit",
    "unpack_seen",
]

RunModel = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Function from the feeds of one sample to the outputs of a model, in graph order."""
ProgressStep = Callable[[int], None]
"""Function that is called with 1 after each model on each sample."""
Seen = Mapping[str, np.ndarray]
"""Observation of a model on one sample, some kilobytes of arrays, e.g. its detections."""
FEW = 20
"""Number of images below which a note warns that intervals are rough."""


class Tokenizer(Protocol):
    """Converter of text to token ids and back."""

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
        """Return the text of token ids."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A model as a task sees it; for a program of several graphs, its inputs and outputs without a wire."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the ONNX file, e.g. `names` with class names."""
    image: ImageSpec | None = None
    """Preparation of images; None leaves it to the task."""
    tokenizer: Tokenizer | None = None
    """Tokenizer of a language model; None for other models."""


class TaskMetric(Record, frozen=True, kw_only=True):
    """One metric of several models on the same samples."""

    name: str
    """Name of the metric, e.g. `mIoU`."""
    values: dict[str, MetricValue]
    """Model -> value of the metric, the reference first; `n` counts images, 0 where their number is not known."""
    drops: dict[str, Estimate]
    """Model other than the reference -> how much worse it is, with a paired 95 % interval. Above 0 is worse also
    where lower values are better. Empty where the metric has no values of single samples: then its error is unknown."""
    higher_is_better: bool = True
    witness: str = ""
    """Name of the metric of agreement with the reference that tells most about this one; empty where there is none."""
    agreement: bool = False
    """Whether it is a part in 0..1 of what the reference says that a model says too, which needs no labels."""
    draws: dict[str, bytes] = msgspec.field(default_factory=dict)
    """Model other than the reference -> its drop on resamples of the images, (B,) float64; see `drop_draws`."""
    own: bool = False
    """Whether it is a metric of the user's own, which needs no witness to be about more than float's answers."""

    @property
    def against_float(self) -> bool:
        """Whether it compares with the reference, and not with labels."""
        return not self.witness and not self.own

    def drop(self, model: str) -> float:
        """Return how much worse a model is than the reference."""
        reference, *_ = self.values.values()
        sign = 1.0 if self.higher_is_better else -1.0
        return sign * (reference.value - self.values[model].value)

    def drop_draws(self, model: str) -> np.ndarray:
        """Return how much worse a model is on B resamples of the images, (B,); NaN where the metric is undefined."""
        return np.frombuffer(self.draws[model], np.float64)


class TaskResult(Tabular, Record, frozen=True, kw_only=True):
    """Metrics of several models that a task measured."""

    task: str
    metrics: tuple[TaskMetric, ...]
    confidence_shift: dict[str, Estimate] = msgspec.field(default_factory=dict)
    """Model other than the reference -> mean score of matched detections minus the reference's, of detectors only."""
    box_overlap: dict[str, Estimate] = msgspec.field(default_factory=dict)
    """Model other than the reference -> mean IoU of its boxes with the matched ones of the reference, of detectors."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the result must know."""

    def listing(self) -> Listing:
        """Return the metrics as a table: of each model its value, and how much worse it is than the first."""
        columns = ("metric", "model", "value", "low", "high", "samples", "drop", "drop_low", "drop_high")
        rows = []
        for metric in self.metrics:
            for model, value in metric.values.items():
                drop = metric.drops.get(model)
                ends = (None, None, None) if drop is None else (drop.value, drop.low, drop.high)
                rows.append((metric.name, model, value.value, value.low, value.high, value.n, *ends))
        return Listing(self.task, columns, rows)


class TaskData(Protocol):
    """Labelled samples, opened for one model."""

    @property
    def paired(self) -> bool:
        """Whether observations of a model depend on the reference, which then runs on the same samples beside it."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether there are labels, and not images only."""
        ...

    def images(self, samples: Sequence[int]) -> Sequence[Path]:
        """Return the file of the image of each sample."""
        ...

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> StageInputs:
        """Return all that decides metrics on some samples beside the models: equal inputs give equal metrics.

        Args:
            samples: numbers of the samples.
            images: `file_hash` of the file of the image of each sample.
        """
        ...

    def choose(self, limit: int | None, seed: int) -> Sequence[int]:
        """Choose at most `limit` samples, None for all, and return their numbers in ascending order."""
        ...


def image_hashes(data: TaskData, samples: Sequence[int]) -> list[str]:
    """Return `file_hash` of the file of the image of each sample.

    Raises:
        DataError: an image cannot be read.
    """
    return [file_hash(file) for file in data.images(samples)]


DataT = TypeVar("DataT", bound=TaskData)
DataIn = TypeVar("DataIn", bound=TaskData, contravariant=True)


class Observe(Protocol[DataIn]):
    """Function that runs models on one sample."""

    def __call__(self, models: Mapping[str, RunModel], data: DataIn, sample: int, /) -> dict[str, Seen]:
        """Run models on a sample, and return what was observed of each.

        Args:
            models: name -> model, run in this order; where the data is `paired` the first is the reference.
            data: labelled samples.
            sample: one of `data.choose`.
        """
        ...


class ObserveAlone(Protocol[DataIn]):
    """Function that runs one model on one sample for what does not depend on another model."""

    def __call__(self, model: RunModel, data: DataIn, sample: int, /) -> Seen:
        """Run a model on a sample, one of `data.choose`, and return what was observed."""
        ...


class Judge(Protocol[DataIn]):
    """Function that judges one model without the others."""

    def __call__(self, seen: Sequence[Seen], data: DataIn, samples: Sequence[int], /) -> Any:
        """Match the observations of one model with the labels; the result is an argument of `Measure`."""
        ...


class Disturb(Protocol):
    """Function that changes an observation a little, as careful rounding of the model would."""

    def __call__(self, seen: Seen, rng: np.random.Generator, /) -> Seen:
        """Return another observation of the same sample."""
        ...


class Measure(Protocol[DataIn]):
    """Function that computes the metrics of judged models."""

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
        """Compute the metrics of several models side by side.

        Args:
            judged: name -> judged model; the first is the reference.
            data: labelled samples.
            samples: numbers of the observed samples.
            seed: seed of the bootstrap.
            resamples: number of bootstrap resamples; with 0 the intervals have no width.
        """
        ...


def as_seen(seen: Sequence[Seen], _: TaskData, __: Sequence[int], /) -> Sequence[Seen]:
    """Return the observations as they are, for tasks that judge models only beside others."""
    return seen


def nothing_alone(_: RunModel, __: TaskData, ___: int, /) -> Seen:
    """Return no observation, for tasks whose `observe` says all."""
    return {}


@dataclass(frozen=True, slots=True)
class ShownSample:
    """What two models show on one sample."""

    reference: Image.Image
    """Thumbnail with what the reference shows on it."""
    other: Image.Image | None
    """The same of the other model; None where the image says nothing of either, and the texts all."""
    texts: tuple[ExampleText, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowSample(Generic[DataIn]):
    """How a task shows what two models do on one sample, from what was observed."""

    measure: str
    """What `agree` returns, in words."""
    agree: Callable[[Seen, Seen], float]
    """Function that returns how far a model agrees with the reference, in 0..1: 1 where they do the same."""
    draw: Callable[[Image.Image, Seen, Seen, DataIn, int], ShownSample]
    """Function of the image of a sample, what was observed of the reference and the model, the data and the sample."""
    classes: Callable[[Any, Any, DataIn, int], tuple[ClassPrecision, ...]] | None = None
    """Function of two judged models, the data and a seed that returns the precision of each class; None without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[DataT]):
    """A task as the pipeline sees it."""

    name: str
    labels: str
    """Description of the labels that `open` takes."""
    matches: Callable[[Interface], bool]
    """Function that tells whether a model looks like one for this task."""
    open: Callable[[Path, Interface], DataT]
    """Function that reads labels for a matching model; it raises DataError where they are broken or do not fit."""
    observe: Observe[DataT]
    measure: Measure[DataT]
    disturb: Disturb | None
    """Function that disturbs what was observed, which tells what samples resolve; None where none is known."""
    disturbance: str
    """What `disturb` does, in words."""
    judge: Judge[DataT] = as_seen
    """Function that judges one model; by default it returns the observations themselves."""
    alone: ObserveAlone[DataT] = nothing_alone
    """Function whose observations are added to those of `observe`; not for one that only runs beside another model."""
    show: ShowSample[DataT] | None = None
    """How single samples are shown; None where they cannot be."""
    plain: bool = False
    """Whether it runs models by their own inputs and outputs, on one sample after the other, each with all cores."""

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
            models: name -> model; the first is the reference.
            data: labelled samples.
            limit: largest number of images; None takes all.
            seed: seed of the choice of images and of the bootstrap.
            progress: called with 1 after each run of a model.

        Raises:
            DataError: there is no model, or models, labels and samples do not fit each other.
        """
        if not models:
            raise DataError("No model to evaluate. Give at least one; the first is the reference.")
        samples = data.choose(limit, seed)
        seen: dict[str, list[Seen]] = {name: [] for name in models}
        for sample in samples:
            for name, one in self.observe(models, data, sample).items():
                seen[name].append({**one, **self.alone(models[name], data, sample)})
                if progress is not None:
                    progress(1)
        judged = {name: self.judge(one, data, samples) for name, one in seen.items()}
        return self.measure(judged, data, samples, seed=seed)


def pack_seen(seen: Sequence[Seen]) -> bytes:
    """Serialize observations of some samples as an .npz without pickled objects."""
    buffer = io.BytesIO()
    arrays = {f"{i}/{name}": value for i, one in enumerate(seen) for name, value in one.items()}
    np.savez(buffer, count=np.array(len(seen)), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack_seen(data: bytes) -> list[Seen]:
    """Read the observations that `pack_seen` serialized."""
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


def refuse_fit(image: ImageSpec, why: str) -> None:
    """Refuse a way of fitting images that the task does not know.

    Raises:
        DataError: images are not stretched; the message says `why` they must be.
    """
    if image.fit != "stretch":
        raise DataError(f"Images are fitted by '{image.fit}', but {why}. Leave out --fit, or --eval.")


def few_images(n: int) -> tuple[str, ...]:
    """Return a note that intervals are rough where `n` images are few, else nothing."""
    return (f"Intervals rest on {n} images only and are rough.",) if n < FEW else ()
