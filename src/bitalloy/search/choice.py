"""The plan for a budget, with its reasons, or what can be reached where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitalloy.core.errors import BudgetError, UnreachableError, did_you_mean
from bitalloy.core.plans import Budget, Choice, HeadDamage, ParetoPoint, PlanReport, UnitDamage
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import Evidence, Unit
from bitalloy.measure.bench import TOLERANCE
from bitalloy.measure.prices import latency_interval_us, saved_bytes
from bitalloy.search import front as around
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.sensitivity.matrix import CEILING_DB, decibel, draws, estimate_sqnr

MOST_SLACK = 0.25
"""Largest relative error of a cost table for which a latency limit out of reach is still tried."""


def search(
    problem: Problem,
    budget: Budget,
    *,
    front: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PlanReport:
    """Find the best plan for a budget, and the Pareto front around it.

    With a floor on SQNR and no latency or size limit the fastest such plan is chosen; otherwise the least damaging
    plan within the limits. A limit on the drop of a task metric is not known to the tables: where nothing else is
    limited, the plan is the middle of the front, for whoever evaluates to start from.

    Args:
        problem: the tables.
        budget: limits that hold together.
        front: whether the other plans of the front are wanted.
        seed: the seed of the bootstrap.
        progress: called with 1 for each of `FRONT_BUDGETS` steps, or once without a front.

    Raises:
        UnreachableError: no plan meets the budget; the message names what can be reached.
        BudgetError: it names a head that the model does not have.
    """
    limits = search_limits(problem, budget)
    fastest = budget.has_floor and limits.latency_us == np.inf and limits.size_bytes == np.inf
    program = Program(problem)
    if budget.on_task and limits == Limits():
        limits = Limits(latency_us=_middle(problem, program))
    goal = "latency" if fastest else "damage"
    found = program.solve(limits, minimize=goal)
    if found is None:
        limits = _nearest(problem, program, limits)
        found = program.solve(limits, minimize=goal)
    if found is None:
        raise _unreachable(problem, program, budget, limits)
    plan = around.polish(problem, found.plan, limits, fastest=fastest)
    gap, solved = found.gap, found.solved
    return complete_plan(problem, budget, ProvenPlan(plan, gap, solved), front=front, seed=seed, progress=progress)


@dataclass(frozen=True)
class ProvenPlan:
    """A plan that is decided already, with what the solver proved of it."""

    plan: Plan
    gap: float
    """The gap that the solver left open."""
    solved: bool = True
    """False where it stopped at its limit of nodes."""


def complete_plan(
    problem: Problem,
    budget: Budget,
    decided: ProvenPlan,
    *,
    front: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PlanReport:
    """Give reasons and predictions to a plan that is decided already, and the front around it.

    Args:
        problem: the tables.
        budget: the budget that led to the plan.
        decided: the plan.
        front: whether the other plans of the front are wanted.
        seed: the seed of the bootstrap.
        progress: called with 1 for each of `FRONT_BUDGETS` steps, or once without a front.
    """
    plan, points, whole = decided.plan, tuple[ParetoPoint, ...](), True
    if front:
        points, whole = around.front(problem, Program(problem), (plan, decided.gap), progress)
    elif progress is not None:
        progress(1)
    weights = draws(problem.matrix.samples, seed)
    estimates = estimate_sqnr(problem.matrix, problem.sites(plan), weights, problem.secant)
    return PlanReport(
        model_sha256=problem.units.model_sha256,
        target=problem.units.target,
        budget=budget,
        choices=tuple(_choices(problem, plan)),
        heads=tuple(HeadDamage(head=h, predicted_db=e) for h, e in zip(problem.matrix.heads, estimates, strict=True)),
        predicted_latency_us=round(problem.latency_us(plan), 2),
        predicted_latency_interval_us=latency_interval_us(problem.cost, problem.units, plan),
        predicted_size_bytes=problem.size_bytes(plan),
        optimality_gap=decided.gap,
        solved=decided.solved and whole,
        pareto=points,
    )


def _middle(problem: Problem, program: Program) -> float:
    """Return the latency in us halfway between the fastest plan and float."""
    fastest = program.solve(Limits(), minimize="latency")
    start = problem.latency_us(problem.fixed)
    return (problem.latency_us(fastest.plan) + start) / 2 if fastest is not None else start


def check_heads(budget: Budget, heads: Sequence[str]) -> None:
    """Refuse a floor on a head that the model does not have.

    Raises:
        BudgetError: there is one; the message names the heads.
    """
    for name in budget.head_sqnr_db:
        if name not in heads:
            raise BudgetError(
                f"The budget has a floor on '{name}', but the output heads are: {', '.join(heads)}."
                f"{did_you_mean(name, heads)}"
            )


def search_limits(problem: Problem, budget: Budget) -> Limits:
    """Turn a budget into the search's units.

    Raises:
        BudgetError: it names a head that the model does not have.
    """
    heads = [h for h, plain in zip(problem.matrix.heads, problem.matrix.plain, strict=True) if plain]
    check_heads(budget, heads)
    latency = [np.inf]
    if budget.latency_ratio is not None:
        latency.append(budget.latency_ratio * problem.cost.float_us)
    if budget.latency_ms is not None:
        latency.append(budget.latency_ms * 1e3)
    floors = [budget.floor_db(h) if h in heads else None for h in problem.matrix.heads]
    return Limits(
        latency_us=min(latency),
        size_bytes=budget.size_bytes if budget.size_bytes is not None else np.inf,
        damage=tuple(np.inf if f is None else 10 ** (-f / 10) for f in floors) if budget.has_floor else (),
    )


def _nearest(problem: Problem, program: Program, limits: Limits) -> Limits:
    """Replace a latency limit by the least latency in reach, where that misses it by less than the table's own error.

    What the artefact really takes is measured afterwards, and the run says whether it meets the budget.
    """
    found = program.solve(replace(limits, latency_us=np.inf), minimize="latency")
    if found is None:
        return limits
    least = problem.latency_us(found.plan)
    slack = min(max(TOLERANCE - 1, 2 * problem.cost.residual_percent / 100), MOST_SLACK)
    within = max(least * 1.005, limits.latency_us * TOLERANCE)
    return replace(limits, latency_us=within) if least * (1 - slack) <= limits.latency_us else limits


def _unreachable(problem: Problem, program: Program, budget: Budget, limits: Limits) -> UnreachableError:
    """Say what is asked for and how much is in reach: of each limit alone and, where there are several, together."""
    start = problem.cost.float_us
    together = program.solve(replace(limits, latency_us=np.inf), minimize="latency")
    fastest = together or program.solve(Limits(damage=limits.damage), minimize="latency")
    smallest = problem.size_bytes(problem.smallest)
    parts, ratio = [], None
    if fastest is not None:
        least = problem.latency_us(fastest.plan)
        ratio = least / start
        others = " within the other limits" if together and (limits.damage or limits.size_bytes < np.inf) else ""
        parts.append(f"the lowest latency in reach{others} is {least / start:.2f}x of float ({least / 1e3:.2f} ms)")
    if limits.damage and fastest is None:
        best = decibel(problem.damage(problem.fixed))
        reach = ", ".join(f"{h} {v:.1f} dB" for h, v in zip(problem.matrix.heads, best, strict=True) if v < CEILING_DB)
        parts.append(f"the highest SQNR in reach is {reach}" if reach else "the floors are in reach in float alone")
    parts.append(f"the smallest size is {smallest / 1e6:.2f} MB")
    asked = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("latency ratio", budget.latency_ratio),
            ("latency ms", budget.latency_ms),
            ("size bytes", budget.size_bytes),
            ("SQNR floor dB", budget.min_sqnr_db),
            *((f"SQNR floor dB of {head}", floor) for head, floor in budget.head_sqnr_db.items()),
        )
        if value is not None
    )
    message = f"No plan meets the budget ({asked}): {'; '.join(parts)}. Relax the budget to that or beyond."
    return UnreachableError(message, ratio)


def _choices(problem: Problem, plan: Plan) -> list[Choice]:
    """List the schemes of a plan with a reason per unit, from the tables that decided it."""
    change = _changes_us(problem, plan)
    found = []
    for unit in problem.units.units:
        if not unit.choices:
            found.append(Choice(unit=unit.id, scheme=BASELINE, reason=unit.why, group=unit.why))
            continue
        reason, group = _reason(problem, unit, plan, change)
        said = "; ".join(_evidence(name, known) for name, known in unit.evidence.items())
        found.append(
            Choice(
                unit=unit.id,
                scheme=plan.scheme_of(unit.id),
                reason=f"{reason}; {said}" if said else reason,
                group=group,
            )
        )
    return found


def _changes_us(problem: Problem, plan: Plan) -> dict[tuple[str, str], float]:
    """Map each (unit, scheme) that a plan can move to onto what that adds to its latency, borders included."""
    if not problem.moves:
        return {}
    _, latency, _ = problem.neighbours(plan)
    return dict(zip(problem.moves, latency - problem.latency_us(plan), strict=True))


def _reason(problem: Problem, unit: Unit, plan: Plan, change: Mapping[tuple[str, str], float]) -> tuple[str, str]:
    """Say why a unit runs in the scheme that a plan gives it, with the group of reasons where that is the baseline."""
    scheme, cost = plan.scheme_of(unit.id), next(c for c in problem.cost.units if c.unit == unit.id)
    considered = unit.choices[0] if scheme == BASELINE else scheme
    known = problem.alone.get(unit.id, {}).get(considered) or _predicted_alone(problem, unit, considered)
    source = "measured" if known.exact else "predicted"
    leaves = f"{known.sqnr_db:.1f} dB on {known.head} ({source})"
    name, gain = considered.upper(), cost.saved_us(considered)
    if unit.id in problem.fixed:
        return f"{unit.why}; alone it leaves {leaves}", "kept by advice or as asked" if scheme == BASELINE else ""
    if scheme != BASELINE:
        why = f"saves {gain:.0f} us" if gain > 0 else f"avoids borders between {name} neighbours"
        if gain <= 0 and not problem.units.scheme(scheme).hands_on:  # such units have no borders
            without = saved_bytes(problem.cost, plan.moved(unit.id, BASELINE))
            why = f"takes {(saved_bytes(problem.cost, plan) - without) / 1e3:.1f} kB from the file"
        return f"{why}; alone it leaves {leaves}", ""
    added = change[unit.id, considered]
    if gain <= 0 and added >= 0:
        return f"{name} is not faster here ({abs(gain):.0f} us slower)", "not faster in a lower scheme"
    if added >= 0:
        borders = f"{name} would save {gain:.0f} us, but its borders would cost {gain + added:.0f} us"
        return borders, "borders would cost more than it saves"
    costly = f"{name} would save {-added:.0f} us with its borders, but alone it leaves {leaves}"
    return costly, "faster in a lower scheme, but the accuracy is worth more"


def _predicted_alone(problem: Problem, unit: Unit, scheme: str) -> UnitDamage:
    """Predict what a unit alone does to the head that suffers most, as the table of sensitivities does."""
    matrix = problem.matrix
    damage = matrix.damage(problem.sites(Plan.of(scheme, unit.id))).mean(axis=0)
    worst = int(np.argmax(np.where(matrix.plain, damage, -1.0)))
    return UnitDamage(head=matrix.heads[worst], sqnr_db=float(decibel(damage[worst])))


def _evidence(scheme: str, known: Evidence) -> str:
    """Say why a scheme that computes in another format is or is not among the choices of a unit."""
    name = scheme.upper()
    if known.reason:
        return f"not {name}: {known.reason}"
    sums = f", sums of {known.depth} products reach at most {known.partial_sum:.3g}" if known.depth else ""
    return f"safe in {name}: values reach {known.magnitude:.3g}{sums}, {100 * known.subnormal:.2g} % subnormal"
