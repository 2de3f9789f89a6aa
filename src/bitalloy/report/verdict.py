"""The first screen of a report: whether to ship the model, why, what stays in float, and what to do next."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass

from bitalloy.core.outcome import Summary
from bitalloy.core.plans import CostTable, PlanReport
from bitalloy.core.schemes import BASELINE
from bitalloy.core.status import Verdict
from bitalloy.measure.bench import disturbance
from bitalloy.report.text import Speed, interval_words, limit_text, speed_of, usual_is_kept

SHIP, UNDECIDED, DO_NOT = "Ship it", "Undecided", "Do not ship it"
ON_ACCURACY = ("min_sqnr_db", "head_sqnr_db", "max_drop", "min_agreement")
"""Kinds of limits that say how much a model may lose."""
GATE = "makes this a gate for CI"
TONES = {SHIP: "good", UNDECIDED: "warn", DO_NOT: "bad"}


@dataclass(frozen=True)
class StayingUnits:
    """Units that stay in the baseline for one reason."""

    reason: str
    count: int
    share: float
    """Their part of the float model's time, by the cost table; 0..1."""


@dataclass(frozen=True)
class ShipVerdict:
    """What a run means for whoever wants to deploy its model."""

    answer: str
    """`SHIP`, `UNDECIDED` or `DO_NOT`."""
    why: str
    """The reason in one sentence."""
    command: str
    """What to try next, to be given in the run's folder."""
    purpose: str
    """What that tells."""
    staying: tuple[StayingUnits, ...]
    """What stays in float, the dearest reason first."""

    @property
    def tone(self) -> str:
        """Return the class of colours."""
        return TONES[self.answer]


def ship_verdict(summary: Summary, plan: PlanReport, cost: CostTable) -> ShipVerdict:
    """Answer whether the mixed model may be shipped.

    Case 1. It is not faster than float or than what people run on the target anyway, or a limit is missed: no.
    Case 2. Timing does not tell that it is faster, or other work on the machine decided the times; a limit is
            undecided, or a metric without a limit drops beyond its noise: undecided.
    Case 3. Nothing tells what the loss means (no limit on accuracy, and no metric of the task): undecided.
    Case 4. Otherwise: yes. Where no limits were set, what the search aimed at by itself decides nothing.

    Args:
        summary: result of the run.
        plan: the shipped plan.
        cost: prices of units.
    """
    answer, why, (command, purpose) = ship_answer(summary)
    return ShipVerdict(answer, why, command, purpose, _staying(plan, cost))


def ship_answer(summary: Summary) -> tuple[str, str, tuple[str, str]]:
    """Return the answer, the reason in one sentence, and a command with what it tells; see `ship_verdict`."""
    status, name = summary.status, f"{summary.model}.onnx"
    front = ("bitalloy plan . --front", "shows what is in reach")
    again = ("bitalloy run ... --out runs/again", "repeats the run on a quiet machine")
    by = {verdict: [limit for limit in status.limits if limit.verdict == verdict] for verdict in Verdict}
    speed, interval = speed_of(summary), summary.latency_ratio_interval
    if by[Verdict.MISSED]:
        return DO_NOT, f"A limit is missed: {limit_text(by[Verdict.MISSED][0])}.", front
    if speed is Speed.NOT_FASTER:
        return DO_NOT, "It is not faster than the float model, which can be deployed as it is.", front
    if usual_is_kept(summary):
        usual = summary.usual_scheme.upper()
        return DO_NOT, f"It is no win over {usual} as a whole, which takes a switch of the runtime.", front
    if by[Verdict.UNDECIDED]:
        limit = by[Verdict.UNDECIDED][0]
        asked = shlex.quote(f"{limit.metric}={limit.asked:g}")
        more = (
            f"bitalloy doctor {name} --eval LABELS --max-drop {asked}",
            "tells how many labelled images decide",
        )
        return UNDECIDED, f"A limit is undecided: {limit_text(limit)}.", more if limit.kind == "max_drop" else front
    if speed is Speed.UNKNOWN and interval is not None:
        ends = f"{interval.low:.2f}x to {interval.high:.2f}x"
        return UNDECIDED, f"Timing does not tell whether it is faster: {ends} of float's time.", again
    if disturbance(summary.latency_spread_ms) is not None:
        return (
            UNDECIDED,
            f"The machine was busy while it was measured, so times are worth little: {_gain(summary)}.",
            again,
        )
    if status.warnings:
        return UNDECIDED, status.warnings[0], (f"bitalloy run {name} --eval LABELS --max-drop 0.3", "limits that drop")
    if not summary.metrics and not any(limit.kind in ON_ACCURACY for limit in status.limits):
        labels = (
            f"bitalloy run {name} --data DATA --eval LABELS --max-drop 0.3",
            "finds the fastest that keeps a task",
        )
        told = "No task was measured and no limit set on accuracy, so nothing tells what the loss means."
        return UNDECIDED, told, labels
    if status.verdict == Verdict.NO_LIMITS:
        check = (f"bitalloy check . --max-latency {summary.latency_ratio:.2f}x --junit check.xml", GATE)
        return SHIP, f"It is faster, and no metric drops beyond its noise: {_gain(summary)}.", check
    check = ("bitalloy check . --junit check.xml", GATE)
    return SHIP, f"It keeps what was asked and is faster: {_gain(summary)}.", check


def _gain(summary: Summary) -> str:
    interval = summary.latency_ratio_interval
    known = "estimated, not measured" if summary.latency_estimated else ""
    if interval is not None and not summary.latency_estimated:
        known = interval_words(interval, 2)
    return f"{summary.latency_ratio:.2f}x of float's time" + (f" ({known})" if known else "")


def _staying(plan: PlanReport, cost: CostTable) -> tuple[StayingUnits, ...]:
    us = {unit.unit: unit.us.get(BASELINE, 0.0) for unit in cost.units}
    whole = sum(us.values())
    groups: dict[str, list[str]] = defaultdict(list)
    for choice in plan.choices:
        if choice.scheme == BASELINE:
            groups[choice.group or choice.reason].append(choice.unit)
    found = [
        StayingUnits(reason, len(units), sum(us.get(u, 0.0) for u in units) / whole if whole else 0.0)
        for reason, units in groups.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.share))
