"""Semantic segmentation: a class for every pixel, measured as mean intersection over union.

image -> canvas -> logits (1, classes, h, w) -> bilinear to the image's size -> best class -> one confusion matrix

Two protocols, whose numbers differ; a result says which one it used.

1. `squash`: the image is stretched to the model's input, e.g. 512x512, as the image processors of published
   checkpoints do. Logits go to the image's size in one step.
2. `official`: the ratio is kept, at most 2048 by 512 pixels, sides rounded up to multiples of 32, as in SegFormer's
   own evaluation (mmsegmentation's AlignedResize, mode `whole`). Logits go to the canvas's size, then to the
   image's. The model must take any height and width.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.store import StageInputs
from bitalloy.data.datasets import choose_samples
from bitalloy.data.images import ImageOptions, ImageSpec, file_hash, image_feed, infer_image_spec, open_image
from bitalloy.tasks.ade import IGNORED, LabelledFile, find_pairs, read_label
from bitalloy.tasks.base import (
    Interface,
    RunModel,
    Seen,
    ShownSample,
    ShowSample,
    Task,
    TaskMetric,
    TaskResult,
    few_images,
    image_input,
    refuse_fit,
)
from bitalloy.tasks.bootstrap import RESAMPLES, ResampledMetric, compare_models, ratio_of_sums, resampled_weights
from bitalloy.tasks.pictures import blend_labels, thumbnail_of
from bitalloy.tasks.resample import resize

__all__ = [
    "SEMANTIC",
    "SemanticData",
    "best_classes",
    "confusion",
    "mean_iou",
    "measure_semantic",
    "observe_semantic",
    "official_size",
    "open_semantic",
]

Protocol = Literal["squash", "official"]
PIXEL_NOISE = 0.02
PIXEL_AGREEMENT = "pixel agreement"
LONG_SIDE, SHORT_SIDE, MULTIPLE = 2048, 512, 32
"""Sizes of the official protocol in pixels: largest sides, and the multiple to which sides are rounded up."""


class SemanticInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metrics of semantic segmentation, beside the models."""

    images: tuple[str, ...]
    """SHA-256 of each image."""
    maps: tuple[str, ...]
    """SHA-256 of each label map."""
    image: ImageSpec
    classes: int
    reduce_zero_label: bool
    protocol: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticData:
    """Images with label maps, opened for one model."""

    files: tuple[LabelledFile, ...]
    image: ImageSpec
    """How images are prepared; its size is not used by the official protocol."""
    classes: int
    """Number of classes of the model."""
    reduce_zero_label: bool = True
    """Whether 0 in a label map means unlabelled and k means class k - 1, as in ADE20K."""
    protocol: Protocol = "squash"

    @property
    def labelled(self) -> bool:
        """Whether there are label maps, and not images only."""
        return any(file.labelled for file in self.files)

    @property
    def paired(self) -> bool:
        """False: every model is observed alone."""
        return False

    def choose(self, limit: int | None, seed: int) -> list[int]:
        """Choose at most `limit` images, None for all, and return their numbers in the order of their names."""
        return choose_samples([f.name for f in self.files], limit=limit, seed=seed)

    def images(self, samples: Sequence[int]) -> tuple[Path, ...]:
        """Return the file of the image of each sample."""
        return tuple(self.files[i].image for i in samples)

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> SemanticInputs:
        """Return all that decides metrics on some samples, whose images have the given hashes."""
        return SemanticInputs(
            images=tuple(images),
            maps=tuple(file_hash(self.files[i].label) for i in samples if self.files[i].labelled),
            image=self.image,
            classes=self.classes,
            reduce_zero_label=self.reduce_zero_label,
            protocol=self.protocol,
        )


def open_semantic(
    folder: Path, model: Interface, *, reduce_zero_label: bool = True, protocol: Protocol = "squash"
) -> SemanticData:
    """Find images and label maps for a model; see `find_pairs` for the layouts.

    Args:
        folder: folder of a data set.
        model: the model, whose output tells the number of classes.
        reduce_zero_label: whether 0 means unlabelled and k class k - 1; else labels are class numbers.
        protocol: how images are prepared: `squash` or `official`.

    Raises:
        DataError: files are missing, or the protocol does not fit the model.
    """
    spec = image_input(model)
    open_sides = spec is not None and all(isinstance(side, str) for side in spec.shape[2:])
    if protocol == "official" and not open_sides:
        shape = list(spec.shape) if spec is not None else "none"
        raise DataError(
            f"The official protocol keeps each image's ratio, so the model's image input {shape} must have open "
            "height and width. Export it with dynamic axes, or use the protocol 'squash'."
        )
    size = SHORT_SIDE if open_sides else None
    image = model.image or infer_image_spec(model.inputs, task="semantic", options=ImageOptions(size=size))
    assert image is not None, "a semantic model without an image input is refused"
    refuse_fit(image, "semantic segmentation stretches images, so that every label has its pixel")
    classes = model.outputs[0].shape[1]
    if not isinstance(classes, int):
        raise DataError(f"The number of classes of output '{model.outputs[0].name}' is open ({classes}). Fix it.")
    if classes > IGNORED:
        raise DataError(f"The model has {classes} classes; label maps hold at most {IGNORED}, and 255 for unlabelled.")
    return SemanticData(
        files=find_pairs(folder),
        image=image,
        classes=classes,
        reduce_zero_label=reduce_zero_label,
        protocol=protocol,
    )


