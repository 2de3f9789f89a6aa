"""Object detection with YOLO-style outputs: boxes x, y, width, height in input pixels beside class scores.

image -> canvas -> output (1, 4 + nc, n) -> class-wise suppression -> boxes in image pixels -> average precision

Agreement with the float model is the average precision against what that shows, as if it were true: it needs no labels,
and has a fraction of their noise.
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
from bitalloy.data.masks import Rle
from bitalloy.tasks.base import Interface, RunModel, Seen, ShowSample, Task, TaskMetric, TaskResult, few_images
from bitalloy.tasks.bootstrap import (
    RESAMPLES,
    ResampledMetric,
    bootstrap_estimate,
    compare_models,
    metric_value,
    resampled_weights,
)
from bitalloy.tasks.coco import CocoLabels, LabelledImage, read_coco, without_labels
from bitalloy.tasks.precision import SHOWN, Detections, Matches, average_precision, match_boxes, match_shown
from bitalloy.tasks.shown_boxes import BOX_MEASURE, agreement_of_boxes, box_overlaps, class_precisions, show_boxes
from bitalloy.tasks.yolo import class_names, looks_like_yolo, split_predictions, suppress

SHOWN_AGREEMENT = "agreement"
"""Name of the AP against what the reference shows."""
LOGIT_NOISE, BOX_NOISE = 0.2, 0.01
DISTURBANCE = f"scores disturbed by {LOGIT_NOISE} as logits, boxes by {BOX_NOISE:.0%} of their sides"
__all__ = [
    "SHOWN_AGREEMENT",
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
    def labelled(self) -> bool:
        """Whether there are labels, and not images only."""
        return self.labels.labelled

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
    weights: np.ndarray
    """How often each of B resamples draws each image, (B, I)."""
    resampled: np.ndarray
    """`ap` on the resamples, (B,)."""
    resampled50: np.ndarray
    """`ap50` on the same B resamples, (B,)."""


class ConfidenceShift(Record, frozen=True, kw_only=True):
    """How scores moved from model a to model b, over the detections that both made."""

    mean_a: float
    mean_b: float
    shift: Estimate
    """Mean score in b minus mean score in a, with its interval."""
    overlap: Estimate
    """Mean IoU of their boxes in a and b."""
    matched: int
    lost: int
    """Number of detections of a without a counterpart in b."""


def open_detection(annotations: Path, model: Interface) -> DetectionData:
    """Read COCO labels for a detector, or take a folder of images without labels.

    Raises:
        DataError: labels or images are broken or missing. Whether classes fit is checked with the first output.
    """
    image = model.image or infer_image_spec(model.inputs, task="detection")
    assert image is not None, "a detection model without an image input is refused"
    labels = without_labels(annotations) if annotations.is_dir() else read_coco(annotations)
    return DetectionData(labels, image, class_names(model.metadata))


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
    weights = resampled_weights(len(samples), resamples, seed)
    return _results({"model": judge_detector(seen, data, samples)}, data, samples, weights)["model"]


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
    boxes: Matches | None
    """Matches of boxes with the labels; None for images without labels."""
    masks: Matches | None = None
    """Matches of masks, for instance segmentation with labels that have masks; else None."""
    drawn: tuple[Sequence[Rle], ...] = ()
    """Masks of all detections of each image, for instance segmentation."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of each image, for instance segmentation."""


