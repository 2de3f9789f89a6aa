"""The table of sensitivities, predicted or measured, which is written into the run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.limits import limited
from bitalloy.core.records import SensitivityTable, Settings
from bitalloy.core.store import RunDirectory, claimed
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.calibrate import calibrate, units_of
from bitalloy.pipeline.prepare import Prepared, RunOptions, prepare
from bitalloy.report.tables import sensitivity_csv
from bitalloy.sensitivity.measuring import ONE, Selection, chosen_groups, confirm, measure_exact
from bitalloy.targets import chosen_targets
from bitalloy.tasks.metric import MetricTable, measure_metric
from bitalloy.verify.given import examine_given

FILES = {"probe": "sensitivity", "exact": "sensitivity_exact", "metric": "sensitivity_metric"}
"""Kind of table -> name of its files, without suffix."""


@dataclass(frozen=True, kw_only=True)
class SensitivityQuestion:
    """The sensitivities that are asked for, and their method: prediction by the probe matrix unless fields say else."""

    selection: Selection = field(default_factory=Selection)
    """Units, regions and sites in the table, which exact measurement is limited to; by default all units."""
    exact: bool = False
    """Whether to measure SQNR by execution."""
    mode: str = ONE
    """Mode of exact measurement: `one-at-a-time` or `leave-one-out`, see `measure_exact`."""
    confirmed: int | None = None
    """Number of the worst units that, with all flagged ones, are measured by execution too; None for none."""
    labels: Path | None = None
    """COCO annotation file; where given, the drop of box AP is measured in place of SQNR."""


def sensitivity(
    model: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    settings: Settings | None = None,
    question: SensitivityQuestion | None = None,
    options: RunOptions | None = None,
) -> SensitivityTable | MetricTable:
    """Predict or measure the sensitivities of a model, and write them into the run directory.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name from `bitalloy models`.
        out: run directory; what is stored there already is used again.
        data: images or feeds that look like the real ones; the embedded sample without it.
        settings: settings of the analysis; exact measurement uses its `samples` too.
        question: the sensitivities that are asked for, and whether they are predicted or measured.
        options: how the model is opened, and how many labelled images are evaluated.

    Returns:
        The table, with the rows that were asked for.

    Raises:
        BitalloyError: the model, data, selection or run directory cannot be used; the message says what to do.
    """
    settings, asked, options = settings or Settings(), question or SensitivityQuestion(), options or RunOptions()
    chosen_targets(settings.targets, settings.device, settings.schemes)  # what is wrong is refused before any work
    with limited(options.memory_limit), claimed(out):
        prepared = prepare(model, out=out, data=data, seed=settings.seed, options=options)
        found = answer_question(prepared, settings, asked, limit=options.limit)
        publish_answer(prepared.store, found)
        return found.shown


@dataclass(frozen=True)
class SensitivityAnswer:
    """A table of sensitivities."""

    name: str
    """Name of its files, without suffix."""
    table: SensitivityTable | MetricTable
    """All rows that are known."""
    shown: SensitivityTable | MetricTable
    """The table with the rows that were asked for."""


def answer_question(
    prepared: Prepared, settings: Settings, asked: SensitivityQuestion, *, limit: int | None = None
) -> SensitivityAnswer:
    """Predict or measure what is asked of a model.

    Args:
        prepared: the model, its data, and where results are kept.
        settings: settings of the analysis.
        asked: the question.
        limit: largest number of labelled images that are evaluated; None for all.

    Raises:
        BitalloyError: a pattern matches nothing, or labels do not fit.
    """
    loaded, dataset, work = prepared.model, prepared.data, prepared.work
    if asked.selection:  # a pattern that matches nothing is refused before any work
        chosen_groups(units_of(loaded, settings)[0], asked.selection)
    if asked.labels is not None:
        ready = calibrate(loaded, dataset, settings, work=work)
        found = measure_metric(
            ready, asked.labels, asked.selection, mode=asked.mode, limit=limit, image=prepared.image, work=work
        )
        return SensitivityAnswer(FILES["metric"], found, found)
    if asked.exact:
        ready = calibrate(loaded, dataset, settings, work=work)
        table = measure_exact(ready, asked.selection, mode=asked.mode, samples=settings.samples, work=work)
        return SensitivityAnswer(FILES["exact"], table, table)
    analysis = analyze(loaded, dataset, settings, work=work)
    wanted = {(t.scope, t.id, t.scheme, t.part) for t in chosen_groups(analysis.units, asked.selection)}
    if asked.confirmed is not None:
        analysis = confirm(analysis, asked.confirmed, work=work)
    given = examine_given(analysis, work, timed=False)
    table = analysis.table if given is None else msgspec.structs.replace(analysis.table, given=given.worst)
    rows = tuple(r for r in table.rows if (r.scope, r.id, r.scheme, r.part) in wanted)
    return SensitivityAnswer(FILES["probe"], table, msgspec.structs.replace(table, rows=rows))


def publish_answer(store: RunDirectory, answer: SensitivityAnswer) -> None:
    """Write the table of an answer into a run directory, as JSON and, unless it is of a metric, as CSV."""
    store.publish(f"{answer.name}.json", to_json(answer.table, pretty=True))
    if isinstance(answer.table, SensitivityTable):
        store.publish(f"{answer.name}.csv", sensitivity_csv(answer.table))
