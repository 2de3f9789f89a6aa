"""Task metrics of the models, and the fastest plan of a front that keeps one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from bitalloy.errors import BudgetError, DataError
from bitalloy.heads import is_divergence
from bitalloy.outcome import Evaluation, MetricComparison
from bitalloy.pipeline.analyze import Analysis
from bitalloy.pipeline.programs import interface_of, runner
from bitalloy.pipeline.records import Metrics, Planned
from bitalloy.pipeline.work import Workspace
from bitalloy.plans import FIRST, Budget, ParetoPoint
from bitalloy.runtime import Artefact
from bitalloy.store import key_of
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import Task, TaskData, TaskMetric, TaskResult

MODELS = ("float", "int8", "mixed")
Placed = Callable[[Path], Mapping[str, Artefact]]
"""Models by name, what is large of them in files of a folder."""


def measure_metrics(
    analysis: Analysis,
    identity: Sequence[str],
    models: Placed,
    labels: Sequence[Path],
    limit: int | None,
    work: Workspace,
) -> Metrics:
    """Task metrics of float, all-INT8 and mixed model, on the same samples.

    Args:
        analysis: of the model.
        identity: what decides the mixed model beside the analysis.
        models: makes the three.
        labels: for the task.
        limit: evaluate at most so many samples.
        work: where to keep and show results.
    """
    found = [
        _metrics_of(result)
        for result in _results(analysis, MODELS, list(identity), models, labels, limit, work, stage="evaluate")
    ]
    return Metrics(
        metrics={name: value for part in found for name, value in part.metrics.items()},
        confidence_shift={name: value for part in found for name, value in part.confidence_shift.items()},
        notes=tuple(note for part in found for note in part.notes),
    )


def fastest_that_keeps(
    analysis: Analysis,
    planned: Planned,
    labels: Sequence[Path],
    limit: int | None,
    work: Workspace,
) -> tuple[ParetoPoint, tuple[Evaluation, ...]]:
    """The fastest plan of the front whose task metrics drop by no more than the budget allows.

    Damage falls along the front, so the place from which on the limits hold is found by halving: of 24 plans about 5
    are evaluated. Plans that miss another limit of the budget are not candidates, where any meets them. The last one,
    with the least damage, is taken unseen where none before it holds, and the result's own metrics tell.

    Args:
        analysis: of the model.
        planned: a plan with its front.
        labels: for the task.
        limit: evaluate at most so many samples.
        work: where to keep and show results.

    Returns:
        The plan, and all that were evaluated, in order.

    Raises:
        BudgetError: a metric that the task does not have, or no labels.
    """
    budget = planned.plan.budget
    if not labels:
        raise BudgetError(
            "A limit on the drop of a task metric needs labels. Give --eval (labels=...) with the task's."
        )
    candidates = _candidates(planned, budget)
    evaluations: list[Evaluation] = []

    def keeps(point: ParetoPoint) -> bool:
        lowered = point.lowered()

        def models(folder: Path) -> Mapping[str, Artefact]:
            return {
                "float": analysis.original(),
                "mixed": analysis.executable(analysis.artefact(lowered)).placed(folder / "mixed"),
            }

        results = _results(
            analysis, ("float", "mixed"), sorted(lowered), models, labels, limit, work, stage="candidate"
        )
        drops = _drops(budget, [m for result in results for m in result.metrics])
        kept = all(drop <= budget.max_drop[name] for name, drop in drops)
        evaluations.append(
            Evaluation(
                int8_units=len(point.int8_units),
                predicted_ratio=round(point.predicted_latency_us / planned.cost.all_float_us, 4),
                drops={name if name != FIRST else _first(results): round(drop, 6) for name, drop in drops},
                kept=kept,
            )
        )
        return kept

    low, high = 0, len(candidates) - 1  # the answer is the first that holds; the last is taken where none does
    while low < high:
        middle = (low + high) // 2
        if keeps(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    if not evaluations:
        keeps(candidates[low])
    return candidates[low], tuple(evaluations)


def missed_drops(budget: Budget, metrics: Mapping[str, MetricComparison]) -> dict[str, tuple[float, float]]:
    """Metric -> (drop of the mixed model, limit), where a limit is missed."""
    found = {}
    for name, most in budget.max_drop.items():
        key = next(iter(metrics), "") if name == FIRST else name
        drop = metrics[key].drop_mixed if key in metrics else None
        if drop is not None and drop.value > most:
            found[key] = (drop.value, most)
    return found


def _candidates(planned: Planned, budget: Budget) -> list[ParetoPoint]:
    """Plans of the front within the other limits, fastest first; all of them where none is."""
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


def _drops(budget: Budget, metrics: Sequence[TaskMetric]) -> list[tuple[str, float]]:
    """Drop of the mixed model by the names of the budget."""
    known = {m.name: m.drops["mixed"].value for m in metrics}
    found = []
    for name in budget.max_drop:
        if name != FIRST and name not in known:
            raise BudgetError(f"--max-drop limits '{name}', but the metrics of the task are: {', '.join(known)}.")
        found.append((name, next(iter(known.values())) if name == FIRST else known[name]))
    return found


def _first(results: Sequence[TaskResult]) -> str:
    return next(m.name for result in results for m in result.metrics)


def _results(
    analysis: Analysis,
    names: Sequence[str],
    identity: list[str],
    placed: Placed,
    labels: Sequence[Path],
    limit: int | None,
    work: Workspace,
    *,
    stage: str,
) -> list[TaskResult]:
    """What the task measures on each file of labels."""
    if not labels:
        return []
    graph = analysis.graph
    interface = interface_of(graph)
    task = find_task(interface)
    if task is None:
        raise DataError(
            f"No task metric fits this model with outputs {[list(o.shape) for o in graph.info.outputs]}. Box AP needs "
            f"a detector with output (1, 4 + classes, n); the tasks are {', '.join(t.name for t in TASKS)}. "
            "Leave out --eval."
        )
    chosen: Task[TaskData] = task
    found = []
    for data in [chosen.open(path, interface) for path in labels]:

        def make(data: TaskData = data) -> bytes:
            with work.scratch() as folder, work.stage(stage, None) as progress:
                artefacts = placed(folder)
                models = {name: runner(graph, artefacts[name].session()) for name in names}
                result = chosen.evaluate(
                    models, data, limit=limit, seed=analysis.settings.seed, progress=progress.advance
                )
            return msgspec.json.encode(result)

        key = key_of(
            analysis=analysis.key,
            mixed=identity,
            labels=data.fingerprint(),
            limit=limit,
            runtime=analysis.target.runtime.version(),
        )
        found.append(msgspec.json.decode(work.cached(stage, key, make), type=TaskResult))
    return found


def _metrics_of(result: TaskResult) -> Metrics:
    return Metrics(
        metrics={metric.name: _comparison(metric) for metric in result.metrics},
        confidence_shift=result.confidence_shift,
        notes=result.notes,
    )


def _comparison(metric: TaskMetric) -> MetricComparison:
    return MetricComparison(
        reference=metric.values["float"],
        int8=metric.values["int8"],
        mixed=metric.values["mixed"],
        drop_int8=metric.drops["int8"],
        drop_mixed=metric.drops["mixed"],
    )
