"""Instance segmentation with YOLO-style outputs: every box has coefficients of shared prototype masks.

coefficients (k, m) @ prototypes (m, h, w) -> logits on the canvas -> bilinear to the image -> cut at the box -> > 0

This is the order in which Ultralytics makes masks for COCO's evaluation (`process_mask_native`); its quick masks, cut
at the box before they are enlarged, end at multiples of a prototype's pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bitalloy.data.images import Geometry, ImageSpec
from bitalloy.data.masks import Rle, decode, encode, packed, unpacked
from bitalloy.tasks.base import RunModel, Seen, Task, TaskMetric, TaskResult, few_images
from bitalloy.tasks.bootstrap import RESAMPLES, resampled_weights
from bitalloy.tasks.detection import (
    BOX_NOISE,
    DISTURBANCE,
    SHOW_DETECTIONS,
    DetectionData,
    Matched,
    compare_precision,
    compare_shown,
    disturb_detections,
    ids_of,
    judge_detector,
    on_image,
    open_detection,
    precision_of,
    seen_of,
    shifts,
)
from bitalloy.tasks.precision import Detections, match_masks
from bitalloy.tasks.resample import sample
from bitalloy.tasks.yolo import detections, has_masks, mask_parts, select_boxes, split_predictions

__all__ = ["INSTANCE", "draw_masks", "find_instances", "judge_instances", "measure_instances", "observe_instances"]


def draw_masks(
    coefficients: np.ndarray,
    prototypes: np.ndarray,
    boxes: np.ndarray,
    geometry: Geometry,
    canvas: tuple[int, int],
    size: tuple[int, int],
) -> Iterator[np.ndarray]:
    """Yield masks in image pixels one by one: three hundred of a large photograph would not fit in memory.

    Image pixel (i, j) has its centre at (j + 1/2, i + 1/2); its logit is read at that place of the prototypes, so the
    canvas's padding needs no rounding. Pixels whose centre lies outside the box are not in the mask.

    Args:
        coefficients: coefficients of each box, (k, m).
        prototypes: prototype masks (m, h, w), stretched over the canvas.
        boxes: corners of the boxes in image pixels, inside the image, (k, 4).
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
    """Find the boxes and masks of one image, in its pixels.

    Args:
        outputs: outputs of the model, in graph order.
        image: how the image was prepared.
        geometry: where the image lies on the canvas.
        size: (width, height) of the image.

    Raises:
        DataError: the outputs are not those of a YOLO model with masks.
    """
    boxes, scores = split_predictions(outputs)
    coefficients, prototypes = mask_parts(outputs)
    index, label = select_boxes(boxes, scores)
    found = on_image(detections(boxes, scores, index, label), geometry, size)
    canvas = (image.height, image.width)
    return found, [
        encode(mask) for mask in draw_masks(coefficients[index], prototypes, found.boxes, geometry, canvas, size)
    ]


def observe_instances(models: Mapping[str, RunModel], data: DetectionData, sample: int, /) -> dict[str, Seen]:
    """Run models on one image, and return their boxes and masks.

    Raises:
        DataError: labels, images and models do not fit each other.
    """
    feeds, geometry, size = data.opened(sample)
    found: dict[str, Seen] = {}
    for name, run in models.items():
        outputs = run(feeds)
        classes = len(split_predictions(outputs)[1])
        data.labels.category_ids(classes, data.names)
        boxes, masks = find_instances(outputs, data.image, geometry, size)
        found[name] = {**seen_of(boxes, classes), **packed(masks), "size": np.array(size)}
    return found


def judge_instances(seen: Sequence[Seen], data: DetectionData, samples: Sequence[int], /) -> Matched:
    """Match boxes and masks with labels; boxes only, where these have no mask at all.

    Raises:
        DataError: the images have no labels that count, or a label has no mask or a broken one.
    """
    sizes = tuple((int(one["size"][0]), int(one["size"][1])) for one in seen)
    drawn = tuple(unpacked(one, size) for one, size in zip(seen, sizes, strict=True))
    boxes = replace(judge_detector(seen, data, samples), drawn=drawn, sizes=sizes)
    if not data.labels.has_masks():
        return boxes
    entries, ids = data.entries(samples), ids_of(seen, data)
    return replace(boxes, masks=match_masks(data.labels, entries, sizes, boxes.detections, drawn, ids))


def measure_instances(
    judged: Mapping[str, Matched],
    data: DetectionData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Measure the box AP, mask AP, agreement and shifts of several models on the same images, side by side.

    Labels without any mask still give box AP, with a note; images without labels give agreement.
    """
    entries, weights = data.entries(samples), resampled_weights(len(samples), resamples, seed)
    metrics: tuple[TaskMetric, ...] = ()
    agreements: tuple[TaskMetric, ...] = ()
    notes: tuple[str, ...] = ()
    for kind, masks in (("box ", False), ("mask ", True)):
        matched = {name: one.masks if masks else one.boxes for name, one in judged.items()}
        results = {
            name: precision_of(matches, entries, judged[name].detections, weights)
            for name, matches in matched.items()
            if matches is not None
        }
        metrics += compare_precision(kind, results) if results else ()
        agreed, told = compare_shown(kind, judged, weights, masks=masks)
        agreements, notes = agreements + agreed, notes + told
    if data.labelled and not data.labels.has_masks():
        notes += (f"No mask AP: '{data.labels.path.name}' has no masks.",)
    shift, overlap = shifts(judged, weights)
    return TaskResult(
        task="instance",
        metrics=metrics + agreements,
        confidence_shift=shift,
        box_overlap=overlap,
        notes=(*dict.fromkeys(notes), *few_images(len(entries))),
    )


def _disturb(seen: Seen, rng: np.random.Generator, /) -> Seen:
    """Disturb scores and boxes, and move the masks by as much as the boxes' edges."""
    size = int(seen["size"][0]), int(seen["size"][1])
    moved = []
    for mask, box in zip(unpacked(seen, size), seen["boxes"], strict=True):
        steps = np.rint(rng.normal(0, BOX_NOISE, 2) * (box[2:] - box[:2])).astype(int)
        moved.append(encode(np.roll(decode(mask), tuple(steps[::-1]), (0, 1))) if steps.any() else mask)
    return {**disturb_detections(seen, rng), **packed(moved)}


INSTANCE: Task[DetectionData] = Task(
    name="instance",
    labels="a COCO annotation file with boxes and masks, or a folder of images",
    matches=lambda model: has_masks(model.inputs, model.outputs),
    open=open_detection,
    observe=observe_instances,
    measure=measure_instances,
    judge=judge_instances,
    disturb=_disturb,
    disturbance=f"{DISTURBANCE}, and masks moved as far",
    show=SHOW_DETECTIONS,
)
