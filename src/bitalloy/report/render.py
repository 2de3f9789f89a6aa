"""Rendering of the report: one self-contained HTML file, as a pure function of a run's records.

Every name in it is foreign input. Three lines of defence: the template escapes by default; the data for the script is
JSON without `<`, `>` and `&`; and a content security policy lets no other script, style or request through.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from bitalloy.core.audited import Audit, Compilation
from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import Summary
from bitalloy.core.plans import CostTable, ParetoPoint, PlanReport
from bitalloy.core.records import SensitivityTable
from bitalloy.core.units import UnitGraph
from bitalloy.report import charts, figures, formats
from bitalloy.report.breakdown import ReportTables, payload, region_tree
from bitalloy.report.text import counted
from bitalloy.report.verdict import ship_verdict

OFF_SCALE_DB = 80.0
"""SQNR in dB above which plans are drawn at the edge of the plot, because their error is negligible."""

LIBRARIES = ("dagre",)
"""Libraries inside the page, in the folder `libraries`: dagre lays out the graph."""
SCRIPTS = ("script.js", "graph.js")


@dataclass(frozen=True)
class Audits:
    """What is known of how the shipped model runs."""

    executed: Audit | None = None
    """Audit of what the runtime executed; None where none was made."""
    compiled: Compilation | None = None
    """What a compiler made of it; None where none was asked."""


def render_report(
    summary: Summary,
    plan: PlanReport,
    table: SensitivityTable,
    units: UnitGraph,
    cost: CostTable,
    audits: Audits | None = None,
) -> str:
    """Write the report as one offline HTML page.

    Args:
        summary: result of the run.
        plan: the shipped plan, with its Pareto front.
        table: sensitivities of sites, units and regions.
        units: the model on the plan's target.
        cost: measured cost table.
        audits: what is known of how the model runs; None where nothing is.
    """
    heads = figures.heads_of(plan, summary)
    tables = ReportTables(plan, table, units, cost, heads)
    style, scripts = _asset("style.css"), (*map(_library, LIBRARIES), *map(_asset, SCRIPTS))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitalloy.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(fmt=formats, key=charts.legend_marker, counted=counted)
    return environment.get_template("template.html").render(
        policy=_policy((style,), scripts),
        style=Markup(style),
        scripts=tuple(map(Markup, scripts)),
        data=embedded_json(payload(tables)),
        summary=summary,
        plan=plan,
        table=table,
        cost=cost,
        audits=audits or Audits(),
        heads=heads,
        verdict=ship_verdict(summary, plan, cost),
        limits=figures.limits(summary.status),
        cautions=figures.cautions(summary),
        columns=figures.model_columns(summary, units),
        groups=figures.key_figures(summary, units, cost),
        pareto_chart=_pareto_chart(summary, plan, units, cost, heads),
        latency_chart=_latency_chart(summary),
        given=figures.given_roundings(summary),
        single=figures.single_formats(summary),
        rounds=figures.rounds(summary, heads),
        repairs=figures.repairs(summary, heads),
        evaluations=figures.evaluations(summary),
        corrections=figures.corrections(summary, heads),
        points=_points(plan, cost),
        regions=region_tree(tables),
        units=units,
        schemes=tables.schemes,
        measured=tables.measured.upper(),
        times=_time_columns(tables),
        timing=tables.timing,
        planned=tables.planned,
    )


def _time_columns(tables: ReportTables) -> tuple[tuple[str, str, str], ...]:
    """Key, heading and unit of the columns of time: of the baseline, and of every scheme."""
    names = ("float", *(scheme.upper() for scheme in tables.schemes))
    return tuple((f"time-{i}", f"Time {name}", "µs") for i, name in enumerate(names))


def embedded_json(value: object) -> Markup:
    """Encode a value as JSON that is safe inside a script element: no character can end the element or open another."""
    text = to_json(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(name: str) -> str:
    return resources.files("bitalloy.report").joinpath(name).read_text(encoding="utf-8")


def _library(name: str) -> str:
    """Return the code of a library, with its licence before it, as that asks for."""
    return f"/*\n{_asset(f'libraries/{name}.LICENSE.txt')}*/\n{_asset(f'libraries/{name}.min.js')}"


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Content security policy: these styles, these scripts, images inside the page, nothing else."""

    def digests(texts: Sequence[str]) -> str:
        found = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in found)

    return f"default-src 'none'; img-src data:; style-src {digests(styles)}; script-src {digests(scripts)}"


def _points(plan: PlanReport, cost: CostTable) -> list[tuple[ParetoPoint, float, bool]]:
    """(point, predicted latency over float, whether it is the chosen plan), fastest first."""
    chosen = plan.chosen
    found = [(p, p.predicted_latency_us / cost.all_float_us, p.chosen == chosen) for p in plan.pareto]
    return sorted(found, key=lambda t: t[1])


