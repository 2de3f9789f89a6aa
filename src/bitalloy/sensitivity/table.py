"""From the probe matrix to sensitivities of sites, units and regions, with bootstrap intervals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from bitalloy.core.records import DataInfo, Secant, Sensitivity, SensitivityTable
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.model.regions import ancestors
from bitalloy.sensitivity.matrix import ProbeMatrix, bend, decibel, draws, estimate_sqnr
from bitalloy.targets.placement import ACTIVATIONS, WEIGHTS, WHOLE, all_sites, own_sites, rounded, weight_site

SETTLED = 0.98
FLAG_DB = 1.0


@dataclass(frozen=True)
class SiteGroup:
    """Sites that are rounded together in one measurement."""

    scope: str
    """Kind of the group: `site`, `unit`, `region`, or `all`."""
    id: str
    scheme: str
    part: str
    """Part of the group that is rounded: WHOLE, WEIGHTS or ACTIVATIONS."""
    sites: frozenset[str]
    """Ids of the sites."""
    again: bool = False
    """Whether the sites are requantizations of rounded tensors, which are not measured alone."""


def groups(units: UnitGraph) -> list[SiteGroup]:
    """Return every site, unit and region, as groups of sites, in each scheme that it could be rounded to.

    Units that compute in another format have no sites of their own, so there are no regions of them.
    """
    found: list[SiteGroup] = []
    sites = {site.id: site for site in all_sites(units)}
    for scheme in (s for s in units.schemes if s.gated):
        by_region: dict[str, set[str]] = defaultdict(set)
        weights = frozenset(weight_site(w, scheme.name).id for u in units.units for w in u.weights)
        able = [u for u in units.units if scheme.name in u.allowed]
        for unit in able:
            found += _parts("unit", unit.id, scheme.name, rounded(units, Plan.of(scheme.name, unit.id)), weights)
            for region in ancestors(unit.region):
                by_region[region].add(unit.id)
        for region, members in sorted(by_region.items()):
            found += _parts("region", region, scheme.name, rounded(units, Plan.of(scheme.name, *members)), weights)
        whole = rounded(units, Plan.of(scheme.name, *(u.id for u in able)))
        found += [
            SiteGroup("site", sites[s].label, scheme.name, sites[s].part, frozenset({s}), sites[s].again)
            for s in sorted(whole)
        ]
    for scheme in (s for s in units.schemes if s.cast):
        found += [
            SiteGroup("unit", u.id, scheme.name, WHOLE, frozenset(s.id for s in own_sites(u, scheme)))
            for u in units.units
            if scheme.name in u.allowed
        ]
    return found


def _parts(scope: str, name: str, scheme: str, sites: frozenset[str], weights: frozenset[str]) -> list[SiteGroup]:
    found = [SiteGroup(scope, name, scheme, WHOLE, sites)]
    if sites & weights:
        found.append(SiteGroup(scope, name, scheme, WEIGHTS, sites & weights))
        found.append(SiteGroup(scope, name, scheme, ACTIVATIONS, sites - weights))
    return found


def sensitivities(
    matrix: ProbeMatrix,
    units: UnitGraph,
    data: DataInfo,
    secant: Secant,
    *,
    seed: int,
) -> SensitivityTable:
    """Return the sensitivities of all sites, units and regions from a probe matrix.

    Args:
        matrix: rows of all samples.
        units: grouping of the sites.
        data: name, number and fingerprint of the samples.
        secant: the secant that corrects the numbers of regions; rows that it moves by more than 1 dB, and units and
            sites that it would move so far, are flagged.
        seed: seed of the bootstrap.
    """
    weights = draws(matrix.samples, seed)
    rows = []
    for group in groups(units):
        chosen = matrix.select(group.sites)
        # the secant is measured on everything together, and one thing alone bends in its own way
        estimates = estimate_sqnr(matrix, chosen, weights, secant if group.scope == "region" else None)
        moved = np.abs(decibel(bend(secant, matrix.damage(chosen).mean(axis=0)))) > FLAG_DB
        rows += [
            Sensitivity(
                id=group.id,
                scope=group.scope,
                scheme=group.scheme,
                part=group.part,
                head=head,
                sqnr_db=e,
                flagged=bool(flag),
                exact=_is_measured(matrix, head, group.sites),
            )
            for head, e, flag in zip(matrix.heads, estimates, moved, strict=True)
        ]
    return SensitivityTable(
        model_sha256=units.model_sha256,
        data=data,
        samples=matrix.samples,
        probes=int(matrix.rows[0].shape[1]),
        seed=seed,
        settled=ranking_settled(matrix, units),
        rows=tuple(rows),
    )


def _is_measured(matrix: ProbeMatrix, head: str, sites: frozenset[str]) -> bool:
    """Tell whether execution measured all that rounding some sites does to a head."""
    known = {s for s in sites if (head, s) in matrix.executed}
    others = np.flatnonzero(matrix.select(sites - known))
    return bool(known) and not matrix.rows[matrix.heads.index(head)][..., others].any()


def ranking_settled(matrix: ProbeMatrix, units: UnitGraph) -> bool:
    """Return whether the ranking of units, each in its lowest scheme, would survive other samples.

    The samples are split in two halves; the ranking has settled when the Spearman correlation of the two rankings,
    corrected to the full length (Spearman-Brown), is at least 0.98 for every head but divergences.
    """
    if matrix.samples < 4:
        return False
    chosen = [matrix.select(rounded(units, Plan([entry]))) for entry in units.lowest().listed]
    if not chosen:
        return True
    parts = [matrix.subset(slice(start, None, 2)) for start in (0, 1)]
    damage = np.stack([[p.damage(c).mean(axis=0) for c in chosen] for p in parts])  # (halves, units, heads)
    return all(ranked_alike(*damage[:, :, head]) for head in np.flatnonzero(matrix.plain))


def ranked_alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two halves of the samples rank units so alike that the whole ranking can be trusted."""
    live = (first > 0) & (second > 0)
    if live.sum() < 3:
        return True
    ranks = [np.argsort(np.argsort(h[live])) for h in (first, second)]
    r = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return r > 0 and 2 * r / (1 + r) >= SETTLED
