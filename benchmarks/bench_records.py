"""Records of measured figures: what was measured, when, on which machine, from which commit, and how to repeat it.

`benchmarks/results/NAME.json` holds one `BenchmarkRecord`. `benchmarks/run.py` makes them anew, and the page of
benchmarks in the documents is made of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

RESULTS = Path(__file__).parent / "results"

TOPICS = (
    "Whole runs",
    "Beside other tools",
    "Predictions",
    "Search and costs",
    "Formats and corrections",
    "Large models and growth",
    "Coverage and robustness",
)
"""Sections of the page, in its order."""

VARIABLES = {
    "DATA": "folder with `models/yolo11n.onnx`, `coco128-calib/images` and `coco-val-94`",
    "OUT": "empty folder for what is written",
    "PEERS": "Python interpreter of an environment with the tools that are compared with",
    "MODELS": "folder of the models that the script, or the note of the record, names",
    "CASES": "folder of small models, each a folder with `model.onnx`, `feeds` and `fresh`",
}
"""What commands leave to the machine -> what it must be."""

GOAL = re.compile(r"(>=|<=|within|(?P<low>[\d.]+) to) (-?[\d.]+)")


class BenchMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine of a measurement. What was not written down is `None`."""

    processor: str | None
    vnni: bool | None
    """Whether the processor has instructions for sums of INT8 products, such as AVX512 VNNI."""
    threads: int | None
    busy: bool | None
    """Whether other work ran at the same time: then ratios of times mean something, and seconds little."""


class BenchFigure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One measured number."""

    figure: str
    """What was measured, with its unit unless `unit` names it."""
    value: float | int | bool | str | None
    """The number; a text where several belong together, e.g. "16 / 12"; `None` where there is none."""
    unit: str = ""
    goal: str = ""
    """">= X", "<= X", "X to Y", or "within X" of what was predicted. Empty where there is none."""
    interval: tuple[float, float] | None = None
    """95 % interval of the value."""
    predicted: float | None = None
    paths: dict[str, tuple[str | int, ...]] = {}
    """`value`, `predicted`, `low` or `high` -> keys and positions that lead to it in what the command prints as JSON.

    `WALL_SECONDS` as the only key is how long the command took.
    """

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; `None` where there is no goal or no number."""
        found = GOAL.fullmatch(self.goal)
        if found is None or isinstance(self.value, str) or self.value is None:
            return None
        sign, limit = found[1], float(found[3])
        if found["low"]:
            return float(found["low"]) <= self.value <= limit
        if sign == "within":
            return None if self.predicted is None else abs(self.value - self.predicted) <= limit
        return self.value >= limit if sign == ">=" else self.value <= limit


class BenchmarkRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a benchmark. Every field stands in the file; what was not written down is `None`."""

    title: str
    topic: str
    """One of `TOPICS`."""
    command: str | None
    """What repeats it, in the repository; `$DATA`, `$OUT` ... are those of `VARIABLES`. `None`: no script was kept."""
    commit: str | None
    date: str | None
    """Day of the measurement, e.g. "2026-11-28"."""
    machine: BenchMachine
    versions: dict[str, str]
    """Versions of what decides the numbers; empty where none was written down."""
    quick: bool
    """Whether `make bench` repeats it."""
    stale: str
    """Why the figures no longer describe the code, where that is known; else empty."""
    note: str
    figures: tuple[BenchFigure, ...]

    @property
    def repeatable(self) -> bool:
        """Whether `benchmarks/run.py` can read all figures from what the command prints."""
        return self.command is not None and all("value" in figure.paths for figure in self.figures)


def read_record(name: str) -> BenchmarkRecord:
    """Read the record of a name.

    Raises:
        msgspec.ValidationError: A field is missing, unknown or of another type.
    """
    return msgspec.json.decode((RESULTS / f"{name}.json").read_bytes(), type=BenchmarkRecord)


def write_record(name: str, record: BenchmarkRecord) -> Path:
    """Write the record of a name, and return its file."""
    path = RESULTS / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return path


def record_names() -> list[str]:
    """Names of all records, in alphabetical order."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def page() -> Iterable[str]:
    """The records as lines of Markdown: an overview, then a section for each topic."""
    records = {name: read_record(name) for name in record_names()}
    yield "| benchmark | date | commit | machine | goals met | |\n|---|---|---|---|---|---|"
    for topic in TOPICS:
        for name, record in records.items():
            if record.topic == topic:
                verdicts = [figure.met for figure in record.figures if figure.met is not None]
                goals = f"{sum(verdicts)} of {len(verdicts)}" if verdicts else ""
                marks = [*["stale"] * bool(record.stale), *["`make bench`"] * record.quick]
                cells = (_known(record.date), _commit(record), _machine(record.machine), goals, ", ".join(marks))
                yield f"| [{record.title}](#{name}) | " + " | ".join(cells) + " |"
    for topic in TOPICS:
        yield f"\n## {topic}\n"
        for name, record in records.items():
            if record.topic == topic:
                yield from _section(name, record)


def _section(name: str, record: BenchmarkRecord) -> Iterable[str]:
    yield f"### {record.title} {{ #{name} }}\n"
    yield f"```text\n{record.command or 'No script was kept that repeats it.'}\n```\n"
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    yield (
        f"{_known(record.date)}, commit {_commit(record)}, {_machine(record.machine)}; "
        f"{versions or 'versions not recorded'}. {record.note}\n"
    )
    if record.stale:
        yield f"**Stale:** {record.stale}\n"
    predicted = any(figure.predicted is not None for figure in record.figures)
    goals = any(figure.goal for figure in record.figures)
    heads = ["figure", *["goal"] * goals, *["predicted"] * predicted, "measured", *[""] * goals]
    yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    for figure in record.figures:
        cells = [figure.figure.replace("|", "\\|")]
        cells += [figure.goal] * goals
        cells += ["" if figure.predicted is None else _number(figure.predicted, figure.unit)] * predicted
        spread = "" if figure.interval is None else " ({:g} to {:g})".format(*figure.interval)
        cells += [_number(figure.value, figure.unit) + spread]
        cells += [{True: "met", False: "**missed**", None: ""}[figure.met]] * goals
        yield f"| {' | '.join(cells)} |"
    yield ""


def _number(value: float | str | bool | None, unit: str) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    places = max(0, 4 - math.floor(math.log10(abs(value)))) if 0 < abs(value) < 1 else 4
    shown = f"{value:,}" if isinstance(value, int) else f"{round(value, places):g}"
    return f"{shown} {unit}".strip()


def _known(text: str | None) -> str:
    return text or "not recorded"


def _commit(record: BenchmarkRecord) -> str:
    return f"`{record.commit}`" if record.commit else "not recorded"


def _machine(machine: BenchMachine) -> str:
    vnni = {True: " with VNNI", False: " without VNNI", None: ""}[machine.vnni]
    parts = [f"{machine.processor or 'machine not recorded'}{vnni}"]
    parts += [] if machine.threads is None else [f"{machine.threads} cores"]
    parts += [] if machine.busy is None else ["busy" if machine.busy else "quiet"]
    return ", ".join(parts)
