"""Decisions on made-up models whose true drops are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitalloy.core.errors import BudgetError, DataError
from bitalloy.core.plans import FIRST, Budget
from bitalloy.core.schemes import Plan
from bitalloy.core.status import LimitStatus, Verdict
from bitalloy.report.text import limit_text
from bitalloy.tasks.base import TaskMetric, TaskResult
from bitalloy.tasks.bootstrap import compare_models, ratio_of_sums, resampled_weights
from bitalloy.verify.judging import DropJudge, limits_of


class World:
    """An evaluator of models that are known by what they score, and agree, on each image.

    Args:
        drops: plan -> how much less it scores than float on each image, (n,).
        losses: plan -> agreement that it loses on each image, (n,).
    """

    reference = Plan()
    batches = (1, 3, 4)

    def __init__(self, drops: dict[Plan, np.ndarray], losses: dict[Plan, np.ndarray]) -> None:
        self.drops, self.losses, self.asked = drops, losses, list[tuple[Plan, int]]()

    def subject(self, plan: Plan) -> Plan:
        return plan

    def results(self, subjects: dict[str, Plan], stage: str, *, resamples: int, shards: int) -> list[TaskResult]:
        plan = subjects["candidate"]
        self.asked.append((plan, shards))
        n = len(self.drops[plan]) * shards // 4
        weights, ones = resampled_weights(n, resamples, 0), np.ones(n)
        score = {"float": 0.6 * ones, "candidate": 0.6 - self.drops[plan][:n]}
        same = {"float": ones, "candidate": 1 - self.losses[plan][:n]}
        metrics: tuple[TaskMetric, ...] = (
            compare_models("m", {k: ratio_of_sums(v, ones, weights) for k, v in score.items()}, n, witness="same"),
            compare_models("same", {k: ratio_of_sums(v, ones, weights) for k, v in same.items()}, n, agreement=True),
        )
        return [TaskResult(task="t", metrics=metrics)]


def world(seed: int, images: int = 120) -> tuple[World, dict[Plan, float]]:
    """Six models; returns their true drops too. The law behind them is not one of those that the estimate knows."""
    rng = np.random.default_rng(seed)
    losses = np.sort(rng.uniform(0.01, 0.25, 6))[::-1]
    truth = 0.02 * np.exp(rng.normal(0, 0.8)) * np.expm1(losses / 0.1) / np.expm1(1) * rng.lognormal(0, 0.4, 6)
    shared = 0.3 * rng.standard_t(4, images)
    plans = [Plan.of("int8", *map(str, range(6 - i))) for i in range(6)]
    drops, lost = {}, {}
    for plan, loss, drop in zip(plans, losses, truth, strict=True):
        drops[plan] = drop + 0.15 * np.sqrt(loss) * (shared + rng.standard_t(4, images))
        lost[plan] = np.clip(loss * rng.gamma(2, 0.5, images), 0, 1)
    return World(drops, lost), dict(zip(plans, truth.tolist(), strict=True))


def judged(seed: int, limit: float, confidence: float = 0.8) -> tuple[DropJudge, World, dict[Plan, float]]:
    evaluator, truth = world(seed)
    known: Any = evaluator
    judge = DropJudge(known, Budget(max_drop={FIRST: limit}, confidence=confidence))
    for plan in truth:
        judge.keeps(plan, 0.5)
    return judge, evaluator, truth


def test_false_acceptances_are_rarer_than_the_confidence_allows() -> None:
    accepted, false = 0, 0
    for seed in range(60):
        judge, _, truth = judged(seed, 0.01)
        kept = [plan for plan in truth if judge.holds(plan)]
        if kept:  # the fastest is the first
            accepted, false = accepted + 1, false + (truth[kept[0]] > 0.01)
    assert accepted >= 30 and false <= 0.2 * accepted


def test_a_plan_is_dropped_as_soon_as_it_is_decided() -> None:
    bad, good = Plan.of("int8", "a", "b"), Plan.of("int8", "a")
    rng = np.random.default_rng(0)
    evaluator: Any = World(
        {bad: 0.3 + 0.05 * rng.standard_normal(120), good: 0.04 * rng.standard_normal(120)},
        {bad: np.full(120, 0.5), good: np.full(120, 0.03)},
    )
    judge = DropJudge(evaluator, Budget(max_drop={"m": 0.004}))
    assert not judge.keeps(bad, 0.4)
    assert evaluator.asked == [(bad, 1)]
    judge.keeps(good, 0.6)
    assert evaluator.asked[1:] == [(good, 1), (good, 3), (good, 4)]
    first, second = judge.evaluations()
    assert (first.images, second.images) == (30, 120) and not first.kept
    assert second.agreements["same"] == pytest.approx(0.97) and judge.keeps(bad, 0.4) is False
    assert len(evaluator.asked) == 4
    assert judge.complete(bad) and evaluator.asked[4:] == [(bad, 4)] and judge.evaluations()[0].images == 120
    assert not judge.complete(bad) and not judge.complete(good)


def test_least_agreement_and_drops_hold_together_and_unknown_metrics_are_refused() -> None:
    plan = Plan.of("int8", "a")
    evaluator: Any = World({plan: np.zeros(120)}, {plan: np.full(120, 0.05)})
    for least, kept in ((0.94, True), (0.96, False)):
        judge = DropJudge(evaluator, Budget(max_drop={"m": 0.1}, min_agreement=least))
        assert judge.keeps(plan, 0.5) is kept
        assert judge.limits == {"m": 0.1, "same": pytest.approx(1 - least)}
    with pytest.raises(BudgetError, match=r"'AP'.*m, same"):
        DropJudge(evaluator, Budget(max_drop={"AP": 0.1})).keeps(plan, 0.5)


def test_a_batch_that_lacks_what_is_limited_is_passed_over() -> None:
    """The first 30 images have no labels, of 90 float shows nothing, and all together have both."""

    class Sparse(World):
        def results(self, subjects: dict[str, Plan], stage: str, *, resamples: int, shards: int) -> list[TaskResult]:
            found = super().results(subjects, stage, resamples=resamples, shards=shards)
            if shards == 1:
                raise DataError("The 30 evaluated images have no labels.")
            return [TaskResult(task="t", metrics=found[0].metrics[:1])] if shards == 3 else found

    plan = Plan.of("int8", "a")
    evaluator: Any = Sparse({plan: np.zeros(120)}, {plan: np.full(120, 0.01)})
    judge = DropJudge(evaluator, Budget(min_agreement=0.95))
    assert judge.keeps(plan, 0.5) and evaluator.asked == [(plan, 1), (plan, 3), (plan, 4)]
    assert judge.evaluations()[0].images == 120
    evaluator.batches = (1,)
    with pytest.raises(DataError, match="no labels"):
        DropJudge(evaluator, Budget(min_agreement=0.95)).keeps(plan, 0.5)


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_few_images_decide_nothing_of_an_error_rate_either(rate: float) -> None:
    class Errors(World):
        def results(self, subjects: dict[str, Plan], stage: str, *, resamples: int, shards: int) -> list[TaskResult]:
            n = len(self.drops[subjects["candidate"]]) * shards // 4
            weights, ones = resampled_weights(n, resamples, 0), np.ones(n)
            found = {name: ratio_of_sums(rate * ones, ones, weights) for name in ("float", "candidate")}
            return [TaskResult(task="t", metrics=(compare_models("errors", found, n, higher_is_better=False),))]

    plan = Plan.of("int8", "a")
    for images, kept in ((8, False), (400, True)):
        evaluator: Any = Errors({plan: np.zeros(images)}, {})
        assert DropJudge(evaluator, Budget(max_drop={"errors": 0.01})).keeps(plan, 0.5) is kept


def test_points_are_of_metrics_that_are_parts_of_one() -> None:
    weights, ones = resampled_weights(9, 10, 0), np.ones(9)
    found = {name: ratio_of_sums(21.0 * ones, ones, weights) for name in ("float", "candidate")}
    metric = compare_models("perplexity", found, 9, higher_is_better=False, witness="agreement")
    with pytest.raises(BudgetError, match=r"'perplexity' is no part of 1.*perplexity=0\.1"):
        limits_of(Budget(max_drop={FIRST: 0.003}), {"perplexity": metric})
    assert limits_of(Budget(max_drop={"perplexity": 0.1}), {"perplexity": metric}) == {"perplexity": 0.1}


def test_a_limit_on_agreement_is_told_as_a_part_of_one() -> None:
    lost = LimitStatus(
        name="drop of same", kind="min_agreement", metric="same", asked=0.03, got=0.01, verdict=Verdict.MET
    )
    assert limit_text(lost) == "drop of same 0.0100, asked at most 0.0300"