def _counts(point: ParetoPoint) -> str:
    """Number of units in each lower scheme."""
    return f"{counted(point.chosen.counts())} units"


def _pareto_chart(
    summary: Summary, plan: PlanReport, units: UnitGraph, cost: CostTable, heads: tuple[str, ...]
) -> Markup:
    budget = summary.budget
    limits = [budget.latency_ratio] if budget.latency_ratio is not None else []
    if budget.latency_ms is not None:
        limits.append(budget.latency_ms / summary.latency_ms.reference)
    series = [_series(i, head, summary, plan, units, cost) for i, head in enumerate(heads)]
    return charts.pareto(
        series,
        ceiling=OFF_SCALE_DB,
        latency_limit=min(limits) if limits else None,
        floor_db=budget.min_sqnr_db,
    )


def _series(
    index: int, head: str, summary: Summary, plan: PlanReport, units: UnitGraph, cost: CostTable
) -> charts.Series:
    def marker(what: str, x: float, y: float, shape: str, interval: tuple[float, float] | None = None) -> charts.Marker:
        ends = f" (95 % {interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
        tip = f"{head}: {formats.decibel_text(y)}{ends}\n{what}, {formats.ratio(x)} of float's latency"
        return charts.Marker(x, y, tip, shape, interval)

    line = tuple(
        marker(f"plan with {_counts(point)}, predicted", x, point.sqnr_db[index], "dot")
        for point, x, _ in _points(plan, cost)
    )
    pairs: list[tuple[charts.Marker, charts.Marker]] = [
        (
            marker(f"plan with {_counts(p)}, predicted", x, p.sqnr_db[index], "dot"),
            marker(f"plan with {_counts(p)}, measured", p.measured_ratio, p.measured_db[index], "seen"),
        )
        for p, x, chosen in _points(plan, cost)
        if not chosen and p.measured_ratio is not None and p.measured_db is not None
    ]
    marked: list[charts.Marker] = []
    pair = summary.sqnr_db.get(head)
    if pair is not None:
        interval = summary.sqnr_interval_db.get(head)
        ends = (interval.low, interval.high) if interval is not None else None
        kind = "estimated latency, measured error" if summary.latency_estimated else "measured"
        mixed = marker(f"mixed model, {kind}", summary.latency_ratio, pair.mixed.measured, "mixed", ends)
        measured_ratio = summary.latency_ms.lowest / summary.latency_ms.reference
        lowest = marker(f"all-{units.lowest_name} model, {kind}", measured_ratio, pair.lowest.measured, "lowest")
        if pair.mixed.predicted is None:
            marked.append(mixed)
        else:
            x = summary.predicted_latency_ratio
            pairs.append((marker("chosen plan, predicted", x, pair.mixed.predicted, "chosen"), mixed))
        if pair.lowest.predicted is None:
            marked.append(lowest)
        else:
            x = figures.predicted_lowest_ratio(units, cost)
            pairs.append(
                (
                    marker(f"all-{units.lowest_name} model, predicted", x, pair.lowest.predicted, "lowest-predicted"),
                    lowest,
                )
            )
    return charts.Series(head, line, tuple(pairs), tuple(marked))


def _latency_chart(summary: Summary) -> Markup:
    reference = summary.latency_spread_ms.reference.median_ms
    budget = summary.budget
    limits = [budget.latency_ms] if budget.latency_ms is not None else []
    if budget.latency_ratio is not None:
        limits.append(budget.latency_ratio * reference)
    spread = summary.latency_spread_ms
    bars = [
        charts.Bar(
            name=name,
            median=one.median_ms,
            low=one.p10_ms,
            high=one.p90_ms,
            label=f"{formats.milliseconds(one.median_ms)}  {formats.ratio(one.median_ms / reference)}",
            tip=(
                f"{name}: estimated {formats.milliseconds(one.median_ms)}"
                if summary.latency_estimated
                else f"{name}: median {formats.milliseconds(one.median_ms)}\n"
                f"p10 {formats.milliseconds(one.p10_ms)}, p90 {formats.milliseconds(one.p90_ms)}, {one.count} runs"
            ),
            style=style,
        )
        for name, style, one in (
            ("float", "b-float", spread.reference),
            ("float, rewritten", "b-float", spread.rewritten),
            ("all lowered", "b-lowest", spread.lowest),
            (f"all {figures.best_single(summary)}", "b-lowest", spread.single),
            ("mixed", "b-mixed", spread.mixed),
        )
        if one is not None
    ]
    return charts.latency_chart(bars, limit_ms=min(limits) if limits else None)
