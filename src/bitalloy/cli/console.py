"""Output of the command line: results on standard output, progress and errors on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bitalloy.core.plain import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from bitalloy.core.progress import Course
    from bitalloy.core.work import Progress

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


@contextmanager
def shown_progress(*, quiet: bool = False, course: Course | None = None) -> Iterator[Progress]:
    """Show the progress of a command on standard error while the block runs.

    Args:
        quiet: whether to show none.
        course: what tells how much is left.
    """
    from bitalloy.core.work import Silent

    if quiet:
        yield Silent()
        return
    from bitalloy.core.progress import Shown

    with Shown(error_console.console, course) as shown:
        yield shown
