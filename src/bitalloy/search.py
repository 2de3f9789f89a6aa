"""Choose the precision of every unit: a mixed-integer program for the additive part, local search for interactions.

The program (HiGHS, through scipy) has a binary variable x per unit that may run in INT8, a rounding variable y per
edge and a border variable z per tensor and direction:

    y_e >= x_producer, y_e >= x_consumer          an edge is rounded when either side is INT8
    z_t >= x_producer - x_consumer                a border costs where the precision changes (and the reverse)
    damage_h = sum_w D_wh x + sum_e D_eh y        relative error energy of head h, sites taken as independent
    latency  = fixed + sum of units + sum of borders

The probe matrix knows more than the program: it gives the damage of whole sets of sites, with their interactions.
Local search flips units while that damage falls. With few rows the interaction terms are noisy, and a search over
thousands of plans would fit the noise; so they enter with half their weight (`SHRINK`), the additive part in full.

This module sees tables, not graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from bitalloy.bench import TOLERANCE
from bitalloy.errors import BudgetError
from bitalloy.heads import DETECTIONS
from bitalloy.matrix import ProbeMatrix, bend, decibel, draws, estimate, straight
from bitalloy.records import (
    AGAIN,
    Budget,
    Choice,
    CostTable,
    HeadDamage,
    ParetoPoint,
    Plan,
    Precision,
    Secant,
    UnitGraph,
)

SHRINK = 0.5
FRONT_BUDGETS = 24
TIME_LIMIT_S = 10.0
GAP, FRONT_GAP = 0.005, 0.03
"""Proven distance to the optimum at which the solver stops: for the plan, and for its neighbours on the front."""


@dataclass(frozen=True)
class Limits:
    """A budget in the search's own units."""

    latency_us: float = np.inf
    size_bytes: float = np.inf
    damage: float = np.inf
    """Of every head but divergences, as relative error energy."""


