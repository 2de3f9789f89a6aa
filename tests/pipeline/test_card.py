"""Model cards: front matter that hubs read, and the numbers of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.test_check import stored
from tests.report.conftest import make_run

from bitalloy.pipeline.card import model_card


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes: plain keys, quoted strings and lists of them."""
    found: dict[str, Any] = {}
    for line in card.split("---\n")[1].splitlines():
        if line.startswith("- "):
            found[list(found)[-1]].append(json.loads(line[2:]))
            continue
        key, value = re.fullmatch(r"([a-z_]+):(?: (.*))?", line).groups()  # type: ignore[union-attr]
        found[key] = [] if value is None else json.loads(value) if value.startswith('"') else value
    return found


def rows(card: str) -> dict[str, list[str]]:
    """First cell of each line of each table -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line[:2] == "| "]
    return {line[0].strip(): [cell.replace("\\", "") for cell in line[1:]] for line in lines}


def test_a_card_has_the_numbers_of_the_run(tmp_path: Path) -> None:
    run = make_run(blocks=2)
    card = model_card(stored(tmp_path, "run", run), base_model="owner/name")
    head = front_matter(card)
    assert head["base_model"] == "owner/name" and head["base_model_relation"] == "quantized"
    assert "onnx" in head["tags"] and head["metrics"] == list(run.summary.metrics)
    told, summary = rows(card), run.summary
    metric = summary.metrics["AP50-95"]
    assert told["AP50-95"][0] == str(metric.reference.n)
    assert told["AP50-95"][2].startswith(f"{metric.mixed.value:.4f} [")
    assert metric.drop_mixed is not None and f"{metric.drop_mixed.low:.4f}" in told["AP50-95"][3].replace("−", "-")
    assert told["float model, SHA-256"] == [f"`{summary.model_sha256}`"]
    assert f"{summary.latency_ratio:.3f}" in told["latency over float"][1]
    assert "Status: **met**" in card and "onnxruntime.InferenceSession" in card


def test_names_of_a_foreign_model_stay_text(tmp_path: Path) -> None:
    name = 'a\n---\nevil: "1" <script>|[x](http://y)*'
    card = model_card(stored(tmp_path, "run", model=name, notes=("<b>\n# head",)))
    assert front_matter(card)["base_model"] == name
    body = card.split("---\n", 2)[2]
    assert not [mark for mark in ("<script>", "<b>", "\n# head", "[x](") if mark in body]


def test_the_card_lies_in_the_run_directory_or_where_asked(tmp_path: Path, inside: Any) -> None:
    run = stored(tmp_path, "run")
    inside("card", run).succeeded()
    assert (run / "README.md").read_text() == model_card(run)
    inside("card", run, "--out", "cards/card.md", "--base-model", "owner/name").succeeded()
    assert 'base_model: "owner/name"' in (inside.folder / "cards" / "card.md").read_text()
    assert "no finished run" in inside("card", tmp_path).refused()
    (tmp_path / "file").touch()
    assert "cannot be written" in inside("card", run, "--out", tmp_path / "file" / "card.md").refused()


@pytest.mark.parametrize("target", ["openvino-cpu", "tensorrt", "ort-cuda"])
def test_it_is_loaded_by_the_runtime_of_its_target(tmp_path: Path, target: str) -> None:
    code = model_card(stored(tmp_path, "run", target=target)).split("```")[1]
    assert {"openvino-cpu": "openvino.Core", "tensorrt": "trtexec", "ort-cuda": "onnxruntime"}[target] in code


def test_front_matter_is_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    name = 'é: "x" \x7f\x85 \U0001f600'
    head = yaml.safe_load(model_card(stored(tmp_path, "run", model=name)).split("---\n")[1])
    assert head["base_model"] == name and head["base_model_relation"] == "quantized"
