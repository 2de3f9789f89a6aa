"""The documents: their examples run, their options exist, and the site builds without a warning."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer

import bitalloy
from bitalloy.cli.main import app
from bitalloy.core.effort import EFFORTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(page.name, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]

OTHERS = re.compile(r"\bray (start|stop)\b|^srun |^#SBATCH |\bsbatch |\$\(hostname")
"""Lines of commands that are not ours, with options of their own."""

GIVEN = {
    *("Analysis", "Calibrated", "CheckedRun", "LimitStatus", "Planned"),
    *("RunDifference", "Status", "StudyResult", "Summary", "Verified"),
}
"""Records that functions give, so that examples do not name them."""


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run examples in, where little is timed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("bitalloy.search.front"), "FRONT_BUDGETS", 4)  # no page shows a front
    monkeypatch.setattr(importlib.import_module("bitalloy.verify.beside_float"), "REPEATS", 2)
    cost: Any = importlib.import_module("bitalloy.measure.cost")
    monkeypatch.setitem(cost.measure_cost.__kwdefaults__, "effort", EFFORTS["quick"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_examples_run(page: str, block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, page, "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out.strip()
    for name in re.findall(r'save\("(.+?)"\)', block):
        onnx.checker.check_model(tmp_path / name)


@pytest.fixture(scope="module")
def hooks() -> Any:
    """What makes pages of the code."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_public_names_are_in_the_reference_and_most_have_an_example(hooks: Any) -> None:
    text = "\n".join(hooks.names())
    assert [name for name in bitalloy.__all__ if f"## {name}\n" not in text] == []
    named = hooks.examples().keys() - {""}
    assert named <= set(bitalloy.__all__) and len(named) >= 0.8 * len(bitalloy.__all__)
    assert {name for name, code in hooks.examples().items() if name and f"bitalloy.{name}" not in code} == GIVEN


@pytest.mark.usefixtures("quick")
def test_examples_of_the_reference_run_one_after_the_other(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = {"__name__": "docs"}
    done: set[str] = set()
    for name, code in hooks.examples().items():
        if code not in done:
            exec(compile(code, f"example of {name}", "exec"), namespace)
            assert capsys.readouterr().out.strip() or not re.search(r"print\(", code), name
            done.add(code)


def test_commands_have_the_options_that_exist() -> None:
    root = typer.main.get_command(app)
    commands = root.commands  # type: ignore[attr-defined]
    options = {name for c in (root, *commands.values()) for p in c.params for name in (*p.opts, *p.secondary_opts)}
    pages = "\n".join(page.read_text() for page in PAGES)
    text = "\n".join(line for line in pages.splitlines() if not OTHERS.search(line))
    assert set(re.findall(r"(?<!-)--[a-z][a-z-]+", text)) <= options
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))
    assert set(re.findall(r"bitalloy ([a-z]+) (?:[A-Za-z]|--)", code)) <= set(commands)


def test_site_builds_strictly_with_what_the_code_says(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    glossary = (tmp_path / "site" / "concepts" / "index.html").read_text()
    assert "The choice of a scheme for every unit." in glossary
    assert "--max-drop" in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "quantize" in (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
