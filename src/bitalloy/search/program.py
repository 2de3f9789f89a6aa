"""Choose the scheme of every unit: a mixed-integer program for the additive part of the damage.

The program (HiGHS, through scipy) has a binary variable x for each unit and each scheme beside the baseline that the
unit may run in, a variable y for each site that depends on the schemes at both ends of an edge, and a variable z for
each conversion on a tensor. Solved for the least damage or the least latency, it holds that

    sum_s x_us <= 1                        a unit has one scheme
    y_e >= x_us, y_e >= x_vt               a site is rounded where the scheme at either end asks for it
    z_c >= x_us - x_vt                     a conversion is paid where the schemes at both ends differ so
    w_f >= x_us                            a form of a weight that several units read is paid once
    damage_h = sum D_hx x + sum D_hy y     relative error energy of head h, with sites taken as independent
    latency  = fixed + units + borders     from the cost table

It knows nothing of how errors add up: `search.front.polish` goes on from its solution with the damage of whole plans.
This module sees tables, not graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from bitalloy.core.plans import SharedWeight
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitEdge
from bitalloy.measure.prices import conversion_prices
from bitalloy.search.problem import Problem
from bitalloy.search.withheld import withheld
from bitalloy.sensitivity.matrix import straight
from bitalloy.targets.placement import (
    Conversion,
    Site,
    conversions,
    own_sites,
    possible_sites,
    roundings,
    scheme_pairs,
)

TIE = 1e-4
"""Weight of what is not minimized, so that it decides between equals: all damage against the float model's latency, or
the reverse. The solver takes coefficients below 1e-7 for none."""
NODE_LIMIT = 2000
"""Nodes of the solver's tree after which it stops. Not a time: the same input gives the same plan on any machine."""
GAP = 0.005
"""Proven distance to the optimum at which the solver stops."""

Pairs: TypeAlias = set[tuple[str, str]]
"""Schemes of the units at the two ends of a tensor."""

STRAY = b"HighsMipSolverData::transformNewIntegerFeasibleSolution"
"""Beginning of a line that HiGHS prints for its own developers, also where its output is off, as it is here."""


@dataclass(frozen=True)
class Limits:
    """The limits of a budget in the units of the search."""

    latency_us: float = np.inf
    size_bytes: float = np.inf
    damage: tuple[float, ...] = ()
    """Relative error energy allowed on each head, infinite where there is no limit; empty without any."""

    def damages(self, heads: int) -> np.ndarray:
        """Return the limits on damage as an array (heads,)."""
        return np.array(self.damage) if self.damage else np.full(heads, np.inf)


@dataclass(frozen=True)
class Solution:
    """What the solver found for one set of limits."""

    plan: Plan
    gap: float
    """Part of what was minimized (additive damage, or what is saved in latency) that is not proven to be optimal."""
    solved: bool
    """False where it stopped at `NODE_LIMIT`, so that the gap may be larger than was asked for."""


