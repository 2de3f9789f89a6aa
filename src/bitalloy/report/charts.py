"""Charts as SVG text, written here by small functions.

A plotting library would add tens of megabytes to an install that is light on purpose, for two charts. Colours come
from the page's style sheet through classes and `currentColor`, so that the charts follow light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 960
PALETTE = 8
"""Number of series colours in the style sheet."""
REACH = 2.5
"""The latency chart shows whiskers up to this multiple of the longest bar."""


@dataclass(frozen=True)
class Marker:
    """A point of a chart with the text that a pointer over it shows."""

    x: float
    y: float
    tip: str
    shape: str = "dot"
    """A key of `MARKER_SHAPES`."""
    interval: tuple[float, float] | None = None
    """Interval (low, high) of y; None for no whisker."""


@dataclass(frozen=True)
class Series:
    """All lines and points of a chart that have one colour."""

    name: str
    line: tuple[Marker, ...]
    """Points that a line joins in this order."""
    pairs: tuple[tuple[Marker, Marker], ...] = ()
    """Prediction and measurement of the same model, joined by a dashed line."""
    marked: tuple[Marker, ...] = ()
    """Single points, which are drawn on top."""

    def markers(self) -> tuple[Marker, ...]:
        """Return all points of the series."""
        return (*self.line, *(m for pair in self.pairs for m in pair), *self.marked)


@dataclass(frozen=True)
class Bar:
    """A model in the latency chart, in milliseconds."""

    name: str
    median: float
    low: float
    high: float
    label: str
    tip: str
    style: str


@dataclass(frozen=True)
class Scale:
    """Linear map from values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