def judge_detector(seen: Sequence[Seen], data: DetectionData, samples: Sequence[int], /) -> Matched:
    """Match detections with labels.

    Raises:
        DataError: the images have no labels that count.
    """
    found = detections_of(seen)
    if not data.labelled:
        return Matched(tuple(found), None)
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
    """Measure the box AP, agreement and shifts of several models on the same images, side by side."""
    weights = resampled_weights(len(samples), resamples, seed)
    agreed, notes = compare_shown("", judged, weights)
    metrics = compare_precision("", _results(judged, data, samples, weights)) if data.labelled else ()
    shift, overlap = shifts(judged, weights)
    return TaskResult(
        task="detection",
        metrics=metrics + agreed,
        confidence_shift=shift,
        box_overlap=overlap,
        notes=(*notes, *few_images(len(samples))),
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


def disturb_detections(seen: Seen, rng: np.random.Generator, /) -> dict[str, np.ndarray]:
    """Add noise to the scores, as logits, and to the edges of the boxes, as parts of their sides.

    The levels are such that a YOLO11n disagrees with itself as much as with a plan that loses little: on 94 COCO images
    it loses 1.9 points of agreement, and the interval of its drop is as wide as that of such a plan.
    """
    scores = np.clip(seen["scores"], 1e-6, 1 - 1e-6)
    logits = np.log(scores / (1 - scores)) + rng.normal(0, LOGIT_NOISE, scores.shape)
    sides = np.tile(seen["boxes"][:, 2:] - seen["boxes"][:, :2], 2)
    boxes = seen["boxes"] + rng.normal(0, BOX_NOISE, sides.shape) * sides
    return {**seen, "scores": 1 / (1 + np.exp(-logits)), "boxes": boxes}


def _results(
    judged: Mapping[str, Matched], data: DetectionData, samples: Sequence[int], weights: np.ndarray
) -> dict[str, DetectionResult]:
    entries = data.entries(samples)
    return {
        name: precision_of(one.boxes, entries, one.detections, weights)
        for name, one in judged.items()
        if one.boxes is not None
    }


def precision_of(
    matches: Matches, images: Sequence[LabelledImage], found: Sequence[Detections], weights: np.ndarray
) -> DetectionResult:
    """Return the result of one model from its matches; `weights` (B, I) come from `resampled_weights`."""
    resampled = average_precision(matches, weights)
    mean, half = resampled.mean(axis=1), resampled[:, 0]
    return DetectionResult(
        ap=metric_value(matches.ap, mean, len(images)),
        ap50=metric_value(matches.ap50, half, len(images)),
        images=tuple(entry.file_name for entry in images),
        detections=tuple(found),
        weights=weights,
        resampled=mean,
        resampled50=half,
    )


def compare_precision(kind: str, results: Mapping[str, DetectionResult]) -> tuple[TaskMetric, ...]:
    """Compare AP50-95 and AP50 of several models; `kind` is the prefix of the names, e.g. `mask `."""
    n, witness = next(iter(results.values())).ap.n, f"{kind}{SHOWN_AGREEMENT}"
    mean = {name: ResampledMetric(r.ap.value, r.resampled) for name, r in results.items()}
    half = {name: ResampledMetric(r.ap50.value, r.resampled50) for name, r in results.items()}
    return (
        compare_models(f"{kind}AP50-95", mean, n, witness=witness),
        compare_models(f"{kind}AP50", half, n, witness=witness),
    )


def compare_shown(
    kind: str,
    judged: Mapping[str, Matched],
    weights: np.ndarray,
    *,
    masks: bool = False,
) -> tuple[tuple[TaskMetric, ...], tuple[str, ...]]:
    """Measure AP50-95 of several models against what the first one shows; nothing, with a note, where that is nothing.

    Args:
        kind: prefix of the name.
        judged: model -> its detections, the reference first.
        weights: (B, I) from `resampled_weights`.
        masks: whether masks are compared instead of boxes.
    """
    reference, *others = judged
    if not others:
        return (), ()
    first, count = judged[reference], weights.shape[1]
    whole = ResampledMetric(1.0, np.ones(len(weights)))
    found = {reference: whole}
    try:
        for name in others:
            drawn = (first.drawn, judged[name].drawn) if masks else None
            sizes = first.sizes if masks else [(0, 0)] * count
            matches = match_shown(first.detections, judged[name].detections, sizes, drawn)
            found[name] = ResampledMetric(matches.ap, average_precision(matches, weights).mean(axis=1))
    except DataError as error:
        return (), (f"No agreement of detections: {error}",)
    return (compare_models(f"{kind}{SHOWN_AGREEMENT}", found, count, agreement=True),), ()


def shifts(judged: Mapping[str, Matched], weights: np.ndarray) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Compare the matched detections of models with those of the first one.

    Returns:
        Model -> shift of the confidence, and model -> overlap of the boxes; models without shared detections are left
        out.
    """
    reference, *others = judged
    found = {}
    for name in others:
        with contextlib.suppress(DataError):  # nothing matches: a collapsed model has no scores to compare
            found[name] = _shift(judged[reference].detections, judged[name].detections, weights, SHOWN)
    return {n: one.shift for n, one in found.items()}, {n: one.overlap for n, one in found.items()}


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


def confidence_shift(a: DetectionResult, b: DetectionResult, *, confidence: float = SHOWN) -> ConfidenceShift:
    """Compare the scores of the detections of a above `confidence` with those of their counterparts in b.

    The counterpart is the free detection of b, of any score, with the same class and the greatest IoU, at least 0.5;
    the best detections of a choose first. The interval comes from the resamples over images.

    Raises:
        DataError: the results rest on different images, seeds or numbers of resamples, or nothing matches.
    """
    _check_pair(a, b)
    return _shift(a.detections, b.detections, a.weights, confidence)


def _shift(a: Sequence[Detections], b: Sequence[Detections], weights: np.ndarray, confidence: float) -> ConfidenceShift:
    pairs = [_counterparts(x, y, confidence) for x, y in zip(a, b, strict=True)]
    sums = np.array([[len(p), *p.sum(axis=0)] for p, _ in pairs])
    matched, total_a, total_b, overlap = sums.sum(axis=0)
    if matched == 0:
        raise DataError(f"No detection above {confidence} occurs in both results; there are no scores to compare.")
    drawn = weights @ sums
    with np.errstate(invalid="ignore"):
        moved, overlaps = (drawn[:, 2] - drawn[:, 1]) / drawn[:, 0], drawn[:, 3] / drawn[:, 0]
    return ConfidenceShift(
        mean_a=float(total_a / matched),
        mean_b=float(total_b / matched),
        shift=bootstrap_estimate(float((total_b - total_a) / matched), moved),
        overlap=bootstrap_estimate(float(overlap / matched), overlaps),
        matched=int(matched),
        lost=sum(lost for _, lost in pairs),
    )


def _check_pair(a: DetectionResult, b: DetectionResult) -> None:
    if a.images != b.images or not np.array_equal(a.weights, b.weights):
        raise DataError(
            f"The results rest on {len(a.images)} and {len(b.images)} images, or on other resamples; a comparison "
            "needs the same images, seed and number of resamples. Evaluate both models alike."
        )


def _counterparts(a: Detections, b: Detections, confidence: float) -> tuple[np.ndarray, int]:
    """(m, 3) scores in a and b of the matched detections and their overlap, and the number of unmatched ones of a."""
    shown = np.flatnonzero(a.scores >= confidence)
    overlap = np.where(a.classes[shown, None] == b.classes[None], box_overlaps(a.boxes[shown], b.boxes), 0)
    found = []
    for row, index in enumerate(shown):
        best = int(overlap[row].argmax()) if len(b.scores) else -1
        if best >= 0 and overlap[row, best] >= 0.5:
            found.append((a.scores[index], b.scores[best], overlap[row, best]))
            overlap[:, best] = 0
    return np.array(found, dtype=np.float64).reshape(-1, 3), len(shown) - len(found)


SHOW_DETECTIONS: ShowSample[DetectionData] = ShowSample(
    measure=BOX_MEASURE,
    agree=agreement_of_boxes,
    draw=show_boxes,
    classes=lambda first, second, data, seed: class_precisions(first.boxes, second.boxes, data, seed),
)


DETECTION: Task[DetectionData] = Task(
    name="detection",
    labels="a COCO annotation file with boxes, or a folder of images",
    matches=lambda model: looks_like_yolo(model.inputs, model.outputs),
    open=open_detection,
    observe=observe_detectors,
    measure=measure_detectors,
    judge=judge_detector,
    disturb=disturb_detections,
    disturbance=DISTURBANCE,
    show=SHOW_DETECTIONS,
)
