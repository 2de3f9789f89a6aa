"""Runs of models whose weights must not enter a message: the sizes at which that begins are lowered here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.model import load as graph
from bitalloy.model import weights

SIDE = 192


def network(path: Path) -> None:
    """Four products with weights of 147 kB each, with SiLU between."""
    rng = np.random.default_rng(0)
    nodes, constants, last = [], [], "x"
    for i in range(4):
        weight = (rng.standard_normal((SIDE, SIDE)) * SIDE**-0.5).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"], name=f"/layer{i}/MatMul"))
        nodes.append(helper.make_node("Sigmoid", [f"m{i}"], [f"s{i}"], name=f"/layer{i}/Sigmoid"))
        last = "y" if i == 3 else f"y{i}"
        nodes.append(helper.make_node("Mul", [f"m{i}", f"s{i}"], [last], name=f"/layer{i}/Mul"))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, SIDE]) for n in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants),
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (weights, graph):
        monkeypatch.setattr(module, "LARGE_BYTES", 1)
    monkeypatch.setattr(weights, "MESSAGE_BYTES", 1 << 17)


def test_a_large_model_runs_end_to_end(inside: Any, lowered: None) -> None:
    network(inside.folder / "model.onnx")
    feeds = inside.folder / "feeds"
    feeds.mkdir()
    for i in range(8):
        np.savez(feeds / f"{i}.npz", x=np.random.default_rng(i).standard_normal((4, SIDE)).astype(np.float32))
    inside.run("model.onnx", "--data", "feeds", "--size", "0.7x", "--schemes", "int8").succeeded()
    mixed = inside.folder / "run" / "mixed.onnx"
    assert (inside.folder / "run" / "mixed.onnx.data").is_file() and mixed.stat().st_size < 1 << 17
    summary = inside.summary()
    files = mixed.stat().st_size + mixed.with_name("mixed.onnx.data").stat().st_size
    assert summary["size_bytes"]["mixed"] == pytest.approx(files, rel=0.02)  # weights lie at whole pages
    assert not list((inside.folder / "run" / "cache").glob("scratch-*"))
    sample = np.load(feeds / "7.npz")["x"]
    exact, found = (
        ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, {"x": sample})[0]
        for p in (inside.folder / "model.onnx", mixed)
    )
    noise = np.square(found - exact).sum()
    assert 0 < noise < np.square(exact).sum() * 10 ** (-summary["sqnr_db"]["y"]["mixed"]["measured"] / 10 + 0.5)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "ort-cuda"])
def test_a_program_with_a_large_graph(inside: Any, promptable: Path, drawn: Path, lowered: None, target: str) -> None:
    inside.run(promptable, "--data", drawn / "images", "--size", "0.75x", "--target", target).succeeded()
    assert {"mixed/encoder.onnx", "mixed/decoder.onnx", "mixed/program.json"} <= inside.files()
    assert inside.summary()["sqnr_db"]["low_res_masks"]["mixed"]["measured"] > 15
