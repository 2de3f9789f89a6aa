"""Output of the command line: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bitalloy.core.plain import one_line

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_LINES = 40
REFUSED, MISSED, UNREACHABLE, INTERRUPTED = 2, 3, 4, 130
"""Exit codes: of a command that the user must correct, of limits that are not proven to be kept where that was asked
for, of limits that no plan keeps, and of a command that was interrupted."""


class Output:
    """One of the two standard streams. `rich`, which imports slowly, is imported when something is printed."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr
        self.width: int | None = None
        """Number of columns of text; None takes the terminal's."""

    @property
    def console(self) -> Console:
        """Console that writes to the current standard stream."""
        from rich.console import Console

        return Console(stderr=self._stderr, width=self.width, markup=False, emoji=False)

    def print(self, *parts: object, **how: Any) -> None:
        """Print as `rich.console.Console.print` does; a text is one line, in which nothing is markup."""
        self.console.print(*(one_line(part) if isinstance(part, str) else part for part in parts), **how)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table of texts, see `print`."""
        from rich.table import Table

        shown = Table()
        for name in header:
            shown.add_column(one_line(name), overflow="fold")
        for row in rows:
            shown.add_row(*map(one_line, row))
        self.console.print(shown)


out_console, error_console = Output(), Output(stderr=True)


class Bars:
    """Progress of the stages on standard error: bars on a terminal, elsewhere one line for each finished stage."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = error_console.console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._stage: str | None = None
        self._began, self._done = 0.0, 0

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage of `total` steps; None where the number is unknown."""
        self._stage, self._began, self._done = stage, time.perf_counter(), 0
        self._progress.add_task(stage, total=total)

    def advance(self, steps: int = 1) -> None:
        """Report that steps of the stage are done."""
        if self._stage is not None:
            self._done += steps
            self._progress.advance(self._progress.task_ids[-1], steps)

    def finish(self, note: str = "") -> None:
        """End the stage, and show a note on its result."""
        if self._stage is None:
            return
        self._progress.update(self._progress.task_ids[-1], total=self._done, completed=self._done)
        if not self._console.is_terminal:
            steps = f", {self._done} steps" if self._done else ""
            line = f"{self._stage}{steps}, {time.perf_counter() - self._began:.1f} s"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
        self._stage = None
