from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.verify.estimate import (
    DOUBT,
    LOSS,
    OUTLIER_ODDS,
    OUTLIERS,
    POWERS,
    SLOPE,
    SPREADS,
    MeasuredDrop,
    combined_drops,
)


def measured(drop: float, loss: float | None, error: float, images: int = 400, seed: int = 0) -> MeasuredDrop:
    draws = np.random.default_rng(seed).normal(drop, error, 4000)
    return MeasuredDrop(drop=drop, loss=loss, draws=draws, images=images)


def sampled(plans: list[MeasuredDrop], errors: np.ndarray, count: int = 400_000) -> np.ndarray:
    """Mean drops by importance sampling from the model as the documentation states it, without any algebra."""
    rng = np.random.default_rng(1)
    slope = SLOPE * np.exp(DOUBT * rng.standard_normal(count))
    power, spread = rng.choice(POWERS, count), rng.choice(SPREADS, count)
    losses = np.array([p.loss for p in plans])
    law = slope[:, None] * (losses / LOSS) ** power[:, None]
    apart = rng.choice(OUTLIERS, count, p=OUTLIER_ODDS)
    own = np.hypot(spread[:, None] * law, apart[:, None])
    drops = law + own * rng.standard_normal((count, len(plans)))
    far = np.array([p.drop for p in plans]) - drops
    log = -0.5 * np.einsum("ni,ij,nj->n", far, np.linalg.inv(errors), far)
    weights = np.exp(log - log.max())
    return np.asarray(weights @ drops / weights.sum())


def test_the_estimate_is_the_mean_of_what_the_model_says() -> None:
    plans = [
        measured(0.04, 0.2, 0.006, seed=1),
        measured(0.004, 0.03, 0.004, seed=2),
        measured(0.0, 0.02, 0.004, seed=3),
    ]
    errors = np.cov(np.array([p.draws for p in plans]))
    found = combined_drops(plans)
    values = [found.estimate(i).value for i in range(3)]
    assert values == pytest.approx(sampled(plans, errors).tolist(), abs=3e-4)
    assert found.weights.sum() == pytest.approx(1)
    low, high = found.estimate(1).low, found.estimate(1).high
    assert found.probability(1, high) - found.probability(1, low) == pytest.approx(0.95, abs=1e-6)


def test_without_agreement_labels_alone_count() -> None:
    (found,) = (combined_drops([measured(0.01, None, 0.005)]),)
    estimate = found.estimate(0)
    assert estimate.value == pytest.approx(0.01, abs=1e-5)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.005, rel=0.05)


def test_agreement_tells_what_labels_cannot() -> None:
    """Of two plans with the same drop on noisy labels the one that agrees more is surer to keep a limit."""
    far, near = measured(0.002, 0.1, 0.01, seed=1), measured(0.002, 0.01, 0.01, seed=2)
    found = combined_drops([far, near])
    assert found.probability(1, 0.003) > 0.9 > found.probability(0, 0.003)
    assert combined_drops([measured(0.002, None, 0.01)]).probability(0, 0.003) < 0.6


def test_a_drop_that_the_labels_show_is_not_talked_away() -> None:
    for loss in (0.0, 0.01):
        found = combined_drops([measured(0.05, loss, 0.002)])
        assert found.probability(0, 0.003) < 1e-3
        assert found.estimate(0).value == pytest.approx(0.05, abs=0.002)


def test_few_images_prove_nothing() -> None:
    """Four images without any difference have resamples without a spread, and still an error."""
    same = MeasuredDrop(drop=0.0, loss=None, draws=np.zeros(100), images=4)
    assert combined_drops([same]).probability(0, 0.003) < 0.6


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(-0.05, 0.3), st.floats(0, 0.6), st.floats(1e-4, 0.05)), min_size=1, max_size=5),
    st.floats(0.5, 40.0),
)
def test_probabilities_rise_with_the_limit_and_units_do_not_matter(rows: list[Any], scale: float) -> None:
    plans = [measured(d, loss, e, seed=i) for i, (d, loss, e) in enumerate(rows)]
    scaled = [MeasuredDrop(drop=p.drop * scale, loss=p.loss, draws=p.draws * scale, images=p.images) for p in plans]
    one, other = combined_drops(plans), combined_drops(scaled, scale=scale)
    for i in range(len(plans)):
        found = [one.probability(i, limit) for limit in (-0.1, 0.0, 0.003, 0.05, 0.5)]
        assert found == sorted(found) and found[0] >= 0 and found[-1] <= 1 + 1e-12
        assert [other.probability(i, scale * limit) for limit in (-0.1, 0.0, 0.003, 0.05, 0.5)] == pytest.approx(
            found, abs=1e-6
        )
