"""The GitHub Action: what its script does with the variables that `action.yml` sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bitalloy.cli.console import MISSED

ROOT = Path(__file__).parents[2]


def test_every_input_reaches_the_script() -> None:
    text, script = (ROOT / "action.yml").read_text(), (ROOT / "action.sh").read_text()
    inputs = set(re.findall(r"^  ([a-z-]+):$", text.split("runs:")[0], re.MULTILINE))
    passed = dict(re.findall(r"^ +([A-Z_]+): \$\{\{ inputs\.([a-z-]+) \}\}$", text, re.MULTILINE))
    assert set(passed.values()) == inputs
    used = set(re.findall(r"[A-Z_]{3,}", script))
    assert set(passed) - used == {"EXTRAS"}  # for the installation
    example = (ROOT / "docs/workflow.yml").read_text()
    assert set(re.findall(r"^          ([a-z-]+): ", example.split("bitalloy@main")[1], re.MULTILINE)) - {"name"} <= (
        inputs | {"path"}
    )


@pytest.mark.parametrize(("latency", "code"), [("50x", 0), ("0.01x", MISSED)])
def test_a_run_is_made_and_checked(inputs: Any, tmp_path: Path, latency: str, code: int) -> None:
    known = {"MODEL": str(inputs.classifier), "DATA": str(inputs.images), "OUT": str(tmp_path / "a run")}
    known |= {"OPTIONS": "--effort quick --size 0.6x", "MAX_LATENCY": latency, "EVAL": "", "BASELINE": ""}
    known |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GITHUB_ACTIONS": "true"}
    known["GITHUB_STEP_SUMMARY"] = str(tmp_path / "summary.md")
    found = subprocess.run(
        ["bash", str(ROOT / "action.sh")], env={**os.environ, **known}, capture_output=True, text=True, check=False
    )
    assert found.returncode == code, found.stderr
    failures = ElementTree.parse(tmp_path / "a run/check.xml").getroot().iter("failure")
    assert bool(list(failures)) == bool(code) == ("::error" in found.stderr)
    assert (tmp_path / "summary.md").read_text()