@dataclass(frozen=True)
class Problem:
    """All tables that the search needs."""

    units: UnitGraph
    matrix: ProbeMatrix
    secant: Secant
    cost: CostTable
    float_bytes: int

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Units with a choice, in graph order."""
        allowed = self.units.quantizable()
        return tuple(u.id for u in self.units.units if u.id in allowed)

    @cached_property
    def site_damage(self) -> np.ndarray:
        """(heads, sites): mean relative error energy of each site alone."""
        return np.asarray(self.matrix.site_damage().mean(axis=0))

    def damage(self, int8: frozenset[str]) -> np.ndarray:
        """(heads,): relative error energy of a plan, interactions shrunk by `SHRINK`, corrected by the secant."""
        chosen = self.matrix.select(self.units.rounded(int8))
        together = self.matrix.damage(chosen).mean(axis=0)
        linear = np.asarray(SHRINK * together + (1 - SHRINK) * (self.site_damage @ chosen))
        return np.asarray(linear * bend(self.secant, linear))

    @cached_property
    def aims(self) -> np.ndarray:
        """(heads,): weights of the heads in the one number that is minimized.

        Each head counts by its share of the damage that rounding everything does to it, so that none drowns the
        others. Where detections are judged, the plain boxes, nearly all of them of anchors that see nothing, are not.
        Divergences are not: they are made of heads that are judged already.
        """
        heads = self.matrix.heads
        judged = self.matrix.plain & np.array([h != "boxes" or DETECTIONS not in heads for h in heads])
        whole = self.site_damage @ self.matrix.select(self.units.rounded(frozenset(self.free)))
        return np.asarray(np.where(judged & (whole > 0), 1 / np.maximum(whole, 1e-30), 0.0) / judged.sum())

    def total(self, int8: frozenset[str]) -> float:
        """What is minimized: damage of a plan, summed over the heads by `aims`."""
        return float(self.aims @ self.damage(int8))

    def latency_us(self, int8: frozenset[str]) -> float:
        """Predicted latency of a plan."""
        return self.cost.latency_us(self.units, int8)

    def size_bytes(self, int8: frozenset[str]) -> int:
        """Predicted file size of a plan."""
        return self.float_bytes - self.cost.saved_bytes(int8)

    def fits(self, int8: frozenset[str], limits: Limits) -> bool:
        """Whether a plan respects all limits."""
        return (
            self.latency_us(int8) <= limits.latency_us
            and self.size_bytes(int8) <= limits.size_bytes
            and bool((self.damage(int8)[self.matrix.plain] <= limits.damage).all())
        )


def search(problem: Problem, budget: Budget, *, seed: int = 0, progress: Callable[[int], None] | None = None) -> Plan:
    """The best plan for a budget, and the Pareto front around it.

    With a floor on SQNR and no latency or size limit the fastest such plan is chosen; otherwise the least damaging
    plan within the limits.

    Raises:
        BudgetError: no plan meets the budget; the message names what can be reached.
    """
    limits = _limits(problem, budget)
    fastest = budget.min_sqnr_db is not None and limits.latency_us == np.inf and limits.size_bytes == np.inf
    program = Program(problem)
    result = program.solve(limits, minimize="latency" if fastest else "damage")
    if result is None:
        limits = _nearest(problem, program, limits)
        result = program.solve(limits, minimize="latency" if fastest else "damage")
    if result is None:
        raise _unreachable(problem, program, budget, limits)
    int8, gap = result
    int8 = polish(problem, int8, limits, fastest=fastest)
    front = _front(problem, program, int8, progress)
    weights = draws(problem.matrix.samples, seed)
    estimates = estimate(problem.matrix, problem.matrix.select(problem.units.rounded(int8)), weights, problem.secant)
    return Plan(
        model_sha256=problem.units.model_sha256,
        target=problem.units.target,
        budget=budget,
        choices=tuple(_choices(problem, int8)),
        heads=tuple(HeadDamage(head=h, predicted_db=e) for h, e in zip(problem.matrix.heads, estimates, strict=True)),
        predicted_latency_us=round(problem.latency_us(int8), 2),
        predicted_latency_interval_us=problem.cost.latency_interval_us(problem.units, int8),
        predicted_size_bytes=problem.size_bytes(int8),
        optimality_gap=round(gap, 6),
        pareto=front,
    )


class Program:
    """The mixed-integer program, built once and solved for many limits."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        units, cost = problem.units, problem.cost
        self._index = {u: i for i, u in enumerate(problem.free)}
        rows: list[tuple[dict[int, float], float]] = []  # sum of coefficients * variables >= bound
        count = len(self._index)
        damage: list[tuple[int, np.ndarray]] = []
        latency: dict[int, float] = {}
        for entry in cost.units:
            if entry.unit in self._index and entry.int8_us is not None:
                latency[self._index[entry.unit]] = entry.int8_us - entry.fp32_us
        table, column = problem.site_damage, problem.matrix.column
        for unit in units.units:
            if unit.id in self._index:
                sites = [s for s in [*(w.id for w in unit.weights), *(e.id for e in unit.inner)] if s in column]
                damage += [(self._index[unit.id], table[:, column[s]]) for s in sites]
        borders: dict[tuple[str, int], int] = {}
        for edge in units.edges:
            a, b = self._index.get(edge.producer or ""), self._index.get(edge.consumer or "")
            if a is not None and edge.rooted and edge.passed_on and edge.id + AGAIN in column:
                damage.append((a, table[:, column[edge.id + AGAIN]]))
            if edge.id in column and (a is not None or b is not None):
                y, count = count, count + 1
                damage.append((y, table[:, column[edge.id]]))
                if edge.rooted and a is not None and not edge.passed_on:
                    rows.append(({y: 1.0, a: -1.0}, 0.0))
                    if b is not None and b != a:
                        rows.append(({y: 1.0, b: -1.0}, 0.0))
                elif b is not None and b != a:
                    rounded_before = {a: 1.0} if a is not None and not edge.entering else {}
                    rows.append(({y: 1.0, b: -1.0, **rounded_before}, 0.0))
            if a == b:
                continue
            price = cost.border_us + edge.elements * cost.border_us_per_element
            for direction, (up, down) in enumerate(((a, b), (b, a))):
                if up is None:
                    continue
                key = (edge.tensor, direction)
                if key not in borders:
                    borders[key], count = count, count + 1
                    latency[borders[key]] = price
                rows.append(({borders[key]: 1.0, up: -1.0, **({down: 1.0} if down is not None else {})}, 0.0))
        self._count = count
        heads = len(problem.matrix.heads)
        self._damage = np.zeros((heads, count))
        for variable, values in damage:
            self._damage[:, variable] += values
        self._latency = np.zeros(count)
        self._latency[list(latency)] = list(latency.values())
        self._size = np.zeros(count)
        for entry in cost.units:
            if entry.unit in self._index:
                self._size[self._index[entry.unit]] = entry.int8_bytes - entry.fp32_bytes
        self._float_us = problem.latency_us(frozenset())
        self._rows = self._matrix(rows)
        self._lower = np.array([bound for _, bound in rows])

    def solve(self, limits: Limits, *, minimize: str, gap: float = GAP) -> tuple[frozenset[str], float] | None:
        """Units in INT8 and the proven relative gap; None where nothing satisfies the limits."""
        scale = np.maximum(self._damage.sum(axis=1), 1e-30)
        bounds = [
            (self._latency, limits.latency_us - self._float_us),
            (self._size, limits.size_bytes - self._problem.float_bytes),
            *((row / s, d / s) for row, s, d in zip(self._damage, scale, self._allowed(limits), strict=True)),
        ]
        constraints = [LinearConstraint(self._rows, self._lower, np.inf)] if self._lower.size else []
        constraints += [LinearConstraint(row[None, :], -np.inf, bound) for row, bound in bounds if np.isfinite(bound)]
        share = self._problem.aims @ self._damage
        tie = 1e-6 * self._latency / max(self._float_us, 1.0) * share.sum()
        goal = self._latency + 1e-9 * share if minimize == "latency" else (share + tie) / max(share.sum(), 1e-30)
        integrality = np.zeros(self._count, np.int8)
        integrality[: len(self._index)] = 1
        result: OptimizeResult = milp(
            goal,
            constraints=constraints,
            integrality=integrality,
            bounds=Bounds(0, 1),
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": gap},
        )
        if result.x is None:
            return None
        proven = float(result.mip_gap) if result.mip_gap is not None and np.isfinite(result.mip_gap) else 0.0
        return frozenset(u for u, i in self._index.items() if result.x[i] > 0.5), proven

    def _allowed(self, limits: Limits) -> np.ndarray:
        """Linear damage per head that the limit leaves room for."""
        if not np.isfinite(limits.damage):
            return np.full(len(self._damage), np.inf)
        return np.where(self._problem.matrix.plain, straight(self._problem.secant, limits.damage), np.inf)

    def _matrix(self, rows: list[tuple[dict[int, float], float]]) -> coo_array:
        at = [(r, c, v) for r, (terms, _) in enumerate(rows) for c, v in terms.items()]
        r, c, v = zip(*at, strict=True) if at else ((), (), ())
        return coo_array((np.array(v, float), (np.array(r, int), np.array(c, int))), shape=(len(rows), self._count))


