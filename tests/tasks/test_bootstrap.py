from __future__ import annotations

import numpy as np
import pytest

from bitalloy.tasks.bootstrap import (
    RESAMPLES,
    ResampledMetric,
    bootstrap_estimate,
    compare_models,
    metric_value,
    ratio_of_sums,
    resampled_weights,
)


def test_ratio_equals_that_of_repeated_images(rng: np.random.Generator) -> None:
    above, below = rng.random(7), rng.integers(0, 5, 7)
    weights = resampled_weights(7, 20, seed=1)
    found = ratio_of_sums(above, below, weights)
    assert found.value == pytest.approx(above.sum() / below.sum())
    for row, value in zip(weights, found.resampled, strict=True):
        drawn = np.repeat(np.arange(7), row)
        if below[drawn].sum():
            assert value == pytest.approx(above[drawn].sum() / below[drawn].sum())
        else:
            assert np.isnan(value)


def test_every_image_is_drawn_as_often_as_any_other() -> None:
    """Each count is binomial: mean 1, variance 1 - 1 / n."""
    weights = resampled_weights(5, 4000, seed=3)
    assert weights.shape == (4000, 5) and (weights.sum(axis=1) == 5).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.06)
    assert weights.var() == pytest.approx(4 / 5, rel=0.05)
    assert (weights == resampled_weights(5, 4000, seed=3)).all() and RESAMPLES == 1000


def test_a_metric_lies_between_its_bounds() -> None:
    for value, bounds, low, high in (
        (0.95, {}, 0.85, 1.0),
        (0.05, {}, 0.0, 0.15),
        (0.9, {"bounds": (0.85, 3.0)}, 0.85, 1.0),
    ):
        found = metric_value(value, np.array([value - 0.1, value + 0.1] * 50), 4, **bounds)
        assert (found.low, found.high) == pytest.approx((low, high)) and (found.value, found.n) == (value, 4)


def test_drops_are_positive_where_a_model_is_worse(rng: np.random.Generator) -> None:
    base = rng.normal(0.5, 0.1, 400)
    models = {
        "float": ResampledMetric(0.5, base),
        "int8": ResampledMetric(0.4, base - 0.1),
        "mixed": ResampledMetric(0.55, base + 0.05),
    }
    up = compare_models("score", models, 40)
    assert up.drops["int8"].value == pytest.approx(0.1) and up.drops["mixed"].value == pytest.approx(-0.05)
    assert up.drops["int8"].high - up.drops["int8"].low < 1e-9  # paired: what both share cancels
    assert up.values["float"].high - up.values["float"].low > 0.3
    assert list(up.values) == ["float", "int8", "mixed"] and "float" not in up.drops
    down = compare_models("loss", models, 40, higher_is_better=False, bounds=(0, float("inf")))
    assert down.drops["int8"].value == pytest.approx(-0.1) and not down.higher_is_better


def test_interval_is_reflected_and_cut_at_the_bounds() -> None:
    resampled = np.linspace(0.7, 1.0, 1001)
    spread = bootstrap_estimate(0.8, resampled)
    assert (spread.low, spread.high) == pytest.approx((1.6 - 0.9925, 1.6 - 0.7075), abs=1e-9)
    value = compare_models("score", {"float": ResampledMetric(0.95, resampled)}, 3).values["float"]
    assert value.high == 1 and value.low == pytest.approx(1.9 - 0.9925) and value.n == 3
    empty = bootstrap_estimate(0.3, np.full(5, np.nan))
    assert (empty.low, empty.high) == (0.3, 0.3)


def test_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(5), 0
    weights = resampled_weights(60, 300, seed=0)
    for _ in range(200):
        found = ratio_of_sums(rng.exponential(2.0, 60), np.ones(60), weights)
        spread = bootstrap_estimate(found.value, found.resampled)
        held += spread.low <= 2.0 <= spread.high
    assert 0.87 <= held / 200 <= 0.98


def test_interval_of_a_paired_drop_covers_the_truth_about_as_often_as_it_says() -> None:
    """Images differ much more from each other than the models do on one image."""
    rng, truth, held = np.random.default_rng(6), 0.02, 0
    weights, ones = resampled_weights(60, 400, seed=0), np.ones(60)
    for _ in range(300):
        image = rng.beta(2, 2, 60)
        models = {
            name: ratio_of_sums(image - drop + rng.normal(0, 0.05, 60), ones, weights)
            for name, drop in (("float", 0.0), ("int8", truth))
        }
        found = compare_models("score", models, 60).drops["int8"]
        held += found.low <= truth <= found.high
    assert 0.89 <= held / 300 <= 0.985
