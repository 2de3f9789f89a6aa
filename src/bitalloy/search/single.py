"""Plans that use one scheme for all units that can run in it: what a mixed plan has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from bitalloy.core.plans import Budget, SingleFormat
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.search.choice import search_limits
from bitalloy.search.problem import Problem
from bitalloy.sensitivity.matrix import decibel


@dataclass(frozen=True)
class SinglePlan:
    """A plan of one scheme."""

    plan: Plan
    format: SingleFormat


def single_plans(problem: Problem, budget: Budget) -> tuple[SinglePlan, ...]:
    """List the plans of one scheme, fastest first by prediction, the best one for a budget marked.

    Where people run whole models of the target in one of the schemes anyway (`UnitGraph.usual`), that one is the best,
    because it is what a plan must beat. Otherwise it is, of those that keep the limits, the fastest under a floor or a
    limit on a task metric, and else the one with the least damage; where none keeps them, the fastest. Units that may
    not run in a scheme stay in the baseline or, where they may not run in that either, in what they must.

    Returns:
        Nothing where units have fewer than two schemes to choose from beside the baseline.
    """
    units, limits = problem.units, search_limits(problem, budget)
    names = [s.name for s in units.schemes if s.name != BASELINE and units.able(s.name)]
    if len(names) < 2:
        return ()
    ceiling, whole = limits.damages(len(problem.matrix.heads)), problem.cost.float_us
    found = []
    for name in names:
        plan = Plan({**problem.fixed, **Plan.of(name, *units.able(name))})
        latency, size, damage = problem.latency_us(plan), problem.size_bytes(plan), problem.damage(plan)
        within = latency <= limits.latency_us * (1 + 1e-9) and size <= limits.size_bytes and (damage <= ceiling).all()
        told = SingleFormat(
            scheme=name,
            units=len(plan.units_in(name)),
            predicted_ratio=round(latency / whole, 4),
            predicted_size_bytes=size,
            predicted_db={h: round(float(v), 3) for h, v in zip(problem.matrix.heads, decibel(damage), strict=True)},
            within=bool(within),
        )
        found.append(SinglePlan(plan, told))
    found.sort(key=lambda single: single.format.predicted_ratio)
    return marked(
        found, _best(found, problem, budget, bounded=limits.latency_us < np.inf or limits.size_bytes < np.inf)
    )


def marked(singles: list[SinglePlan] | tuple[SinglePlan, ...], best: SinglePlan) -> tuple[SinglePlan, ...]:
    """Mark one of some plans as the best."""
    return tuple(SinglePlan(s.plan, msgspec.structs.replace(s.format, best=s.plan == best.plan)) for s in singles)


def _best(found: list[SinglePlan], problem: Problem, budget: Budget, *, bounded: bool) -> SinglePlan:
    usual = next((single for single in found if single.format.scheme == problem.units.usual), None)
    if usual is not None:
        return usual
    within = [single for single in found if single.format.within]
    if not within:
        return found[0]
    if budget.on_task or (budget.has_floor and not bounded):
        return within[0]
    return min(within, key=lambda single: problem.total(single.plan))
