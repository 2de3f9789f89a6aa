"""Task metrics of the models, and the fastest plan of a front that keeps one.

What a task observes of a model on the labelled samples is stored, and metrics are computed from it: over a whole run,
no model is executed on a sample twice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bitalloy.errors import BudgetError, DataError
from bitalloy.graph import Graph
from bitalloy.heads import is_divergence
from bitalloy.outcome import Evaluation, MetricComparison
from bitalloy.pipeline.analyze import Analysis
from bitalloy.pipeline.programs import interface_of, runner
from bitalloy.pipeline.records import Metrics, Planned
from bitalloy.pipeline.work import Workspace
from bitalloy.plans import FIRST, Budget, ParetoPoint
from bitalloy.runtime import Artefact, Session, available_cores
from bitalloy.store import key_of
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import Run, Seen, Task, TaskData, TaskMetric, TaskResult, pack, unpack
from bitalloy.tasks.bootstrap import RESAMPLES

SHARD = 32
"""Samples that are stored together."""
STREAMS = 4
"""Samples that are in memory at the same time, at most."""
JUDGED = 4
"""Models of which what is known stays in memory."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    identity: tuple[str, ...]
    """What decides it beside the target: equal for models that do the same."""
    make: Callable[[], Artefact]


class Evaluator:
    """Runs models over labelled samples, each at most once, and compares them.

    Args:
        analysis: of the model.
        labels: for the model's task.
        limit: evaluate at most so many samples.
        work: where to keep and show results.

    Raises:
        DataError: labels are broken, or no task fits the model.
    """

    def __init__(self, analysis: Analysis, labels: Sequence[Path], limit: int | None, work: Workspace) -> None:
        self._analysis, self._limit, self._work = analysis, limit, work
        interface = interface_of(analysis.graph)
        task = find_task(interface)
        if task is None:
            outputs = [list(o.shape) for o in analysis.graph.info.outputs]
            raise DataError(
                f"No task metric fits this model with outputs {outputs}. Box AP needs a detector with output (1, 4 + "
                f"classes, n); the tasks are {', '.join(t.name for t in TASKS)}. Leave out --eval."
            )
        self._task: Task[TaskData] = task
        self._data: list[TaskData] = [task.open(path, interface) for path in labels]
        self._kept: dict[tuple[str, str], bytes] = {}
        self._judged: dict[str, Any] = {}

    @property
    def reference(self) -> Subject:
        """The float model."""
        return Subject(("float",), self._analysis.original)

    def subject(self, lowered: frozenset[str]) -> Subject:
        """The model of a plan, made when it is needed."""

        def make() -> Artefact:
            return self._analysis.executable(self._analysis.artefact(lowered))

        return Subject((self._analysis.key, *sorted(lowered)), make)

    def results(self, subjects: Mapping[str, Subject], stage: str, *, resamples: int = RESAMPLES) -> list[TaskResult]:
        """What the task measures on each file of labels; the first model is the reference, and it is the float model.

        Args:
            subjects: by name.
            stage: under whose name results are kept and shown.
            resamples: draws of the bootstrap; 0 where only the values count.
        """
        return [self._result(data, subjects, stage, resamples) for data in self._data]

    def _result(self, data: TaskData, subjects: Mapping[str, Subject], stage: str, resamples: int) -> TaskResult:
        seed = self._analysis.settings.seed
        samples = data.choose(self._limit, seed)
        keys = {name: self._key(data, subject) for name, subject in subjects.items()}

        def make() -> bytes:
            judged = {n: self._judged_of(data, samples, keys[n], subject, stage) for n, subject in subjects.items()}
            return msgspec.json.encode(self._task.measure(judged, data, samples, seed=seed, resamples=resamples))

        key = key_of(seen=keys, resamples=resamples)
        return msgspec.json.decode(self._work.cached(stage, key, make), type=TaskResult)

    def _key(self, data: TaskData, subject: Subject) -> str:
        """Of what is observed of a model."""
        analysis = self._analysis
        return key_of(
            model=analysis.graph.info.sha256,
            shapes=analysis.graph.info.inputs,
            subject=subject.identity,
            target=None if subject.identity == self.reference.identity else analysis.target.name,
            labels=data.fingerprint(),
            limit=self._limit,
            seed=analysis.settings.seed,
            runner=analysis.target.runtime.name,
            **analysis.execution,
        )

    def _judged_of(self, data: TaskData, samples: Sequence[int], key: str, subject: Subject, stage: str) -> Any:
        """What is known of one model; the last few are kept, and the reference, which is always among them."""
        if key not in self._judged:
            self._judged[key] = self._task.judge(self._seen(data, samples, key, subject, stage), data, samples)
        self._judged[key] = self._judged.pop(key)
        for old in list(self._judged)[:-JUDGED]:
            del self._judged[old]
        return self._judged[key]

    def _seen(self, data: TaskData, samples: Sequence[int], key: str, subject: Subject, stage: str) -> list[Seen]:
        """Of one model on all samples, from shards where they exist; the model is made where one is missing."""
        found: list[Seen] = []
        with self._opened(data, subject) as run, self._work.stage(stage, len(samples)) as progress:
            for start in range(0, len(samples), SHARD):
                part = samples[start : start + SHARD]
                raw = self._shard(key, f"{start:06d}", partial(run, part))
                found += unpack(raw)
                progress.advance(len(part))
        return found

    def _shard(self, key: str, name: str, make: Callable[[], bytes]) -> bytes:
        """Of a run without a directory, in memory."""
        if self._work.store is not None:
            return self._work.shard("observed", key, name, make)
        if (key, name) not in self._kept:
            self._kept[key, name] = make()
        return self._kept[key, name]

    @contextmanager
    def _opened(self, data: TaskData, subject: Subject) -> Iterator[Callable[[Sequence[int]], bytes]]:
        """A function that observes a model on some samples; sessions are opened on its first call.

        Samples run side by side, each on its part of the cores, where models are small: that gives the same results
        in less time.
        """
        graph = self._analysis.graph
        streams = 1 if graph.large else min(available_cores(), STREAMS)
        sessions: dict[str, Session] = {}
        with self._work.scratch() as folder, ThreadPoolExecutor(streams) as pool:

            def observe(samples: Sequence[int]) -> bytes:
                if not sessions:
                    parts = {"model": subject}
                    if data.paired and subject.identity != self.reference.identity:
                        parts = {"reference": self.reference, **parts}
                    for name, one in parts.items():
                        sessions[name] = one.make().placed(folder / name).session(streams=streams)
                models = {name: _for_each_thread(graph, session) for name, session in sessions.items()}
                found = pool.map(lambda i: self._task.observe(models, data, i)["model"], samples)
                return pack(list(found))

            try:
                yield observe
            finally:
                for session in sessions.values():
                    session.close()


