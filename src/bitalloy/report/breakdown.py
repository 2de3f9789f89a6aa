"""Breakdown of the damage by region, unit and site: the region tree, and the rows of the sortable table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import TypeAlias

import msgspec
from markupsafe import Markup

from bitalloy.core.plans import CostTable, PlanReport, UnitCost
from bitalloy.core.records import Sensitivity, SensitivityTable
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.model.regions import ROOT, ancestors
from bitalloy.report import charts, formats
from bitalloy.report.text import counted
from bitalloy.sensitivity.matrix import CEILING_DB
from bitalloy.targets.placement import WEIGHTS, all_sites, rounded, site_owners


@dataclass(frozen=True)
class ReportTables:
    """The records of a run, indexed for look-ups by name."""

    plan: PlanReport
    table: SensitivityTable
    units: UnitGraph
    cost: CostTable
    heads: tuple[str, ...]

    @cached_property
    def rows(self) -> Mapping[tuple[str, str, str, str, str], Sensitivity]:
        """(scope, id, scheme, part, head) -> sensitivity."""
        return {(r.scope, r.id, r.scheme, r.part, r.head): r for r in self.table.rows}

    @cached_property
    def schemes(self) -> tuple[str, ...]:
        """Names of the target's schemes, without the baseline."""
        return tuple(scheme.name for scheme in self.units.schemes if scheme.name != BASELINE)

    @cached_property
    def measured(self) -> str:
        """The scheme whose damage the report shows for units, regions and sites: the lowest one with rounding sites."""
        gated = [scheme.name for scheme in self.units.schemes if scheme.gated]
        return (gated or [*self.schemes])[-1]

    @cached_property
    def planned(self) -> tuple[str, ...]:
        """The baseline, and the schemes that the plan uses, in the target's order."""
        used = self.plan.chosen.counts()
        return (BASELINE, *(name for name in self.schemes if name in used))

    @property
    def timing(self) -> str:
        """Where the times of units come from, in words."""
        return "estimated from peak rates" if self.cost.estimated else "by the measured cost table"

    @cached_property
    def times(self) -> Mapping[str, UnitCost]:
        """Unit -> measured cost."""
        return {c.unit: c for c in self.cost.units}

    @cached_property
    def members(self) -> Mapping[str, tuple[Unit, ...]]:
        """Region -> all its units, in graph order; regions are in the order of the mean position of their units."""
        found: dict[str, list[Unit]] = {ROOT: []}
        positions: dict[str, list[int]] = {ROOT: [0]}
        for position, unit in enumerate(self.units.units):
            for region in ancestors(unit.region):
                found.setdefault(region, []).append(unit)
                positions.setdefault(region, []).append(position)
        order = sorted(found, key=lambda region: (region != ROOT, mean(positions[region]), region))
        return {region: tuple(found[region]) for region in order}

    def decibels(self, scope: str, name: str, part: str) -> tuple[float | None, ...]:
        """Return the SQNR per head in the scheme `measured`, in dB; None where the table has no such row."""
        rows = (self.rows.get((scope, name, self.measured, part, head)) for head in self.heads)
        return tuple(None if r is None else r.sqnr_db.value for r in rows)

    def time_us(self, units: Iterable[Unit], scheme: str) -> float:
        """Return the time of units in a scheme, in µs; units that cannot run in it count with their baseline time."""
        found = [self.times[u.id].us for u in units if u.id in self.times]
        return sum(us.get(scheme, us[BASELINE]) for us in found)

    def times_us(self, units: Sequence[Unit]) -> tuple[float, ...]:
        """Return the time of units in the baseline and in every scheme of the target, in µs."""
        return tuple(self.time_us(units, scheme) for scheme in (BASELINE, *self.schemes))


@dataclass(frozen=True)
class RegionLine:
    """One line of the region tree."""

    index: int
    parent: int | None
    level: int
    id: str
    label: str
    children: int
    units: int
    lowered: str
    """Number of units that the plan puts into each scheme, in words."""
    times: tuple[str, ...]
    """Time in µs, in the baseline and in every scheme of the target."""
    sqnr: tuple[tuple[str, str, str], ...]
    """SQNR in dB per head: everything, weights only, activations only."""
    shares: Markup


