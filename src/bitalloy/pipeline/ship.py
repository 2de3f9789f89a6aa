"""From an analysis and a plan to a verified mixed-precision model."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from bitalloy.core.audited import Audit, Compilation
from bitalloy.core.effort import EFFORTS, USUAL_EFFORT, Effort
from bitalloy.core.examples import Examples
from bitalloy.core.outcome import Resolution, Summary, Triple
from bitalloy.core.planned import Measured, Planned
from bitalloy.core.schemes import Plan
from bitalloy.core.status import Status
from bitalloy.core.tabular import InlinePage, Listing, Tabular
from bitalloy.core.work import Workspace
from bitalloy.data.images import ImageSpec
from bitalloy.measure.sizes import float_sizes
from bitalloy.runtime.artefact import Artefact
from bitalloy.search.planning import PlanTables
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.tasks.evaluate import Evaluator
from bitalloy.tasks.own import OwnData
from bitalloy.tasks.resolution import with_limit
from bitalloy.verify.beside_float import peak_memory
from bitalloy.verify.course import VerificationCourse
from bitalloy.verify.given import examine_given
from bitalloy.verify.keeping import Kept, fastest_that_keeps, measure_metrics
from bitalloy.verify.provenance import provenance_of, stamped
from bitalloy.verify.shipped import MeasuredPlan
from bitalloy.verify.sizes import verify_sizes
from bitalloy.verify.steadiness import steadiness_of
from bitalloy.verify.summary import expected, predicted_sqnr, summarize_run


@dataclass(frozen=True, repr=False)
class Verified(Tabular):
    """The shipped model, and the results of its verification."""

    analysis: Analysis
    planned: Planned
    mixed: Artefact
    """The mixed model; `mixed.save(path)` writes an .onnx file, or a folder for a program of several graphs."""
    summary: Summary
    tables: PlanTables
    """Tables behind the final plan: the probe matrix is corrected by exact measurements."""
    audit: Audit | None = None
    """Audit of the kernels that the runtime executed for the model; None where it was not made."""
    compilation: Compilation | None = None
    """What NVIDIA's compiler made of the model; None where it is not installed, or the target is another."""
    examples: Examples | None = None
    """The evaluated samples on which float and mixed model differ most; None where no task was evaluated."""
    others: tuple[Verified, ...] = ()
    """Results for the other targets of the settings."""

    def listing(self) -> Listing:
        """Return the key figures of the float, the lowest and the mixed model as a table."""
        summary = self.summary
        rows: list[tuple[object, ...]] = []
        for name, found in (("latency, ms", summary.latency_ms), ("size, bytes", summary.size_bytes)):
            rows.append((name, found.reference, found.lowest, found.mixed))
        rows += [(f"SQNR {head}, dB", None, p.lowest.measured, p.mixed.measured) for head, p in summary.sqnr_db.items()]
        rows += [(name, m.reference.value, m.lowest.value, m.mixed.value) for name, m in summary.metrics.items()]
        columns = ("figure", "float", f"all-{self.analysis.units.lowest_name}", "mixed")
        return Listing(f"{summary.model} on {summary.target}", columns, rows)

    def report(self) -> InlinePage:
        """Return the report as a page that a notebook shows inline; `str` of it is the HTML of `report.html`."""
        from bitalloy.pipeline.run import render

        return InlinePage(render(self))

    def __repr__(self) -> str:
        summary = self.summary
        return f"Verified({summary.model} on {summary.target}: {summary.latency_ratio:.2f}x, {self.status.verdict})"

    def _repr_html_(self) -> str:
        told = f"<p><b>{html.escape(self.summary.headline)}</b></p><p>Status: {html.escape(self.status.verdict)}</p>"
        return f"{told}{self.listing().as_html()}{self.planned.front().as_html()}"

    @property
    def status(self) -> Status:
        """Whether the mixed model keeps the budget."""
        return self.summary.status


def apply(analysis: Analysis, planned: Planned) -> Artefact:
    """Make the mixed-precision model of a plan, and check it; its `save` writes it."""
    return analysis.artefact(planned.plan.chosen)


