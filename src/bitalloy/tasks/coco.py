"""COCO labels and average precision, with the spread over images.

The value is pycocotools' own. Its spread comes from a bootstrap over images: the matches that pycocotools
found are accumulated again with a weight per image (how often a resample drew it).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bitalloy.errors import DataError

__all__ = [
    "BoxMatches",
    "Category",
    "CategoryMatches",
    "CocoLabels",
    "Detections",
    "LabelledBox",
    "LabelledImage",
    "average_precision",
    "match_boxes",
    "read_coco",
    "resampled_weights",
]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100
"""Per image and class, as COCO counts them."""

_CHUNK_ELEMENTS = 4_000_000
"""Resamples x detections that are accumulated at once: bounds memory to some 100 MB."""


@dataclass(frozen=True, slots=True)
class Detections:
    """What was found in one image: k boxes, best first."""

    boxes: np.ndarray
    """(k, 4) float, corners x1, y1, x2, y2 in pixels."""
    scores: np.ndarray
    """(k,) float, 0..1."""
    classes: np.ndarray
    """(k,) int, class index of the model."""


class LabelledImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of an annotation file."""

    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


class LabelledBox(msgspec.Struct, frozen=True, kw_only=True):
    """An object of an annotation file."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """Left, top, width, height in pixels."""
    iscrowd: int | bool = 0


class Category(msgspec.Struct, frozen=True, kw_only=True):
    """A class of an annotation file."""

    id: int
    name: str


class _File(msgspec.Struct, frozen=True, kw_only=True):
    images: tuple[LabelledImage, ...]
    annotations: tuple[LabelledBox, ...]
    categories: tuple[Category, ...]


@dataclass(frozen=True, slots=True)
class CocoLabels:
    """A checked annotation file and the images it speaks of."""

    path: Path
    folder: Path
    """Where the images lie."""
    images: tuple[LabelledImage, ...]
    """In the order of their ids."""
    boxes: tuple[LabelledBox, ...]
    categories: tuple[Category, ...]
    """In the order of their ids."""

    def category_ids(self, classes: int, names: Sequence[str] | None) -> np.ndarray:
        """Category id per class index of the model, -1 for a class that the labels do not know.

        1. By name, where the model's class names are known and hold every category.
        2. By order of id, where there are as many categories as classes (80 in COCO, whose ids run to 90).

        Raises:
            DataError: neither holds.
        """
        known = {category.name: category.id for category in self.categories}
        if names is not None and len(names) == classes and known.keys() <= set(names):
            return np.array([known.get(name, -1) for name in names])
        if len(self.categories) == classes:
            return np.array([category.id for category in self.categories])
        hint = "has no class names in its metadata" if names is None else f"calls its classes {list(names)[:5]}..."
        raise DataError(
            f"The model has {classes} classes and {hint}, but '{self.path}' has {len(self.categories)} categories "
            f"({[c.name for c in self.categories][:5]}...). Evaluate with the labels of the model's own classes."
        )


def read_coco(annotations: Path, images: Path | None = None) -> CocoLabels:
    """Read an annotation file in COCO format and find its images.

    Args:
        annotations: e.g. `instances_val2017.json`.
        images: folder of the images; by default `images` beside the file, or the file's own folder.

    Raises:
        DataError: the file is missing, broken or contradicts itself, or images that it lists are missing.
    """
    try:
        content = msgspec.json.decode(annotations.read_bytes(), type=_File)
    except OSError as error:
        raise DataError(
            f"Cannot read the labels '{annotations}': {error.strerror}. Give a COCO annotation file."
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{annotations}' is no COCO annotation file: {error}. Give one with bounding boxes."
        ) from error
    _check_references(annotations, content)
    folder, found = _find_images(annotations, content, images)
    missing = [i.file_name for i in content.images if i.file_name not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(content.images)} images that '{annotations}' lists are missing in '{folder}', "
            f"the first is '{missing[0]}'. Add them, or take them out of the annotation file."
        )
    return CocoLabels(
        path=annotations,
        folder=folder,
        images=tuple(sorted(content.images, key=lambda i: i.id)),
        boxes=content.annotations,
        categories=tuple(sorted(content.categories, key=lambda c: c.id)),
    )


def _check_references(path: Path, content: _File) -> None:
    images, categories = {i.id for i in content.images}, {c.id for c in content.categories}
    if not content.images or not content.categories:
        raise DataError(f"'{path}' lists {len(images)} images and {len(categories)} categories; both are needed.")
    if len(images) < len(content.images) or len(categories) < len(content.categories):
        raise DataError(f"'{path}' uses an image id or a category id twice. Make the ids unique.")
    for box in content.annotations:
        if box.image_id not in images or box.category_id not in categories:
            raise DataError(
                f"'{path}' has a box for image {box.image_id} and category {box.category_id}, "
                "at least one of which it does not list. Repair the file."
            )


def _find_images(path: Path, content: _File, images: Path | None) -> tuple[Path, set[str]]:
    names = [i.file_name for i in content.images]
    folders = [images] if images is not None else [path.parent / "images", path.parent]
    for folder in folders:
        found = {name for name in names if (folder / name).is_file()}
        if found:
            return folder, found
    raise DataError(
        f"None of the {len(names)} images that '{path}' lists, such as '{names[0]}', lies in "
        f"{' or '.join(repr(str(f)) for f in folders)}. Name the folder that holds them."
    )


@dataclass(frozen=True, slots=True)
class CategoryMatches:
    """D detections of one category, best score first, matched to labels at T IoU thresholds."""

    image: np.ndarray
    """(D,) int, position of the detection's image."""
    hit: np.ndarray
    """(T, D) bool: matched to a label that counts."""
    ignored: np.ndarray
    """(T, D) bool: counts neither as hit nor as miss, e.g. inside a crowd."""
    positives: np.ndarray
    """(I,) int, labels that count, per image."""


