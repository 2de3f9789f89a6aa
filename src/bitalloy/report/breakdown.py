"""Where the damage comes from: the region tree, and the rows of the sortable table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import TypeAlias

import msgspec
from markupsafe import Markup

from bitalloy.core.plans import CostTable, Plan, UnitCost
from bitalloy.core.records import Placement, Sensitivity, SensitivityTable, Unit, UnitGraph
from bitalloy.model.regions import ROOT, ancestors
from bitalloy.report import charts, formats
from bitalloy.sensitivity.matrix import CEILING_DB


@dataclass(frozen=True)
class Tables:
    """The records of a run, indexed for look-ups by name."""

    plan: Plan
    table: SensitivityTable
    units: UnitGraph
    cost: CostTable
    heads: tuple[str, ...]

    @cached_property
    def rows(self) -> Mapping[tuple[str, str, str, str], Sensitivity]:
        """(scope, id, part, head) -> sensitivity."""
        return {(r.scope, r.id, r.part, r.head): r for r in self.table.rows}

    @cached_property
    def int8(self) -> frozenset[str]:
        """Units that the plan puts in INT8."""
        return self.plan.int8_units()

    @cached_property
    def fp16(self) -> frozenset[str]:
        """Units that the plan puts in FP16."""
        return self.plan.fp16_units()

    @cached_property
    def times(self) -> Mapping[str, UnitCost]:
        """Unit -> measured cost."""
        return {c.unit: c for c in self.cost.units}

    @cached_property
    def members(self) -> Mapping[str, tuple[Unit, ...]]:
        """Region -> all units inside, in graph order; regions in order of the mean position of their units."""
        found: dict[str, list[Unit]] = {ROOT: []}
        positions: dict[str, list[int]] = {ROOT: [0]}
        for position, unit in enumerate(self.units.units):
            for region in ancestors(unit.region):
                found.setdefault(region, []).append(unit)
                positions.setdefault(region, []).append(position)
        order = sorted(found, key=lambda region: (region != ROOT, mean(positions[region]), region))
        return {region: tuple(found[region]) for region in order}

    def decibels(self, scope: str, name: str, part: str) -> tuple[float | None, ...]:
        """SQNR per head; None where the table has no such row."""
        rows = (self.rows.get((scope, name, part, head)) for head in self.heads)
        return tuple(None if r is None else r.sqnr_db.value for r in rows)

    def time_us(self, units: Iterable[Unit]) -> tuple[float, float]:
        """(float, INT8) time of units; units that cannot run in INT8 count in float."""
        found = [self.times[u.id] for u in units if u.id in self.times]
        int8 = sum(c.fp32_us if c.int8_us is None else c.int8_us for c in found)
        return sum(c.fp32_us for c in found), int8


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
    int8_units: int
    float_us: str
    int8_us: str
    sqnr: tuple[tuple[str, str, str], ...]
    """Per head: everything, weights only, activations only."""
    shares: Markup


def region_tree(tables: Tables) -> tuple[RegionLine, ...]:
    """All regions, parents before children, siblings in graph order.

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
        float_us, int8_us = tables.time_us(members)
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
                int8_units=sum(u.id in tables.int8 for u in members),
                float_us=formats.microseconds(float_us).removesuffix(" µs"),
                int8_us=formats.microseconds(int8_us).removesuffix(" µs"),
                sqnr=tuple(
                    (formats.bare_decibel_text(a), formats.bare_decibel_text(w), formats.bare_decibel_text(x))
                    for a, w, x in zip(*parts, strict=True)
                ),
                shares=Markup("") if region == ROOT else _share_bars(tables.heads, shares[region], largest),
            )
        )
        for child in below[region]:
            add(child, "" if region == ROOT else region + "/", index, level + 1)

    add(ROOT, "", None, 0)
    return tuple(lines)


def _shares(tables: Tables, region: str) -> tuple[float, ...]:
    """Error energy of a region over that of the all-INT8 model, per head."""
    pairs = zip(tables.decibels("region", region, "all"), tables.decibels("region", ROOT, "all"), strict=True)
    return tuple(0.0 if r is None or w is None or r >= CEILING_DB else 10 ** ((w - r) / 10) for r, w in pairs)


def _share_bars(heads: Iterable[str], values: Iterable[float], largest: float) -> Markup:
    lines = [f"{head}: {value:.1%} of the error energy of all-INT8" for head, value in zip(heads, values, strict=True)]
    return charts.shares([value / largest if largest else 0.0 for value in values], "\n".join(lines))


