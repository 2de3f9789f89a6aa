"""Results as tables: short in a terminal, HTML in a notebook, and a data frame of pandas."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitalloy.core.errors import MissingExtraError

MOST_ROWS = 30
"""Rows that a notebook shows of a table; the others are counted."""


class Tabular:
    """Base of what can be seen as one table; `listing` makes it."""

    __slots__ = ()

    def listing(self) -> Listing:
        """Return the table."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """Return the table as a `pandas.DataFrame`, with numbers as numbers.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("pandas", "pandas", "to_pandas()") from error
        found = self.listing()
        return pandas.DataFrame([list(row) for row in found.rows], columns=list(found.columns))

    def __repr__(self) -> str:
        found = self.listing()
        return f"{type(self).__name__}({found.title}, {len(found.rows)} rows)"

    def _repr_html_(self) -> str:
        return self.listing().as_html()


@dataclass(frozen=True, repr=False)
class Listing(Tabular):
    """A table: names of columns, and rows of texts and numbers.

    >>> Listing("costs", ("unit", "us"), (("conv", 1.5),))
    Listing(costs, 1 rows)
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    def listing(self) -> Listing:
        """Return the table itself."""
        return self

    def as_html(self) -> str:
        """Write the first rows as HTML, in which all names are text."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>"
            for row in self.rows[:MOST_ROWS]
        )
        more = len(self.rows) - MOST_ROWS
        told = f"<p>{more} more rows; <code>to_pandas()</code> has all of them.</p>" if more > 0 else ""
        title = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{told}"


class InlinePage:
    """An HTML page that a notebook shows in a frame of its own; `str` of it is the page.

    The frame has neither the origin nor the storage of the notebook.
    """

    def __init__(self, page: str, height: int = 900) -> None:
        self._page, self._height = page, height

    def __str__(self) -> str:
        return self._page

    def __repr__(self) -> str:
        return f"InlinePage({len(self._page)} characters)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts" width="100%" height="{self._height}" '
            f'srcdoc="{html.escape(self._page, quote=True)}"></iframe>'
        )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