def polish(problem: Problem, int8: frozenset[str], limits: Limits, *, fastest: bool = False) -> frozenset[str]:
    """Flip single units, best first, while the goal improves and the limits hold.

    The start may violate the limits slightly, because the program ignores interactions; then flips that reduce the
    violation come first.
    """
    current = set(int8)

    def score(plan: frozenset[str]) -> tuple[float, float]:
        damage, latency = problem.damage(plan), problem.latency_us(plan)
        excess = max(0.0, latency / limits.latency_us - 1, problem.size_bytes(plan) / limits.size_bytes - 1)
        excess += float(np.maximum(damage[problem.matrix.plain] / limits.damage - 1, 0).max())
        return (excess if excess > 1e-9 else 0.0), latency if fastest else float(problem.aims @ damage)

    best = score(frozenset(current))
    for _ in range(2 * len(problem.free)):
        trials = [(score(frozenset(current ^ {unit})), unit) for unit in problem.free]
        value, unit = min(trials)
        if value >= best or (value[0] == best[0] and value[1] > best[1] * (1 - 1e-4)):
            break
        best = value
        current ^= {unit}
    return frozenset(current)


def _front(
    problem: Problem, program: Program, chosen: frozenset[str], progress: Callable[[int], None] | None
) -> tuple[ParetoPoint, ...]:
    """Non-dominated plans between the float model and the fastest one, in order of latency."""
    start = problem.latency_us(frozenset())
    fastest = program.solve(Limits(), minimize="latency")
    plans = {frozenset[str](), chosen}
    if fastest is not None:
        plans.add(fastest[0])
        end = min(problem.latency_us(fastest[0]), start)
        for budget in np.linspace(end, start, FRONT_BUDGETS + 1)[:-1]:
            found = program.solve(Limits(latency_us=float(budget) + 1e-6 * start), minimize="damage", gap=FRONT_GAP)
            if found is not None:
                plans.add(found[0])
            if progress is not None:
                progress(1)
    points = [(problem.latency_us(p), problem.total(p), p) for p in plans]
    kept, least = [], np.inf
    for latency, damage, plan in sorted(points, key=lambda t: (t[0], t[1])):
        if damage < least or plan == chosen:
            least = min(least, damage)
            kept.append(
                ParetoPoint(
                    int8_units=tuple(sorted(plan)),
                    predicted_latency_us=round(latency, 2),
                    size_bytes=problem.size_bytes(plan),
                    damage=damage,
                    sqnr_db=tuple(round(float(d), 3) for d in decibel(problem.damage(plan))),
                )
            )
    return tuple(kept)


