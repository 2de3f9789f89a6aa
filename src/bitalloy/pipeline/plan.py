"""Planning, also again from the tables of a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from bitalloy.core.errors import BudgetError
from bitalloy.core.planned import Planned
from bitalloy.core.plans import Budget, CostTable, PlanReport
from bitalloy.core.store import RunDirectory
from bitalloy.core.work import Progress, Silent, Workspace
from bitalloy.measure.cost import measure_cost
from bitalloy.report.text import plan_json
from bitalloy.search.planning import (
    PLAN_FILE,
    plan_tables,
    read_record,
    read_tables,
    tables_of,
)
from bitalloy.sensitivity.analysis import Analysis

REPLANNED = "replanned.json"


def plan_again(
    folder: str | Path, budget: Budget | Callable[[int], Budget] | None = None, *, progress: Progress | None = None
) -> Planned:
    """Plan from the tables of a finished run, without its model and data; nothing is analysed or measured.

    The plan is also written into the run directory, as `replanned.json`. Its `plan.json` stays: that one belongs to
    the model beside it.

    Args:
        folder: a run directory.
        budget: limits, or a function that makes them from the size of the float model in bytes. Where it limits
            nothing, the limits of the run hold, but for task metrics, which tables do not know: where there are no
            others, the plan may take as long as that of the run.
        progress: where the progress of the stages is shown.

    Raises:
        RunDirectoryError: the folder is not a run directory, or its run has not finished.
        UnreachableError: the budget cannot be met; the message says what can.
        BitalloyError: a pattern of `budget.keep` names nothing, or asks for what cannot be.
    """
    tables = read_tables(folder)
    asked = budget(tables.facts.float_bytes) if callable(budget) else budget or Budget()
    if asked.on_task:
        raise BudgetError("Tables do not know the task: --max-drop and --min-agreement need `bitalloy run`.")
    if not asked.limited:
        run = read_record(Path(folder) / PLAN_FILE, PlanReport)
        before = run.budget
        asked = msgspec.structs.replace(before, max_drop={}, min_agreement=None, keep=asked.keep or before.keep)
        if before.on_task_alone:  # the tables do not know the task, and without any limit float is best
            ratio = math.ceil(1e4 * run.predicted_latency_us / tables.cost.float_us) / 1e4
            asked = msgspec.structs.replace(asked, latency_ratio=ratio, by_default=True)
    store = RunDirectory(folder)
    planned = plan_tables(tables, asked, work=Workspace(store, progress or Silent()))
    store.publish(REPLANNED, plan_json(planned))
    return planned


def plan(
    analysis: Analysis,
    budget: Budget,
    *,
    table: CostTable | None = None,
    front: bool = True,
    work: Workspace | None = None,
) -> Planned:
    """Choose the scheme of every unit for a budget, and the Pareto front; `verify` computes the final front.

    Raises:
        UnreachableError: the budget cannot be met; the message says what can.
        BitalloyError: a pattern of `budget.keep` names nothing, or asks for what cannot be.
    """
    work = work or Workspace()
    table = table or measure_cost(analysis, work=work)
    return plan_tables(tables_of(analysis, table), budget, front=front, work=work)
