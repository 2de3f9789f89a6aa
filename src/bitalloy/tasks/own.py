"""Metrics of the user's own: a function of a session, or of predictions and labels.

Both are tasks like the built-in ones. A function of a session gives one number for a whole model, of which no error is
known. A function of predictions and labels gives one for every sample, from which the paired bootstrap tells how far
the drop can be trusted.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.plain import one_line
from bitalloy.core.records import MetricValue, TensorSpec
from bitalloy.core.store import StageInputs
from bitalloy.data.arrays import Feeds, read_arrays
from bitalloy.data.handed import Preprocess, handed_samples, store_feeds
from bitalloy.model.load import Graph
from bitalloy.tasks.base import RunModel, Seen, Task, TaskMetric, TaskResult, few_images
from bitalloy.tasks.bootstrap import RESAMPLES, compare_models, ratio_of_sums, resampled_weights
from bitalloy.tasks.own_code import code_digest, content_digest


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric of your own, measured on the float, the lowest and the mixed model in the same way.

    Its values are kept in the run directory under the hash of the file (or, without one, the code) that defines the
    function, and of the labels. What else the function reads, such as files, is not seen: give that a `version`.
    """

    function: Callable[..., float | Mapping[str, float]]
    """Without `labels` a function of a session (`OwnSession`), else of (predictions, labels) of one sample: the output
    of the model as an array, or of several outputs a dict of arrays, with the batch of the model as first axis, and
    labels as arrays. It returns a number, or several by name."""
    labels: object = None
    """Labelled samples, as (inputs, labels) or dicts with further keys: a list, generator, DataLoader or data set."""
    name: str = ""
    """Name of the metric where the function returns a number; by default that of the function."""
    higher_is_better: bool = True
    """Whether more is better; False for errors and losses."""
    version: str = ""
    """Anything that tells apart what the hash does not see, such as the date of the data that the function reads."""

    @property
    def title(self) -> str:
        """Name of a number that the function returns."""
        named = getattr(self.function, "__name__", type(self.function).__name__)
        return self.name or ("metric" if named == "<lambda>" else named)


@dataclass(frozen=True)
class OwnArgument:
    """An input or output of a session, as ONNX Runtime describes one."""

    name: str
    shape: list[int | str | None]
    """Sizes; an open first one is its name, or None without one."""
    type: str
    """Type in ONNX Runtime's words, e.g. `tensor(float)`."""