@dataclass(frozen=True, slots=True)
class BoxMatches:
    """What pycocotools found on I images."""

    ap: float
    """Average precision as pycocotools gives it: mean over IoU thresholds and categories with labels."""
    ap50: float
    """At IoU threshold 0.5."""
    categories: tuple[CategoryMatches, ...]
    """Those with at least one label that counts."""
    images: int


def match_boxes(
    labels: CocoLabels, images: Sequence[LabelledImage], detections: Sequence[Detections], category_ids: np.ndarray
) -> BoxMatches:
    """Match detections to labels with pycocotools' `COCOeval` (all areas, 100 detections per class and image).

    Args:
        labels: whose boxes count.
        images: those that were evaluated, in the order of their ids.
        detections: one per image.
        category_ids: (nc,) category id per class index, -1 for none.

    Raises:
        DataError: the images have no labels that count.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    chosen = {image.id for image in images}
    truth, found = COCO(), COCO()
    truth.dataset = {
        "images": [{"id": image.id} for image in images],
        "categories": [{"id": category.id} for category in labels.categories],
        "annotations": _numbered(_label(box) for box in labels.boxes if box.image_id in chosen),
    }
    found.dataset = truth.dataset | {
        "annotations": _numbered(
            row
            for image, detection in zip(images, detections, strict=True)
            for row in _results(image.id, detection, category_ids)
        )
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        run = COCOeval(truth, found, "bbox")
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
        run.params.maxDets = [MAX_DETECTIONS]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., 0, 0]  # (thresholds, recalls, categories), -1 where nothing counts
    counted = precision[0, 0] > -1
    if not counted.any():
        raise DataError(f"The {len(images)} evaluated images have no labels in '{labels.path}'. Take more images.")
    per_image = np.array(run.evalImgs, dtype=object).reshape(len(labels.categories), len(images))
    return BoxMatches(
        ap=float(precision[precision > -1].mean()),
        ap50=float(precision[0][precision[0] > -1].mean()),
        categories=tuple(_category(row) for row in per_image[counted]),
        images=len(images),
    )


def _numbered(rows: Any) -> list[dict[str, Any]]:
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


def _results(image_id: int, found: Detections, category_ids: np.ndarray) -> list[dict[str, Any]]:
    corners = found.boxes.astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    rows = zip(corners[:, :2], sizes, found.scores.tolist(), category_ids[found.classes].tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": [*start.tolist(), *size.tolist()],
            "area": float(size[0] * size[1]),
            "iscrowd": 0,
            "score": score,
        }
        for start, size, score, category in rows
        if category >= 0
    ]


def _category(row: np.ndarray) -> CategoryMatches:
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
        image=np.concatenate(image)[order],
        hit=np.concatenate(matched, axis=1)[:, order] & ~unused,
        ignored=unused,
        positives=positives,
    )


def resampled_weights(images: int, count: int, seed: int) -> np.ndarray:
    """(count, images) int: how often each image is drawn when `images` are drawn with replacement."""
    draws = np.random.default_rng(seed).integers(0, images, (count, images))
    return np.stack([np.bincount(draw, minlength=images) for draw in draws])


def average_precision(matches: BoxMatches, weights: np.ndarray) -> np.ndarray:
    """Average precision as if image i occurred `weights[:, i]` times.

    A repeated detection only repeats a step of the precision-recall curve, so the best precision at every recall is
    that of the curve through the ends of the steps: equal to pycocotools' value on repeated images, but for the
    order of equal scores within an image.

    Args:
        matches: on I images.
        weights: (B, I) non-negative int.

    Returns:
        (B, T), mean over the categories with labels in the resample; NaN where there are none.
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
