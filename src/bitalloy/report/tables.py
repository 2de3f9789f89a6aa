"""The sensitivity table as files for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from bitalloy.core.encoding import to_json
from bitalloy.core.plain import csv_cell
from bitalloy.core.records import SensitivityTable

COLUMNS = ("scope", "id", "part", "head", "sqnr_db", "low_db", "high_db", "flagged", "exact", "scheme")


def sensitivity_csv(table: SensitivityTable) -> str:
    """Write the table as CSV: one line per (unit, region or site; part; head), with strings quoted.

    `low_db` and `high_db` bound the 95 % bootstrap interval of `sqnr_db`; `flagged` and `exact` are `true` or `false`.
    A name that a spreadsheet would take for a formula stands behind an apostrophe.
    """
    rows = []
    for row in table.rows:
        value = row.sqnr_db
        marks = ("true" if mark else "false" for mark in (row.flagged, row.exact))
        names = (row.scope, row.id, row.part, row.head)
        rows.append((*names, value.value, value.low, value.high, *marks, row.scheme))
    return csv_text(COLUMNS, rows)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table as CSV, with strings quoted and nothing for None.

    A text that a spreadsheet would take for a formula stands behind an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if v is None else csv_cell(v) if isinstance(v, str) else v for v in row])
    return buffer.getvalue()


def sensitivity_json(table: SensitivityTable) -> str:
    """Write the table as indented JSON; `msgspec.json.decode(..., type=SensitivityTable)` gives it back."""
    return to_json(table, pretty=True).decode()
