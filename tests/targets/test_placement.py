"""Rewritten models of every case: valid, and the numbers of the float model, rounded. What GPU targets add to that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tests.cnn import int8
from tests.definition import asymmetric, eight_bit_float, float8_per_channel, limit_of, per_channel, root, symmetric

from bitalloy.core.errors import BitalloyError
from bitalloy.model.heads import find_heads
from bitalloy.model.read import attribute, constant
from bitalloy.model.weights import to_bytes
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.cast import as_specified
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.ort import AS_WRITTEN, OrtSession
from bitalloy.targets.base import split
from bitalloy.targets.ort_cuda import ORT_CUDA
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe

Rewrite = Callable[[str, str], Any]


def test_rewritten_model_is_valid_and_close_to_float(rewrite: Rewrite, name: str, case: str) -> None:
    """Shape and type inference of ONNX agrees with the graph."""
    made = rewrite(name, case)
    proto = onnx.load_model_from_string(to_bytes(made.model))
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    assert made.plan
    exact = OrtSession(made.graph.model).run(made.feeds)["y"]
    found = Artefact({ONLY: as_specified(made.model)}, runtime=AS_WRITTEN).session().run(made.feeds)["y"]
    assert found.dtype == np.float32
    noise = np.square(found - exact).sum() / np.square(exact).sum()
    assert 1e-9 < noise < 2e-2


def test_a_relu_before_fp8_is_executed(rewrite: Rewrite) -> None:
    """ONNX Runtime 1.32 drops it by default, as if 0 were the smallest number; measurements must not."""
    made = rewrite("tensorrt", "case7-fp8")
    written = OrtSession(made.model, optimize=False).run(made.feeds)["y"]
    measured = Artefact({ONLY: made.model}, runtime=AS_WRITTEN).session().run(made.feeds)["y"]
    np.testing.assert_allclose(measured, written, atol=1e-3 * np.abs(written).max())


def test_scales_are_those_of_the_definitions(rewrite: Rewrite, name: str, case: str) -> None:
    """Each from the range of its tensor; where that has none, from the range before operators that move data."""
    made = rewrite(name, case)
    original = onnx.load_model_from_string(made.graph.to_bytes())
    integers = symmetric if name.startswith("tensorrt") else asymmetric
    for node in (n for n in made.model.graph if n.op_type == "QuantizeLinear"):
        value, maker = node.inputs[0], node.inputs[0].producer()
        while maker is not None and maker.op_type == "Cast":
            value, maker = maker.inputs[0], maker.inputs[0].producer()
        name = str(value.name)
        grid = eight_bit_float if array_of(node.inputs[2]).dtype == ml_dtypes.float8_e4m3fn else integers
        expected = grid(*made.ranges[name if name in made.ranges else root(original, name)])
        for parameter, stored in ((expected.scale, node.inputs[1]), (expected.zero, node.inputs[2])):
            np.testing.assert_array_equal(array_of(stored), parameter, strict=True)


def test_weights_are_those_of_the_definitions(rewrite: Rewrite, name: str, case: str) -> None:
    """Of the operators that have a rounded weight, each channel from its largest weight, or from its largest pair."""
    made = rewrite(name, case)
    for node in made.model.graph:
        stored = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if stored is None or stored.op_type != "DequantizeLinear" or constant(stored.inputs[0]) is None:
            continue
        if "block_size" in stored.attributes:
            continue  # blocks: tests/rewrite/test_kernels.py
        weight = array_of(made.graph.node[str(node.name)].inputs[1])
        products = {"MatMul": weight.ndim - 1, "Gemm": 0 if attribute(node, "transB", 0) else 1, "ConvTranspose": 1}
        axis = products.get(node.op_type, 0)
        limit = limit_of(ir.serde.serialize_node(node), weight, made.units.scheme("int8").pair_limit)
        found = [array_of(value) for value in stored.inputs]
        if found[1].ndim == 0:
            continue  # stored as tensors are: the next test
        eight = found[0].dtype == ml_dtypes.float8_e4m3fn
        expected = float8_per_channel(weight, axis) if eight else per_channel(weight, axis, limit)
        assert attribute(stored, "axis", 1) == axis
        for value, parameter in zip(found, (expected.integers(weight), expected.scale, expected.zero), strict=True):
            np.testing.assert_array_equal(value, parameter, strict=True)


def test_constants_without_channels_are_stored_as_tensors_are(rewrite: Rewrite) -> None:
    made, seen = rewrite("ort-cpu", "case2-constants"), set()
    for node in (n for n in made.model.graph if n.op_type == "MatMul"):
        for slot, value in enumerate(node.inputs):
            stored = value.producer() if value is not None else None
            if stored is None or stored.op_type != "DequantizeLinear" or constant(stored.inputs[0]) is None:
                continue
            weight = array_of(made.graph.node[str(node.name)].inputs[slot])
            expected = asymmetric(float(weight.min()), float(weight.max()))
            found = [array_of(v) for v in stored.inputs]
            for one, parameter in zip(found, (expected.integers(weight), expected.scale, expected.zero), strict=True):
                np.testing.assert_array_equal(one, parameter, strict=True)
            seen.add((slot, weight.ndim))
    assert seen == {(0, 2), (1, 3), (0, 3)}


def test_constants_without_channels_run_in_integer_kernels(rewrite: Rewrite, tmp_path: Path) -> None:
    """Whatever ONNX Runtime makes of the model, its numbers are those of the operators one by one."""
    made = rewrite("ort-cpu", "case2-constants")
    path = tmp_path / "optimized.onnx"
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path)
    session = ort.InferenceSession(to_bytes(made.model), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert [k for k in kinds if "MatMul" in k] == ["QLinearMatMul", "QLinearMatMul", "MatMulIntegerToFloat"]
    for factor in (1.0, 50.0):  # far outside of all ranges as well: products of uint8 never saturate
        feeds = {"x": made.feeds["x"] * np.float32(factor)}
        written = OrtSession(made.model, optimize=False).run(feeds)["y"]
        np.testing.assert_allclose(session.run(["y"], feeds)[0], written, rtol=1e-5, atol=1e-6)


def array_of(value: ir.Value | None) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array


@pytest.mark.parametrize("case", ["case1-conv", "case1-transposed-gemm", "case2-residual"])
def test_int8_of_tensorrt_is_symmetric_and_biases_stay_float(rewrite: Rewrite, case: str) -> None:
    proto = onnx.load_model_from_string(to_bytes(rewrite("tensorrt", case).model))
    values = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    rounding = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert rounding
    for node in rounding:
        zero = values[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    assert not any(v.dtype == np.int32 for v in values.values())


def test_cuda_has_no_int8(rewrite: Rewrite) -> None:
    graph = rewrite("ort-cuda", "case1-half").graph
    units = split(graph, ORT_CUDA, find_heads(graph))
    assert not units.able("int8") and not units.lowest_gated()
    with pytest.raises(BitalloyError, match=r"'/a/Conv' in INT8.*no INT8 kernels"):
        write_plan(graph, Recipe(units, ORT_CUDA, {}), int8(["/a/Conv"]))


def test_residual_operand_that_fuses_is_the_later_one(rewrite: Rewrite) -> None:
    """Of Conv -> Conv -> Add the second Conv runs with the Add; the other operand carries the pair."""
    units = rewrite("tensorrt", "case2-residual").units
    add = next(u for u in units.units if u.kind == "Add")
    assert "int8" in add.allowed and add.core == ("/a/Add", "/s/Relu")
    assert rounded(units, int8([add.id])) == {"r->/a/Add in int8"}
