"""Commands on finished runs: gates for continuous integration, and what differs between two runs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitalloy.cli.collecting import collected
from bitalloy.cli.console import MISSED, SHOWN_LINES, error_console, out_console, shown_progress
from bitalloy.cli.requests import EvaluateArguments
from bitalloy.core.errors import BitalloyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitalloy.core.checked import CheckedRun
    from bitalloy.core.plans import Budget


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Arguments of `bitalloy check`."""

    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished `bitalloy run`.")]
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Directory of another finished run, e.g. that of the main branch: the run may not be worse by more "
            "than noise in latency over float, size or the drops of its metrics (without metrics in SQNR)."
        ),
    ] = None
    max_latency: Annotated[
        str | None, typer.Option(help="Largest latency: `0.7x` of float's, or `12ms`. Met up to 5 % beyond it.")
    ] = None
    size: Annotated[str | None, typer.Option(help="Largest size of the file: `8MB`, or `0.5x` of the given one.")] = (
        None
    )
    max_drop_db: Annotated[
        list[str] | None,
        typer.Option(help="Floor on the SQNR of every output head in dB, or of one head, e.g. `boxes=30`."),
    ] = None
    max_drop: Annotated[
        list[str] | None,
        typer.Option(help="Largest drop of a metric that the run measured, as in `bitalloy run`: `accuracy=0.01`."),
    ] = None
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least agreement with float on the task, such as 0.98.")
    ] = None
    allow_undecided: Annotated[
        bool,
        typer.Option(
            "--allow-undecided", help="Pass where the measurement does not tell, such as for one number per model."
        ),
    ] = False
    junit: Annotated[Path | None, typer.Option(help="File for the result as JUnit XML.")] = None
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False

    def budget(self) -> Budget | None:
        """Return the limits, or None where none is given.

        Raises:
            BitalloyError: a text has not the form that its option expects, or the directory holds no finished run.
        """
        floors, drops = self.max_drop_db or [], self.max_drop or []
        if not (self.max_latency or self.size or floors or drops) and self.min_agreement is None:
            return None
        from bitalloy.cli import options
        from bitalloy.core.plans import Budget
        from bitalloy.pipeline.check import finished_summary

        ratio, milliseconds = options.latency(self.max_latency, "--max-latency")
        least, heads = options.floors(floors)
        given_bytes = round(finished_summary(self.run_directory).size_bytes.reference)
        return Budget(
            latency_ratio=ratio,
            latency_ms=milliseconds,
            size_bytes=options.size(self.size, given_bytes),
            min_sqnr_db=least,
            head_sqnr_db=heads,
            max_drop=options.drops(drops),
            min_agreement=self.min_agreement,
        )