def verify(
    analysis: Analysis,
    planned: Planned,
    *,
    labels: Path | Sequence[Path] | OwnData | None = None,
    limit: int | None = None,
    image: ImageSpec | None = None,
    effort: Effort = EFFORTS[USUAL_EFFORT],
    work: Workspace | None = None,
) -> Verified:
    """Run the float, the lowest and the mixed model side by side; correct tables and plan by what is measured.

    Where the measured latency misses the budget, the cost table is corrected by what was measured. Where the SQNR is
    off its prediction, the units responsible are measured and the probe matrix is corrected (`repair`); where it only
    misses a floor, the floor is raised by the gap. Where a latency limit is not used up, the search may go beyond it by
    what is left. Then the search is repeated, at most three rounds in all. With a limit on the drop of a task metric,
    plans of the front are evaluated until the fastest is found that keeps it; where nothing else is limited, that is
    all, because no measured plan is worth more to it than another. The neighbours of the plan on the front are measured
    beside it. The plan that is kept is the best measured one; where it was chosen among several by what was measured,
    it is measured once more, and that is what is told of it.

    Args:
        analysis: analysis of the model.
        planned: the first plan.
        labels: labels of the model's task (`bitalloy.tasks`), e.g. a COCO annotation file; the task's metrics are
            measured on the three models where given. Several may be given, such as questions and captions; or what a
            metric of the user's own is measured on.
        limit: largest number of images that are evaluated; None for all.
        image: how their images are prepared; None takes what the model's file says, or else the task's own.
        effort: how much is measured beside the plan itself.
        work: where results are stored and progress is shown.

    Raises:
        DataError: the labels do not fit the images or the model.
        BudgetError: a task metric is limited that is not measured.
    """
    work = work or Workspace()
    given = [labels] if isinstance(labels, Path) else labels
    deciding = planned.plan.budget.on_task
    evaluator = Evaluator(analysis, given, limit, work, image, deciding=deciding) if given else None
    resolution = evaluator.resolution() if evaluator is not None else ()
    course = VerificationCourse(analysis, planned, work, effort)
    kept = _searched(course, evaluator)
    unmeasured = analysis.graph.large or planned.cost.estimated
    final = course.completed() if unmeasured else course.beside_neighbours()
    detailed, best = effort.details and not planned.cost.estimated, course.best
    mixed, measured = best.mixed, course.measured_at_last()
    beside = course.single if measured.sqnr_single is not None else None
    metrics = measure_metrics(evaluator, analysis.units.lowest(), final.plan.chosen, beside)
    final = _with_measured(analysis, course.known(), final, measured)
    mixed = stamped(mixed, provenance_of(analysis, final, metrics.metrics), most=final.plan.budget.size_bytes)
    shipped = MeasuredPlan(
        planned=final,
        measured=measured,
        steadiness=steadiness_of(final.cost, best.measured, measured),
        sizes=sizes_of(analysis, mixed, beside, rewritten=measured.ratio_rewritten is not None),
        single=beside,
        singles=tuple(single.format for single in course.singles),
        metrics=metrics,
        rounds=course.rounds(),
        **_judged(kept, resolution, final.plan.chosen),
        memory=peak_memory(analysis, final.plan.chosen, work, single=beside) if detailed else None,
        kernel_effects=course.kernel_effects() if effort.details and not unmeasured else None,
        given=examine_given(analysis, work, timed=not planned.cost.estimated),
        bound=mixed.bound,
        sizes_tried=verify_sizes(analysis, mixed, final.plan.chosen, work),
    )
    summary = summarize_run(analysis, course.known(), shipped, work.seconds)
    examples = evaluator.examples(final.plan.chosen) if evaluator is not None else None
    return Verified(analysis, final, mixed, summary, course.tables, examples=examples)


def _searched(course: VerificationCourse, evaluator: Evaluator | None) -> Kept | None:
    """Search for the plan; what keeps the limits on the task, where there are some."""
    if not course.budget.on_task_alone:
        course.search()
    return _decided(course, evaluator) if course.budget.on_task else None


def _decided(course: VerificationCourse, evaluator: Evaluator | None) -> Kept:
    """Find the fastest plan that keeps the limits on the task, and take it."""
    kept = fastest_that_keeps(evaluator, course.completed(), course.peers, course.singles)
    course.decide(kept)
    return kept


def _judged(kept: Kept | None, resolution: Sequence[Resolution], plan: Plan) -> dict[str, Any]:
    """Collect what the task says of a plan: of float, which loses nothing, there is no estimate."""
    if kept is None:
        return {"resolution": tuple(resolution)}
    judge = kept.judge
    return {
        "evaluations": judge.evaluations(),
        "resolution": with_limit(resolution, judge.limits),
        "drop_estimates": judge.estimates(plan) if judge.judged(plan) else {},
    }


def _with_measured(first: Analysis, corrected: Analysis, planned: Planned, measured: Measured) -> Planned:
    """Put beside each other what was predicted before any plan was verified, what is now, and what was measured."""
    chosen = planned.plan.chosen
    before, after = predicted_sqnr(first, chosen), expected(corrected, chosen, measured.sqnr_mixed)
    heads = tuple(
        msgspec.structs.replace(head, predicted_db=old, measured_db=found, corrected_db=new)
        for head, old, new, found in zip(planned.plan.heads, before, after, measured.sqnr_mixed, strict=True)
    )
    return replace(planned, plan=msgspec.structs.replace(planned.plan, heads=heads))


def sizes_of(
    analysis: Analysis, mixed: Artefact, single: Plan | None = None, *, rewritten: bool = False
) -> dict[str, Triple]:
    """Return the file sizes in bytes of each graph of a program, by its name.

    Args:
        analysis: what is known about the model.
        mixed: the model of the plan.
        single: a plan of one scheme, whose sizes are wanted too.
        rewritten: whether those of the float model after the graph rewrites are.
    """
    reference, lowest, own = float_sizes(analysis.graph), analysis.artefact(analysis.units.lowest()).sizes, mixed.sizes
    beside = analysis.artefact(single).sizes if single is not None else {}
    plain = analysis.artefact(Plan()).sizes if rewritten else {}
    return {
        name: Triple(
            reference=reference[name],
            lowest=lowest[name],
            mixed=own[name],
            single=beside.get(name),
            rewritten=plain.get(name),
        )
        for name in own
    }
