"""The public Python interface: its names, what importing it costs, and that its examples run."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import typer

import bitalloy
from bitalloy.cli.main import app

ROOT = Path(__file__).parents[1]
NAMES = [
    # stages
    "load", "open_data", "analyze", "confirm", "calibrate", "measure_exact", "measure_metric", "measure_cost",
    "resolve_drops", "plan", "plan_again", "apply", "verify", "report", "publish", "run", "quantize",
    "study", "read_study",
    # what comes out of finished runs
    "check", "diff", "write_report", "evaluate",
    # what they take and give
    "Analysis", "Budget", "Calibrated", "CheckedRun", "Keep", "LimitStatus", "Metric", "OwnSession", "Planned", "Plan",
    "RunDifference", "RunDirectory", "RunOptions", "Selection", "Settings", "Status", "StudyResult", "Summary",
    "Verified", "Workload", "Workspace",
    # errors
    "BitalloyError", "BudgetError", "DataError", "MissingExtraError", "ModelError", "RunDirectoryError",
    "UnreachableError", "UnsupportedOpError",
]  # fmt: skip


def test_public_names_are_these() -> None:
    assert bitalloy.__all__ == NAMES


def test_every_public_name_exists_and_is_documented() -> None:
    for name in bitalloy.__all__:
        assert getattr(bitalloy, name).__doc__, name


def test_errors_have_one_root() -> None:
    errors = [getattr(bitalloy, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, bitalloy.BitalloyError) for error in errors)


def test_version_is_that_of_the_distribution() -> None:
    assert bitalloy.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Top-level packages that are loaded after an import, by what was imported."""
    code = "import json, sys, {}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    found = {}
    for module in ("bitalloy", "bitalloy.cli"):
        shown = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        found[module] = json.loads(shown.stdout)
    return found


@pytest.mark.parametrize(
    "package",
    ["torch", "openvino", "tensorrt", "matplotlib", "pandas", "cv2", "ray", "ultralytics", "selenium", "pytest"],
)
def test_import_is_light(imported: dict[str, list[str]], package: str) -> None:
    """None of these is needed to start, even where it is installed."""
    for found in imported.values():
        assert package not in found


def test_everything_that_is_imported_is_declared() -> None:
    """The core and the extras hold what they need: no package is found by the luck of another one's needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    declared = {re.split("[<>=~! \\[]", d)[0].lower().replace("-", "_") for d in required}
    used: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            used |= {name.partition(".")[0] for name in names}
    belong = {
        "PIL": "pillow",
        "cpuinfo": "py_cpuinfo",
        "google": "onnx",
        "markupsafe": "jinja2",
        "mlflow": "mlflow_skinny",
    }
    assert {belong.get(n, n) for n in used - set(sys.stdlib_module_names) - {"bitalloy"}} <= declared


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_own_model_data_and_metric_take_twelve_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    (block,) = readme_blocks()
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 512), torch.nn.ReLU(), torch.nn.Linear(512, 4))
    x = torch.rand(96, 32)
    pairs = torch.utils.data.TensorDataset(x, net(x).argmax(1))
    train, val = (
        torch.utils.data.DataLoader(torch.utils.data.Subset(pairs, indices), batch_size=20)
        for indices in (range(48), range(48, 96))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on import of its exporter
        exec(
            compile(block, "README.md", "exec"),
            {"__name__": "readme", "net": net, "train_loader": train, "val_loader": val, "image": x[:1]},
        )
    assert "of accuracy" in capsys.readouterr().out
    given, mixed = x[48:].numpy(), onnxruntime.InferenceSession(tmp_path / "mixed.onnx")
    (name,) = (entry.name for entry in mixed.get_inputs())
    found = np.concatenate([mixed.run(None, {name: row[None]})[0] for row in given])
    assert (found.argmax(1) == net(x[48:]).argmax(1).numpy()).mean() >= 0.95


def test_python_page_shows_the_example_of_the_readme() -> None:
    (block,) = readme_blocks()
    assert f"```py\n{block}```" in (ROOT / "docs/how-to/python.md").read_text()


def test_readme_commands_have_the_options_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    root = typer.main.get_command(app)
    commands = (root, *root.commands.values())  # type: ignore[attr-defined]
    options = {name for c in commands for p in c.params for name in (*p.opts, *p.secondary_opts)}
    assert len(options) > 30
    assert set(re.findall(r"(?<!-)--[a-z][a-z-]+", text)) <= options


def test_documents_do_not_name_this_machine() -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "NOTICE", "Makefile", ".ci/run"):
        assert not re.search(r"/(root|home|work|tmp)/", (ROOT / name).read_text()), name


def test_links_in_documents_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
        assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []


def test_files_named_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [p for p in re.findall(r"`((?:src|tests|benchmarks)/[\w./]+)`", text)]
    assert len(paths) > 8 and [p for p in paths if not (ROOT / p).exists()] == []
