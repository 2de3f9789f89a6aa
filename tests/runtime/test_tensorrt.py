"""TensorRT where it is; where it is not, a reason and no crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.targets.conftest import rewrite

from bitalloy.core.errors import BitalloyError, ModelError
from bitalloy.measure.tracing import TracedModel
from bitalloy.rewrite.cast import as_specified
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.ort import OrtSession
from bitalloy.runtime.tensorrt import INSTALL, Layer, TensorRtSession, missing, read_layers

ABSENT = missing()
ENGINE = {
    "Layers": [
        {
            "Name": "c1 + s1 * a1",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x/quantized", "Location": "Device", "Format/Datatype": "Int8 NC/32HW32"}],
            "Outputs": [{"Name": "a1", "Location": "Device", "Format/Datatype": "Half NC/8HW8"}],
            "Metadata": "[ONNX Layer: c1]\u001e[ONNX Layer: s1]\u001e[ONNX Layer: a1]",
        }
    ],
    "Bindings": ["x", "y"],
}
"""In the form of the engine inspector's documentation."""


@pytest.mark.skipif(not ABSENT, reason="TensorRT is here")
def test_absence_is_a_message_with_a_way_out(tmp_path: Path) -> None:
    model = rewrite("tensorrt", "case1-conv", tmp_path, None).model
    with pytest.raises(BitalloyError, match="cannot run on TensorRT here") as error:
        TensorRtSession(model)
    assert INSTALL in str(error.value) or "GPU" in str(error.value)
    script = Path(__file__).parents[2] / "benchmarks" / "tensorrt_latency.py"
    done = subprocess.run([sys.executable, script, "a.onnx", "b.onnx"], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and json.loads(done.stdout)["skipped"] == ABSENT


def test_core_does_not_import_it() -> None:
    code = "import sys, bitalloy, bitalloy.pipeline, bitalloy.targets; sys.exit('tensorrt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layers_of_an_engine_are_read() -> None:
    origin = "[ONNX Layer: c1]\x1e[ONNX Layer: s1]\x1e[ONNX Layer: a1]"
    expected = Layer("c1 + s1 * a1", "CaskConvolution", ("Int8 NC/32HW32",), ("Half NC/8HW8",), origin)
    assert read_layers(json.dumps(ENGINE)) == (expected,)
    for damaged in ("", "[]", '{"Layers": ["c1"]}', '{"Layers": [{"Name": "c1"}]}'):
        with pytest.raises(ModelError, match="detailed profiling"):
            read_layers(damaged)


@pytest.mark.parametrize(
    ("tensor", "precision"),
    [
        ("Int8 NC/32HW32", "int8"),
        ("Row major Int8 format", "int8"),
        ("Half NC/8HW8", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Int32", ""),
    ],
)
def test_layers_are_kernels_with_the_units_of_all_their_nodes(tensor: str, precision: str) -> None:
    layer = Layer(
        "u2~4 + u2~5", "CaskConvolution", (tensor, "Float"), ("Float",), "[ONNX Layer: u2~4]\x1e[ONNX Layer: u0~7]"
    )
    kernel = layer.kernel((3.0,))
    assert (kernel.op, kernel.precision, kernel.us) == ("CaskConvolution", precision, (3.0,))
    assert TracedModel(Artefact({}), ("a", "b", "c"), {}, {}).units_in(kernel) == ("c", "a")


@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
def test_engine_agrees_with_the_specification(tmp_path: Path) -> None:
    case = rewrite("tensorrt", "case6-half-beside-int8", tmp_path, None)
    model, feeds = case.model, case.feeds
    session = TensorRtSession(model, cache=tmp_path / "times", profile=tmp_path / "profile")
    found, expected = session.run(feeds)["y"], OrtSession(as_specified(model)).run(feeds)["y"]
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()
    assert any("Int8" in kind for layer in session.layers() for kind in layer.inputs)
    assert sum(sum(k.us) for k in session.kernels()) > 0 and len(session.milliseconds(5)) == 5
    session.close()
