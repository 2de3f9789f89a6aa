"""Kinds of models that once came out wrong, rounded as a whole and executed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import bitalloy
from bitalloy.targets.placement import rounded

LEAST_DB = 30.0
ONE_AXIS = """<ir_version: 9, opset_import: ["" : 17]> net (float[64] x) => (float[32] y) {
    a = MatMul(x, w1)  b = Add(a, b1)  c = Relu(b)  y = MatMul(c, w2) }"""
CROPPED = """<ir_version: 8, opset_import: ["" : 13]> net (float[1,3,8,8] x) => (float[1,4,10,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1)
    r = Resize<mode="nearest", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=50.0>(
        a, roi, , size)
    y = Conv<pads=[1,1,1,1]>(r, w2) }"""


def saved(folder: Path, text: str) -> Path:
    random = np.random.default_rng(0)
    shapes = {"w1": (64, 128), "b1": (128,), "w2": (128, 32)} if "MatMul" in text else {
        "w1": (8, 3, 3, 3), "w2": (4, 8, 3, 3)
    }  # fmt: skip
    constants = {
        name: (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }
    if "Resize" in text:
        constants |= {"roi": np.array([0, 0, -0.3, -0.3, 1, 1, 1.3, 1.3], np.float32), "size": np.array([1, 8, 10, 10])}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize(("text", "shape"), [(ONE_AXIS, (64,)), (CROPPED, (1, 3, 8, 8))], ids=["one axis", "cropped"])
def test_all_that_can_be_rounded_is_close(tmp_path: Path, text: str, shape: tuple[int, ...], target: str) -> None:
    path = saved(tmp_path, text)
    graph = bitalloy.load(path)
    samples = list(np.random.default_rng(1).normal(size=(16, *shape)).astype(np.float32))
    data = bitalloy.open_data(graph, samples)
    settings = bitalloy.Settings(samples=8, probes=1, calibration_samples=16, targets=(target,))
    ready = bitalloy.calibrate(graph, data, settings)
    lowest = ready.units.lowest()
    assert rounded(ready.units, lowest)
    ready.artefact(lowest).save(tmp_path / "rounded.onnx")
    first, second = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (path, tmp_path / "rounded.onnx")
    )
    signal = noise = 0.0
    for x in samples:
        exact, found = (session.run(None, {"x": x})[0].astype(np.float64) for session in (first, second))
        signal, noise = signal + np.square(exact).sum(), noise + np.square(exact - found).sum()
    assert 10 * np.log10(signal / noise) >= LEAST_DB
