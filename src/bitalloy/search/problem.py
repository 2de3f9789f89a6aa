"""The tables that the search reads, and what they say of a plan: its damage, its latency and its size.

The probe matrix gives the damage of whole sets of sites, with their interactions. With few rows the interaction terms
are noisy, and a search over thousands of plans would fit the noise; so where interactions take damage away, they enter
with half their weight (`SHRINK`). Where they add to it they enter in full: a plan that keeps a floor in the search is
predicted to keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bitalloy.core.plans import CostTable, UnitDamage
from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitGraph
from bitalloy.measure.prices import border_bytes, latency_us, saved_bytes
from bitalloy.model.heads import DETECTIONS
from bitalloy.search.moves import Moves
from bitalloy.sensitivity.matrix import ProbeMatrix, bend
from bitalloy.targets.placement import rounded

SHRINK = 0.5
"""Weight of the interactions between sites where they take damage away."""


@dataclass(frozen=True)
class Problem:
    """All tables that the search for a plan needs."""

    units: UnitGraph
    matrix: ProbeMatrix
    secant: Secant
    cost: CostTable
    float_bytes: int
    """Size of the float model as it is written."""
    alone: Mapping[str, Mapping[str, UnitDamage]] = field(default_factory=dict)
    """Unit -> scheme -> its row in the table of sensitivities, which reasons quote."""

    @cached_property
    def choices(self) -> Mapping[str, tuple[str, ...]]:
        """Units that may run in another scheme than the baseline, in graph order -> these schemes, the lowest first."""
        return {u.id: u.choices for u in self.units.units if u.choices}

    @cached_property
    def fixed(self) -> Plan:
        """The least that every plan holds: units that may not run in the baseline."""
        return Plan({u.id: u.choices[0] for u in self.units.units if u.choices and BASELINE not in u.allowed})

    @cached_property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """(unit, scheme) that a single unit may change to; it goes back to the baseline where it is there already."""
        choice = {u.id for u in self.units.units if len(u.allowed) > 1}
        return tuple((unit, scheme) for unit, schemes in self.choices.items() if unit in choice for scheme in schemes)

    def moved(self, plan: Plan, move: tuple[str, str]) -> Plan:
        """Return a plan after one of the `moves`."""
        unit, scheme = move
        return plan.moved(unit, BASELINE if plan.scheme_of(unit) == scheme else scheme)

    def sites(self, plan: Plan) -> np.ndarray:
        """Return the sites that a plan rounds as a 0/1 vector."""
        return self.matrix.select(rounded(self.units, plan))

    @cached_property
    def site_damage(self) -> np.ndarray:
        """(heads, sites): mean relative error energy of each site alone."""
        return np.asarray(self.matrix.site_damage().mean(axis=0))

    def damage(self, plan: Plan) -> np.ndarray:
        """Predict the relative error energy (heads,) of a plan, with the secant; see `SHRINK`."""
        chosen = self.sites(plan)
        together = self.matrix.damage(chosen).mean(axis=0)
        linear = _shrunk(together, self.site_damage @ chosen)
        return np.asarray(linear * bend(self.secant, linear))

    def neighbours(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict damage (moves, heads), latency in us and bytes of the plans one move away, in order of `moves`."""
        found = self._neighbours.neighbours(plan)
        linear = _shrunk(found.together, found.alone)
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
        whole = self.site_damage @ self.sites(self.units.lowest())
        return np.asarray(np.where(judged & (whole > 0), 1 / np.maximum(whole, 1e-30), 0.0) / judged.sum())

    def total(self, plan: Plan) -> float:
        """Return what is minimized: the damage of a plan, summed over the heads by `aims`."""
        return float(self.aims @ self.damage(plan))

    @cached_property
    def smallest(self) -> Plan:
        """The plan of which every unit takes the fewest bytes, with those that it shares with others."""
        taken: dict[str, dict[str, int]] = {}
        for cost in self.cost.units:
            known = taken[cost.unit] = dict(cost.bytes)
            for weight in self.cost.shared:
                for scheme, forms in weight.forms.get(cost.unit, {}).items():
                    known[scheme] += sum(weight.bytes.get(form, 0) for form in forms)
        found = Plan((u.id, min(reversed(u.allowed), key=taken[u.id].__getitem__)) for u in self.units.units)
        return min(found, self.units.lowest(), self.fixed, key=self.size_bytes)

    def latency_us(self, plan: Plan) -> float:
        """Predict the latency of a plan."""
        return latency_us(self.cost, self.units, plan)

    def size_bytes(self, plan: Plan) -> int:
        """Predict the file size of a plan."""
        return self.float_bytes - saved_bytes(self.cost, plan) + round(border_bytes(self.cost, self.units, plan))


def _shrunk(together: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Return the damage with interactions, of which those that take damage away weigh `SHRINK`."""
    return np.asarray(np.maximum(together, SHRINK * together + (1 - SHRINK) * alone))
