"""Weights stored in blocks, rounded for the least error of what the layer makes instead of each to its nearest number.

With H the second moments of what enters (`moments`), a change D of a weight matrix (inputs, outputs) changes what the
layer makes by tr(D^T H D). Both ways lower that error:

Case 1. `searched`: the range of every block is cut on either side where what remains is stored so much better that the
        block's own part of the error falls. Every weight then goes to its nearest number.
Case 2. `compensated`: GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323). One input after the other is
        rounded, and what that changes is taken out by the weights of the inputs behind it, along the Cholesky factor of
        the inverse of H. A block has the extremes of what is left of it when its first input comes up: searching them,
        too, did not gain (docs/design.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitalloy.core.errors import ModelError
from bitalloy.formats.base import Format, QuantParams

CUTS = (1.0, 0.93, 0.86, 0.79)
"""Parts of a block's range on either side of 0 that are tried."""
DAMPING = 0.01
"""Part of the mean of the diagonal of H that is added to it: the second moments are those of a few samples."""

_Floats = NDArray[np.float32]


def searched(weight: _Floats, moments: _Floats, stored: Format, block: int) -> tuple[_Floats, QuantParams]:
    """Round a matrix to the nearest numbers, on ranges of its blocks that are searched.

    Args:
        weight: (inputs, outputs).
        moments: of the inputs, (inputs, inputs), or its diagonal (inputs,).
        stored: format of the weights, of integers.
        block: inputs that share a range.

    Returns:
        What is left of the weight, and its parameters, along axis 0.
    """
    params = _search(weight, _parts(moments, block), stored, block)
    return stored.reference(weight, params), params


def compensated(weight: _Floats, moments: _Floats, stored: Format, block: int) -> tuple[_Floats, QuantParams]:
    """Round a matrix by GPTQ. Arguments and results as for `searched`; of a diagonal nothing can be compensated."""
    if moments.ndim == 1:
        return searched(weight, moments, stored, block)
    inputs = len(weight)
    factor = _inverse_factor(moments)
    left, found = weight.astype(np.float64), np.empty_like(weight)
    grids = []
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        part = left[start:stop].astype(np.float32)
        extremes = part.min(axis=0, keepdims=True), part.max(axis=0, keepdims=True)
        grid = stored.of_parts(*extremes, axis=0, block=block)
        assert grid is not None, "what is stored in blocks has scales"
        grids.append(grid)
        scale, zero = grid.scale[0], np.asarray(grid.zero_point)[0].astype(np.float32)
        lost = np.empty((stop - start, weight.shape[1]))
        for i in range(start, stop):
            steps = np.rint(left[i].astype(np.float32) / scale)  # as `formats.affine.quantize`, many times as fast
            found[i] = np.clip(steps, grid.qmin - zero, grid.qmax - zero) * scale
            lost[i - start] = (left[i] - found[i]) / factor[i, i]
            left[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], lost[i - start])
        left[stop:] -= factor[start:stop, stop:].T @ lost
    scales, zeros = (np.concatenate([getattr(g, name) for g in grids]) for name in ("scale", "zero_point"))
    return found, replace(grids[0], scale=scales, zero_point=zeros)


def _inverse_factor(moments: _Floats) -> NDArray[np.float64]:
    """The upper Cholesky factor U of the inverse of the damped moments, U^T U = H^-1.

    An input that is always 0 is given moments of its own: its weight stays as it is.
    """
    wide = moments.astype(np.float64)
    diagonal = np.diag(wide).copy()
    mean = float(diagonal.mean()) or 1.0
    wide[np.diag_indices_from(wide)] += np.where(diagonal > 0, DAMPING * mean, mean)
    try:
        inverse = np.linalg.inv(wide)
        return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float64)
    except np.linalg.LinAlgError as error:
        raise ModelError(
            "The second moments of what enters a layer have no inverse, so --weight-rounding gptq cannot be used. "
            "Give --weight-rounding nearest, or check the samples."
        ) from error


def _search(weight: _Floats, parts: _Floats, stored: Format, block: int) -> QuantParams:
    """Choose the range of every block of rows: what all of them lose among `CUTS` is compared by `parts`."""
    starts = np.arange(0, len(weight), block)
    low, high = np.minimum.reduceat(weight, starts, axis=0), np.maximum.reduceat(weight, starts, axis=0)
    best, least = (low, high), np.full(low.shape, np.inf)
    for below in CUTS:
        for above in CUTS:
            cut = np.minimum(low, 0) * np.float32(below), np.maximum(high, 0) * np.float32(above)
            params = stored.of_parts(*cut, axis=0, block=block)
            lost = _blocks(stored.reference(weight, params) - weight, block)
            weighted = lost * parts[:, :, None] if parts.ndim == 2 else np.matmul(parts, lost)
            error = (weighted * lost).sum(axis=1)
            better = error < least
            best = np.where(better, cut[0], best[0]), np.where(better, cut[1], best[1])
            least = np.where(better, error, least)
    found = stored.of_parts(*best, axis=0, block=block)
    assert found is not None, "what is stored in blocks has scales"
    return found


def _parts(moments: _Floats, block: int) -> _Floats:
    """The moments within each block: (blocks, block, block), or of a diagonal (blocks, block)."""
    if moments.ndim == 1:
        return np.pad(moments, (0, -len(moments) % block)).reshape(-1, block)
    more = -len(moments) % block
    whole = np.pad(moments, ((0, more), (0, more))) if more else moments
    count = len(whole) // block
    diagonal = whole.reshape(count, block, count, block)[np.arange(count), :, np.arange(count)]
    return np.asarray(diagonal)


def _blocks(rows: _Floats, block: int) -> _Floats:
    """View rows as (blocks, block, outputs), with rows of 0 behind the last."""
    return np.pad(rows, ((0, -len(rows) % block), (0, 0))).reshape(-1, block, rows.shape[1])
