"""Plans from tables alone: after an analysis, or again from a run directory that has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import RunDirectoryError, UnreachableError
from bitalloy.core.planned import Planned
from bitalloy.core.plans import Budget, CostTable, ParetoPoint, PlanReport, UnitDamage
from bitalloy.core.records import Record, Secant, SensitivityTable
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.measure.sizes import float_bytes
from bitalloy.model.heads import is_divergence
from bitalloy.model.load import Graph
from bitalloy.model.read import name_of
from bitalloy.search.choice import ProvenPlan, complete_plan, search
from bitalloy.search.constraints import constrain
from bitalloy.search.front import FRONT_BUDGETS, point_of
from bitalloy.search.problem import Problem
from bitalloy.search.protection import FamilyAdvice, protect, read_advice
from bitalloy.search.single import SinglePlan, single_plans
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.placement import WHOLE

PLAN_FILE, UNITS_FILE, COST_FILE = "plan.json", "units.json", "cost.json"
MATRIX_FILE, FACTS_FILE = "planning.npz", "planning.json"
"""The plan in a run directory, and the files that it rests on; the matrix is the probe matrix as last corrected."""
PLAN_FILES = ("summary.json", PLAN_FILE, UNITS_FILE, COST_FILE, MATRIX_FILE, FACTS_FILE)
"""All that a finished run leaves and that planning needs."""
AnyRecord = TypeVar("AnyRecord", bound=Record)


class PlanFacts(Record, frozen=True, kw_only=True):
    """`planning.json`: what a plan rests on beside units, cost table and probe matrix."""

    float_bytes: int
    """Size of the float model's files as they were given, to which a budget's ratio refers."""
    operators: dict[str, str]
    """Node -> operator type."""
    advice: tuple[FamilyAdvice, ...]
    """What the model's family keeps in float; empty where that was switched off."""
    seed: int
    secant: Secant
    alone: dict[str, dict[str, UnitDamage]]
    """Unit -> scheme -> its row in the table of sensitivities."""


class PlanInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides a plan."""

    units: UnitGraph
    matrix: str
    """Digest of the probe matrix."""
    cost: CostTable
    facts: PlanFacts
    budget: Budget
    front: bool
    """Whether the front around the plan is wanted."""
    decided: tuple[tuple[str, str], ...] | None
    """A plan that is decided already, as pairs of unit and scheme; None where it is searched."""
    gap: float | None
    """Gap that the solver left open for it."""
    solved: bool | None


@dataclass(frozen=True)
class PlanTables:
    """All that a plan is made from; it holds neither the network nor data."""

    units: UnitGraph
    matrix: ProbeMatrix
    cost: CostTable
    facts: PlanFacts


def operators_of(graph: Graph) -> dict[str, str]:
    """Map each node to its operator type."""
    return {name_of(node): node.op_type for node in graph.nodes}


def plan_tables(tables: PlanTables, budget: Budget, *, front: bool = True, work: Workspace | None = None) -> Planned:
    """Choose the precision of every unit for a budget, and the Pareto front where it is wanted.

    Raises:
        UnreachableError: the budget cannot be met; the message says what can.
        BitalloyError: a pattern of the budget names nothing, or asks for what cannot be.
    """
    case, work = _narrowed(tables, budget), work or Workspace()

    def make() -> bytes:
        with work.stage("search", FRONT_BUDGETS if front else 1) as progress:
            found = search(case.problem, budget, front=front, seed=tables.facts.seed, progress=progress.advance)
        return to_json(case.explained(found))

    try:
        plan = msgspec.json.decode(work.cached("plan", case.inputs(front=front), make), type=PlanReport)
    except UnreachableError as error:
        raise UnreachableError(f"{error}{_hints(case)}", error.reachable_ratio) from error
    return Planned(plan, tables.cost, tuple(case.protected))


def plan_around(
    tables: PlanTables, budget: Budget, decided: ProvenPlan, *, front: bool = True, work: Workspace
) -> Planned:
    """Give predictions and reasons by some tables to a plan that is decided already, and the front where wanted."""
    case = _narrowed(tables, budget)

    def make() -> bytes:
        with work.stage("front", FRONT_BUDGETS if front else 1) as progress:
            found = complete_plan(
                case.problem,
                budget,
                decided,
                front=front,
                seed=tables.facts.seed,
                progress=progress.advance,
            )
        return to_json(case.explained(found))

    inputs = case.inputs(front=front, around=decided)
    found = msgspec.json.decode(work.cached("front", inputs, make), type=PlanReport)
    return Planned(found, tables.cost, tuple(case.protected))


def plan_peers(tables: PlanTables, budget: Budget) -> tuple[ParetoPoint, ...]:
    """Predict the plans that other tools make: all units in their lowest scheme, with and without the family's advice.

    Returns:
        The plan that follows the advice, and the one that does not where that is another; what the budget keeps, both
        keep.
    """
    plain = replace(tables, facts=msgspec.structs.replace(tables.facts, advice=()))
    found: dict[Plan, ParetoPoint] = {}
    for known in (tables, plain):
        problem = _narrowed(known, budget).problem
        plan = problem.units.lowest()
        found.setdefault(plan, point_of(problem, plan))
    return tuple(found.values())


def plan_singles(tables: PlanTables, budget: Budget) -> tuple[SinglePlan, ...]:
    """Predict the plans of one scheme, see `search.single.single_plans`."""
    return single_plans(_narrowed(tables, budget).problem, budget)


@dataclass(frozen=True)
class _Case:
    """Tables after the family's advice and the budget's patterns."""

    tables: PlanTables
    budget: Budget
    problem: Problem
    protected: Mapping[str, str]
    freed: Mapping[str, str]
    kept: frozenset[str]
    """Units that patterns of the budget keep."""

    def inputs(self, *, front: bool, around: ProvenPlan | None = None) -> PlanInputs:
        """Collect all that decides a plan."""
        tables = self.tables
        return PlanInputs(
            units=tables.units,
            matrix=tables.matrix.digest,
            cost=tables.cost,
            facts=tables.facts,
            budget=self.budget,
            front=front,
            decided=None if around is None else tuple(around.plan.listed),
            gap=None if around is None else around.gap,
            solved=None if around is None else around.solved,
        )

    def explained(self, plan: PlanReport) -> PlanReport:
        """Add to the reasons of a plan what measurement frees from advice."""
        choices = (
            msgspec.structs.replace(c, reason=f"{c.reason}; {self.freed[c.unit]}") if c.unit in self.freed else c
            for c in plan.choices
        )
        return msgspec.structs.replace(plan, choices=tuple(choices))


def _narrowed(tables: PlanTables, budget: Budget) -> _Case:
    facts = tables.facts
    advised = protect(facts.advice, tables.units, tables.matrix)
    asked = constrain(advised.units, budget.keep, facts.operators, full=tables.units)
    return _Case(
        tables,
        budget,
        Problem(
            asked.units,
            tables.matrix,
            facts.secant,
            tables.cost,
            tables.cost.float_bytes or facts.float_bytes,
            facts.alone,
        ),
        {name: why for name, why in advised.kept.items() if name not in asked.kept},
        {name: why for name, why in advised.freed.items() if name not in asked.kept},
        asked.kept,
    )


def _hints(case: _Case) -> str:
    """Say what else stands in the way of a budget."""
    parts = []
    if count := len(case.protected):
        parts.append(f" {count} units stay in float by advice of the model's family; --no-protect frees them.")
    if case.kept:
        parts.append(f" {len(case.kept)} units are kept in a scheme by --keep.")
    return "".join(parts)


def read_tables(folder: str | Path) -> PlanTables:
    """Read the tables that a finished run left.

    Raises:
        RunDirectoryError: the folder is not a run directory, or its run has not finished.
    """
    path = Path(folder)
    before = _written(path)
    missing = [name for name in PLAN_FILES if not (path / name).is_file()]
    if missing:
        raise RunDirectoryError(
            f"'{path}' has no {missing[0]}, so there is nothing to plan from. Expected the run directory of a finished "
            "`bitalloy run` of this version; finish it with the same command, or name another."
        )
    try:
        matrix = ProbeMatrix.from_bytes((path / MATRIX_FILE).read_bytes())
    except Exception as error:  # zip, zlib and header errors of many types
        raise RunDirectoryError(f"'{path / MATRIX_FILE}' is damaged: {error}. Give the run's command again.") from error
    found = PlanTables(
        read_record(path / UNITS_FILE, UnitGraph),
        matrix,
        read_record(path / COST_FILE, CostTable),
        read_record(path / FACTS_FILE, PlanFacts),
    )
    if before != _written(path):
        raise RunDirectoryError(f"'{path}' was written by a run while it was read. Give the command again.")
    return found


def _written(run: Path) -> int:
    """Tell one summary from another by its time; a run removes it first and writes it last."""
    try:
        return (run / "summary.json").stat().st_mtime_ns
    except OSError:
        return 0


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read a record of a run directory.

    Raises:
        RunDirectoryError: the file is absent, damaged, or of another version.
    """
    if not path.is_file():
        raise RunDirectoryError(
            f"'{path.parent}' has no {path.name}. Expected the run directory of a finished `bitalloy run` of this "
            "version; finish it with the same command, or name another."
        )
    try:
        return from_json(path.read_bytes(), kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunDirectoryError(
            f"'{path}' cannot be read: {error}. Expected a file of a finished `bitalloy run` of this version; give the "
            "run's command again."
        ) from error


def tables_of(analysis: Analysis, cost: CostTable) -> PlanTables:
    """Collect what plans are made from."""
    graph, settings = analysis.graph, analysis.settings
    facts = PlanFacts(
        float_bytes=float_bytes(graph),
        operators=operators_of(graph),
        advice=read_advice(graph) if settings.protect else (),
        seed=settings.seed,
        secant=analysis.secant,
        alone=_damage_alone(analysis.table),
    )
    return PlanTables(analysis.units, analysis.matrix, cost, facts)


def _damage_alone(table: SensitivityTable) -> dict[str, dict[str, UnitDamage]]:
    """Map each unit and scheme to the row of the head that suffers most."""
    found: dict[str, dict[str, UnitDamage]] = {}
    for row in table.rows:
        if (row.scope, row.part) != ("unit", WHOLE) or is_divergence(row.head):
            continue
        known = found.setdefault(row.id, {})
        if row.scheme not in known or row.sqnr_db.value < known[row.scheme].sqnr_db:
            known[row.scheme] = UnitDamage(head=row.head, sqnr_db=row.sqnr_db.value, exact=row.exact)
    return found
