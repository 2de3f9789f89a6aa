"""Samples on which two models differ most: what counts as agreement, the order, the pictures, and single classes."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.tasks.test_semantic import interface

from bitalloy.core.examples import Examples
from bitalloy.data.images import ImageSpec, open_image
from bitalloy.tasks.base import Seen
from bitalloy.tasks.coco import read_coco
from bitalloy.tasks.detection import DETECTION, DetectionData, judge_detector, seen_of
from bitalloy.tasks.pictures import DIFFERENCE, SIDE
from bitalloy.tasks.precision import Detections
from bitalloy.tasks.semantic import SEMANTIC, open_semantic
from bitalloy.tasks.shown import SHOWN_SAMPLES, examples_of
from bitalloy.tasks.shown_boxes import agreement_of_boxes


def seen(*rows: tuple[float, float, float, float, float, int]) -> Seen:
    """An observation of x1, y1, x2, y2, score and class."""
    table = np.array(rows, float).reshape(-1, 6)
    return seen_of(Detections(table[:, :4], table[:, 4], table[:, 5].astype(int)), 8)


ONE, FAR = (10.0, 10.0, 30.0, 30.0, 0.9, 1), (60.0, 60.0, 90.0, 90.0, 0.8, 2)


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (seen(ONE, FAR), seen(ONE, FAR), 1.0),
        (seen(), seen(), 1.0),
        (seen(ONE, FAR), seen(ONE), 2 / 3),  # one pair of three boxes
        (seen(ONE), seen((*ONE[:5], 2)), 0.0),  # another class
        (seen(ONE), seen((10.0, 10.0, 30.0, 25.0, 0.9, 1)), 0.75),  # three quarters of the area
        (seen(ONE), seen((10.0, 10.0, 30.0, 19.0, 0.9, 1)), 0.0),  # less than half is another object
        (seen(ONE), seen(ONE, (*FAR[:4], 0.2, 2)), 1.0),  # not shown, because its score is low
    ],
)
def test_agreement_of_boxes(reference: Seen, other: Seen, expected: float) -> None:
    assert agreement_of_boxes(reference, other) == pytest.approx(expected)
    assert agreement_of_boxes(other, reference) == pytest.approx(expected)


def labelled(shapes: Path) -> DetectionData:
    return DetectionData(read_coco(shapes / "instances.json"), ImageSpec(input="images", height=160, width=160))


def labels_as_seen(data: DetectionData, leave_out: Sequence[int] = ()) -> list[Seen]:
    """What a perfect detector would show of the labels, without some classes."""
    ids = [category.id for category in data.labels.categories]
    found = []
    for image in data.labels.images:
        rows = [
            (b.bbox[0], b.bbox[1], b.bbox[0] + b.bbox[2], b.bbox[1] + b.bbox[3], 0.9, ids.index(b.category_id))
            for b in data.labels.boxes
            if b.image_id == image.id and ids.index(b.category_id) not in leave_out
        ]
        found.append(seen(*rows))
    return found


def shown(data: DetectionData, first: list[Seen], second: list[Seen]) -> Examples:
    samples = range(len(first))
    judged = judge_detector(first, data, samples), judge_detector(second, data, samples)
    found = examples_of(DETECTION, data, samples, (first, second), judged, 0)
    assert found is not None
    return found


def test_a_class_that_is_lost_comes_first_and_the_others_stay(shapes: Path) -> None:
    data = labelled(shapes)
    lost = data.labels.boxes[0].category_id
    index = [category.id for category in data.labels.categories].index(lost)
    classes = shown(data, labels_as_seen(data), labels_as_seen(data, [index])).classes
    assert {c.name for c in classes} == {
        c.name for c in data.labels.categories if any(b.category_id == c.id for b in data.labels.boxes)
    }
    first, *others = classes
    assert first.name == data.labels.categories[index].name
    assert (first.reference, first.mixed) == pytest.approx((1.0, 0.0))
    assert first.labels == sum(b.category_id == lost for b in data.labels.boxes)
    assert first.drop.value == pytest.approx(1.0)
    assert all(c.mixed == pytest.approx(1.0) and c.drop.value == pytest.approx(0.0) for c in others)


def test_the_worst_images_come_first_with_what_one_model_shows_alone(shapes: Path) -> None:
    data = labelled(shapes)
    first = labels_as_seen(data)
    second = [*first[:2], seen(), *first[3:]]
    found = shown(data, first, second)
    assert found.samples == 6 and found.same == 5 and len(found.worst) == SHOWN_SAMPLES
    assert found.worst[0].name == Path(data.labels.images[2].file_name).name and found.worst[0].agreement == 0.0
    plain = open_image(data.labels.file_of(data.labels.images[2]))
    reference, mixed = (Image.open(io.BytesIO(jpeg)) for jpeg in (found.worst[0].reference, found.worst[0].mixed))
    assert reference.format == "JPEG" and max(reference.size) <= SIDE and reference.size == plain.size
    assert np.abs(np.asarray(mixed, int) - np.asarray(plain, int)).mean() < 12, "nothing is drawn on it"

    def red(picture: Image.Image) -> int:
        return int((np.abs(np.asarray(picture, int) - np.array(DIFFERENCE)).max(axis=-1) < 30).sum())

    assert red(reference) > red(mixed) + 100


def test_label_maps_are_shown_where_they_differ(shapes: Path) -> None:
    data = open_semantic(shapes, interface(), reduce_zero_label=False)
    samples = data.choose(2, 0)
    sizes = [open_image(file).size for file in data.images(samples)]
    maps = [np.zeros((height, width), np.uint8) for width, height in sizes]
    other = [maps[0], maps[1].copy()]
    other[1][: sizes[1][1] // 4] = 3

    def observed(one: np.ndarray) -> Seen:
        return {"pixels": np.frombuffer(zlib.compress(one.tobytes()), np.uint8)}

    pair = [observed(m) for m in maps], [observed(m) for m in other]
    found = examples_of(SEMANTIC, data, samples, pair, (None, None), 0)
    assert found is not None and found.same == 1 and found.classes == ()
    assert found.worst[0].agreement == pytest.approx(0.75)
    first, second = (
        np.asarray(Image.open(io.BytesIO(j)), int) for j in (found.worst[0].reference, found.worst[0].mixed)
    )
    changed = np.abs(first - second).max(axis=-1) > 40
    assert np.abs(second[:30] - np.array(DIFFERENCE)).max(axis=-1).mean() < 12, "what differs is red"
    assert changed[:30].mean() > 0.9 and changed[50:].mean() < 0.05
