"""Times of models side by side: what the ratio of two of them is worth."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pytest

from bitalloy.measure.bench import paired_ratio, time_sittings


class Sleeper:
    """A session that takes a known time, and keeps count of its runs."""

    input_names = output_names = ("x",)

    def __init__(self, runs: list[str], name: str) -> None:
        self.runs, self.name, self.closed = runs, name, False

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert not self.closed
        self.runs.append(self.name)
        time.sleep(1e-4)
        return {}

    def kernels(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("together", [True, False])
def test_every_sitting_has_new_sessions_and_as_many_rounds(together: bool) -> None:
    runs: list[str] = []
    made: list[Sleeper] = []

    def opener(name: str):
        def make() -> Sleeper:
            made.append(Sleeper(runs, name))
            return made[-1]

        return make

    seen: list[set[str]] = []
    models = {name: opener(name) for name in ("a", "b", "c")}
    times = time_sittings(
        models, {}, repeats=4, sittings=2, together=together, then=lambda sessions: seen.append(set(sessions))
    )
    assert {name: t.shape for name, t in times.items()} == dict.fromkeys("abc", (2, 4))
    assert all((t >= 0.1).all() for t in times.values())  # ms
    assert seen == [{"a", "b", "c"}] and all(s.closed for s in made)
    assert len(made) == (6 if together else 9)


def rounds(rng: np.random.Generator, ratio: float, sitting: float, single: float) -> tuple[np.ndarray, np.ndarray]:
    """Times (5, 8) of a model and its base: both share what slows a round, sittings and single runs differ."""
    shared = np.exp(np.abs(rng.normal(0, 0.6, (5, 8))))  # a busy machine: up to several times slower
    base = 10.0 * shared * np.exp(rng.normal(0, single, (5, 8)))
    model = 10.0 * ratio * shared * np.exp(rng.normal(0, sitting, (5, 1)) + rng.normal(0, single, (5, 8)))
    return model, base


@pytest.mark.parametrize(("sitting", "single"), [(0.0, 0.05), (0.03, 0.02), (0.1, 0.1)])
def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says(sitting: float, single: float) -> None:
    """Whatever the noise is made of. A share of 95 % of 1000 lies within 93 and 97 % but for one time in 250."""
    rng, truth = np.random.default_rng(5), 0.7
    found = [paired_ratio(*rounds(rng, truth, sitting, single)) for _ in range(1000)]
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert 0.93 <= covered <= 0.97
    assert np.mean([e.value for e in found]) == pytest.approx(truth, rel=0.01)


def test_what_slows_a_round_cancels() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(5, 50, (5, 8))
    found = paired_ratio(0.5 * base, base)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
