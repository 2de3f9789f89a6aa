"""Promptable segmentation as SAM does it: a mask for a box or a point.

image -> longest side 1024, padded right and below -> encoder -> embedding, once for an image
prompt -> coordinates on that canvas, with labels -> decoder -> 4 masks of low resolution, each with a predicted IoU
mask -> bilinear to the canvas -> cut to the image -> bilinear to the image's size -> > 0

Labels of prompt points: 1 inside, 0 outside, 2 and 3 the corners of a box, -1 padding. A prompt without a box ends
with the point (0, 0) labelled -1. Of the four masks, a box takes the first, which SAM trained for prompts that leave no
doubt; a single point takes the best of the other three by predicted IoU.

With labels, every object gives a box and a point. Without, agreement with the first model can still be measured: the
prompts are the nine cells of a 3 by 3 grid over the image, and their centres.

A model is one function that takes all three inputs; `join_promptable` makes it of an encoder and a decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.store import StageInputs
from bitalloy.data import masks
from bitalloy.data.datasets import ImageFolder, choose_samples
from bitalloy.data.images import ImageOptions, ImageSpec, image_feed, infer_image_spec, open_image
from bitalloy.data.masks import Mask, interior_point, overlap
from bitalloy.tasks.base import (
    Interface,
    RunModel,
    Seen,
    ShownSample,
    ShowSample,
    Task,
    TaskResult,
    few_images,
    image_input,
    refuse_fit,
)
from bitalloy.tasks.bootstrap import RESAMPLES, compare_models, ratio_of_sums, resampled_weights
from bitalloy.tasks.coco import CocoLabels, LabelledBox, LabelledImage, read_coco
from bitalloy.tasks.pictures import blend_masks, colour_of, draw_boxes, thumbnail_of
from bitalloy.tasks.resample import resize

__all__ = [
    "PROMPT_KINDS",
    "PROMPTABLE",
    "Prompt",
    "PromptData",
    "grid",
    "join_promptable",
    "measure_prompts",
    "observe_prompts",
    "open_prompts",
    "prepare_image",
    "prompts_of",
    "to_mask",
]

PROMPT_KINDS = ("box", "point")
COORDINATES, LABELS = "point_coords", "point_labels"
"""Names of the prompt's inputs, as in SAM's own export."""
_SLACK = 1.0
"""Pixels that a box may reach over the image's border: labels are rounded."""
_CELLS = 3
"""Number of cells of the grid along each side."""

IOU_NOISE = 0.02
SHOWN_PROMPTS = 8
"""Largest number of box prompts whose masks a picture shows."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: points with labels, in image pixels."""

    points: np.ndarray
    """Coordinates x, y of the points, (p, 2) float."""
    labels: np.ndarray
    """Labels of the points, (p,) float: 1 inside, 0 outside, 2 and 3 box corners, -1 padding."""

    @staticmethod
    def box(x1: float, y1: float, x2: float, y2: float) -> Prompt:
        """Make the prompt of a box from its corners."""
        return Prompt(np.array([[x1, y1], [x2, y2]]), np.array([2.0, 3.0]))

    @staticmethod
    def point(x: float, y: float) -> Prompt:
        """Make the prompt of a point inside, with the padding that a prompt without a box needs."""
        return Prompt(np.array([[x, y], [0.0, 0.0]]), np.array([1.0, -1.0]))


class PromptInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metrics of prompts, beside the models."""

    labels: str | None
    """SHA-256 of the annotation file; None where there is none."""
    images: tuple[str, ...]
    """SHA-256 of each image."""
    samples: tuple[int, ...]
    image: ImageSpec


@dataclass(frozen=True)
class PromptData:
    """Images, perhaps with COCO masks whose boxes and inner points are the prompts, opened for one model."""

    files: tuple[Path, ...]
    labels: CocoLabels | None
    """Labels of the same images in the same order; None for images without labels."""
    image: ImageSpec
    """Preparation of images; its height and width are those of the canvas."""

    def images(self, samples: Sequence[int]) -> tuple[Path, ...]:
        """Return the file of the image of each sample."""
        return tuple(self.files[i] for i in samples)

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> PromptInputs:
        """Return all that decides metrics on some samples, whose images have the given hashes."""
        labels = None if self.labels is None else self.labels.fingerprint()
        return PromptInputs(labels=labels, images=tuple(images), samples=tuple(samples), image=self.image)

    @property
    def labelled(self) -> bool:
        """Whether there are labels, and not images only."""
        return self.labels is not None

    @property
    def paired(self) -> bool:
        """False: every model is observed alone."""
        return False

    @cached_property
    def objects(self) -> Mapping[int, Sequence[LabelledBox]]:
        """Image id -> its objects; empty without labels."""
        return self.labels.objects() if self.labels is not None else {}

    def choose(self, limit: int | None, seed: int) -> list[int]:
        """Choose at most `limit` images, None for all, and return their numbers in ascending order."""
        return choose_samples([file.name for file in self.files], limit=limit, seed=seed)

    def open(self, index: int) -> Image.Image:
        """Read an image."""
        if self.labels is None:
            return open_image(self.files[index], self.image.channels)
        return self.labels.open_image(self.labels.images[index], self.image.channels)


def open_prompts(path: Path, model: Interface) -> PromptData:
    """Read COCO masks, or take a folder of images without labels.

    Args:
        path: COCO annotation file, or a folder.
        model: a promptable model.

    Raises:
        DataError: labels or images are broken or missing, or no object has a mask.
    """
    spec = image_input(model)
    image = model.image or infer_image_spec(model.inputs, task=None, options=ImageOptions(fit="stretch"))
    assert image is not None and spec is not None, "a promptable model without an image input is refused"
    refuse_fit(image, "a promptable model fits the longest side and fills the rest with zeros")
    if path.is_dir():
        found = ImageFolder(path, (spec,), image)
        return PromptData(tuple(path / found.name(i) for i in range(len(found))), None, image)
    labels = read_coco(path)
    if not labels.has_masks():
        raise DataError(f"'{path}' has no masks to compare with. Give a file with `segmentation`, or only the images.")
    return PromptData(tuple(labels.folder / entry.file_name for entry in labels.images), labels, image)


def grid(size: tuple[int, int]) -> list[dict[str, Prompt]]:
    """Return the prompts, by kind, over an image of `size` (width, height): cells and their centres, row by row."""
    width, height = size[0] / _CELLS, size[1] / _CELLS
    corners = [(column * width, row * height) for row in range(_CELLS) for column in range(_CELLS)]
    return [
        {"box": Prompt.box(x, y, x + width, y + height), "point": Prompt.point(x + width / 2, y + height / 2)}
        for x, y in corners
    ]


def prompts_of(labels: CocoLabels, entry: LabelledImage, box: LabelledBox, mask: Mask) -> dict[str, Prompt]:
    """Return the prompts of an object by kind: its box, and its own point or the one deepest inside its mask.

    Raises:
        DataError: the box or the point lies outside the image.
    """
    height, width = mask.shape
    where = f"annotation {box.id} of '{labels.path}' on '{entry.file_name}' ({width}x{height})"
    x, y, w, h = box.bbox
    if min(w, h) <= 0 or min(x, y) < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
        raise DataError(
            f"The box {list(box.bbox)} (left, top, width, height) of {where} has no area or lies outside the image. "
            "Repair or remove it."
        )
    point = box.point or interior_point(mask)
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise DataError(f"The point {list(point)} of {where} lies outside the image. Repair or remove it.")
    corners = np.clip([x, y, x + w, y + h], 0, [width, height, width, height])
    return {"box": Prompt.box(*corners.tolist()), "point": Prompt.point(*point)}


def prepare_image(image: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the feed (1, 3, h, w) of an image, and (height, width) of the part of the canvas that it covers.

    The longest side gets the canvas's length, pixels are normalised, and the rest is zero, as SAM does.
    """
    side = max(spec.height, spec.width)
    scale = side / max(image.size)
    height, width = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
    fitted = msgspec.structs.replace(spec, fit="stretch", height=height, width=width, layout="NCHW")
    feed, _ = image_feed(image, fitted)
    canvas = np.zeros((1, spec.channels, side, side), feed.dtype)
    canvas[:, :, :height, :width] = feed
    return canvas, (height, width)


