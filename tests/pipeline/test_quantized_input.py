"""A quantized file through the whole path: what it loses, and where; and a repaired model that keeps its scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from typer.testing import CliRunner

import bitalloy
from bitalloy.cli.main import app
from bitalloy.core.outcome import Summary
from bitalloy.core.records import SensitivityTable

SAMPLES = [np.random.default_rng(i).uniform(0, 1, (1, 4, 24, 24)).astype(np.float32) for i in range(24)]


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._left = iter({"x": x} for x in SAMPLES[:4])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def float_model() -> onnx.ModelProto:
    """Depthwise layers, whose kernels take all integers, and one channel that is far larger than all others."""
    r = np.random.default_rng(0)
    weights = {
        "w1": r.normal(size=(4, 1, 3, 3)) * 0.3,
        "w2": r.normal(size=(4, 1, 3, 3)) * 0.3,
        "w3": r.normal(size=(4, 1, 3, 3)) * 0.3,
        "gain": np.array([1, 1, 1, 400]).reshape(1, 4, 1, 1),
        "loss": np.array([1, 1, 1, 1 / 400]).reshape(1, 4, 1, 1),
    }

    def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs.split(), [output], name=f"{output}_node", **attributes)

    nodes = [
        node("Conv", "x w1", "c1", pads=[1] * 4, group=4),
        node("Mul", "c1 gain", "m1"),
        node("Conv", "m1 w2", "c2", pads=[1] * 4, group=4),
        node("Mul", "c2 loss", "m2"),
        node("Conv", "m2 w3", "y", pads=[1] * 4, group=4),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 24, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 24, 24])],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    onnx.save(float_model(), path / "float.onnx")
    quantize_static(
        path / "float.onnx",
        path / "given.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
    )
    (path / "feeds").mkdir()
    for i, x in enumerate(SAMPLES):
        np.savez(path / "feeds" / f"{i:02d}.npz", x=x)
    return path


@pytest.fixture(scope="module")
def repaired(folder: Path) -> Summary:
    return bitalloy.run(
        folder / "given.onnx",
        data=folder / "feeds",
        out=folder / "run",
        budget=bitalloy.Budget(min_sqnr_db=30),
        settings=bitalloy.Settings(samples=4, probes=8),
    ).summary


def outputs(path: Path, count: int) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.stack([session.run(None, {"x": x})[0] for x in SAMPLES[:count]]).astype(np.float64)


def grids(path: Path) -> dict[str, tuple[float, int]]:
    """Tensor -> scale and zero point of its QuantizeLinear."""
    model = onnx.load(path)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    rounded = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    return {n.input[0]: (float(constants[n.input[1]]), int(constants[n.input[2]])) for n in rounded}


def test_where_the_file_loses_is_told(folder: Path, repaired: Summary) -> None:
    given = repaired.given
    assert given is not None
    exact, found = outputs(folder / "float.onnx", 24), outputs(folder / "given.onnx", 24)
    sqnr = 10 * np.log10(np.mean(exact**2) / np.mean((found - exact) ** 2))
    assert given.measured_db is not None
    assert given.measured_db["y"].value == pytest.approx(sqnr, abs=2)
    assert given.predicted_db["y"] == pytest.approx(sqnr, abs=2)
    assert given.worst[0].tensor in ("m1", "c2")  # the tensors that one scale cannot hold
    assert given.worst[0].share > 0.4
    assert sum(r.share for r in given.worst) == pytest.approx(1, abs=0.01)
    assert [r.sqnr_db for r in given.worst] == sorted(r.sqnr_db for r in given.worst)
    assert any("rounds" in note and given.worst[0].tensor in note for note in repaired.notes)
    assert "Where the given file loses its accuracy" in (folder / "run" / "report.html").read_text("utf-8")


def test_the_table_of_sensitivities_has_the_roundings_of_the_file(folder: Path, repaired: Summary) -> None:
    command = ["sensitivity", str(folder / "given.onnx"), "--data", str(folder / "feeds"), "--out", str(folder / "run")]
    runner, few = CliRunner(), ["--samples", "4", "--probes", "8"]
    found = msgspec.json.decode(runner.invoke(app, [*command, *few, "--json"]).stdout, type=SensitivityTable)
    assert repaired.given is not None and found.given == repaired.given.worst
    shown = runner.invoke(app, [*command, *few]).stdout
    assert "share of damage" in shown and f"{found.given[0].sqnr_db:.1f}" in shown


def test_the_repaired_model_is_better_than_the_file(folder: Path, repaired: Summary) -> None:
    exact = outputs(folder / "float.onnx", 24)
    error = {n: np.mean((outputs(folder / n, 24) - exact) ** 2) for n in ("given.onnx", "run/mixed.onnx")}
    assert 10 * np.log10(np.mean(exact**2) / error["run/mixed.onnx"]) > 28
    assert error["run/mixed.onnx"] < error["given.onnx"]
    assert repaired.sqnr_db["y"].mixed.measured is not None


def test_scales_of_the_file_are_kept(folder: Path) -> None:
    """All units in INT8, as the file has them: on their tensors are its own grids, in its weights its own numbers."""
    verified = bitalloy.run(
        folder / "given.onnx",
        data=folder / "feeds",
        out=folder / "all",
        budget=bitalloy.Budget(keep=(bitalloy.Keep(scheme="int8", pattern="*"),)),
        settings=bitalloy.Settings(samples=4, probes=8, bias_correction=False),
    )
    assert verified.summary.schemes.get("int8", 0) >= 2
    before, after = grids(folder / "given.onnx"), grids(folder / "all" / "mixed.onnx")
    common = before.keys() & after.keys()
    assert len(common) >= 3
    for tensor in common:
        assert after[tensor][0] == pytest.approx(before[tensor][0], rel=1e-5)
        assert after[tensor][1] == before[tensor][1]
    stored = {
        path: {
            numpy_helper.to_array(t).tobytes()
            for t in onnx.load(folder / path).graph.initializer
            if t.data_type == TensorProto.INT8 and len(t.dims) == 4
        }
        for path in ("given.onnx", "all/mixed.onnx")
    }
    assert stored["all/mixed.onnx"]
    assert stored["all/mixed.onnx"] <= stored["given.onnx"]


def detector() -> onnx.ModelProto:
    """Boxes in pixels and small scores in one output, as detectors give them."""
    r = np.random.default_rng(3)
    weights = {
        "w1": r.normal(size=(8, 4, 3, 3)) * 0.2,
        "w2": r.normal(size=(4, 8, 1, 1)) * 0.3,
        "w3": r.normal(size=(3, 8, 1, 1)) * 0.5,
        "b3": np.full(3, -5.0),
        "pixels": np.full((), 600.0),
        "four": np.array([1, 4, 576]),
        "three": np.array([1, 3, 576]),
    }

    def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs.split(), [output], name=f"{output}_node", **attributes)

    nodes = [
        node("Conv", "x w1", "c1", pads=[1] * 4),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2"),
        node("Mul", "c2 pixels", "m2"),
        node("Reshape", "m2 four", "boxes"),
        node("Conv", "r1 w3 b3", "c3"),
        node("Reshape", "c3 three", "logits"),
        node("Sigmoid", "logits", "scores"),
        node("Concat", "boxes scores", "output0", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 24, 24])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 7, 576])],
        [
            numpy_helper.from_array(np.asarray(v, np.int64 if k in ("four", "three") else np.float32), k)
            for k, v in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_one_scale_for_boxes_and_scores_is_named(folder: Path) -> None:
    """What rounds behind the place where a head is taken has no gradient to it, and collapses the scores."""
    onnx.save(detector(), folder / "detector.onnx")
    quantize_static(
        folder / "detector.onnx",
        folder / "collapsed.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    summary = bitalloy.run(
        folder / "collapsed.onnx",
        data=folder / "feeds",
        out=folder / "detector",
        budget=bitalloy.Budget(min_sqnr_db=10),
        settings=bitalloy.Settings(samples=4, probes=8),
    ).summary
    given = summary.given
    assert given is not None and given.written_db is not None
    assert given.written_db["scores"].value < 1
    assert given.predicted_db["scores"] == pytest.approx(given.written_db["scores"].value, abs=1)
    assert given.worst[0].head == "scores" and given.worst[0].executed and given.worst[0].share > 0.3
    exact, found = (outputs(folder / n, 24)[:, 0, 4:] for n in ("detector.onnx", "detector/mixed.onnx"))
    assert 10 * np.log10(np.mean(exact**2) / np.mean((found - exact) ** 2)) > 8
