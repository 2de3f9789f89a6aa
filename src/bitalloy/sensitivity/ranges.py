"""Choice of each tensor's range: the candidate whose rounding and clipping disturb the outputs least.

Every candidate's error has its own columns in the probe matrix, measured in the same passes. What is compared is the
damage of a tensor's roundings alone, summed over the heads in parts of what all roundings together do to each. So an
outlier that the network does not listen to is cut off, and one that it needs is kept, whatever the histogram says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitalloy.core.units import UnitGraph
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.placement import own_sites, possible_sites, rounded
from bitalloy.targets.recipe import Ranges

ENOUGH = 0.9
"""Largest ratio of another range's damage to the first candidate's at which it is taken; above it is noise."""
ColumnNames = Mapping[str, str]
"""Site -> name of its column."""


def later_ranges(units: UnitGraph, first: Ranges, other: Ranges) -> dict[str, tuple[float, float]]:
    """Return the ranges `other` of the outputs of Concats that round, where all other tensors keep `first`."""
    joined = {e.root for e in units.edges if e.passed_on}
    return {t: other[t] if t in joined else r for t, r in first.items()}


def best_candidates(matrix: ProbeMatrix, candidates: Sequence[ColumnNames], units: UnitGraph) -> dict[str, int]:
    """Choose the number of the best candidate for every tensor whose rounding reaches a head.

    What a Concat that rounds gives is judged as if it were rounded only there: behind operands on the same narrow range
    nothing would be left to clip.

    Args:
        matrix: a probe matrix with the columns of all candidates.
        candidates: the `views` of each candidate. The first is taken unless another is clearly better.
        units: units of the target that the candidates are for.

    Returns:
        tensor -> position in `candidates`.
    """
    tensors, sites = _tensors(units), rounded(units, units.lowest_gated())
    damage = matrix.site_damage().mean(axis=0)[matrix.plain]
    whole = matrix.damage(matrix.select(candidates[0][s] for s in sites)).mean(axis=0)[matrix.plain]
    parts = (damage / np.maximum(whole, 1e-30)[:, None]).sum(axis=0)
    costs: dict[str, np.ndarray] = {}
    for site, tensor in tensors.items():
        for position, names in enumerate(candidates):
            column = matrix.column.get(names.get(site, ""))
            if column is not None:
                costs.setdefault(tensor, np.zeros(len(candidates)))[position] += parts[column]
    best = {tensor: int(np.argmin(cost)) for tensor, cost in costs.items()}
    return {t: i if costs[t][i] <= ENOUGH * costs[t][0] else 0 for t, i in best.items()}


def chosen_columns(
    candidates: Sequence[ColumnNames], later: Sequence[ColumnNames], best: Mapping[str, int], units: UnitGraph
) -> ColumnNames:
    """Return site -> name of its column on the range that was chosen.

    What is rounded again behind a Concat has columns for operands of the same method, and for operands of the
    first. Where operands differ, the latter stand in: values that an operand cut off already are then cut off once more
    in the prediction, which errs to the safe side.

    Args:
        candidates: the `views` of each candidate.
        later: the `later_views` of each candidate.
        best: tensor -> position of its candidate, from `best_candidates`.
        units: units of the target.
    """
    tensors = _tensors(units)
    operands: dict[str, set[str]] = {}
    for edge in units.edges:
        operands.setdefault(str(edge.consumer), set()).add(edge.root)
    found = {site: candidates[best.get(tensors.get(site, ""), 0)][site] for site in candidates[0]}
    for edge in units.edges:
        for site in possible_sites(units, edge):
            if site.again and site.id in found:
                method = best.get(edge.root, 0)
                alike = all(best.get(t, 0) == method for t in operands.get(str(edge.producer), ()))
                found[site.id] = (candidates if alike else later)[method][site.id]
    return found


def _tensors(units: UnitGraph) -> dict[str, str]:
    """Map each site of an activation that is rounded first to the tensor whose range it is rounded on."""
    found = {s.id: e.root for e in units.edges for s in possible_sites(units, e) if not s.again}
    for unit in units.units:
        inner = {e.id: e.tensor for e in unit.inner}
        sites = (s for name in unit.choices for s in own_sites(unit, units.scheme(name)))
        found.update({s.id: inner[s.place] for s in sites if s.place in inner})
    return found
