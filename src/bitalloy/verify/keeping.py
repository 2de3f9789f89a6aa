"""The fastest plan that keeps the limits on the task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitalloy.core.errors import BudgetError
from bitalloy.core.outcome import LOWEST, MIXED, ONE_SCHEME, REFERENCE, MetricComparison
from bitalloy.core.planned import Metrics, Planned
from bitalloy.core.plans import Budget, ParetoPoint
from bitalloy.core.schemes import Plan
from bitalloy.model.heads import is_divergence
from bitalloy.search.single import SinglePlan
from bitalloy.tasks.base import TaskMetric, TaskResult
from bitalloy.tasks.evaluate import Evaluator
from bitalloy.verify.judging import DropJudge

CLOSE, RIVALS = 1.1, 4
"""Predicted latency over that of the fastest plan up to which a plan may be as fast, and the largest number of plans
that are measured to tell."""


def measure_metrics(evaluator: Evaluator | None, lowest: Plan, mixed: Plan, single: Plan | None = None) -> Metrics:
    """Measure the task metrics of the float, the lowest and the mixed model on the same samples; none without labels.

    Args:
        evaluator: measures the task metrics of the model.
        lowest: the plan with all that it can in its lowest scheme.
        mixed: the plan.
        single: a plan of one scheme to be measured beside it.
    """
    if evaluator is None:
        return Metrics(metrics={}, confidence_shift={})
    subjects = {REFERENCE: evaluator.reference, LOWEST: evaluator.subject(lowest), MIXED: evaluator.subject(mixed)}
    if single is not None:
        subjects[ONE_SCHEME] = evaluator.subject(single)
    found = [_metrics_of(result) for result in evaluator.results(subjects, "evaluate")]
    return Metrics(
        metrics={name: value for part in found for name, value in part.metrics.items()},
        confidence_shift={name: value for part in found for name, value in part.confidence_shift.items()},
        box_overlap={name: value for part in found for name, value in part.box_overlap.items()},
        notes=(*(note for part in found for note in part.notes), *evaluator.notes),
    )


@dataclass(frozen=True)
class Kept:
    """The outcome of the search for the fastest plan that keeps the limits on the task."""

    point: ParetoPoint
    """The plan: the fastest by prediction of those that keep the limits."""
    rivals: tuple[ParetoPoint, ...]
    """Further plans that keep them and may be as fast, by prediction at most `CLOSE` times slower, fastest first."""
    judge: DropJudge


def fastest_that_keeps(
    evaluator: Evaluator | None,
    planned: Planned,
    peers: Sequence[ParetoPoint],
    singles: Sequence[SinglePlan] = (),
) -> Kept:
    """Find the fastest plan that keeps the budget's limits on the task with the confidence asked for.

    Plans are judged by `DropJudge`: by their own drop, by their agreement with float, and by all plans before them.
    The peers come first, because they are what other tools ship: none of them may be faster and left out. Damage falls
    along the front, so there is a place on it from which on the limits hold. The search for it starts where they would
    be reached if drops were proportional to damage, as the peers show; it goes away from there in steps that double,
    and halves what is left. Plans that miss another limit of the budget are not candidates, where any meets them.

    What is taken was evaluated on all images, also where fewer had decided.

    Where no plan but float keeps the limits surely enough, the fastest whose best estimate keeps them is taken; where
    there is none of these either, the one with the least damage. `DropEstimate` tells how sure that is.

    Args:
        evaluator: with labels for the task, or images.
        planned: a plan with its front.
        peers: plans with all that they can in their lowest scheme.
        singles: plans of one scheme.

    Raises:
        BudgetError: a metric that the task does not have, or nothing to evaluate.
    """
    budget = planned.plan.budget
    if evaluator is None:
        raise BudgetError(
            "A limit on the drop of a task metric needs labels. Give --eval (evaluate=...) with the task's."
        )
    whole, judge = planned.cost.float_us, DropJudge(evaluator, budget)
    within = _other_limits(planned, budget)
    front = sorted(planned.plan.pareto, key=lambda p: p.predicted_latency_us)
    front = [p for p in front if within(p)] or front
    beside = [*peers, *(_as_point(single, whole) for single in singles if single.format.within)]
    candidates = {point.chosen: point for point in (*beside, *front) if point in front or within(point)}

    def keeps(point: ParetoPoint) -> bool:
        return judge.keeps(point.chosen, point.predicted_latency_us / whole)

    for point in beside:
        if point.chosen in candidates:
            keeps(point)
    allowed = min((_allowed_damage(judge, p) for p in peers if judge.judged(p.chosen)), default=math.inf)
    guess = next((i for i, point in enumerate(front) if point.damage <= allowed), len(front) - 1)
    last = front[_first_that_holds(len(front), guess, lambda index: keeps(front[index]))]
    if last.chosen:
        keeps(last)
    judged = sorted(
        (p for p in candidates.values() if p.chosen and judge.judged(p.chosen)), key=lambda p: p.predicted_latency_us
    )
    while True:
        sure = [p for p in judged if judge.holds(p.chosen)]
        found = sure or [p for p in judged if judge.hopeful(p.chosen)][:1] or [last]
        close = [p for p in found[1:] if p.predicted_latency_us <= CLOSE * found[0].predicted_latency_us]
        taken = (found[0], *close[: RIVALS - 1])
        if not any([judge.complete(p.chosen) for p in taken if judge.judged(p.chosen)]):
            return Kept(taken[0], taken[1:], judge)


def _first_that_holds(count: int, guess: int, holds: Callable[[int], bool]) -> int:
    """Find the least of `count` indices from which on something holds; the last one is taken without a look.

    >>> _first_that_holds(9, 4, lambda i: i >= 5)
    5
    """
    low, high, at, step = 0, count - 1, guess, 1
    below = above = False
    while low < high:
        at = min(max(at, low), high - 1)
        if holds(at):
            high, above = at, True
            at = high - step
        else:
            low, below = at + 1, True
            at = low + step - 1
        step *= 2
        if below and above:
            at = (low + high) // 2
    return low


def _allowed_damage(judge: DropJudge, point: ParetoPoint) -> float:
    """Estimate the damage that reaches the limits from the drops of a judged plan; infinite where they hold there."""
    over = [(drop, judge.limits[n]) for n, drop in judge.drops(point.chosen).items() if drop > judge.limits[n]]
    parts = (max(most, 0.0) / drop if drop > 0 else 0.0 for drop, most in over)
    return min((point.damage * part for part in parts), default=math.inf)


def _as_point(single: SinglePlan, whole: float) -> ParetoPoint:
    told = single.format
    return ParetoPoint(
        schemes=dict(single.plan.listed),
        predicted_latency_us=told.predicted_ratio * whole,
        size_bytes=told.predicted_size_bytes,
        damage=math.nan,
        sqnr_db=tuple(told.predicted_db.values()),
    )


def _other_limits(planned: Planned, budget: Budget) -> Callable[[ParetoPoint], bool]:
    """Return a function that tells whether a plan keeps the limits that are not on the task, by prediction."""
    whole, heads = planned.cost.float_us, [h.head for h in planned.plan.heads]
    latency = [budget.latency_ratio * whole] if budget.latency_ratio is not None else []
    latency += [budget.latency_ms * 1e3] if budget.latency_ms is not None else []
    floors = {i: f for i, head in enumerate(heads) if (f := budget.floor_db(head)) is not None}

    def within(point: ParetoPoint) -> bool:
        return (
            all(point.predicted_latency_us <= most * (1 + 1e-9) for most in latency)
            and (budget.size_bytes is None or point.size_bytes <= budget.size_bytes)
            and all(point.sqnr_db[i] >= floor for i, floor in floors.items() if not is_divergence(heads[i]))
        )

    return within


def _metrics_of(result: TaskResult) -> Metrics:
    return Metrics(
        metrics={metric.name: _comparison(metric) for metric in result.metrics},
        confidence_shift=result.confidence_shift,
        box_overlap=result.box_overlap,
        notes=result.notes,
    )


def _comparison(metric: TaskMetric) -> MetricComparison:
    return MetricComparison(
        reference=metric.values[REFERENCE],
        lowest=metric.values[LOWEST],
        mixed=metric.values[MIXED],
        drop_lowest=metric.drops.get(LOWEST),
        drop_mixed=metric.drops.get(MIXED),
        single=metric.values.get(ONE_SCHEME),
        drop_single=metric.drops.get(ONE_SCHEME),
        against_float=metric.against_float,
        agreement=metric.agreement,
        higher_is_better=metric.higher_is_better,
    )
