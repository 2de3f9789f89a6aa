"""The page that shows several finished runs side by side: one HTML file without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitalloy.core.checked import RunDifference
from bitalloy.core.outcome import Summary
from bitalloy.core.records import Estimate
from bitalloy.report import formats
from bitalloy.report.page import PLAIN_STYLE, content_policy, page_environment
from bitalloy.report.targets import compare_targets
from bitalloy.report.text import difference_table

COMPARISON_STYLE = f"""{PLAIN_STYLE}
.charts {{ display: flex; flex-wrap: wrap; gap: 1rem 2rem; }} figure {{ margin: 0; }} figcaption {{ font-weight: 600; }}
"""
CHART_WIDTH, NAMES_WIDTH, ROW_HEIGHT = 460, 190, 22
"""Pixels of a chart: its width, the part of it for names, and the height of a line."""
MOST_UNITS = 200
"""Units in another scheme that are named; the others are counted."""


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    """Its directory, as it was given."""
    report: str
    """The address of its report; empty where there is none."""
    summary: Summary
    difference: RunDifference | None
    """How it differs from the first one, of which it is None."""


@dataclass(frozen=True)
class ChartRow:
    """A run in a chart; positions are pixels from its left."""

    name: str
    text: str
    x: float
    low: float
    high: float


@dataclass(frozen=True)
class IntervalChart:
    """One quantity of all runs, each with its interval."""

    title: str
    rows: tuple[ChartRow, ...]
    line: float
    """Where the float model stands, in pixels."""

    @property
    def height(self) -> int:
        """Return the pixels from top to bottom."""
        return ROW_HEIGHT * (len(self.rows) + 1)


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """Write runs side by side as one offline HTML page, in which all names are text."""
    summaries = [run.summary for run in runs]
    return (
        page_environment()
        .get_template("compare.html")
        .render(
            policy=content_policy((COMPARISON_STYLE,)),
            style=Markup(COMPARISON_STYLE),
            runs=runs,
            table=compare_targets(summaries, [run.name for run in runs]),
            charts=list(_charts(runs)),
            tables=[(run, difference_table(run.difference)) for run in runs if run.difference is not None],
            most=MOST_UNITS,
            size=(CHART_WIDTH, NAMES_WIDTH, ROW_HEIGHT),
        )
    )


def _charts(runs: Sequence[ComparedRun]) -> Iterator[IntervalChart]:
    times = [(run.name, run.summary.latency_ratio, run.summary.latency_ratio_interval) for run in runs]
    yield _chart("Latency over float", times, 1.0, 2)
    for name in dict.fromkeys(name for run in runs for name in run.summary.metrics):
        found = [(run.name, run.summary.metrics.get(name)) for run in runs]
        drops = [(run, metric.lost, metric.drop_mixed) for run, metric in found if metric is not None]
        yield _chart(f"Drop of {name}", drops, 0.0, 4)


def _chart(title: str, values: Sequence[tuple[str, float, Estimate | None]], zero: float, digits: int) -> IntervalChart:
    ends = [(v if e is None else e.low, v if e is None else e.high) for _, v, e in values]
    shown = [zero, *(v for _, v, _ in values), *(x for end in ends for x in end)]
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.5

    def at(value: float) -> float:
        share = (value - low + margin) / (high - low + 2 * margin)
        return round(NAMES_WIDTH + (CHART_WIDTH - NAMES_WIDTH) * share, 1)

    rows = tuple(
        ChartRow(
            name=name,
            text=f"{value:z.{digits}f}" + ("" if e is None else f" {formats.interval_text(e, digits)}"),
            x=at(value),
            low=at(ends[index][0]),
            high=at(ends[index][1]),
        )
        for index, (name, value, e) in enumerate(values)
    )
    return IntervalChart(title, rows, at(zero))
