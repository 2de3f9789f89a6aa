"""Small drawings as SVG text: bars of shares inside tables, and the markers of the charts' legends.

Colours come from the page's style sheet through classes and `currentColor`, so that they follow light and dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

PALETTE = 8
"""Number of series colours in the style sheet."""

# Each shape is drawn around the origin in `currentColor`, as the style sheet's class `m-<name>` fills it. The script
# draws points of the charts in the same shapes.
MARKER_SHAPES = {
    "dot": Markup('<circle r="3.5"/>'),
    "seen": Markup('<path d="M0-5 5 0 0 5-5 0z"/>'),
    "chosen": Markup('<circle r="7.5"/><circle r="3.5" class="core"/>'),
    "mixed": Markup('<path d="M0-8 8 0 0 8-8 0z"/>'),
    "lowest-predicted": Markup('<rect x="-5.5" y="-5.5" width="11" height="11"/>'),
    "lowest": Markup('<rect x="-6" y="-6" width="12" height="12"/>'),
    "off": Markup('<path d="M0-6 6 4-6 4z"/>'),
}


def shares(values: Iterable[float], tip: str) -> Markup:
    """Draw thin bars under each other, one per series, for shares between 0 and 1."""
    rows = [
        Markup('<rect class="track" y="{0}" width="90" height="4" rx="1.5"/>').format(6 * i)
        + Markup('<rect class="h{0}" y="{1}" width="{2:.1f}" height="4" rx="1.5"/>').format(
            i % PALETTE, 6 * i, 90 * min(max(value, 0.0), 1.0)
        )
        for i, value in enumerate(values)
    ]
    height = max(6 * len(rows) - 2, 1)
    return Markup('<svg class="shares" width="90" height="{0}" viewBox="0 0 90 {0}" data-tip="{1}">{2}</svg>').format(
        height, tip, Markup("").join(rows)
    )


def legend_marker(shape: str) -> Markup:
    """Draw the shape of a marker alone, for a legend."""
    return Markup(
        '<svg class="key m-{0}" width="18" height="18" viewBox="-9 -9 18 18" aria-hidden="true">{1}</svg>'
    ).format(shape, MARKER_SHAPES[shape])
