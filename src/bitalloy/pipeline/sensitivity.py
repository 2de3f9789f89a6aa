"""The command `sensitivity`: one table, predicted or measured, in the run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bitalloy.core.records import SensitivityTable, Settings
from bitalloy.core.store import RunDirectory
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.calibrate import calibrate
from bitalloy.pipeline.prepare import RunOptions, prepare
from bitalloy.report.tables import sensitivity_csv
from bitalloy.sensitivity.measuring import ONE, Selection, chosen_groups, confirm, measure_exact
from bitalloy.tasks.metric import MetricTable, measure_metric

FILES = {"probe": "sensitivity", "exact": "sensitivity_exact", "metric": "sensitivity_metric"}
"""Names of the files of each kind of table, without their ending."""


@dataclass(frozen=True, kw_only=True)
class SensitivityQuestion:
    """Which sensitivities are asked for, and how they are found: predicted by the probe matrix, unless it says else."""

    selection: Selection = field(default_factory=Selection)
    """What to return and, where it is measured, to measure; all units by default."""
    exact: bool = False
    """Whether to measure SQNR by execution."""
    mode: str = ONE
    """Of what is measured, see `measure_exact`."""
    confirmed: int | None = None
    """Measure so many of the worst units, and what is flagged, by execution beside the prediction."""
    labels: Path | None = None
    """COCO annotation file: measure the drop of box AP in place of SQNR."""


def sensitivity(
    model: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    settings: Settings | None = None,
    question: SensitivityQuestion | None = None,
    options: RunOptions | None = None,
) -> SensitivityTable | MetricTable:
    """Measure the sensitivities of a model, also written into the run directory.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name from `bitalloy models`.
        out: run directory; what is stored there already is used again.
        data: images or feeds that look like the real ones; the embedded sample without it.
        settings: of the analysis; `samples` also counts for exact measurement.
        question: what to return, and whether to predict or to measure it.
        options: how the model is opened, and how many labelled images are evaluated.

    Returns:
        The table, with the rows that were asked for.

    Raises:
        BitalloyError: the model, data, selection or run directory cannot be used; the message says what to do.
    """
    settings, asked, options = settings or Settings(), question or SensitivityQuestion(), options or RunOptions()
    prepared = prepare(model, out=out, data=data, seed=settings.seed, options=options)
    loaded, dataset, store, work = prepared.model, prepared.data, prepared.store, prepared.work
    if asked.labels is not None:
        ready = calibrate(loaded, dataset, settings, work=work)
        found = measure_metric(ready, asked.labels, asked.selection, mode=asked.mode, limit=options.limit, work=work)
        store.publish(f"{FILES['metric']}.json", _pretty(found))
        return found
    if asked.exact:
        ready = calibrate(loaded, dataset, settings, work=work)
        table = measure_exact(ready, asked.selection, mode=asked.mode, samples=settings.samples, work=work)
        _publish(store, FILES["exact"], table)
        return table
    analysis = analyze(loaded, dataset, settings, work=work)
    wanted = {(t.scope, t.id, t.scheme, t.part) for t in chosen_groups(analysis.units, asked.selection)}
    if asked.confirmed is not None:
        analysis = confirm(analysis, asked.confirmed, work=work)
    _publish(store, FILES["probe"], analysis.table)
    rows = tuple(r for r in analysis.table.rows if (r.scope, r.id, r.scheme, r.part) in wanted)
    return msgspec.structs.replace(analysis.table, rows=rows)


def _publish(store: RunDirectory, name: str, table: SensitivityTable) -> None:
    store.publish(f"{name}.json", _pretty(table))
    store.publish(f"{name}.csv", sensitivity_csv(table))


def _pretty(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2)
