"""Absurd options: refused before any work, with one message; an interrupt at any time ends with one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitalloy.core.errors import BitalloyError
from bitalloy.core.plans import Keep
from bitalloy.core.units import UnitGraph
from bitalloy.search.constraints import constrain

LONG = "9" * 400
BEFORE = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
        return None

sys.meta_path.insert(0, Finder())
sys.argv[1:] = {words!r}
from bitalloy.__main__ import start
start()
"""


@pytest.mark.parametrize(
    "words",
    [
        ("--samples", "²"),
        ("--samples", LONG),
        ("--probes", LONG),
        ("--probes", "100000000"),
        ("--seed", LONG),
        ("--limit", LONG),
        ("--max-drop-db", "1e308"),
        ("--max-drop-db", "x=-1e308"),
        ("--max-drop-db", LONG),
        ("--max-drop", LONG),
        ("--latency", f"{LONG}x"),
        ("--latency", "²x"),
        ("--size", f"{LONG}MB"),
        ("--size", "٣MB"),
        ("--shape", f"x=1x{LONG}"),
        ("--shape", f"x=1x{LONG * 20}"),
        ("--mean", "nan"),
        ("--mean", LONG),
        ("--scale", LONG),
        ("--keep", "nonsense"),
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_absurd_numbers(words: tuple[str, str], inside: Any) -> None:
    assert words[0] in inside("run", "missing.onnx", *words).refused()


@pytest.mark.parametrize(
    "words",
    [("export", "yolo11n", "--out", LONG), ("run", LONG), ("plan", LONG), ("run", "--data", LONG), ("audit", LONG)],
    ids=lambda words: " ".join(words)[:20],
)
def test_paths_that_are_too_long(words: tuple[str, ...], inside: Any) -> None:
    assert "999" in inside(*words).refused()


@pytest.mark.parametrize(
    "pattern",
    ["{0..999}{0..999}", "{0..9}" * 300, f"{{{LONG * 20}..{LONG * 20}}}", f"{{0..{LONG}}}", "{9..1}", "[" * 5000],
    ids=lambda pattern: pattern[:20],
)
def test_patterns_that_stand_for_too_much(pattern: str, case_units: UnitGraph) -> None:
    with pytest.raises(BitalloyError, match="--keep"):
        constrain(case_units, [Keep(scheme="fp32", pattern=pattern)], {})


def test_ranges_of_a_pattern_are_multiplied_out(case_units: UnitGraph) -> None:
    unit = case_units.units[0]
    renamed = type(unit)(**{f: getattr(unit, f) for f in unit.__struct_fields__} | {"id": "a3b12", "core": ("a3b12",)})
    units = type(case_units)(
        **{f: getattr(case_units, f) for f in case_units.__struct_fields__} | {"units": (renamed,), "edges": ()}
    )
    for pattern, found in (("a{0..9}b{10..99}", True), ("a{0..9}b{0..11}", False), ("{a..b}a3b12", False)):
        asked = [Keep(scheme=unit.allowed[0], pattern=pattern)]
        if found:
            assert constrain(units, asked, {}).kept == {"a3b12"}
        else:
            with pytest.raises(BitalloyError, match="matches no"):
                constrain(units, asked, {})


@pytest.mark.parametrize(
    "module", ["bitalloy.cli.main", "typer", "bitalloy.core.errors", "rich.console", "onnxruntime"]
)
def test_an_interrupt_during_an_import(module: str, inputs: Any, tmp_path: Path) -> None:
    code = BEFORE.format(module=module, words=["run", str(inputs.classifier), "--data", str(inputs.images)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Stopped. The same command goes on from here.\n"
