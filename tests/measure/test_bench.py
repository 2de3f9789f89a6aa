"""Times of models side by side: what the ratio of two of them is worth."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pytest

from bitalloy.core.records import Latency
from bitalloy.measure import bench
from bitalloy.measure.bench import interleave, latency_of, paired_ratio, time_sittings, unsteadiness
from bitalloy.runtime.steps import once


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
        models, [once({})], repeats=4, sittings=2, together=together, then=lambda sessions: seen.append(set(sessions))
    )
    assert {name: t.shape for name, t in times.items()} == dict.fromkeys("abc", (2, 4, 1))
    assert all((t >= 0.1).all() for t in times.values())  # ms
    assert seen == [{"a", "b", "c"}] and all(s.closed for s in made)
    assert len(made) == (6 if together else 9)


class Clock:
    """Time that passes only while a session of this clock runs."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.runs: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def session(self, name: str, seconds: float) -> Sleeper:
        """A session of which every run takes a hundredth longer than the one before it."""
        session = Sleeper(self.runs, name)

        def run(_: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.now += seconds * (1 + self.runs.count(name) / 100)
            self.runs.append(name)
            return {}

        session.run = run  # type: ignore[method-assign, assignment]
        return session


def test_runs_take_turns_and_the_first_ones_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steps = Clock(), list[int]()
    monkeypatch.setattr(bench, "time", clock)
    sessions = {"a": clock.session("a", 0.001), "b": clock.session("b", 0.1), "c": clock.session("c", 3.0)}
    times = interleave(sessions, [once({})], repeats=4, progress=steps.append)
    assert "".join(clock.runs) == "abcbcacab" + "abcbcacababc" and steps == [1] * 4
    for name, ms in (("a", 1.0), ("b", 100.0), ("c", 3000.0)):
        np.testing.assert_allclose(times[name][:, 0], [ms * 1.03, ms * 1.04, ms * 1.05, ms * 1.06])
    assert interleave(sessions, [once({})], repeats=2, warmup=1)["a"].shape == (2, 1)


@pytest.mark.parametrize("together", [True, False])
def test_sessions_live_for_one_sitting(together: bool) -> None:
    """Those of all models side by side, or one at a time; whatever comes after it gets sessions that still run."""
    alive: list[Sleeper] = []
    most: list[int] = []
    steps: list[int] = []

    def opener(name: str):
        def make() -> Sleeper:
            alive.append(Sleeper([], name))
            most.append(sum(not s.closed for s in alive))
            return alive[-1]

        return make

    def after(sessions: Mapping[str, object]) -> None:
        assert len(alive) == 2 * bench.SITTINGS + (4 if together else 6)
        assert list(sessions) == ["a", "b"] and not any(s.closed for s in alive[-2:])

    models = {name: opener(name) for name in ("a", "b")}
    times = time_sittings(models, [once({})], repeats=2, together=together, progress=steps.append)
    assert times["a"].shape == (bench.SITTINGS, 2, 1) and len(alive) == 2 * bench.SITTINGS
    assert max(most) == (2 if together else 1) and all(s.closed for s in alive)
    assert sum(steps) == 2 * bench.SITTINGS * (1 if together else 2)
    time_sittings(models, [once({})], repeats=1, sittings=2, together=together, then=after)
    assert all(s.closed for s in alive) and len(alive) > 2 * bench.SITTINGS


def test_spread_is_told_by_percentiles() -> None:
    found = latency_of(np.arange(101, dtype=float).reshape(1, 101) + 0.12345678)
    assert found == Latency(median_ms=50.1235, p10_ms=10.1235, p90_ms=90.1235, count=101)
    assert unsteadiness(found) == 50.1235 / 10.1235
    assert unsteadiness(Latency(median_ms=0.5, p10_ms=0.25, p90_ms=1.0, count=3)) == 2
    assert unsteadiness(Latency(median_ms=0.0, p10_ms=0.0, p90_ms=1.0, count=3)) == 1


def test_the_interval_of_a_ratio_is_student_s() -> None:
    """By hand: sittings with ratios of e^0.1, e^0.2, e^0.6 have a mean of 0.3 and a deviation of sqrt(0.07)."""
    base = np.array([[1.0, 2.0, 5.0]] * 3)
    times = base * np.exp([[0.1, 0.1, 3.0], [0.2, 0.2, 0.2], [0.6, -2.0, 0.6]])
    found = paired_ratio(times, base)
    reach = 4.302653 * np.sqrt(0.07 / 3)  # 97.5 % of t with two degrees of freedom, from tables
    assert (found.value, found.low, found.high) == tuple(round(float(np.exp(0.3 + r)), 4) for r in (0, -reach, reach))


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
