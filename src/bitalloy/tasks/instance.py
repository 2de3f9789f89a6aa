"""Instance segmentation with YOLO-style outputs: every box has coefficients of shared prototype masks.

coefficients (k, m) @ prototypes (m, h, w) -> logits on the canvas -> bilinear to the image -> cut at the box -> > 0

This is the order in which Ultralytics makes masks for COCO's evaluation (`process_mask_native`); its quick masks, cut
at the box before they are enlarged, end at multiples of a prototype's pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bitalloy.data import Geometry, ImageSpec, image_feed
from bitalloy.masks import Rle, encode, packed, unpacked
from bitalloy.tasks.base import Run, Seen, Task, TaskResult, few_images
from bitalloy.tasks.bootstrap import RESAMPLES, resampled_weights
from bitalloy.tasks.detection import (
    DetectionData,
    compare_precision,
    detections_of,
    ids_of,
    on_image,
    open_detection,
    precision_of,
    seen_of,
    shifts,
)
from bitalloy.tasks.precision import Detections, match_boxes, match_masks
from bitalloy.tasks.resample import sample
from bitalloy.tasks.yolo import decode, detections, has_masks, mask_parts, select

__all__ = ["TASK", "draw_masks", "find_instances", "measure_instances", "observe_instances"]


def draw_masks(
    coefficients: np.ndarray,
    prototypes: np.ndarray,
    boxes: np.ndarray,
    geometry: Geometry,
    canvas: tuple[int, int],
    size: tuple[int, int],
) -> Iterator[np.ndarray]:
    """Masks in image pixels, one after the other: three hundred of a large photograph would not fit in memory.

    Image pixel (i, j) has its centre at (j + 1/2, i + 1/2); its logit is read at that place of the prototypes, so the
    canvas's padding needs no rounding. Pixels whose centre lies outside the box are not in the mask.

    Args:
        coefficients: (k, m).
        prototypes: (m, h, w), stretched over the canvas.
        boxes: (k, 4), corners in image pixels, inside the image.
        geometry: where the image lies on the canvas.
        canvas: (height, width) of the model's input.
        size: (width, height) of the image.

    Yields:
        k masks, bool (height, width).
    """
    rows = ((np.arange(size[1]) + 0.5) * geometry.ratio_y + geometry.top) * prototypes.shape[1] / canvas[0] - 0.5
    columns = ((np.arange(size[0]) + 0.5) * geometry.ratio_x + geometry.left) * prototypes.shape[2] / canvas[1] - 0.5
    with np.errstate(invalid="ignore", over="ignore"):  # a broken model's coefficients give an empty mask
        logits = np.tensordot(coefficients, prototypes, 1)
    for one, box in zip(logits, boxes, strict=True):
        left, top, right, bottom = np.ceil(box - 0.5).astype(int)
        mask = np.zeros((size[1], size[0]), np.bool_)
        with np.errstate(invalid="ignore", over="ignore"):
            mask[top:bottom, left:right] = sample(one, rows[top:bottom], columns[left:right]) > 0
        yield mask


def find_instances(
    outputs: Mapping[str, np.ndarray], image: ImageSpec, geometry: Geometry, size: tuple[int, int]
) -> tuple[Detections, list[Rle]]:
    """Boxes and masks of one image, in its pixels.

    Args:
        outputs: of the model, in graph order.
        image: how the image was prepared.
        geometry: where it lies on the canvas.
        size: (width, height) of the image.

    Raises:
        DataError: the outputs are not those of a YOLO model with masks.
    """
    boxes, scores = decode(outputs)
    coefficients, prototypes = mask_parts(outputs)
    index, label = select(boxes, scores)
    found = on_image(detections(boxes, scores, index, label), geometry, size)
    canvas = (image.height, image.width)
    return found, [
        encode(mask) for mask in draw_masks(coefficients[index], prototypes, found.boxes, geometry, canvas, size)
    ]


def observe_instances(models: Mapping[str, Run], data: DetectionData, sample: int, /) -> dict[str, Seen]:
    """Boxes and masks on one image.

    Raises:
        DataError: labels, images and models do not fit each other.
    """
    entry = data.labels.images[sample]
    opened = data.labels.open_image(entry, data.image.channels)
    feed, geometry = image_feed(opened, data.image)
    found: dict[str, Seen] = {}
    for name, run in models.items():
        outputs = run({data.image.input: feed})
        classes = len(decode(outputs)[1])
        data.labels.category_ids(classes, data.names)
        boxes, masks = find_instances(outputs, data.image, geometry, opened.size)
        found[name] = {**seen_of(boxes, classes), **packed(masks), "size": np.array(opened.size)}
    return found


def measure_instances(
    seen: Mapping[str, Sequence[Seen]],
    data: DetectionData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Box AP, mask AP and confidence shift of several models on the same images, side by side.

    Labels without any mask still give box AP, with a note.

    Raises:
        DataError: the images have no labels that count, or a label has no mask or a broken one.
    """
    entries, category_ids = data.entries(samples), ids_of(seen, data)
    found = {name: detections_of(one) for name, one in seen.items()}
    weights = resampled_weights(len(entries), resamples, seed)
    by_box = {
        name: precision_of(match_boxes(data.labels, entries, one, category_ids), entries, one, weights, seed)
        for name, one in found.items()
    }
    metrics = compare_precision("box ", by_box)
    notes = few_images(len(entries))
    if data.labels.has_masks():
        by_mask = {}
        for name, one in found.items():
            sizes = [(int(s["size"][0]), int(s["size"][1])) for s in seen[name]]
            drawn = [unpacked(s, size) for s, size in zip(seen[name], sizes, strict=True)]
            matches = match_masks(data.labels, entries, sizes, one, drawn, category_ids)
            by_mask[name] = precision_of(matches, entries, one, weights, seed)
        metrics += compare_precision("mask ", by_mask)
    else:
        notes += (f"No mask AP: '{data.labels.path.name}' has no masks.",)
    return TaskResult(task="instance", metrics=metrics, confidence_shift=shifts(by_box), notes=notes)


TASK: Task[DetectionData] = Task(
    name="instance",
    labels="a COCO annotation file with boxes and masks",
    matches=lambda model: has_masks(model.inputs, model.outputs),
    open=open_detection,
    observe=observe_instances,
    measure=measure_instances,
)
