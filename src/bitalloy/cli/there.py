"""The whole command on a node of the target, which alone measures latency: `--measure-on`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import typer

from bitalloy.cli.arguments import MeasuringArguments
from bitalloy.core.errors import BitalloyError

RESULT_FILE, SHOWN_FILE = "result.txt", "shown.txt"
"""Files in the temporary folder in which the node writes what it prints: results, and progress with errors."""
MOST_BUSY = 0.2
"""Part of the time for which the cores of a node may be at work on something else before the command begins there."""


def run_there(place: MeasuringArguments, out: Path) -> None:
    """Run this very command on a node of the target, print what it prints, and end with its exit code.

    Args:
        place: the cluster, and the resource that nodes of the target carry.
        out: run directory, on a file system that this machine and the nodes share.

    Raises:
        BitalloyError: there is no such node, it does not see the run directory, or it is busy.
    """
    from bitalloy.core.ownership import temporary
    from bitalloy.core.store import RunDirectory
    from bitalloy.runtime.cluster.there import call_there

    with temporary(RunDirectory(out).cache) as folder:
        seen = 0

        def watch() -> None:
            nonlocal seen
            text = (folder / SHOWN_FILE).read_text(encoding="utf-8")
            sys.stderr.write(text[seen:])
            seen = len(text)

        for name in (RESULT_FILE, SHOWN_FILE):
            (folder / name).touch()
        words = [*sys.argv[1:], "--measure-on", "local"]
        columns = shutil.get_terminal_size().columns
        code = call_there(
            place.executor,
            place.measure_on,
            perform_there,
            (words, str(Path.cwd()), str(folder.absolute()), columns),
            watch=watch,
            tell=lambda text: sys.stderr.write(f"{text}\n"),
        )
        sys.stdout.write((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if code:
        raise typer.Exit(code)


def perform_there(words: Sequence[str], current: str, folder: str, columns: int) -> int:
    """Run a command on this node, and return its exit code; it prints into the files `RESULT_FILE` and `SHOWN_FILE`.

    Args:
        words: the command.
        current: folder from which it was given.
        folder: where the files are.
        columns: width of the terminal.

    Raises:
        BitalloyError: this node does not see the folders, or it is busy.
    """
    from bitalloy.runtime.machine import busy_share

    node = socket.gethostname()
    for path in (Path(current), Path(folder) / RESULT_FILE):
        if not path.exists():
            raise BitalloyError(
                f"Node {node} does not see '{path}'. --measure-on needs the current folder, the run directory, model "
                "and data on a file system that all nodes share."
            )
    share = busy_share()
    if share > MOST_BUSY:
        raise BitalloyError(
            f"Node {node} is busy: its cores are at work for {share:.0%} of the time, and at most {MOST_BUSY:.0%} is "
            "allowed before latency is measured. Wait until it is idle, and keep other work off nodes of the target."
        )
    from bitalloy.cli.main import main

    os.environ["COLUMNS"] = str(columns)
    sys.argv = ["bitalloy", *words]
    with (
        chdir(current),
        (Path(folder) / RESULT_FILE).open("w", encoding="utf-8") as result,
        (Path(folder) / SHOWN_FILE).open("w", encoding="utf-8", buffering=1) as shown,
        redirect_stdout(result),
        redirect_stderr(shown),
    ):
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0
