"""The pipeline measures a task that it does not know by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bitalloy
from bitalloy.core.errors import DataError
from bitalloy.runtime.ort import OrtSession
from bitalloy.tasks import semantic
from bitalloy.tasks.base import Interface


def segmenter(folder: Path) -> Path:
    """64x64 -> 9 classes on 16x16: two strided convolutions and a classifier, random."""
    rng = np.random.default_rng(0)
    weights, nodes, last = [], [], "pixel_values"
    for i, (outside, inside, kernel, stride) in enumerate([(16, 3, 3, 2), (16, 16, 3, 2), (9, 16, 1, 1)]):
        scale = np.sqrt(2 / (inside * kernel * kernel))
        weight = rng.normal(0, scale, (outside, inside, kernel, kernel)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        pads = [kernel // 2] * 4
        name = "logits" if i == 2 else f"c{i}"
        nodes.append(
            helper.make_node("Conv", [last, f"w{i}"], [name], name=f"/conv{i}", strides=[stride] * 2, pads=pads)
        )
        last = name
        if i < 2:
            nodes.append(helper.make_node("Relu", [name], [f"r{i}"], name=f"/relu{i}"))
            last = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "segmenter",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 9, 16, 16])],
        weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, folder / "segmenter.onnx")
    return folder / "segmenter.onnx"


def test_a_segmenter_is_measured_with_a_folder_of_label_maps(shapes: Path, tmp_path: Path) -> None:
    path = segmenter(tmp_path)
    model = bitalloy.load(path)
    data = bitalloy.open_data(model, shapes / "images")
    settings = bitalloy.Settings(samples=4, probes=2, calibration_samples=6)
    analysis = bitalloy.analyze(model, data, settings)
    planned = bitalloy.plan(analysis, bitalloy.Budget(min_sqnr_db=5))
    verified = bitalloy.verify(analysis, planned, labels=shapes)
    metrics = verified.summary.metrics
    assert set(metrics) == {"mIoU", "pixel accuracy", "pixel agreement"}

    interface = Interface(inputs=model.info.inputs, outputs=model.info.outputs)
    opened = semantic.SEMANTIC.open(shapes, interface)
    models = {"float": OrtSession(path).run, "mixed": verified.mixed.session().run}
    alone = {metric.name: metric for metric in semantic.SEMANTIC.evaluate(models, opened).metrics}
    for name, metric in metrics.items():
        assert metric.reference == alone[name].values["float"] and metric.mixed == alone[name].values["mixed"]
        assert metric.drop_mixed == alone[name].drops["mixed"] and metric.reference.n == 6
    assert "Protocol: squash." in verified.summary.notes
    assert metrics["pixel agreement"].reference.value == 1
    assert metrics["pixel agreement"].lowest.value > 0.8

    with pytest.raises(DataError, match="is no folder"):
        bitalloy.verify(analysis, planned, labels=shapes / "instances.json")