Numbers: TypeAlias = tuple[float, float, float, float | None, float | None]
"""SQNR in dB: value, low, high, weights only, activations only."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the sortable table, as the page's script reads it."""

    name: str
    kind: str
    region: str
    precision: str
    float_us: float | None
    int8_us: float | None
    flagged: bool
    reason: str
    sqnr: tuple[Numbers | None, ...]
    """Per head; None where nothing can be rounded."""


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """What the page's script works on."""

    root: str
    ceiling: float
    heads: tuple[str, ...]
    scopes: dict[str, list[Line]]


def payload(tables: Tables) -> Payload:
    """The rows of the sortable table for each scope."""
    scopes = {
        "unit": list(_unit_lines(tables)),
        "region": list(_region_lines(tables)),
        "site": list(_site_lines(tables)),
    }
    return Payload(root=ROOT, ceiling=CEILING_DB, heads=tables.heads, scopes=scopes)


def _unit_lines(tables: Tables) -> Iterable[Line]:
    choices = {c.unit: c for c in tables.plan.choices}
    for unit in tables.units.units:
        choice, time = choices.get(unit.id), tables.times.get(unit.id)
        yield Line(
            name=unit.id,
            kind=unit.kind,
            region=unit.region,
            precision=choice.precision.value if choice else formats.NONE,
            float_us=time.fp32_us if time else None,
            int8_us=time.int8_us if time else None,
            reason=(choice.reason if choice else "") or unit.reason,
            flagged=_flagged(tables, "unit", unit.id, "all"),
            sqnr=_sqnr(tables, "unit", unit.id, "all"),
        )


def _region_lines(tables: Tables) -> Iterable[Line]:
    for region, members in tables.members.items():
        float_us, int8_us = tables.time_us(members)
        int8, half = (sum(u.id in found for u in members) for found in (tables.int8, tables.fp16))
        whole = {int8: "int8", half: "fp16"}.get(len(members), "mixed" if int8 or half else "fp32")
        in_half = f", {half} in FP16" if half else ""
        yield Line(
            name=region,
            kind="region",
            region=region,
            precision=whole,
            float_us=float_us,
            int8_us=int8_us,
            reason=f"{int8} of {len(members)} units in INT8{in_half}",
            flagged=_flagged(tables, "region", region, "all"),
            sqnr=_sqnr(tables, "region", region, "all"),
        )


def _site_lines(tables: Tables) -> Iterable[Line]:
    owner = _site_owners(tables.units)
    regions = {u.id: u.region for u in tables.units.units}
    rounded = tables.units.rounded(tables.int8)
    parts = {r.id: r.part for r in tables.table.rows if r.scope == "site"}
    for site, part in parts.items():
        unit = owner.get(site)
        yield Line(
            name=site,
            kind="weight" if part == "weights" else "activation",
            region=regions.get(unit, ROOT) if unit else ROOT,
            precision="int8" if site in rounded else "fp32",
            float_us=None,
            int8_us=None,
            reason=f"belongs to {unit}" if unit else "",
            flagged=_flagged(tables, "site", site, part),
            sqnr=_sqnr(tables, "site", site, part),
        )


def _site_owners(units: UnitGraph) -> dict[str, str]:
    """Site -> the unit that rounds it first: the one whose weight, inner edge, output or input it is."""
    found = {site.id: unit.id for unit in units.units for site in unit.weights}
    found |= {site.id: unit.id for unit in units.units for site in unit.inner}
    for edge in units.edges:
        made = edge.rooted and edge.producer is not None and edge.placement is Placement.ENDS
        unit = edge.producer if made else edge.consumer
        if unit is not None:
            found.setdefault(edge.id, unit)
    return found


def _flagged(tables: Tables, scope: str, name: str, part: str) -> bool:
    found = (tables.rows.get((scope, name, part, head)) for head in tables.heads)
    return any(r.flagged for r in found if r is not None)


def _sqnr(tables: Tables, scope: str, name: str, part: str) -> tuple[Numbers | None, ...]:
    weights = tables.decibels(scope, name, "weights") if part == "all" else (None,) * len(tables.heads)
    activations = tables.decibels(scope, name, "activations") if part == "all" else (None,) * len(tables.heads)
    found: list[Numbers | None] = []
    for i, head in enumerate(tables.heads):
        row = tables.rows.get((scope, name, part, head))
        if row is None:
            found.append(None)
            continue
        value = row.sqnr_db
        found.append((value.value, value.low, value.high, weights[i], activations[i]))
    return tuple(found)
