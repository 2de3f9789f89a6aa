"""Predictions and exact measurements rest on samples that the ranges were not fitted to, and include their clipping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bitalloy
from bitalloy.data.datasets import ArrayDataset
from bitalloy.data.parts import WantedSamples, draw_parts

COUNT = 40
WANTED = WantedSamples(calibration=16, probe=4, verification=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions that give what they get: what rounding its input does is what the output shows."""
    weight = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    graph = helper.make_graph(
        [helper.make_node("Conv", [a, "w"], [b], name=f"/{b}/Conv") for a, b in ("xh", "hy")],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path_factory.mktemp("same") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def growing() -> ArrayDataset:
    """Samples each of which is larger than all before it."""
    rng = np.random.default_rng(0)
    return ArrayDataset([{"x": (1.1**i * rng.standard_normal((1, 3, 8, 8))).astype(np.float32)} for i in range(COUNT)])


def largest_in_probe(data: ArrayDataset) -> int:
    """A seed whose draw has larger samples for probing than for calibration."""
    for seed in range(100):
        subset, parts = draw_parts(data, WANTED, seed=seed)
        most = [max(int(subset.name(i)) for i in part) for part in (parts.calibration, parts.probe)]
        if most[1] >= most[0] + 3:
            return seed
    raise AssertionError("no such draw")


def test_clipping_of_unseen_values_is_predicted_and_measured(model: Path) -> None:
    data = growing()
    settings = bitalloy.Settings(
        calibration_samples=16, samples=4, probes=128, seed=largest_in_probe(data), range_method="minmax",
        equalize=False, bias_correction=False,
    )  # fmt: skip
    analysis = bitalloy.analyze(bitalloy.load(model), data, settings)
    assert analysis.parts.disjoint
    low, high = analysis.ranges["x"]
    seen = [analysis.data.feeds(i)["x"] for i in analysis.parts.calibration]
    assert low == pytest.approx(min(s.min() for s in seen)) and high == pytest.approx(max(s.max() for s in seen))

    scale = (high - low) / 255
    zero, energy, error, inside = round(-low / scale), 0.0, 0.0, 0.0
    for index in analysis.parts.probe:
        x = analysis.data.feeds(index)["x"].astype(np.float64)
        rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
        energy, error = energy + np.square(x).sum(), error + np.square(rounded - x).sum()
        inside += np.square(np.where((x > low) & (x < high), rounded - x, 0)).sum()
    expected = 10 * np.log10(energy / error)
    assert expected < 10 * np.log10(energy / inside) - 10, "clipping is most of the error"

    predicted = {r.id: r.sqnr_db.value for r in analysis.table.rows if r.scope == "site" and r.head == "y"}
    (site,) = (name for name in predicted if name.startswith("x->"))
    assert predicted[site] == pytest.approx(expected, abs=0.5)
    exact = bitalloy.measure_exact(analysis, bitalloy.Selection(sites=(site,)), samples=4)
    assert exact.rows[0].sqnr_db.value == pytest.approx(expected, abs=0.05)
