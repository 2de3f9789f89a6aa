"""The rounds of one verification: plans that were made and measured, and the tables as corrected by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import msgspec

from bitalloy.core.effort import EFFORTS, USUAL_EFFORT, Effort
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import UnreachableError
from bitalloy.core.outcome import LOWEST, ONE_SCHEME, KernelEffect, Repair, Round
from bitalloy.core.planned import Measured, Planned, as_mixed
from bitalloy.core.plans import Budget, ParetoPoint
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.measure.kernels import kernel_effects
from bitalloy.model.heads import is_divergence
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import Artefact
from bitalloy.search.choice import ProvenPlan
from bitalloy.search.planning import plan_around, plan_peers, plan_singles, plan_tables, tables_of
from bitalloy.search.single import marked
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.correct import MeasuredDamage
from bitalloy.verify.beside_float import measure_plan
from bitalloy.verify.keeping import Kept
from bitalloy.verify.neighbours import (
    NEIGHBOURS,
    SHOWN_NEIGHBOURS,
    MeasuredNeighbours,
    front_neighbours,
    measure_neighbours,
    with_measured_front,
)
from bitalloy.verify.repair import repair
from bitalloy.verify.rounds import (
    MeasuredStanding,
    budget_misfit,
    default_ratio,
    fits_best,
    nearer_default,
    next_search,
    plain_sqnr,
    seeks_speed,
)

NEIGHBOUR_GAIN_DB, NEIGHBOUR_GAIN_SHARE = 0.1, 0.02
"""What a neighbour on the front must gain to be tried: mean SQNR, or part of the latency."""


class KernelInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides how the optimization of the runtime changes a plan."""

    network: ExecutedNetwork
    plan: tuple[tuple[str, str], ...]
    """Pairs of unit and scheme."""
    samples: tuple[int, ...]


@dataclass(frozen=True)
class TriedPlan:
    """A plan that was made and measured."""

    planned: Planned
    measured: Measured
    round: Round
    size_bytes: int
    write: Callable[[], Artefact]
    """Function that makes its model."""
    rival: TriedPlan | None = None
    """The best plan of one scheme as measured beside it; None where that is the plan itself, or there is none."""

    @property
    def standing(self) -> MeasuredStanding:
        """What was measured of the plan and counts for the budget."""
        return MeasuredStanding(
            self.measured.ratio,
            self.measured.latency.mixed.median_ms,
            self.size_bytes,
            plain_sqnr(self.planned, self.measured),
        )

    @cached_property
    def mixed(self) -> Artefact:
        """The model of the plan."""
        return self.write()


