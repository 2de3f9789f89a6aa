"""What is seen of the progress of a command."""

from __future__ import annotations

import re

import pytest

from bitalloy.cli.console import Bars


def show() -> None:
    with Bars() as bars:
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
    assert re.fullmatch(r"probe, 3 steps, \d+\.\d s", first) and re.fullmatch(r"search, \d+\.\d s", second)


def test_a_terminal_shows_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show()
    shown = capsys.readouterr().err
    assert "probe" in shown and "3/3" in shown and "steps" not in shown
