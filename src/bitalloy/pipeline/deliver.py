"""From an analysis and a budget to a verified mixed-precision model and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bitalloy import bench
from bitalloy.bench import TOLERANCE
from bitalloy.cost import corrected, device
from bitalloy.cost import measure as measure_table
from bitalloy.errors import BudgetError, DataError
from bitalloy.graph import Graph
from bitalloy.heads import is_divergence
from bitalloy.outcome import Audit, LatencySpread, MetricComparison, Round, Summary, Triple
from bitalloy.pipeline.analyze import Analysis, versions
from bitalloy.pipeline.programs import interface_of, runner
from bitalloy.pipeline.protection import protect
from bitalloy.pipeline.records import Measured, Metrics, Planned, ratio_limit
from bitalloy.pipeline.summary import summarize
from bitalloy.pipeline.work import Workspace
from bitalloy.program import Joined
from bitalloy.records import Budget, CostTable, Plan
from bitalloy.runtime import ONLY, Artefact, available_cores
from bitalloy.search import FRONT_BUDGETS, Problem, search
from bitalloy.store import key_of
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import TaskData, TaskMetric, TaskResult
from bitalloy.verify import output_sqnr

VERIFY_SAMPLES = 16
BENCH_REPEATS = 40
MAX_ROUNDS = 3
MODELS = ("float", "int8", "mixed")


@dataclass(frozen=True)
class Verified:
    """The shipped model and what was measured on it."""

    analysis: Analysis
    planned: Planned
    mixed: Artefact
    """`mixed.save(path)` writes it: an .onnx file, or a folder for a program of several graphs."""
    summary: Summary
    audit: Audit | None = None
    """What the runtime ran for it, where `audit` was called."""


def measure_cost(analysis: Analysis, *, work: Workspace | None = None) -> CostTable:
    """Measure what each unit and border costs on the target, which must be this machine.

    A stored table of the same units, machine and runtime is used again, whatever else the analysis was made of.
    """
    work = work or Workspace()

    def make() -> bytes:
        with work.stage("cost", None) as progress:
            table = measure_table(
                analysis.units,
                analysis.artefact,
                analysis.data.feeds(0),
                seed=analysis.settings.seed,
                progress=progress.advance,
            )
        return msgspec.json.encode(table)

    units = [(u.id, u.core, u.tail, u.allowed) for u in analysis.units.units]
    key = key_of(
        model=analysis.graph.info.sha256,
        shapes=analysis.graph.info.inputs,
        target=analysis.target.name,
        units=units,
        device=device(),
        **execution(analysis),
    )
    return msgspec.json.decode(work.cached("cost", key, make), type=CostTable)


def plan(
    analysis: Analysis, budget: Budget, *, table: CostTable | None = None, work: Workspace | None = None
) -> Planned:
    """Choose the precision of every unit for a budget, and the Pareto front.

    Raises:
        BudgetError: the budget cannot be met; the message says what can.
    """
    work = work or Workspace()
    table = table or measure_cost(analysis, work=work)
    units, kept, freed = analysis.units, {}, {}
    if analysis.settings.protect:
        found = protect(analysis.graph, analysis.units, analysis.matrix)
        units, kept, freed = found.units, dict(found.kept), dict(found.freed)
    problem = Problem(units, analysis.matrix, analysis.secant, table, float_bytes(analysis.graph))

    def make() -> bytes:
        with work.stage("search", FRONT_BUDGETS) as progress:
            found = search(problem, budget, seed=analysis.settings.seed, progress=progress.advance)
        choices = (
            msgspec.structs.replace(c, reason=f"{c.reason}; {freed[c.unit]}") if c.unit in freed else c
            for c in found.choices
        )
        return msgspec.json.encode(msgspec.structs.replace(found, choices=tuple(choices)))

    key = key_of(analysis=analysis.key, cost=table, budget=budget, protected=kept)
    try:
        plan_ = msgspec.json.decode(work.cached("plan", key, make), type=Plan)
    except BudgetError as error:
        if not kept:
            raise
        hint = f"{len(kept)} units stay in float by advice of the model's family; --no-protect frees them."
        raise BudgetError(f"{error} {hint}", error.reachable_ratio) from error
    return Planned(plan_, table, tuple(kept))


def apply(analysis: Analysis, planned: Planned) -> Artefact:
    """The mixed-precision model of a plan, checked; `save` writes it."""
    return analysis.artefact(planned.plan.int8_units())


def verify(
    analysis: Analysis,
    planned: Planned,
    *,
    labels: Path | Sequence[Path] | None = None,
    limit: int | None = None,
    work: Workspace | None = None,
) -> Verified:
    """Run the float, the all-INT8 and the mixed model side by side; correct the plan where it misses its budget.

    Where the measured latency misses the budget, the cost table is corrected by what was measured; where the SQNR
    does, the floor is raised by the gap; where a latency limit is not used up, the search may go beyond it by what is
    left. Then the search is repeated, at most three rounds in all. The plan that is kept is the best measured one.

    Args:
        analysis: of the model.
        planned: the first plan.
        labels: for the model's task (`bitalloy.tasks`), e.g. a COCO annotation file for a detector; its metrics are
            measured on the three models where given. Several may be given, such as questions and captions.
        limit: evaluate at most so many images.
        work: where to keep and show results.

    Raises:
        DataError: labels do not fit the images or the model.
    """
    work = work or Workspace()
    budget = planned.plan.budget
    tried: list[tuple[Planned, Artefact, Measured]] = []
    rounds: list[Round] = []
    asked = budget
    for _ in range(MAX_ROUNDS):
        mixed = apply(analysis, planned)
        measured = _measure(analysis, planned, mixed, work)
        tried.append((planned, mixed, measured))
        rounds.append(
            Round(
                latency_ratio_limit=asked.latency_ratio,
                min_sqnr_db=asked.min_sqnr_db,
                predicted_ratio=round(planned.predicted_ratio, 4),
                measured_ratio=round(measured.ratio, 4),
                sqnr_db=tuple(_judged(planned, measured)),
                int8_units=len(planned.plan.int8_units()),
            )
        )
        following = _following(analysis, asked, budget, planned, measured)
        if following is None:
            break
        asked, table = following
        try:
            planned = plan(analysis, asked, table=table, work=work)
        except BudgetError:
            break
    planned, mixed, measured = min(tried, key=lambda t: _misfit(budget, t[0], t[2]))
    files = [labels] if isinstance(labels, Path) else list(labels or ())
    metrics = _metrics(analysis, planned, mixed, files, limit, work)
    final = _with_measured(planned, budget, measured)
    sizes = _sizes(analysis, mixed)
    summary = summarize(analysis, final, sizes, measured, metrics, rounds, work.seconds)
    return Verified(analysis, final, mixed, summary)


def _measure(analysis: Analysis, planned: Planned, mixed: Artefact, work: Workspace) -> Measured:
    samples = _verification_samples(analysis)

    def make() -> bytes:
        with work.scratch() as folder:
            models = _placed(analysis, mixed, folder)
            together = not (mixed.large or analysis.graph.large)
            with work.stage("benchmark", BENCH_REPEATS) as progress:
                times = bench.sittings(
                    {name: model.session for name, model in models.items()},
                    analysis.data.feeds(0),
                    repeats=BENCH_REPEATS,
                    together=together,
                    progress=progress.advance,
                )
            with work.stage("verify", len(samples)) as progress:
                sessions = {name: model.session() for name, model in models.items()}
                reference = sessions.pop("float")
                sqnr = output_sqnr(
                    reference,
                    sessions,
                    analysis.heads,
                    (analysis.data.feeds(i) for i in samples),
                    seed=analysis.settings.seed,
                    progress=progress.advance,
                )
                for session in (reference, *sessions.values()):
                    session.close()
        latency = LatencySpread(
            reference=bench.summarize(times["float"]),
            int8=bench.summarize(times["int8"]),
            mixed=bench.summarize(times["mixed"]),
        )
        return msgspec.json.encode(Measured(latency=latency, sqnr_int8=sqnr["int8"], sqnr_mixed=sqnr["mixed"]))

    key = key_of(analysis=analysis.key, mixed=_identity(planned), **execution(analysis))
    return msgspec.json.decode(work.cached("verify", key, make), type=Measured)


def _placed(analysis: Analysis, mixed: Artefact, folder: Path) -> dict[str, Artefact]:
    """Float, all-INT8 and mixed model, what is large of them in files of a folder."""
    return {
        "float": analysis.original(),
        "int8": all_int8(analysis).placed(folder / "int8"),
        "mixed": mixed.placed(folder / "mixed"),
    }


def _identity(planned: Planned) -> list[str]:
    """What decides a mixed model beside the analysis."""
    return sorted(planned.plan.int8_units())


def execution(analysis: Analysis) -> dict[str, object]:
    """What decides how models are executed here, beside the machine."""
    return {"threads": available_cores(), "runtime": analysis.target.runtime.version(), "versions": versions()}


def float_bytes(graph: Graph) -> int:
    """Size of the float model as files."""
    return sum(_float_sizes(graph).values())


def _float_sizes(graph: Graph) -> dict[str, int]:
    parts = graph.program.graphs if isinstance(graph, Joined) else {ONLY: graph}
    return Artefact({name: part.model for name, part in parts.items()}).sizes


def _sizes(analysis: Analysis, mixed: Artefact) -> dict[str, Triple]:
    """By graph."""
    reference, int8, own = _float_sizes(analysis.graph), all_int8(analysis).sizes, mixed.sizes
    return {name: Triple(reference=reference[name], int8=int8[name], mixed=own[name]) for name in own}


def _verification_samples(analysis: Analysis) -> list[int]:
    """Samples that the probe matrix has not seen, as far as there are enough; from the end of the data otherwise."""
    total = len(analysis.data)
    unseen = list(range(analysis.matrix.samples, total))[:VERIFY_SAMPLES]
    return unseen if len(unseen) >= min(VERIFY_SAMPLES, 4) else list(range(total))[-VERIFY_SAMPLES:]


def all_int8(analysis: Analysis) -> Artefact:
    """The model in which every unit that may run in INT8 does."""
    return analysis.artefact(analysis.units.quantizable())


def _following(
    analysis: Analysis, asked: Budget, budget: Budget, planned: Planned, measured: Measured
) -> tuple[Budget, CostTable] | None:
    """What to search with next, or None where the measurement meets the user's budget and uses it.

    Case 1. Too slow: the cost table is corrected by the measured plan. Under a floor on SQNR alone, this is a plan that
            is slower than the float model.
    Case 2. Too much damage: the floor is raised by the gap.
    Case 3. Faster than a limit asks for, where the least damage within it is sought: the limit of the search is raised
            by the ratio, so that the time left buys accuracy.
    """
    before, table = asked, planned.cost
    limit = ratio_limit(budget, planned)
    if limit is None and budget.size_bytes is None:
        limit = 1.0
    if limit is not None and measured.ratio > limit * TOLERANCE:
        table = corrected(table, analysis.units, planned.plan.int8_units(), measured.ratio)
        asked = msgspec.structs.replace(asked, latency_ratio=budget.latency_ratio, latency_ms=budget.latency_ms)
    elif limit is not None and budget.min_sqnr_db is None and measured.ratio * TOLERANCE < limit:
        asked = _slower(asked, limit / measured.ratio)
    if budget.min_sqnr_db is not None and asked.min_sqnr_db is not None:
        gap = budget.min_sqnr_db - min(_judged(planned, measured))
        if gap > 0:
            asked = msgspec.structs.replace(asked, min_sqnr_db=round(asked.min_sqnr_db + gap + 0.2, 3))
    changed = asked != before or table is not planned.cost
    return (asked, table) if changed else None


def _slower(asked: Budget, factor: float) -> Budget:
    """A budget with its limits on latency raised."""
    ratio, milliseconds = (
        None if value is None else round(value * factor, 4) for value in (asked.latency_ratio, asked.latency_ms)
    )
    return msgspec.structs.replace(asked, latency_ratio=ratio, latency_ms=milliseconds)


def _judged(planned: Planned, measured: Measured) -> list[float]:
    """Measured SQNR in dB of the heads of a plan, divergences left out."""
    pairs = zip(planned.plan.heads, measured.sqnr_mixed, strict=True)
    return [estimate.value for head, estimate in pairs if not is_divergence(head.head)]


def _misfit(budget: Budget, planned: Planned, measured: Measured) -> tuple[float, float]:
    """How far a measured plan misses the budget, then its damage: smaller is better."""
    miss = 0.0
    if budget.latency_ratio is not None:
        miss += max(0.0, measured.ratio / (budget.latency_ratio * TOLERANCE) - 1)
    if budget.latency_ms is not None:
        miss += max(0.0, measured.latency.mixed.median_ms / (budget.latency_ms * TOLERANCE) - 1)
    judged = _judged(planned, measured)
    if budget.min_sqnr_db is not None:
        return miss + max(0.0, budget.min_sqnr_db - min(judged)), measured.ratio
    return miss, -float(np.mean(judged))


def _metrics(
    analysis: Analysis, planned: Planned, mixed: Artefact, labels: Sequence[Path], limit: int | None, work: Workspace
) -> Metrics:
    if not labels:
        return Metrics(metrics={}, confidence_shift={})
    graph = analysis.graph
    interface = interface_of(graph)
    task = find_task(interface)
    if task is None:
        raise DataError(
            f"No task metric fits this model with outputs {[list(o.shape) for o in graph.info.outputs]}. Box AP needs "
            f"a detector with output (1, 4 + classes, n); the tasks are {', '.join(t.name for t in TASKS)}. "
            "Leave out --eval."
        )
    found = []
    for data in [task.open(path, interface) for path in labels]:

        def make(data: TaskData = data) -> bytes:
            with work.scratch() as folder, work.stage("evaluate", None) as progress:
                placed = _placed(analysis, mixed, folder)
                models = {name: runner(graph, placed[name].session()) for name in MODELS}
                result = task.evaluate(
                    models, data, limit=limit, seed=analysis.settings.seed, progress=progress.advance
                )
            return msgspec.json.encode(_metrics_of(result))

        key = key_of(
            analysis=analysis.key,
            mixed=_identity(planned),
            labels=data.fingerprint(),
            limit=limit,
            runtime=analysis.target.runtime.version(),
        )
        found.append(msgspec.json.decode(work.cached("evaluate", key, make), type=Metrics))
    return Metrics(
        metrics={name: value for part in found for name, value in part.metrics.items()},
        confidence_shift={name: value for part in found for name, value in part.confidence_shift.items()},
        notes=tuple(note for part in found for note in part.notes),
    )


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


def _with_measured(planned: Planned, budget: Budget, measured: Measured) -> Planned:
    heads = tuple(
        msgspec.structs.replace(head, measured_db=found)
        for head, found in zip(planned.plan.heads, measured.sqnr_mixed, strict=True)
    )
    plan_ = msgspec.structs.replace(planned.plan, heads=heads, budget=budget)
    return Planned(plan_, planned.cost, planned.protected)
