"""Peak memory: of a process of known allocation, of models whose weights are known, and where it is unknown."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bitalloy.measure.memory import ResidentMemory, resident_memory
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY, Runtime
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.runtime.ort import ORT
from bitalloy.runtime.steps import once

MB = 1e6
ALLOCATED = """
import {module} as measured
{before}
first = measured.peak_bytes()
held = bytearray(b"x") * 150_000_000
del held
print(first, measured.peak_bytes())
"""


def grown(before: str = "") -> tuple[int, int]:
    """What a process says of itself before and behind an allocation of 150 MB that is freed again."""
    code = ALLOCATED.format(module="bitalloy.runtime.resident", before=before)
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, peak = map(int, made.stdout.split())
    return first, peak


def test_the_peak_holds_what_was_allocated_and_freed() -> None:
    first, peak = grown()
    assert 140 * MB < peak - first < 160 * MB and first > 2 * MB


def test_systems_without_proc_tell_it_too() -> None:
    pytest.importorskip("resource")
    first, peak = grown("measured.Path = lambda name: __import__('pathlib').Path('/nowhere') / name")
    assert first > 2 * MB and peak - first > 130 * MB


def product(folder: Path, rows: int) -> Path:
    """A file with one MatMul whose weight takes 4000 bytes a row."""
    weight = numpy_helper.from_array(np.ones((rows, 1000), np.float32), "w")
    entry, result = (helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, rows]), ("y", [1, 1000])))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [entry], [result], [weight])
    path = folder / f"{rows}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("runtime", [ORT, OPENVINO], ids=lambda r: r.library)
def test_a_model_takes_its_weights_and_little_else(runtime: Runtime, tmp_path: Path) -> None:
    pytest.importorskip(runtime.library)
    found = []
    for rows in (10, 20_000):
        artefact = Artefact({ONLY: product(tmp_path, rows)}, runtime=runtime)
        found.append(resident_memory(artefact, [once({"x": np.ones((1, rows), np.float32)})], tmp_path))
    small, large = found
    assert small.process_mb == pytest.approx(large.process_mb, abs=3)
    assert small.process_mb and small.peak_mb and large.peak_mb
    assert small.process_mb < small.peak_mb < small.process_mb + 80
    assert 80 < large.peak_mb - small.peak_mb < 3 * 80  # the file's content and the runtime's own copy


def test_what_cannot_be_measured_is_unknown(tmp_path: Path) -> None:
    unknown = ResidentMemory(peak_mb=None, process_mb=None)
    path, feeds = product(tmp_path, 10), {"x": np.ones((1, 10), np.float32)}
    elsewhere = Artefact({ONLY: path}, runtime=replace(ORT, library=""))
    assert resident_memory(elsewhere, [once(feeds)], tmp_path) == unknown
    broken = Artefact({ONLY: tmp_path / "absent.onnx"})
    assert resident_memory(broken, [once(feeds)], tmp_path) == unknown
    assert resident_memory(Artefact({ONLY: path}), [once({"x": np.ones((1, 11), np.float32)})], tmp_path) == unknown
