"""The report of a study: one HTML page without scripts, and its tables as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitalloy.core.records import Estimate
from bitalloy.core.studies import PartDamage, StudyResult
from bitalloy.report import formats
from bitalloy.report.page import PLAIN_STYLE, content_policy, page_environment
from bitalloy.report.tables import csv_text

STYLE = f"""{PLAIN_STYLE}
td.n {{ text-align: right; white-space: nowrap; }} .quiet {{ color: #55555c; }}
.yes {{ background: #dcefdc; }} .no {{ background: #f6dada; }} .undecided {{ background: #fbefcf; }}
.multiples {{ display: flex; flex-wrap: wrap; gap: 1rem; }} .multiple {{ width: 19rem; }}
:target {{ outline: 2px solid #3366cc; }}
"""
SCALE_DB = (15.0, 60.0)
"""SQNR of the darkest and of the lightest cell of the heat map."""
PLOT_WIDTH, LABEL_WIDTH, BAR_HEIGHT = 300, 150, 18


@dataclass(frozen=True)
class HeatMap:
    """Parts by models: the header and, for each part, the row that each model has of it."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[PartDamage | None, ...]], ...]


@dataclass(frozen=True)
class Multiple:
    """A small chart of the shares of one model's parts."""

    title: str
    bars: tuple[PartDamage, ...]


def render_study(result: StudyResult) -> str:
    """Write the result of a study as one offline HTML page, in which all names are text."""
    return (
        page_environment()
        .get_template("study.html")
        .render(
            policy=content_policy((STYLE,)),
            style=Markup(STYLE),
            result=result,
            fmt=formats,
            interval=_interval,
            percent=_percent,
            shade=_shade,
            ink=_ink,
            operators=heat_map(result.parts, "operator"),
            kinds=heat_map(result.parts, "kind"),
            regions=[*_multiples(result.parts, "region")],
            bar=_bar,
            plot=(PLOT_WIDTH, LABEL_WIDTH, BAR_HEIGHT),
        )
    )


def study_csv(result: StudyResult) -> str:
    """Write one line for each version of a model in each cell, and each metric of it."""
    found = result.listing()
    return csv_text(found.columns, found.rows)


def parts_csv(result: StudyResult) -> str:
    """Write one line for each part of each model on each head."""
    found = result.parts_listing()
    return csv_text(found.columns, found.rows)


def heat_map(parts: Sequence[PartDamage], scope: str) -> HeatMap:
    """Put the parts of all models beside each other, those with most models first."""
    rows = {(p.part, p.setting): p for p in parts if p.scope == scope and not p.head}
    columns = tuple(dict.fromkeys(column for _, column in rows))
    names = dict.fromkeys(part for part, _ in rows)
    lines = [(name, tuple(rows.get((name, column)) for column in columns)) for name in names]
    lines.sort(key=lambda line: -sum(one is not None for one in line[1]))
    return HeatMap(columns, tuple(lines))


def _multiples(parts: Sequence[PartDamage], scope: str) -> list[Multiple]:
    found: dict[str, list[PartDamage]] = {}
    for part in parts:
        if part.scope == scope and not part.head:
            found.setdefault(part.setting, []).append(part)
    return [Multiple(title, tuple(bars)) for title, bars in found.items()]


def _interval(value: Estimate, digits: int) -> str:
    if value.low == value.high:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _percent(value: Estimate | None) -> str:
    return "unknown" if value is None else f"{value.value:.0%} ({value.low:.0%} to {value.high:.0%})"


def _strength(part: PartDamage) -> float:
    low, high = SCALE_DB
    return min(1.0, max(0.0, (high - part.sqnr_db.value) / (high - low)))


def _shade(part: PartDamage) -> str:
    """Colour of a cell: the darker the more damage; a presentation attribute, which needs no style of its own."""
    strength = _strength(part)
    return "#" + "".join(f"{round(255 + strength * (end - 255)):02x}" for end in (158, 42, 43))


def _ink(part: PartDamage) -> str:
    return "#ffffff" if _strength(part) > 0.55 else "#1d1d1f"


def _bar(part: PartDamage) -> float:
    share = 0.0 if part.share is None else part.share.value
    return round((PLOT_WIDTH - LABEL_WIDTH - 45) * min(1.0, share), 1)
