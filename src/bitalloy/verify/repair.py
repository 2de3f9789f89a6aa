"""Where a measured plan differs from its prediction: find the units responsible, measure them, correct the tables.

The few units of the plan that are predicted to do most damage to the heads in question, and pairs of the first of them,
are executed by themselves on the samples of the verification. What each of them really does there, and what the plan as
a whole does, is put into the probe matrix (`sensitivity.correct`), on which the next search rests. Leaving units out of
the plan would tell less: on 16 samples, what a unit adds to a plan is mostly the accident of products with all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import Remeasured, Repair
from bitalloy.core.planned import Measured, Planned
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.model.heads import is_divergence
from bitalloy.search.planning import PlanTables
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.correct import MeasuredDamage, bent_damage, correct_matrix
from bitalloy.sensitivity.matrix import decibel
from bitalloy.sensitivity.measuring import damage_inputs
from bitalloy.sensitivity.measuring import measured_damages as execute
from bitalloy.targets.placement import rounded

TOLERATED_DB = 1.5
"""A head whose measured SQNR differs by less from the prediction needs no repair."""
SUSPECT_UNITS, PAIRED_UNITS = 8, 3
"""Units that are measured by themselves, and how many of the first in pairs too."""


@dataclass(frozen=True)
class PredictionGap:
    """The predicted SQNR of a plan beside the measured one."""

    predicted_db: np.ndarray
    """(heads,): SQNR that the tables predict."""
    measured_db: np.ndarray
    wide: np.ndarray
    """(heads,): whether the prediction is off."""


@dataclass(frozen=True)
class RepairedTables:
    """Tables after a repair, with all measurements that they were fitted to."""

    tables: PlanTables
    findings: tuple[MeasuredDamage, ...]
    """All that the tables were fitted to."""
    record: Repair


def prediction_gap(planned: Planned, found: Measured) -> PredictionGap:
    """Compare what was measured with what the plan says.

    A head is off where the difference is above `TOLERATED_DB`, or the measured SQNR is below the prediction's interval.
    """
    heads = planned.plan.heads
    predicted = np.array([h.predicted_db.value for h in heads])
    measured = np.array([e.value for e in found.sqnr_mixed])
    low = np.array([h.predicted_db.low for h in heads])
    plain = np.array([not is_divergence(h.head) for h in heads])
    return PredictionGap(
        predicted, measured, plain & ((np.abs(measured - predicted) > TOLERATED_DB) | (measured < low))
    )


def repair(
    analysis: Analysis,
    base: PlanTables,
    before: Sequence[MeasuredDamage],
    planned: Planned,
    found: Measured,
    samples: list[int],
    work: Workspace,
) -> RepairedTables | None:
    """Correct tables by what the units responsible really do; None where the prediction holds.

    Args:
        analysis: what is known about the model.
        base: tables before any repair.
        before: what earlier repairs found; the tables are fitted to all of it.
        planned: the plan.
        found: what was measured of the plan.
        samples: on which it was measured.
        work: where to keep and show results.
    """
    gap, gated = prediction_gap(planned, found), _gated(base.units, planned.plan.chosen)
    if not gap.wide.any() or not gated:
        return None
    matrix, secant, units = base.matrix, base.facts.secant, base.units
    known = {f.sites for f in before}
    sets = [s for s in _suspects(base, gated, gap.wide) if rounded(units, s) not in known]
    sites = [rounded(units, s) for s in sets]
    inputs = damage_inputs(analysis, sites, samples)

    def make() -> bytes:
        damage, _ = execute(analysis, sites, samples, work=work)
        return to_json(damage.mean(axis=0).T.tolist())

    damage = np.array(msgspec.json.decode(work.cached("repair", inputs, make))) if sets else np.zeros((0, 0))
    new = [MeasuredDamage(s, d) for s, d in zip(sites, damage, strict=True)]
    whole = MeasuredDamage(rounded(units, planned.plan.chosen), 10 ** (-gap.measured_db / 10))
    findings = (*before, *new, whole)
    correction = correct_matrix(matrix, secant, findings, rounded(units, units.lowest_gated()))
    fixed, bent = correction.matrix, correction.secant
    names = [h.head for h in planned.plan.heads]
    order = {u.id: i for i, u in enumerate(units.units)}
    changes = [
        Remeasured(
            units=tuple(sorted(left, key=order.__getitem__)),
            change_db=_named(names, decibel(bent_damage(matrix, secant, f.sites)) - decibel(f.damage)),
        )
        for left, f in zip(sets, new, strict=True)
    ]
    record = Repair(
        gap_db=_named(names, gap.measured_db - gap.predicted_db),
        remeasured=tuple(sorted(changes, key=lambda c: -max(map(abs, c.change_db.values()), default=0.0))),
        left_db=_named(names, gap.measured_db - decibel(bent_damage(fixed, bent, whole.sites))),
    )
    facts = msgspec.structs.replace(base.facts, secant=bent)
    return RepairedTables(replace(base, matrix=fixed, facts=facts), findings, record)


def _gated(units: UnitGraph, plan: Plan) -> Plan:
    """Return the part of a plan whose roundings can be executed by themselves."""
    return Plan((unit, scheme) for unit, scheme in plan.items() if units.scheme(scheme).gated)


def _suspects(tables: PlanTables, plan: Plan, wide: np.ndarray) -> list[Plan]:
    """List units, and pairs of the first, by their predicted part of the damage to the heads that are off."""
    matrix, secant, units = tables.matrix, tables.facts.secant, tables.units
    whole = np.maximum(bent_damage(matrix, secant, rounded(units, plan)), 1e-30)
    alone = {u: bent_damage(matrix, secant, rounded(units, Plan.of(s, u))) / whole for u, s in plan.items()}
    first = sorted(alone, key=lambda u: (-float(alone[u][wide].max()), u))[:SUSPECT_UNITS]
    pairs = combinations(first[:PAIRED_UNITS], 2)
    return [Plan((u, plan[u]) for u in few) for few in (*((u,) for u in first), *pairs)]


def _named(heads: list[str], values: np.ndarray) -> dict[str, float]:
    """Name numbers by their heads, divergences left out."""
    return {h: round(float(v), 3) for h, v in zip(heads, values, strict=True) if not is_divergence(h)}
