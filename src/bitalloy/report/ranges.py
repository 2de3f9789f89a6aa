"""Calibrated ranges of the tensors whose rounding does most damage, beside the largest magnitude that was seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from bitalloy.core.records import Calibration, Histogram, TensorRange
from bitalloy.report import formats
from bitalloy.report.breakdown import ReportTables
from bitalloy.targets.placement import ACTIVATIONS, all_sites

SHOWN_RANGES = 12
"""Largest number of tensors that are shown."""
PICTURE_WIDTH, PICTURE_HEIGHT = 160, 34
"""Pixels of a histogram."""
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
    clipped: str
    """What part of the values is cut off, in words; bins that the range ends in count as kept."""
    bar: Markup
    picture: Markup | None
    """The distribution of the values, those beyond the range in another colour; None where none was kept."""


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
    beyond = None if one.histogram is None else _beyond(one.histogram, one.low, one.high)
    return ShownRange(
        tensor=one.tensor,
        head=head,
        sqnr=formats.decibel_text(sqnr),
        kept=f"{formats.plain(one.low, 3)} to {formats.plain(one.high, 3)}",
        seen=f"{one.magnitude:.3f}",
        method=one.method,
        cut="nothing" if part >= UNCUT else f"{100 * (1 - part):.1f} %",
        clipped="unknown" if beyond is None else f"{100 * beyond:.2g} %" if beyond else "none",
        picture=None if one.histogram is None else _picture(one.histogram, one.low, one.high),
        bar=Markup(
            '<svg class="ranges" width="120" height="10" viewBox="0 0 120 10" aria-hidden="true">'
            '<rect class="track" width="120" height="10" rx="2"/><rect x="{:.1f}" width="{:.1f}" height="10"/>'
            '<rect class="zero" x="59.5" width="1" height="10"/></svg>'
        ).format(60 + 60 * ends[0], max(60 * (ends[1] - ends[0]), 1)),
    )


def _outside(histogram: Histogram, low: float, high: float) -> list[bool]:
    """Tell of each bin whether all of it lies beyond a range."""
    lefts = [histogram.low + histogram.width * index for index in range(len(histogram.counts))]
    return [left + histogram.width <= low or left >= high for left in lefts]


def _beyond(histogram: Histogram, low: float, high: float) -> float:
    """Return the part of the values in bins that lie beyond a range, 0..1."""
    outside = _outside(histogram, low, high)
    count = sum(histogram.counts)
    return sum(n for n, out in zip(histogram.counts, outside, strict=True) if out) / count if count else 0.0


def _picture(histogram: Histogram, low: float, high: float) -> Markup:
    """Draw a histogram with logarithmic heights, and the ends of the range as lines."""
    bins = len(histogram.counts)
    most = math.log1p(max(histogram.counts, default=0)) or 1.0
    step, end = PICTURE_WIDTH / max(bins, 1), histogram.low + histogram.width * bins
    parts = [
        Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            "clipped" if out else "kept", index * step, PICTURE_HEIGHT - height, max(step - 0.5, 0.5), height
        )
        for index, (count, out) in enumerate(zip(histogram.counts, _outside(histogram, low, high), strict=True))
        if (height := PICTURE_HEIGHT * math.log1p(count) / most)
    ]
    parts += [
        Markup('<rect class="end" x="{:.1f}" width="1" height="{}"/>').format(
            min((edge - histogram.low) / (histogram.width * bins) * PICTURE_WIDTH, PICTURE_WIDTH - 1), PICTURE_HEIGHT
        )
        for edge in (low, high)
        if bins and histogram.low < edge <= end
    ]
    told = f"Histogram from {formats.plain(histogram.low, 3)} to {formats.plain(end, 3)}"
    box = Markup('<svg class="histogram" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img" aria-label="{2}">')
    opening = box.format(PICTURE_WIDTH, PICTURE_HEIGHT, told)
    return opening + Markup("<title>{}</title>").format(told) + Markup("").join(parts) + Markup("</svg>")