@collected(CheckArguments)
def check_command(asked: CheckArguments) -> None:
    """Tell whether a finished run keeps limits, from its files alone: a gate for CI.

    The limits that the run was made for count too, unless one is given on the same. On GitHub failures are annotated,
    and a table is added to the summary of the step.

    Exit code 0: passed; 2: the command must be corrected; 3: a limit is missed or undecided, or the run is worse than
    its baseline.

    For example:

      bitalloy check runs/last --max-latency 0.7x --max-drop accuracy=0.01 --junit check.xml

      bitalloy check runs/new --baseline runs/main
    """
    budget = asked.budget()
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.check import check_run
    from bitalloy.report.ci import junit_xml

    found = check_run(
        asked.run_directory, budget=budget, baseline=asked.baseline, allow_undecided=asked.allow_undecided
    )
    if asked.junit is not None:
        _write(asked.junit, junit_xml(found))
    _tell_github(found)
    if asked.json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
    else:
        _show_check(found)
    if not found.passed:
        error_console.print(found.reason, style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(MISSED)


def diff_command(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Directory of a finished run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Directory of another one.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Tell how two finished runs differ: numbers, and whether by more than noise, plans, versions and data.

    Example: bitalloy diff runs/main runs/new
    """
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.check import diff_runs
    from bitalloy.report.text import difference_table

    found = diff_runs(first, second)
    if json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    if not found.same_model:
        out_console.print("The runs are of different models.", style="yellow")
    if not found.same_target:
        out_console.print("The runs are for different targets.", style="yellow")
    _show_table(*difference_table(found))
    told = [f"{unit.unit}: {unit.first or 'absent'} -> {unit.second or 'absent'}" for unit in found.units]
    told = [f"Units in another scheme: {len(told)}.", *told[:SHOWN_LINES]]
    told += [f"{len(found.units) - SHOWN_LINES} more with --json."] * (len(found.units) > SHOWN_LINES)
    told += [f"{name} {before or 'absent'} -> {after or 'absent'}" for name, (before, after) in found.versions.items()]
    told += [
        f"Data of {name}: {before.name}, {before.count} samples -> {after.name}, {after.count} samples"
        for name, (before, after) in found.data.items()
    ]
    for line in told:
        out_console.print(line, soft_wrap=True, markup=False, highlight=False)


def card_command(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished `bitalloy run`.")],
    out: Annotated[Path | None, typer.Option(help="File of the card. Default: README.md in RUN.")] = None,
    base_model: Annotated[
        str, typer.Option(help="The float model as it was published, such as `owner/name`. Default: its file's name.")
    ] = "",
) -> None:
    """Write a model card of a finished run, from its files alone.

    It is Markdown with front matter, as model hubs read it (`base_model_relation: quantized`): metrics with intervals,
    limits, data, how to load the model, and where it comes from.

    Example: bitalloy card runs/last --base-model owner/name
    """
    from bitalloy.pipeline.card import write_card

    path = write_card(run_directory, out=out, base_model=base_model)
    out_console.print(f"Model card: {path}", soft_wrap=True, markup=False, highlight=False)


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of one finished `bitalloy run` or of several.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File of the page. Default: report.html in the directory of one run, else compare.html."),
    ] = None,
) -> None:
    """Write the report of a finished run again, or of several runs side by side, from their files alone.

    Of several runs the page shows verdicts, latency, metrics and losses beside each other, and how each differs from
    the first one: numbers, and whether by more than noise, plans, versions and data.

    For example:

      bitalloy report runs/last

      bitalloy report runs/int8 runs/mixed runs/strict --out compare.html
    """
    from bitalloy.pipeline.report import write_report

    path = write_report(runs, out)
    out_console.print(f"Report: {path}", soft_wrap=True, markup=False, highlight=False)


@collected(EvaluateArguments)
def evaluate_command(asked: EvaluateArguments) -> None:
    """Evaluate model files side by side, each paired with the first, without an analysis.

    The files are executed as they are, so what a tool made of a model is compared with the model on the same samples.

    For example:

      bitalloy evaluate yolo11n.onnx runs/last/mixed.onnx other_int8.onnx --eval instances.json

      bitalloy evaluate model.onnx mixed.onnx --metric my_metrics:accuracy --json
    """
    evaluate, sources = asked.evaluation(), asked.opening
    sources.check()
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.evaluate import evaluate_models
    from bitalloy.report.text import evaluation_table

    with shown_progress(quiet=asked.quiet) as progress:
        options = replace(sources.options(asked.limit), progress=progress)
        found = evaluate_models(asked.models, evaluate, seed=asked.seed, options=options)
    if asked.json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    for one in found:
        header, lines = evaluation_table(one)
        _show_table(header, lines)
        for note in one.notes:
            out_console.print(note, style="yellow", soft_wrap=True, markup=False, highlight=False)


def _show_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    out_console.table(header, lines)


def _show_check(found: CheckedRun) -> None:
    from bitalloy.report.text import difference_text, limit_text, verdict_text

    lines = [f"{verdict_text(one)}: {limit_text(one)}" for one in found.limits]
    lines += map(difference_text, found.against)
    for line in (*lines, "Passed." if found.passed else "Not passed."):
        out_console.print(line, soft_wrap=True, markup=False, highlight=False)


def _tell_github(found: CheckedRun) -> None:
    """Annotate failures and add to the summary of the step, where GitHub runs the command."""
    from bitalloy.report.ci import check_markdown, failure_annotations

    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in failure_annotations(found):
            sys.stderr.write(line + "\n")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(check_markdown(found))
        except OSError as error:
            raise BitalloyError(f"The step summary '{summary}' cannot be written: {error.strerror}.") from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise BitalloyError(f"'{path}' cannot be written: {error.strerror}. Give another --junit.") from error
