"""Statistics of activations that a calibration pass collects, and the ranges that follow from them.

All histograms live on dyadic grids: bins of width 2^k with edges at multiples of it, k the smallest that covers
[min(low, 0), max(high, 0)] with 2048 bins. Widening the range merges neighbours exactly, so counts depend on
the data only, not on its order or on how it was cut into shards.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import msgspec
import numpy as np

from bitalloy.calibrate.clipping import Floats, Ints, entropy_threshold, mse_range, quantile
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.records import Histogram
from bitalloy.formats.float16 import HALF_LARGEST, HALF_SMALLEST_NORMAL

BINS = 2048
MERGED = 32
"""Bins that are one in histograms for people, which have 65 at most."""
MOMENTUM = 0.9
TAIL = 9
"""Samples whose extremes are kept: the most extreme ones of each tensor."""
_LARGEST = float(np.finfo(np.float32).max)
_CHUNK = 32  # tensors binned together: few calls, yet the values stay in the cache
METHODS = ("minmax", "extended", "moving", "percentile", "entropy", "mse")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of one calibration pass, per tensor. Arrays run along `tensors` and must not be changed."""

    tensors: tuple[str, ...]
    """Names of the tensors, in graph order."""
    samples: int
    lows: Floats
    highs: Floats
    """The samples' smallest and largest values, the most extreme 9 of them, outermost first, exact, (tensors, 9);
    infinite where there were fewer samples."""
    size: Ints
    """Number of values in one sample, per tensor."""
    first_low: Floats
    first_high: Floats
    """Extremes of the first sample: `merge` needs them to continue moving averages."""
    moving_low: Floats
    moving_high: Floats
    """Extremes averaged over samples: m <- 0.9 m + 0.1 new, starting at the first sample."""
    exponent: Ints
    """Histogram bins are 2^exponent wide."""
    origin: Ints
    """The first bin starts at origin * 2^exponent; never above 0."""
    histogram: Ints
    """Counts of the values that left the session, shape (tensors, 2048)."""
    zeros: Ints
    """Number of histogram values that are exactly 0, per tensor."""
    subnormal: Ints
    """Number of nonzero histogram values below 2^-14 in magnitude, where FP16 loses precision, per tensor."""
    total: Floats
    squares: Floats
    """Sum of the histogram's values, and sum of their squares, per tensor."""
    infinite: Ints
    """Number of samples in which the tensor held infinite numbers, which count as 0 everywhere else."""

    @property
    def low(self) -> Floats:
        """Smallest value of all samples, per tensor."""
        return self.lows[:, 0]

    @property
    def high(self) -> Floats:
        """Largest value of all samples, per tensor."""
        return self.highs[:, 0]

    @property
    def count(self) -> Ints:
        """Number of values in each histogram."""
        return np.asarray(self.histogram.sum(axis=1))

    @property
    def magnitude(self) -> Floats:
        """Largest |x| per tensor."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def half_margin(self) -> float:
        """65504, the largest FP16 number, over the largest |x| of all tensors: below 1 FP16 overflows."""
        largest = float(self.magnitude.max(initial=0.0))
        return HALF_LARGEST / largest if largest else np.inf

    @property
    def half_subnormal(self) -> dict[str, float]:
        """Tensor -> share of its nonzero values that FP16 stores with fewer than 11 significant bits."""
        share = self.subnormal / np.maximum(self.count - self.zeros, 1)
        return dict(zip(self.tensors, share.tolist(), strict=True))

    def ranges(self, method: str, *, percentile: float = 99.99) -> dict[str, tuple[float, float]]:
        """Return low and high per tensor, beyond the observed values only by `extended`; `entropy`, `mse` include 0.

        Args:
            method: `minmax`: all that was seen. `extended`: that and, where it pays, room for what other samples hold,
                see `margins`. `moving`: moving average of the samples' extremes. `percentile`: what holds
                `percentile` % of the values, the rest cut evenly on both sides; a tail of less than one value is not
                cut. `entropy`: see `entropy_threshold`. `mse`: see `mse_range`.
            percentile: 0 to 100; only the method `percentile` uses it.

        Raises:
            BitalloyError: the method is unknown.
        """
        if method == "minmax":
            low, high = self.low, self.high
        elif method == "extended":
            below, above = self.margins.T
            low, high = (np.clip(v, -_LARGEST, _LARGEST) for v in (self.low - below, self.high + above))
        elif method == "moving":
            low, high = self.moving_low, self.moving_high
        elif method == "percentile":
            low, high = self._percentile(percentile)
        elif method in METHODS:
            low, high = self._entropy() if method == "entropy" else self._mse()
        else:
            raise BitalloyError(f"Unknown range method '{method}'. Choose one of: {', '.join(METHODS)}.")
        return dict(zip(self.tensors, zip(low.tolist(), high.tolist(), strict=True), strict=True))

    @property
    def margins(self) -> Floats:
        """By how much a range should go beyond what was seen, below and above, per tensor, (tensors, 2).

        What the extremes of N samples exceed the ninth largest by, or the smallest of fewer, is taken as exponential,
        with mean b (peaks over a threshold: J. Pickands, Statistical inference using extreme order statistics, 1975).
        One more sample leaves a range that goes c b beyond all that was seen with probability exp(-c) / (N + 1), by b
        on average. One of its n values does so, which costs 2 b^2 / n per value; rounding costs
        (w + c b)^2 / (12 * 255^2) where the range was w wide. The sum is least near
        c = log(12 * 255^2 / (N + 1) * b / (w n)). Where that is negative, because many values share the cost, there is
        no margin, and a range may as well be cut.
        """
        used = min(TAIL, self.samples) - 1
        if not used:
            return np.zeros((len(self.tensors), 2))
        tails = np.stack([-self.lows, self.highs], axis=1)[:, :, : used + 1]
        beyond = np.where(tails[:, :, 0] > 0, tails[:, :, :-1].mean(axis=2) - tails[:, :, -1], 0.0)
        width = np.maximum(self.high, 0.0) - np.minimum(self.low, 0.0)
        spread = beyond / np.where(width > 0, width, 1.0)[:, None]
        gain = 12 * 255**2 / (self.samples + 1) * spread / self.size[:, None]
        return np.asarray(beyond * np.log(np.maximum(gain, 1.0)))

    def histograms(self) -> list[Histogram]:
        """Return a histogram for people per tensor: exact sums of `MERGED` bins each, such that 0 is an edge."""
        found = []
        for counts, exponent, origin in zip(self.histogram, self.exponent, self.origin, strict=True):
            before = int(origin) % MERGED
            sums = np.pad(counts, (before, MERGED - before)).reshape(-1, MERGED).sum(axis=1)
            filled = np.flatnonzero(sums)
            first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 0)
            width = math.ldexp(MERGED, int(exponent))
            low = width * (int(origin) // MERGED + first)
            found.append(Histogram(low=low, width=width, counts=tuple(sums[first:last].tolist())))
        return found

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of this data followed by `other`'s, as if one pass had seen both.

        Extremes and counts do not depend on the order; moving averages do, by their nature.

        Raises:
            DataError: the tensors differ.
        """
        if self.tensors != other.tensors:
            raise DataError("Statistics of different tensors cannot be merged. Calibrate both on the same model.")
        lows = np.sort(np.concatenate([self.lows, other.lows], axis=1), axis=1)[:, :TAIL]
        highs = -np.sort(-np.concatenate([self.highs, other.highs], axis=1), axis=1)[:, :TAIL]
        grid = _grid(lows[:, 0], highs[:, 0])
        decay = MOMENTUM**other.samples
        return Statistics(
            tensors=self.tensors,
            samples=self.samples + other.samples,
            lows=lows,
            highs=highs,
            size=np.maximum(self.size, other.size),
            first_low=self.first_low,
            first_high=self.first_high,
            moving_low=other.moving_low + decay * (self.moving_low - other.first_low),
            moving_high=other.moving_high + decay * (self.moving_high - other.first_high),
            exponent=grid[0],
            origin=grid[1],
            histogram=_regrid(self, *grid) + _regrid(other, *grid),
            zeros=self.zeros + other.zeros,
            subnormal=self.subnormal + other.subnormal,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            infinite=self.infinite + other.infinite,
        )

    def to_bytes(self) -> bytes:
        """Serialize the statistics as a compressed .npz; equal statistics give equal bytes."""
        header = np.frombuffer(to_json((self.tensors, self.samples)), np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=header, **{f: getattr(self, f) for f in ARRAYS})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Statistics:
        """Read the statistics that `to_bytes` wrote.

        Raises:
            DataError: the bytes were not written by `to_bytes`, or are damaged.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                tensors, samples = msgspec.json.decode(file["header"].tobytes(), type=tuple[tuple[str, ...], int])
                arrays = {f: file[f] for f in ARRAYS}
        except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile, msgspec.DecodeError) as error:
            raise DataError(f"Not a file of calibration statistics: {error}. Calibrate again.") from error
        if any(arrays[f].shape != (len(tensors), *_ROWS.get(f, ())) for f in ARRAYS):
            raise DataError("Calibration statistics have arrays of a wrong shape. Calibrate again.")
        return cls(tensors=tensors, samples=samples, **arrays)

    def _percentile(self, percentile: float) -> tuple[Floats, Floats]:
        cut = np.asarray((100 - percentile) / 200 * self.count, np.float64)
        bins = [quantile(h, cut) for h in (self.histogram, self.histogram[:, ::-1])]
        low = np.ldexp(self.origin + bins[0], self.exponent)
        high = np.ldexp(self.origin + BINS - bins[1], self.exponent)
        low, high = (np.clip(v, self.low, self.high) for v in (low, high))
        return np.where(cut < 1, self.low, low), np.where(cut < 1, self.high, high)

    def _entropy(self) -> tuple[Floats, Floats]:
        counts = self._nonzero()
        top = np.empty(len(self.tensors))
        for i, start in enumerate(-self.origin):
            folded = np.zeros(BINS, np.int64)
            folded[: BINS - start] = counts[i, start:]
            folded[:start] += counts[i, :start][::-1]
            top[i] = entropy_threshold(np.trim_zeros(folded, "b"))
        top = np.where(top > 0, np.ldexp(top, self.exponent), self.magnitude)
        return np.maximum(-top, np.minimum(self.low, 0.0)), np.minimum(top, np.maximum(self.high, 0.0))

    def _mse(self) -> tuple[Floats, Floats]:
        ends = (np.ldexp(v, -self.exponent) for v in (np.minimum(self.low, 0.0), np.maximum(self.high, 0.0)))
        low, high = mse_range(self._nonzero(), self.origin, *ends)
        return np.ldexp(low, self.exponent), np.ldexp(high, self.exponent)

    def _nonzero(self) -> Ints:
        """The histogram without exact zeros, which every format stores without error."""
        counts = self.histogram.copy()
        counts[np.arange(len(counts)), -self.origin] -= self.zeros
        return counts


ARRAYS = tuple(f.name for f in fields(Statistics) if f.name not in ("tensors", "samples"))
_ROWS = {"histogram": (BINS,), "lows": (TAIL,), "highs": (TAIL,)}


def observe(
    tensors: tuple[str, ...],
    sizes: Sequence[int],
    ends: Floats,
    vectors: Sequence[np.ndarray],
    before: Statistics | None,
) -> Statistics:
    """Compute the statistics of one sample, on the histogram grid that it shares with the statistics before it.

    Args:
        tensors: names of the tensors.
        sizes: number of values of each tensor.
        ends: exact minimum and maximum of every tensor, (tensors, 2).
        vectors: some values of every tensor, each (values,).
        before: statistics of earlier samples, with which the result will be merged; None for the first sample.
    """
    low, high = ends[:, 0], ends[:, 1]
    known = (low, high) if before is None else (np.minimum(low, before.low), np.maximum(high, before.high))
    exponent, origin = _grid(*known)
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(tensors), _CHUNK)]
    parts = [_count(vectors[c], exponent[c], origin[c]) for c in chunks]
    histogram, zeros, subnormal, total, squares = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Statistics(
        tensors=tensors,
        samples=1,
        lows=np.pad(low[:, None], ((0, 0), (0, TAIL - 1)), constant_values=np.inf),
        highs=np.pad(high[:, None], ((0, 0), (0, TAIL - 1)), constant_values=-np.inf),
        size=np.maximum(np.array(sizes, np.int64), 1),
        first_low=low,
        first_high=high,
        moving_low=low,
        moving_high=high,
        exponent=exponent,
        origin=origin,
        histogram=histogram,
        zeros=zeros,
        subnormal=subnormal,
        total=total,
        squares=squares,
        infinite=np.zeros(len(tensors), np.int64),
    )


def _count(vectors: Sequence[np.ndarray], exponent: Ints, origin: Ints) -> tuple[Ints, Ints, Ints, Floats, Floats]:
    """Histogram, zeros, subnormals, sum and sum of squares; float64, in which scaling by 2^k rounds nothing."""
    sizes = [v.size for v in vectors]
    starts = np.cumsum([0, *sizes[:-1]])
    x = np.concatenate(vectors, dtype=np.float64)
    place = x * np.repeat(np.ldexp(1.0, -exponent), sizes)
    np.floor(place, out=place)
    place -= np.repeat(origin, sizes)
    np.clip(place, 0, BINS - 1, out=place)
    place += np.repeat(BINS * np.arange(len(sizes)), sizes)
    histogram = np.bincount(place.astype(np.int64), minlength=len(sizes) * BINS).reshape(-1, BINS)
    total = np.add.reduceat(x, starts)
    np.abs(x, out=x)
    zeros = np.add.reduceat((x == 0).view(np.uint8), starts, dtype=np.int64)
    small = np.add.reduceat((x < HALF_SMALLEST_NORMAL).view(np.uint8), starts, dtype=np.int64)
    return histogram, zeros, small - zeros, total, np.add.reduceat(np.square(x, out=x), starts)


def _grid(low: Floats, high: Floats) -> tuple[Ints, Ints]:
    """Exponent and origin of the finest dyadic grid that covers [low, high] and 0."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    exponent = np.where(high > low, np.maximum(np.frexp(high - low)[1] - 11, -149), -149).astype(np.int64)
    spans = np.floor(np.ldexp(high, -exponent)) - np.floor(np.ldexp(low, -exponent))
    exponent += spans >= BINS
    return exponent, np.floor(np.ldexp(low, -exponent)).astype(np.int64)


def _regrid(stats: Statistics, exponent: Ints, origin: Ints) -> Ints:
    """The histogram on a grid that is at least as wide."""
    rows = np.flatnonzero((stats.exponent != exponent) | (stats.origin != origin))
    if not rows.size:
        return stats.histogram
    shift = np.minimum(exponent - stats.exponent, 62)[rows, None]
    bins = ((stats.origin[rows, None] + np.arange(BINS)) >> shift) - origin[rows, None]
    bins = np.clip(bins, 0, BINS - 1) + BINS * np.arange(rows.size)[:, None]
    result = stats.histogram.copy()
    moved = np.bincount(bins.ravel(), stats.histogram[rows].ravel(), minlength=rows.size * BINS)
    result[rows] = moved.reshape(-1, BINS)
    return result
