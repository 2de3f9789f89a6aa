"""Where a measured plan differs from its prediction: find the units responsible, measure them, correct the tables.

The plan is executed on the samples of its verification with one unit left out, for the few units that are predicted to
add most to the damage of the heads in question, and with pairs of the first of them left out. What each of them really
adds, and what the plan as a whole really does, is put into the probe matrix (`sensitivity.correct`), on which the next
search rests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import msgspec
import numpy as np

from bitalloy.heads import is_divergence
from bitalloy.matrix import decibel
from bitalloy.outcome import Remeasured, Repair
from bitalloy.pipeline.analyze import Analysis
from bitalloy.pipeline.exact import measured as execute
from bitalloy.pipeline.planning import Tables
from bitalloy.pipeline.records import Measured, Planned
from bitalloy.pipeline.work import Workspace
from bitalloy.sensitivity import Finding, correct, damage_of
from bitalloy.store import key_of

TOLERATED_DB = 1.5
"""A head whose measured SQNR differs by less from the prediction needs no repair."""
UNITS, PAIRED = 8, 3
"""Units that are left out one by one, and how many of the first in pairs too."""
LEAST = 0.01
"""Smallest share of the predicted contribution of a unit that counts as measured: a unit may even do good."""


@dataclass(frozen=True)
class Gap:
    """A plan beside its measurement."""

    predicted: np.ndarray
    """(heads,): relative error energy."""
    measured: np.ndarray
    """(heads,)"""
    wide: np.ndarray
    """(heads,): whether the prediction is off."""

    @property
    def db(self) -> np.ndarray:
        """(heads,): measured minus predicted SQNR."""
        return np.asarray(decibel(self.measured) - decibel(self.predicted))


def gap_of(planned: Planned, found: Measured) -> Gap:
    """Compare what was measured with what the plan says.

    A head is off where the difference is above `TOLERATED_DB`, or the measured SQNR is below the prediction's interval.
    """
    heads = planned.plan.heads
    predicted = np.array([h.predicted_db.value for h in heads])
    measured = np.array([e.value for e in found.sqnr_mixed])
    low = np.array([h.predicted_db.low for h in heads])
    plain = np.array([not is_divergence(h.head) for h in heads])
    wide = plain & ((np.abs(measured - predicted) > TOLERATED_DB) | (measured < low))
    return Gap(10 ** (-predicted / 10), 10 ** (-measured / 10), wide)


def repair(
    analysis: Analysis, tables: Tables, planned: Planned, found: Measured, samples: list[int], work: Workspace
) -> tuple[Tables, Repair] | None:
    """Correct the tables by what the units responsible really do; None where the prediction holds.

    Args:
        analysis: of the model.
        tables: that predicted the plan.
        planned: the plan.
        found: its measurement.
        samples: on which it was measured.
        work: where to keep and show results.
    """
    gap = gap_of(planned, found)
    int8 = planned.plan.int8_units()
    if not gap.wide.any() or not int8:
        return None
    sets = _suspects(tables, int8, gap)
    whole = analysis.units.rounded(int8)
    rests = [analysis.units.rounded(int8 - left) for left in sets]
    key = key_of(analysis=tables.facts.key, plan=sorted(int8), sets=[sorted(s) for s in sets], samples=samples)

    def make() -> bytes:
        damage, _ = execute(analysis, [whole, *rests], samples, around=whole, work=work)
        return msgspec.json.encode(damage.mean(axis=0).tolist())

    damage = np.array(msgspec.json.decode(work.cached("repair", key, make)))  # (heads, sets)
    secant, matrix = tables.facts.secant, tables.matrix
    findings, changes = [], []
    for number, (left, rest) in enumerate(zip(sets, rests, strict=True), start=1):
        prediction = damage_of(matrix, secant, Finding(whole, damage[:, 0], rest))
        added = np.maximum(damage[:, 0] - damage[:, number], LEAST * np.maximum(prediction, 0.0))
        findings.append(Finding(whole, added, rest))
        changes.append(_change(analysis, left, prediction, added))
    findings.append(Finding(whole, gap.measured))
    everything = tables.units.rounded(tables.units.quantizable())
    fixed, bent = correct(matrix, secant, findings, everything)
    left = decibel(gap.measured) - decibel(damage_of(fixed, bent, findings[-1]))
    names = [h.head for h in planned.plan.heads]
    record = Repair(
        gap_db=_named(names, gap.db),
        remeasured=tuple(sorted(changes, key=lambda c: -max(map(abs, c.change_db.values()), default=0.0))),
        left_db=_named(names, left),
    )
    facts = msgspec.structs.replace(tables.facts, key=key_of(before=tables.facts.key, repaired=key), secant=bent)
    return replace(tables, matrix=fixed, facts=facts), record


def _suspects(tables: Tables, int8: frozenset[str], gap: Gap) -> list[frozenset[str]]:
    """Units, and pairs of the first of them, by what they are predicted to add to the heads that are off."""
    matrix, secant, units = tables.matrix, tables.facts.secant, tables.units
    whole = units.rounded(int8)

    def share(unit: str) -> float:
        added = damage_of(matrix, secant, Finding(whole, gap.measured, units.rounded(int8 - {unit})))
        return float((added / gap.predicted)[gap.wide].max())

    shares = {u: share(u) for u in sorted(int8)}
    first = sorted(shares, key=lambda u: (-shares[u], u))[:UNITS]
    return [frozenset({u}) for u in first] + [frozenset(pair) for pair in combinations(first[:PAIRED], 2)]


def _change(analysis: Analysis, left: frozenset[str], predicted: np.ndarray, added: np.ndarray) -> Remeasured:
    order = [u.id for u in analysis.units.units if u.id in left]
    reached = (predicted > 0) & (added > 0)
    ratio = 10 * np.log10(np.where(reached, added, 1.0) / np.where(reached, predicted, 1.0))
    return Remeasured(
        units=tuple(order), change_db=_named([h.name for h in analysis.heads], np.clip(ratio, -20.0, 20.0))
    )


def _named(heads: list[str], values: np.ndarray) -> dict[str, float]:
    """By name of the head, divergences left out."""
    return {h: round(float(v), 3) for h, v in zip(heads, values, strict=True) if not is_divergence(h)}
