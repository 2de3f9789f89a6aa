"""Object detection with YOLO-style outputs: boxes x, y, width, height in input pixels beside class scores.

image -> canvas -> output (1, 4 + nc, n) -> class-wise suppression -> boxes in image pixels -> average precision
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.records import Estimate, MetricValue, Record
from bitalloy.core.store import StageInputs
from bitalloy.data.datasets import choose_samples
from bitalloy.data.images import Geometry, ImageSpec, image_feed, infer_image_spec
from bitalloy.tasks.base import Interface, RunModel, Seen, Task, TaskMetric, TaskResult, few_images
from bitalloy.tasks.bootstrap import (
    RESAMPLES,
    ResampledMetric,
    bootstrap_estimate,
    compare_models,
    metric_value,
    resampled_weights,
)
from bitalloy.tasks.coco import CocoLabels, LabelledImage, read_coco
from bitalloy.tasks.precision import Detections, Matches, average_precision, match_boxes
from bitalloy.tasks.yolo import class_names, looks_like_yolo, split_predictions, suppress

__all__ = [
    "DETECTION",
    "ConfidenceShift",
    "DetectionData",
    "DetectionResult",
    "Matched",
    "class_names",
    "confidence_shift",
    "evaluate_detection",
    "judge_detector",
    "looks_like_yolo",
    "measure_detectors",
    "observe_detectors",
    "open_detection",
    "paired_difference",
    "split_predictions",
    "suppress",
]

SHOWN_CONFIDENCE = 0.25
"""Score above which a detection is usually shown."""


class DetectionInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metrics of detections and masks, beside the models."""

    labels: str
    """SHA-256 of the annotation file."""
    images: tuple[str, ...]
    """SHA-256 of each image."""
    samples: tuple[int, ...]
    image: ImageSpec
    names: tuple[str, ...] | None
    """Class names of the model."""


@dataclass(frozen=True, slots=True)
class DetectionData:
    """COCO labels, opened for one model; also those of instance segmentation."""

    labels: CocoLabels
    image: ImageSpec
    """How images are prepared."""
    names: tuple[str, ...] | None = None
    """Class names of the model; None where they are unknown."""

    def images(self, samples: Sequence[int]) -> tuple[Path, ...]:
        """Return the file of the image of each sample."""
        return tuple(map(self.labels.file_of, self.entries(samples)))

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> DetectionInputs:
        """Return all that decides metrics on some samples, whose images have the given hashes."""
        names = None if self.names is None else tuple(self.names)
        return DetectionInputs(
            labels=self.labels.fingerprint(),
            images=tuple(images),
            samples=tuple(samples),
            image=self.image,
            names=names,
        )

    @property
    def paired(self) -> bool:
        """False: every model is observed alone."""
        return False

    def choose(self, limit: int | None, seed: int) -> list[int]:
        """Choose at most `limit` images, None for all, and return their numbers in the order of their ids."""
        return choose_samples([e.file_name for e in self.labels.images], limit=limit, seed=seed)

    def entries(self, samples: Sequence[int]) -> list[LabelledImage]:
        """Return the images with the given numbers."""
        return [self.labels.images[i] for i in samples]

    def opened(self, sample: int) -> tuple[dict[str, np.ndarray], Geometry, tuple[int, int]]:
        """Return the feeds of one image, where it lies on the canvas, and its own width and height."""
        image = self.labels.open_image(self.labels.images[sample], self.image.channels)
        feed, geometry = image_feed(image, self.image)
        return {self.image.input: feed}, geometry, image.size


@dataclass(frozen=True, slots=True)
class DetectionResult:
    """Average precision of one model on labelled images, with what is needed to compare two models."""

    ap: MetricValue
    """Average precision, the mean over IoU thresholds 0.50, 0.55 ... 0.95, in 0..1."""
    ap50: MetricValue
    """Average precision at IoU threshold 0.5, in 0..1."""
    images: tuple[str, ...]
    detections: tuple[Detections, ...]
    """Detections of each image, in its pixels."""
    seed: int
    resampled: np.ndarray
    """`ap` on B resamples, (B,); b draws the same images in every result on these images with this seed."""
    resampled50: np.ndarray
    """`ap50` on the same B resamples, (B,)."""


class ConfidenceShift(Record, frozen=True, kw_only=True):
    """How scores moved from model a to model b, over the detections that both made."""

    mean_a: float
    mean_b: float
    shift: Estimate
    """Mean score in b minus mean score in a, with its interval."""
    matched: int
    lost: int
    """Number of detections of a without a counterpart in b."""


