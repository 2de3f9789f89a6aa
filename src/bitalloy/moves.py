"""What flipping single units between float and INT8 does to a plan: all flips at once, from the tables.

The same numbers as `UnitGraph.rounded`, `UnitGraph.borders` and `ProbeMatrix.damage` give for every flipped plan by
itself. A flip touches the unit's own sites, the edges beside it and the borders on their tensors, so that hundreds of
neighbouring plans come down to a few products of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitalloy.matrix import ProbeMatrix, shrink
from bitalloy.plans import CostTable
from bitalloy.records import AGAIN, UnitGraph


@dataclass(frozen=True)
class Flips:
    """Plans that differ from one plan in a single unit, in the order of the units of `Moves`."""

    together: np.ndarray
    """(flips, heads): relative error energy of the plan, interactions included."""
    alone: np.ndarray
    """(flips, heads): the same with sites taken as independent."""
    latency_us: np.ndarray
    """(flips,)"""
    saved_bytes: np.ndarray
    """(flips,)"""


class Moves:
    """Flips of units.

    Args:
        units: of the model.
        free: ids of those that may be flipped.
        matrix: probe matrix.
        cost: of units and borders.
    """

    def __init__(self, units: UnitGraph, free: Sequence[str], matrix: ProbeMatrix, cost: CostTable) -> None:
        self._units, self._matrix, self._cost = units, matrix, cost
        self._index = {u: i for i, u in enumerate(free)}
        column, outside = matrix.column, len(free)
        self._sites = len(matrix.sites)  # one more column stands for "no site"
        own = [
            (column[s], self._index[u.id])
            for u in units.units
            if u.id in self._index
            for s in (*(w.id for w in u.weights), *(e.id for e in u.inner))
            if s in column
        ]
        self._own = np.array(own, np.int64).reshape(-1, 2)
        edges = units.edges
        self._producer = np.array([self._index.get(e.producer or "", outside) for e in edges], np.int64)
        self._consumer = np.array([self._index.get(e.consumer or "", outside) for e in edges], np.int64)
        self._rooted = np.array([e.rooted for e in edges], bool)
        self._entering = np.array([column.get(e.id, self._sites) for e in edges], np.int64)
        self._leaving = np.array(
            [column.get(e.id + AGAIN if e.passed_on else e.id, self._sites) for e in edges], np.int64
        )
        tensors: dict[str, int] = {}
        self._tensor = np.array([tensors.setdefault(e.tensor, len(tensors)) for e in edges], np.int64)
        price = np.zeros(len(tensors))
        price[self._tensor] = [cost.border_us + e.elements * cost.border_us_per_element for e in edges]
        self._price = np.repeat(price, 2)  # to INT8 and back
        times = {c.unit: c for c in cost.units}
        alone = [frozenset({u}) for u in free]
        self._gain_us = np.array([times[u].us(one) - times[u].fp32_us for u, one in zip(free, alone, strict=True)])
        self._gain_bytes = np.array([times[u].saved_bytes(one) for u, one in zip(free, alone, strict=True)], np.float64)
        self._rows = [r.astype(np.float64) for r in matrix.rows]
        self._squares = [o.astype(np.float64) for o in matrix.own]
        self._energy = matrix.energy.mean(axis=0)
        self._site_damage = matrix.site_damage().mean(axis=0)

    def flips(self, int8: frozenset[str]) -> Flips:
        """All plans that are one flip away from a plan."""
        count = len(self._index)
        state = np.zeros(count + 1, bool)
        state[[self._index[u] for u in int8]] = True
        turn = np.where(state[:count], -1.0, 1.0)
        chosen = self._matrix.select(self._units.rounded(int8))
        change = self._changes(state, turn)
        latency = self._cost.latency_us(self._units, int8) + turn * self._gain_us + self._borders(state)
        together = []
        for rows, squares, energy in zip(self._rows, self._squares, self._energy, strict=True):
            total = (rows @ chosen)[..., None] + rows @ change
            own = (squares @ chosen)[..., None] + squares @ change
            products = np.square(total) - own
            together.append((own.mean(axis=(0, 1)) + shrink(products) * products.mean(axis=(0, 1))) / energy)
        alone = (self._site_damage @ chosen)[:, None] + self._site_damage @ change
        saved = self._cost.saved_bytes(int8) + turn * self._gain_bytes
        return Flips(np.stack(together, axis=1), alone.T, latency, saved)

    def _changes(self, state: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """(sites, flips): +1 where a flip rounds a site, -1 where it no longer does."""
        change = np.zeros((self._sites + 1, len(self._index)))
        site, unit = self._own.T
        change[site, unit] = turn[unit]
        up, down = state[self._producer], state[self._consumer]
        before = self._site(up, down)
        for unit, after in self._beside(up, down):
            moved = unit < len(self._index)
            site = self._site(*after)
            np.add.at(change, (site[moved], unit[moved]), 1.0)
            np.add.at(change, (before[moved], unit[moved]), -1.0)
        return change[:-1]

    def _borders(self, state: np.ndarray) -> np.ndarray:
        """(flips,): change of the price of borders, once per tensor and direction."""
        count = len(self._index)
        up, down = state[self._producer], state[self._consumer]
        crossing = np.zeros(len(self._price))
        np.add.at(crossing, (2 * self._tensor + up)[up != down], 1.0)
        change = np.zeros((len(self._price), count))
        for unit, (one, two) in self._beside(up, down):
            moved = unit < count
            for sign, (a, b) in ((-1.0, (up, down)), (1.0, (one, two))):
                border = moved & (a != b)
                np.add.at(change, ((2 * self._tensor + a)[border], unit[border]), sign)
        after = crossing[:, None] + change > 0.5
        return np.asarray(self._price @ (after.astype(np.float64) - (crossing > 0.5)[:, None]))

    def _beside(self, up: np.ndarray, down: np.ndarray) -> tuple[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]], ...]:
        """For either end of the edges: the unit there, and the ends' precisions after its flip."""
        outside, loop = len(self._index), self._producer == self._consumer
        consumer = np.where(loop, outside, self._consumer)  # a unit that feeds itself is flipped once
        return (self._producer, (~up, np.where(loop, ~down, down))), (consumer, (up, ~down))

    def _site(self, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        """Column that each edge rounds, for the precisions of its ends; see `UnitEdge.site`."""
        entering = np.where(down & ~up, self._entering, self._sites)
        return np.where(self._rooted & up, self._leaving, entering)
