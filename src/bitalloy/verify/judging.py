"""Judgement of plans by the task: evaluated on as many images as it takes, with all plans before in mind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitalloy.core.errors import BudgetError, DataError, did_you_mean
from bitalloy.core.outcome import REFERENCE, DropEstimate, Evaluation
from bitalloy.core.plans import FIRST, Budget
from bitalloy.core.schemes import Plan
from bitalloy.core.status import confidence_of_each, metric_scale
from bitalloy.tasks.base import TaskMetric
from bitalloy.tasks.evaluate import Evaluator
from bitalloy.verify.estimate import CombinedDrops, MeasuredDrop, combined_drops

RESAMPLED = 400
"""Number of bootstrap resamples behind the error of a drop."""
EARLY = 0.1
"""Part of the doubt that a budget leaves at which a plan is decided before all images are evaluated."""
CANDIDATE = "candidate"


@dataclass(frozen=True)
class _Judged:
    """What was measured of one plan, on the images so far."""

    ratio: float
    """Predicted latency over float."""
    drops: Mapping[str, float]
    """Metric that is limited -> its drop as measured."""
    known: Mapping[str, MeasuredDrop]
    """The same with what is known of its error; a metric without values of single samples is missing."""
    images: int
    """Number of images that were evaluated."""
    agreements: Mapping[str, float]
    """Metric of agreement that tells about it -> its value."""
    scales: Mapping[str, float]
    shards: int
    """Number of shards of images so far."""


class DropJudge:
    """Estimates by how much plans drop on the task, each from all that was evaluated so far.

    Images come in batches, each three times as many as before; a plan that is decided needs no more of them.

    Args:
        evaluator: runs plans over the images.
        budget: limits on the task, and the confidence with which they must hold.
    """

    def __init__(self, evaluator: Evaluator, budget: Budget) -> None:
        self._evaluator, self._budget = evaluator, budget
        self._judged: dict[Plan, _Judged] = {}
        self._limits: dict[str, float] = {}
        self._combined: dict[str, CombinedDrops] = {}

    @property
    def limits(self) -> Mapping[str, float]:
        """Metric -> largest drop that the budget allows; known once a plan was judged."""
        return self._limits

    def keeps(self, plan: Plan, ratio: float) -> bool:
        """Evaluate a plan until it is decided, and tell whether it keeps the limits with the budget's confidence.

        Args:
            plan: the plan.
            ratio: its predicted latency over float.

        Raises:
            BudgetError: a limited metric is none of the task's.
        """
        for shards in self._evaluator.batches if plan not in self._judged else ():
            if not self._evaluate(plan, ratio, shards):
                continue
            probability, doubt = self.probability(plan), EARLY * (1 - self._confidence)
            if probability is not None and not doubt < probability < 1 - doubt:
                break
        return self.holds(plan)

    def complete(self, plan: Plan) -> bool:
        """Evaluate a judged plan on all images, and tell whether some were missing."""
        shards = self._evaluator.batches[-1]
        before = self._judged[plan]
        if before.shards == shards:
            return False
        self._evaluate(plan, before.ratio, shards)
        return True

    def judged(self, plan: Plan) -> bool:
        """Tell whether a plan was evaluated."""
        return plan in self._judged

    def holds(self, plan: Plan) -> bool:
        """Tell whether a judged plan keeps every limit with the budget's confidence.

        Where the error of a metric is unknown, its best estimate decides: no plan is ever sure of such a limit, so this
        is all that can tell plans apart. The status of the run is undecided then.
        """
        probability = self.probability(plan)
        if probability is None:
            return self.hopeful(plan)
        return probability >= self._confidence

    @property
    def _confidence(self) -> float:
        """How surely each limit must hold, so that all of them hold with the budget's confidence."""
        return confidence_of_each(self._budget.confidence, len(self._limits))

    def probability(self, plan: Plan) -> float | None:
        """Return the probability that a judged plan keeps every limit, as that of the one it keeps least surely.

        None where the error of a limited metric is unknown.
        """
        index, known = self._place(plan), self._judged[plan].known
        if known.keys() != self._limits.keys():
            return None
        return min((self._drops(name).probability(index, most) for name, most in self._limits.items()), default=1.0)

    def drops(self, plan: Plan) -> dict[str, float]:
        """Return the best estimate of the drop of every limited metric of a judged plan."""
        estimates, measured = self.estimates(plan), self._judged[plan].drops
        return {n: estimates[n].drop.value if n in estimates else measured[n] for n in self._limits}

    def estimates(self, plan: Plan) -> dict[str, DropEstimate]:
        """Return the estimated drop of every limited metric of a judged plan whose error is known."""
        index = self._place(plan)
        return {
            name: DropEstimate(
                drop=self._drops(name).estimate(index),
                limit=most,
                probability=round(self._drops(name).probability(index, most), 4),
                confidence=self._budget.confidence,
                plans=len(self._judged),
                images=self._judged[plan].images,
            )
            for name, most in self._limits.items()
            if name in self._judged[plan].known
        }

    def hopeful(self, plan: Plan) -> bool:
        """Tell whether the best estimate of a judged plan keeps every limit."""
        return all(drop <= self._limits[name] for name, drop in self.drops(plan).items())

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Return all judged plans in order, each by what is known at last."""
        return tuple(
            Evaluation(
                schemes=plan.counts(),
                predicted_ratio=round(one.ratio, 4),
                drops={name: round(one.drops[name], 6) for name in self._limits},
                kept=self.holds(plan),
                images=one.images,
                agreements={name: round(value, 6) for name, value in one.agreements.items()},
                estimates={name: found.drop for name, found in self.estimates(plan).items()},
                probability=None if (found := self.probability(plan)) is None else round(found, 4),
            )
            for plan, one in self._judged.items()
        )

    def _place(self, plan: Plan) -> int:
        return list(self._judged).index(plan)

    def _drops(self, name: str) -> CombinedDrops:
        if name not in self._combined:
            every = list(self._judged.values())
            self._combined[name] = combined_drops(
                [one.known[name] for one in every], scale=max(one.scales[name] for one in every)
            )
        return self._combined[name]

    def _evaluate(self, plan: Plan, ratio: float, shards: int) -> bool:
        """Evaluate a plan; False where a batch lacks labels, or what a limited metric needs, and there are more."""
        subjects = {REFERENCE: self._evaluator.reference, CANDIDATE: self._evaluator.subject(plan)}
        try:
            found = self._evaluator.results(subjects, CANDIDATE, resamples=RESAMPLED, shards=shards)
            metrics = {metric.name: metric for result in found for metric in result.metrics}
            self._limits = limits_of(self._budget, metrics)
        except (BudgetError, DataError):
            if shards < self._evaluator.batches[-1]:
                return False
            raise
        witnesses = {name: metrics.get(metrics[name].witness) for name in self._limits}
        self._judged[plan] = _Judged(
            ratio=ratio,
            drops={name: metrics[name].drop(CANDIDATE) for name in self._limits},
            known={
                name: _drop(metrics[name], witnesses[name]) for name in self._limits if CANDIDATE in metrics[name].drops
            },
            images=max((metrics[name].values[CANDIDATE].n for name in self._limits), default=0),
            agreements={w.name: w.values[CANDIDATE].value for w in witnesses.values() if w is not None},
            scales={name: _scale(metrics[name]) for name in self._limits},
            shards=shards,
        )
        self._combined.clear()
        return True


def limits_of(budget: Budget, metrics: Mapping[str, TaskMetric]) -> dict[str, float]:
    """Return the largest drop by metric; of two limits for the same metric the stricter holds.

    Raises:
        BudgetError: it limits a metric that the task does not have, or agreement where the task has none.
    """
    if FIRST in budget.max_drop and all(metric.against_float for metric in metrics.values()):
        raise BudgetError(
            "--max-drop limits a metric of the labels, and the images have none. Limit --min-agreement, such as 0.98, "
            "or give labels."
        )
    first = next(iter(metrics.values()), None)
    if FIRST in budget.max_drop and first is not None and metric_scale(*(v.value for v in first.values.values())) > 1:
        raise BudgetError(
            f"--max-drop without a metric is in points of the first one, and '{first.name}' is no part of 1. Name it "
            f"with its largest change, such as --max-drop '{first.name}=0.1'."
        )
    asked = [(next(iter(metrics)) if name == FIRST else name, most) for name, most in budget.max_drop.items()]
    if budget.min_agreement is not None:
        agreements = [metric.name for metric in metrics.values() if metric.agreement]
        if not agreements:
            raise BudgetError("--min-agreement limits the agreement with float, which this task does not measure.")
        asked += [(name, 1 - budget.min_agreement) for name in agreements]
    found: dict[str, float] = {}
    for name, most in asked:
        if name not in metrics:
            raise BudgetError(
                f"--max-drop limits '{name}', but the metrics of the task are: {', '.join(metrics)}."
                f"{did_you_mean(name, metrics)}"
            )
        found[name] = min(most, found.get(name, most))
    return found


def _drop(metric: TaskMetric, witness: TaskMetric | None) -> MeasuredDrop:
    return MeasuredDrop(
        drop=metric.drops[CANDIDATE].value,
        loss=None if witness is None else witness.drops[CANDIDATE].value,
        draws=metric.drop_draws(CANDIDATE),
        images=metric.values[CANDIDATE].n,
    )


def _scale(metric: TaskMetric) -> float:
    return metric_scale(metric.values[REFERENCE].value, metric.values[CANDIDATE].value)
