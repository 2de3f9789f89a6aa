"""The script for a machine with a GPU, tried on the processor: its parts measure, or say why they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitalloy.runtime.ort import cuda_missing

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu/measure.py"


def run(folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "gpu.json"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out), *options], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_models_of_plans_are_timed_beside_float_and_compared_with_it(tmp_path: Path) -> None:
    options = ("--provider", "CPUExecutionProvider", "--models", "mobilevlm-shapes", "--parts", "onnxruntime")
    found = run(tmp_path, *options)
    assert found["provider"] == "CPUExecutionProvider" and "onnxruntime" in found["machine"]["versions"]
    rows = found["parts"]["onnxruntime"]["mobilevlm-shapes"]
    assert set(rows) == {"float", "fp16", "w4", "mixed"} and rows["float"]["over_float"] == [1.0, 1.0, 1.0]
    assert all(row["ms"] > 0 for row in rows.values())
    assert rows["fp16"]["sqnr_db"]["logits"] > rows["w4"]["sqnr_db"]["logits"] > 20
    assert set(rows["mixed"]["units"]) == {"fp16", "w4"}


@pytest.mark.skipif(not cuda_missing(), reason="there is a GPU")
def test_without_a_gpu_every_part_says_what_is_missing(tmp_path: Path) -> None:
    parts = run(tmp_path, "--parts", "onnxruntime", "probe", "tensorrt")["parts"]
    assert "onnxruntime-gpu" in parts["onnxruntime"]["skipped"] and "onnxruntime-gpu" in parts["probe"]["skipped"]
    assert "tensorrt" in parts["tensorrt"]["skipped"]
