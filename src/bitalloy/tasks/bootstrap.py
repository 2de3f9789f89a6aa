"""Intervals of task metrics: a bootstrap over images, with the same draws for every model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitalloy.core.records import Estimate, MetricValue
from bitalloy.tasks.base import TaskMetric

__all__ = [
    "RESAMPLES",
    "ResampledMetric",
    "bootstrap_estimate",
    "compare_models",
    "metric_value",
    "ratio_of_sums",
    "resampled_weights",
]

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class ResampledMetric:
    """A metric of one model, and what it would have been on other draws of the images."""

    value: float
    resampled: np.ndarray
    """Values on B resamples, (B,); b stands for the same images in every model. NaN where the metric is undefined."""


def resampled_weights(images: int, count: int, seed: int) -> np.ndarray:
    """Draw `images` images with replacement, `count` times; return how often each is drawn, (count, images)."""
    draws = np.random.default_rng(seed).integers(0, images, (count, images))
    counts = [np.bincount(draw, minlength=images) for draw in draws]
    return np.array(counts, np.intp).reshape(count, images)


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray, weights: np.ndarray) -> ResampledMetric:
    """Divide sums over images: the mean over all objects, pixels or tokens, not the mean of the images' means.

    Args:
        numerators: numerator of each image, (I,).
        denominators: denominator of each image, (I,), not negative; their sum is positive.
        weights: (B, I) from `resampled_weights`.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = (weights @ above) / (weights @ below)
    resampled[~np.isfinite(resampled)] = np.nan
    return ResampledMetric(float(above.sum() / below.sum()), resampled)


def bootstrap_estimate(value: float, resampled: np.ndarray) -> Estimate:
    """Return a value with the basic (reflected) bootstrap interval of nominally 95 %.

    Average precision on few images is too high, and on a resample higher still; a mean over the classes that occur
    is biased in the same way. Reflecting the percentiles at the value takes that out: for box AP on 94 COCO images
    (150 simulated samples) the interval held the truth in 89 % of cases, the plain percentile interval in 73 %.
    """
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return Estimate(value=value, low=value, high=value)
    low, high = np.percentile(known, (2.5, 97.5))
    return Estimate(value=value, low=2 * value - float(high), high=2 * value - float(low))


def metric_value(
    value: float, resampled: np.ndarray, n: int, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> MetricValue:
    """Return a value of `n` images with its bootstrap interval, which is cut at the metric's `bounds`."""
    spread = bootstrap_estimate(value, resampled)
    return MetricValue(value=value, low=max(bounds[0], spread.low), high=min(bounds[1], spread.high), n=n)


def compare_models(
    name: str,
    measured: Mapping[str, ResampledMetric],
    n: int,
    *,
    higher_is_better: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    witness: str = "",
    agreement: bool = False,
) -> TaskMetric:
    """Compare one metric of all models; the first model is the reference of the paired drops.

    Args:
        name: name of the metric.
        measured: model -> its metric, on the same images with the same weights.
        n: number of images.
        higher_is_better: decides the sign of the drops.
        bounds: least and largest value of the metric; (0, inf) for one without an upper end.
        witness: see `TaskMetric`.
        agreement: see `TaskMetric`.
    """
    reference, *others = measured
    sign = 1.0 if higher_is_better else -1.0
    first = measured[reference]
    draws = {model: sign * (first.resampled - measured[model].resampled) for model in others}
    drops = {model: bootstrap_estimate(sign * (first.value - measured[model].value), draws[model]) for model in others}
    assert all(math.isfinite(m.value) for m in measured.values()), f"{name} is not a number"
    return TaskMetric(
        name=name,
        values={model: metric_value(m.value, m.resampled, n, bounds=bounds) for model, m in measured.items()},
        drops=drops,
        higher_is_better=higher_is_better,
        witness=witness,
        agreement=agreement,
        draws={model: np.asarray(drawn, np.float64).tobytes() for model, drawn in draws.items()},
    )
