"""The command `sensitivity`: one table, predicted or measured, in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from bitalloy.core.records import SensitivityTable, Settings
from bitalloy.core.store import RunDirectory
from bitalloy.core.work import Progress
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.calibrate import calibrate
from bitalloy.pipeline.prepare import prepare
from bitalloy.report.tables import sensitivity_csv
from bitalloy.sensitivity.measuring import ONE, Selection, chosen, confirm, measure_exact
from bitalloy.tasks.metric import MetricTable, measure_metric
from bitalloy.tasks.open import ImageChoice

FILES = {"probe": "sensitivity", "exact": "sensitivity_exact", "metric": "sensitivity_metric"}
"""Names of the files of each kind of table, without their ending."""


def sensitivity(
    model: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    settings: Settings | None = None,
    selection: Selection | None = None,
    exact: bool = False,
    mode: str = ONE,
    confirmed: int | None = None,
    labels: Path | None = None,
    limit: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    image: ImageChoice = None,
    checkpoint: str | Path | None = None,
    trust_checkpoint: bool = False,
    progress: Progress | None = None,
) -> SensitivityTable | MetricTable:
    """Sensitivities of a model, also written into the run directory.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name from `bitalloy models`.
        out: run directory; what is stored there already is used again.
        data: images or feeds that look like the real ones; the embedded sample without it.
        settings: of the analysis; `samples` also counts for exact measurement.
        selection: what to return and, where exact, to measure; all units without it.
        exact: measure by execution in place of the probe matrix.
        mode: of exact measurement, see `measure_exact`.
        confirmed: measure so many of the worst units, and what is flagged, exactly.
        labels: COCO annotation file: measure the drop of box AP, not SQNR.
        limit: evaluate at most so many labelled images.
        shapes: input name -> shape, where the model leaves dimensions open.
        image: preprocessing of images, inferred where absent.
        checkpoint: of a model that is exported first; see `prepare`.
        trust_checkpoint: whether a checkpoint with pickled objects may be opened.
        progress: where to show what goes on.

    Returns:
        The table, with the rows that were asked for.

    Raises:
        BitalloyError: the model, data, selection or run directory cannot be used; the message says what to do.
    """
    settings, selection = settings or Settings(), selection or Selection()
    prepared = prepare(
        model,
        out=out,
        data=data,
        shapes=shapes,
        image=image,
        checkpoint=checkpoint,
        trust_checkpoint=trust_checkpoint,
        seed=settings.seed,
        progress=progress,
    )
    loaded, dataset, store, work = prepared.model, prepared.data, prepared.store, prepared.work
    if labels is not None:
        found = measure_metric(
            calibrate(loaded, dataset, settings, work=work), labels, selection, mode=mode, limit=limit, work=work
        )
        store.publish(f"{FILES['metric']}.json", _pretty(found))
        return found
    if exact:
        ready = calibrate(loaded, dataset, settings, work=work)
        table = measure_exact(ready, selection, mode=mode, samples=settings.samples, work=work)
        _publish(store, FILES["exact"], table)
        return table
    analysis = analyze(loaded, dataset, settings, work=work)
    wanted = {(t.scope, t.id) for t in chosen(analysis.units, selection)}
    if confirmed is not None:
        analysis = confirm(analysis, confirmed, work=work)
    _publish(store, FILES["probe"], analysis.table)
    rows = tuple(r for r in analysis.table.rows if (r.scope, r.id) in wanted and (r.part == "all" or r.scope == "site"))
    return msgspec.structs.replace(analysis.table, rows=rows)


def _publish(store: RunDirectory, name: str, table: SensitivityTable) -> None:
    store.publish(f"{name}.json", _pretty(table))
    store.publish(f"{name}.csv", sensitivity_csv(table))


def _pretty(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2)
