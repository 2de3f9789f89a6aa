"""Tables of the console."""

from __future__ import annotations

from bitalloy.core.records import DataInfo, Estimate, Sensitivity, SensitivityTable
from bitalloy.report.text import readable


def row(name: str, value: float) -> Sensitivity:
    return Sensitivity(
        scope="unit",
        id=name,
        head="logits",
        sqnr_db=Estimate(value=value, low=value, high=value),
        part="all",
        scheme="int8",
        flagged=False,
        exact=False,
    )


def test_units_are_sorted_as_a_person_sorts_them_and_no_error_is_said() -> None:
    rows = (row("model.10", 30.0), row("model.9", 30.0), row("model.2", 160.0), row("model.3", 12.0))
    table = SensitivityTable(
        model_sha256="",
        data=DataInfo(name="d", count=4, seed=0, sha256="", preprocessing=""),
        samples=4,
        probes=1,
        seed=0,
        settled=True,
        rows=rows,
    )
    columns, lines = readable(table)
    assert [line[1] for line in lines] == ["model.3", "model.9", "model.10", "model.2"]
    assert [line[2] for line in lines][-1] == "no error" and lines[0][2] == "12.0 (12.0 to 12.0)"
    assert all(columns)
