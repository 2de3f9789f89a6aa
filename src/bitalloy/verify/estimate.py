"""The drop of a task metric, estimated from labels and from agreement with the float model together.

Labels tell the drop itself, with the noise of few images. Agreement, how much of what the float model says a plan says
too, has far less noise and grows with the drop, by a law that is not known. So the law is fitted to all plans that were
evaluated, and each plan's drop is what labels and law say together, weighted by what each of them knows:

    drop of plan i = f(loss_i) + own_i,        own_i ~ N(0, (spread f(loss_i))^2 + apart^2)
    measured_i     = drop of plan i + error_i, error  ~ N(0, covariance of the paired bootstrap)
    f(loss)        = slope (loss / LOSS)^power

f goes through zero and rises. Slope, power, spread and apart are not known; each combination of a grid counts as much
as it explains what was measured, times what is likely beforehand (a mixture of normal distributions). Where labels and
law contradict each other, a large `apart` explains that best, and the labels count alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import logsumexp, ndtr

from bitalloy.core.records import Estimate
from bitalloy.core.status import FEW_SAMPLES

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
OUTLIERS = (0.0005, 0.005, 0.5)
"""How far plans lie from the law beside that, as a part of the metric's scale."""
OUTLIER_ODDS = (0.75, 0.2, 0.05)
"""How likely each of these is beforehand."""
STEPS = 25
"""Number of slopes in the grid, from 3 deviations below the likeliest to 3 above."""
UNWITNESSED = 1e3
"""Standard deviation of a drop of which agreement tells nothing, as a part of the metric's scale."""
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
        scale: the metric's scale, see `metric_scale`.
    """
    errors = _errors(plans, scale)
    grid = np.array(list(product(np.linspace(-3, 3, STEPS), POWERS, SPREADS, range(len(OUTLIERS)))))
    steps, powers, spreads, apart = grid.T[:, :, None]
    drops = np.array([p.drop for p in plans])
    losses = np.array([math.nan if p.loss is None else max(p.loss, 0.0) for p in plans])
    known = ~np.isnan(losses)
    law = np.where(known, scale * SLOPE * np.exp(DOUBT * steps) * (losses / LOSS) ** powers, 0.0)
    own = (spreads * law) ** 2 + (scale * np.array(OUTLIERS)[apart.astype(int)]) ** 2
    own = np.where(known, own, (UNWITNESSED * scale) ** 2)
    far = drops - law
    whole = own[:, :, None] * np.eye(len(drops)) + errors
    solved = np.linalg.solve(whole, np.concatenate([far[:, :, None], np.broadcast_to(errors, whole.shape)], 2))
    pull, share = solved[:, :, 0], solved[:, :, 1:]
    fit = -0.5 * np.einsum("gp,gp->g", far, pull) - 0.5 * np.linalg.slogdet(whole).logabsdet
    odds = np.log(np.array(OUTLIER_ODDS)[apart[:, 0].astype(int)]) - 0.5 * steps[:, 0] ** 2
    logs = fit + odds
    weights = np.exp(logs - logsumexp(logs))
    left = own * np.diagonal(share, axis1=1, axis2=2)  # own - own (own + errors)^-1 own, without the cancellation
    return CombinedDrops(weights / weights.sum(), law + own * pull, np.sqrt(left))


def _errors(plans: Sequence[MeasuredDrop], scale: float) -> np.ndarray:
    """(P, P) covariance of the errors of measurement; plans on different images have none in common."""
    found = np.zeros((len(plans),) * 2)
    for count in {p.images for p in plans}:
        same = [i for i, p in enumerate(plans) if p.images == count]
        draws = np.array([plans[i].draws for i in same])
        known = draws[:, ~np.isnan(draws).any(axis=0)]
        found[np.ix_(same, same)] = np.atleast_2d(np.cov(known)) if known.shape[1] > 1 else 0.0
    few = np.array([FEW_SAMPLES / p.images**2 for p in plans])
    return found + np.diag((few**2 + LEAST**2) * scale**2)
