"""The command `bitalloy study`: many models, targets, formats and budgets, and one comparative report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitalloy.cli.arguments import MOST_COUNT, MeasuringArguments
from bitalloy.cli.collecting import collected
from bitalloy.cli.console import error_console, out_console, shown_progress
from bitalloy.cli.guard import MemoryLimit, limit_in_bytes
from bitalloy.cli.requests import Quiet
from bitalloy.cli.there import run_there
from bitalloy.core.errors import BitalloyError

if TYPE_CHECKING:
    from bitalloy.core.studies import StudyResult
    from bitalloy.pipeline.study import Study

SHOWN_VERSIONS = ("float", "all lowest", "mixed")
"""Versions that the terminal shows; the report has all."""


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Arguments of `bitalloy study`."""

    file: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="TOML file of the study. Default: the five embedded models on all targets that run here.",
        ),
    ] = None
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/study")
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_COUNT, help="Largest number of labelled samples to evaluate.")
    ] = None
    effort: Annotated[
        str | None, typer.Option(help="`quick`, `default` or `thorough`, in place of what the file says.")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be run, what is missing and where to put it, and stop.")
    ] = False
    memory_limit: MemoryLimit = None
    place: MeasuringArguments
    json_output: Annotated[bool, typer.Option("--json", help="Print study.json instead of tables.")] = False
    quiet: Quiet = False


@collected(StudyArguments)
def study_command(asked: StudyArguments) -> None:
    """Run models x targets x formats x budgets and compare them in one report.

    Each cell is a run directory in cells/MODEL/TARGET/FORMATS/BUDGET; what the cells of a model share is computed
    once. Leaves study.html, study.json, study.csv and parts.csv. A killed study goes on where it stopped when the same
    command is given again.

    A file lists models, and optionally targets, formats and budgets:

      targets = ["ort-cpu", "openvino-cpu"]

      limit = 200

      [budget.fast]

      latency = "0.7x"

      [[model]]

      model = "yolo11n-seg"

      checkpoint = "yolo11n-seg.pt"

      trust-checkpoint = true

      data = "images/val2017"

      eval = ["annotations/instances_val2017.json"]

    Exit code 0: done; 2: the file or folder must be corrected, or no cell has a result.

    For example:

      bitalloy study

      bitalloy study studies/models-to-test.toml --dry-run

      bitalloy study mine.toml --out runs/mine --limit 200
    """
    from bitalloy.pipeline.study import read_study

    memory = limit_in_bytes(asked.memory_limit)
    planned = read_study(asked.file, limit=asked.limit, effort=asked.effort)
    if asked.dry_run:
        _show_plan(planned)
        return
    if asked.place.is_elsewhere:
        run_there(asked.place, asked.out)
    else:
        _run(planned, asked, memory)


def _show_plan(planned: Study) -> None:
    from bitalloy.pipeline.study import lacks_of

    asked = planned.asked
    out_console.print(
        f"{planned.cells} cells: {len(asked.models)} models, targets {', '.join(planned.targets)}, formats "
        f"{', '.join(asked.schemes)}, budgets {', '.join(planned.budgets)}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    lacks = lacks_of(planned)
    for model in asked.models:
        found = [lack.what for lack in lacks if lack.model == model.name]
        for line in (f"{model.name}: {'missing' if found else 'ready'}", *(f"  {what}" for what in found)):
            out_console.print(line, soft_wrap=True, highlight=False, markup=False)


def _run(planned: Study, asked: StudyArguments, memory: int | None) -> None:
    from bitalloy.core.encoding import to_json
    from bitalloy.pipeline.prepare import RunOptions
    from bitalloy.pipeline.study import study

    with asked.place.opened() as executor, shown_progress(quiet=asked.quiet) as progress:
        options = RunOptions(progress=progress, executor=executor, memory_limit=memory)
        result = study(planned, out=asked.out, options=options)
    if asked.json_output:
        sys.stdout.write(to_json(result, pretty=True).decode() + "\n")
    else:
        _show(result, asked.out)
    if all(cell.failed for cell in result.cells):
        raise BitalloyError(f"No cell of the study has a result: {result.cells[0].failed if result.cells else ''}")


def _show(result: StudyResult, out: Path) -> None:
    lines = []
    for cell in result.cells:
        if cell.failed:
            lines.append((cell.id, "failed", "", "", ""))
        for one in cell.variants:
            if one.name in SHOWN_VERSIONS:
                metric = next((f"{name} {value.value:.4f}" for name, value in one.metrics.items()), "")
                ratio = "" if one.latency_ratio is None else f"{one.latency_ratio.value:.2f}x"
                size = "" if one.size_bytes is None else f"{one.size_bytes / 1e6:.2f} MB"
                lines.append((cell.id if one.name == SHOWN_VERSIONS[0] else "", one.name, metric, ratio, size))
    out_console.table(("run", "version", "first metric", "latency", "size"), lines)
    for answer in result.answers:
        out_console.print(f"{answer.verdict}: {answer.question}", highlight=False, markup=False, soft_wrap=True)
        out_console.print(f"  {answer.told}", highlight=False, markup=False, soft_wrap=True)
    for lack in result.lacks:
        error_console.print(f"Left out {lack.model}: {lack.what}", style="yellow", soft_wrap=True, markup=False)
    for cell in result.cells:
        if cell.failed:
            told = f"No result of {cell.id}: {cell.failed}"
            error_console.print(told, style="red", soft_wrap=True, markup=False, highlight=False)
    out_console.print(f"Report: {out / 'study.html'}", soft_wrap=True, highlight=False)
