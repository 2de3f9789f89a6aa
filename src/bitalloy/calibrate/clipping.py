"""Where to cut the tails of a histogram before it is quantized: percentiles, entropy, squared error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def quantile(counts: Ints, cut: Floats) -> Floats:
    """Return the position, in bins, that has `cut` values before it, for each row of `counts` (tensors, bins).

    >>> quantile(np.array([[2, 4, 4]]), np.array([3.0]))  # both of bin 0, and a quarter of bin 1
    array([1.25])
    """
    total = np.cumsum(counts, axis=1)
    at = np.argmax(total > cut[:, None], axis=1)[:, None]
    inside = np.take_along_axis(counts, at, axis=1)
    before = np.take_along_axis(total, at, axis=1) - inside
    return np.asarray((at + (cut[:, None] - before) / inside)[:, 0])


def entropy_threshold(counts: Ints, *, levels: int = 128, stride: int = 8) -> int:
    """Return how many of the histogram's bins of |x| to keep, so that `levels` levels tell most about the values.

    Minimises KL(P || Q) over i = levels, levels + stride, ..., len(counts): P is the first i bins with everything
    above added to the last; Q spreads the sum of each of `levels` equal groups of those bins (outliers left out)
    evenly over the group's non-empty bins. Where the last group is empty but for the outliers added to P, Q is 1e-4
    of a value, as in MXNet's smoothing: else no gap before an outlier could ever be cut. Candidates that
    cut more than 1 % of the values are left out: a pile in the last bin of both P and Q would pass for a good fit,
    e.g. of values that all lie far from 0. Among equally good thresholds the largest is taken.
    S. Migacz, 8-bit inference with TensorRT, GTC 2017.

    Args:
        counts: shape (bins,), from 0 up to the largest |x|.
        levels: number of levels that the integer format has for one sign.
        stride: bins between candidates.

    Example: an exponential tail of 20 bins, and one value far out, which goes.

        >>> tail = (1e5 * np.exp(-np.arange(1000) / 20)).astype(int)
        >>> entropy_threshold(np.append(tail, 1))
        216
    """
    n = len(counts)
    if n <= levels:
        return n
    keep = np.append(np.arange(levels, n, stride), n)
    borders = -(-np.arange(levels + 1) * keep[:, None] // levels)
    total = np.concatenate([[0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    sums, sizes = np.diff(total[borders]), np.diff(filled[borders])
    beyond = total[-1] - total[keep]
    sizes[:, -1] += (beyond > 0) & (counts[keep - 1] == 0)
    log_q = np.log(np.where(sums > 0, sums / np.maximum(sizes, 1), 1e-4))
    cross = (sums * log_q).sum(axis=1) + beyond * log_q[:, -1]
    ours = entropy[keep - 1] + _xlogx(counts[keep - 1] + beyond)
    divergence = (ours - cross) / total[-1] + np.log(np.maximum(total[keep], 1e-4) / total[-1])
    divergence = np.where(beyond * 100 > total[-1], np.inf, divergence)
    return int(keep[len(keep) - 1 - np.argmin(divergence[::-1])])


def mse_range(counts: Ints, origin: Ints, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Return the ends (low, high) of the range with the least expected squared error in uint8, per histogram.

    Expected error per value: scale^2 / 12 inside the range (rounding noise, uniform), the squared distance to
    the range outside, values spread evenly inside a bin. Both ends shrink independently, down to 1 % of the full range,
    in steps of 14 %, then 3.5 %. The full range is kept unless clipping saves more than 1 % of the error.

    Args:
        counts: shape (tensors, bins).
        origin: position of the first bin's left edge; bins are 1 wide, (tensors,).
        low: full range, <= 0.
        high: full range, >= 0.
    """
    bins = origin[:, None] + np.arange(counts.shape[1])
    moments = [counts, counts * (bins + 0.5), counts * (bins * (bins + 1.0) + 1 / 3)]
    sums = [np.pad(np.cumsum(m, axis=1, dtype=np.float64), ((0, 0), (1, 0))) for m in moments]
    everything = [s[:, -1:] for s in sums]

    def below(edge: Floats) -> list[Floats]:
        """Sums of 1, x and x^2 over the values below `edge`."""
        place = np.clip(edge - origin[:, None], 0, counts.shape[1])
        j = np.minimum(place.astype(np.int64), counts.shape[1] - 1)
        f, left = place - j, origin[:, None] + j
        part = [f, f * (left + f / 2), f * (left * left + left * f + f * f / 3)]
        inside = np.take_along_axis(counts, j, axis=1)
        return [np.take_along_axis(s, j, axis=1) + inside * p for s, p in zip(sums, part, strict=True)]

    def error(low: Floats, high: Floats) -> Floats:
        scale = np.where(high > low, high - low, 1.0) / 255
        start = -np.rint(-low / scale) * scale
        stop = start + 255 * scale
        under, upto = below(start), below(stop)
        over = [a - b for a, b in zip(everything, upto, strict=True)]
        clipped = [m[2] - 2 * e * m[1] + e * e * m[0] for m, e in ((under, start), (over, stop))]
        return scale**2 / 12 * (upto[0] - under[0]) + clipped[0] + clipped[1]

    def best(shrink_low: Floats, shrink_high: Floats) -> tuple[Floats, Floats, Floats]:
        found = error(low[:, None] * shrink_low, high[:, None] * shrink_high)
        at = np.argmin(found, axis=1)[:, None]
        pick = [np.take_along_axis(np.broadcast_to(a, found.shape), at, axis=1) for a in (shrink_low, shrink_high)]
        return pick[0], pick[1], np.take_along_axis(found, at, axis=1)

    coarse = np.meshgrid(0.87 ** np.arange(33.0), 0.87 ** np.arange(33.0))
    fine = np.meshgrid(*[0.87 ** np.linspace(-1, 1, 9)] * 2)
    around = best(coarse[0].reshape(1, -1), coarse[1].reshape(1, -1))
    ends = [np.minimum(a * f.reshape(1, -1), 1.0) for a, f in zip(around[:2], fine, strict=True)]
    shrink_low, shrink_high, least = best(ends[0], ends[1])
    kept = (least > 0.99 * error(low[:, None], high[:, None]))[:, 0]
    return np.where(kept, low, low * shrink_low[:, 0]), np.where(kept, high, high * shrink_high[:, 0])


def _xlogx(n: Ints) -> Floats:
    return np.asarray(n * np.log(np.maximum(n, 1)))
