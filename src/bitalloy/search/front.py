"""Local search around the program's plans, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np

from bitalloy.core.plans import ParetoPoint
from bitalloy.core.schemes import Plan
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.sensitivity.matrix import decibel

FRONT_BUDGETS = 24
"""Latencies, evenly spread, for which the front has the least damaging plan; where plans coincide, more are tried."""
FRONT_GAP = 0.03
"""Proven distance to the optimum at which the solver stops."""


def polish(problem: Problem, plan: Plan, limits: Limits, *, fastest: bool = False) -> Plan:
    """Move single units to another scheme, best first, while the goal improves and the limits hold.

    The start may violate the limits slightly, because the program ignores interactions; then moves that reduce the
    violation come first.
    """
    ceiling = limits.damages(len(problem.matrix.heads))

    def scores(damage: np.ndarray, latency: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far plans miss the limits, and what is minimized."""
        excess = np.maximum(np.maximum(latency / limits.latency_us, size / limits.size_bytes) - 1, 0)
        excess = excess + np.maximum(damage / ceiling - 1, 0).max(axis=1)
        return np.where(excess > 1e-9, excess, 0.0), latency if fastest else damage @ problem.aims

    current = plan
    missed, goal = scores(
        problem.damage(current)[None], np.array([problem.latency_us(current)]), np.array([problem.size_bytes(current)])
    )
    best = float(missed[0]), float(goal[0])
    for _ in range(2 * len(problem.choices) if problem.moves else 0):
        missed, goal = scores(*problem.neighbours(current))
        first = int(np.lexsort((goal, missed))[0])
        value = float(missed[first]), float(goal[first])
        if value >= best or (value[0] == best[0] and value[1] > best[1] * (1 - 1e-4)):
            break
        best = value
        current = problem.moved(current, problem.moves[first])
    return current


def front(
    problem: Problem, program: Program, plan: tuple[Plan, float], progress: Callable[[int], None] | None
) -> tuple[tuple[ParetoPoint, ...], bool]:
    """Find the plans that no other one beats, by latency, and tell whether the solver could finish for all of them.

    One plan for each of `FRONT_BUDGETS` latencies between the fastest plan and the slowest one that is of use. Where
    fewer are left because plans coincide or beat each other, the widest gaps are halved as often again.
    """
    least, (chosen, gap) = problem.fixed, plan
    fastest = program.solve(Limits(), minimize="latency")
    plans = {least: 0.0}
    solved = True

    def add(budget: float) -> None:
        nonlocal solved
        limits = Limits(latency_us=budget)
        found = program.solve(limits, minimize="damage", gap=FRONT_GAP)
        if found is not None:
            plans.setdefault(polish(problem, found.plan, limits), found.gap)
            solved &= found.solved

    if fastest is not None:
        plans[fastest.plan] = fastest.gap
        solved &= fastest.solved
        start = problem.latency_us(least)
        end = min(problem.latency_us(fastest.plan), start)
        for budget in np.linspace(end, start, FRONT_BUDGETS + 1)[:-1]:
            add(float(budget) * (1 + 1e-9))
            if progress is not None:
                progress(1)
        tried: set[float] = set()
        for _ in range(FRONT_BUDGETS):
            times = [latency for latency, _, _ in _undominated(problem, plans, chosen)]
            gaps = [(b - a, (a + b) / 2) for a, b in pairwise(times) if (a + b) / 2 not in tried]
            if len(times) > FRONT_BUDGETS or not gaps:
                break
            _, middle = max(gaps)
            tried.add(middle)
            add(middle)
    plans[chosen] = gap
    points = (point_of(problem, units, plans[units]) for _, _, units in _undominated(problem, plans, chosen))
    return tuple(points), solved


def point_of(problem: Problem, plan: Plan, gap: float = 0.0) -> ParetoPoint:
    """Return what is predicted of a plan; `gap` is what the solver left open for it."""
    return ParetoPoint(
        schemes=dict(plan.listed),
        predicted_latency_us=round(problem.latency_us(plan), 2),
        size_bytes=problem.size_bytes(plan),
        damage=problem.total(plan),
        sqnr_db=tuple(round(float(d), 3) for d in decibel(problem.damage(plan))),
        optimality_gap=gap,
    )


def _undominated(problem: Problem, plans: Iterable[Plan], chosen: Plan) -> list[tuple[float, float, Plan]]:
    """Keep (latency, damage, plan) of the plans that no faster one equals, and of the chosen one, by latency."""
    points = sorted(((problem.latency_us(p), problem.total(p), p.listed) for p in plans), key=lambda t: t)
    kept, least = [], np.inf
    for latency, damage, units in points:
        plan = Plan(units)
        if damage < least or plan == chosen:
            least = min(least, damage)
            kept.append((latency, damage, plan))
    return kept