def open_detection(annotations: Path, model: Interface) -> DetectionData:
    """Read COCO labels for a detector.

    Raises:
        DataError: labels or images are broken or missing. Whether classes fit is checked with the first output.
    """
    image = model.image or infer_image_spec(model.inputs, task="detection")
    assert image is not None, "a detection model without an image input is refused"
    return DetectionData(read_coco(annotations), image, class_names(model.metadata))


def evaluate_detection(
    run: RunModel, data: DetectionData, *, limit: int | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> DetectionResult:
    """Measure the average precision of a model on labelled images, with 95 % intervals from a bootstrap over images.

    Args:
        run: function from the feeds of one image to the outputs in graph order.
        data: labels opened for the model; only labelled images are used.
        limit: largest number of images; None takes all.
        seed: of the choice of images and of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        DataError: labels, images and model do not fit each other.
    """
    samples = data.choose(limit, seed)
    seen = [observe_detectors({"model": run}, data, i)["model"] for i in samples]
    return _results({"model": judge_detector(seen, data, samples)}, data, samples, seed, resamples)["model"]


def observe_detectors(models: Mapping[str, RunModel], data: DetectionData, sample: int, /) -> dict[str, Seen]:
    """Run detectors on one image, and return their detections.

    Raises:
        DataError: labels, images and models do not fit each other.
    """
    feeds, geometry, size = data.opened(sample)
    found: dict[str, Seen] = {}
    for name, run in models.items():
        boxes, scores = split_predictions(run(feeds))
        data.labels.category_ids(len(scores), data.names)
        found[name] = seen_of(on_image(suppress(boxes, scores), geometry, size), len(scores))
    return found


@dataclass(frozen=True, slots=True)
class Matched:
    """Detections of one model, matched with the labels."""

    detections: tuple[Detections, ...]
    """Detections of each image, in its pixels."""
    boxes: Matches
    masks: Matches | None = None
    """Matches of masks, for instance segmentation with labels that have masks; else None."""


def judge_detector(seen: Sequence[Seen], data: DetectionData, samples: Sequence[int], /) -> Matched:
    """Match detections with labels.

    Raises:
        DataError: the images have no labels that count.
    """
    found = detections_of(seen)
    return Matched(tuple(found), match_boxes(data.labels, data.entries(samples), found, ids_of(seen, data)))


def measure_detectors(
    judged: Mapping[str, Matched],
    data: DetectionData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Measure the box AP and confidence shift of several models on the same images, side by side."""
    results = _results(judged, data, samples, seed, resamples)
    return TaskResult(
        task="detection",
        metrics=compare_precision("", results),
        confidence_shift=shifts(results),
        notes=few_images(len(samples)),
    )


def seen_of(found: Detections, classes: int) -> dict[str, np.ndarray]:
    """Return detections of one image, by a model with `classes` classes, as an observation."""
    return {"boxes": found.boxes, "scores": found.scores, "classes": found.classes, "of": np.array(classes)}


def detections_of(seen: Sequence[Seen]) -> list[Detections]:
    """Return the detections of each image from observations."""
    return [Detections(one["boxes"], one["scores"], one["classes"]) for one in seen]


def ids_of(seen: Sequence[Seen], data: DetectionData) -> np.ndarray:
    """Return the category id for each class index of a model, (classes,)."""
    return data.labels.category_ids(int(seen[0]["of"]), data.names)


def _results(
    judged: Mapping[str, Matched], data: DetectionData, samples: Sequence[int], seed: int, resamples: int
) -> dict[str, DetectionResult]:
    entries, weights = data.entries(samples), resampled_weights(len(samples), resamples, seed)
    return {name: precision_of(one.boxes, entries, one.detections, weights, seed) for name, one in judged.items()}


def precision_of(
    matches: Matches, images: Sequence[LabelledImage], found: Sequence[Detections], weights: np.ndarray, seed: int
) -> DetectionResult:
    """Return the result of one model from its matches; `weights` (B, I) come from `resampled_weights` with `seed`."""
    resampled = average_precision(matches, weights)
    mean, half = resampled.mean(axis=1), resampled[:, 0]
    return DetectionResult(
        ap=metric_value(matches.ap, mean, len(images)),
        ap50=metric_value(matches.ap50, half, len(images)),
        images=tuple(entry.file_name for entry in images),
        detections=tuple(found),
        seed=seed,
        resampled=mean,
        resampled50=half,
    )


def compare_precision(kind: str, results: Mapping[str, DetectionResult]) -> tuple[TaskMetric, ...]:
    """Compare AP50-95 and AP50 of several models; `kind` is the prefix of the names, e.g. `mask `."""
    n = next(iter(results.values())).ap.n
    mean = {name: ResampledMetric(r.ap.value, r.resampled) for name, r in results.items()}
    half = {name: ResampledMetric(r.ap50.value, r.resampled50) for name, r in results.items()}
    return compare_models(f"{kind}AP50-95", mean, n), compare_models(f"{kind}AP50", half, n)


def shifts(results: Mapping[str, DetectionResult]) -> dict[str, Estimate]:
    """Return model -> confidence shift against the first model; models without shared detections are left out."""
    reference, *others = results
    found = {}
    for name in others:
        with contextlib.suppress(DataError):  # nothing matches: a collapsed model has no scores to compare
            found[name] = confidence_shift(results[reference], results[name]).shift
    return found


def on_image(found: Detections, geometry: Geometry, size: tuple[int, int]) -> Detections:
    """Map detections on the canvas to pixels of an image of `size` (width, height), cut at its border."""
    boxes = np.clip(geometry.to_image(found.boxes), 0, np.array([*size, *size]))
    return Detections(boxes, found.scores, found.classes)


def paired_difference(a: DetectionResult, b: DetectionResult) -> Estimate:
    """Return AP50-95 of a minus that of b, with a 95 % interval from resamples of the same images for both.

    Raises:
        DataError: the results rest on different images, seeds or numbers of resamples.
    """
    _check_pair(a, b)
    return bootstrap_estimate(a.ap.value - b.ap.value, a.resampled - b.resampled)


def confidence_shift(
    a: DetectionResult, b: DetectionResult, *, confidence: float = SHOWN_CONFIDENCE
) -> ConfidenceShift:
    """Compare the scores of the detections of a above `confidence` with those of their counterparts in b.

    The counterpart is the free detection of b, of any score, with the same class and the greatest IoU, at least 0.5;
    the best detections of a choose first. The interval comes from the resamples over images.

    Raises:
        DataError: the results rest on different images, seeds or numbers of resamples, or nothing matches.
    """
    _check_pair(a, b)
    pairs = [_counterparts(x, y, confidence) for x, y in zip(a.detections, b.detections, strict=True)]
    sums = np.array([[len(p), *p.sum(axis=0)] for p, _ in pairs])
    matched, total_a, total_b = sums.sum(axis=0)
    if matched == 0:
        raise DataError(f"No detection above {confidence} occurs in both results; there are no scores to compare.")
    drawn = resampled_weights(len(a.images), len(a.resampled), a.seed) @ sums
    with np.errstate(invalid="ignore"):
        resampled = (drawn[:, 2] - drawn[:, 1]) / drawn[:, 0]
    return ConfidenceShift(
        mean_a=float(total_a / matched),
        mean_b=float(total_b / matched),
        shift=bootstrap_estimate(float((total_b - total_a) / matched), resampled),
        matched=int(matched),
        lost=sum(lost for _, lost in pairs),
    )


def _check_pair(a: DetectionResult, b: DetectionResult) -> None:
    if a.images != b.images or a.seed != b.seed or len(a.resampled) != len(b.resampled):
        raise DataError(
            f"The results rest on {len(a.images)} and {len(b.images)} images with seeds {a.seed} and {b.seed}; "
            "a comparison needs the same images, seed and number of resamples. Evaluate both models alike."
        )


def _counterparts(a: Detections, b: Detections, confidence: float) -> tuple[np.ndarray, int]:
    """(m, 2) scores in a and b of the matched detections, and the number of unmatched ones of a."""
    shown = np.flatnonzero(a.scores >= confidence)
    overlap = np.where(a.classes[shown, None] == b.classes[None], _iou(a.boxes[shown], b.boxes), 0)
    scores = []
    for row, index in enumerate(shown):
        best = int(overlap[row].argmax()) if len(b.scores) else -1
        if best >= 0 and overlap[row, best] >= 0.5:
            scores.append((a.scores[index], b.scores[best]))
            overlap[:, best] = 0
    return np.array(scores, dtype=np.float64).reshape(-1, 2), len(shown) - len(scores)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(k, m) overlap of (k, 4) with (m, 4) boxes, as corners."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.clip(sides, 0, None).prod(axis=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return np.asarray(shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9))


DETECTION: Task[DetectionData] = Task(
    name="detection",
    labels="a COCO annotation file with boxes",
    matches=lambda model: looks_like_yolo(model.inputs, model.outputs),
    open=open_detection,
    observe=observe_detectors,
    measure=measure_detectors,
    judge=judge_detector,
)