def region_tree(tables: ReportTables) -> tuple[RegionLine, ...]:
    """Return all regions, parents before children, siblings in graph order.

    A region that holds nothing but one other region is shown joined to it, as `model.0/conv`.
    """
    below: dict[str, list[str]] = defaultdict(list)
    own = {unit.region for unit in tables.units.units}
    for region in tables.members:
        if region != ROOT:
            below[ancestors(region)[1]].append(region)
    shares = {region: _shares(tables, region) for region in tables.members}
    largest = max((s for region, row in shares.items() if region != ROOT for s in row), default=0.0)
    lines: list[RegionLine] = []

    def add(region: str, start: str, parent: int | None, level: int) -> None:
        while region != ROOT and region not in own and len(below[region]) == 1:
            region = below[region][0]
        members = tables.members[region]
        parts = [tables.decibels("region", region, part) for part in ("all", "weights", "activations")]
        index = len(lines)
        lines.append(
            RegionLine(
                index=index,
                parent=parent,
                level=level,
                id=region,
                label=region[len(start) :],
                children=len(below[region]),
                units=len(members),
                lowered=_lowered(tables, members),
                times=tuple(formats.microseconds(us).removesuffix(" µs") for us in tables.times_us(members)),
                sqnr=tuple(
                    (formats.bare_decibel_text(a), formats.bare_decibel_text(w), formats.bare_decibel_text(x))
                    for a, w, x in zip(*parts, strict=True)
                ),
                shares=Markup("") if region == ROOT else _share_bars(tables, shares[region], largest),
            )
        )
        for child in below[region]:
            add(child, "" if region == ROOT else region + "/", index, level + 1)

    add(ROOT, "", None, 0)
    return tuple(lines)


def _shares(tables: ReportTables, region: str) -> tuple[float, ...]:
    """Error energy of a region over that of the whole model, per head."""
    pairs = zip(tables.decibels("region", region, "all"), tables.decibels("region", ROOT, "all"), strict=True)
    return tuple(0.0 if r is None or w is None or r >= CEILING_DB else 10 ** ((w - r) / 10) for r, w in pairs)


def _share_bars(tables: ReportTables, values: Sequence[float], largest: float) -> Markup:
    whole = f"of the error energy of all-{tables.measured.upper()}"
    lines = [f"{head}: {value:.1%} {whole}" for head, value in zip(tables.heads, values, strict=True)]
    return charts.shares([value / largest if largest else 0.0 for value in values], "\n".join(lines))


Numbers: TypeAlias = tuple[float, float, float, float | None, float | None]
"""SQNR in dB: value, low, high, weights only, activations only."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the sortable table, as the page's script reads it."""

    name: str
    kind: str
    region: str
    scheme: str
    times: tuple[float | None, ...]
    """Time in µs, in the baseline and in every scheme of the target; None for a scheme in which it cannot run."""
    flagged: bool
    reason: str
    sqnr: tuple[Numbers | None, ...]
    """SQNR per head; None where nothing can be rounded."""


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """Data of the sortable table, which the page's script reads."""

    root: str
    ceiling: float
    schemes: tuple[str, ...]
    """Names of the baseline and of the target's schemes: columns of time."""
    heads: tuple[str, ...]
    planned: tuple[str, ...]
    """The baseline and the schemes that the plan uses, which have colours in this order."""
    timing: str
    """Where times come from, in words."""
    scopes: dict[str, list[Line]]
    edges: list[tuple[int, int, int]]
    """Tensors between units: positions of the units that make and read it, and its number of elements."""


