"""What moving single units to another scheme does to a plan: all moves at once, from the tables.

The same numbers as `targets.placement`, `measure.prices` and `ProbeMatrix.damage` give for every plan by itself. A move
touches the unit's own sites, the edges beside it and the borders on their tensors, so that hundreds of neighbouring
plans come down to a few products with sparse matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from bitalloy.core.plans import CostTable
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import UnitEdge, UnitGraph
from bitalloy.measure.prices import border_bytes, conversion_prices, latency_us, saved_bytes, shared_bytes
from bitalloy.sensitivity.matrix import LEAST_ENERGY, ProbeMatrix, shrink
from bitalloy.targets.placement import all_conversions, conversions, own_sites, rounded, roundings


@dataclass(frozen=True)
class Neighbours:
    """Plans that differ from one plan in a single unit, in the order of the moves."""

    together: np.ndarray
    """(moves, heads): relative error energy of the plan, interactions included."""
    alone: np.ndarray
    """(moves, heads): the same with sites taken as independent."""
    latency_us: np.ndarray
    """(moves,): one number for each plan."""
    saved_bytes: np.ndarray
    """(moves,): one number for each plan."""


@dataclass(frozen=True)
class _Ends:
    """Schemes of the units at both ends of some edges, by their number."""

    edge: np.ndarray
    source: np.ndarray
    sink: np.ndarray


class Moves:
    """What each move of a unit to another scheme changes in damage, latency and size.

    Args:
        units: the units of the model.
        moves: (unit, scheme) that it goes to; where it is there already, back to the baseline.
        matrix: probe matrix.
        cost: the cost of units and borders.
    """

    def __init__(
        self, units: UnitGraph, moves: Sequence[tuple[str, str]], matrix: ProbeMatrix, cost: CostTable
    ) -> None:
        self._units, self._matrix, self._cost = units, matrix, cost
        self._place = {u.id: i for i, u in enumerate(units.units)}
        self._number = {scheme.name: i for i, scheme in enumerate(units.schemes)}
        self._baseline = self._number[BASELINE]
        self._sites = len(matrix.sites)  # one more stands for "no site"
        self._unit = np.array([self._place[unit] for unit, _ in moves], np.int64)
        self._scheme = np.array([self._number[scheme] for _, scheme in moves], np.int64)
        self._of: dict[int, list[int]] = {}
        for move, unit in enumerate(self._unit):
            self._of.setdefault(int(unit), []).append(move)
        self._names, self._schemes = list(self._place), list(self._number)
        sharing = {unit for weight in cost.shared for unit in weight.forms}
        self._sharing = [move for move, (unit, _) in enumerate(moves) if unit in sharing]
        self._own = self._own_sites()
        self._read_edges()
        times = {c.unit: c for c in cost.units}
        self._us = self._by_scheme(times[u].us for u in self._place)
        self._bytes = self._by_scheme(times[u].bytes for u in self._place)
        self._rows = [_flat(rows) for rows in matrix.rows]
        self._squares = [_flat(own) for own in matrix.own]
        self._energy = np.maximum(matrix.energy.mean(axis=0), LEAST_ENERGY)
        self._site_damage = matrix.site_damage().mean(axis=0)

    def _by_scheme(self, found: Iterable[dict[str, float] | dict[str, int]]) -> np.ndarray:
        """Make an array (units, schemes) of a number of each unit in each scheme; NaN where it cannot run in it."""
        return np.array([[known.get(name, np.nan) for name in self._number] for known in found], np.float64)

    def _own_sites(self) -> np.ndarray:
        """Make an array (3, n): column of a site in a unit, move of the unit, number of the scheme that rounds it."""
        found = []
        for i, unit in enumerate(self._units.units):
            for name in unit.choices:
                for site in own_sites(unit, self._units.scheme(name)):
                    if site.id in self._matrix.column:
                        column = self._matrix.column[site.id]
                        found += [(column, move, self._number[name]) for move in self._of.get(i, ())]
        return np.array(found, np.int64).reshape(-1, 3).T

    def _read_edges(self) -> None:
        """Read the ends of the edges, which moves touch them, and what lies on them for every pair of schemes."""
        edges, schemes = self._units.edges, self._units.schemes
        outside = len(self._place)
        self._up, self._down = (
            np.array([self._place.get(end or "", outside) for end in ends], np.int64)
            for ends in ([e.producer for e in edges], [e.consumer for e in edges])
        )
        beside = [
            (i, move)
            for i in range(len(edges))
            for end in {self._up[i], self._down[i]}
            for move in self._of.get(int(end), ())
        ]
        self._edge, self._mover = np.array(beside, np.int64).reshape(-1, 2).T

        kinds = {c: i for i, c in enumerate(all_conversions(schemes))}
        self._kinds = len(kinds)
        self._site_of = self._on_pairs(
            edges, schemes, lambda *ends: [self._matrix.column.get(s.id, self._sites) for s in roundings(*ends)]
        )
        self._site_of[self._site_of < 0] = self._sites
        self._kind_of = self._on_pairs(edges, schemes, lambda *ends: [kinds[c] for c in conversions(*ends)])
        tensors: dict[str, int] = {}
        self._tensor = np.array([tensors.setdefault(e.tensor, len(tensors)) for e in edges], np.int64)
        elements = np.zeros(len(tensors))
        elements[self._tensor] = [e.elements for e in edges]
        prices = conversion_prices(self._cost)
        # of a tensor and a conversion: once, however many edges have it
        times, sizes = np.zeros((2, len(tensors), self._kinds))
        for conversion, kind in kinds.items():
            if (price := prices.get(conversion)) is not None:
                times[:, kind] = price.us + elements * price.us_per_element
                sizes[:, kind] = price.bytes
        self._border_us, self._border_bytes = times.reshape(-1), sizes.reshape(-1)
        keys = (self._kinds * self._tensor[self._edge])[:, None] + np.arange(self._kinds)
        pairs, at = np.unique(keys * len(self._unit) + self._mover[:, None], return_inverse=True)
        self._key, self._pair_mover = np.divmod(pairs, max(len(self._unit), 1))
        self._pair = at.reshape(keys.shape)

    @staticmethod
    def _on_pairs(
        edges: Sequence[UnitEdge],
        schemes: Sequence[Scheme],
        found: Callable[[UnitEdge, Scheme, Scheme], list[int]],
    ) -> np.ndarray:
        """Make an array (edges, schemes, schemes, most) of numbers that an edge has for schemes, filled up with -1."""
        lists = [[[found(edge, a, b) for b in schemes] for a in schemes] for edge in edges]
        most = max((len(x) for edge in lists for row in edge for x in row), default=0)
        result = np.full((len(edges), len(schemes), len(schemes), most), -1, np.int64)
        for i, edge in enumerate(lists):
            for j, row in enumerate(edge):
                for k, numbers in enumerate(row):
                    result[i, j, k, : len(numbers)] = numbers
        return result

    def neighbours(self, plan: Plan) -> Neighbours:
        """Evaluate all plans that are one move away from a plan."""
        state = np.full(len(self._place) + 1, self._baseline, np.int64)
        for name, scheme in plan.items():
            state[self._place[name]] = self._number[scheme]
        was = state[self._unit]
        now = np.where(was == self._scheme, self._baseline, self._scheme)
        before = _Ends(self._edge, state[self._up[self._edge]], state[self._down[self._edge]])
        unit, new = self._unit[self._mover], now[self._mover]
        after = _Ends(
            self._edge,
            np.where(self._up[self._edge] == unit, new, before.source),
            np.where(self._down[self._edge] == unit, new, before.sink),
        )
        chosen = self._matrix.select(rounded(self._units, plan))
        change = self._changes(was, now, before, after)
        latency = latency_us(self._cost, self._units, plan) + self._us[self._unit, now] - self._us[self._unit, was]
        longer, larger = self._priced(state, before, after)
        latency = latency + longer
        saved = saved_bytes(self._cost, plan) - border_bytes(self._cost, self._units, plan)
        saved = saved + self._bytes[self._unit, was] - self._bytes[self._unit, now] - larger
        for move in self._sharing:  # few units read a weight that others read too
            moved = plan.moved(self._names[int(self._unit[move])], self._schemes[int(now[move])])
            saved[move] += shared_bytes(self._cost, plan) - shared_bytes(self._cost, moved)
        samples, together = self._matrix.samples, []
        for rows, squares, energy in zip(self._rows, self._squares, self._energy, strict=True):
            total, own = ((chosen @ part + change @ part).T for part in (rows, squares))
            products = np.square(total) - own
            kept = shrink(products.reshape(samples, products.shape[0] // samples, products.shape[1]))
            together.append((own.mean(axis=0) + kept * products.mean(axis=0)) / energy)
        alone = self._site_damage @ chosen + change @ self._site_damage.T
        return Neighbours(np.stack(together, axis=1), np.asarray(alone), latency, saved)

    def _changes(self, was: np.ndarray, now: np.ndarray, before: _Ends, after: _Ends) -> csr_array:
        """Make a matrix (moves, sites): +1 where a move rounds a site, -1 where it no longer does."""
        site, move, scheme = self._own
        sites, moves = [site], [move]
        values = [(now[move] == scheme).astype(np.float64) - (was[move] == scheme)]
        for ends, sign in ((before, -1.0), (after, 1.0)):
            for found in self._site_of[ends.edge, ends.source, ends.sink].T:
                sites.append(found)
                moves.append(self._mover)
                values.append(np.full(len(found), sign))
        columns, rows, signs = np.concatenate(sites), np.concatenate(moves), np.concatenate(values)
        real = columns < self._sites
        return csr_array((signs[real], (rows[real], columns[real])), shape=(len(self._unit), self._sites))

    def _priced(self, state: np.ndarray, before: _Ends, after: _Ends) -> tuple[np.ndarray, np.ndarray]:
        """Return by how much the moves (moves,) change time and bytes of borders, once per tensor and conversion."""
        everywhere = self._kind_of[np.arange(len(self._up)), state[self._up], state[self._down]]
        keys = (self._kinds * self._tensor)[:, None] + everywhere
        count = np.bincount(keys[everywhere >= 0], minlength=len(self._border_us))[self._key]
        change = np.zeros(len(self._key))
        for sign, ends in ((-1.0, before), (1.0, after)):
            for kind in self._kind_of[ends.edge, ends.source, ends.sink].T:
                there = kind >= 0
                pair = self._pair[np.flatnonzero(there), kind[there]]
                change += sign * np.bincount(pair, minlength=len(change))
        turned = (count + change > 0.5).astype(np.float64) - (count > 0.5)
        longer, larger = (
            np.bincount(self._pair_mover, weights=prices[self._key] * turned, minlength=len(self._unit))
            for prices in (self._border_us, self._border_bytes)
        )
        return longer, larger


def _flat(rows: np.ndarray) -> np.ndarray:
    """(sites, samples * probes) of the rows of a head."""
    return np.asarray(rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2]).T, np.float64)