# Each shape is drawn around the origin in `currentColor`, as the style sheet's class `m-<name>` fills it.
MARKER_SHAPES = {
    "dot": Markup('<circle r="3.5"/>'),
    "seen": Markup('<path d="M0-5 5 0 0 5-5 0z"/>'),
    "chosen": Markup('<circle r="7.5"/><circle r="3.5" class="core"/>'),
    "mixed": Markup('<path d="M0-8 8 0 0 8-8 0z"/>'),
    "lowest-predicted": Markup('<rect x="-5.5" y="-5.5" width="11" height="11"/>'),
    "lowest": Markup('<rect x="-6" y="-6" width="12" height="12"/>'),
    "off": Markup('<path d="M0-6 6 4-6 4z"/>'),
}


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers that cover [low, high] in about `count` steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0.31, 1.04, 5)
    [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    """
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1.0, 2.0, 5.0, 10.0) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, max(last, first + 1) + 1)]


def pareto(
    series: Sequence[Series],
    *,
    ceiling: float,
    latency_limit: float | None = None,
    floor_db: float | None = None,
) -> Markup:
    """Draw plans by latency over float (x) and SQNR in dB (y), with one colour per head.

    Args:
        series: one per head.
        ceiling: points above this SQNR are drawn as triangles at the upper edge, outside the scale.
        latency_limit: budget as a ratio to float, drawn as a line.
        floor_db: budget on SQNR, drawn as a line.
    """
    height, left, right, top, bottom = 440, 58, 18, 24, 52
    points = [m for s in series for m in s.markers()]
    xs = [m.x for m in points] + ([latency_limit] if latency_limit is not None else [])
    inside = [m for m in points if m.y <= ceiling]
    ys = [v for m in inside for v in (m.y, *(m.interval or ()))] + ([floor_db] if floor_db is not None else [])
    x_ticks = ticks(*_padded(xs or [0.5, 1.0], 0.02), 8)
    y_ticks = ticks(*_padded(ys or [0.0, 40.0], 0.04), 7)
    x = Scale(x_ticks[0], x_ticks[-1], left, WIDTH - right)
    y = Scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    parts = [_grid(x, y, x_ticks, y_ticks)]
    parts.append(_axis_titles("Latency, ratio to the float model (left is faster)", "SQNR, dB (up is better)", x, y))
    if latency_limit is not None:
        at = x(latency_limit)
        right_side = at < (x.start + x.stop) / 2
        parts.append(_line(at, y.start, at, y.stop, "limit"))
        parts.append(
            _text(
                at + (5 if right_side else -5),
                y.start - 6,
                f"budget {latency_limit:.2f}×",
                "limit-text" if right_side else "limit-text end",
            )
        )
    if floor_db is not None:
        parts.append(_line(x.start, y(floor_db), x.stop, y(floor_db), "limit"))
        parts.append(_text(x.stop - 6, y(floor_db) - 6, f"floor {floor_db:g} dB", "limit-text end"))
    parts += [_series(one, index, x, y, ceiling) for index, one in enumerate(series)]
    summary = f"Scatter plot of {len(points)} points; the table below holds the same numbers."
    return _svg(height, summary, parts)


def latency_chart(bars: Sequence[Bar], *, limit_ms: float | None = None) -> Markup:
    """Draw median latencies as bars from zero, with whiskers from the 10th to the 90th percentile.

    A whisker that goes far beyond the bars (a machine that was busy) ends in an arrow with its number, so that the
    bars stay readable.
    """
    left, right, top, pitch, bottom = 92, 140, 26, 44, 48
    height = top + pitch * len(bars) + bottom
    most = min(max(b.high for b in bars), REACH * max(b.median for b in bars))
    x_ticks = ticks(0.0, max(most, limit_ms or 0.0) * 1.02, 8)
    x = Scale(x_ticks[0], x_ticks[-1], left, WIDTH - right)
    y = Scale(0, 1, height - bottom, top)
    parts = [_grid(x, y, x_ticks, ()), _axis_titles("Latency of one inference, ms", None, x, y)]
    for index, bar in enumerate(bars):
        middle = top + pitch * (index + 0.5)
        parts.append(_text(left - 10, middle + 4.5, bar.name, "label end"))
        parts.append(
            Markup('<g data-tip="{}"><rect class="bar {}" x="{}" y="{}" width="{}" height="24" rx="3"/>{}</g>').format(
                bar.tip,
                bar.style,
                left,
                _px(middle - 12),
                _px(max(x(bar.median) - left, 1)),
                _spread(bar, x, middle),
            )
        )
        parts.append(_text(WIDTH - right + 12, middle + 4.5, bar.label, "value"))
    if limit_ms is not None:
        parts.append(_line(x(limit_ms), y.start, x(limit_ms), y.stop, "limit"))
        parts.append(_text(x(limit_ms), top - 8, f"budget {limit_ms:.4g} ms", "limit-text middle"))
    names = "; ".join(f"{b.name} {b.median:.4g} ms" for b in bars)
    return _svg(height, f"Bar chart of median latency: {names}.", parts)


def _spread(bar: Bar, x: Scale, middle: float) -> Markup:
    """The whisker of a bar: with an end, or beyond the scale with an arrow and the value."""
    low, high = x(min(bar.low, x.high)), x(min(bar.high, x.high))
    start = Markup('<path class="spread" d="M{0} {1}H{2}M{0} {3}v10').format(
        _px(low), _px(middle), _px(high), _px(middle - 5)
    )
    if bar.high <= x.high:
        return start + Markup('M{} {}v10"/>').format(_px(high), _px(middle - 5))
    return (
        start
        + Markup('M{} {}l6 5l-6 5"/>').format(_px(high - 6), _px(middle - 5))
        + _text(high - 10, middle - 6, f"p90 {bar.high:.3g} ms", "tick end")
    )


def shares(values: Iterable[float], tip: str) -> Markup:
    """Draw thin bars under each other, one per series, for shares between 0 and 1."""
    rows = [
        Markup('<rect class="track" y="{0}" width="90" height="4" rx="1.5"/>').format(6 * i)
        + Markup('<rect class="h{0}" y="{1}" width="{2}" height="4" rx="1.5"/>').format(
            i % PALETTE, 6 * i, _px(90 * min(max(value, 0.0), 1.0))
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


def _series(series: Series, index: int, x: Scale, y: Scale, ceiling: float) -> Markup:
    def place(marker: Marker) -> tuple[float, float]:
        return x(marker.x), y(min(marker.y, y.high)) if marker.y <= ceiling else y.stop

    parts: list[Markup] = []
    route = [place(m) for m in series.line if m.y <= ceiling]
    if len(route) > 1:
        path = "M" + "L".join(f"{_px(px)} {_px(py)}" for px, py in route)
        parts.append(Markup('<path class="front" d="{}"/>').format(path))
    for before, after in series.pairs:
        (x1, y1), (x2, y2) = place(before), place(after)
        parts.append(_line(x1, y1, x2, y2, "join"))
    for marker in series.markers():
        px, py = place(marker)
        if marker.interval is not None and marker.y <= ceiling:
            low, high = (y(min(v, y.high)) for v in marker.interval)
            parts.append(
                Markup('<path class="whisker" d="M{0} {1}V{2}M{3} {1}h8M{3} {2}h8"/>').format(
                    _px(px), _px(low), _px(high), _px(px - 4)
                )
            )
        shape = marker.shape if marker.y <= ceiling else "off"
        parts.append(
            Markup('<g class="m-{}" data-tip="{}" transform="translate({} {})">{}</g>').format(
                shape, marker.tip, _px(px), _px(py), MARKER_SHAPES[shape]
            )
        )
    return Markup('<g class="series h{}">{}</g>').format(index % PALETTE, Markup("").join(parts))


def _grid(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Markup:
    parts = []
    for value in x_ticks:
        parts.append(_line(x(value), y.start, x(value), y.stop, "grid"))
        parts.append(_text(x(value), y.start + 18, _tick_text(value, x_ticks), "tick middle"))
    for value in y_ticks:
        parts.append(_line(x.start, y(value), x.stop, y(value), "grid"))
        parts.append(_text(x.start - 8, y(value) + 4, _tick_text(value, y_ticks), "tick end"))
    return Markup("").join(parts)


def _axis_titles(horizontal: str, vertical: str | None, x: Scale, y: Scale) -> Markup:
    found = _text((x.start + x.stop) / 2, y.start + 42, horizontal, "axis middle")
    if vertical is not None:
        found += Markup('<text class="axis middle" transform="translate(16 {}) rotate(-90)">{}</text>').format(
            _px((y.start + y.stop) / 2), vertical
        )
    return found


def _svg(height: int, summary: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, summary, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(style, _px(x), _px(y), text)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<path class="{}" d="M{} {}L{} {}"/>').format(style, _px(x1), _px(y1), _px(x2), _px(y2))


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share
    return low - pad, high + pad


def _tick_text(value: float, all_ticks: Sequence[float]) -> str:
    step = all_ticks[1] - all_ticks[0]
    text = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return text.replace("-", "−")


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