def feeds_of(prompt: Prompt, size: tuple[int, int], covered: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the decoder's feeds (1, p, 2) and (1, p) of a prompt on an image of `size` (width, height)."""
    ratio_xy = np.array([covered[1] / size[0], covered[0] / size[1]])
    points = np.where(prompt.labels[:, None] == -1, 0.0, prompt.points * ratio_xy)
    return {
        COORDINATES: points[None].astype(np.float32),
        LABELS: prompt.labels[None].astype(np.float32),
    }


def to_mask(
    outputs: Mapping[str, np.ndarray], kind: str, side: int, covered: tuple[int, int], size: tuple[int, int]
) -> Mask:
    """Return the mask of a prompt in image pixels.

    Args:
        outputs: masks (1, c, h, w) and predicted IoU (1, c), in this order.
        kind: `box` or `point`.
        side: side of the square canvas in pixels.
        covered: (height, width) of the canvas that the image covers.
        size: (width, height) of the image.

    Raises:
        DataError: the outputs have other shapes.
    """
    low, *others = outputs.values()
    if low.ndim != 4 or low.shape[0] != 1 or not others or others[0].shape != low.shape[:2]:
        raise DataError(
            f"The outputs have shapes {[list(o.shape) for o in outputs.values()]}; expected masks [1, c, height, "
            "width] and their predicted IoU [1, c], as exported from SAM."
        )
    several = kind == "point" and low.shape[1] > 1
    channel = 1 + int(np.nan_to_num(others[0][0, 1:], nan=-np.inf).argmax()) if several else 0
    logits = resize(low[0, channel], side, side)[: covered[0], : covered[1]]
    with np.errstate(invalid="ignore"):
        return np.asarray(resize(logits, size[1], size[0]) > 0)


def join_promptable(encode: RunModel, decode: RunModel) -> RunModel:
    """Build one function of an encoder and a decoder; what the encoder gives is kept for the prompts of the same image.

    The encoder gets the feeds without the prompt, the decoder the encoder's outputs by name, and the prompt. An image
    is the same as before if its array is the very same object.
    """
    kept: list[tuple[np.ndarray, Mapping[str, np.ndarray]]] = []

    def run(feeds: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        prompt = {name: feeds[name] for name in (COORDINATES, LABELS)}
        image = {name: value for name, value in feeds.items() if name not in prompt}
        (array,) = image.values()
        if not kept or kept[0][0] is not array:
            kept[:] = [(array, encode(image))]
        return decode({**kept[0][1], **prompt})

    return run


def observe_prompts(models: Mapping[str, RunModel], data: PromptData, sample: int, /) -> dict[str, Seen]:
    """Return the masks for all prompts on one image, packed, and their IoU with the labels, (objects, kinds).

    Crowds and objects without a pixel are left out.

    Raises:
        DataError: prompts or masks are broken, or models do not fit.
    """
    opened = data.open(sample)
    canvas, covered = prepare_image(opened, data.image)
    drawn: dict[str, list[masks.Rle]] = {name: [] for name in models}
    quality: dict[str, list[float]] = {name: [] for name in models}
    for prompts, truth in _asked(data, sample, opened.size):
        for kind in PROMPT_KINDS:
            feeds = {data.image.input: canvas, **feeds_of(prompts[kind], opened.size, covered)}
            for name, run in models.items():
                found = to_mask(run(dict(feeds)), kind, canvas.shape[-1], covered, opened.size)
                drawn[name].append(masks.encode(found))
                quality[name].append(overlap(truth, found) if truth is not None else 0.0)
    return {
        name: {
            **masks.packed(drawn[name]),
            "quality": np.reshape(quality[name], (-1, len(PROMPT_KINDS))),
            "size": np.array(opened.size),
        }
        for name in models
    }


def measure_prompts(
    seen: Mapping[str, Sequence[Seen]],
    data: PromptData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Measure mean IoU with the labels, and agreement with the first model, for box and point prompts.

    Both are means over objects; without labels there is agreement only.

    Raises:
        DataError: the images have no labelled object.
    """
    reference = next(iter(seen.values()))
    counts = np.array([float(len(one["quality"])) for one in reference])
    totals = {(name, kind): np.zeros((len(samples), 2)) for name in seen for kind in PROMPT_KINDS}
    for i, first in enumerate(reference):
        for name, part in seen.items():
            same = _agreement(first, part[i])
            for k, kind in enumerate(PROMPT_KINDS):
                totals[name, kind][i] = sum(part[i]["quality"][:, k]), sum(same[:, k])
    used = counts > 0
    if not used.any():
        where = data.labels.path if data.labels else data.files[0].parent
        raise DataError(f"The {len(counts)} evaluated images have no labelled object in '{where}'. Take more images.")
    n, objects = int(used.sum()), counts[used]
    weights = resampled_weights(n, resamples, seed)
    columns = {"mIoU": 0, "agreement": 1} if data.labels else {"agreement": 1}
    metrics = tuple(
        compare_models(
            f"{what}, {kind} prompts",
            {name: ratio_of_sums(totals[name, kind][used, column], objects, weights) for name in seen},
            n,
            witness=f"agreement, {kind} prompts" if what != "agreement" else "",
            agreement=what == "agreement",
        )
        for what, column in columns.items()
        for kind in PROMPT_KINDS
    )
    asked = "objects" if data.labels else "cells of a grid"
    notes = [f"{int(objects.sum())} {asked} on {n} images."]
    if n < len(used):
        notes.append(f"{len(used) - n} images without a labelled object were left out.")
    return TaskResult(task="promptable", metrics=metrics, notes=(*notes, *few_images(n)))


def _agreement(first: Seen, other: Seen) -> np.ndarray:
    """(objects, kinds): IoU of the masks of two models on one image."""
    size = int(first["size"][0]), int(first["size"][1])
    pairs = zip(masks.unpacked(first, size), masks.unpacked(other, size), strict=True)
    return np.reshape([overlap(masks.decode(a), masks.decode(b)) for a, b in pairs], (-1, len(PROMPT_KINDS)))


def _asked(data: PromptData, index: int, size: tuple[int, int]) -> Iterator[tuple[dict[str, Prompt], Mask | None]]:
    """Prompts of every object on an image, and its mask."""
    if data.labels is None:
        yield from ((prompts, None) for prompts in grid(size))
        return
    entry = data.labels.images[index]
    for box in data.objects[entry.id]:
        truth = None if box.iscrowd else masks.decode(data.labels.mask(box, size))
        if truth is not None and truth.any():
            yield prompts_of(data.labels, entry, box, truth), truth


def _matches(model: Interface) -> bool:
    """An image, points and their labels come in."""
    names = {i.name for i in model.inputs}
    return image_input(model) is not None and {COORDINATES, LABELS} <= names


def _disturb(seen: Seen, rng: np.random.Generator, /) -> Seen:
    """Change the IoU of every mask with its label."""
    quality = seen["quality"]
    return {**seen, "quality": np.clip(quality + rng.normal(0, IOU_NOISE, quality.shape), 0, 1)}


def _agree(reference: Seen, other: Seen) -> float:
    same = _agreement(reference, other)
    return float(same.mean()) if same.size else 1.0


def _draw(image: Image.Image, reference: Seen, other: Seen, data: PromptData, sample: int, /) -> ShownSample:
    """Lay the masks of the first box prompts over the image, with their boxes."""
    asked = [prompts["box"].points for prompts, _ in _asked(data, sample, image.size)][:SHOWN_PROMPTS]
    boxes = np.reshape(asked, (-1, 4))
    found = []
    for seen in (reference, other):
        small = thumbnail_of(image)
        packed = masks.unpacked(seen, (image.width, image.height))[:: len(PROMPT_KINDS)][:SHOWN_PROMPTS]
        colours = [colour_of(i) for i in range(len(packed))]
        blend_masks(small, [masks.decode(one) for one in packed], colours)
        texts = [f"prompt {i + 1}" for i in range(len(packed))]
        draw_boxes(small, boxes * (small.width / image.width), texts, colours, [False] * len(packed))
        found.append(small)
    return ShownSample(found[0], found[1])


PROMPTABLE: Task[PromptData] = Task(
    name="promptable",
    labels="a COCO annotation file with masks, or a folder of images",
    matches=_matches,
    open=open_prompts,
    disturb=_disturb,
    disturbance=f"the IoU of every mask changed by {IOU_NOISE}",
    observe=observe_prompts,
    measure=measure_prompts,
    show=ShowSample(measure="mean IoU of the masks of both models, over all prompts", agree=_agree, draw=_draw),
)