class OwnSession:
    """A model as an `onnxruntime.InferenceSession` shows it, whatever runtime executes it.

    It runs at the sizes of the samples. Where the model's file leaves the first size open, several batches may be fed
    at once; they run one after the other.

    Args:
        run: function from feeds to outputs.
        inputs: inputs of the model, their sizes known.
        outputs: outputs of the model.
        open_batch: name of the first size, by input, where the file leaves it open.
    """

    def __init__(
        self,
        run: RunModel,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        open_batch: Mapping[str, str] | None = None,
    ) -> None:
        self._run, self._inputs, self._outputs, self._open = run, inputs, outputs, open_batch or {}

    def get_inputs(self) -> list[OwnArgument]:
        """Return the inputs."""
        return [self._argument(i, self._open.get(i.name)) for i in self._inputs]

    def get_outputs(self) -> list[OwnArgument]:
        """Return the outputs, in graph order."""
        return [self._argument(o, None) for o in self._outputs]

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: object = None
    ) -> list[np.ndarray]:
        """Execute once and return outputs in the order of `output_names`; None or nothing stands for all of them.

        Raises:
            DataError: names or shapes are not those of the model.
        """
        known = [o.name for o in self._outputs]
        names = list(output_names or known)
        feeds = {name: np.asarray(value) for name, value in input_feed.items()}
        if not set(names) <= set(known) or feeds.keys() != {i.name for i in self._inputs}:
            raise DataError(
                f"The session was run for {names} with feeds {sorted(feeds)}; expected some of the outputs {known} and "
                f"the inputs {[i.name for i in self._inputs]}."
            )
        parts = [self._run(part) for part in self._batches(feeds)]
        if len(parts) == 1:
            return [np.asarray(parts[0][name]) for name in names]
        return [np.concatenate([part[name] for part in parts]) for name in names]

    def _batches(self, feeds: Feeds) -> Iterator[Feeds]:
        """The feeds in batches of the size that the model runs at."""
        times = set()
        for spec in self._inputs:
            shape, bound = feeds[spec.name].shape, tuple(spec.shape)
            if spec.name in self._open and shape[1:] == bound[1:] and len(shape) and shape[0] % int(bound[0]) == 0:
                times.add(shape[0] // int(bound[0]))
            elif shape != bound:
                raise DataError(
                    f"The session was run with '{spec.name}' of shape {list(shape)}; expected {list(bound)}, the size "
                    "of the samples of the run."
                )
        if len(times) > 1 or 0 in times:
            came = {name: list(value.shape) for name, value in feeds.items()}
            raise DataError(f"The session was run with {came}; expected one batch size above 0 for all inputs.")
        for i in range(max(times, default=1)):
            sizes = {s.name: int(s.shape[0]) for s in self._inputs if s.name in self._open}
            yield {n: v[i * sizes[n] : (i + 1) * sizes[n]] if n in sizes else v for n, v in feeds.items()}

    def _argument(self, spec: TensorSpec, first: str | None) -> OwnArgument:
        shape: list[int | str | None] = [None if size == "?" else size for size in spec.shape]
        if first is not None:
            shape[0] = None if first == "?" else first
        kind = {"FLOAT": "float", "DOUBLE": "double", "BOOL": "bool", "STRING": "string"}
        return OwnArgument(spec.name, shape, f"tensor({kind.get(spec.dtype, spec.dtype.lower())})")


class OwnInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the values of a metric of the user's own, beside the model."""

    code: str
    """See `code_digest`."""
    name: str
    higher_is_better: bool
    version: str
    feeds: tuple[str, ...]
    """SHA-256 of the file of each sample; empty for a function of a session."""
    labels: str
    """SHA-256 of all labels."""


class OwnData(ABC):
    """What a metric of the user's own is measured on, opened for one model.

    Args:
        metric: the metric.
        graph: the model.
    """

    paired, labelled = False, True

    def __init__(self, metric: Metric, graph: Graph) -> None:
        self.metric = metric
        self.inputs_of_model = graph.info.inputs
        self.outputs = tuple(o for o in graph.info.outputs if o.name not in graph.shown)
        bound = {i.name: i.shape for i in graph.info.inputs}
        self.open_batch = {
            i.name: i.shape[0] for i in graph.declared if i.shape and isinstance(i.shape[0], str) and bound[i.name]
        }

    @property
    @abstractmethod
    def task(self) -> Task[Any]:
        """The task that observes models and measures the metric."""

    @abstractmethod
    def choose(self, limit: int | None, seed: int) -> Sequence[int]:
        """Choose samples, see `TaskData.choose`."""

    @abstractmethod
    def images(self, samples: Sequence[int]) -> Sequence[Path]:
        """Return the file of the feeds of each sample."""

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> StageInputs:
        """Return all that decides the metric beside the models, see `TaskData.inputs`."""
        return OwnInputs(
            code=code_digest(self.metric.function),
            name=self.metric.title,
            higher_is_better=self.metric.higher_is_better,
            version=self.metric.version,
            feeds=tuple(images),
            labels=self._labels(samples),
        )

    def _labels(self, samples: Sequence[int]) -> str:
        return ""

    def values(self, *arguments: object) -> Seen:
        """Call the function, and return what it gives, by name.

        Raises:
            DataError: it raises an error, or gives neither a finite number nor several by name.
        """
        try:
            found = self.metric.function(*arguments)
        except BitalloyError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise DataError(
                f"The metric '{self.metric.title}' fails with {type(error).__name__}: {one_line(str(error))[:300]}. "
                "Mend its function."
            ) from error
        named = found if isinstance(found, Mapping) else {self.metric.title: found}
        try:
            values = {str(name): float(cast(Any, value)) for name, value in named.items()}
        except (TypeError, ValueError):
            values = {}
        if not values or not all(map(math.isfinite, values.values())):
            raise DataError(
                f"The metric '{self.metric.title}' returned {found!r}; expected a finite number, or a dict of finite "
                "numbers by name."
            )
        return {name: np.array(value) for name, value in values.items()}


class WholeModel(OwnData):
    """A function of a session: one observation tells everything about a model."""

    @property
    def task(self) -> Task[Any]:
        return OF_SESSION

    def choose(self, limit: int | None, seed: int) -> Sequence[int]:
        return [0]

    def images(self, samples: Sequence[int]) -> Sequence[Path]:
        return []


class LabelledFeeds(OwnData):
    """A function of predictions and labels, with its samples: feeds in files, and labels in memory.

    Args:
        metric: the metric.
        graph: the model.
        folder: where the feeds are stored.
        most: largest number of samples; None for all.
        seed: seed of their choice.
        preprocess: called with each item of the labels first.

    Raises:
        DataError: the labels are no samples of the model with something behind the inputs.
    """

    def __init__(
        self, metric: Metric, graph: Graph, folder: Path, *,
        most: int | None, seed: int, preprocess: Preprocess | None,
    ) -> None:  # fmt: skip
        super().__init__(metric, graph)
        self._targets: list[Any] = []
        samples = handed_samples(
            metric.labels, graph.info.inputs, most=most, seed=seed, preprocess=preprocess, labelled=True
        )

        def feeds() -> Iterator[Feeds]:
            for sample in samples:
                self._targets.append(sample.target)
                yield sample.feeds

        folder = store_feeds(feeds(), folder)
        self._files = [folder / f"{i:06d}.npz" for i in range(len(self._targets))]

    @property
    def task(self) -> Task[Any]:
        return OF_SAMPLES

    def choose(self, limit: int | None, seed: int) -> Sequence[int]:
        return range(len(self._files))[:limit]

    def images(self, samples: Sequence[int]) -> Sequence[Path]:
        return [self._files[i] for i in samples]

    def feeds(self, sample: int) -> Feeds:
        """Return the feeds of a sample."""
        return read_arrays(self._files[sample], [i.name for i in self.inputs_of_model])

    def target(self, sample: int) -> Any:
        """Return the labels of a sample."""
        return self._targets[sample]

    @cached_property
    def _digests(self) -> list[str]:
        return [content_digest(target).hexdigest() for target in self._targets]

    def _labels(self, samples: Sequence[int]) -> str:
        return hashlib.sha256("".join(self._digests[i] for i in samples).encode()).hexdigest()


def as_metric(evaluate: object) -> Metric:
    """Bring what a user gives to evaluate with to a `Metric`.

    Raises:
        DataError: it is neither a metric nor a function with the parameters that are needed.
    """
    if not isinstance(evaluate, Metric) and not callable(evaluate):
        raise DataError(
            f"evaluate is of type {type(evaluate).__name__}; expected files of labels, a function of a session, or "
            "bitalloy.Metric(function, labels) with a function of (predictions, labels)."
        )
    metric = evaluate if isinstance(evaluate, Metric) else Metric(evaluate)
    needed = ["session"] if metric.labels is None else ["predictions", "labels"]
    try:
        inspect.signature(metric.function).bind(*needed)
    except TypeError as error:
        raise DataError(
            f"The metric '{metric.title}' cannot be called with ({', '.join(needed)}): {error}. A function of a "
            "session takes that alone; one of (predictions, labels) is given as bitalloy.Metric(function, labels)."
        ) from error
    except ValueError:  # functions of C tell nothing of their parameters
        pass
    return metric


def open_own(
    metric: Metric,
    graph: Graph,
    folder: Path,
    *,
    most: int | None = None,
    seed: int = 0,
    preprocess: Preprocess | None = None,
) -> OwnData:
    """Open what a metric of the user's own is measured on.

    Args:
        metric: the metric.
        graph: the model.
        folder: where labelled samples are stored.
        most: largest number of them; None for all.
        seed: seed of their choice.
        preprocess: called with each labelled item first; it returns (inputs, labels).

    Raises:
        DataError: the labels do not fit the model.
    """
    if metric.labels is None:
        return WholeModel(metric, graph)
    return LabelledFeeds(metric, graph, folder, most=most, seed=seed, preprocess=preprocess)


def _observe_whole(models: Mapping[str, RunModel], data: OwnData, _: int, /) -> dict[str, Seen]:
    return {
        name: data.values(OwnSession(run, data.inputs_of_model, data.outputs, data.open_batch))
        for name, run in models.items()
    }


def _observe_sample(models: Mapping[str, RunModel], data: LabelledFeeds, sample: int, /) -> dict[str, Seen]:
    found = {}
    for name, run in models.items():
        outputs = run(data.feeds(sample))
        kept = {o.name: outputs[o.name] for o in data.outputs}
        found[name] = data.values(kept if len(kept) > 1 else next(iter(kept.values())), data.target(sample))
    return found


def _measure_whole(
    judged: Mapping[str, Sequence[Seen]],
    data: OwnData,
    _: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """One number of each model, without an interval."""
    metrics = []
    for name in _names(judged, data):
        numbers = {model: float(seen[0][name]) for model, seen in judged.items()}
        metrics.append(
            TaskMetric(
                name=name,
                values={m: MetricValue(value=v, low=v, high=v, n=0) for m, v in numbers.items()},
                drops={},
                higher_is_better=data.metric.higher_is_better,
                own=True,
            )
        )
    note = (
        f"'{data.metric.title}' gives one number for a whole model, so the error of its drop is unknown and a limit on "
        "it stays undecided. Give bitalloy.Metric(function, labels), a function of (predictions, labels) of one "
        "sample, to have intervals."
    )
    return TaskResult(task=OF_SESSION.name, metrics=tuple(metrics), notes=(note,))


def _measure_samples(
    judged: Mapping[str, Sequence[Seen]],
    data: OwnData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Mean over samples, with paired drops."""
    weights, ones = resampled_weights(len(samples), resamples, seed), np.ones(len(samples))
    metrics = []
    for name in _names(judged, data):
        values = {model: np.array([one[name] for one in seen], np.float64) for model, seen in judged.items()}
        is_part = all(((some >= 0) & (some <= 1)).all() for some in values.values())
        metric = compare_models(
            name,
            {model: ratio_of_sums(some, ones, weights) for model, some in values.items()},
            len(samples),
            higher_is_better=data.metric.higher_is_better,
            bounds=(0.0, 1.0) if is_part else (-math.inf, math.inf),
        )
        metrics.append(msgspec.structs.replace(metric, own=True))
    return TaskResult(task=OF_SAMPLES.name, metrics=tuple(metrics), notes=few_images(len(samples)))


def _names(judged: Mapping[str, Sequence[Seen]], data: OwnData) -> list[str]:
    """Names of the numbers, which are the same of every sample and model."""
    every = [seen for some in judged.values() for seen in some]
    different = next((seen for seen in every if seen.keys() != every[0].keys()), None)
    if different is not None:
        raise DataError(
            f"The metric '{data.metric.title}' returned {sorted(every[0])} once and {sorted(different)} another time; "
            "expected the same names of every model and sample."
        )
    return list(every[0])


def _refuse_files(path: Path, _: object) -> Any:
    raise DataError(f"A metric of your own reads no labels from '{path}'. Give them with bitalloy.Metric.")


_own_task = partial(Task, matches=lambda _: False, open=_refuse_files, disturb=None, disturbance="", plain=True)
OF_SESSION: Task[Any] = _own_task(
    name="own metric",
    labels="none: a function of a session brings its own data",
    observe=_observe_whole,
    measure=_measure_whole,
)
"""The task of a function of a session."""
OF_SAMPLES: Task[Any] = _own_task(
    name="own metric of samples",
    labels="pairs of inputs and labels in memory",
    observe=_observe_sample,
    measure=_measure_samples,
)
"""The task of a function of predictions and labels."""
