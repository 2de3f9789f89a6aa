"""The tutorial notebook: its cells are executed in their order in one namespace, without a Jupyter kernel.

What a notebook would show of the last expression of a cell is made too, so that no display fails unseen.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
NEEDS_PANDAS = "to_pandas()"


def code_cells() -> list[str]:
    cells = json.loads(TUTORIAL.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def has_pandas() -> bool:
    try:
        import pandas  # noqa: F401
    except ImportError:
        return False
    return True


def executed(code: str, names: dict[str, Any]) -> str:
    """Execute a cell; what a notebook shows of its last expression, or nothing."""
    tree = ast.parse(code)
    *before, last = tree.body
    if not isinstance(last, ast.Expr):
        exec(compile(tree, str(TUTORIAL), "exec"), names)
        return ""
    exec(compile(ast.Module(before, []), str(TUTORIAL), "exec"), names)
    value = eval(compile(ast.Expression(last.value), str(TUTORIAL), "eval"), names)
    shown: str = value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)
    return shown


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "tutorial"}
    shown = [executed(code, names) for code in code_cells() if has_pandas() or NEEDS_PANDAS not in code]
    together = "\n".join(shown)
    assert "Pareto front" in together and "<iframe" in together and "agrees" in together
    assert (tmp_path / "mixed.onnx").is_file() and (tmp_path / "tutorial-run" / "report.html").is_file()


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(TUTORIAL.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