def _limits(problem: Problem, budget: Budget) -> Limits:
    latency = [np.inf]
    if budget.latency_ratio is not None:
        latency.append(budget.latency_ratio * problem.latency_us(frozenset()))
    if budget.latency_ms is not None:
        latency.append(budget.latency_ms * 1e3)
    return Limits(
        latency_us=min(latency),
        size_bytes=budget.size_bytes if budget.size_bytes is not None else np.inf,
        damage=10 ** (-budget.min_sqnr_db / 10) if budget.min_sqnr_db is not None else np.inf,
    )


def _nearest(problem: Problem, program: Program, limits: Limits) -> Limits:
    """The limits with the latency that is in reach, where it misses the asked one by less than the table's own error.

    What the artefact really takes is measured afterwards, and the run says whether it meets the budget.
    """
    found = program.solve(replace(limits, latency_us=np.inf), minimize="latency")
    if found is None:
        return limits
    least = problem.latency_us(found[0])
    slack = max(TOLERANCE - 1, 2 * problem.cost.residual_percent / 100)
    within = max(least * 1.005, limits.latency_us * TOLERANCE)
    return replace(limits, latency_us=within) if least * (1 - slack) <= limits.latency_us else limits


def _unreachable(problem: Problem, program: Program, budget: Budget, limits: Limits) -> BudgetError:
    start = problem.latency_us(frozenset())
    fastest = program.solve(Limits(damage=limits.damage), minimize="latency")
    smallest = problem.size_bytes(frozenset(problem.free))
    parts, ratio = [], None
    if fastest is not None:
        least = problem.latency_us(fastest[0])
        ratio = least / start
        parts.append(f"the lowest latency in reach is {least / start:.2f}x of float ({least / 1e3:.2f} ms)")
    parts.append(f"the smallest size is {smallest / 1e6:.2f} MB")
    asked = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("latency ratio", budget.latency_ratio),
            ("latency ms", budget.latency_ms),
            ("size bytes", budget.size_bytes),
            ("SQNR floor dB", budget.min_sqnr_db),
        )
        if value is not None
    )
    message = f"No plan meets the budget ({asked}): {'; '.join(parts)}. Relax the budget to that or beyond."
    return BudgetError(message, ratio)


def _choices(problem: Problem, int8: frozenset[str]) -> list[Choice]:
    """The plan with a reason per unit, from the tables that decided it."""
    column, table = problem.matrix.column, problem.site_damage
    times = {c.unit: c for c in problem.cost.units}
    choices = []
    for unit in problem.units.units:
        if unit.id not in problem.free:
            choices.append(Choice(unit=unit.id, precision=Precision.FP32, reason=unit.reason))
            continue
        sites = problem.units.rounded(frozenset({unit.id}))
        alone = table[:, [column[s] for s in sites if s in column]].sum(axis=1)
        worst = int(np.argmax(np.where(problem.matrix.plain, alone, -1.0))) if alone.size else 0
        sqnr = float(decibel(alone[worst])) if alone.size else np.inf
        entry = times[unit.id]
        gain = entry.fp32_us - (entry.int8_us or 0.0)
        head = problem.matrix.heads[worst]
        if unit.id in int8:
            why = f"saves {gain:.0f} us" if gain > 0 else "avoids borders between INT8 neighbours"
            reason = f"{why}; alone it leaves {sqnr:.1f} dB on {head}"
        elif gain <= 0:
            reason = f"INT8 is not faster here ({-gain:.0f} us slower)"
        else:
            reason = f"INT8 would save {gain:.0f} us but leave {sqnr:.1f} dB on {head}, or add borders"
        choices.append(
            Choice(unit=unit.id, precision=Precision.INT8 if unit.id in int8 else Precision.FP32, reason=reason)
        )
    return choices
