"""Calibrated ranges of the tensors whose rounding does most damage, beside the largest magnitude that was seen."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from bitalloy.core.records import Calibration, TensorRange
from bitalloy.report import formats
from bitalloy.report.breakdown import ReportTables
from bitalloy.targets.placement import ACTIVATIONS, all_sites

SHOWN_RANGES = 12
"""Largest number of tensors that are shown."""
UNCUT = 0.999
"""Part of the largest magnitude from which on a range counts as whole."""


@dataclass(frozen=True)
class ShownRange:
    """The range of one tensor."""

    tensor: str
    head: str
    """The head that suffers most from its rounding."""
    sqnr: str
    kept: str
    """Range that the scale covers."""
    seen: str
    """Largest magnitude in the samples of the calibration."""
    method: str
    cut: str
    """What part of the magnitude is cut off, in words."""
    bar: Markup


def worst_ranges(tables: ReportTables, calibration: Calibration | None) -> tuple[ShownRange, ...]:
    """Return the ranges of the tensors with the lowest SQNR on any head when they alone are rounded, lowest first."""
    if calibration is None:
        return ()
    known = {one.tensor: one for one in calibration.ranges}
    roots = {edge.id: edge.root for edge in tables.units.edges}
    roots |= {edge.id: edge.tensor for unit in tables.units.units for edge in unit.inner}
    places = {site.label: site.place for site in all_sites(tables.units) if site.scheme == tables.measured}
    found: dict[str, tuple[float, str]] = {}
    for row in tables.table.rows:
        if (row.scope, row.part, row.scheme) != ("site", ACTIVATIONS, tables.measured) or row.head not in tables.heads:
            continue
        tensor = roots.get(places.get(row.id, ""), "")
        if tensor in known:
            found[tensor] = min(found.get(tensor, (row.sqnr_db.value, row.head)), (row.sqnr_db.value, row.head))
    worst = sorted(found.items(), key=lambda item: item[1])[:SHOWN_RANGES]
    return tuple(_shown(known[tensor], head, sqnr) for tensor, (sqnr, head) in worst)


def _shown(one: TensorRange, head: str, sqnr: float) -> ShownRange:
    whole = max(abs(one.low), abs(one.high))
    part = whole / one.magnitude if one.magnitude else 1.0
    ends = [min(max(value / one.magnitude, -1.0), 1.0) if one.magnitude else 0.0 for value in (one.low, one.high)]
    return ShownRange(
        tensor=one.tensor,
        head=head,
        sqnr=formats.decibel_text(sqnr),
        kept=f"{formats.plain(one.low, 3)} to {formats.plain(one.high, 3)}",
        seen=f"{one.magnitude:.3f}",
        method=one.method,
        cut="nothing" if part >= UNCUT else f"{100 * (1 - part):.1f} %",
        bar=Markup(
            '<svg class="ranges" width="120" height="10" viewBox="0 0 120 10" aria-hidden="true">'
            '<rect class="track" width="120" height="10" rx="2"/><rect x="{:.1f}" width="{:.1f}" height="10"/>'
            '<rect class="zero" x="59.5" width="1" height="10"/></svg>'
        ).format(60 + 60 * ends[0], max(60 * (ends[1] - ends[0]), 1)),
    )
