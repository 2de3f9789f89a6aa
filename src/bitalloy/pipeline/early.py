"""What is refused before long work: budgets that the model, its labels or its heads cannot have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, BudgetError, DataError
from bitalloy.core.plans import Budget
from bitalloy.core.records import Settings
from bitalloy.core.schemes import BASELINE
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.units import UnitGraph
from bitalloy.model.heads import find_heads, is_divergence
from bitalloy.model.load import Graph
from bitalloy.pipeline.calibrate import units_of
from bitalloy.pipeline.evaluate import open_original, without_draws
from bitalloy.pipeline.prepare import Prepared
from bitalloy.search.choice import check_heads
from bitalloy.search.constraints import constrain
from bitalloy.search.planning import operators_of
from bitalloy.targets.base import UNASKED
from bitalloy.tasks.base import Task, TaskData, TaskMetric, image_hashes
from bitalloy.tasks.observing import open_labelled
from bitalloy.tasks.open import runner
from bitalloy.verify.judging import limits_of

MORE_SAMPLES = 32
"""Samples that are asked for their metrics where one has not all that are limited."""


class MetricNameInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides which metrics there are."""

    given: str
    """Identity of the float model."""
    labels: str
    """Key of the samples that are evaluated."""
    models: tuple[str, ...]
    """Names of the models that are compared."""


def evaluated_images(prepared: Prepared, limit: int | None, seed: int) -> frozenset[str]:
    """Open the labels, which refuses what is broken before long work, and hash the images that will be evaluated."""
    if not prepared.labels and prepared.own is None:
        return frozenset()
    _, opened = _opened(prepared)
    return frozenset(chain.from_iterable(image_hashes(data, data.choose(limit, seed)) for data in opened))


def check_budget(prepared: Prepared, budget: Budget, settings: Settings) -> None:
    """Refuse a budget that the model cannot meet by its nature, before hours of measurement.

    Raises:
        BitalloyError: a pattern matches nothing, a unit lacks its scheme, a task metric is limited without labels, or a
            head or metric is limited that there is not; or a metric of the user's own fails.
    """
    if budget.max_drop and not prepared.labels and prepared.own is None:
        raise BudgetError(
            "--max-drop limits the drop of a task metric, which needs labels. Add --eval with the labels of the task, "
            "or --metric (evaluate=) with a metric of your own; or limit --min-agreement, which takes images alone, or "
            "--max-drop-db, which takes any samples."
        )
    if budget.min_agreement is not None and not prepared.labels and not prepared.images:
        raise BudgetError(
            "--min-agreement limits the agreement with float on the task, and there is nothing to measure it on. Add "
            "--eval with labels or a folder of images for a model with a task, or limit --max-drop-db."
        )
    model = prepared.model
    if budget.head_sqnr_db:
        check_heads(budget, [head.name for head in find_heads(model) if not is_divergence(head.name)])
    if budget.on_task or prepared.own is not None:
        _check_metrics(prepared, budget, settings.seed)
    for units in units_of(model, settings) if budget.keep else ():
        unasked = {keep.scheme: "" for keep in budget.keep if units.lacks.get(keep.scheme) == UNASKED}
        if unasked:
            _name_schemes(model, units, budget, settings, list(unasked))
        constrain(units, budget.keep, operators_of(model))


def _name_schemes(model: Graph, units: UnitGraph, budget: Budget, settings: Settings, unasked: Sequence[str]) -> None:
    """Refuse patterns for schemes that plans do not use by themselves; what is never possible is said first."""
    offered = (*(scheme.name for scheme in units.schemes if scheme.name != BASELINE), *unasked)
    for known in units_of(model, msgspec.structs.replace(settings, schemes=offered)):
        if known.target == units.target:
            constrain(known, budget.keep, operators_of(model))
    raise BitalloyError(
        f"--keep asks for {' and '.join(name.upper() for name in unasked)}, which plans of {units.target} do not use "
        f"unless --schemes names it. Add --schemes {','.join(offered)}."
    )


def _check_metrics(prepared: Prepared, budget: Budget, seed: int) -> None:
    """Refuse limits on metrics that there are not, by what the float model gives on one sample.

    That sample may have no labels, show nothing, or ask no question of a kind: then more of them are asked.
    """
    try:
        limits_of(budget, {metric.name: metric for metric in _metrics(prepared, 1, seed)})
    except (BudgetError, DataError):
        limits_of(budget, {metric.name: metric for metric in _metrics(prepared, MORE_SAMPLES, seed)})


def _opened(prepared: Prepared) -> tuple[Task[Any], Sequence[TaskData]]:
    if prepared.own is not None:
        return prepared.own.task, [prepared.own]
    return open_labelled(prepared.model, prepared.labels or prepared.images, prepared.image)


def _metrics(prepared: Prepared, count: int, seed: int) -> list[TaskMetric]:
    """The metrics of the float model, and of its agreement with itself, on some samples: which metrics there are."""
    task, opened = _opened(prepared)
    names = ("float",) if prepared.own is not None else ("float", "same")
    found: list[TaskMetric] = []
    for data in opened:
        samples = data.choose(count, seed)
        key = key_of(data.inputs(samples, image_hashes(data, samples)))

        def make(data: TaskData = data) -> bytes:
            with open_original(prepared.model) as session:
                run = session.run if task.plain else runner(prepared.model, session)
                result = task.evaluate(dict.fromkeys(names, run), data, limit=count, seed=seed)
            return to_json([without_draws(metric) for metric in result.metrics])

        inputs = MetricNameInputs(given=prepared.model.identity, labels=key, models=names)
        found += msgspec.json.decode(prepared.work.cached("metrics", inputs, make), type=list[TaskMetric])
    return found