class Program:
    """The mixed-integer program, built once and solved for many limits.

    Variables: one for each choice of a unit; one for each site and for each conversion that depends on two units.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._index = {c: i for i, c in enumerate((u, s) for u, schemes in problem.choices.items() for s in schemes)}
        self._count = len(self._index)
        # sum of coefficients * variables >= bound; a unit has one scheme
        self._conditions: list[tuple[dict[int, float], float]] = [
            ({self._index[u, s]: -1.0 for s in schemes}, -1.0)
            for u, schemes in problem.choices.items()
            if len(schemes) > 1
        ]
        self._prices = conversion_prices(problem.cost)
        self._borders: dict[tuple[str, Conversion], int] = {}
        """(tensor, conversion) -> variable."""
        self._terms: list[tuple[int, np.ndarray]] = []
        """Variable, damage per head."""
        latency: dict[int, float] = {}
        saved: dict[int, float] = {}
        for entry in problem.cost.units:
            for scheme in problem.choices.get(entry.unit, ()):
                latency[self._index[entry.unit, scheme]] = -entry.saved_us(scheme)
                saved[self._index[entry.unit, scheme]] = entry.saved_bytes(scheme)
        for weight in problem.cost.shared:
            self._add_shared(weight, saved)
        for unit in problem.units.units:
            for scheme in unit.choices:
                self._add_damage(self._index[unit.id, scheme], own_sites(unit, problem.units.scheme(scheme)))
        for edge in problem.units.edges:
            self._add_sites(edge)
            self._add_conversions(edge, latency, saved, rounding=True)
        for edge in problem.units.edges:
            self._add_conversions(edge, latency, saved, rounding=False)
        heads = len(problem.matrix.heads)
        self._damage = np.zeros((heads, self._count))
        for variable, values in self._terms:
            self._damage[:, variable] += values
        self._latency = np.zeros(self._count)
        self._latency[list(latency)] = list(latency.values())
        self._size = np.zeros(self._count)
        self._size[list(saved)] = [-b for b in saved.values()]
        self._float_us = problem.latency_us(Plan())
        self._least = np.zeros(self._count)
        self._least[[self._index[c] for c in problem.fixed.items()]] = 1.0
        self._rows = self._matrix(self._conditions)
        self._lower = np.array([bound for _, bound in self._conditions])

    def _add_shared(self, weight: SharedWeight, saved: dict[int, float]) -> None:
        """Add the bytes of a constant that several units read: of each form, where any of them reads it.

        Case 1. The float model holds the form: a variable that it is gone, at most the choices that leave it.
        Case 2. It does not: a variable that it is there, at least each choice that reads it.
        """
        before = {form for known in weight.forms.values() for form in known.get(BASELINE, ())}
        for form, size in weight.bytes.items():
            variable = self._new()
            saved[variable] = size if form in before else -size
            for unit, known in weight.forms.items():
                choices = {s: self._index[unit, s] for s in self._problem.choices.get(unit, ())}
                if form in before and form in known.get(BASELINE, ()):
                    left = {i: 1.0 for s, i in choices.items() if form not in known.get(s, ())}
                    self._conditions.append(({**left, variable: -1.0}, 0.0))
                reading = [i for s, i in choices.items() if form in known.get(s, ())]
                if form in before and form not in known.get(BASELINE, ()):
                    self._conditions += [({i: -1.0, variable: -1.0}, -1.0) for i in reading]
                if form not in before:
                    self._conditions += [({variable: 1.0, i: -1.0}, 0.0) for i in reading]

    def _add_damage(self, variable: int, sites: Iterable[Site]) -> None:
        column = self._problem.matrix.column
        for site in sites:
            if site.id in column:
                self._terms.append((variable, self._problem.site_damage[:, column[site.id]]))

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _add_sites(self, edge: UnitEdge) -> None:
        """Add the damage of a tensor's sites: to a choice where one end decides, else to a variable of its own."""
        pairs = list(scheme_pairs(self._problem.units, edge))
        everywhere = {(source.name, sink.name) for source, sink in pairs}
        sites = possible_sites(self._problem.units, edge)
        for site in sorted(sites, key=lambda s: not s.again):
            if site.id not in self._problem.matrix.column:
                continue
            given = {(a.name, b.name) for a, b in pairs if site.id in {s.id for s in roundings(edge, a, b)}}
            deciders = self._deciders(edge, given, everywhere)
            variables = [self._new()] if deciders is None else deciders
            for variable in variables:
                self._add_damage(variable, [site])
            if deciders is None:
                self._require(variables[0], edge, given, everywhere)

    def _deciders(self, edge: UnitEdge, given: Pairs, everywhere: Pairs) -> list[int] | None:
        """Find the choices of one end alone that decide whether the given pairs apply; None without such."""
        for end, unit in ((0, edge.producer), (1, edge.consumer)):
            schemes = {pair[end] for pair in given}
            if unit and BASELINE not in schemes and given == {p for p in everywhere if p[end] in schemes}:
                return [self._index[unit, scheme] for scheme in sorted(schemes)]
        return None

    def _require(self, variable: int, edge: UnitEdge, given: Pairs, everywhere: Pairs) -> None:
        """Add conditions that a variable is 1 for the given pairs of schemes at the two ends of a tensor.

        Case 1. A scheme of one end alone suffices: the variable is at least the choice.
        Case 2. It suffices but for some schemes at the other end: at least the choice less those.
        Case 3. It does with some schemes at the other end, and not with the baseline: at least their sum less 1.
        """
        ends = ((0, edge.producer, edge.consumer), (1, edge.consumer, edge.producer))
        left = set(given)
        for case in (1, 2, 3):
            for end, unit, other in ends:
                for scheme in sorted({pair[end] for pair in left} - {BASELINE}):
                    own = {pair for pair in everywhere if pair[end] == scheme}
                    without = {pair[1 - end] for pair in own - given}
                    if not own & left or case != (1 if not without else 3 if BASELINE in without else 2):
                        continue
                    terms = {variable: 1.0, self._index[unit or "", scheme]: -1.0}
                    if case == 2:
                        terms.update({self._index[other or "", s]: 1.0 for s in sorted(without)})
                    if case == 3:
                        terms.update({self._index[other or "", p[1 - end]]: -1.0 for p in sorted(own & given)})
                    self._conditions.append((terms, -1.0 if case == 3 else 0.0))
                    left -= own

    def _add_conversions(
        self, edge: UnitEdge, latency: dict[int, float], saved: dict[int, float], *, rounding: bool
    ) -> None:
        """Add the price of a tensor's conversions, rounding or other ones, once for all its edges."""
        if edge.producer == edge.consumer:
            return
        pairs = list(scheme_pairs(self._problem.units, edge))
        everywhere = {(source.name, sink.name) for source, sink in pairs}
        where: dict[Conversion, Pairs] = {}
        for source, sink in pairs:
            for conversion in conversions(edge, source, sink):
                where.setdefault(conversion, set()).add((source.name, sink.name))
        for conversion in sorted(where, key=lambda c: (c.source == "", c.source == BASELINE, c)):
            price = self._prices.get(conversion)
            if price is None or conversion.rounding is not rounding:
                continue
            if not any((price.us, price.us_per_element, price.bytes)):
                continue
            key = edge.tensor, conversion
            if key not in self._borders:
                self._borders[key] = self._new()
                latency[self._borders[key]] = price.price_us(edge.elements)
                saved[self._borders[key]] = -price.bytes
            self._require(self._borders[key], edge, where[conversion], everywhere)

    def solve(self, limits: Limits, *, minimize: str, gap: float = GAP) -> Solution | None:
        """Find the plan with the least `damage` or `latency` within limits; None where the solver finds none."""
        scale = np.maximum(self._damage.sum(axis=1), 1e-30)
        bounds = [
            (self._latency, limits.latency_us - self._float_us),
            (self._size, limits.size_bytes - self._problem.float_bytes),
            *((row / s, d / s) for row, s, d in zip(self._damage, scale, self._allowed(limits), strict=True)),
        ]
        if not self._count:  # no unit has a choice
            return Solution(Plan(), gap=0.0, solved=True) if min(bound for _, bound in bounds) >= 0 else None
        constraints = [LinearConstraint(self._rows, self._lower, np.inf)] if self._lower.size else []
        constraints += [LinearConstraint(row[None, :], -np.inf, bound) for row, bound in bounds if np.isfinite(bound)]
        share = self._problem.aims @ self._damage
        whole = max(float(share.sum()), 1e-30)
        slow = self._latency / max(self._float_us, 1.0)
        goal = slow + TIE * share / whole if minimize == "latency" else share / whole + TIE * slow
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
        plan = Plan(choice for choice, i in self._index.items() if result.x[i] > 0.5)
        return Solution(plan=plan, gap=round(proven, 6), solved=result.status == 0)

    def _allowed(self, limits: Limits) -> np.ndarray:
        """Return the linear damage per head that the limit leaves room for."""
        damages = limits.damages(len(self._damage))
        return np.where(np.isfinite(damages), straight(self._problem.secant, damages), np.inf)

    def _matrix(self, rows: list[tuple[dict[int, float], float]]) -> coo_array:
        at = [(r, c, v) for r, (terms, _) in enumerate(rows) for c, v in terms.items()]
        r, c, v = zip(*at, strict=True) if at else ((), (), ())
        return coo_array((np.array(v, float), (np.array(r, int), np.array(c, int))), shape=(len(rows), self._count))
