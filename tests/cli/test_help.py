"""Help of all commands: options in groups, nothing cut at 80 columns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bitalloy.cli.commands import OTHERS, PANELS
from bitalloy.cli.main import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_has_a_group_of_its_own(name: str) -> None:
    grouped = [param for names in PANELS.values() for param in names.split()]
    assert len(grouped) == len(set(grouped))
    assert {str(param.name) for param in COMMANDS[name].params} <= set(grouped)


@pytest.mark.parametrize("name", COMMANDS)
def test_names_of_options_are_whole_at_80_columns(name: str) -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, [name, "--help"]).output
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    own = {option for param in COMMANDS[name].params for option in param.opts if option.startswith("--")}
    whole = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w-])", shown))
    assert own <= whole
    assert not re.search(r"--[a-z-]*-$", shown, re.MULTILINE)  # broken at a hyphen


def test_the_groups_of_run_are_in_their_order() -> None:
    shown = CliRunner().invoke(app, ["run", "--help"]).output
    headings = re.findall(r"^([A-Z][a-z ]+):$", shown, re.MULTILINE)
    assert headings == [panel for panel in (*PANELS, OTHERS) if panel != "Selection"]


def test_a_wrapped_example_can_be_typed() -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["run", "--help"]).output
    start = shown.index("    bitalloy run model.onnx --data feeds/")
    assert re.match(r" {4}bitalloy run model\.onnx .*[^ ] \\\n {8}--max-drop", shown[start:])


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_an_option_for_a_list_is_refused_where_it_is_given_twice(inside: Any, inputs: Any) -> None:
    """Of other options the last one holds, as a script appends to a line of its own."""
    told = inside("run", inputs.classifier, "--target", "ort-cpu", "--target=tensorrt").refused()
    assert "--target is given 2 times. Give all in one: --target a,b." in " ".join(told.split())
    told = inside("run", inputs.classifier, "--latency", "0.5x", "--latency", "fast").refused()
    assert "'fast'" in told
