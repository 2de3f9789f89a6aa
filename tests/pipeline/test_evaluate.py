"""Model files side by side on labels of a task: what each gives alone, paired with the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bitalloy


@pytest.fixture
def other(inputs: Any, tmp_path: Path) -> Path:
    """The detector with some of its weights a little off."""
    proto, rng = onnx.load(inputs.detector), np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim == 4:
            noisy = value + 0.2 * value.std() * rng.standard_normal(value.shape)
            tensor.CopyFrom(numpy_helper.from_array(noisy.astype(np.float32), tensor.name))
    onnx.save(proto, tmp_path / "other.onnx")
    return tmp_path / "other.onnx"


def test_models_beside_each_other_give_what_each_gives_alone(inputs: Any, other: Path) -> None:
    names = [str(inputs.detector), str(other)]
    (both,) = bitalloy.evaluate(names, inputs.labels)
    assert all(list(metric.values) == names and list(metric.drops) == names[1:] for metric in both.metrics)
    labelled = [metric for metric in both.metrics if not metric.against_float]
    assert labelled
    for name in names:
        (alone,) = bitalloy.evaluate([name], [inputs.labels])
        values = {metric.name: metric.values[name].value for metric in alone.metrics}
        assert {metric.name: metric.values[name].value for metric in labelled} == {
            metric.name: values[metric.name] for metric in labelled
        }


def test_what_does_not_belong_together_is_refused(inputs: Any) -> None:
    with pytest.raises(bitalloy.DataError, match="each once"):
        bitalloy.evaluate([inputs.detector, inputs.detector], inputs.labels)
    with pytest.raises(bitalloy.DataError, match="No task metric fits"):
        bitalloy.evaluate([inputs.detector, inputs.classifier], inputs.labels)
    with pytest.raises(bitalloy.DataError, match="nothing to evaluate on"):
        bitalloy.evaluate([inputs.detector], None)
    with pytest.raises(bitalloy.DataError, match="Compare alike"):
        bitalloy.evaluate([inputs.detector, inputs.classifier], lambda session: 1.0)


def test_the_command_line_shows_each_beside_the_first(inside: Any, inputs: Any, other: Path) -> None:
    done = inside("evaluate", inputs.detector, other, "--eval", inputs.labels, "--limit", 4, "--json").succeeded()
    (result,) = json.loads(done.out)
    assert {metric["values"][str(other)]["n"] for metric in result["metrics"]} <= {4, 8}
    shown = inside("evaluate", inputs.detector, other, "--eval", inputs.labels, "--limit", 4).succeeded().out
    assert "within noise" in shown or "beyond noise" in shown
    assert "Give one of them" in inside("evaluate", other, "--eval", inputs.labels, "--metric", "math:sqrt").refused()
