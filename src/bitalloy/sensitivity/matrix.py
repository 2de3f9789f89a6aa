"""Predictions of the probe matrix: the damage of any set of sites, with bootstrap intervals over samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from bitalloy.core.errors import DataError
from bitalloy.core.records import Estimate, Secant
from bitalloy.model.heads import is_divergence

BOOTSTRAPS = 400
FLOOR_DB, CEILING_DB = -60.0, 160.0
HEAVY_TAIL = 1.0
"""Standard deviation of the logarithms of damages from which on rare samples do most of it."""
LEAST_ENERGY = 1e-30
"""What stands in place of the energy of a head that is zero on all samples, or on all that a bootstrap draws."""


@dataclass(frozen=True)
class ProbeMatrix:
    """Rows of the probe matrix for a set of samples.

    `rows[h]` is (samples, probes of head h, sites). `own[h]`, of the same shape, is the sum of the squares of the parts
    (blocks of channels) that add up to a row's entry. `energy` is (samples, heads): ||y||^2 of each head.
    """

    heads: tuple[str, ...]
    sites: tuple[str, ...]
    rows: tuple[np.ndarray, ...]
    own: tuple[np.ndarray, ...]
    energy: np.ndarray
    executed: frozenset[tuple[str, str]] = frozenset()
    """Heads and sites, as pairs, whose rows hold what execution measured, because gradients do not tell it."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the matrix, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.energy.shape[0])

    @cached_property
    def column(self) -> Mapping[str, int]:
        """Site -> index of its column."""
        return {s: i for i, s in enumerate(self.sites)}

    @cached_property
    def plain(self) -> np.ndarray:
        """Mask (heads,): False for divergences, whose nats are not comparable with relative squared errors."""
        return np.array([not is_divergence(h) for h in self.heads])

    def select(self, sites: Iterable[str]) -> np.ndarray:
        """Return a set of sites as a 0/1 vector (sites,); sites that reach no head are ignored."""
        chosen = np.zeros(len(self.sites), np.float64)
        chosen[[self.column[s] for s in sites if s in self.column]] = 1.0
        return chosen

    def damage(self, chosen: np.ndarray) -> np.ndarray:
        """Return the relative error energy ||sum J e||^2 / ||y||^2 of a plan, (samples, heads).

        `chosen` is (sites,), 1 where the plan rounds. The square of the sum splits into the squares of all parts of all
        sites, and the products of different parts. Roundings are nearly independent, so the products are mostly noise
        around zero; their sum is shrunk towards zero by how uncertain its mean is (`shrink`), which leaves real
        interactions in and takes most of the noise out. The denominator is the mean over all samples, so that the mean
        over samples is the ratio of total energies.
        """
        return self._energies((rows @ chosen, own @ chosen) for rows, own in zip(self.rows, self.own, strict=True))

    def site_damage(self) -> np.ndarray:
        """Return the relative error energy of every site alone, (samples, heads, sites)."""
        pairs = zip(self.rows, self.own, strict=True)
        return self._energies((rows.astype(np.float64), own.astype(np.float64)) for rows, own in pairs)

    def _energies(self, heads: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        columns = []
        for (total, own), energy in zip(heads, self.energy.mean(axis=0), strict=True):
            products = np.square(total) - own
            columns.append(relative((own + shrink(products) * products).mean(axis=1), energy))
        return np.stack(columns, axis=1)

    def resampled(self, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the relative error energy of a plan for bootstrap draws of the samples, (draws, heads).

        `weights` is (draws, samples), see `draws`.
        """
        columns = []
        for rows, own, energy in zip(self.rows, self.own, self.energy.T, strict=True):
            squares = own @ chosen
            products = np.square(rows @ chosen) - squares
            mean, second = (weights @ part.mean(axis=1) for part in (products, np.square(products)))
            spread = np.maximum(second - np.square(mean), 0.0) / max(products.size - 1, 1)
            kept = np.maximum(1.0 - spread / np.where(mean != 0, np.square(mean), 1.0), 0.0) * (mean != 0)
            columns.append(relative(weights @ squares.mean(axis=1) + kept * mean, weights @ energy))
        return np.stack(columns, axis=1)

    def view(self, names: Mapping[str, str]) -> ProbeMatrix:
        """Return the columns of one target: `names` maps its sites to columns. Sites without a column are left out."""
        known = {site: self.column[name] for site, name in names.items() if name in self.column}
        if tuple(known) == self.sites:
            return self
        at = np.array(list(known.values()), np.int64)
        rows, own = (tuple(r[..., at] for r in block) for block in (self.rows, self.own))
        executed = frozenset((h, s) for s, name in names.items() for h in self.heads if (h, name) in self.executed)
        return ProbeMatrix(self.heads, tuple(known), rows, own, self.energy, executed)

    def scaled(self, factors: np.ndarray) -> ProbeMatrix:
        """Multiply every column by its factor; `factors` are (heads, sites)."""
        rows = tuple((r * f).astype(r.dtype) for r, f in zip(self.rows, factors, strict=True))
        own = tuple((o * f * f).astype(o.dtype) for o, f in zip(self.own, factors, strict=True))
        return replace(self, rows=rows, own=own)

    def subset(self, samples: slice) -> ProbeMatrix:
        """Return the rows of some of the samples."""
        rows, own = (tuple(r[samples] for r in block) for block in (self.rows, self.own))
        return replace(self, rows=rows, own=own, energy=self.energy[samples])

    def to_bytes(self) -> bytes:
        """Return the matrix as a compressed .npz without pickled objects."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"rows_{i}": r for i, r in enumerate(self.rows)}
        arrays |= {f"own_{i}": r for i, r in enumerate(self.own)}
        arrays["executed"] = np.array(sorted(self.executed), np.str_).reshape(-1, 2)
        np.savez_compressed(
            buffer, heads=np.array(self.heads), sites=np.array(self.sites), energy=self.energy, **arrays
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> ProbeMatrix:
        """Read what `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            heads = tuple(str(h) for h in file["heads"])
            rows, own = (tuple(file[f"{part}_{i}"] for i in range(len(heads))) for part in ("rows", "own"))
            executed = frozenset((str(head), str(site)) for head, site in file["executed"])
            return ProbeMatrix(heads, tuple(str(s) for s in file["sites"]), rows, own, file["energy"], executed)

    @staticmethod
    def concatenate(parts: Sequence[ProbeMatrix]) -> ProbeMatrix:
        """Stack matrices of different samples, which have the same columns."""
        first = parts[0]
        rows, own = (
            tuple(np.concatenate([getattr(p, name)[h] for p in parts]) for h in range(len(first.heads)))
            for name in ("rows", "own")
        )
        return replace(first, rows=rows, own=own, energy=np.concatenate([p.energy for p in parts]))


def relative(error: np.ndarray, energy: np.ndarray | float) -> np.ndarray:
    """Return error energy over energy. Where a head is zero on all samples any error is beyond bounds, and finite.

    >>> relative(np.array([0.0, 2.0]), np.array([0.0, 4.0])).tolist()
    [0.0, 0.5]
    >>> bool(1e29 < relative(np.array(1.0), 0.0) < 1e31)
    True
    """
    return np.asarray(error / np.maximum(energy, LEAST_ENERGY))


def decibel(damage: np.ndarray) -> np.ndarray:
    """Return the SQNR in dB of a relative error energy, clipped to a range that JSON and plots can carry."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(-10 * np.log10(damage), FLOOR_DB, CEILING_DB))


def silent_heads(heads: Sequence[str], energy: np.ndarray) -> tuple[str, ...]:
    """Name the heads that are zero on all samples, so that no error can be told relative to them.

    Args:
        heads: names of the heads.
        energy: (samples, heads), ||y||^2 of each.

    Raises:
        DataError: all heads are silent but divergences.
    """
    plain = [(h, e) for h, e in zip(heads, energy.mean(axis=0), strict=True) if not is_divergence(h)]
    silent = tuple(h for h, e in plain if e == 0)
    if len(silent) == len(plain):
        raise DataError(
            f"All that the model gives ({', '.join(silent)}) is zero on every sample, so there is nothing to compare "
            "with. Give samples on which it is not, or check the weights."
        )
    return silent


def draws(samples: int, seed: int) -> np.ndarray:
    """Draw bootstrap weights (draws, samples): how often each sample is drawn, divided by the number of samples."""
    generator = np.random.default_rng([seed, 17])
    return np.asarray(generator.multinomial(samples, np.full(samples, 1 / samples), size=BOOTSTRAPS) / samples)


def shrink(values: np.ndarray) -> np.ndarray:
    """Return the positive-part James-Stein factor, 0 to 1, for the mean of noisy values: 1 - var(mean) / mean^2.

    The mean is over the first two axes (samples, probes); the result has the shape of the others.
    """
    count = values.shape[0] * values.shape[1]
    mean = values.mean(axis=(0, 1))
    if count < 2:
        return np.zeros_like(mean)
    squared = np.square(mean)
    noise = values.var(axis=(0, 1), ddof=1) / count
    return np.asarray(np.maximum(1.0 - noise / np.where(squared > 0, squared, 1.0), 0.0) * (squared > 0))


def bend(secant: Secant, damage: np.ndarray) -> np.ndarray:
    """Return the factor from linear to true damage, for a linear damage of shape (..., heads).

    A plan whose linear damage is t^2 times that of the all-INT8 network is taken to bend like the all-INT8 network
    with all errors scaled by t. Between the measured fractions the logarithm of the factor is linear in t; at t = 0
    the factor is 1.
    """
    linear = np.maximum(np.array(secant.linear), 1e-30)
    t = np.sqrt(np.maximum(damage, 0.0) / linear)
    points = [0.0, *secant.fractions]
    factors: np.ndarray = np.ones_like(t)
    for head in range(len(secant.heads)):
        known = [secant.damage[i][head] / (f * f * linear[head]) for i, f in enumerate(secant.fractions)]
        logs = np.log(np.clip([1.0, *known], 1e-6, 1e6))
        factors[..., head] = np.exp(np.interp(t[..., head], points, logs))
    return factors


def straight(secant: Secant, damage: float | np.ndarray) -> np.ndarray:
    """Find the largest linear damage (heads,) whose true damage stays within `damage`: the inverse of `bend`."""
    linear = np.maximum(np.array(secant.linear), 1e-30)
    grid = np.square(np.linspace(0.0, 2.0, 20001))[:, None] * linear
    true = np.maximum.accumulate(grid * bend(secant, grid), axis=0)
    inside = true <= damage
    return np.array([grid[inside[:, h], h].max(initial=0.0) for h in range(len(secant.heads))])


def estimate_sqnr(
    matrix: ProbeMatrix, chosen: np.ndarray, weights: np.ndarray, secant: Secant | None = None
) -> tuple[Estimate, ...]:
    """Estimate the SQNR of rounding the chosen sites together, per head, with a 95 % interval (`sqnr_interval`).

    How far interactions are shrunk is decided anew for every draw, so that its uncertainty is part of the interval.
    With a secant the linear numbers are corrected by `bend`, interval and all.
    """
    each = matrix.damage(chosen)
    found = [each.mean(axis=0), matrix.resampled(chosen, weights), lognormal_limit(each)]
    if secant is not None:
        found = [damage * bend(secant, damage) for damage in found]
    damage, resampled, most = found
    return tuple(
        sqnr_interval(*of_head) for of_head in zip(damage, resampled.T, most, [len(each)] * len(most), strict=True)
    )


def damage_interval(damage: np.ndarray, energy: np.ndarray, weights: np.ndarray) -> Estimate:
    """Return the SQNR in dB of total damage over total energy; both are (samples,), `weights` is (draws, samples)."""
    drawn = relative(weights @ damage, weights @ energy)
    return sqnr_interval(float(damage.mean()), drawn, float(lognormal_limit(damage)), len(damage))


def sqnr_interval(damage: float, resampled: np.ndarray, most: float, samples: int) -> Estimate:
    """Return the SQNR in dB of a relative error energy, with an interval of 95 %.

    Both sides reach as far as the farther percentile of the bootstrap draws, times what Student's t and the bootstrap's
    own bias, sqrt(n / (n - 1)), add for n samples (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015).
    Where samples that do most of the damage are so rare that a few draws may hold none of them, no bootstrap knows of
    these: there the interval goes down to the damage `most`. One sample leaves it open.

    Args:
        damage: relative error energy, the mean over the samples.
        resampled: the same on bootstrap draws of the samples.
        most: see `lognormal_limit`.
        samples: number of samples.
    """
    value, draws_db = float(decibel(np.asarray(damage))), decibel(resampled)
    if samples < 2:
        return Estimate(value=round(value, 3), low=FLOOR_DB, high=CEILING_DB)
    low, high = np.percentile(draws_db, [2.5, 97.5])
    reach = reach_of(value, low, high, samples)
    low, high = np.clip([value - reach, value + reach], FLOOR_DB, CEILING_DB)
    low = min(low, float(decibel(np.asarray(most))))
    return Estimate(value=round(value, 3), low=round(float(low), 3), high=round(float(high), 3))


def lognormal_limit(damage: np.ndarray) -> np.ndarray:
    """Return the upper end of the 95 % interval of mean damages whose logarithms are normal.

    How far samples differ on a logarithmic scale says how much more the rare ones do that were not drawn. The limit is
    that of U. Olsson, "Confidence Intervals for the Mean of a Log-Normal Distribution", 2005. Samples without damage
    count as a share of the samples, not by their logarithm.

    Args:
        damage: damages of the samples, (samples, ...).

    Returns:
        The limit, of the shape of one sample; 0 where fewer than two samples have any damage, and where the logarithms
        differ by less than `HEAVY_TAIL`, so that no few samples do most of it and a bootstrap sees what there is.
    """
    counts = damage > 0
    count = counts.sum(axis=0)
    logs = np.log(np.where(counts, damage, 1.0))
    mean = logs.sum(axis=0) / np.maximum(count, 1)
    variance = np.where(counts, np.square(logs - mean), 0.0).sum(axis=0) / np.maximum(count - 1, 1)
    spread = np.sqrt(variance / np.maximum(count, 1) + np.square(variance) / (2 * np.maximum(count - 1, 1)))
    limit = mean + variance / 2 + stdtrit(np.maximum(count - 1, 1), 0.975) * spread
    heavy = (count > 1) & (variance >= HEAVY_TAIL**2)
    return np.asarray(np.where(heavy, count / len(damage) * np.exp(np.minimum(limit, 100.0)), 0.0))


def reach_of(value: float, low: float, high: float, samples: int) -> float:
    """Return how far an interval reaches to both sides, of percentiles of bootstrap draws; see `sqnr_interval`.

    Args:
        value: the number itself.
        low: lower percentile of its draws.
        high: upper percentile of its draws.
        samples: number of samples, at least two.
    """
    widening = stdtrit(samples - 1, 0.975) / ndtri(0.975) * np.sqrt(samples / (samples - 1))
    return float(max(high - value, value - low) * widening)
