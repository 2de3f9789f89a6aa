"""Key figures of a run: verdict, budget, cautions, and the comparison of the three models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitalloy.core.examples import Examples
from bitalloy.core.outcome import LOWEST, MIXED, ONE_SCHEME, Comparison, Evaluation, Round, Summary, Triple
from bitalloy.core.plans import CostTable, PlanReport
from bitalloy.core.records import Estimate, Latency, MetricValue
from bitalloy.core.schemes import BASELINE
from bitalloy.core.status import Status, Verdict, of_few_samples
from bitalloy.core.units import UnitGraph
from bitalloy.measure.prices import latency_us
from bitalloy.model.heads import is_divergence
from bitalloy.report import formats
from bitalloy.report.text import counted, limit_text, noise_words, verdict_text
from bitalloy.tasks.resolution import tell_resolution

WIDE_GAP_DB = 3.0
"""Difference in dB between prediction and measurement above which the report marks it as a problem."""
MODEL_FIELDS = ("reference", "rewritten", "lowest", "single", "mixed")
"""Fields of `Triple` and its like in the order of their columns."""


@dataclass(frozen=True)
class Note:
    """A smaller line beneath a number. `tone` is `good`, `bad` or empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Cell:
    """A number in the table of key figures. `tone` is `good`, `bad` or empty."""

    text: str
    notes: tuple[Note, ...] = ()
    tone: str = ""


@dataclass(frozen=True)
class FigureRow:
    """A quantity of the models, which is one row of the table."""

    name: str
    note: str
    cells: tuple[Cell, ...]
    """One for each of `model_columns`."""


@dataclass(frozen=True)
class FigureGroup:
    """Rows of the table of key figures under one heading."""

    name: str
    rows: tuple[FigureRow, ...]


VERDICT_TONES = {
    Verdict.NO_LIMITS: "",
    Verdict.MET: "good",
    Verdict.WITHIN: "good",
    Verdict.UNDECIDED: "warn",
    Verdict.MISSED: "bad",
}
"""Verdict on a limit -> its colour."""


def limits(status: Status) -> tuple[tuple[str, str, str], ...]:
    """Return of each limit its tone, the verdict on it, and what was asked for and measured."""
    return tuple((VERDICT_TONES[one.verdict], verdict_text(one), limit_text(one)) for one in status.limits)


def cautions(summary: Summary) -> tuple[str, ...]:
    """Return sentences on what a reader must know before relying on the numbers."""
    found = [*summary.status.warnings, *summary.notes]
    wide = [h for h, pair in summary.sqnr_db.items() if _wide(pair.mixed.predicted, pair.mixed.measured)]
    if wide:
        found.append(
            f"Predicted and measured SQNR of the mixed model differ by more than {WIDE_GAP_DB:g} dB on "
            f"{', '.join(wide)}: rely on the measured value, and read the sensitivities as a ranking."
        )
    found += [tell_resolution(one) for one in summary.resolution if one.needed is not None]
    if not summary.settled:
        found.append(
            f"The ranking of units had not settled after {summary.samples} samples: neighbours in it may swap places "
            "with other data."
        )
    if summary.half_margin < 1:
        found.append(
            f"Activations exceed the FP16 range by a factor of {1 / summary.half_margin:.2g}: do not run this model "
            "in FP16 as a whole."
        )
    return tuple(found)


def shown_columns(summary: Summary) -> tuple[str, ...]:
    """Return the fields of `Triple` and its like that have a column, in order: first what people have anyway."""
    order = MODEL_FIELDS
    if summary.usual_scheme != BASELINE:
        order = ("reference", "rewritten", "single", "lowest", "mixed")
    return tuple(name for name in order if getattr(summary.latency_ms, name) is not None)


def model_columns(summary: Summary, units: UnitGraph) -> tuple[str, ...]:
    """Name the models that have a column, as people write them."""
    single = best_single(summary)
    names = {
        "reference": "float",
        "rewritten": "float, rewritten",
        "lowest": f"all-{units.lowest_name}",
        "single": single if summary.usual_scheme != BASELINE else f"all-{single}",
        "mixed": "mixed",
    }
    return tuple(names[column] for column in shown_columns(summary))


