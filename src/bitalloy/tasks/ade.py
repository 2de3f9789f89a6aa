"""Images with label maps, in ADE20K's layout: JPEG images, and PNG maps of the same name with a class per pixel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.files import walk
from bitalloy.data.images import IMAGE_SUFFIXES, opened_image

__all__ = ["IGNORED", "LabelledFile", "find_pairs", "read_label"]

IGNORED = 255
"""Class number that marks pixels that do not count."""


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """An image, perhaps with its label map."""

    name: str
    """Path of the image below its folder, without suffix."""
    image: Path
    label: Path
    labelled: bool = True
    """Whether the label map is there."""


def find_pairs(folder: Path) -> tuple[LabelledFile, ...]:
    """Find the images and their label maps, in the order of their names.

    1. `images/` and `annotations/` as in ADEChallengeData2016, where `validation/` in both is taken if it is there.
       Inside, subfolders must be the same on both sides.
    2. Else the folder itself: `name.jpg` with `name.png` beside it.
    3. A folder without any label map is one of images only.

    Raises:
        DataError: the folder has no images, or images without a label map.
    """
    if not folder.is_dir():
        raise DataError(f"'{folder}' is no folder. Give the one that holds images/ and annotations/.")
    images, labels = folder / "images", folder / "annotations"
    apart = images.is_dir() and labels.is_dir()
    if apart and (images / "validation").is_dir() and (labels / "validation").is_dir():
        images, labels = images / "validation", labels / "validation"
    if not apart:
        images = labels = folder
    files = sorted(file for file in walk(images) if _is_image(file, apart))
    pairs = [LabelledFile(_name(file, images), file, labels / f"{_name(file, images)}.png") for file in files]
    if not pairs:
        raise DataError(
            f"No images in '{images}'. Expected images/ and annotations/ with validation/ inside, or name.jpg beside "
            "name.png."
        )
    alone = [pair for pair in pairs if not pair.label.is_file()]
    if len(alone) == len(pairs) and not apart:
        return tuple(replace(pair, labelled=False) for pair in pairs)
    if alone:
        raise DataError(
            f"{len(alone)} of {len(pairs)} images in '{images}' have no label map, the first is '{alone[0].name}': "
            f"'{alone[0].label}' is missing. Add the maps, or take the images out."
        )
    return tuple(pairs)


def _is_image(file: Path, apart: bool) -> bool:
    """Beside the images, a PNG is a label map."""
    kinds = IMAGE_SUFFIXES if apart else IMAGE_SUFFIXES - {".png"}
    return file.suffix.lower() in kinds and not file.name.startswith(".")


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def read_label(file: LabelledFile, size: tuple[int, int], classes: int, *, reduce_zero_label: bool) -> np.ndarray:
    """Read a label map as class numbers: (height, width) uint8, `IGNORED` where a pixel does not count.

    Without a label map no pixel counts.

    Args:
        file: image and label map.
        size: (width, height) of the image in pixels.
        classes: number of classes of the model.
        reduce_zero_label: 0 becomes ignored, k becomes k - 1; 255 is ignored either way.

    Raises:
        DataError: the map is unreadable, coloured, of another size, or has labels out of range.
    """
    if not file.labelled:
        return np.full(size[::-1], IGNORED, np.uint8)
    with opened_image(file.label) as opened:
        opened.load()
        mode, found = opened.mode, np.asarray(opened)
    if found.ndim != 2 or mode == "1":
        raise DataError(
            f"'{file.label}' has pixels of mode {mode}, expected one class number per pixel (mode L or P). Convert "
            "the colours to class numbers."
        )
    if found.shape != (size[1], size[0]):
        raise DataError(
            f"'{file.label}' is {found.shape[1]}x{found.shape[0]}, but its image is {size[0]}x{size[1]}. "
            "The map belongs to another image."
        )
    low, high = (1, classes) if reduce_zero_label else (0, classes - 1)
    free = found == IGNORED
    free |= (found == 0) if reduce_zero_label else False
    wrong = found[~free & ((found < low) | (found > high))]
    if len(wrong):
        raise DataError(
            f"'{file.label}' has label {int(wrong[0])} on {len(wrong)} pixels; a model with {classes} classes takes "
            f"{low} to {high}, {'0 or ' if reduce_zero_label else ''}{IGNORED} for unlabelled pixels. "
            f"Give the maps of the model's classes{', or set reduce_zero_label' if not reduce_zero_label else ''}."
        )
    return np.where(free, IGNORED, found - int(reduce_zero_label)).astype(np.uint8)
