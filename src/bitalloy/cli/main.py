"""The commands of bitalloy: each parses its options, calls the pipeline once, and prints the result."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bitalloy import __version__
from bitalloy.cli import gates, look
from bitalloy.cli.collecting import collected
from bitalloy.cli.commands import add_command
from bitalloy.cli.console import (
    INTERRUPTED,
    MISSED,
    REFUSED,
    UNREACHABLE,
    error_console,
    out_console,
    shown_progress,
)
from bitalloy.cli.disk import clean_command
from bitalloy.cli.guard import end_for_memory
from bitalloy.cli.requests import PlanArguments, RunArguments, SensitivityArguments
from bitalloy.cli.shards import do_part, merge_command, show_table
from bitalloy.cli.study import study_command
from bitalloy.cli.there import run_there
from bitalloy.core.errors import BitalloyError, UnreachableError
from bitalloy.core.limits import limited, watched
from bitalloy.core.plain import one_line
from bitalloy.core.progress import Course, shares_of_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from bitalloy.core.outcome import Comparison
    from bitalloy.core.records import Estimate
    from bitalloy.pipeline.ship import Verified

MOST_SHOWN = 80
"""Characters of a path that is too long that are repeated."""

NO_NATS = 1e-15
"""Divergence in nats up to which two distributions are the same; no smaller one is told from rounding."""

COMPLETION = ("--install-completion", "--show-completion")
"""Options that typer adds."""

TONE_STYLES = {"": "none", "good": "green", "warn": "yellow", "bad": "red"}
"""Tone of a verdict, see `report.figures` -> its colour."""


class QuickGroup(TyperGroup):
    """The commands, of which none is needed to tell that an option is wrong.

    typer converts values with pydantic, whose import takes as long as all else; a flag that is absent has no value, and
    is converted as well, unless its default is the truth already.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the command; options for completion count where one is given, or help is shown."""
        if args and args[0] not in ("--help", *COMPLETION):
            self.params = [param for param in self.params if not set(param.opts) & set(COMPLETION)]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=QuickGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the fastest mixed-precision version of an ONNX model that keeps its accuracy, with proof.\n\n"
    "Start with `bitalloy run`, which uses the embedded sample, or `bitalloy run model.onnx --data images/`.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bitalloy {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[  # acted on while it is read, before any command
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Find the fastest mixed-precision version of an ONNX model that keeps its accuracy, with proof.

    Start with `bitalloy run`, which uses the embedded sample, or `bitalloy run model.onnx --data images/`.
    """


@collected(RunArguments)
def run_command(asked: RunArguments) -> None:
    """Analyse, plan, apply, verify and report, in one go.

    Leaves in the run directory: mixed.onnx (or mixed/ of a program), report.html, summary.json, plan.json,
    sensitivity.json/.csv and the probe matrix. A killed run goes on where it stopped when the same command is given
    again.

    Exit code 0: done; 2: the command must be corrected; 3: done, but with --fail-on-miss a limit is missed or
    undecided; 4: no plan keeps the limits.

    For example, of the embedded sample, of an own model, with labels, with a metric of one's own, with parts kept in a
    precision, and of a model that is exported first:

      bitalloy run

      bitalloy run model.onnx --data images/ --latency 0.7x

      bitalloy run yolo11n.onnx --data images/ --max-drop-db 20 --eval instances.json

      bitalloy run yolo11n.onnx --data images/ --max-drop 0.3 --eval instances.json

      bitalloy run model.onnx --data feeds/ --metric my_metrics:accuracy --max-drop accuracy=0.01

      bitalloy run model.onnx --data images/ --latency 0.7x --keep fp32:'neck*' --keep int8:'backbone/model.{4..8}'

      bitalloy run mobilesam --checkpoint mobile_sam.pt --data instances.json
    """
    asked.check()
    settings = asked.analysis.settings(protect=asked.protect, sizes=asked.opening.sizes(), effort=asked.effort)
    _refuse_broken(asked.model.model)
    if asked.place.is_elsewhere:
        run_there(asked.place, asked.model.out)
        return
    evaluate, preprocess = asked.evaluation(), asked.preparation()

    from bitalloy.core.store import claimed
    from bitalloy.targets import chosen_targets

    chosen_targets(settings.targets, settings.device, settings.schemes)

    from bitalloy.pipeline.prepare import prepare

    model, limit = asked.model, asked.analysis.limit
    opened = asked.opening.options(limit)
    course = Course(shares_of_run(evaluated=evaluate is not None), len(settings.targets))
    with (
        limited(opened.memory_limit),
        claimed(model.out),
        asked.place.opened() as executor,
        shown_progress(quiet=asked.quiet, course=course) as progress,
    ):
        options = replace(opened, progress=progress, executor=executor)
        prepared = prepare(
            model.model,
            out=model.out,
            data=model.data,
            evaluate=evaluate,
            preprocess=preprocess,
            seed=settings.seed,
            options=options,
        )
        # what cannot be taken is refused before the rest is imported, which takes seconds
        from bitalloy.core.effort import effort_named
        from bitalloy.measure.sizes import float_bytes
        from bitalloy.pipeline.run import deliver

        budget = asked.budget(float_bytes(prepared.model))
        verified = deliver(prepared, budget=budget, settings=settings, limit=limit, effort=effort_named(asked.effort))
    _tell(asked, verified)