class VerificationCourse:
    """The rounds of one verification: what was tried, and the tables as corrected so far.

    Args:
        analysis: what is known about the model.
        planned: the first plan.
        work: where to keep and show results.
        effort: how much is measured.
    """

    def __init__(
        self, analysis: Analysis, planned: Planned, work: Workspace, effort: Effort = EFFORTS[USUAL_EFFORT]
    ) -> None:
        self._analysis, self._work, self._first, self._effort = analysis, work, planned, effort
        self.tables = tables_of(analysis, planned.cost)
        """The tables as corrected so far."""
        self._base, self._findings = self.tables, tuple[MeasuredDamage, ...]()
        self.samples = list(analysis.parts.verification)
        """Samples on which plans are measured."""
        self.singles = plan_singles(self.tables, planned.plan.budget)
        """The plans of one scheme, the best one marked; it is measured beside every plan, and ships where it wins."""
        self._tried: list[TriedPlan] = []
        self._decided: TriedPlan | None = None
        self.budget = planned.plan.budget
        """The budget as the user gave it; where nobody did, nearer to the default once more is seen to be in reach."""

    def search(self) -> None:
        """Measure, correct and search, until nothing is left to correct or the rounds are used up."""
        planned, asked = self._first, self.budget
        while True:
            tried = self._try(planned, asked, "search")
            repaired = tried.round.repair is not None
            if not planned.cost.estimated:
                wanted = default_ratio(self._analysis.units, self._first.cost)
                self.budget = nearer_default(self.budget, wanted, tried.measured.ratio)
            if len(self._tried) == self._effort.rounds:
                return
            next_ = next_search(
                self._analysis.units, asked, self.budget, planned, self._tried[-1].measured, repaired=repaired
            )
            if next_ is None and not repaired:
                return
            if repaired:
                changed = next_[0] if next_ else asked
                asked = msgspec.structs.replace(
                    changed, min_sqnr_db=self.budget.min_sqnr_db, head_sqnr_db=self.budget.head_sqnr_db
                )
            elif next_:
                asked = next_[0]
            if next_:
                self.tables = replace(self.tables, cost=next_[1])
            try:
                planned = plan_tables(self.tables, asked, front=False, work=self._work)
            except UnreachableError:
                return
            if any(planned.plan.chosen == t.planned.plan.chosen for t in self._tried):
                return

    def decide(self, kept: Kept) -> None:
        """Take the plan that keeps the limits on the task, or of its rivals the one that is measured to be faster."""
        point, points = kept.point, (kept.point, *kept.rivals)
        if len(points) > 1 and not self._first.cost.estimated:
            ratios = measure_neighbours(self._analysis, points, self.samples, self._work).ratio
            point = points[ratios.index(min(ratios))]
        single = next((s for s in self.singles if s.plan == point.chosen), None)
        if single is not None and self._analysis.units.usual == BASELINE:
            self.singles = marked(self.singles, single)
        self._decided = self._tried_before(point) or self._try(self._from_front(point), self.budget, "metric")

    def completed(self) -> Planned:
        """Return the best plan, or the first before any was tried, as the tables see it now, with its front."""
        plan_, budget = (self.best.planned if self._tried else self._first).plan, self.budget
        decided = ProvenPlan(plan_.chosen, plan_.optimality_gap, plan_.solved)
        return plan_around(self.tables, budget, decided, work=self._work)

    @property
    def peers(self) -> tuple[ParetoPoint, ...]:
        """The plans that other tools make, see `search.planning.plan_peers`."""
        return plan_peers(self.tables, self.budget)

    def beside_neighbours(self) -> Planned:
        """Measure the neighbours of the `completed` plan on its front; one that does better takes its place."""
        final, effort = self.completed(), self._effort
        if not (effort.shown if self.budget.on_task else effort.neighbours):
            return final
        points = front_neighbours(final.plan, SHOWN_NEIGHBOURS if self.budget.on_task else NEIGHBOURS)
        if len(points) < 2:
            return final
        sitting = measure_neighbours(self._analysis, points, self.samples, self._work)
        better = self._better(final, points, sitting)
        if better is not None and self._tried_before(better) is None:
            self._try(self._from_front(better), self.budget, "front")
            final = self.completed()
        return replace(final, plan=with_measured_front(final.plan, points, sitting))

    def _better(self, final: Planned, points: Sequence[ParetoPoint], sitting: MeasuredNeighbours) -> ParetoPoint | None:
        """Find the neighbour that fits the budget better than the chosen plan by more than an accident of timing."""
        if self.budget.on_task:
            return None  # none of them was evaluated
        heads = [h.head for h in final.plan.heads]
        found = []
        for i, point in enumerate(points):
            values = {h: e.value for h, e in zip(heads, sitting.sqnr[i], strict=True) if not is_divergence(h)}
            standing = MeasuredStanding(sitting.ratio[i], sitting.milliseconds[i], point.size_bytes, values)
            found.append((budget_misfit(self.budget, standing, tolerance=1.0), i))
        own = next(m for m, i in found if points[i].chosen == final.plan.chosen)
        best, index = min(found)
        gain = own[1] - best[1]
        enough = NEIGHBOUR_GAIN_SHARE * own[1] if seeks_speed(self.budget) else NEIGHBOUR_GAIN_DB
        return points[index] if best[0] <= own[0] and gain > enough else None

    def _from_front(self, point: ParetoPoint) -> Planned:
        decided = ProvenPlan(point.chosen, point.optimality_gap)
        return plan_around(self.tables, self.budget, decided, front=False, work=self._work)

    def _tried_before(self, point: ParetoPoint) -> TriedPlan | None:
        return next((t for t in self._tried if t.planned.plan.chosen == point.chosen), None)

    def _try(self, planned: Planned, asked: Budget, source: str) -> TriedPlan:
        """Make and measure a plan, and repair the tables where its prediction is off."""
        mixed = self._analysis.artefact(planned.plan.chosen)
        single = self.single
        measured = measure_plan(self._analysis, planned, mixed, self.samples, self._work, single=single)
        fix = None
        used = self._effort.shown or not self.budget.on_task_alone
        if self._effort.repairs and used and not self._analysis.graph.large:
            fix = repair(self._analysis, self._base, self._findings, planned, measured, self.samples, self._work)
        if fix is not None:
            self.tables, self._findings = replace(fix.tables, cost=self.tables.cost), fix.findings
        record = fix.record if fix is not None else None
        trial = TriedPlan(
            planned,
            measured,
            _round(asked, planned, measured, source, record),
            mixed.size_bytes,
            lambda: mixed,
            self._rival(planned, measured),
        )
        self._tried.append(trial)
        return trial

    @property
    def single(self) -> Plan | None:
        """The best plan of one scheme; None where there is no choice between schemes."""
        return next((single.plan for single in self.singles if single.format.best), None)

    def _rival(self, beside: Planned, measured: Measured) -> TriedPlan | None:
        """Make of the columns that were measured beside a plan the best plan of one scheme."""
        plan = self.single
        if plan is None or plan == beside.plan.chosen:
            return None
        column = LOWEST if plan == self._analysis.units.lowest() else ONE_SCHEME
        decided = ProvenPlan(plan, beside.plan.optimality_gap, beside.plan.solved)
        planned = plan_around(self.tables, self.budget, decided, front=False, work=self._work)
        found = as_mixed(measured, column)
        told = _round(self.budget, planned, found, ONE_SCHEME, None)
        write = partial(self._analysis.artefact, plan)
        size = planned.plan.predicted_size_bytes if self._analysis.graph.large else write().size_bytes
        return TriedPlan(planned, found, told, size, write)

    @property
    def best(self) -> TriedPlan:
        """The plan that fits the budget best, as measured, or the plan of one scheme beside it where that is better."""
        mixed = self._decided or self._tried[fits_best(self.budget, [t.standing for t in self._tried])]
        rival = mixed.rival
        if rival is None or self._decided is not None:
            return mixed
        return (mixed, rival)[fits_best(self.budget, [mixed.standing, rival.standing])]

    def measured_at_last(self) -> Measured:
        """Return the times and outputs of the best plan from a sitting that did not choose it.

        Where several plans were measured and it did best, it is measured again: the best of several owes a part of its
        times to luck.
        """
        best = self.best
        chosen = len(self._tried) > 1 or best is not self._tried[0]
        if not chosen or self._decided is not None or best.planned.cost.estimated:
            return best.measured
        work, single = self._work, self.single
        return measure_plan(self._analysis, best.planned, best.mixed, self.samples, work, single=single, again=True)

    def kernel_effects(self) -> tuple[KernelEffect, ...]:
        """Compare the best plan as the runtime optimizes it with its graph as it is written, on the same samples."""
        analysis, best = self._analysis, self.best

        def make() -> bytes:
            with self._work.stage("kernels", len(self.samples)) as progress:
                found = kernel_effects(
                    analysis.original(),
                    analysis.executable(best.mixed),
                    analysis.heads,
                    lambda: (analysis.data.feeds(i) for i in self.samples),
                    progress=progress.advance,
                )
            return to_json(found)

        inputs = KernelInputs(
            network=analysis.executed, plan=tuple(best.planned.plan.chosen.listed), samples=tuple(self.samples)
        )
        return msgspec.json.decode(self._work.cached("kernels", inputs, make), type=tuple[KernelEffect, ...])

    def rounds(self) -> tuple[Round, ...]:
        """List what was done, with the mark of the plan that is kept."""
        best = self.best
        last = next((t for t in self._tried if best is t or best is t.rival), None)
        tried = [*self._tried, *([last.rival] if last is not None and last.rival is not None else [])]
        return tuple(msgspec.structs.replace(t.round, shipped=t is best) for t in tried)

    def known(self) -> Analysis:
        """Return the analysis with the matrix as corrected."""
        facts = self.tables.facts
        return replace(self._analysis, matrix=self.tables.matrix, secant=facts.secant)


def _round(asked: Budget, planned: Planned, measured: Measured, source: str, repair: Repair | None) -> Round:
    pairs = [(h.head, h.predicted_db.value) for h in planned.plan.heads]
    return Round(
        latency_ratio_limit=asked.latency_ratio,
        min_sqnr_db=asked.min_sqnr_db,
        head_sqnr_db=asked.head_sqnr_db,
        predicted_ratio=round(planned.predicted_ratio, 4),
        measured_ratio=round(measured.ratio, 4),
        sqnr_db=tuple(plain_sqnr(planned, measured).values()),
        predicted_db=tuple(value for head, value in pairs if not is_divergence(head)),
        schemes=planned.plan.chosen.counts(),
        source=source,
        repair=repair,
    )
