"""What is seen of the progress of a command."""

from __future__ import annotations

import re
import time

import pytest

from bitalloy.cli.console import shown_progress
from bitalloy.core import progress
from bitalloy.core.progress import Course, shares_of_run


def show(*, quiet: bool = False) -> None:
    with shown_progress(quiet=quiet) as bars:
        bars.start("probe", 3)
        bars.advance()
        bars.advance(2)
        bars.finish()
        bars.start("search", None)
        bars.finish()


def test_without_a_terminal_every_finished_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show()
    shown = capsys.readouterr()
    assert not shown.out
    first, second = shown.err.splitlines()
    so_far = r" \(\d+ s so far\)"
    assert re.fullmatch(rf"probe, 3 steps, \d+\.\d s{so_far}", first)
    assert re.fullmatch(rf"search, \d+\.\d s{so_far}", second)


def test_a_long_stage_tells_its_part_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MOST_SILENT", 0.01)
    shown = ""
    with shown_progress() as bars:
        bars.start("verify", 4)
        bars.advance(3)
        while "verify" not in shown:  # the line comes without any further step
            time.sleep(0.01)
            shown += capsys.readouterr().err
        bars.finish()
    assert re.search(r"^verify, 3 of 4 steps, \d+\.\d s \(", shown, re.MULTILINE)


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show()
    shown = capsys.readouterr().err
    assert "probe" in shown and "3/3" in shown and "steps" not in shown


def test_what_is_left_follows_from_the_pace_of_the_run() -> None:
    course = Course({"a": 0.2, "b": 0.3, "c": 0.5})
    course.begin("a")
    assert course.left(1.0, "a", 0.0) is None
    assert course.left(10.0, "a", 0.5) == pytest.approx(90)
    course.end("a", 20.0)
    assert course.left(20.0) == pytest.approx(80)
    course.begin("b")
    course.end("b", 0.0)  # stored: it tells nothing of the pace
    course.begin("c")
    assert course.left(21.0, "c", 0.0) == pytest.approx(21.0 / 0.2 * 0.5)


def test_every_further_target_has_its_own_stages_ahead() -> None:
    course = Course({"probe": 0.5, "cost": 0.2, "verify": 0.3}, targets=2)
    for stage in ("probe", "cost", "verify"):
        course.begin(stage)
        course.end(stage, 1.0)
    assert course.left(10.0) == pytest.approx(5.0)
    course.begin("cost")
    course.end("cost", 1.0)
    assert course.left(12.0) == pytest.approx(12.0 / 1.2 * 0.3)


def test_typical_parts_of_a_run_add_up() -> None:
    assert sum(shares_of_run(evaluated=False).values()) == pytest.approx(1.0)
    assert list(shares_of_run(evaluated=True)).index("candidate") < list(shares_of_run(evaluated=True)).index("verify")