def best_single(summary: Summary) -> str:
    """Return the scheme of the best plan of one scheme, as people write it; empty where there is none."""
    return next((s.scheme.upper() for s in summary.single_formats if s.best), "")


def single_formats(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of plans that have one scheme."""
    heads = [head for head in (summary.single_formats[0].predicted_db if summary.single_formats else ())]
    heads = [head for head in heads if not is_divergence(head)]
    header = ("Scheme", "Units", "Predicted latency", "Predicted size", *heads, "Limits kept", "Measured")
    lines = [
        (
            s.scheme.upper(),
            str(s.units),
            formats.ratio(s.predicted_ratio),
            formats.byte_size(s.predicted_size_bytes),
            *(formats.decibel_text(s.predicted_db[head]) for head in heads),
            "yes" if s.within else "no",
            "yes" if s.best else "no",
        )
        for s in summary.single_formats
    ]
    return header, lines


def given_roundings(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of what a quantized file rounds."""
    lines: list[tuple[str, ...]] = [
        (r.tensor, r.node, r.head, formats.decibel_text(r.sqnr_db), f"{r.share:.1%}")
        for r in (summary.given.worst if summary.given is not None else ())
    ]
    return ("Tensor", "Made by", "Head", "SQNR alone", "Share of the damage"), lines


def key_figures(summary: Summary, units: UnitGraph, cost: CostTable) -> tuple[FigureGroup, ...]:
    """Compare the models, see `model_columns`, with predictions beside measurements."""
    groups = [
        FigureGroup(
            "Cost",
            (
                _latency(summary),
                *_steps(summary),
                _ratio(summary, predicted_lowest_ratio(units, cost)),
                *_beside_usual(summary),
                *_memory(summary),
                *_sizes(summary),
            ),
        ),
        FigureGroup("Output error (SQNR, measured)", tuple(_sqnr(summary))),
        FigureGroup("Shift of predictions (KL divergence, nats, measured)", tuple(_divergences(summary))),
        FigureGroup("Task accuracy", tuple(_accuracy(summary))),
    ]
    return tuple(g for g in groups if g.rows)


def predicted_lowest_ratio(units: UnitGraph, cost: CostTable) -> float:
    """Return the predicted latency over float of the model whose units all run in their lowest scheme."""
    return latency_us(cost, units, units.lowest()) / cost.float_us


def rounds(summary: Summary, heads: Iterable[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of search rounds."""
    names = list(heads)
    header = (
        "Round",
        "Source of the plan",
        "Latency limit",
        "SQNR limit",
        "Units",
        "Predicted latency",
        "Measured latency",
        *(f"{head}, measured (predicted)" for head in names),
        "Measured exactly",
    )
    lines = [
        (
            f"{number} (shipped)" if r.shipped else str(number),
            r.source,
            formats.NONE if r.latency_ratio_limit is None else formats.ratio(r.latency_ratio_limit),
            _floors(r),
            counted(r.schemes),
            formats.ratio(r.predicted_ratio),
            formats.ratio(r.measured_ratio),
            *(
                formats.decibel_text(value)
                + (f" ({formats.decibel_text(r.predicted_db[i])})" if i < len(r.predicted_db) else "")
                for i, value in enumerate(r.sqnr_db)
            ),
            f"{len(r.repair.remeasured)} units and pairs" if r.repair is not None else formats.NONE,
        )
        for number, r in enumerate(summary.rounds, start=1)
    ]
    return header, lines


def _floors(one: Round) -> str:
    """Floors on the SQNR in a round."""
    parts = [formats.decibel_text(one.min_sqnr_db)] if one.min_sqnr_db is not None else []
    parts += [f"{head} {formats.decibel_text(floor)}" for head, floor in one.head_sqnr_db.items()]
    return ", ".join(parts) or formats.NONE


def repairs(summary: Summary, heads: Iterable[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of units measured exactly because a prediction was off."""
    names = list(heads)
    header = ("Round", "Rounded units", *(f"{head}: measured over predicted" for head in names))
    lines = []
    for number, one in enumerate(summary.rounds, start=1):
        if one.repair is None:
            continue
        gaps = (f"{formats.signed(-one.repair.gap_db.get(head, 0.0), 1)} dB" for head in names)
        lines.append((str(number), "the whole plan", *gaps))
        for found in one.repair.remeasured:
            changes = (f"{formats.signed(found.change_db.get(head, 0.0), 1)} dB" for head in names)
            lines.append((str(number), " and ".join(found.units), *changes))
    return header, lines


def evaluations(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of plans that were evaluated for limits on the task."""
    names = sorted({name for one in summary.evaluations for name in one.drops})
    witnesses = sorted({name for one in summary.evaluations for name in one.agreements})
    estimated = (column for name in names for column in (f"Drop of {name}, measured", "by all that was evaluated"))
    header = ("Units", "Predicted latency", "Images", *witnesses, *estimated, "Limits kept with probability", "Kept")
    lines = [
        (
            counted(one.schemes),
            formats.ratio(one.predicted_ratio),
            str(one.images) if one.images else formats.NONE,
            *(f"{one.agreements[name]:.4f}" if name in one.agreements else formats.NONE for name in witnesses),
            *(text for name in names for text in _drop_texts(one, name)),
            f"{one.probability:.2f}" if one.probability is not None else formats.NONE,
            "yes" if one.kept else "no",
        )
        for one in summary.evaluations
    ]
    return header, lines


def _drop_texts(one: Evaluation, name: str) -> tuple[str, str]:
    """A drop as measured, and as estimated from all plans."""
    estimate = one.estimates.get(name)
    measured = formats.signed(one.drops[name], 4) if name in one.drops else formats.NONE
    if estimate is None:
        return measured, formats.NONE
    return measured, f"{formats.signed(estimate.value, 4)} {formats.interval_text(estimate, 4)}"


def corrections(summary: Summary, heads: Iterable[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of the corrections that were tried."""
    names = list(heads)
    header = (
        "Correction", "Used", "Places", "Samples: measured, fitted", *(f"{h}, without → with" for h in names),
        "Reason",
    )  # fmt: skip
    lines = []
    for one in summary.corrections:
        pairs = (
            f"{formats.decibel_text(one.without_db[h])} → {formats.decibel_text(one.with_db[h])}"
            if h in one.with_db
            else formats.NONE
            for h in names
        )
        lines.append(
            (
                one.name,
                "yes" if one.kept else "no",
                str(one.places),
                f"{one.samples}, {one.fitted_samples}" if one.samples else formats.NONE,
                *pairs,
                one.reason,
            )
        )
    return header, lines


def classes(examples: Examples | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and lines of the table of the precision of each class."""
    lines: list[tuple[str, ...]] = [
        (
            one.name,
            str(one.labels),
            f"{one.reference:.4f}",
            f"{one.mixed:.4f}",
            f"{formats.signed(one.drop.value, 4)} {formats.interval_text(one.drop, 4)}",
            noise_words(one.drop),
        )
        for one in (examples.classes if examples is not None else ())
    ]
    return ("Class", "Labels", "AP float", "AP mixed", "Drop, 95 % interval", ""), lines


def heads_of(plan: PlanReport, summary: Summary) -> tuple[str, ...]:
    """Return the names of the heads in the order of the plan, without divergences, which have rows of their own."""
    return tuple(h.head for h in plan.heads if not is_divergence(h.head)) or tuple(summary.sqnr_db)


def _row(summary: Summary, name: str, note: str, cells: Mapping[str, Cell]) -> FigureRow:
    """Put cells into the columns that there are."""
    return FigureRow(name, note, tuple(cells.get(column, Cell(formats.NONE)) for column in shown_columns(summary)))


def _each(models: object, cell: Callable[[Any], Cell]) -> dict[str, Cell]:
    """Make a cell of every model that has a value."""
    values = ((column, getattr(models, column, None)) for column in MODEL_FIELDS)
    return {column: cell(value) for column, value in values if value is not None}


def _latency(summary: Summary) -> FigureRow:
    def cell(one: Latency) -> Cell:
        if summary.latency_estimated:
            return Cell(formats.milliseconds(one.median_ms), (Note("estimated"),))
        spread = f"{formats.milliseconds(one.p10_ms).removesuffix(' ms')}–{formats.milliseconds(one.p90_ms)}"
        return Cell(formats.milliseconds(one.median_ms), (Note(f"p10–p90 {spread}"), Note(f"{one.count} runs")))

    cells = _each(summary.latency_spread_ms, cell)
    if summary.latency_estimated:
        return _row(summary, "Latency, estimated", "from peak rates", cells)
    return _row(summary, "Latency, median", "interleaved runs", cells)


def _steps(summary: Summary) -> Iterable[FigureRow]:
    """The parts of a language model's answer."""
    for step in summary.steps:
        cells = _each(step.latency_ms, lambda one: Cell(formats.milliseconds(one.median_ms)))
        often = f"{step.times} in an answer" if step.times > 1 else "one in an answer"
        yield _row(summary, f"Latency of one {step.name}", often, cells)


def _ratio(summary: Summary, predicted_lowest: float) -> FigureRow:
    def cell(
        value: float, measured: Estimate | None, predicted: float | None, interval: Estimate | None = None
    ) -> Cell:
        ends = f" {formats.interval_text(interval, 2)}" if interval is not None else ""
        notes = [Note(f"95 % {formats.interval_text(measured, 2)}")] if measured is not None else []
        notes += [Note(f"predicted {formats.ratio(predicted)}{ends}")] if predicted is not None else []
        return Cell(formats.ratio(value), tuple(notes), "bad" if value >= 1 else "")

    latency, found = summary.latency_ms, summary.lowest_latency_ratio
    interval = summary.predicted_latency_ratio_interval
    cells = {
        "reference": Cell(formats.ratio(1.0)),
        "lowest": cell(found.value if found else latency.lowest / latency.reference, found, predicted_lowest),
        "mixed": cell(summary.latency_ratio, summary.latency_ratio_interval, summary.predicted_latency_ratio, interval),
    }
    if latency.single is not None:
        found = summary.single_latency_ratio
        predicted = next(s.predicted_ratio for s in summary.single_formats if s.best)
        cells["single"] = cell(found.value if found else latency.single / latency.reference, found, predicted)
    if (plain := summary.rewritten_latency_ratio) is not None:
        cells["rewritten"] = replace(cell(plain.value, plain, None), tone="")
    return _row(summary, "Latency over float", "lower is faster", cells)


def _beside_usual(summary: Summary) -> Iterable[FigureRow]:
    """Yield the row of latency over that of the scheme that people use anyway, where it is not float."""
    found = summary.usual_latency_ratio
    if found is None:
        return
    note, kind = ("not measured: by peak rates", "may be") if summary.latency_estimated else ("lower is faster", "95 %")
    known = Note(f"{kind} {formats.interval_text(found, 2)}")
    mixed = Cell(formats.ratio(found.value), (known,), "bad" if found.value >= 1 else "")
    single = Cell(formats.ratio(1.0))
    yield _row(summary, f"Latency over {summary.usual_scheme.upper()}", note, {"single": single, "mixed": mixed})


def _memory(summary: Summary) -> Iterable[FigureRow]:
    """Yield the row of peak resident memory, where it was measured."""
    memory = summary.peak_memory_mb
    if memory is None:
        return
    first = memory.reference

    def cell(value: float) -> Cell:
        notes = (Note(f"{formats.ratio(value / first)} of float"),) if first is not None else ()
        return Cell(f"{formats.megabytes(value)} MB", notes)

    cells = _each(memory, cell)
    if first is not None:
        cells["reference"] = Cell(f"{formats.megabytes(first)} MB")
    alone = "" if memory.process is None else f", {formats.megabytes(memory.process)} MB of it without any model"
    note = f"of a process that opens the model and runs each step once{alone}"
    yield _row(summary, "Peak resident memory", note, cells)


def _sizes(summary: Summary) -> Iterable[FigureRow]:
    """Yield the row of the size of all files, and one of each graph of a program."""
    yield _size(summary, "File size", "all graphs" if summary.graphs else "", summary.size_bytes)
    for name, size in summary.graphs.items():
        yield _size(summary, f"File size, {name}", "", size)


def _size(summary: Summary, label: str, note: str, size: Triple) -> FigureRow:
    def cell(value: float) -> Cell:
        return Cell(formats.byte_size(value), (Note(f"{formats.ratio(value / size.reference)} of the given file"),))

    given = Cell(formats.byte_size(size.reference), (Note("as given"),))
    return _row(summary, label, note, {**_each(size, cell), "reference": given})


def _sqnr(summary: Summary) -> Iterable[FigureRow]:
    for head, pair in summary.sqnr_db.items():

        def cell(one: Comparison, interval: Estimate | None = None) -> Cell:
            notes = [Note(f"95 % {formats.interval_text(interval, 1)}")] if interval is not None else []
            if one.predicted is not None:
                difference = formats.signed(one.measured - one.predicted, 1)
                text = f"predicted {formats.decibel_text(one.predicted)} ({difference})"
                notes.append(Note(text, "bad" if _wide(one.predicted, one.measured) else ""))
            return Cell(formats.decibel_text(one.measured), tuple(notes))

        mixed = cell(pair.mixed, summary.sqnr_interval_db.get(head))
        cells = {**_each(pair, cell), "reference": Cell("reference"), "mixed": mixed}
        yield _row(summary, head, "higher is better", cells)


def _divergences(summary: Summary) -> Iterable[FigureRow]:
    def cell(one: Comparison) -> Cell:
        notes = () if one.predicted is None else (Note(f"predicted {one.predicted:.3g}"),)
        return Cell(f"{one.measured:.3g}", notes)

    for head, pair in summary.kl_nats.items():
        yield _row(summary, head, "lower is better", {**_each(pair, cell), "reference": Cell("reference")})


def _accuracy(summary: Summary) -> Iterable[FigureRow]:
    def value(one: MetricValue) -> Cell:
        notes = (Note(f"95 % {formats.interval_text(one, 4)}"), Note(f"n = {one.n}"))
        return Cell(f"{one.value:.4f}", notes if one.n else (Note("interval unknown"),))

    unrounded = {"rewritten": Cell(formats.NONE, (Note("not evaluated: no rounding"),))}
    for name, metric in summary.metrics.items():
        yield _row(summary, name, "", {**unrounded, **_each(metric, value)})
        models = {
            "lowest": (metric.drop_lowest, metric.lowest),
            "single": (metric.drop_single, metric.single),
            "mixed": (metric.drop_mixed, metric.mixed),
        }
        if metric.drop_lowest is not None or metric.drop_mixed is not None:
            first = metric.reference.value
            cells = {column: _drop(drop, one, first) for column, (drop, one) in models.items()}
            side = "float − model" if metric.higher_is_better else "model − float"
            yield _row(summary, f"Drop of {name}", f"{side}, paired", cells)
    if summary.confidence_shift:
        names = {"lowest": LOWEST, "single": ONE_SCHEME, "mixed": MIXED}
        shifts = {column: _shift(summary.confidence_shift.get(name)) for column, name in names.items()}
        yield _row(summary, "Confidence shift", "matched detections, model − float", shifts)
        overlaps = {column: _shift(summary.box_overlap.get(name)) for column, name in names.items()}
        yield _row(summary, "Overlap of boxes", "matched detections, IoU with float", overlaps)


def _drop(drop: Estimate | None, found: MetricValue | None, reference: float) -> Cell:
    if drop is None or found is None:
        return Cell(formats.NONE)
    verdict = noise_words(of_few_samples(drop, found.n, reference, found.value))
    notes = (Note(f"95 % {formats.interval_text(drop, 4)}"), Note(verdict))
    tone = ("bad" if drop.value > 0 else "good") if verdict == "beyond noise" else ""
    return Cell(formats.signed(drop.value, 4), notes, tone)


def _shift(shift: Estimate | None) -> Cell:
    if shift is None:
        return Cell(formats.NONE)
    return Cell(formats.signed(shift.value, 4), (Note(f"95 % {formats.interval_text(shift, 4)}"),))


def _wide(predicted: float | None, measured: float) -> bool:
    return predicted is not None and abs(measured - predicted) > WIDE_GAP_DB
