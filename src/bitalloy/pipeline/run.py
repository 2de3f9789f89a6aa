"""The whole run in one call: from a model to a run directory with the mixed model, its proof and its report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec

from bitalloy.core.effort import EFFORTS, USUAL_EFFORT, Effort
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import UnreachableError
from bitalloy.core.files import lasting_in
from bitalloy.core.limits import limited
from bitalloy.core.planned import Planned
from bitalloy.core.plans import Budget, CostTable
from bitalloy.core.records import Settings
from bitalloy.core.store import RunDirectory, claimed
from bitalloy.core.summaries import write_summary
from bitalloy.core.work import Workspace
from bitalloy.data.handed import Preprocess
from bitalloy.measure.cost import measure_cost
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.audit import audit_plan, compiled_verified
from bitalloy.pipeline.early import check_budget, evaluated_images
from bitalloy.pipeline.plan import plan
from bitalloy.pipeline.prepare import Prepared, RunOptions, prepare
from bitalloy.pipeline.ship import Verified, verify
from bitalloy.report.render import Extras
from bitalloy.report.render import render_report as render_html
from bitalloy.report.tables import sensitivity_csv
from bitalloy.search.planning import COST_FILE, FACTS_FILE, MATRIX_FILE, UNITS_FILE
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.measuring import confirm
from bitalloy.targets import chosen_targets
from bitalloy.verify.rounds import default_ratio

CONFIRM_SAMPLES = 4
"""Number of samples on which the worst units are measured by execution before planning."""


def run(
    model: object,
    *,
    out: str | Path,
    data: object = None,
    evaluate: object = None,
    preprocess: Preprocess | None = None,
    budget: Budget | None = None,
    settings: Settings | None = None,
    options: RunOptions | None = None,
) -> Verified:
    """Analyse, plan, apply, verify and report, for every target of the settings.

    The files of the first target lie in the run directory, those of another in a folder of its name there.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name from `bitalloy models`; or a model in memory:
            bytes, an `onnx.ModelProto`, an `onnx_ir.Model`, or a torch module (with
            `options=RunOptions(example_inputs=...)`).
        out: run directory; what is stored there already is used again.
        data: samples that look like the real ones, in files or in memory: an array, a dict of arrays by input name, or
            a list, generator, DataLoader or data set of arrays, dicts or tuples; the embedded sample without it. See
            `prepare`.
        evaluate: files of labels for the model's task metric, e.g. a COCO annotation file; or a metric of your own: a
            function of a session that returns a number or several by name, or `bitalloy.Metric(function, labels)`.
        preprocess: function that makes of an item of the data what the model takes.
        budget: limits on latency, size or damage, and what stays in a precision; without limits 0.7x of float's
            latency, or the nearest in reach.
        settings: settings of the analysis.
        options: further options: shapes, preparation of images, checkpoint, number of labelled images to evaluate.

    Raises:
        BitalloyError: the model, data, budget or run directory cannot be used; the message says what to do.
    """
    settings, options = settings or Settings(), options or RunOptions()
    chosen_targets(settings.targets, settings.device, settings.schemes)  # what is wrong is refused before any work
    with limited(options.memory_limit), claimed(out):
        prepared = prepare(
            model, out=out, data=data, evaluate=evaluate, preprocess=preprocess, seed=settings.seed, options=options
        )
        return deliver(prepared, budget=budget, settings=settings, limit=options.limit, effort=options.effort)


def quantize_model(
    model: object,
    data: object,
    *,
    evaluate: object = None,
    preprocess: Preprocess | None = None,
    example_inputs: object = None,
    budget: Budget | None = None,
    out: str | Path | None = None,
) -> Verified:
    """Do what `run` does in the shortest way: a model and samples in, the verified mixed-precision model out.

    Args:
        model: see `run`.
        data: see `run`.
        evaluate: see `run`.
        preprocess: see `run`.
        example_inputs: inputs with which a torch module is exported.
        budget: see `run`.
        out: run directory, which keeps results and the report; without it there is one as long as the result is used.

    Returns:
        The result; `mixed.save(path)` of it writes the model, `summary.headline` says what it is worth.

    Raises:
        BitalloyError: see `run`.
    """
    options = RunOptions(example_inputs=example_inputs)

    def quantized(folder: Path) -> Verified:
        return run(
            model, out=folder, data=data, evaluate=evaluate, preprocess=preprocess, budget=budget, options=options
        )

    return lasting_in(None if out is None else Path(out), quantized)


def deliver(
    prepared: Prepared,
    *,
    budget: Budget | None = None,
    settings: Settings | None = None,
    limit: int | None = None,
    effort: Effort = EFFORTS[USUAL_EFFORT],
) -> Verified:
    """Do everything that `run` does after `prepare`, with the same arguments."""
    budget, settings = budget or Budget(), settings or Settings()
    check_budget(prepared, budget, settings)
    analysis = analyzed(prepared, settings, limit=limit, effort=effort)
    found: list[Verified] = []
    for index, part in enumerate(analysis.targets):
        verified = deliver_target(prepared, part, budget, limit=limit, effort=effort)
        if index == 0:
            others = tuple(other.target.name for other in analysis.targets[1:])
            verified = replace(verified, summary=msgspec.structs.replace(verified.summary, others=others))
        publish(verified, prepared.store if index == 0 else RunDirectory(prepared.store.path / part.target.name))
        found.append(verified)
    first = replace(found[0], others=tuple(found[1:]))
    if first.others:  # they are known only now
        prepared.store.publish("report.html", render(first))
    return first


def analyzed(prepared: Prepared, settings: Settings, *, limit: int | None, effort: Effort) -> Analysis:
    """Analyse a prepared model for all targets of the settings, with its worst units measured by execution."""
    evaluated = evaluated_images(prepared, limit, settings.seed)
    work = prepared.work
    analysis = analyze(prepared.model, prepared.data, settings, avoid=evaluated, work=work, notes=prepared.notes)
    if prepared.model.large:  # each measurement takes minutes; `sensitivity --confirm` makes them
        return analysis
    return confirm(analysis, effort.confirmed, flagged=False, samples=CONFIRM_SAMPLES, work=work)


def deliver_target(
    prepared: Prepared, analysis: Analysis, budget: Budget, *, limit: int | None, effort: Effort
) -> Verified:
    """Plan, apply, verify and audit for the first target of an analysis; nothing is published."""
    work = replace(prepared.work, seconds=dict(prepared.work.seconds))
    table = measure_cost(analysis, effort=effort, work=work)
    if budget.limited:
        planned = plan(analysis, budget, table=table, front=False, work=work)
    else:
        analysis, planned = _plan_by_default(analysis, budget, table, work)
    labels = prepared.own or prepared.labels or prepared.images
    verified = verify(analysis, planned, labels=labels, limit=limit, image=prepared.image, effort=effort, work=work)
    if analysis.target.device is None:
        verified = replace(verified, audit=audit_plan(analysis, verified.planned, work=work))
    return compiled_verified(verified, work)


def _plan_by_default(analysis: Analysis, budget: Budget, table: CostTable, work: Workspace) -> tuple[Analysis, Planned]:
    """The plan at the default aim, or near the least that the table reaches, with a note."""
    wanted = default_ratio(analysis.units, table)
    try:
        asked = msgspec.structs.replace(budget, latency_ratio=wanted, by_default=True)
        return analysis, plan(analysis, asked, table=table, front=False, work=work)
    except UnreachableError as error:
        if error.reachable_ratio is None:
            raise
        ratio = math.ceil(100 * error.reachable_ratio + 2) / 100
        where = "on this machine" if analysis.target.device is None else f"on {analysis.target.device.name}"
        told = f"By the prices of units the usual aim of {wanted:.3g}x is out of reach {where}"
        note = f"{told}; the search began at {ratio}x."
        asked = msgspec.structs.replace(budget, latency_ratio=ratio, by_default=True)
        planned = plan(analysis, asked, table=table, front=False, work=work)
        return replace(analysis, notes=(*analysis.notes, note)), planned


def publish(verified: Verified, store: RunDirectory) -> Path:
    """Write all results that a user reads into the run directory, and return the path of the report."""
    analysis, planned = verified.analysis, verified.planned
    (store.path / "summary.json").unlink(missing_ok=True)  # written last: where it stands, all others belong to it
    store.publish_files("mixed.onnx" if verified.mixed.program is None else "mixed", verified.mixed.save)
    store.publish("probe_matrix.npz", analysis.matrix.to_bytes())
    store.publish(MATRIX_FILE, verified.tables.matrix.to_bytes())
    for name, record in (
        ("sensitivity.json", analysis.table),
        ("plan.json", planned.plan),
        (COST_FILE, planned.cost),
        (UNITS_FILE, analysis.units),
        (FACTS_FILE, verified.tables.facts),
        ("calibration.json", analysis.calibration),
    ):
        store.publish(name, to_json(record, pretty=True))
    for name, known in (
        ("audit.json", verified.audit),
        ("compiled.json", verified.compilation),
        ("examples.json", verified.examples),
    ):
        if known is None:
            (store.path / name).unlink(missing_ok=True)  # of an earlier run
        else:
            store.publish(name, to_json(known, pretty=True))
    store.publish("sensitivity.csv", sensitivity_csv(analysis.table))
    path = store.publish("report.html", render(verified))
    store.publish("summary.json", write_summary(verified.summary))
    return path


def render(verified: Verified) -> str:
    """Write the report as one HTML page."""
    analysis = verified.analysis
    planned = verified.planned
    extras = Extras(
        executed=verified.audit,
        compiled=verified.compilation,
        examples=verified.examples,
        others=tuple(one.summary for one in verified.others),
        calibration=analysis.calibration,
    )
    return render_html(verified.summary, planned.plan, analysis.table, analysis.units, planned.cost, extras)


__all__ = ["Analysis", "deliver", "publish", "quantize_model", "render", "run"]
