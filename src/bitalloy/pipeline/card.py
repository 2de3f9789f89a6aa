"""A model card of a finished run: Markdown with front matter, as model hubs read it, from the run's files alone."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.outcome import Summary
from bitalloy.core.plans import PlanReport
from bitalloy.core.records import Estimate, MetricValue
from bitalloy.pipeline.check import finished_summary
from bitalloy.report.formats import byte_size, decibel_text, interval_text, milliseconds
from bitalloy.report.text import counted, limit_text, verdict_text
from bitalloy.search.planning import PLAN_FILE, read_record
from bitalloy.verify.provenance import plan_hash

CARD = "README.md"
"""Name of a card in a run directory, which hubs look for."""
LOADING = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("mixed.onnx")
outputs = session.run(None, {"NAME_OF_INPUT": array})""",
    "openvino": """import openvino

model = openvino.Core().compile_model("mixed.onnx", "CPU")
outputs = model({"NAME_OF_INPUT": array})""",
    "tensorrt": """trtexec --onnx=mixed.onnx --saveEngine=mixed.engine --stronglyTyped""",
}
"""Beginning of a target's name -> how its files are loaded; the first for all others."""


def model_card(run: str | Path, *, base_model: str = "") -> str:
    """Write the model card of a finished run.

    Args:
        run: directory of a finished run.
        base_model: what the model is called where it was published, such as `owner/name` on a hub; by default the name
            of its file.

    Returns:
        The card as Markdown: front matter in YAML with `base_model_relation: quantized`, then metrics with intervals,
        limits, data, how to load it, and where it comes from.

    Raises:
        RunDirectoryError: the directory holds no finished run.
    """
    folder = Path(run)
    summary, plan = finished_summary(folder), read_record(folder / PLAN_FILE, PlanReport)
    parts = [
        _front_matter(summary, base_model or summary.model),
        f"# {_text(summary.model)}, mixed precision for {_text(summary.target)}",
        _text(summary.headline),
        f"{counted(summary.schemes)} of {summary.units} units of the network; the others stay in float.",
        "## Measured",
        _speed(summary),
        _damage(summary),
        *([_metrics(summary)] if summary.metrics else []),
        "## Limits",
        _limits(summary),
        "## How to load it",
        _loading(summary, folder),
        "## Data",
        _data(summary),
        "## What to know",
        *[f"- {_text(note)}" for note in (*summary.status.warnings, *summary.notes)],
        "## Where it comes from",
        _origin(summary, plan),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(run: str | Path, *, out: str | Path | None = None, base_model: str = "") -> Path:
    """Write the model card of a finished run into a file, by default into the run directory, and return its path.

    Raises:
        RunDirectoryError: the directory holds no finished run, or the file cannot be written.
    """
    text = model_card(run, base_model=base_model)
    path = Path(out) if out is not None else Path(run) / CARD
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"'{path}' cannot be written: {error.strerror}. Give another --out.") from error
    return path


def _front_matter(summary: Summary, base_model: str) -> str:
    tags = ["onnx", "quantization", "mixed-precision", "bitalloy", *summary.schemes]
    lines = [
        "library_name: onnx",
        f"base_model: {_yaml(base_model)}",
        "base_model_relation: quantized",
        "tags:",
        *(f"- {_yaml(tag)}" for tag in tags),
    ]
    if summary.metrics:
        lines += ["metrics:", *(f"- {_yaml(name)}" for name in summary.metrics)]
    return "---\n" + "\n".join(lines) + "\n---"


def _speed(summary: Summary) -> str:
    latency, ratio = summary.latency_ms, summary.latency_ratio_interval
    ends = f" {interval_text(ratio, 3)}" if ratio is not None else ""
    how = "estimated for" if summary.latency_estimated else "measured on"
    told = f"Latency is {how} {summary.device}, {summary.threads} threads: {_text(summary.workload)}."
    rows = [
        ("latency", milliseconds(latency.reference), milliseconds(latency.mixed)),
        ("latency over float", "1", f"{summary.latency_ratio:.3f}{ends}"),
        ("size", byte_size(summary.size_bytes.reference), byte_size(summary.size_bytes.mixed)),
    ]
    return _table(("", "float", "mixed"), rows) + f"\n\n{told} Brackets are 95 % intervals."


def _damage(summary: Summary) -> str:
    rows = []
    for head, pair in summary.sqnr_db.items():
        found = summary.sqnr_interval_db.get(head)
        ends = f" {interval_text(found, 1)}" if found is not None else ""
        predicted = "" if pair.mixed.predicted is None else decibel_text(pair.mixed.predicted)
        rows.append((head, predicted, decibel_text(pair.mixed.measured) + ends))
    return _table(("output", "SQNR against float, predicted", "measured"), rows)


def _metrics(summary: Summary) -> str:
    rows = []
    for name, one in summary.metrics.items():
        drop = f"{one.lost:.4f}" if one.drop_mixed is None else _with_ends(one.drop_mixed, one.drop_mixed.value)
        values = (_with_ends(v, v.value) if v.n else f"{v.value:.4f}" for v in (one.reference, one.mixed))
        rows.append((name, str(one.reference.n or ""), *values, drop))
    return _table(("metric", "samples", "float", "mixed", "drop"), rows)


def _limits(summary: Summary) -> str:
    limits = [f"- {verdict_text(one)}: {_text(limit_text(one))}" for one in summary.status.limits]
    return "\n".join([f"Status: **{summary.status.verdict}**.", "", *limits]) if limits else "No limits were set."


def _loading(summary: Summary, folder: Path) -> str:
    program = (folder / "mixed").is_dir()
    code = next((text for name, text in LOADING.items() if summary.target.startswith(name)), LOADING["onnx"])
    told = (
        "The model is several ONNX graphs in the folder `mixed/`; its `program.json` tells how they are wired. Each is "
        "loaded as a file of its own, such as:"
        if program
        else "The file has the inputs and outputs of the float model."
    )
    language = "" if summary.target.startswith("tensorrt") else "python"
    return f"{told}\n\n```{language}\n{code}\n```"


def _data(summary: Summary) -> str:
    rows = [
        (use, one.name, str(one.count), one.preprocessing, f"`{one.sha256[:16]}`")
        for use, one in (("calibration", summary.calibration), ("analysis", summary.analysis))
    ]
    return _table(("use", "data", "samples", "preparation", "SHA-256"), rows)


def _origin(summary: Summary, plan: PlanReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    rows = [
        ("float model, SHA-256", f"`{summary.model_sha256}`"),
        ("plan, SHA-256", f"`{plan_hash(plan.chosen)}`"),
        ("seed", str(summary.seed)),
        ("versions", versions),
    ]
    return _table(("", ""), rows)


def _with_ends(found: Estimate | MetricValue, value: float) -> str:
    return f"{value:.4f} {interval_text(found, 4)}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(value: str) -> str:
    """Write text from a model or its data so that it stays text in Markdown: no markup, one line."""
    plain = html.escape(" ".join(str(value).split()), quote=False)
    for mark in "\\|[]*":
        plain = plain.replace(mark, f"\\{mark}")
    return plain


def _yaml(value: str) -> str:
    """Write text as a quoted string of YAML.

    >>> print(_yaml("a: b"))
    "a: b"
    """
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
