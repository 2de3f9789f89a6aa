"""From the probe matrix to sensitivities of sites, units and regions, with bootstrap intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from bitalloy.core.records import HALF, DataInfo, Precision, Secant, Sensitivity, SensitivityTable
from bitalloy.core.units import UnitGraph
from bitalloy.model.regions import ancestors
from bitalloy.sensitivity.matrix import ProbeMatrix, bend, decibel, draws, estimate

SETTLED = 0.98
FLAG_DB = 1.0


def groups(units: UnitGraph) -> list[tuple[str, str, str, frozenset[str]]]:
    """(scope, id, part, sites) of every site, unit and region that an INT8 plan could round, and of units in FP16."""
    int8 = units.quantizable()
    found: list[tuple[str, str, str, frozenset[str]]] = []
    by_region: dict[str, set[str]] = defaultdict(set)
    weights = {site.id for u in units.units for site in u.weights}
    for unit in units.units:
        if unit.id not in int8:
            continue
        found += _parts("unit", unit.id, units.rounded(frozenset({unit.id})), weights)
        for region in ancestors(unit.region):
            by_region[region].add(unit.id)
    for region, members in sorted(by_region.items()):
        found += _parts("region", region, units.rounded(frozenset(members)), weights)
    found += [
        ("site", s, "weights" if s in weights else "activations", frozenset({s})) for s in sorted(units.rounded(int8))
    ]
    half = [u.id for u in units.units if Precision.FP16 in u.allowed]
    found += [("unit", name, "fp16", frozenset({name + HALF})) for name in half]
    return found


def _parts(
    scope: str, name: str, sites: Iterable[str], weights: set[str]
) -> list[tuple[str, str, str, frozenset[str]]]:
    everything = frozenset(sites)
    rows = [(scope, name, "all", everything)]
    if everything & weights:
        rows += [
            (scope, name, "weights", everything & weights),
            (scope, name, "activations", everything - weights),
        ]
    return rows


def sensitivities(
    matrix: ProbeMatrix,
    units: UnitGraph,
    data: DataInfo,
    secant: Secant,
    *,
    seed: int,
) -> SensitivityTable:
    """All sensitivities of a probe matrix.

    Args:
        matrix: rows of all samples.
        units: grouping of the sites.
        data: where the samples come from.
        secant: by which the numbers of regions are corrected; rows that it moves by more than 1 dB, and units and
            sites that it would move so far, are flagged.
        seed: of the bootstrap.
    """
    weights = draws(matrix.samples, seed)
    rows = []
    for scope, name, part, sites in groups(units):
        chosen = matrix.select(sites)
        # the secant is measured on everything together, and one thing alone bends in its own way
        estimates = estimate(matrix, chosen, weights, secant if scope == "region" else None)
        moved = np.abs(decibel(bend(secant, matrix.damage(chosen).mean(axis=0)))) > FLAG_DB
        rows += [
            Sensitivity(id=name, scope=scope, part=part, head=head, sqnr_db=e, flagged=bool(flag))
            for head, e, flag in zip(matrix.heads, estimates, moved, strict=True)
        ]
    return SensitivityTable(
        model_sha256=units.model_sha256,
        data=data,
        samples=matrix.samples,
        probes=int(matrix.rows[0].shape[1]),
        seed=seed,
        settled=settled(matrix, units),
        rows=tuple(rows),
    )


def settled(matrix: ProbeMatrix, units: UnitGraph) -> bool:
    """Whether the ranking of units, each in its lowest precision, would survive other samples.

    The samples are split in two halves; the ranking has settled when the Spearman correlation of the two rankings,
    corrected to the full length (Spearman-Brown), is at least 0.98 for every head but divergences.
    """
    if matrix.samples < 4:
        return False
    chosen = [matrix.select(units.rounded(frozenset({u}))) for u in sorted(units.lowest())]
    parts = [matrix.subset(slice(start, None, 2)) for start in (0, 1)]
    damage = np.stack([[p.damage(c).mean(axis=0) for c in chosen] for p in parts])  # (halves, units, heads)
    return all(alike(*damage[:, :, head]) for head in np.flatnonzero(matrix.plain))


def alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two halves of the samples rank things so alike that the whole ranking can be trusted."""
    live = (first > 0) & (second > 0)
    if live.sum() < 3:
        return True
    ranks = [np.argsort(np.argsort(h[live])) for h in (first, second)]
    r = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return 2 * r / (1 + r) >= SETTLED


def unit_sqnr(table: SensitivityTable) -> Mapping[tuple[str, str], float]:
    """(unit, head) -> SQNR in dB of the unit alone."""
    return {(r.id, r.head): r.sqnr_db.value for r in table.rows if r.scope == "unit" and r.part == "all"}
