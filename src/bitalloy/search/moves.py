"""What moving single units to another precision does to a plan: all moves at once, from the tables.

The same numbers as `UnitGraph.rounded`, `borders` and `casts` and `ProbeMatrix.damage` give for every plan by itself.
A move touches the unit's own sites, the edges beside it and the borders on their tensors, so that hundreds of
neighbouring plans come down to a few products with sparse matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from bitalloy.core.plans import CostTable
from bitalloy.core.records import AGAIN, HALF
from bitalloy.core.units import Placement, UnitGraph
from bitalloy.sensitivity.matrix import ProbeMatrix, shrink


@dataclass(frozen=True)
class Neighbours:
    """Plans that differ from one plan in a single unit, in the order of the moves."""

    together: np.ndarray
    """(moves, heads): relative error energy of the plan, interactions included."""
    alone: np.ndarray
    """(moves, heads): the same with sites taken as independent."""
    latency_us: np.ndarray
    """(moves,)"""
    saved_bytes: np.ndarray
    """(moves,)"""


@dataclass(frozen=True)
class _Ends:
    """Precisions of the units at both ends of some edges."""

    edge: np.ndarray
    up8: np.ndarray
    down8: np.ndarray
    up16: np.ndarray
    down16: np.ndarray


_Crossing = Callable[[_Ends], tuple[np.ndarray, np.ndarray]]
"""Of edges: whether there is a border of some kind, and its direction."""


class Moves:
    """Moves of units between precisions.

    Args:
        units: of the model.
        moves: id of a unit that goes to INT8, with `HALF` behind to FP16; where it is there already, back to FP32.
        matrix: probe matrix.
        cost: of units, borders and casts.
    """

    def __init__(self, units: UnitGraph, moves: Sequence[str], matrix: ProbeMatrix, cost: CostTable) -> None:
        self._units, self._matrix, self._cost = units, matrix, cost
        self._place = place = {u.id: i for i, u in enumerate(units.units)}
        outside, column, edges = len(place), matrix.column, units.edges
        self._sites = len(matrix.sites)  # one more stands for "no site"
        self._unit = np.array([place[m.removesuffix(HALF)] for m in moves], np.int64)
        self._to16 = np.array([m.endswith(HALF) for m in moves], bool)
        of: dict[int, list[int]] = {}
        for move, unit in enumerate(self._unit):
            of.setdefault(int(unit), []).append(move)

        own = []  # site, move, whether it is the one of FP16
        for i, unit in enumerate(units.units):
            sites = [(w.id, False) for w in unit.weights] + [(e.id, False) for e in unit.inner]
            sites.append((unit.id + HALF, True))
            own += [(column[s], move, half) for s, half in sites if s in column for move in of.get(i, ())]
        self._own = np.array(own, np.int64).reshape(-1, 3).T

        self._up, self._down = (
            np.array([place.get(end or "", outside) for end in ends], np.int64)
            for ends in ([e.producer for e in edges], [e.consumer for e in edges])
        )
        beside = [
            (i, move)
            for i in range(len(edges))
            for end in {self._up[i], self._down[i]}
            for move in of.get(int(end), ())
        ]
        self._edge, self._mover = np.array(beside, np.int64).reshape(-1, 2).T
        self._ends = np.array([e.placement is Placement.ENDS for e in edges], bool)
        self._entry = np.array([e.placement is Placement.ENTRY for e in edges], bool)
        self._rooted = np.array([e.rooted for e in edges], bool)
        self._entering = np.array([column.get(e.id, self._sites) for e in edges], np.int64)
        self._leaving = np.array(
            [column.get(e.id + AGAIN if e.passed_on else e.id, self._sites) for e in edges], np.int64
        )
        tensors: dict[str, int] = {}
        self._tensor = np.array([tensors.setdefault(e.tensor, len(tensors)) for e in edges], np.int64)
        elements = np.zeros(len(tensors))
        elements[self._tensor] = [e.elements for e in edges]
        # of a tensor and a direction: once, however many edges cross there
        self._border_us = np.repeat(cost.border_us + elements * cost.border_us_per_element, 2)
        self._cast_us = np.repeat(cost.cast_us + elements * cost.cast_us_per_element, 2)
        keys = (2 * self._tensor[self._edge])[:, None] + np.arange(2)
        pairs, at = np.unique(keys * len(self._unit) + self._mover[:, None], return_inverse=True)
        self._key, self._pair_mover = np.divmod(pairs, max(len(self._unit), 1))
        self._pair = at.reshape(keys.shape)

        times = {c.unit: c for c in cost.units}
        given = [(times[u], [frozenset[str](), frozenset({u}), frozenset({u + HALF})]) for u in place]
        self._us = np.array([[c.us(p) for p in plans] for c, plans in given])
        self._bytes = np.array([[c.saved_bytes(p) for p in plans] for c, plans in given], np.float64)
        self._rows = [r.reshape(-1, self._sites).T.astype(np.float64) for r in matrix.rows]
        self._squares = [o.reshape(-1, self._sites).T.astype(np.float64) for o in matrix.own]
        self._energy = matrix.energy.mean(axis=0)
        self._site_damage = matrix.site_damage().mean(axis=0)

    def neighbours(self, plan: frozenset[str]) -> Neighbours:
        """All plans that are one move away from a plan."""
        in8, in16 = np.zeros((2, len(self._place) + 1), bool)
        for member in plan:
            (in16 if member.endswith(HALF) else in8)[self._place[member.removesuffix(HALF)]] = True
        there = np.where(self._to16, in16[self._unit], in8[self._unit])
        to8, to16 = ~self._to16 & ~there, self._to16 & ~there
        before, after = self._beside(in8, in16, to8, to16)
        chosen = self._matrix.select(self._units.rounded(plan))
        change = self._changes(in8, in16, to8, to16, before, after)

        was, now = (one + 2 * two for one, two in ((in8[self._unit], in16[self._unit]), (to8, to16)))
        latency = self._cost.latency_us(self._units, plan) + self._us[self._unit, now] - self._us[self._unit, was]
        for price, crossing in ((self._border_us, self._borders), (self._cast_us, self._casts)):
            latency = latency + self._priced(price, crossing, self._everywhere(in8, in16), before, after)
        saved = self._cost.saved_bytes(plan) + self._bytes[self._unit, now] - self._bytes[self._unit, was]
        together = []
        for rows, squares, energy in zip(self._rows, self._squares, self._energy, strict=True):
            total, own = ((chosen @ part + change @ part).T for part in (rows, squares))
            products = np.square(total) - own
            kept = shrink(products.reshape(self._matrix.samples, -1, products.shape[1]))
            together.append((own.mean(axis=0) + kept * products.mean(axis=0)) / energy)
        alone = self._site_damage @ chosen + change @ self._site_damage.T
        return Neighbours(np.stack(together, axis=1), np.asarray(alone), latency, saved)

    def _everywhere(self, in8: np.ndarray, in16: np.ndarray) -> _Ends:
        """Of all edges, before any move."""
        up, down = self._up, self._down
        return _Ends(np.arange(len(up)), in8[up], in8[down], in16[up], in16[down])

    def _beside(self, in8: np.ndarray, in16: np.ndarray, to8: np.ndarray, to16: np.ndarray) -> tuple[_Ends, _Ends]:
        """Of the edges beside each move's unit, before and after the move."""
        up, down = self._up[self._edge], self._down[self._edge]
        unit = self._unit[self._mover]
        before = _Ends(self._edge, in8[up], in8[down], in16[up], in16[down])
        new8, new16 = to8[self._mover], to16[self._mover]
        moved = (
            np.where(end == unit, new, old)
            for new, old_of in ((new8, in8), (new16, in16))
            for end, old in ((up, old_of[up]), (down, old_of[down]))
        )
        return before, _Ends(self._edge, *moved)

    def _changes(
        self, in8: np.ndarray, in16: np.ndarray, to8: np.ndarray, to16: np.ndarray, before: _Ends, after: _Ends
    ) -> csr_array:
        """(moves, sites): +1 where a move rounds a site, -1 where it no longer does."""
        site, move, half = self._own
        unit = self._unit[move]
        turned = np.where(half, to16[move].astype(np.int8) - in16[unit], to8[move].astype(np.int8) - in8[unit])
        one, two = self._site(before), self._site(after)
        sites = np.concatenate([site, one, two])
        moves = np.concatenate([move, self._mover, self._mover])
        values = np.concatenate([turned, np.full(len(one), -1), np.full(len(two), 1)]).astype(np.float64)
        real = sites < self._sites
        return csr_array((values[real], (moves[real], sites[real])), shape=(len(self._unit), self._sites))

    def _site(self, ends: _Ends) -> np.ndarray:
        """Column that each edge rounds; see `UnitEdge.site`."""
        edge, up, down = ends.edge, ends.up8, ends.down8
        entering = down & (self._entry[edge] | (self._ends[edge] & ~up))
        found = np.where(entering, self._entering[edge], self._sites)
        return np.where(self._ends[edge] & self._rooted[edge] & up, self._leaving[edge], found)

    def _borders(self, ends: _Ends) -> tuple[np.ndarray, np.ndarray]:
        """Where INT8 begins (direction 0) or ends (1) at a price, and which; see `UnitGraph.borders`."""
        priced = self._ends[ends.edge] | (self._entry[ends.edge] & ~ends.up8)
        return (ends.up8 != ends.down8) & priced, ends.up8

    def _casts(self, ends: _Ends) -> tuple[np.ndarray, np.ndarray]:
        """Where FP16 begins (0) or ends (1) beside FP32, and which; see `UnitGraph.casts`."""
        return ~ends.up8 & ~ends.down8 & (ends.up16 != ends.down16), ends.up16

    def _priced(
        self, price: np.ndarray, crossing: _Crossing, everywhere: _Ends, before: _Ends, after: _Ends
    ) -> np.ndarray:
        """(moves,): change of the price of borders of one kind, once per tensor and direction."""
        crosses, way = crossing(everywhere)
        count = np.bincount((2 * self._tensor + way)[crosses], minlength=len(price))[self._key]
        change = np.zeros(len(self._key))
        for sign, ends in ((-1.0, before), (1.0, after)):
            crosses, way = crossing(ends)
            pair = np.take_along_axis(self._pair, way.astype(np.int64)[:, None], axis=1)[:, 0]
            change += sign * np.bincount(pair[crosses], minlength=len(change))
        turned = (count + change > 0.5).astype(np.float64) - (count > 0.5)
        return np.bincount(self._pair_mover, weights=price[self._key] * turned, minlength=len(self._unit))
