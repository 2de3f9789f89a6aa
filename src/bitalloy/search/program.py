"""Choose the precision of every unit: a mixed-integer program for the additive part, local search for interactions.

The program (HiGHS, through scipy) has a binary variable per unit and precision below FP32 that the unit may take (x for
INT8, h for FP16, x + h <= 1), a rounding variable y per edge, and border variables z and c per tensor and direction:

    y_e >= x_producer, y_e >= x_consumer          an edge is rounded when either side is INT8, or as the target rounds
    z_t >= x_producer - x_consumer                a border costs where INT8 begins or ends (and the reverse)
    c_t >= h_producer - h_consumer - x_consumer   or where FP16 meets FP32 (and the reverse)
    damage_h = sum_w D_wh x + sum_e D_eh y        relative error energy of head h, sites taken as independent
    latency  = fixed + sum of units + sum of borders

The probe matrix knows more than the program: it gives the damage of whole sets of sites, with their interactions.
Local search flips units while that damage falls. With few rows the interaction terms are noisy, and a search over
thousands of plans would fit the noise; so they enter with half their weight (`SHRINK`), the additive part in full.

This module sees tables, not graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from bitalloy.core.plans import CostTable
from bitalloy.core.records import AGAIN, HALF, Precision, Secant
from bitalloy.core.units import Placement, UnitGraph
from bitalloy.model.heads import DETECTIONS
from bitalloy.search.moves import Moves
from bitalloy.search.withheld import withheld
from bitalloy.sensitivity.matrix import ProbeMatrix, bend, straight

SHRINK = 0.5
NODE_LIMIT = 2000
"""Nodes of the solver's tree after which it stops. Not a time: the same input gives the same plan on any machine."""
GAP = 0.005
"""Proven distance to the optimum at which the solver stops."""

STRAY = b"HighsMipSolverData::transformNewIntegerFeasibleSolution"
"""Beginning of a line that HiGHS prints for its own developers, also where its output is off, as it is here."""


