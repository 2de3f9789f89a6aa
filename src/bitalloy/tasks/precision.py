"""Average precision with the spread over images.

The value is pycocotools' own. Its spread comes from a bootstrap over images: the matches that pycocotools
found are accumulated again with a weight per image (how often a resample drew it).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.data.masks import Rle
from bitalloy.tasks.coco import CocoLabels, LabelledBox, LabelledImage

__all__ = [
    "CategoryMatches",
    "Detections",
    "Matches",
    "SHOWN",
    "average_precision",
    "match_boxes",
    "match_masks",
    "match_shown",
]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
SHOWN = 0.25
"""Score above which a detection is usually shown."""
MAX_DETECTIONS = 100
"""Largest number of detections per image and class that COCO's evaluation counts."""

_CHUNK_ELEMENTS = 4_000_000
"""Resamples x detections that are accumulated at once: bounds memory to some 100 MB."""


@dataclass(frozen=True, slots=True)
class Detections:
    """Detections in one image: k boxes, best first."""

    boxes: np.ndarray
    """Corners x1, y1, x2, y2 in pixels, (k, 4) float."""
    scores: np.ndarray
    """Scores in 0..1, (k,) float."""
    classes: np.ndarray
    """Class indices of the model, (k,) int."""


@dataclass(frozen=True, slots=True)
class CategoryMatches:
    """D detections of one category, best score first, matched to labels at T IoU thresholds."""

    category: int
    """Id of the category."""
    image: np.ndarray
    """Position of each detection's image, (D,) int."""
    hit: np.ndarray
    """Whether a detection matches a label that counts, (T, D) bool."""
    ignored: np.ndarray
    """Whether a detection counts neither as hit nor as miss, e.g. inside a crowd, (T, D) bool."""
    positives: np.ndarray
    """Number of labels that count in each image, (I,) int."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Matches of detections with labels that pycocotools found on I images."""

    ap: float
    """Average precision from pycocotools: the mean over IoU thresholds and categories with labels."""
    ap50: float
    """Average precision at IoU threshold 0.5."""
    categories: tuple[CategoryMatches, ...]
    """Matches of each category that has at least one label that counts."""
    images: int


def match_boxes(
    labels: CocoLabels, images: Sequence[LabelledImage], detections: Sequence[Detections], category_ids: np.ndarray
) -> Matches:
    """Match detected boxes to labels with pycocotools' `COCOeval` (all areas, 100 detections per class and image).

    Args:
        labels: labels with the true boxes.
        images: those that were evaluated, in the order of their ids.
        detections: detections of each image.
        category_ids: category id per class index, -1 for none, (nc,).

    Raises:
        DataError: the images have no labels that count.
    """
    chosen = {image.id for image in images}
    truth = [_label(box) for box in labels.boxes if box.image_id in chosen]
    found = [
        row
        for image, one in zip(images, detections, strict=True)
        for row in _results(image.id, one, category_ids, [{}] * len(one.scores))
    ]
    return _match("bbox", _ids(labels), [{"id": image.id} for image in images], truth, found, _none_in(labels, images))


def match_masks(
    labels: CocoLabels,
    images: Sequence[LabelledImage],
    sizes: Sequence[tuple[int, int]],
    detections: Sequence[Detections],
    masks: Sequence[Sequence[Rle]],
    category_ids: np.ndarray,
) -> Matches:
    """Match detected masks to labels, as `match_boxes` does with boxes.

    Args:
        labels: labels with the true masks.
        images: those that were evaluated, in the order of their ids.
        sizes: (width, height) of each image.
        detections: detections of each image; their boxes only set areas.
        masks: mask of every detection, in image pixels.
        category_ids: category id per class index, -1 for none, (nc,).

    Raises:
        DataError: the images have no labels that count, or a label has no mask or a broken one.
    """
    size_of = {image.id: size for image, size in zip(images, sizes, strict=True)}
    truth = [
        _label(box) | {"segmentation": labels.mask(box, size_of[box.image_id])}
        for box in labels.boxes
        if box.image_id in size_of
    ]
    found = [
        row
        for image, one, drawn in zip(images, detections, masks, strict=True)
        for row in _results(image.id, one, category_ids, [{"segmentation": mask} for mask in drawn])
    ]
    entries = [{"id": i, "width": width, "height": height} for i, (width, height) in size_of.items()]
    return _match("segm", _ids(labels), entries, truth, found, _none_in(labels, images))


def match_shown(
    reference: Sequence[Detections],
    found: Sequence[Detections],
    sizes: Sequence[tuple[int, int]],
    masks: tuple[Sequence[Sequence[Rle]], Sequence[Sequence[Rle]]] | None = None,
) -> Matches:
    """Match the detections of a model to those that a reference shows, with scores of at least `SHOWN`, as the truth.

    Args:
        reference: detections of the reference in each image.
        found: detections of the model in each image.
        sizes: (width, height) of each image.
        masks: masks of all detections of reference and model, which are matched then; None matches boxes.

    Raises:
        DataError: the reference shows nothing.
    """
    classes = 1 + max((int(one.classes.max()) for one in (*reference, *found) if len(one.classes)), default=0)
    ids, rows = np.arange(1, classes + 1), []
    for side, detections in enumerate((reference, found)):
        drawn = masks[side] if masks is not None else [[None] * len(one.scores) for one in detections]
        made = []
        for image, (one, own) in enumerate(zip(detections, drawn, strict=True)):
            more = [{} if mask is None else {"segmentation": mask} for mask in own]
            made += [row for row in _results(image, one, ids, more) if side or row["score"] >= SHOWN]
        rows.append(made)
    images = [{"id": i, "width": width, "height": height} for i, (width, height) in enumerate(sizes)]
    nothing = (
        f"The float model shows nothing (score {SHOWN:g}) on the {len(images)} evaluated images. Take more images."
    )
    return _match("bbox" if masks is None else "segm", ids.tolist(), images, rows[0], rows[1], nothing)


