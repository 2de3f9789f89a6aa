"""Binary masks: COCO's run lengths, overlap, the point deepest inside."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = [
    "Mask",
    "Rle",
    "decode",
    "encode",
    "from_coco",
    "interior_point",
    "overlap",
    "packed",
    "run_lengths",
    "unpacked",
]

Mask = npt.NDArray[np.bool_]
"""Binary mask, (height, width)."""
Rle = dict[str, Any]
"""Mask in pycocotools' packed form: `{"size": [height, width], "counts": bytes}`."""


class _Runs(msgspec.Struct, frozen=True):
    size: tuple[int, int]
    counts: list[int] | str


def run_lengths(mask: Mask) -> dict[str, list[int]]:
    """Convert a mask to COCO's run lengths, column by column, zeros first: [[0, 1], [0, 1]] has counts [2, 2]."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": counts}


def encode(mask: Mask) -> Rle:
    """Pack a mask into pycocotools' run-length form."""
    from pycocotools import mask as coco

    return dict(coco.encode(np.asfortranarray(mask, np.uint8)))


def decode(rle: Rle) -> Mask:
    """Unpack a mask from pycocotools' run-length form."""
    from pycocotools import mask as coco

    with warnings.catch_warnings():  # pycocotools' arrays have an `__array__` of before numpy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(coco.decode(rle), np.bool_)


def packed(masks: Sequence[Rle]) -> dict[str, np.ndarray]:
    """Store the packed masks of one image as two arrays: `masks`, the bytes of all, and `lengths`, those of each."""
    counts = [bytes(mask["counts"]) for mask in masks]
    lengths = np.array([len(c) for c in counts], np.int64)
    return {"masks": np.frombuffer(b"".join(counts), np.uint8), "lengths": lengths}


def unpacked(arrays: Mapping[str, np.ndarray], size: tuple[int, int]) -> list[Rle]:
    """Read the masks that `packed` stored, for an image of `size` (width, height)."""
    ends = np.cumsum(arrays["lengths"])
    parts = np.split(arrays["masks"], ends[:-1]) if len(ends) else []
    return [{"size": [size[1], size[0]], "counts": part.tobytes()} for part in parts]


def from_coco(segmentation: bytes, height: int, width: int) -> Rle:
    """Pack the `segmentation` of a COCO annotation, as JSON: polygons, or run lengths as a list or a string.

    Raises:
        ValueError: it is neither, or does not fit the image; msgspec's `ValidationError` is such an error.
    """
    from pycocotools import mask as coco

    found = msgspec.json.decode(segmentation, type=_Runs | list[list[float]])
    if isinstance(found, list):
        if not found or any(len(polygon) < 6 or len(polygon) % 2 for polygon in found):
            raise ValueError("a polygon needs at least three corners x, y")
        return dict(coco.merge(coco.frPyObjects(found, height, width)))
    if found.size != (height, width):
        raise ValueError(f"its run lengths are for {found.size[1]}x{found.size[0]} pixels")
    if isinstance(found.counts, str):
        return {"size": [height, width], "counts": found.counts.encode()}
    if min(found.counts, default=0) < 0:
        raise ValueError("one of its run lengths is negative")
    if sum(found.counts) != height * width:
        raise ValueError(f"its run lengths cover {sum(found.counts)} of {height * width} pixels")
    return dict(coco.frPyObjects({"size": [height, width], "counts": found.counts}, height, width))


def overlap(a: Mask, b: Mask) -> float:
    """Return the intersection over union of two masks of one size; 1 where both are empty."""
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def interior_point(mask: Mask) -> tuple[float, float]:
    """Return x, y of the centre of the pixel that is farthest from the background and the image's border.

    Of equally far pixels the first counts. Example: the only pixel of a mask at row 2, column 5 -> (5.5, 2.5).

    Raises:
        ValueError: the mask is empty.
    """
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("an empty mask has no inside")
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    depth = np.asarray(distance_transform_edt(inside))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(column + left + 0.5), float(row + top + 0.5)
