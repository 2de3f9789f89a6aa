"""The whole job in one call: from a model to a run directory with the mixed model, its proof and its report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from bitalloy import graph, zoo
from bitalloy.data import ImageSpec
from bitalloy.errors import BudgetError
from bitalloy.pipeline.analyze import Analysis, analyze, open_data
from bitalloy.pipeline.deliver import Verified, measure_cost, plan, verify
from bitalloy.pipeline.records import Planned
from bitalloy.pipeline.work import Progress, Silent, Workspace
from bitalloy.records import Budget, Settings
from bitalloy.report import render as render_html
from bitalloy.report import sensitivity_csv
from bitalloy.samples.shapes import write_coco
from bitalloy.store import RunDirectory

SAMPLE_NOTE = (
    "Measured on the embedded sample `shapes` (drawn images), not on your data: give --data for numbers that mean "
    "something for your deployment."
)
SAMPLE_IMAGES = 100
DEFAULT_RATIO = 0.7


def run(
    model: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    labels: str | Path | None = None,
    budget: Budget | None = None,
    settings: Settings | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    image: ImageSpec | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Analyse, plan, apply, verify and report.

    Args:
        model: an .onnx file or a name of the zoo.
        out: run directory; what is stored there already is used again.
        data: images or feeds that look like the real ones; the embedded sample without it.
        labels: COCO annotation file for box AP.
        budget: limits on latency, size or damage; without it 0.7x of float's latency, or the nearest in reach.
        settings: of the analysis.
        shapes: input name -> shape, where the model leaves dimensions open.
        image: preprocessing of images, inferred where absent.
        limit: evaluate at most so many labelled images.
        progress: where to show what goes on.

    Raises:
        BitalloyError: the model, data, budget or run directory cannot be used; the message says what to do.
    """
    settings = settings or Settings()
    source = zoo.resolve(model)
    loaded = graph.load(source.path, shapes=shapes)
    store = RunDirectory(out)
    work = Workspace(store, progress or Silent())
    folder = store.path / "sample"
    dataset = open_data(loaded, data, image=image, seed=settings.seed, sample_folder=folder)
    if data is None and labels is None and source.sample:
        size = int(loaded.info.inputs[0].shape[-1])
        labels = (
            write_coco(folder / "validation", count=SAMPLE_IMAGES, seed=settings.seed, size=size) / "instances.json"
        )
    analysis = analyze(loaded, dataset, settings, work=work, notes=(SAMPLE_NOTE,) if data is None else ())
    if budget is not None:
        planned = plan(analysis, budget, work=work)
    else:
        analysis, planned = _plan_by_default(analysis, work)
    verified = verify(analysis, planned, labels=Path(labels) if labels else None, limit=limit, work=work)
    publish(verified, store)
    return verified


def _plan_by_default(analysis: Analysis, work: Workspace) -> tuple[Analysis, Planned]:
    """The plan at 0.7x of float's latency, or near the lowest that the table reaches, with a note that says so."""
    table = measure_cost(analysis, work=work)
    try:
        return analysis, plan(analysis, Budget(latency_ratio=DEFAULT_RATIO), table=table, work=work)
    except BudgetError as error:
        if error.reachable_ratio is None:
            raise
        ratio = math.ceil(100 * error.reachable_ratio + 2) / 100
        note = f"The default budget of {DEFAULT_RATIO}x is out of reach on this machine; {ratio}x was used instead."
        planned = plan(analysis, Budget(latency_ratio=ratio), table=table, work=work)
        return replace(analysis, notes=(*analysis.notes, note)), planned


def publish(verified: Verified, store: RunDirectory) -> Path:
    """Write everything that a user reads into the run directory; returns the path of the report."""
    analysis, planned = verified.analysis, verified.planned
    (store.path / "summary.json").unlink(missing_ok=True)  # written last: where it stands, all others belong to it
    store.publish("mixed.onnx", verified.mixed)
    store.publish("probe_matrix.npz", analysis.matrix.to_bytes())
    for name, record in (
        ("sensitivity.json", analysis.table),
        ("plan.json", planned.plan),
        ("cost.json", planned.cost),
        ("units.json", analysis.units),
        ("calibration.json", analysis.calibration),
    ):
        store.publish(name, _pretty(record))
    store.publish("sensitivity.csv", sensitivity_csv(analysis.table))
    path = store.publish("report.html", render(verified))
    store.publish("summary.json", _pretty(verified.summary))
    return path


def render(verified: Verified) -> str:
    """The report as one HTML page."""
    analysis = verified.analysis
    return render_html(verified.summary, verified.planned.plan, analysis.table, analysis.units, verified.planned.cost)


def _pretty(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2)


__all__ = ["Analysis", "publish", "render", "run"]
