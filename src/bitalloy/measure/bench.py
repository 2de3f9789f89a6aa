"""Latency of several models side by side: interleaved runs, medians, spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.special import stdtrit

from bitalloy.core.outcome import LatencySpread
from bitalloy.core.records import Estimate, Latency
from bitalloy.runtime.base import Session
from bitalloy.runtime.ort import available_cores
from bitalloy.runtime.steps import Step

SITTINGS = 3
"""Times that sessions are made anew in one measurement."""
TOLERANCE = 1.05
"""A measured latency up to 5 % above its limit counts as met; medians of two runs differ by as much."""

UNSTEADY = 1.5
"""Median over the 10th percentile of a series of times, from which on other work on the machine decides them."""


def interleave(
    sessions: Mapping[str, Session],
    steps: Sequence[Step],
    *,
    repeats: int,
    warmup: int = 3,
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Time steps in ms, each once for every model in every round: per model an array (repeats, steps).

    The order of the models changes from round to round, so that none always follows the same one.
    """
    names = list(sessions)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found = []
            for step in steps:
                start = time.perf_counter()
                step.run(sessions[name])
                found.append((time.perf_counter() - start) * 1e3)
            if turn >= warmup:
                times[name].append(found)
        if progress is not None and turn >= warmup:
            progress(1)
    return {name: np.array(values) for name, values in times.items()}


def time_sittings(
    models: Mapping[str, Callable[[], Session]],
    steps: Sequence[Step],
    *,
    repeats: int,
    sittings: int = SITTINGS,
    together: bool = True,
    progress: Callable[[int], None] | None = None,
    then: Callable[[Mapping[str, Session]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Time models as `interleave` does, with sessions that are made anew for each sitting.

    Where its memory lies makes the same model faster or slower. Models that do not fit into memory together take
    turns as a whole (`together` is False): then one session exists at a time. `then` gets the sessions of all models
    when all times are taken; the last ones, where they are together.

    Returns:
        Times in ms: per model an array (sittings, repeats, steps).
    """
    parts = []
    for turn in range(sittings):
        found = {}
        for group in [list(models)] if together else [[name] for name in models]:
            with ThreadPoolExecutor(available_cores()) as pool:  # loading a model keeps one core busy
                sessions = dict(zip(group, pool.map(lambda name: models[name](), group), strict=True))
            found.update(interleave(sessions, steps, repeats=repeats, progress=progress))
            if then is not None and together and turn == sittings - 1:
                then(sessions)
            for session in sessions.values():
                session.close()
        parts.append(found)
    if then is not None and not together:
        sessions = {name: open_() for name, open_ in models.items()}
        then(sessions)
        for session in sessions.values():
            session.close()
    return {name: np.stack([p[name] for p in parts]) for name in models}


def latency_of(times_ms: np.ndarray) -> Latency:
    """Sum times (sittings, rounds) up as their median and spread."""
    p10, median, p90 = (float(f"{p:.6g}") for p in np.percentile(times_ms, [10, 50, 90]))
    interval = None
    if len(times_ms) > 1:
        value, low, high = (float(f"{p:.6g}") for p in _over_sittings(np.log(times_ms)))
        interval = Estimate(value=value, low=low, high=high)
    return Latency(median_ms=median, p10_ms=p10, p90_ms=p90, count=times_ms.size, interval_ms=interval)


def paired_ratio(times_ms: np.ndarray, base_ms: np.ndarray) -> Estimate:
    """Estimate how long one model takes in units of another, from runs of the same rounds.

    What slows a round slows both models, so the ratio of one round is steadier than either time. Each sitting gives
    the median of its ratios; their geometric mean is the value, and Student's t over the sittings its 95 % interval,
    which therefore covers what new sessions and the hour change as well.

    Args:
        times_ms: (sittings, rounds), times of the model; at least two sittings.
        base_ms: (sittings, rounds), times of the other model in the same rounds.
    """
    value, low, high = (round(at, 4) for at in _over_sittings(np.log(times_ms / base_ms)))
    return Estimate(value=value, low=low, high=high)


def _over_sittings(logarithms: np.ndarray) -> tuple[float, float, float]:
    """Return the geometric mean of the medians of the sittings, with its interval, from (sittings, rounds)."""
    sittings = np.median(logarithms, axis=1)
    mean, count = float(sittings.mean()), len(sittings)
    half = float(stdtrit(count - 1, 0.975)) * float(sittings.std(ddof=1)) / count**0.5
    value, low, high = (float(np.exp(at)) for at in (mean, mean - half, mean + half))
    return value, low, high


def unsteadiness(latency: Latency) -> float:
    """Return how much longer the median run took than the fast ones; where it is large, no median is worth anything."""
    return latency.median_ms / latency.p10_ms if latency.p10_ms > 0 else 1.0


def disturbance(latency: LatencySpread) -> float | None:
    """Return the largest `unsteadiness` of the models, where other work on the machine decides it; else None."""
    worst = max(unsteadiness(one) for one in (latency.reference, latency.lowest, latency.mixed))
    return worst if worst >= UNSTEADY else None
