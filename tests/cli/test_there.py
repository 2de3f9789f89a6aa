"""`--measure-on`: the command runs on a node of the target, unless that is busy or does not see the files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Inside

from bitalloy.cli import there
from bitalloy.core.errors import BitalloyError
from bitalloy.runtime.machine import busy_share


def performed(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """The exit code of a command, its result, and what else it showed."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("COLUMNS", "80")
    for name in (there.RESULT_FILE, there.SHOWN_FILE):
        (folder / name).touch()
    code = there.perform_there(words, str(folder), str(folder), 100)
    return code, (folder / there.RESULT_FILE).read_text(), (folder / there.SHOWN_FILE).read_text()


def test_what_a_command_prints_comes_back(here: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there, "MOST_BUSY", 1.0)
    current = Path.cwd()
    code, result, shown = performed(["targets", "--json"], here, monkeypatch)
    assert (code, shown) == (0, "") and result == inside("targets", "--json").out
    code, result, shown = performed(["run", "absent.onnx"], here, monkeypatch)
    assert (code, result) == (2, "") and "absent.onnx" in shown
    assert Path.cwd() == current


def test_a_busy_node_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        assert busy_share(0.5) > 0.5
        with pytest.raises(
            BitalloyError, match=r"is busy: its cores are at work for \d+% of the time, and at most 20%"
        ):
            performed(["targets"], here, monkeypatch)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_a_node_that_does_not_see_the_files_is_refused(here: Path) -> None:
    with pytest.raises(BitalloyError, match=r"does not see '.*result.txt'. --measure-on needs"):
        there.perform_there(["targets"], str(here), str(here), 80)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--measure-on", "target"), "needs a cluster that runs: --executor ray://HOST:PORT"),
        (("--measure-on", "target", "--executor", "ray"), "needs a cluster that runs: --executor ray://HOST:PORT"),
        (("--measure-on", "CPU", "--executor", "ray://auto"), "expected local, or a custom resource such as target"),
        (("--measure-on", "a b", "--executor", "ray://auto"), "expected local, or a custom resource such as target"),
    ],
)
def test_wrong_places(options: tuple[str, ...], told: str, inside: Inside) -> None:
    for command in (("run", "yolo11n-shapes"), ("study",)):
        assert told in inside(*command, *options).refused()
        assert not list(inside.folder.rglob("scratch-*"))
