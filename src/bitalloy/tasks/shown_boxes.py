"""What detectors show on single images, and the precision of each class."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from PIL import Image

from bitalloy.core.examples import ClassPrecision
from bitalloy.data.masks import decode, unpacked
from bitalloy.tasks.base import Seen, ShownSample
from bitalloy.tasks.bootstrap import bootstrap_estimate, resampled_weights
from bitalloy.tasks.coco import CocoLabels
from bitalloy.tasks.pictures import blend_masks, colour_of, draw_boxes, thumbnail_of
from bitalloy.tasks.precision import SHOWN, Matches, average_precision

__all__ = ["BOX_MEASURE", "agreement_of_boxes", "box_overlaps", "class_precisions", "show_boxes"]

BOX_MEASURE = (
    f"overlap (IoU) of boxes of the same class that both models show, with scores of at least {SHOWN:g}, over the mean "
    "number of boxes that they show"
)
CLASS_RESAMPLES = 200


class Named(Protocol):
    """Labels, with the class names of a model."""

    @property
    def labels(self) -> CocoLabels:
        """The labels."""
        ...

    @property
    def names(self) -> tuple[str, ...] | None:
        """Class names of the model; None where they are unknown."""
        ...


def box_overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union (k, m) of boxes (k, 4) and (m, 4), given as corners."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.clip(sides, 0, None).prod(axis=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return np.asarray(shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9))


def agreement_of_boxes(reference: Seen, other: Seen) -> float:
    """Return how far two detectors agree on one image, see `BOX_MEASURE`; 1 where neither shows anything."""
    first, second = _shown(reference), _shown(other)
    count = len(first) + len(second)
    pairs = _pairs(reference, other, first, second)
    return float(2 * sum(overlap for _, _, overlap in pairs) / count) if count else 1.0


def show_boxes(image: Image.Image, reference: Seen, other: Seen, data: Named, _: int, /) -> ShownSample:
    """Draw what two detectors show on one image; a box that the other one does not show is thick and red."""
    first, second = _shown(reference), _shown(other)
    pairs = _pairs(reference, other, first, second)
    alone = ({*first} - {a for a, _, _ in pairs}, {*second} - {b for _, b, _ in pairs})
    drawn = [
        _drawn(image, seen, indices, lone, data)
        for seen, indices, lone in zip((reference, other), (first, second), alone, strict=True)
    ]
    return ShownSample(drawn[0], drawn[1])


def class_precisions(
    reference: Matches | None, mixed: Matches | None, data: Named, seed: int
) -> tuple[ClassPrecision, ...]:
    """Return the box AP50-95 of each class that has labels, the largest drop first; nothing without labels."""
    if reference is None or mixed is None:
        return ()
    weights = resampled_weights(reference.images, CLASS_RESAMPLES, seed)
    every = np.ones((1, reference.images), np.intp)
    names = {category.id: category.name for category in data.labels.categories}
    found = []
    for one, two in zip(reference.categories, mixed.categories, strict=True):
        alone = [replace(matches, categories=(c,)) for matches, c in ((reference, one), (mixed, two))]
        first, second = (float(average_precision(m, every).mean()) for m in alone)
        draws = [average_precision(m, weights).mean(axis=1) for m in alone]
        found.append(
            ClassPrecision(
                name=names[one.category],
                labels=int(one.positives.sum()),
                reference=first,
                mixed=second,
                drop=bootstrap_estimate(first - second, draws[0] - draws[1]),
            )
        )
    return tuple(sorted(found, key=lambda c: -c.drop.value))


def _names(data: Named, classes: int) -> list[str]:
    """Names of the classes of a model: its own, those of the labels, or their numbers."""
    if data.names is not None and len(data.names) == classes:
        return list(data.names)
    known = {category.id: category.name for category in data.labels.categories}
    ids = data.labels.category_ids(classes, data.names)
    return [known.get(int(number), f"class {index}") for index, number in enumerate(ids)]


def _shown(seen: Seen) -> list[int]:
    return [int(i) for i in np.flatnonzero(seen["scores"] >= SHOWN)]


def _pairs(a: Seen, b: Seen, first: list[int], second: list[int]) -> list[tuple[int, int, float]]:
    """Indices and overlap of the detections of one class that both show, the greatest overlap first, at least 0.5."""
    same = a["classes"][first][:, None] == b["classes"][second][None]
    overlap = np.where(same, box_overlaps(a["boxes"][first], b["boxes"][second]), 0.0)
    found = []
    while overlap.size and overlap.max() >= 0.5:
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        found.append((first[row], second[column], float(overlap[row, column])))
        overlap[row], overlap[:, column] = 0.0, 0.0
    return found


def _drawn(image: Image.Image, seen: Seen, indices: list[int], alone: set[int], data: Named) -> Image.Image:
    small = thumbnail_of(image)
    classes = [int(c) for c in seen["classes"][indices]]
    colours = [colour_of(c) for c in classes]
    if "masks" in seen and "size" in seen:
        masks = unpacked(seen, (int(seen["size"][0]), int(seen["size"][1])))
        blend_masks(small, [decode(masks[i]) for i in indices], colours)
    names = _names(data, int(seen["of"]))
    texts = [f"{names[c]} {score:.2f}" for c, score in zip(classes, seen["scores"][indices], strict=True)]
    draw_boxes(
        small, seen["boxes"][indices] * (small.width / image.width), texts, colours, [i in alone for i in indices]
    )
    return small