def _ids(labels: CocoLabels) -> list[int]:
    return [category.id for category in labels.categories]


def _none_in(labels: CocoLabels, images: Sequence[LabelledImage]) -> str:
    return f"The {len(images)} evaluated images have no labels in '{labels.path}'. Take more images."


def _match(
    kind: str,
    categories: Sequence[int],
    images: list[dict[str, int]],
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    nothing: str,
) -> Matches:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    common = {"images": images, "categories": [{"id": category} for category in categories]}
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for rows in (truth, found):
            side = COCO()
            side.dataset = common | {"annotations": _numbered(rows)}
            side.createIndex()
            sides.append(side)
        run = COCOeval(*sides, kind)
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
        run.params.maxDets = [MAX_DETECTIONS]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., 0, 0]  # (thresholds, recalls, categories), -1 where nothing counts
    counted = precision[0, 0] > -1
    if not counted.any():
        raise DataError(nothing)
    per_image = np.array(run.evalImgs, dtype=object).reshape(len(categories), len(images))
    return Matches(
        ap=float(precision[precision > -1].mean()),
        ap50=float(precision[0][precision[0] > -1].mean()),
        categories=tuple(
            _category(category, row) for category, row, used in zip(categories, per_image, counted, strict=True) if used
        ),
        images=len(images),
    )


def _numbered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """With ids from 1: pycocotools takes a match to the label with id 0 for no match."""
    return [{"id": number, **row} for number, row in enumerate(rows, start=1)]


def _label(box: LabelledBox) -> dict[str, Any]:
    return {
        "image_id": box.image_id,
        "category_id": box.category_id,
        "bbox": list(box.bbox),
        "area": box.bbox[2] * box.bbox[3],
        "iscrowd": int(box.iscrowd != 0),
    }


def _results(
    image_id: int, found: Detections, category_ids: np.ndarray, more: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """COCO results of one image; `more` has further entries of each detection."""
    corners = found.boxes.astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    rows = zip(corners[:, :2], sizes, found.scores.tolist(), category_ids[found.classes].tolist(), more, strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": [*start.tolist(), *size.tolist()],
            "area": float(size[0] * size[1]),
            "iscrowd": 0,
            "score": score,
            **extra,
        }
        for start, size, score, category, extra in rows
        if category >= 0
    ]


def _category(category: int, row: np.ndarray) -> CategoryMatches:
    """Join one category's images: `row` holds what `COCOeval.evaluateImg` returned for each (None: nothing there)."""
    positives = np.zeros(len(row), np.int64)
    image, score = [np.zeros(0, np.intp)], [np.zeros(0)]
    matched, ignored = ([np.zeros((len(IOU_THRESHOLDS), 0), bool)] for _ in range(2))
    for position, entry in enumerate(row):
        if entry is None:
            continue
        positives[position] = np.count_nonzero(entry["gtIgnore"] == 0)
        score.append(np.asarray(entry["dtScores"], dtype=np.float64))
        image.append(np.full(len(entry["dtScores"]), position))
        matched.append(entry["dtMatches"] != 0)
        ignored.append(entry["dtIgnore"].astype(bool))
    order = np.argsort(-np.concatenate(score), kind="stable")
    unused = np.concatenate(ignored, axis=1)[:, order]
    return CategoryMatches(
        category=category,
        image=np.concatenate(image)[order],
        hit=np.concatenate(matched, axis=1)[:, order] & ~unused,
        ignored=unused,
        positives=positives,
    )


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Compute the average precision as if image i occurred `weights[:, i]` times.

    A repeated detection only repeats a step of the precision-recall curve, so the best precision at every recall is
    that of the curve through the ends of the steps: equal to pycocotools' value on repeated images, but for the
    order of equal scores within an image.

    Args:
        matches: matches on I images.
        weights: how often each image occurs in each resample, (B, I) non-negative int.

    Returns:
        The mean over the categories with labels in the resample, (B, T); NaN where there are none.
    """
    total = np.zeros((len(weights), len(IOU_THRESHOLDS)))
    present = np.zeros((len(weights), 1))
    for category in matches.categories:
        rows = max(1, _CHUNK_ELEMENTS // max(1, len(category.image)))
        for start in range(0, len(weights), rows):
            chunk = weights[start : start + rows]
            positives = (chunk @ category.positives)[:, None]
            present[start : start + rows] += positives > 0
            total[start : start + rows] += _category_precision(category, chunk, positives)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / present)


def _category_precision(category: CategoryMatches, weights: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """(B, T) average precision of one category, 0 where a resample has none of its labels (`positives`, (B, 1))."""
    result = np.zeros((len(weights), len(IOU_THRESHOLDS)))
    drawn = weights[:, category.image]
    ranked = drawn.cumsum(axis=1)
    for threshold, (hit, ignored) in enumerate(zip(category.hit, category.ignored, strict=True)):
        at, skipped = np.flatnonzero(hit), np.flatnonzero(ignored)
        true = drawn[:, at].cumsum(axis=1)
        before = np.pad(drawn[:, skipped].cumsum(axis=1), ((0, 0), (1, 0)))
        counted = ranked[:, at] - before[:, np.searchsorted(skipped, at)]
        precision = true / (counted + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, true / np.maximum(positives, 1), side="right")
        steps = np.diff(reached, axis=1, prepend=0)
        result[:, threshold] = np.where(positives > 0, best * steps, 0).sum(axis=1) / len(RECALLS)
    return result
