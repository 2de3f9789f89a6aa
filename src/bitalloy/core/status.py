"""The status of a run: whether what was delivered keeps each limit that was asked for, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from bitalloy.core.records import Estimate, Record

NORMAL_95 = 1.959964
"""Half of a 95 % interval of a normal distribution, in standard errors."""
FEW_SAMPLES = 2.0
"""Standard deviation that a drop on n samples has at least, times n^2: resamples of a few samples know little of their
own error, and nothing where all of them agree. It is 0.02 on 10 samples, and 0.0002 on 100."""


class Verdict(StrEnum):
    """What is known about a limit, or about all limits together; the best comes first."""

    NO_LIMITS = "no limits"
    """Nothing was asked for. Of a limit: the search aimed at it by itself."""
    MET = "met"
    WITHIN = "met within tolerance"
    """What was measured is beyond the limit, but by no more than the tolerance that is stated."""
    UNDECIDED = "undecided"
    """The measurement does not tell, or there is none."""
    MISSED = "missed"


class LimitStatus(Record, frozen=True, kw_only=True):
    """One limit of a budget, and whether the delivered model keeps it."""

    name: str
    """What is limited, for readers: `latency over float`, `latency`, `size`, `SQNR of boxes`, `drop of AP50-95`."""
    kind: str
    """The field of `Budget` that has the limit: `latency_ratio`, `latency_ms`, `size_bytes`, `min_sqnr_db`,
    `head_sqnr_db`, `max_drop` or `min_agreement`, whose `asked` and `got` are what is lost of 1."""
    head: str = ""
    """The output head that is judged; of `min_sqnr_db` the worst. Empty for other kinds."""
    metric: str = ""
    """The task metric; empty for other kinds."""
    asked: float
    """The limit: the least value for an SQNR, otherwise the largest."""
    got: float | None
    """The value of the delivered model; None where there is none."""
    interval: Estimate | None = None
    """The same with its 95 % interval; None where it has none, as a size."""
    tolerance: float | None = None
    """Part of `asked` by which `got` may exceed it and still count as met; None where nothing is allowed."""
    verdict: Verdict
    reason: str = ""
    """Why nothing is decided; empty otherwise."""


class Status(Record, frozen=True, kw_only=True):
    """The status of a run, which the console, the report, `summary.json` and the exit code share."""

    verdict: Verdict
    """The worst of the limits: missed, undecided, met within tolerance, met; `no limits` without any that was set."""
    limits: tuple[LimitStatus, ...] = ()
    warnings: tuple[str, ...] = ()
    """Losses that no limit covers, in sentences."""

    @property
    def proven(self) -> bool:
        """Whether no limit is missed or undecided."""
        return self.verdict not in (Verdict.MISSED, Verdict.UNDECIDED)


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on several limits together.

    >>> str(worst_verdict([Verdict.MET, Verdict.UNDECIDED])), str(worst_verdict([]))
    ('undecided', 'no limits')
    """
    return max(verdicts, key=list(Verdict).index, default=Verdict.NO_LIMITS)


def ceiling_verdict(got: float, asked: float, *, tolerance: float = 0.0) -> Verdict:
    """Judge a value that may be at most `asked`, or beyond it by a part of it.

    >>> str(ceiling_verdict(0.72, 0.7, tolerance=0.05))
    'met within tolerance'
    """
    if got <= asked:
        return Verdict.MET
    return Verdict.WITHIN if got <= asked * (1 + tolerance) else Verdict.MISSED


def least_error(samples: int, *values: float) -> float:
    """Return the standard deviation that a difference of values of a metric on few samples has at least.

    Args:
        samples: number of samples.
        values: values of the metric; the scale is 1 for parts in 0..1, else the largest of them.

    >>> least_error(10, 0.2, 0.3), least_error(10, 20.0, 18.0)
    (0.02, 0.4)
    """
    return FEW_SAMPLES / max(samples, 1) ** 2 * metric_scale(*values)


def metric_scale(*values: float) -> float:
    """Return the scale of a metric of which some values are known: 1 for parts in 0..1, else the largest of them."""
    return max(1.0, *map(abs, values))


def confidence_of_each(confidence: float, limits: int) -> float:
    """Return how surely each of some limits must hold for all of them to hold with a confidence (Bonferroni).

    >>> round(confidence_of_each(0.8, 2), 6), confidence_of_each(0.8, 1)
    (0.9, 0.8)
    """
    return confidence if limits <= 1 else 1 - (1 - confidence) / limits


def of_few_samples(drop: Estimate, samples: int, *values: float) -> Estimate:
    """Widen the interval of a drop by what resamples of few samples do not know, see `least_error`.

    >>> of_few_samples(Estimate(value=0.02, low=0.02, high=0.02), 10, 0.9, 0.88).low < 0
    True
    """
    more = NORMAL_95 * least_error(samples, *values)
    below, above = (math.hypot(end - drop.value, more) for end in (drop.low, drop.high))
    return Estimate(value=drop.value, low=drop.value - below, high=drop.value + above)


def chance_within(drop: Estimate, asked: float) -> float:
    """Return the probability that the true drop of a metric is at most `asked`.

    The error of the estimate is taken as normal around its value, with the width of its interval; one without any
    width is taken as exact.
    """
    error = (drop.high - drop.low) / (2 * NORMAL_95)
    if error <= 0:
        return float(drop.value <= asked)
    return 0.5 * math.erfc((drop.value - asked) / (error * math.sqrt(2)))


def chance_verdict(chance: float, confidence: float) -> Verdict:
    """Judge a limit that holds with the probability `chance`.

    Case 1. It holds with at least the probability `confidence`: met.
    Case 2. It does not hold with at least that probability: missed.
    Case 3. Otherwise there are too few samples to tell: undecided.

    >>> [str(chance_verdict(chance, 0.8)) for chance in (0.9, 0.5, 0.1)]
    ['met', 'undecided', 'missed']
    """
    if chance >= confidence:
        return Verdict.MET
    return Verdict.MISSED if chance <= 1 - confidence else Verdict.UNDECIDED