def _for_each_thread(graph: Graph, session: Session) -> Run:
    """A `runner` of its own in every thread: it keeps what belongs to the sample at hand."""
    own = threading.local()

    def run(feeds: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not hasattr(own, "run"):
            own.run = runner(graph, session)
        found: Mapping[str, np.ndarray] = own.run(feeds)
        return found

    return run


def measure_metrics(evaluator: Evaluator | None, int8: frozenset[str], mixed: frozenset[str]) -> Metrics:
    """Task metrics of float, all-INT8 and mixed model, on the same samples; none without labels.

    Args:
        evaluator: of the model.
        int8: the plan that lowers all it can.
        mixed: the plan.
    """
    if evaluator is None:
        return Metrics(metrics={}, confidence_shift={})
    subjects = {"float": evaluator.reference, "int8": evaluator.subject(int8), "mixed": evaluator.subject(mixed)}
    found = [_metrics_of(result) for result in evaluator.results(subjects, "evaluate")]
    return Metrics(
        metrics={name: value for part in found for name, value in part.metrics.items()},
        confidence_shift={name: value for part in found for name, value in part.confidence_shift.items()},
        notes=tuple(note for part in found for note in part.notes),
    )


def fastest_that_keeps(
    evaluator: Evaluator | None, planned: Planned, int8: tuple[frozenset[str], float]
) -> tuple[ParetoPoint, tuple[Evaluation, ...]]:
    """The fastest plan of the front whose task metrics drop by no more than the budget allows.

    Damage falls along the front, so there is a place from which on the limits hold. The search for it starts where the
    limits would be reached if drops were proportional to damage, as the all-INT8 model shows; it goes away from there
    in steps that double, and halves what is left. Plans that miss another limit of the budget are not candidates, where
    any meets them. The last one, with the least damage, is taken unseen where none before it holds, and the result's
    own metrics tell. Only values of the metrics count, not their intervals.

    Args:
        evaluator: with labels for the task.
        planned: a plan with its front.
        int8: the plan that lowers all it can, and its predicted damage.

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

    def drops(lowered: frozenset[str]) -> dict[str, float]:
        subjects = {"float": evaluator.reference, "candidate": evaluator.subject(lowered)}
        found = evaluator.results(subjects, "candidate", resamples=0)
        return _drops(budget, [metric for result in found for metric in result.metrics])

    def keeps(index: int) -> bool:
        point = candidates[index]
        found = drops(point.lowered())
        kept = _kept(budget, found)
        evaluations.append(
            Evaluation(
                int8_units=len(point.int8_units),
                predicted_ratio=round(point.predicted_latency_us / planned.cost.all_float_us, 4),
                drops={name: round(drop, 6) for name, drop in found.items()},
                kept=kept,
            )
        )
        return kept

    plan, damage = int8
    allowed = _allowed_damage(budget, drops(plan), damage)
    guess = next((i for i, point in enumerate(candidates) if point.damage <= allowed), len(candidates) - 1)
    chosen = _first_that_holds(len(candidates), guess, keeps)
    if not evaluations:
        keeps(chosen)
    return candidates[chosen], tuple(evaluations)


def _first_that_holds(count: int, guess: int, holds: Callable[[int], bool]) -> int:
    """The least of `count` indices at which something holds that stays true behind it; the last is not looked at.

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


def _allowed_damage(budget: Budget, drops: Mapping[str, float], damage: float) -> float:
    """Damage at which the limits are reached, from the drops at a known damage; infinite where they hold there."""
    found = [math.inf]
    for name, most in _limits(budget, drops).items():
        if drops[name] > most:
            found.append(damage * max(most, 0.0) / drops[name] if drops[name] > 0 else 0.0)
    return min(found)


def _limits(budget: Budget, drops: Mapping[str, float]) -> dict[str, float]:
    """The limits of a budget by the names of the metrics; `drops` has one for each, in the same order."""
    return dict(zip(drops, budget.max_drop.values(), strict=True))


def _kept(budget: Budget, drops: Mapping[str, float]) -> bool:
    return all(drops[name] <= most for name, most in _limits(budget, drops).items())


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


def _drops(budget: Budget, metrics: Sequence[TaskMetric]) -> dict[str, float]:
    """Drops of the candidate in the metrics that the budget limits, in its order."""
    known = {m.name: m.drops["candidate"].value for m in metrics}
    found = {}
    for name in budget.max_drop:
        if name != FIRST and name not in known:
            raise BudgetError(f"--max-drop limits '{name}', but the metrics of the task are: {', '.join(known)}.")
        found[next(iter(known)) if name == FIRST else name] = known[next(iter(known)) if name == FIRST else name]
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
