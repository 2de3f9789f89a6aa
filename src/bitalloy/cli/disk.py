"""The command that frees space in run directories."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitalloy.cli.console import out_console


def clean_command(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be freed, and remove nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the sizes as JSON.")] = False,
) -> None:
    """Free the stored results of a run directory; report, models, tables and summary stay.

    The same `bitalloy run` computes them again where they are needed.

    For example:

      bitalloy clean runs/last --dry-run
    """
    from bitalloy.core.disk import clean_run
    from bitalloy.core.encoding import to_json

    found = clean_run(run_directory, dry_run=dry_run)
    if json_output:
        sys.stdout.write(to_json(found, pretty=True).decode() + "\n")
        return
    for text in (f"{stage}  {size / 1e6:.1f} MB" for stage, size in found.stages.items()):
        out_console.print(text, soft_wrap=True, highlight=False)
    end = "they are freed" if found.freed else "without --dry-run they are freed"
    out_console.print(f"{found.told()}; {end}.", soft_wrap=True, highlight=False)
