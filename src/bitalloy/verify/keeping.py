"""The fastest plan of a front that keeps the task metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from bitalloy.core.errors import BudgetError
from bitalloy.core.outcome import LOWEST, MIXED, ONE_SCHEME, REFERENCE, Evaluation, MetricComparison
from bitalloy.core.planned import Metrics, Planned
from bitalloy.core.plans import FIRST, Budget, ParetoPoint
from bitalloy.core.schemes import Plan
from bitalloy.model.heads import is_divergence
from bitalloy.search.single import SinglePlan
from bitalloy.tasks.base import TaskMetric, TaskResult
from bitalloy.tasks.evaluate import Evaluator


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
        notes=(*(note for part in found for note in part.notes), *evaluator.notes),
    )


def fastest_that_keeps(
    evaluator: Evaluator | None, planned: Planned, lowest: tuple[Plan, float]
) -> tuple[ParetoPoint, tuple[Evaluation, ...]]:
    """Find the fastest plan of the front whose task metrics drop by no more than the budget allows.

    Damage falls along the front, so there is a place from which on the limits hold. The search for it starts where the
    limits would be reached if drops were proportional to damage, as the lowest plan shows; it goes away from there in
    steps that double, and halves what is left. Plans that miss another limit of the budget are not candidates, where
    any meets them. The last one, with the least damage, is taken unseen where none before it holds, and the result's
    own metrics tell. Only values of the metrics count, not their intervals.

    Args:
        evaluator: with labels for the task.
        planned: a plan with its front.
        lowest: the plan with all that it can in its lowest scheme, and its predicted damage.

    Returns:
        The plan, and all that were evaluated, in order.

    Raises:
        BudgetError: a metric that the task does not have, or no labels.
    """
    budget = planned.plan.budget
    if evaluator is None:
        raise BudgetError(
            "A limit on the drop of a task metric needs labels. Give --eval (labels=...) with the task's."
        )
    candidates = _candidates(planned, budget)
    evaluations: list[Evaluation] = []

    def keeps(index: int) -> bool:
        point = candidates[index]
        ratio = point.predicted_latency_us / planned.cost.all_float_us
        evaluations.append(_evaluation(point.chosen, ratio, _drops(evaluator, point.chosen), limits))
        return evaluations[-1].kept

    plan, damage = lowest
    found = _drops(evaluator, plan)
    limits = _limits(budget, list(found))
    allowed = _allowed_damage(limits, found, damage)
    guess = next((i for i, point in enumerate(candidates) if point.damage <= allowed), len(candidates) - 1)
    chosen = _first_that_holds(len(candidates), guess, keeps)
    if not evaluations:
        keeps(chosen)
    return candidates[chosen], tuple(evaluations)


def single_that_keeps(
    evaluator: Evaluator, budget: Budget, singles: Sequence[SinglePlan]
) -> tuple[SinglePlan | None, tuple[Evaluation, ...]]:
    """Find the fastest plan of one scheme whose task metrics drop by no more than the budget allows.

    Args:
        evaluator: with labels for the task.
        budget: the budget.
        singles: plans of one scheme, fastest first; those that miss its other limits by prediction are left out.

    Returns:
        The plan, None where none keeps the limits, and all that were evaluated, in order.
    """
    evaluations: list[Evaluation] = []
    for single in singles:
        if single.format.within:
            found = _drops(evaluator, single.plan)
            limits = _limits(budget, list(found))
            evaluations.append(_evaluation(single.plan, single.format.predicted_ratio, found, limits))
            if evaluations[-1].kept:
                return single, tuple(evaluations)
    return None, tuple(evaluations)


def _drops(evaluator: Evaluator, plan: Plan) -> dict[str, float]:
    """Measure how much worse a plan is than float, by task metric."""
    subjects = {"float": evaluator.reference, "candidate": evaluator.subject(plan)}
    found = evaluator.results(subjects, "candidate", resamples=0)
    return {metric.name: metric.drops["candidate"].value for result in found for metric in result.metrics}


def _evaluation(plan: Plan, ratio: float, drops: Mapping[str, float], limits: Mapping[str, float]) -> Evaluation:
    return Evaluation(
        schemes=plan.counts(),
        predicted_ratio=round(ratio, 4),
        drops={name: round(drops[name], 6) for name in limits},
        kept=all(drops[name] <= most for name, most in limits.items()),
    )


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


def _allowed_damage(limits: Mapping[str, float], drops: Mapping[str, float], damage: float) -> float:
    """Estimate the damage that reaches the limits from the drops at a known damage; infinite where they hold there."""
    found = [math.inf]
    for name, most in limits.items():
        if drops[name] > most:
            found.append(damage * max(most, 0.0) / drops[name] if drops[name] > 0 else 0.0)
    return min(found)


def _limits(budget: Budget, metrics: Sequence[str]) -> dict[str, float]:
    """Return the limits of a budget by the names of the metrics; of two for the same metric the stricter holds.

    Raises:
        BudgetError: it limits a metric that the task does not have.
    """
    found: dict[str, float] = {}
    for asked, most in budget.max_drop.items():
        name = metrics[0] if asked == FIRST else asked
        if name not in metrics:
            raise BudgetError(f"--max-drop limits '{name}', but the metrics of the task are: {', '.join(metrics)}.")
        found[name] = min(most, found.get(name, most))
    return found


def _candidates(planned: Planned, budget: Budget) -> list[ParetoPoint]:
    """List the plans of the front within the other limits, fastest first; all of them where none is."""
    whole, heads = planned.cost.all_float_us, [h.head for h in planned.plan.heads]
    latency = [budget.latency_ratio * whole] if budget.latency_ratio is not None else []
    latency += [budget.latency_ms * 1e3] if budget.latency_ms is not None else []
    floors = {i: f for i, head in enumerate(heads) if (f := budget.floor_db(head)) is not None}

    def within(point: ParetoPoint) -> bool:
        return (
            all(point.predicted_latency_us <= most * (1 + 1e-9) for most in latency)
            and (budget.size_bytes is None or point.size_bytes <= budget.size_bytes)
            and all(point.sqnr_db[i] >= floor for i, floor in floors.items() if not is_divergence(heads[i]))
        )

    points = sorted(planned.plan.pareto, key=lambda p: p.predicted_latency_us)
    return [p for p in points if within(p)] or points


def _metrics_of(result: TaskResult) -> Metrics:
    return Metrics(
        metrics={metric.name: _comparison(metric) for metric in result.metrics},
        confidence_shift=result.confidence_shift,
        notes=result.notes,
    )


def _comparison(metric: TaskMetric) -> MetricComparison:
    return MetricComparison(
        reference=metric.values[REFERENCE],
        lowest=metric.values[LOWEST],
        mixed=metric.values[MIXED],
        drop_lowest=metric.drops[LOWEST],
        drop_mixed=metric.drops[MIXED],
        single=metric.values.get(ONE_SCHEME),
        drop_single=metric.drops.get(ONE_SCHEME),
    )
