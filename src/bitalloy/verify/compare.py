"""What two finished runs say about each other: which numbers differ by more than their noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bitalloy.core.checked import Change, Difference, MovedUnit
from bitalloy.core.outcome import Summary
from bitalloy.core.plans import PlanReport
from bitalloy.core.records import Estimate
from bitalloy.core.status import of_few_samples

SIZE_NOISE = 0.01
"""Part of a file's size that does not count as a difference."""


def compare_numbers(first: Summary, second: Summary) -> tuple[Difference, ...]:
    """Put the numbers of two mixed models beside each other.

    A difference is beyond noise if its interval, sqrt(a^2 + b^2) wide where those of both are a and b, does not hold 0.
    Of a metric the drops from float are compared where both have one, because they are paired. Latencies of other
    devices or numbers of threads, and estimated ones, are not compared.
    """
    return (*_latencies(first, second), _size(first, second), *_outputs(first, second), *_metrics(first, second))


def counting(numbers: tuple[Difference, ...], first: Summary, second: Summary) -> tuple[Difference, ...]:
    """Return the numbers by which a run may be worse than its baseline: latency over float, size, and the metrics.

    Where they have no metric in common, the SQNR of the outputs stands for it.
    """
    names = {"latency over float", "size"}
    shared = [name for name in first.metrics if name in second.metrics]
    names |= {f"drop of {name}" for name in shared} | set(shared)
    return tuple(n for n in numbers if n.name in names or (not shared and n.name.startswith("SQNR of ")))


def moved_units(first: PlanReport, second: PlanReport) -> tuple[MovedUnit, ...]:
    """List the units that two plans put into different schemes."""
    before, after = ({choice.unit: choice.scheme for choice in plan.choices} for plan in (first, second))
    return tuple(
        MovedUnit(unit=unit, first=before.get(unit, ""), second=after.get(unit, ""))
        for unit in sorted(before.keys() | after.keys())
        if before.get(unit) != after.get(unit)
    )


def _latencies(first: Summary, second: Summary) -> Iterator[Difference]:
    reason = ""
    if first.latency_estimated or second.latency_estimated:
        reason = "a latency is estimated, not measured"
    elif (first.device, first.threads) != (second.device, second.threads):
        reason = "measured on other processors or with other numbers of threads"
    elif first.workload != second.workload:
        reason = "the latencies pay for different work"
    pairs = [(one.latency_ratio_interval, one.latency_spread_ms.mixed.interval_ms) for one in (first, second)]
    values = [(one.latency_ratio, one.latency_ms.mixed) for one in (first, second)]
    for i, name in enumerate(("latency over float", "latency in ms")):
        ends = (None, None) if reason else (pairs[0][i], pairs[1][i])
        yield _difference(name, (values[0][i], values[1][i]), ends, higher_is_better=False, reason=reason)


def _size(first: Summary, second: Summary) -> Difference:
    before, after = first.size_bytes.mixed, second.size_bytes.mixed
    change = Change.SAME
    if before != after:
        change = Change.WORSE if after > before else Change.BETTER
        change = Change.WITHIN if abs(after - before) <= SIZE_NOISE * before else change
    exact = Estimate(value=after - before, low=after - before, high=after - before)
    return Difference(name="size", first=before, second=after, difference=exact, change=change)


def _outputs(first: Summary, second: Summary) -> Iterator[Difference]:
    for head, pair in first.sqnr_db.items():
        if head in second.sqnr_db:
            values = pair.mixed.measured, second.sqnr_db[head].mixed.measured
            ends = first.sqnr_interval_db.get(head), second.sqnr_interval_db.get(head)
            yield _difference(f"SQNR of {head}", values, ends, higher_is_better=True)


def _metrics(first: Summary, second: Summary) -> Iterator[Difference]:
    for name, before in first.metrics.items():
        after = second.metrics.get(name)
        if after is None:
            continue
        if before.drop_mixed is not None and after.drop_mixed is not None:
            pairs = (before, before.drop_mixed), (after, after.drop_mixed)
            drops = [of_few_samples(d, m.mixed.n, m.reference.value, m.mixed.value) for m, d in pairs]
            yield _difference(
                f"drop of {name}", (drops[0].value, drops[1].value), (drops[0], drops[1]), higher_is_better=False
            )
        else:
            values = before.mixed.value, after.mixed.value
            yield _difference(name, values, (None, None), higher_is_better=after.higher_is_better)


def _difference(
    name: str,
    values: tuple[float, float],
    ends: tuple[Estimate | None, Estimate | None],
    *,
    higher_is_better: bool,
    reason: str = "",
) -> Difference:
    """Compare two numbers by their intervals; without one the noise is unknown unless the numbers are equal."""
    gap = values[1] - values[0]
    if ends[0] is None or ends[1] is None:
        change = Change.SAME if gap == 0 and not reason else Change.UNKNOWN
        reason = "" if change == Change.SAME else reason or "the noise of its values is not known"
        return Difference(name=name, first=values[0], second=values[1], change=change, reason=reason)
    half = math.hypot(*((one.high - one.low) / 2 for one in ends if one is not None))
    if gap == 0:
        change = Change.SAME
    elif abs(gap) <= half:
        change = Change.WITHIN
    else:
        change = Change.BETTER if (gap > 0) == higher_is_better else Change.WORSE
    interval = Estimate(value=gap, low=gap - half, high=gap + half)
    return Difference(name=name, first=values[0], second=values[1], difference=interval, change=change)