def _tell(asked: RunArguments, verified: Verified) -> None:
    """Print the results of a run, log them where that was asked for, and end with the exit code that they have."""
    model = asked.model
    results = (verified, *verified.others)
    folders = [model.out, *(model.out / one.summary.target for one in verified.others)]
    if asked.json_output:
        sys.stdout.write((model.out / "summary.json").read_text() + "\n")
    else:
        for one, folder in zip(results, folders, strict=True):
            _show(one, folder)
        _tell_size(model.out)
    if asked.mlflow:
        from bitalloy.pipeline.tracking import log_run

        for one, folder in zip(results, folders, strict=True):
            told = f"Logged to MLflow as run {log_run(one.summary, folder)}."
            error_console.print(told, soft_wrap=True, markup=False, highlight=False)
    if asked.fail_on_miss and not all(one.status.proven for one in results):
        told = "A limit is missed or undecided, and --fail-on-miss was given. Exit code 3."
        error_console.print(told, style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(MISSED)


def _tell_size(run: Path) -> None:
    from bitalloy.core.disk import disk_use

    text = f"{disk_use(run).told()}, which `bitalloy clean {run}` frees."
    out_console.print(text, soft_wrap=True, highlight=False)


def _refuse_broken(model: str) -> None:
    """Refuse a file that is no ONNX model before the pipeline is imported, which takes seconds."""
    from bitalloy.model.file import refuse_broken

    refuse_broken(model)


def _ends(interval: Estimate | None) -> str:
    """Write the ends of an interval behind its value."""
    return f" [{interval.low:.2f} to {interval.high:.2f}]" if interval is not None else ""


def _beside(one: Comparison, text: Callable[[float], str]) -> str:
    """Write what was measured, with what was predicted where anything was."""
    predicted = f" (predicted {text(one.predicted)})" if one.predicted is not None else ""
    return f"{text(one.measured)}{predicted}"


def _nats(value: float) -> str:
    return f"{value:.3g}" if value > NO_NATS else "no error"


def _figures(verified: Verified) -> Table:
    """The table of key figures of a result."""
    from rich.table import Table

    from bitalloy.report import figures, formats

    summary, units = verified.summary, verified.analysis.units
    table = Table("figure", *(name.replace("-", " ", 1) for name in figures.model_columns(summary, units)))
    latency_ms, columns = summary.latency_ms, figures.shown_columns(summary)

    def row(name: str, models: Any, text: Callable[[Any], str]) -> None:
        """Show what models have; empty where one does not have it."""
        values = (getattr(models, column, None) for column in columns)
        table.add_row(one_line(name), *("" if value is None else text(value) for value in values))

    def over_float(column: str) -> str:
        found = getattr(summary, f"{column}_latency_ratio")
        return f"{found.value if found else getattr(latency_ms, column) / latency_ms.reference:.2f}{_ends(found)}"

    row("latency, ms" + " (estimated)" * summary.latency_estimated, latency_ms, "{:.2f}".format)
    expected = f"{summary.predicted_latency_ratio:.2f}{_ends(summary.predicted_latency_ratio_interval)}"
    table.add_row(
        "latency over float",
        "1",
        *map(over_float, columns[1:-1]),
        f"{summary.latency_ratio:.2f}{_ends(summary.latency_ratio_interval)} (predicted {expected})",
    )
    for step in summary.steps:
        often = f" (x {step.times})" if step.times > 1 else ""
        row(f"{step.name}, ms{often}", step.latency_ms, lambda one: f"{one.median_ms:.2f}")
    row("size, MB", summary.size_bytes, lambda v: f"{v / 1e6:.2f}")
    if (memory := summary.peak_memory_mb) is not None:
        row(f"peak memory, MB (without a model {formats.megabytes(memory.process)})", memory, formats.megabytes)
    for head, pair in summary.sqnr_db.items():
        row(f"SQNR {head}, dB", pair, lambda c: _beside(c, formats.bare_decibel_text))
    for head, pair in summary.kl_nats.items():
        row(f"KL {head}, nats", pair, lambda c: _beside(c, _nats))
    for name, metric in summary.metrics.items():
        row(f"{name} (n={metric.reference.n})" if metric.reference.n else name, metric, lambda m: f"{m.value:.4f}")
    for name, part in summary.graphs.items():
        row(f"size of {name}, MB", part, lambda v: f"{v / 1e6:.2f}")
    return table


def _show(verified: Verified, folder: Path) -> None:
    """The result of a run on one target."""
    from bitalloy.report import figures, formats
    from bitalloy.report.text import counted
    from bitalloy.tasks.resolution import tell_resolution

    summary = verified.summary
    out_console.print(summary.headline, soft_wrap=True, highlight=False, markup=False)
    out_console.print(f"Status: {verified.status.verdict}", highlight=False)
    for tone, verdict, told in figures.limits(verified.status):
        line = f"  {verdict}: {told}"
        out_console.print(line, style=TONE_STYLES[tone], soft_wrap=True, highlight=False, markup=False)
    out_console.print(_figures(verified))
    for correction in (c for c in summary.corrections if c.places):
        verdict = "kept" if correction.kept else "not kept"
        out_console.print(
            f"Correction `{correction.name}` at {correction.places} places, {verdict}: {correction.reason}.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    report = folder / "report.html"
    out_console.print(f"{counted(summary.schemes)} of {summary.units} units on {summary.target}. Report: {report}")
    if summary.ranges is not None:
        out_console.print(f"INT8 ranges: {formats.ranges(summary.ranges)}.", soft_wrap=True, highlight=False)
    if summary.parts is not None:
        style = "" if summary.parts.disjoint else "yellow"
        out_console.print(summary.parts.told, style=style, soft_wrap=True, highlight=False)
    if (compiled := verified.compilation) is not None:
        for text in (compiled.sentence(), *(graph.sentence() for graph in compiled.graphs)):
            out_console.print(text, soft_wrap=True, highlight=False, markup=False)
    for one in [r for r in summary.resolution if r.limit is not None] or summary.resolution[:1]:
        out_console.print(tell_resolution(one), soft_wrap=True, highlight=False, markup=False)
    for note in (*summary.status.warnings, *summary.notes):
        out_console.print(note, style="yellow", soft_wrap=True)


@collected(PlanArguments)
def plan_command(asked: PlanArguments) -> None:
    """Plan again from a run directory, without measuring.

    Other limits or constraints need neither model nor data. Without limits those of the run hold. Leaves
    replanned.json in the run directory; `bitalloy run` with the same limits makes and verifies the model.

    For example:

      bitalloy plan runs/last --latency 0.6x --keep fp32:'neck*'

      bitalloy plan runs/last --front

      bitalloy plan runs/last --max-drop-db boxes=30 --max-drop-db scores=12 --json
    """
    from bitalloy.core.disk import told_freed
    from bitalloy.pipeline.plan import plan_again
    from bitalloy.report import text

    with shown_progress(quiet=asked.quiet) as progress:
        planned = plan_again(asked.run_directory, asked.limits.budget, progress=progress)
    if told := told_freed(asked.run_directory):
        error_console.print(told, style="yellow", soft_wrap=True, highlight=False)
    if asked.json_output:
        sys.stdout.write(text.front_json(planned) if asked.front else text.plan_json(planned))
        return
    columns, lines = text.front_table(planned) if asked.front else text.unit_table(planned)
    out_console.table(columns, lines)
    out_console.print(text.plan_line(planned), soft_wrap=True, highlight=False, markup=False)


@collected(SensitivityArguments)
def sensitivity_command(asked: SensitivityArguments) -> None:
    """Tell what rounding each part does to every output.

    Parts are units, regions or rounding sites; the worst come first. Leaves in the run directory:
    sensitivity.json/.csv, with --method exact sensitivity_exact.json/.csv, with --metric sensitivity_metric.json. A
    killed command goes on where it stopped when the same command is given again.

    For example:

      bitalloy sensitivity model.onnx --data images/

      bitalloy sensitivity model.onnx --data images/ --confirm 10

      bitalloy sensitivity model.onnx --data images/ --method exact --regions 'model.22*' --samples 4

      bitalloy sensitivity model.onnx --data images/ --method exact --mode leave-one-out --units '*/cv1/*'

      bitalloy sensitivity yolo11n.onnx --data images/ --metric --eval instances.json --units '/model.23/*/Sigmoid'

      bitalloy sensitivity model.onnx --data images/ --shard 2/8 --store /shared/store
    """
    asked.check()
    settings = asked.analysis.settings(sizes=asked.opening.sizes())
    _refuse_broken(asked.model.model)

    if asked.shard is not None:
        do_part(asked, settings)
        return
    from bitalloy.pipeline import sensitivity as stage

    model, question = asked.model, asked.question()
    with asked.place.opened() as executor, shown_progress(quiet=asked.quiet) as progress:
        table = stage.sensitivity(
            model.model,
            out=model.out,
            data=model.data,
            settings=settings,
            question=question,
            options=replace(asked.opening.options(asked.analysis.limit), progress=progress, executor=executor),
        )
    show_table(table, model.out, sample=model.data is None, as_json=asked.json_output)


def export_command(
    name: Annotated[str, typer.Argument(help="A name from `bitalloy models`.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="File, folder or hub repository; `random` for random weights. Default: the published one."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the ONNX files. Default: models/NAME.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Height and width of the image: `480x640`.")] = None,
    open_size: Annotated[bool, typer.Option(help="Keep height and width open (SegFormer).")] = False,
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Open a checkpoint of pickled objects, in a process of its own.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights and inputs.")] = 0,
) -> None:
    """Write a known model as ONNX and compare the files with torch.

    For example:

      bitalloy export yolo11n --checkpoint yolo11n.pt --trust-checkpoint

      bitalloy export segformer-b0

      bitalloy export mobilesam --checkpoint mobile_sam.pt --out sam/
    """
    from bitalloy import zoo
    from bitalloy.cli import options

    chosen = zoo.Options(
        size=options.image_size(image_size), open_size=open_size, seed=seed, trust_checkpoint=trust_checkpoint
    )
    exported = zoo.export_model(name, checkpoint=checkpoint, folder=out or Path("models") / name, options=chosen)
    for graph, path in exported.graphs.items():
        out_console.print(f"{graph:<12} {path}", soft_wrap=True, markup=False, highlight=False)
    for wire in exported.wires:
        out_console.print(f"wire         {wire}", soft_wrap=True, markup=False, highlight=False)
    for kept in exported.protect:
        text = f"in float     {kept.pattern}: {kept.reason} ({kept.source})"
        out_console.print(text, soft_wrap=True, markup=False, highlight=False)
    for note in exported.notes:
        out_console.print(note, soft_wrap=True, markup=False, highlight=False)


for _name, _command in (
    ("run", run_command),
    ("plan", plan_command),
    ("sensitivity", sensitivity_command),
    ("merge", merge_command),
    ("study", study_command),
    ("export", export_command),
    ("models", look.models_command),
    ("targets", look.targets_command),
    ("check", gates.check_command),
    ("diff", gates.diff_command),
    ("report", gates.report_command),
    ("card", gates.card_command),
    ("evaluate", gates.evaluate_command),
    ("audit", look.audit_command),
    ("clean", clean_command),
    ("doctor", look.doctor_command),
):
    add_command(app, _name, _command)


def main() -> None:
    """Run the command line: an error of the user's ends with one message and exit code 2, never with a traceback.

    Limits that no plan keeps end with exit code 4.
    """
    try:
        with watched(end_for_memory):
            app(standalone_mode=True)
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:  # typer says nothing of it
            raise KeyboardInterrupt from None
        raise
    except (BitalloyError, UnicodeEncodeError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError):
            if error.errno != errno.ENAMETOOLONG:
                raise
            told = (
                f"A path is longer than the system allows: '{str(error.filename)[:MOST_SHOWN]}...'. Give a shorter one."
            )
        if isinstance(error, UnicodeEncodeError):  # Python can hold names of files that are not UTF-8, not write them
            told = f"A name is not UTF-8 text: {error.object!a}. Rename that file or folder."
        error_console.print(f"Error: {told}", style="red", soft_wrap=True, markup=False, highlight=False)
        sys.exit(UNREACHABLE if isinstance(error, UnreachableError) else REFUSED)
