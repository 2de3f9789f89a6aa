"""What the command line prints on: results on standard output, progress and errors on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

out_console = Console()
error_console = Console(stderr=True)
SHOWN_LINES = 40


class Bars:
    """Progress bars of the stages, on standard error."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=error_console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins."""
        self._task = self._progress.add_task(stage, total=total)

    def advance(self, steps: int = 1) -> None:
        """Steps of the stage are done."""
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def finish(self, note: str = "") -> None:
        """The stage is over."""
        if self._task is not None:
            done = self._progress.tasks[self._task].completed
            self._progress.update(self._task, total=done, completed=done)
