"""Bilinear resampling of maps, as networks and their post-processing define it."""

from __future__ import annotations

import numpy as np

__all__ = ["centres", "resize", "sample"]


def centres(old: int, new: int) -> np.ndarray:
    """Return source coordinates (new,) of the pixel centres when an axis of length `old` gets length `new`.

    Pixel i has its centre at coordinate i; e.g. old 2, new 4 -> [-0.25, 0.25, 0.75, 1.25]. These are the half-pixel
    coordinates of ONNX Resize and of torch's `interpolate(align_corners=False)`.
    """
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def sample(maps: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Sample maps (..., h, w) at every pair of rows (r,) and columns (c,): (..., r, c) float32.

    Values are bilinear between the four nearest pixels, not averaged where the grid is coarser than the map; beyond
    the outermost pixel centres they are the border's.
    """
    maps = np.asarray(maps, np.float32)
    return _along(_along(maps, columns, maps.ndim - 1), rows, maps.ndim - 2)  # rows are copied fast, columns are not


def resize(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize maps (..., h, w) bilinearly to (..., height, width), float32."""
    return sample(maps, centres(maps.shape[-2], height), centres(maps.shape[-1], width))


def _along(maps: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    last = maps.shape[axis] - 1
    at = np.clip(at, 0, last)
    first = at.astype(np.intp)
    weight = (at - first).astype(np.float32).reshape((-1,) + (1,) * (maps.ndim - axis - 1))
    low = maps.take(first, axis)
    high = maps.take(np.minimum(first + 1, last), axis)
    high -= low
    high *= weight
    high += low
    return np.asarray(high)