@dataclass(frozen=True)
class Limits:
    """A budget in the search's own units."""

    latency_us: float = np.inf
    size_bytes: float = np.inf
    damage: tuple[float, ...] = ()
    """Of each head, as relative error energy, infinite where there is no limit; empty without any."""

    def damages(self, heads: int) -> np.ndarray:
        """(heads,): the limits on damage."""
        return np.array(self.damage) if self.damage else np.full(heads, np.inf)


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
        """Units that may run below FP32, in graph order."""
        return tuple(u.id for u in self.units.units if u.lowest is not None)

    @cached_property
    def members(self) -> Mapping[str, tuple[str, ...]]:
        """Each of these units -> what a plan may hold of it: in INT8, in FP16."""
        names = {Precision.INT8: "", Precision.FP16: HALF}
        return {
            u.id: tuple(u.id + end for precision, end in names.items() if precision in u.allowed)
            for u in self.units.units
            if u.lowest is not None
        }

    @cached_property
    def fixed(self) -> frozenset[str]:
        """The least that every plan holds: units that may not run in FP32."""
        return frozenset(u.lowest for u in self.units.units if u.lowest and Precision.FP32 not in u.allowed)

    @cached_property
    def moves(self) -> tuple[str, ...]:
        """What a single unit may change to: each stands for its unit going there, or back to FP32 where it is there."""
        choice = {u.id for u in self.units.units if len(u.allowed) > 1}
        return tuple(m for unit in self.free if unit in choice for m in self.members[unit])

    def moved(self, plan: frozenset[str], member: str) -> frozenset[str]:
        """A plan after one of the `moves`."""
        kept = plan.difference(self.members[member.removesuffix(HALF)])
        return kept if member in plan else kept | {member}

    @cached_property
    def site_damage(self) -> np.ndarray:
        """(heads, sites): mean relative error energy of each site alone."""
        return np.asarray(self.matrix.site_damage().mean(axis=0))

    def damage(self, plan: frozenset[str]) -> np.ndarray:
        """(heads,): relative error energy of a plan, interactions shrunk by `SHRINK`, corrected by the secant."""
        chosen = self.matrix.select(self.units.rounded(plan))
        together = self.matrix.damage(chosen).mean(axis=0)
        linear = np.asarray(SHRINK * together + (1 - SHRINK) * (self.site_damage @ chosen))
        return np.asarray(linear * bend(self.secant, linear))

    def neighbours(self, plan: frozenset[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the plans one move away, in the order of `moves`: damage (moves, heads), latency in us, bytes."""
        found = self._neighbours.neighbours(plan)
        linear = SHRINK * found.together + (1 - SHRINK) * found.alone
        damage = np.asarray(linear * bend(self.secant, linear))
        return damage, found.latency_us, self.float_bytes - found.saved_bytes

    @cached_property
    def _neighbours(self) -> Moves:
        return Moves(self.units, self.moves, self.matrix, self.cost)

    @cached_property
    def aims(self) -> np.ndarray:
        """(heads,): weights of the heads in the one number that is minimized.

        Each head counts by its share of the damage that rounding everything does to it, so that none drowns the
        others. Where detections are judged, the plain boxes, nearly all of them of anchors that see nothing, are not.
        Divergences are not: they are made of heads that are judged already.
        """
        heads = self.matrix.heads
        judged = self.matrix.plain & np.array([h != "boxes" or DETECTIONS not in heads for h in heads])
        whole = self.site_damage @ self.matrix.select(self.units.rounded(self.units.lowest()))
        return np.asarray(np.where(judged & (whole > 0), 1 / np.maximum(whole, 1e-30), 0.0) / judged.sum())

    def total(self, plan: frozenset[str]) -> float:
        """What is minimized: damage of a plan, summed over the heads by `aims`."""
        return float(self.aims @ self.damage(plan))

    def latency_us(self, plan: frozenset[str]) -> float:
        """Predicted latency of a plan."""
        return self.cost.latency_us(self.units, plan)

    def size_bytes(self, plan: frozenset[str]) -> int:
        """Predicted file size of a plan."""
        return self.float_bytes - self.cost.saved_bytes(plan)


@dataclass(frozen=True)
class Solution:
    """What the solver found for one set of limits."""

    lowered: frozenset[str]
    """The plan."""
    gap: float
    """Part of what was minimized (additive damage, or what INT8 saves in latency) that is not proven to be optimal."""
    solved: bool
    """False where it stopped at `NODE_LIMIT`, so that the gap may be larger than was asked for."""


class Program:
    """The mixed-integer program, built once and solved for many limits."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        units, cost = problem.units, problem.cost
        self._index = {m: i for i, m in enumerate(m for members in problem.members.values() for m in members)}
        # sum of coefficients * variables >= bound; a unit has one precision
        several = [members for members in problem.members.values() if len(members) > 1]
        rows: list[tuple[dict[int, float], float]] = [({self._index[m]: -1.0 for m in ms}, -1.0) for ms in several]
        count = len(self._index)
        damage: list[tuple[int, np.ndarray]] = []
        latency: dict[int, float] = {}
        saved: dict[int, int] = {}
        for entry in cost.units:
            for member in problem.members.get(entry.unit, ()):
                latency[self._index[member]] = entry.us(frozenset({member})) - entry.fp32_us
                saved[self._index[member]] = entry.saved_bytes(frozenset({member}))
        table, column = problem.site_damage, problem.matrix.column
        for unit in units.units:
            if unit.id in self._index:
                sites = [s for s in [*(w.id for w in unit.weights), *(e.id for e in unit.inner)] if s in column]
                damage += [(self._index[unit.id], table[:, column[s]]) for s in sites]
            if unit.id + HALF in self._index and unit.id + HALF in column:
                damage.append((self._index[unit.id + HALF], table[:, column[unit.id + HALF]]))
        borders: dict[tuple[str, int], int] = {}
        for edge in units.edges:
            a, b = self._index.get(edge.producer or ""), self._index.get(edge.consumer or "")
            if a is not None and edge.rooted and edge.passed_on and edge.id + AGAIN in column:
                damage.append((a, table[:, column[edge.id + AGAIN]]))
            if edge.placement is not Placement.ENDS:
                if edge.placement is Placement.ENTRY and b is not None and edge.id in column:
                    damage.append((b, table[:, column[edge.id]]))
            elif edge.id in column and (a is not None or b is not None):
                y, count = count, count + 1
                damage.append((y, table[:, column[edge.id]]))
                if edge.rooted and a is not None and not edge.passed_on:
                    rows.append(({y: 1.0, a: -1.0}, 0.0))
                    if b is not None and b != a:
                        rows.append(({y: 1.0, b: -1.0}, 0.0))
                elif b is not None and b != a:
                    rows.append(({y: 1.0, b: -1.0, **({a: 1.0} if a is not None else {})}, 0.0))
            if a == b:
                continue
            price = cost.border_us + edge.elements * cost.border_us_per_element
            for direction, (up, down) in enumerate(((a, b), (b, a))):
                if up is None or not edge.crossing(leaving=direction == 0):
                    continue
                key = (edge.tensor, direction)
                if key not in borders:
                    borders[key], count = count, count + 1
                    latency[borders[key]] = price
                rows.append(({borders[key]: 1.0, up: -1.0, **({down: 1.0} if down is not None else {})}, 0.0))
        for edge in units.edges if cost.cast_us or cost.cast_us_per_element else ():
            price = cost.cast_us + edge.elements * cost.cast_us_per_element
            ends = (edge.producer or "", edge.consumer or "")
            for direction, (one, other) in enumerate((ends, ends[::-1])):
                start = self._index.get(one + HALF)
                if start is None or one == other:
                    continue
                key = (edge.tensor, 2 + direction)
                if key not in borders:
                    borders[key], count = count, count + 1
                    latency[borders[key]] = price
                free = (self._index[m] for m in problem.members.get(other, ()))
                rows.append(({borders[key]: 1.0, start: -1.0, **dict.fromkeys(free, 1.0)}, 0.0))
        self._count = count
        heads = len(problem.matrix.heads)
        self._damage = np.zeros((heads, count))
        for variable, values in damage:
            self._damage[:, variable] += values
        self._latency = np.zeros(count)
        self._latency[list(latency)] = list(latency.values())
        self._size = np.zeros(count)
        self._size[list(saved)] = [-b for b in saved.values()]
        self._float_us = problem.latency_us(frozenset())
        self._least = np.zeros(count)
        self._least[[self._index[m] for m in problem.fixed]] = 1.0
        self._rows = self._matrix(rows)
        self._lower = np.array([bound for _, bound in rows])

    def solve(self, limits: Limits, *, minimize: str, gap: float = GAP) -> Solution | None:
        """The plan with the least `damage` or `latency` within limits; None where the solver finds none."""
        scale = np.maximum(self._damage.sum(axis=1), 1e-30)
        bounds = [
            (self._latency, limits.latency_us - self._float_us),
            (self._size, limits.size_bytes - self._problem.float_bytes),
            *((row / s, d / s) for row, s, d in zip(self._damage, scale, self._allowed(limits), strict=True)),
        ]
        constraints = [LinearConstraint(self._rows, self._lower, np.inf)] if self._lower.size else []
        constraints += [LinearConstraint(row[None, :], -np.inf, bound) for row, bound in bounds if np.isfinite(bound)]
        share = self._problem.aims @ self._damage
        whole = max(float(share.sum()), 1e-30)
        tie = 1e-6 * self._latency / max(self._float_us, 1.0) * whole
        goal = self._latency + 1e-9 * share if minimize == "latency" else (share + tie) / whole
        integrality = np.zeros(self._count, np.int8)
        integrality[: len(self._index)] = 1
        with withheld(STRAY):
            result: OptimizeResult = milp(
                goal,
                constraints=constraints,
                integrality=integrality,
                bounds=Bounds(self._least, 1),
                options={"node_limit": NODE_LIMIT, "mip_rel_gap": gap},
            )
        if result.x is None:
            return None
        proven = float(result.mip_gap) if result.mip_gap is not None and np.isfinite(result.mip_gap) else 0.0
        lowered = frozenset(m for m, i in self._index.items() if result.x[i] > 0.5)
        return Solution(lowered=lowered, gap=round(proven, 6), solved=result.status == 0)

    def _allowed(self, limits: Limits) -> np.ndarray:
        """Linear damage per head that the limit leaves room for."""
        damages = limits.damages(len(self._damage))
        return np.where(np.isfinite(damages), straight(self._problem.secant, damages), np.inf)

    def _matrix(self, rows: list[tuple[dict[int, float], float]]) -> coo_array:
        at = [(r, c, v) for r, (terms, _) in enumerate(rows) for c, v in terms.items()]
        r, c, v = zip(*at, strict=True) if at else ((), (), ())
        return coo_array((np.array(v, float), (np.array(r, int), np.array(c, int))), shape=(len(rows), self._count))
