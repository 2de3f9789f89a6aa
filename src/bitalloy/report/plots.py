"""Data of the charts, as the page's script reads them to draw with Observable Plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from bitalloy.core.outcome import Evaluation, Summary
from bitalloy.core.plans import Budget, CostTable, ParetoPoint, PlanReport
from bitalloy.core.records import Estimate, Latency
from bitalloy.core.units import UnitGraph
from bitalloy.report import figures, formats
from bitalloy.report.breakdown import ReportTables
from bitalloy.report.text import counted

OFF_SCALE_DB = 80.0
"""SQNR in dB above which plans are drawn at the edge of the plot, because their error is negligible."""


class PlotPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A point of a chart."""

    x: float
    y: float
    shape: str
    """A key of `charts.MARKER_SHAPES`."""
    tip: str
    """What a pointer over it, and the keyboard's focus, show."""
    plan: str = ""
    """The plan in all its numbers, which a click shows."""
    command: str = ""
    """What makes this plan, to be given in the run's folder."""
    low: float | None = None
    """Lower end of the interval of y; None without one."""
    high: float | None = None
    pair: int | None = None
    """Number that a prediction and its measurement share; they are joined by a line."""


class PlotView(msgspec.Struct, frozen=True, kw_only=True):
    """The front by one head or one metric."""

    name: str
    label: str
    """Title of the vertical axis, with the unit."""
    points: list[PlotPoint]
    limit: float | None = None
    """The budget's limit on y; None without one."""
    limit_text: str = ""
    ceiling: float | None = None
    """Value of y above which points are drawn at the edge; None for no such value."""


