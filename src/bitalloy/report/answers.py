"""The questions of a study, answered from its rows: yes, no, undecided, or not studied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from bitalloy.core.records import Estimate
from bitalloy.core.studies import Answer, PartContrast, PartDamage, StudyCell, answer_verdict
from bitalloy.report.damages import MOST_SENSITIVE
from bitalloy.zoo.questions import CONVOLUTIONAL, LANGUAGE_PARTS, METRICS, SIDES, TRANSFORMER, MetricQuestion

NOT_STUDIED = "not studied"
KEPT_DB = 30.0
"""SQNR from which on a format suits a part of a language model: the power of the error is a thousandth."""


def answer_all(
    cells: Sequence[StudyCell], parts: Sequence[PartDamage], contrasts: Sequence[PartContrast]
) -> tuple[Answer, ...]:
    """Answer every question of `zoo.questions` for every model that it is about.

    Args:
        cells: all cells of the study.
        parts: the damage of parts of all models.
        contrasts: differences between sides.
    """
    return tuple(
        answer
        for answers in (
            _sides(contrasts, parts),
            _metrics(cells),
            _operators(parts),
            _language(contrasts, parts),
            _formats(parts),
        )
        for answer in answers
    )


def _interval(value: Estimate, digits: int = 1) -> str:
    return f"{value.value:+.{digits}f} ({value.low:+.{digits}f} to {value.high:+.{digits}f})"


def _sides(contrasts: Sequence[PartContrast], parts: Sequence[PartDamage]) -> Iterator[Answer]:
    rows = {row.id: row for row in parts}
    for question in SIDES:
        found = [c for c in contrasts if c.question == question.text]
        if not found:
            yield _not_studied(question.text)
        for one in found:
            first, second = rows[one.first], rows[one.second]
            yield Answer(
                question=question.text,
                verdict=answer_verdict(one.value),
                told=f"{one.setting}: all of the {first.part} in {first.scheme} gives "
                f"{first.sqnr_db.value:.1f} dB on its own outputs, all of the {second.part} {second.sqnr_db.value:.1f} "
                f"dB: a difference of {_interval(one.value)} dB in damage.",
                value=one.value,
                rows=(one.first, one.second),
            )


def _metrics(cells: Sequence[StudyCell]) -> Iterator[Answer]:
    for question in METRICS:
        found = [answer for cell in cells if (answer := _metric(question, cell)) is not None]
        yield from found or [_not_studied(question.text)]


def _metric(question: MetricQuestion, cell: StudyCell) -> Answer | None:
    version = next((v for v in cell.variants if v.name == question.version), None)
    if cell.family != question.family or version is None or question.metric not in version.metrics:
        return None
    drop = version.drops.get(question.metric)
    other = version.drops.get(question.beside) if question.beside else None
    told = f"{cell.id}, {question.version}: "
    if drop is None or (question.beside and other is None):
        return Answer(
            question=question.text,
            verdict="undecided",
            told=f"{told}no interval of a drop is known.",
            unit=question.metric,
            rows=(cell.id,),
        )
    value = drop if other is None else _apart(drop, other)
    told += f"{question.metric} drops by {_interval(drop, 4)}"
    told += f", {question.beside} by {_interval(other, 4)}" if other is not None else ""
    count = version.metrics[question.metric].n
    return Answer(
        question=question.text,
        verdict=answer_verdict(value),
        told=f"{told} on {count} samples.",
        value=value,
        unit=question.metric,
        rows=(cell.id,),
    )


def _apart(first: Estimate, second: Estimate) -> Estimate:
    """Return the difference of two numbers whose errors are taken to be independent."""
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value=round(value, 6), low=round(value - below, 6), high=round(value + above, 6))


def _operators(parts: Sequence[PartDamage]) -> Iterator[Answer]:
    """Compare kinds of operators between the first transformer and the first convolutional model on each target."""
    start = "Is one unit of the kind '{}' more sensitive in SegFormer than in YOLO11?"
    found = False
    compared = [row for row in parts if row.scope == "operator" and not row.head]
    for where in dict.fromkeys((row.target, row.schemes) for row in compared):
        rows = [row for row in compared if (row.target, row.schemes) == where]
        ours, theirs = (
            _first_model(row for row in rows if row.family == family) for family in (TRANSFORMER, CONVOLUTIONAL)
        )
        for kind in (kind for kind in ours if kind in theirs):
            found = True
            first, second = ours[kind], theirs[kind]
            value = _apart(_per_unit(second), _per_unit(first))
            yield Answer(
                question=start.format(kind),
                verdict=answer_verdict(value),
                told=f"Per unit, {first.setting}: {_per_unit(first).value:.1f} dB (share {_share(first)} of "
                f"its damage in {first.units} units), {second.model} {_per_unit(second).value:.1f} dB (share "
                f"{_share(second)} in {second.units}); it does {_interval(value)} dB more damage in {first.model}.",
                value=value,
                rows=(first.id, second.id),
            )
        for kind in sorted(ours.keys() ^ theirs.keys()) if ours and theirs else ():
            row = (ours | theirs)[kind]
            yield Answer(
                question=start.format(kind),
                verdict=NOT_STUDIED,
                told=f"Only {row.setting} has this kind: {row.sqnr_db.value:.1f} dB, share {_share(row)} of "
                f"its damage in {row.units} units.",
                rows=(row.id,),
            )
    if not found:
        yield _not_studied("How do transformer backbones differ from convolutional ones per kind of operator?")


def _first_model(rows: Iterable[PartDamage]) -> dict[str, PartDamage]:
    found: dict[str, PartDamage] = {}
    for row in rows:
        if not found or row.model == next(iter(found.values())).model:
            found.setdefault(row.part, row)
    return found


def _per_unit(row: PartDamage) -> Estimate:
    more, db = 10 * math.log10(row.units), row.sqnr_db
    return Estimate(value=db.value + more, low=db.low + more, high=db.high + more)


def _share(row: PartDamage) -> str:
    return "unknown" if row.share is None else f"{row.share.value:.0%}"


def _language(contrasts: Sequence[PartContrast], parts: Sequence[PartDamage]) -> Iterator[Answer]:
    rows = {row.id: row for row in parts}
    of_question = [c for c in contrasts if c.question == MOST_SENSITIVE]
    if not of_question:
        yield _not_studied(MOST_SENSITIVE)
    for setting in dict.fromkeys(c.setting for c in of_question):
        found = [c for c in of_question if c.setting == setting]
        ids = dict.fromkeys(i for c in found for i in (c.first, c.second))
        sides = sorted((rows[i] for i in ids), key=lambda r: r.sqnr_db.value)
        worst, second = sides[0], sides[1]
        pair = next(c for c in found if {c.first, c.second} == {worst.id, second.id})
        value = pair.value if pair.first == worst.id else pair.value.negated
        listed = ", ".join(f"{r.part} {r.sqnr_db.value:.1f} dB in {r.units} units" for r in sides)
        certain = value.low > 0
        yield Answer(
            question=MOST_SENSITIVE,
            verdict="yes" if certain else "undecided",
            told=f"{setting}, each part alone in {worst.scheme}: {listed}. The {worst.part} does "
            f"{_interval(value)} dB more damage than the {second.part}"
            + (", and is the most sensitive." if certain else ", which does not decide between both."),
            value=value,
            rows=tuple(r.id for r in sides),
        )


def _formats(parts: Sequence[PartDamage]) -> Iterator[Answer]:
    """Tell for each part of a language model which formats keep `KEPT_DB`, the fastest first."""
    of_formats = [row for row in parts if row.scope == "format"]
    for side in LANGUAGE_PARTS:
        text = f"Does a format make the {side.name} of MobileVLM faster at {KEPT_DB:g} dB or more?"
        mine = [row for row in of_formats if row.part == side.name]
        if not mine:
            yield _not_studied(text)
        for setting in dict.fromkeys(r.setting for r in mine):
            rows = sorted(
                (r for r in mine if r.setting == setting),
                key=lambda r: math.inf if r.latency_ratio is None else r.latency_ratio,
            )
            kept = [r for r in rows if r.sqnr_db.low >= KEPT_DB and (r.latency_ratio or 1.0) < 1]
            open_ = [r for r in rows if r.sqnr_db.low < KEPT_DB <= r.sqnr_db.high and (r.latency_ratio or 1.0) < 1]
            listed = ", ".join(
                f"{r.scheme} {r.sqnr_db.value:.1f} dB at "
                + ("unknown time" if r.latency_ratio is None else f"{r.latency_ratio:.2f}x")
                for r in rows
            )
            best = f"; {kept[0].scheme} suits it best" if kept else "; float does"
            yield Answer(
                question=text,
                verdict="yes" if kept else "undecided" if open_ else "no",
                told=f"{setting}: {listed}{best}.",
                rows=tuple(r.id for r in rows),
            )


def _not_studied(question: str) -> Answer:
    return Answer(question=question, verdict=NOT_STUDIED, told="No cell of this study has such a model.")
