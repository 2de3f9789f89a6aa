"""Options that stand in a file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from bitalloy.cli.config import keys_of
from bitalloy.cli.main import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def printed(inside: Any, *words: object) -> dict[str, Any]:
    section: dict[str, Any] = tomllib.loads(inside("run", *words, "--print-config").succeeded().out)["run"]
    return section


def test_what_is_typed_comes_before_the_file_and_that_before_defaults(inside: Any) -> None:
    (inside.folder / "bitalloy.toml").write_text(
        '[run]\nlatency = "0.6x"\nseed = 7\nequalize = false\nmax-drop-db = ["boxes=30", 12]\neffort = "quick"\n'
    )
    found = printed(inside, "model.onnx", "--seed", 9, "--max-drop-db", 20)
    assert (found["latency"], found["seed"], found["equalize"]) == ("0.6x", 9, False)
    assert found["max-drop-db"] == ["20"]  # a list takes the place of the other
    assert found["effort"] == "quick" and "probes" not in found
    assert (found["model"], found["out"], found["calibration-samples"]) == ("model.onnx", "runs/last", 64)
    assert printed(inside)["max-drop-db"] == ["boxes=30", "12"]


def test_the_file_may_be_named(inside: Any) -> None:
    (inside.folder / "bitalloy.toml").write_text("[run]\nseed = 1\n")
    (inside.folder / "other.toml").write_text("[run]\nseed = 2\n")
    assert printed(inside)["seed"] == 1
    assert printed(inside, "--config", "other.toml")["seed"] == 2
    assert "nothing.toml" in inside("run", "--config", "nothing.toml").err


def test_what_is_printed_gives_the_same_again(inside: Any, inputs: Any) -> None:
    odd = 'a "quoted" \\ name\x7f é'
    words = (
        "model.onnx",
        "--data",
        odd,
        "--keep",
        "fp32:'neck*'",
        "--keep",
        "int8:*",
        "--no-protect",
        "--confidence",
        0.9,
    )
    first = inside("run", *words, "--print-config").succeeded().out
    (inside.folder / "bitalloy.toml").write_text(first)
    assert inside("run", "--print-config").succeeded().out == first
    assert tomllib.loads(first)["run"]["data"] == odd


def test_a_run_takes_its_options_from_the_file(inside: Any, inputs: Any) -> None:
    sections = f"[plan]\nfront = true\n[run]\nmodel = {str(inputs.classifier)!r}\ndata = {str(inputs.images)!r}\n"
    (inside.folder / "bitalloy.toml").write_text(
        sections + 'samples = 4\nprobes = 4\ncalibration-samples = 8\neffort = "quick"\nout = "mine"\nsize = "0.6x"\n'
    )
    inside("run").succeeded()
    summary = inside.summary("mine")
    assert (summary["samples"], summary["probes"], summary["calibration"]["count"]) == (4, 4, 8)
    assert "optimality gap" in " ".join(inside("plan", "mine").succeeded().out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_of_every_command_is_a_key(name: str) -> None:
    keys = keys_of(COMMANDS[name])
    assert {param.name for param in keys.values()} == {p.name for p in COMMANDS[name].params} - {
        "config",
        "print_config",
    }
    assert all("_" not in key and not key.startswith("-") for key in keys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[runn]\n", "Did you mean 'run'?"),
        ("latency = 1\n", "sections are commands"),
        ("run = 1\n", "expected a section"),
        ("[run]\nlatencies = 1\n", "Did you mean 'latency'?"),
        ("[plan]\nlatencies = 1\n", "Did you mean 'latency'?"),
        ("[run]\nlatency = true\n", "expected text or a number"),
        ('[run]\nlatency = ["0.7x"]\n', "expected text or a number"),
        ("[run]\nkeep = [{a = 1}]\n", "or a list of them"),
        ("[run]\nequalize = 1\n", "expected true or false"),
        ("[run]\nlatency = 0.7\n", "--latency is '0.7'"),
        ("[run\n", "cannot be read as TOML"),
        ("[run]\nmetric = 'os:abort'\n", "by which code is executed"),
        ("[run]\npreprocess = 'os:abort'\n", "by which code is executed"),
        ("[run]\ntrust-checkpoint = true\n", "by which code is executed"),
        ("[run]\nout = 'x'\nseed = 'much'\n", "--seed"),
    ],
)
def test_a_mistake_in_the_file_is_refused(inside: Any, text: str, told: str) -> None:
    (inside.folder / "bitalloy.toml").write_text(text)
    done = inside("run")
    assert done.code == 2 and not done.out and told in " ".join(done.err.split())


def test_bytes_that_are_no_text_are_refused(inside: Any) -> None:
    (inside.folder / "bitalloy.toml").write_bytes(b"[run]\nout = '\xff'\n")
    assert "cannot be read as TOML" in inside("run").refused()


def test_code_is_taken_from_a_file_that_is_named(inside: Any) -> None:
    (inside.folder / "bitalloy.toml").write_text("[run]\nmetric = 'math:sqrt'\ndata = 'x'\n")
    assert printed(inside, "--config", "bitalloy.toml")["metric"] == "math:sqrt"
    assert not Path(inside.folder / "runs").exists()