def official_size(width: int, height: int) -> tuple[int, int]:
    """Return the width and height of the canvas in the official protocol (NVlabs/SegFormer, `AlignResize`).

    It has the largest scale at which the short side is at most 512 and the long one at most 2048 pixels; each side is
    then rounded up to a multiple of 32.

    >>> official_size(683, 512), official_size(2000, 500)
    ((704, 512), (2048, 512))
    """
    scale = min(LONG_SIDE / max(width, height), SHORT_SIDE / min(width, height))
    scaled = int(width * scale + 0.5), int(height * scale + 0.5)
    return -(-scaled[0] // MULTIPLE) * MULTIPLE, -(-scaled[1] // MULTIPLE) * MULTIPLE


def prepare_feed(image: Image.Image, data: SemanticData) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the feed of an image, and the sizes (height, width) that its logits pass through on their way back."""
    original = (image.height, image.width)
    if data.protocol == "squash":
        spec = msgspec.structs.replace(data.image, fit="stretch")
        return image_feed(image, spec)[0], [original]
    scale = min(LONG_SIDE / max(image.size), SHORT_SIDE / min(image.size))
    width, height = official_size(image.width, image.height)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    for size in ((int(image.height * scale + 0.5), int(image.width * scale + 0.5)), (height, width)):
        pixels = np.rint(resize(pixels, *size))
    canvas = Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0))
    spec = msgspec.structs.replace(data.image, fit="stretch", height=height, width=width)
    return image_feed(canvas, spec)[0], [(height, width), original]


def best_classes(logits: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Enlarge logits (classes, h, w) through `sizes` (height, width) and take the best class: (height, width) uint8."""
    best = np.full(sizes[-1], -np.inf, np.float32)
    chosen = np.zeros(sizes[-1], np.uint8)
    for number, one in enumerate(logits):  # one class at a time: all of them at image size would take a gigabyte
        for height, width in sizes:
            one = resize(one, height, width)
        np.copyto(chosen, number, where=one > best)
        np.fmax(best, one, out=best)
    return chosen


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels of class [row] predicted as class [column], (classes, classes) int, without ignored labels."""
    counted = label != IGNORED
    pairs = label[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Compute the mean over classes of intersection / (labelled + predicted - intersection), in 0..1.

    A class that is neither labelled nor predicted does not count; one that is predicted only counts as 0, as in
    mmsegmentation. NaN where no class occurs.

    Args:
        counts: numbers of pixels in the intersection, labelled and predicted, (..., 3, classes).
    """
    shared, labelled, predicted = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
    union = labelled + predicted - shared
    occurs = union > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(occurs, shared / union, 0.0)
        return np.asarray(each.sum(axis=-1) / occurs.sum(axis=-1))


def observe_semantic(models: Mapping[str, RunModel], data: SemanticData, sample: int, /) -> dict[str, Seen]:
    """Return pixel counts of one image (3, classes), see `mean_iou`, and the classes of its pixels, compressed.

    Raises:
        DataError: a label map is broken or does not fit image or model.
    """
    file = data.files[sample]
    opened = open_image(file.image, data.image.channels)
    label = read_label(file, opened.size, data.classes, reduce_zero_label=data.reduce_zero_label)
    feed, sizes = prepare_feed(opened, data)
    found: dict[str, Seen] = {}
    for name, run in models.items():
        predicted = best_classes(_logits(run({data.image.input: feed}), data.classes), sizes)
        matrix = confusion(label, predicted, data.classes)
        found[name] = {
            "counts": np.stack([matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)]),
            "pixels": np.frombuffer(zlib.compress(predicted.tobytes()), np.uint8),
        }
    return found


