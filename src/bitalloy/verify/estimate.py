"""The drop of a task metric, estimated from labels and from agreement with the float model together.

Labels tell the drop itself, with the noise of few images. Agreement, how much of what the float model says a plan says
too, has far less noise and grows with the drop, by a law that is not known. So the law is fitted to all plans that were
evaluated, and each plan's drop is what labels and law say together, weighted by what each of them knows:

    drop of plan i = f(loss_i) + own_i,        own_i ~ N(0, (spread f(loss_i))^2)
    measured_i     = drop of plan i + error_i, error  ~ N(0, covariance of the paired bootstrap)
    f(loss)        = slope (loss / LOSS)^power

f goes through zero and rises. Slope, power and spread are not known; each combination of a grid counts as much as it
explains what was measured, times what is likely beforehand (a mixture of normal distributions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.special import logsumexp, ndtr

from bitalloy.core.records import Estimate

LOSS = 0.1
"""Agreement lost at which `SLOPE` is the likeliest drop: ten points."""
SLOPE = 0.015
"""Likeliest drop there beforehand, in parts of the metric's scale. On a YOLO11n and 188 COCO images eight models lost
1.8 to 27 points of agreement and 0.01 to 5.8 points of AP, most of them 0.03 to 0.05 points of AP for (loss in
points)^1.5, which is 1.0 to 1.6 points at a loss of 10."""
DOUBT = 1.3
"""Standard deviation of the logarithm of the slope beforehand: a factor of 3.7 either way."""
POWERS = (1.0, 1.5, 2.0)
SPREADS = (0.25, 0.5, 1.0)
"""How far plans lie from the law, as a part of it."""
STEPS = 25
"""Number of slopes in the grid, from 3 deviations below the likeliest to 3 above."""
LEAST = 1e-9
"""Standard deviation, as a part of the metric's scale, that every estimate has at least."""


@dataclass(frozen=True)
class MeasuredDrop:
    """What was measured of one plan."""

    drop: float
    """How much worse the plan is than float, on the labels."""
    loss: float | None
    """Part of the float model's answers that it lost; None where agreement is not measured."""
    draws: np.ndarray
    """`drop` on resamples of the images, (B,)."""
    images: int
    """Number of images; plans on the same number were measured on the same images, with the same resamples."""


@dataclass(frozen=True)
class CombinedDrops:
    """Distribution of the drop of each of P plans: a mixture of G normal distributions, the same weights for all."""

    weights: np.ndarray
    """(G,), they sum to 1."""
    means: np.ndarray
    """(G, P)."""
    deviations: np.ndarray
    """(G, P)."""

    def probability(self, plan: int, limit: float) -> float:
        """Return the probability that the drop of a plan is at most `limit`."""
        scores = (limit - self.means[:, plan]) / self.deviations[:, plan]
        return float(self.weights @ ndtr(scores))

    def estimate(self, plan: int) -> Estimate:
        """Return the mean of the drop of a plan, with the middle 95 % of its distribution."""
        value = float(self.weights @ self.means[:, plan])
        return Estimate(value=value, low=self._quantile(plan, 0.025), high=self._quantile(plan, 0.975))

    def _quantile(self, plan: int, part: float) -> float:
        means, deviations = self.means[:, plan], self.deviations[:, plan]
        low, high = float((means - 9 * deviations).min()), float((means + 9 * deviations).max())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.probability(plan, middle) < part else (low, middle)
        return (low + high) / 2


def combined_drops(plans: Sequence[MeasuredDrop], *, scale: float = 1.0) -> CombinedDrops:
    """Estimate the drops of plans from labels, and from the law between drop and agreement that they show together.

    A plan without agreement gets what its labels say alone.

    Args:
        plans: what was measured of each of P plans, at least one.
        scale: the metric's scale: 1 for a metric in 0..1, else its value for the float model.
    """
    return _Evidence(plans, scale).combined


@dataclass(frozen=True)
class _Evidence:
    plans: Sequence[MeasuredDrop]
    scale: float

    @cached_property
    def errors(self) -> np.ndarray:
        """(P, P) covariance of the errors of measurement; plans on different images have none in common."""
        found = np.zeros((len(self.plans),) * 2)
        for count in {p.images for p in self.plans}:
            same = [i for i, p in enumerate(self.plans) if p.images == count]
            draws = np.array([self.plans[i].draws for i in same])
            known = draws[:, ~np.isnan(draws).any(axis=0)]
            found[np.ix_(same, same)] = np.atleast_2d(np.cov(known)) if known.shape[1] > 1 else 0.0
        return found + np.eye(len(self.plans)) * (LEAST * self.scale) ** 2

    @cached_property
    def combined(self) -> CombinedDrops:
        drops = np.array([p.drop for p in self.plans])
        steps = np.linspace(-3, 3, STEPS)
        logs, means, deviations = [], [], []
        for step, power, spread in product(steps, POWERS, SPREADS):
            law = self._law(SLOPE * math.exp(DOUBT * step), power)
            own = np.diag(np.where(np.isinf(law), 1e6 * self.scale, spread * law + LEAST * self.scale) ** 2)
            law = np.where(np.isinf(law), 0.0, law)
            whole = own + self.errors
            factor = np.linalg.cholesky(whole)
            far = np.linalg.solve(factor, drops - law)
            gain = np.linalg.solve(whole, own).T
            left = np.diagonal(own - gain @ own)
            logs.append(-0.5 * step**2 - 0.5 * far @ far - np.log(np.diagonal(factor)).sum())
            means.append(law + gain @ (drops - law))
            deviations.append(np.sqrt(np.maximum(left, (LEAST * self.scale) ** 2)))
        weights = np.exp(np.array(logs) - logsumexp(logs))
        return CombinedDrops(weights, np.array(means), np.array(deviations))

    def _law(self, slope: float, power: float) -> np.ndarray:
        """What the law expects of each plan, (P,); infinite where nothing is known of its agreement."""
        losses = np.array([np.inf if p.loss is None else max(p.loss, 0.0) for p in self.plans])
        return np.asarray(self.scale * slope * (losses / LOSS) ** power)
