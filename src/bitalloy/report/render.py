"""Rendering of the report: one self-contained HTML file, as a pure function of a run's records.

Every name in it is foreign input. Three lines of defence: the template escapes by default; the data for the script is
JSON without `<`, `>` and `&`; and a content security policy lets no other script, style or request through.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from bitalloy.core.audited import Audit, Compilation
from bitalloy.core.encoding import to_json
from bitalloy.core.examples import Examples
from bitalloy.core.outcome import Summary
from bitalloy.core.plans import CostTable, PlanReport
from bitalloy.core.records import Calibration, SensitivityTable
from bitalloy.core.units import UnitGraph
from bitalloy.report import charts, figures, formats
from bitalloy.report.breakdown import ReportTables, payload, region_tree
from bitalloy.report.glossary import explained
from bitalloy.report.page import content_policy, page_environment
from bitalloy.report.plots import plots_of, points_of
from bitalloy.report.ranges import worst_ranges
from bitalloy.report.targets import compare_targets
from bitalloy.report.text import counted
from bitalloy.report.verdict import ship_verdict

LIBRARIES = ("d3", "plot", "dagre")
"""Libraries inside the page, in the folder `libraries`: Plot draws charts with d3, dagre lays out the graph."""
SCRIPTS = ("script.js", "plots.js", "graph.js")
PLOT_STYLE = """:where(.plot) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.plot text),
:where(.plot tspan) {
  white-space: pre;
}"""
"""The style that Plot puts into each chart of the class `plot`, which the policy must allow."""


@dataclass(frozen=True)
class Extras:
    """What is known of a run beside what every run knows."""

    executed: Audit | None = None
    """Audit of what the runtime executed; None where none was made."""
    compiled: Compilation | None = None
    """What a compiler made of it; None where none was asked."""
    examples: Examples | None = None
    """The evaluated samples on which the models differ most; None where no task was evaluated."""
    others: tuple[Summary, ...] = ()
    """Results of the same model for other targets, which are in folders of their names."""
    calibration: Calibration | None = None
    """Ranges of all tensors; None where they are not at hand."""


def render_report(
    summary: Summary,
    plan: PlanReport,
    table: SensitivityTable,
    units: UnitGraph,
    cost: CostTable,
    extras: Extras | None = None,
) -> str:
    """Write the report as one offline HTML page.

    Args:
        summary: result of the run.
        plan: the shipped plan, with its Pareto front.
        table: sensitivities of sites, units and regions.
        units: the model on the plan's target.
        cost: measured cost table.
        extras: what else is known; None where nothing is.
    """
    heads = figures.heads_of(plan, summary)
    tables = ReportTables(plan, table, units, cost, heads)
    plots = plots_of(summary, tables)
    style, scripts = _asset("style.css"), (*map(_library, LIBRARIES), *map(_asset, SCRIPTS))
    environment = page_environment()
    environment.globals.update(fmt=formats, picture=_picture, term=explained, key=charts.legend_marker, counted=counted)
    known = extras or Extras()
    return environment.get_template("template.html").render(
        policy=content_policy((style, PLOT_STYLE), scripts),
        style=Markup(style),
        scripts=tuple(map(Markup, scripts)),
        data=embedded_json(payload(tables)),
        summary=summary,
        plan=plan,
        table=table,
        cost=cost,
        extras=known,
        targets=compare_targets((summary, *known.others)) if known.others else None,
        heads=heads,
        verdict=ship_verdict(summary, plan, cost),
        limits=figures.limits(summary.status),
        cautions=figures.cautions(summary),
        columns=figures.model_columns(summary, units),
        groups=figures.key_figures(summary, units, cost),
        plots=embedded_json(plots),
        views=[view.name for view in plots.views],
        checked=bool(plots.checks),
        given=figures.given_roundings(summary),
        single=figures.single_formats(summary),
        rounds=figures.rounds(summary, heads),
        repairs=figures.repairs(summary, heads),
        evaluations=figures.evaluations(summary),
        corrections=figures.corrections(summary, heads),
        ranges=worst_ranges(tables, known.calibration),
        classes=figures.classes(known.examples),
        points=points_of(plan, cost),
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


def _picture(jpeg: bytes) -> str:
    """Return the address of a JPEG file inside the page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _library(name: str) -> str:
    """Return the code of a library, with its licence before it, as that asks for."""
    return f"/*\n{_asset(f'libraries/{name}.LICENSE.txt')}*/\n{_asset(f'libraries/{name}.min.js')}"
