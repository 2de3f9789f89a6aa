"""Decisions under a limit on a task metric, on made-up models whose true drops are known.

Six models per world score and agree with float by made-up laws, with errors that images share and heavy tails; the law
between agreement and drop is none of those that `bitalloy.verify.estimate` knows. The fastest model that the judge
accepts is compared with the truth. Beside it: the value of the drop alone, and the drop's own interval alone.

    python benchmarks/decisions.py --repeats 1000
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

from bitalloy.core.plans import Budget
from bitalloy.core.schemes import Plan
from bitalloy.tasks.base import TaskResult
from bitalloy.tasks.bootstrap import compare_models, ratio_of_sums, resampled_weights
from bitalloy.verify.estimate import MeasuredDrop, combined_drops
from bitalloy.verify.judging import DropJudge

MODELS, SHARD = 6, 32


class World:
    """Made-up models, which stand for an evaluator.

    Args:
        rng: generator of all that is made up.
        images: number of images.
        hardness: factor on the drop that the judge holds for the likeliest beforehand.
    """

    reference = Plan()

    def __init__(self, rng: np.random.Generator, images: int, hardness: float) -> None:
        losses = np.sort(rng.uniform(0.01, 0.25, MODELS))[::-1]
        law = np.expm1(losses / 0.1) / np.expm1(1)
        truth = 0.015 * hardness * np.exp(rng.normal(0, 1)) * law * rng.lognormal(0, 0.4, MODELS)
        shared = 0.3 * rng.standard_t(4, images)
        self.images, self.drops, self.losses = images, dict[Plan, np.ndarray](), dict[Plan, np.ndarray]()
        self.truth: dict[Plan, float] = {}
        shards = -(-images // SHARD)
        self.batches = (*(n for n in (3**i for i in range(9)) if n < shards), shards)
        self.evaluated = dict[Plan, int]()
        for i, (loss, drop) in enumerate(zip(losses, truth, strict=True)):
            plan = Plan.of("int8", *map(str, range(MODELS - i)))
            self.truth[plan] = float(drop)
            self.drops[plan] = drop + 0.15 * np.sqrt(loss) * (shared + rng.standard_t(4, images))
            self.losses[plan] = np.clip(loss * rng.gamma(2, 0.5, images), 0, 1)

    def subject(self, plan: Plan) -> Plan:
        """Return what stands for the model of a plan."""
        return plan

    def results(self, subjects: dict[str, Plan], stage: str, *, resamples: int, shards: int) -> list[TaskResult]:
        """Return the metric and the agreement of a model on the first shards of images."""
        plan, n = subjects["candidate"], min(SHARD * shards, self.images)
        self.evaluated[plan] = max(n, self.evaluated.get(plan, 0))
        weights, ones = resampled_weights(n, resamples, 0), np.ones(n)
        score = {"float": 0.6 * ones, "candidate": 0.6 - self.drops[plan][:n]}
        same = {"float": ones, "candidate": 1 - self.losses[plan][:n]}
        metric, witness = (
            {name: ratio_of_sums(values, ones, weights) for name, values in one.items()} for one in (score, same)
        )
        return [
            TaskResult(
                task="made up",
                metrics=(
                    compare_models("metric", metric, n, witness="agreement"),
                    compare_models("agreement", witness, n, agreement=True),
                ),
            )
        ]


def decide(world: World, limit: float, confidence: float) -> dict[str, Plan | None]:
    """Return the fastest model that each way of judging accepts."""
    known: Any = world
    judge = DropJudge(known, Budget(max_drop={"metric": limit}, confidence=confidence))
    for plan in world.truth:
        judge.keeps(plan, 1.0)
    alone = {}
    for plan in world.truth:
        drops = world.drops[plan]
        draws = resampled_weights(world.images, 400, 0) @ drops / world.images
        one = MeasuredDrop(drop=float(drops.mean()), loss=None, draws=draws, images=world.images)
        alone[plan] = combined_drops([one]).probability(0, limit)
    return {
        "labels and agreement": next((p for p in world.truth if judge.holds(p)), None),
        "interval of the labels": next((p for p, chance in alone.items() if chance >= confidence), None),
        "value of the labels": next((p for p in world.truth if world.drops[p].mean() <= limit), None),
    }


def main() -> None:
    """Print all settings as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--confidence", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows: dict[str, dict[str, object]] = {}
    for images, limit, hardness in ((94, 0.003, 1), (94, 0.01, 1), (94, 0.003, 3), (94, 0.003, 0.3), (500, 0.003, 1)):
        rng = np.random.default_rng(asked.seed)
        found: dict[str, list[tuple[bool, float]]] = {}
        evaluated = 0.0
        for _ in range(asked.repeats):
            world = World(rng, images, hardness)
            for way, plan in decide(world, limit, asked.confidence).items():
                if plan is not None:
                    place = list(world.truth).index(plan)
                    found.setdefault(way, []).append((world.truth[plan] > limit, place))
            evaluated += sum(world.evaluated.values()) / (MODELS * images * asked.repeats)
        rows[f"{images} images, limit {limit}, hardness {hardness}"] = row = {
            "images evaluated": round(evaluated, 3),
            **{
                way: {
                    "accepted": round(len(judged) / asked.repeats, 3),
                    "false of these": round(sum(false for false, _ in judged) / len(judged), 3),
                    "false of all": round(sum(false for false, _ in judged) / asked.repeats, 3),
                }
                for way, judged in found.items()
            },
        }
        print(row, file=sys.stderr, flush=True)
    facts = {"repeats": asked.repeats, "confidence": asked.confidence, "seed": asked.seed}
    print(json.dumps({"benchmark": "decisions", **facts, "worlds": rows}))


if __name__ == "__main__":
    main()