class PlotBar(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the latency chart, in ms."""

    name: str
    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    label: str
    tip: str
    mixed: bool


class Plots(msgspec.Struct, frozen=True, kw_only=True):
    """Data of all charts."""

    views: list[PlotView]
    ratio_limit: float | None
    """The budget's limit on latency over float."""
    bars: list[PlotBar]
    limit_ms: float | None
    """The budget's limit on latency."""
    checks: list[PlotPoint]
    """Predicted (x) and measured (y) SQNR in dB of everything that was measured."""


def plots_of(summary: Summary, tables: ReportTables) -> Plots:
    """Collect the data of all charts of a run."""
    budget, reference = summary.budget, summary.latency_spread_ms.reference.median_ms
    if budget.by_default:
        budget = Budget()
    ratios = [budget.latency_ratio] if budget.latency_ratio is not None else []
    if budget.latency_ms is not None:
        ratios.append(budget.latency_ms / summary.latency_ms.reference)
    limits = [budget.latency_ms] if budget.latency_ms is not None else []
    if budget.latency_ratio is not None:
        limits.append(budget.latency_ratio * reference)
    views = [_head_view(i, head, summary, tables) for i, head in enumerate(tables.heads)]
    return Plots(
        views=[*views, *_metric_views(summary)],
        ratio_limit=min(ratios) if ratios else None,
        bars=_bars(summary),
        limit_ms=min(limits) if limits else None,
        checks=list(_checks(summary, tables)),
    )


def points_of(plan: PlanReport, cost: CostTable) -> list[tuple[ParetoPoint, float, bool]]:
    """(point, predicted latency over float, whether it is the chosen plan), fastest first."""
    chosen = plan.chosen
    found = [(p, p.predicted_latency_us / cost.float_us, p.chosen == chosen) for p in plan.pareto]
    return sorted(found, key=lambda t: t[1])


def front_command(ratio: float) -> str:
    """Return the command that finds the plan of the front at a predicted latency over float."""
    return f"bitalloy plan . --latency {math.ceil(1000 * ratio) / 1000:.3f}x"


def _plan_text(point: ParetoPoint, ratio: float, heads: Sequence[str]) -> str:
    errors = ", ".join(f"{h} {formats.decibel_text(point.sqnr_db[i])}" for i, h in enumerate(heads))
    return (
        f"{counted(point.chosen.counts())} units; {formats.milliseconds(point.predicted_latency_us / 1e3)}, "
        f"{formats.ratio(ratio)} of float's latency, predicted; {formats.byte_size(point.size_bytes)}; SQNR predicted: "
        f"{errors}; proven to be within {100 * point.optimality_gap:.1f} % of the best plan at this latency."
    )


def _head_view(index: int, head: str, summary: Summary, tables: ReportTables) -> PlotView:
    plan, heads = tables.plan, tables.heads

    def marked(what: str, x: float, y: float, shape: str, pair: int, ends: Estimate | None = None) -> PlotPoint:
        interval = f" (95 % interval {ends.low:.1f} to {ends.high:.1f})" if ends is not None else ""
        return PlotPoint(
            x=x,
            y=y,
            shape=shape,
            tip=f"{head}: {formats.decibel_text(y)}{interval}\n{what}, {formats.ratio(x)} of float's latency",
            low=ends.low if ends is not None else None,
            high=ends.high if ends is not None else None,
            pair=pair,
        )

    found = []
    for number, (point, x, chosen) in enumerate(points_of(plan, tables.cost)):
        what = f"plan with {counted(point.chosen.counts())} units"
        predicted = marked(f"{what}, predicted", x, point.sqnr_db[index], "dot", number)
        text, command = _plan_text(point, x, heads), front_command(x)
        found.append(msgspec.structs.replace(predicted, plan=text, command=command))
        if not chosen and point.measured_ratio is not None and point.measured_db is not None:
            seen = marked(f"{what}, measured", point.measured_ratio, point.measured_db[index], "seen", number)
            found.append(msgspec.structs.replace(seen, plan=text, command=command))
    return PlotView(
        name=head,
        label=f"SQNR {head}, dB (up is better)",
        points=[*found, *_measured(head, marked, summary, tables.units, tables.cost, len(found))],
        limit=summary.budget.floor_db(head),
        limit_text="floor",
        ceiling=OFF_SCALE_DB,
    )


def _measured(
    head: str, marked: _Marked, summary: Summary, units: UnitGraph, cost: CostTable, first: int
) -> Iterable[PlotPoint]:
    """The mixed model and the one with all that it can in the lowest scheme, each with its prediction."""
    pair = summary.sqnr_db.get(head)
    if pair is None:
        return
    kind = "estimated latency, measured error" if summary.latency_estimated else "measured"
    interval = summary.sqnr_interval_db.get(head)
    yield marked(f"mixed model, {kind}", summary.latency_ratio, pair.mixed.measured, "mixed", first, interval)
    if pair.mixed.predicted is not None:
        x = summary.predicted_latency_ratio
        yield marked("chosen plan, predicted", x, pair.mixed.predicted, "chosen", first)
    name = f"all-{units.lowest_name} model"
    ratio = summary.latency_ms.lowest / summary.latency_ms.reference
    yield marked(f"{name}, {kind}", ratio, pair.lowest.measured, "lowest", first + 1)
    if pair.lowest.predicted is not None:
        x = figures.predicted_lowest_ratio(units, cost)
        yield marked(f"{name}, predicted", x, pair.lowest.predicted, "lowest-predicted", first + 1)


class _Marked(Protocol):
    """Type of the function that makes a point of a head."""

    def __call__(
        self, what: str, x: float, y: float, shape: str, pair: int, ends: Estimate | None = None
    ) -> PlotPoint: ...


def _metric_views(summary: Summary) -> Iterable[PlotView]:
    """A view of each metric with paired drops: of all plans that were evaluated, and of the models at the end."""
    for name, metric in summary.metrics.items():
        models = [
            ("mixed model", summary.latency_ratio, metric.drop_mixed, "mixed"),
            ("lowest model", summary.latency_ms.lowest / summary.latency_ms.reference, metric.drop_lowest, "lowest"),
        ]
        points = [_drop_point(name, *one) for one in models if one[2] is not None]
        points += [p for one in summary.evaluations for p in _evaluated(name, one)]
        if points:
            limit = min((one.asked for one in summary.status.limits if one.metric == name), default=None)
            yield PlotView(
                name=name,
                label=f"Drop of {name} against float (down is better)",
                points=points,
                limit=limit,
                limit_text="limit",
            )


def _drop_point(name: str, what: str, ratio: float, drop: Estimate | None, shape: str) -> PlotPoint:
    assert drop is not None
    text = f"drop of {name}: {formats.signed(drop.value, 4)} (95 % interval {formats.interval_text(drop, 4)})"
    tip = f"{text}\n{what}, {formats.ratio(ratio)} of float's latency"
    return PlotPoint(x=ratio, y=drop.value, shape=shape, tip=tip, low=drop.low, high=drop.high)


def _evaluated(name: str, one: Evaluation) -> Iterable[PlotPoint]:
    if name not in one.drops:
        return
    known = one.estimates.get(name)
    ends = f"; by all that was evaluated {formats.interval_text(known, 4)}" if known is not None else ""
    yield PlotPoint(
        x=one.predicted_ratio,
        y=one.drops[name],
        shape="seen",
        tip=f"drop of {name}: {formats.signed(one.drops[name], 4)} on {one.images} images{ends}\n"
        f"plan with {counted(one.schemes)} units, {formats.ratio(one.predicted_ratio)} of float's latency, predicted",
        low=known.low if known is not None else None,
        high=known.high if known is not None else None,
        plan=f"{counted(one.schemes)} units; limits {'kept' if one.kept else 'not kept'}.",
        command=front_command(one.predicted_ratio),
    )


def _bars(summary: Summary) -> list[PlotBar]:
    spread = summary.latency_spread_ms

    def bar(name: str, one: Latency) -> PlotBar:
        median = formats.milliseconds(one.median_ms)
        ends = f"p10 {formats.milliseconds(one.p10_ms)}, p90 {formats.milliseconds(one.p90_ms)}, {one.count} runs"
        return PlotBar(
            name=name,
            median=one.median_ms,
            low=one.p10_ms,
            high=one.p90_ms,
            label=median,
            tip=f"{name}: estimated {median}" if summary.latency_estimated else f"{name}: median {median}\n{ends}",
            mixed=name == "mixed",
        )

    models = (
        ("mixed", spread.mixed),
        ("float", spread.reference),
        ("float, rewritten", spread.rewritten),
        ("all lowered", spread.lowest),
        (f"all {figures.best_single(summary)}", spread.single),
    )
    return [bar(name, one) for name, one in models if one is not None]


def _checks(summary: Summary, tables: ReportTables) -> Iterable[PlotPoint]:
    """What was predicted and measured: rounds, all lowered, plans of the front, and units that were run alone."""

    def check(what: str, head: str, predicted: float | None, measured: float, shape: str) -> Iterable[PlotPoint]:
        if predicted is None or max(predicted, measured) > OFF_SCALE_DB:
            return
        gap = formats.signed(measured - predicted, 1)
        tip = f"{what}, {head}\npredicted {predicted:.1f} dB, measured {measured:.1f} dB: {gap} dB"
        yield PlotPoint(x=predicted, y=measured, shape=shape, tip=tip)

    for number, one in enumerate(summary.rounds, start=1):
        for head, predicted, measured in zip(tables.heads, one.predicted_db, one.sqnr_db, strict=False):
            yield from check(f"plan of round {number}", head, predicted, measured, "mixed")
    for head, pair in summary.sqnr_db.items():
        yield from check("all lowered", head, pair.lowest.predicted, pair.lowest.measured, "lowest")
    for point, ratio, _ in points_of(tables.plan, tables.cost):
        if point.measured_db is not None:
            for head, predicted, measured in zip(tables.heads, point.sqnr_db, point.measured_db, strict=False):
                yield from check(f"plan of the front at {formats.ratio(ratio)}", head, predicted, measured, "seen")
    for number, one in enumerate(summary.rounds, start=1):
        for found in one.repair.remeasured if one.repair is not None else ():
            for head, change in found.change_db.items():
                if len(found.units) == 1 and head in tables.heads:
                    row = tables.rows.get(("unit", found.units[0], tables.measured, "all", head))
                    if row is not None:
                        what = f"{found.units[0]} alone, round {number}"
                        yield from check(what, head, row.sqnr_db.value, row.sqnr_db.value - change, "dot")