def measure_semantic(
    seen: Mapping[str, Sequence[Seen]],
    data: SemanticData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Measure mIoU, pixel accuracy, and agreement with the first model, on the same images side by side.

    mIoU and accuracy come from one confusion matrix over the set. `pixel agreement` is the part of all pixels,
    labelled or not, to which a model gives the class that the first model gives; of images without label maps it is
    all.

    Raises:
        DataError: no pixel is labelled.
    """
    n, weights = len(samples), resampled_weights(len(samples), resamples, seed)
    counts = {name: np.array([one["counts"] for one in part], np.float64) for name, part in seen.items()}
    if data.labelled and not any(c[:, 1].any() for c in counts.values()):
        raise DataError(f"The {n} evaluated label maps have no labelled pixel. Take more images.")
    pixels, agreed = np.zeros(n), {name: np.zeros(n) for name in seen}
    for i in range(n):
        reference: np.ndarray | None = None
        for name, part in seen.items():
            predicted = _classes_of(part[i])
            reference = predicted if reference is None else reference
            agreed[name][i] = np.count_nonzero(predicted == reference)
            pixels[i] = predicted.size
    agreement = {name: ratio_of_sums(a, pixels, weights) for name, a in agreed.items()}
    return TaskResult(
        task="semantic",
        metrics=(
            *(_against_labels(counts, weights) if data.labelled else ()),
            compare_models(PIXEL_AGREEMENT, agreement, n, agreement=True),
        ),
        notes=(f"Protocol: {data.protocol}.", *few_images(n)),
    )


def _against_labels(counts: Mapping[str, np.ndarray], weights: np.ndarray) -> tuple[TaskMetric, TaskMetric]:
    n = weights.shape[1]
    quality = {name: _mean_iou(c, weights) for name, c in counts.items()}
    accuracy = {name: ratio_of_sums(c[:, 0].sum(axis=1), c[:, 1].sum(axis=1), weights) for name, c in counts.items()}
    return (
        compare_models("mIoU", quality, n, witness=PIXEL_AGREEMENT),
        compare_models("pixel accuracy", accuracy, n, witness=PIXEL_AGREEMENT),
    )


def _mean_iou(counts: np.ndarray, weights: np.ndarray) -> ResampledMetric:
    """From counts (I, 3, classes) per image; sums come before the quotient."""
    drawn = (weights.astype(np.float64) @ counts.reshape(len(counts), -1)).reshape(len(weights), 3, -1)
    return ResampledMetric(float(mean_iou(counts.sum(axis=0))), mean_iou(drawn))


def _logits(outputs: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    first = next(iter(outputs.values()))
    if first.ndim != 4 or first.shape[:2] != (1, classes):
        raise DataError(f"The first output has shape {list(first.shape)}; expected [1, {classes}, height, width].")
    return np.asarray(first[0])


def _matches(model: Interface) -> bool:
    """One image input, and a first output (batch, classes, h, w) with at least two classes."""
    if len(model.inputs) != 1 or image_input(model) is None or not model.outputs:
        return False
    shape = model.outputs[0].shape
    return len(shape) == 4 and isinstance(shape[1], int) and shape[1] > 1


def _disturb(seen: Seen, rng: np.random.Generator, /) -> Seen:
    """Take some pixels from each class where it is right, and give it some where it is not."""
    shared, labelled, predicted = seen["counts"].astype(np.float64)
    lost = shared * np.minimum(PIXEL_NOISE * rng.exponential(1, shared.shape), 1)
    won = (labelled - shared) * np.minimum(PIXEL_NOISE * rng.exponential(1, shared.shape), 1)
    return {**seen, "counts": np.stack([shared - lost + won, labelled, predicted - lost + won])}


def _classes_of(seen: Seen) -> np.ndarray:
    """Classes of the pixels of an image, row by row, (pixels,) uint8."""
    return np.frombuffer(zlib.decompress(seen["pixels"].tobytes()), np.uint8)


def _agree(reference: Seen, other: Seen) -> float:
    return float((_classes_of(reference) == _classes_of(other)).mean())


def _draw(image: Image.Image, reference: Seen, other: Seen, _: SemanticData, __: int, /) -> ShownSample:
    first, second = (_classes_of(seen).reshape(image.height, image.width) for seen in (reference, other))
    small, differs = thumbnail_of(image), first != second
    return ShownSample(blend_labels(small, first, np.zeros_like(differs)), blend_labels(small, second, differs))


SEMANTIC: Task[SemanticData] = Task(
    name="semantic",
    labels="a folder of images, perhaps with label maps",
    matches=_matches,
    open=open_semantic,
    disturb=_disturb,
    disturbance=f"{PIXEL_NOISE:.0%} of the pixels of each class changed, more or less by image",
    observe=observe_semantic,
    measure=measure_semantic,
    show=ShowSample(measure="part of the pixels to which both models give the same class", agree=_agree, draw=_draw),
)
