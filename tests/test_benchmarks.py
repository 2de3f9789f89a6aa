"""Records of benchmarks: complete, with commands that exist, and what `benchmarks/run.py` makes of them."""

from __future__ import annotations

import ast
import datetime
import re
import shlex
import string
from pathlib import Path

import msgspec
import pytest
import typer

import run
from bench_records import (
    GOAL,
    TOPICS,
    VARIABLES,
    BenchFigure,
    BenchMachine,
    BenchmarkRecord,
    page,
    read_record,
    record_names,
)
from bitalloy.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
NAMES = record_names()


def record(command: str | None, *figures: BenchFigure) -> BenchmarkRecord:
    """A record of a measurement long ago."""
    machine = BenchMachine(processor=None, vnni=None, threads=None, busy=None)
    return BenchmarkRecord(
        title="A benchmark",
        topic=TOPICS[0],
        command=command,
        commit=None,
        date=None,
        machine=machine,
        versions={},
        quick=False,
        stale="The code has changed.",
        note="",
        figures=figures,
    )


@pytest.mark.parametrize("name", NAMES)
def test_records_are_complete(name: str) -> None:
    found = read_record(name)
    assert found.title and found.topic in TOPICS and found.figures
    assert found.commit is None or re.fullmatch(r"[0-9a-f]{7,12}( with changes)?", found.commit)
    assert found.date is None or datetime.date.fromisoformat(found.date) >= datetime.date(2026, 11, 23)
    assert len({figure.figure for figure in found.figures}) == len(found.figures)
    for figure in found.figures:
        assert not figure.goal or GOAL.fullmatch(figure.goal)
        assert not figure.goal.startswith("within") or figure.predicted is not None
        assert figure.interval is None or figure.interval[0] <= figure.interval[1]
        assert set(figure.paths) <= {"value", "predicted", "low", "high"}
    assert found.repeatable or not any(figure.paths for figure in found.figures)
    assert found.repeatable or not found.quick


def options_of(words: list[str]) -> set[str]:
    """All options of the program that a command starts."""
    if words[0] == "bitalloy":
        command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
        return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert words[0] == "python"
    place = ROOT / (words[2].replace(".", "/") if words[1] == "-m" else words[1])
    script = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    return added(script) | {o for path in script.parent.glob("*.py") if imports(script, path) for o in added(path)}


def added(script: Path) -> set[str]:
    """Names that a script gives to `add_argument`."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    names = [c.args for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"]
    return {str(name.value) for each in names for name in each if isinstance(name, ast.Constant)}


def imports(script: Path, beside: Path) -> bool:
    """Whether a script imports another one of its folder."""
    return bool(re.search(rf"^(from|import) {beside.stem}\b", script.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", [name for name in NAMES if read_record(name).command])
def test_commands_exist_with_their_options(name: str) -> None:
    command = read_record(name).command
    assert command is not None
    assert set(string.Template(command).get_identifiers()) <= set(VARIABLES)
    words = shlex.split(command)
    assert {word for word in words if word.startswith("--")} <= options_of(words)


def test_a_run_writes_what_the_command_printed() -> None:
    figures = (
        BenchFigure(figure="seed", value=0, paths={"value": ("seed",)}),
        BenchFigure(
            figure="sites", value=0, predicted=0, goal="within 1", paths={"value": ("sites",), "predicted": ("sites",)}
        ),
        BenchFigure(figure="nothing", value=1, paths={"value": ("no", "such")}),
        BenchFigure(figure="time", value=0, paths={"value": ("WALL_SECONDS",)}),
    )
    found = run.repeated(record("python benchmarks/search_time.py --units 20 --seed 7", *figures))
    seed, sites, nothing, seconds = found.figures
    assert seed.value == 7 and nothing.value is None
    assert isinstance(sites.value, int) and sites.value > 20 and sites.predicted == sites.value and sites.met
    assert isinstance(seconds.value, float) and seconds.value > 0.1
    assert found.stale == "" and found.versions["onnxruntime"] and found.machine.processor
    assert found.date == datetime.datetime.now(datetime.UTC).date().isoformat()


def test_json_at_the_end_is_read() -> None:
    assert run.last_json('{"a": 1}\nsaid {\n{"b": [1,\n 2]}\n') == {"b": [1, 2]}
    with pytest.raises(ValueError, match="no JSON"):
        run.last_json("done\n")


@pytest.mark.parametrize(
    ("goal", "value", "predicted", "met"),
    [
        (">= 0.98", 0.98, None, True),
        (">= 0.98", 0.97, None, False),
        ("<= -1", -2, None, True),
        ("0.9 to 0.99", 0.95, None, True),
        ("0.9 to 0.99", 1.0, None, False),
        ("within 3", 10.0, 13.5, False),
        ("within 3", 10.0, 12.5, True),
        ("", 10.0, None, None),
        ("<= 1", None, None, None),
    ],
)
def test_goals(goal: str, value: float | None, predicted: float | None, met: bool | None) -> None:
    assert BenchFigure(figure="x", value=value, goal=goal, predicted=predicted).met is met


def test_the_page_shows_every_record_and_what_is_missed() -> None:
    text = "\n".join(page())
    for name in NAMES:
        found = read_record(name)
        assert f"### {found.title} {{ #{name} }}" in text and (found.command or "No script was kept") in text
    missed = [figure for name in NAMES for figure in read_record(name).figures if figure.met is False]
    assert len(missed) > 10 and text.count("**missed**") == len(missed)
    assert text.count("**Stale:**") == sum(bool(read_record(name).stale) for name in NAMES)


def test_unknown_and_missing_fields_are_refused() -> None:
    data = msgspec.to_builtins(record("python benchmarks/startup.py", BenchFigure(figure="x", value=1)))
    assert msgspec.convert(data, BenchmarkRecord).title == "A benchmark"
    for spoiled in ({**data, "more": 1}, {k: v for k, v in data.items() if k != "commit"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(spoiled, BenchmarkRecord)


def test_readme_shows_the_record_of_its_commit() -> None:
    readme = (ROOT / "README.md").read_text()
    found = read_record("plans-vs-peers")
    assert found.commit is not None and found.date is not None and found.commit in readme and found.date in readme
    shown = re.findall(r"\| ([\d.]{6}) \| ([\d.]{5})x \| (\d+) s \|", readme)
    values = {figure.figure: figure.value for figure in found.figures}
    models = [name.removesuffix(": made in") for name in values if name.endswith(": made in")]
    stored = {tuple(values[f"{model}: {kind}"] for kind in ("AP50-95", "over float", "made in")) for model in models}
    assert len(shown) == len(stored) == 6
    assert {(float(ap), float(ratio), int(seconds)) for ap, ratio, seconds in shown} == {
        (ap, ratio, round(float(str(seconds)))) for ap, ratio, seconds in stored
    }
