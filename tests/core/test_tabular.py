"""Results as tables in terminals, notebooks and data frames."""

from __future__ import annotations

import sys
from html.parser import HTMLParser

import pytest
from tests.report.conftest import make_run

import bitalloy
from bitalloy.core import work
from bitalloy.core.progress import StageBars
from bitalloy.core.tabular import MOST_ROWS, InlinePage, Listing


class Cells(HTMLParser):
    """Texts of the cells of a table, and the tags that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_of_a_foreign_model_are_text() -> None:
    evil = "<img src=x onerror=alert(1)>"
    found = Cells(Listing(evil, (evil,), [(evil,)])._repr_html_())
    assert "img" not in found.tags and found.texts == [evil] * 3


def test_a_long_table_is_cut_and_says_so() -> None:
    found = Cells(Listing("t", ("n",), [(i,) for i in range(MOST_ROWS + 7)])._repr_html_())
    assert found.tags.count("td") == MOST_ROWS and "7 more rows; " in found.texts


def test_a_page_in_a_frame_is_whole() -> None:
    page = "<html>\"quoted\" & 'other' <script>1 < 2</script></html>"

    class Frame(HTMLParser):
        found: dict[str, str | None]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found = dict(attrs)

    frame = Frame()
    frame.feed(InlinePage(page)._repr_html_())
    assert frame.found["srcdoc"] == page == str(InlinePage(page))
    assert frame.found["sandbox"] == "allow-scripts"


def test_records_of_a_run_are_tables() -> None:
    run = make_run(blocks=2)
    plan, table, cost = run.plan, run.table, run.cost
    assert len(plan.listing().rows) == len(plan.choices) and len(plan.front().rows) == len(plan.pareto)
    assert len(table.listing().rows) == len(table.rows)
    assert len(cost.listing().rows) == sum(len(one.us) for one in cost.units)
    for one in (plan, plan.front(), table, cost):
        assert len(repr(one)) < 120 and all(len(row) == len(one.listing().columns) for row in one.listing().rows)
    times = [float(str(row[2])) for row in plan.front().rows]
    assert times == sorted(times) and times[0] == min(point.predicted_latency_us for point in plan.pareto) / 1e3


def test_a_data_frame_has_numbers() -> None:
    pandas = pytest.importorskip("pandas")
    run = make_run(blocks=2)
    frame = run.table.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.sqnr_db.dtype == float
    assert frame.sqnr_db.tolist() == [row.sqnr_db.value for row in run.table.rows]


def test_without_pandas_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(bitalloy.MissingExtraError, match=r"pip install 'bitalloy\[pandas\]'"):
        Listing("t", (), []).to_pandas()


def test_progress_is_shown_in_a_notebook_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(bitalloy.RunOptions().progress, work.Silent)

    class ZMQInteractiveShell:
        pass

    class Notebook:
        get_ipython = ZMQInteractiveShell

    monkeypatch.setitem(sys.modules, "IPython", Notebook)
    assert isinstance(bitalloy.RunOptions().progress, StageBars)
    assert isinstance(bitalloy.Workspace().progress, StageBars)