def payload(tables: ReportTables) -> Payload:
    """Return the rows of the sortable table for each scope."""
    scopes = {
        "unit": list(_unit_lines(tables)),
        "region": list(_region_lines(tables)),
        "site": list(_site_lines(tables)),
    }
    positions = {unit.id: position for position, unit in enumerate(tables.units.units)}
    return Payload(
        root=ROOT,
        ceiling=CEILING_DB,
        schemes=(BASELINE, *tables.schemes),
        heads=tables.heads,
        planned=tables.planned,
        timing=tables.timing,
        scopes=scopes,
        edges=[
            (positions[edge.producer], positions[edge.consumer], edge.elements)
            for edge in tables.units.edges
            if edge.producer is not None and edge.consumer is not None
        ],
    )


def _unit_lines(tables: ReportTables) -> Iterable[Line]:
    choices = {c.unit: c for c in tables.plan.choices}
    for unit in tables.units.units:
        choice, time = choices.get(unit.id), tables.times.get(unit.id)
        yield Line(
            name=unit.id,
            kind=unit.kind,
            region=unit.region,
            scheme=choice.scheme if choice else formats.NONE,
            times=tuple(time.us.get(scheme) if time else None for scheme in (BASELINE, *tables.schemes)),
            reason=(choice.reason if choice else "") or unit.why,
            flagged=_flagged(tables, "unit", unit.id, "all"),
            sqnr=_sqnr(tables, "unit", unit.id, "all"),
        )


def _region_lines(tables: ReportTables) -> Iterable[Line]:
    for region, members in tables.members.items():
        counts = Counter(tables.plan.chosen.scheme_of(u.id) for u in members)
        yield Line(
            name=region,
            kind="region",
            region=region,
            scheme=next(iter(counts)) if len(counts) == 1 else "mixed",
            times=tables.times_us(members),
            reason=f"{_lowered(tables, members)} of {len(members)} units",
            flagged=_flagged(tables, "region", region, "all"),
            sqnr=_sqnr(tables, "region", region, "all"),
        )


def _site_lines(tables: ReportTables) -> Iterable[Line]:
    owner = site_owners(tables.units)
    regions = {u.id: u.region for u in tables.units.units}
    chosen = rounded(tables.units, tables.plan.chosen)
    sites = {site.label: site for site in all_sites(tables.units) if site.scheme == tables.measured}
    parts = {r.id: r.part for r in tables.table.rows if (r.scope, r.scheme) == ("site", tables.measured)}
    empty = (None,) * (1 + len(tables.schemes))
    for name, part in parts.items():
        site = sites.get(name)
        unit = owner.get(site.id) if site is not None else None
        yield Line(
            name=name,
            kind="weight" if part == WEIGHTS else "activation",
            region=regions.get(unit, ROOT) if unit else ROOT,
            scheme=tables.measured if site is not None and site.id in chosen else BASELINE,
            times=empty,
            reason=f"belongs to {unit}" if unit else "",
            flagged=_flagged(tables, "site", name, part),
            sqnr=_sqnr(tables, "site", name, part),
        )


def _lowered(tables: ReportTables, units: Iterable[Unit]) -> str:
    """How many units the plan puts into which scheme, in words."""
    chosen = tables.plan.chosen
    return counted(Plan((u.id, chosen.scheme_of(u.id)) for u in units).counts())


def _flagged(tables: ReportTables, scope: str, name: str, part: str) -> bool:
    found = (tables.rows.get((scope, name, tables.measured, part, head)) for head in tables.heads)
    return any(r.flagged for r in found if r is not None)


def _sqnr(tables: ReportTables, scope: str, name: str, part: str) -> tuple[Numbers | None, ...]:
    weights = tables.decibels(scope, name, "weights") if part == "all" else (None,) * len(tables.heads)
    activations = tables.decibels(scope, name, "activations") if part == "all" else (None,) * len(tables.heads)
    found: list[Numbers | None] = []
    for i, head in enumerate(tables.heads):
        row = tables.rows.get((scope, name, tables.measured, part, head))
        if row is None:
            found.append(None)
            continue
        value = row.sqnr_db
        found.append((value.value, value.low, value.high, weights[i], activations[i]))
    return tuple(found)
