"""Graphs that ONNX Runtime makes of models with rounded tensors: what it would round, and what it leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitalloy.rewrite import floats
from bitalloy.rewrite.floats import keep_floats
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.runtime.ort import ORT, OrtSession

START = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
END = "o = QuantizeLinear(c, t, m)  y = DequantizeLinear(o, t, m)"
IMAGE, ROWS = "float[1,8,16,16] x", "float[2,4,16] x"
PREVENTED: dict[str, tuple[str, str, str]] = {
    # inputs, nodes between the roundings, operator of the optimized graph that there must not be
    "case1-conv": (f"{IMAGE}, float[8,8,3,3] w", "c = Conv(d, w)", "QLinearConv"),
    "case1-conv-bias-relu": (f"{IMAGE}, float[8,8,3,3] w, float[8] b", "a = Conv(d, w, b)  c = Relu(a)", "QLinearConv"),
    "case1-depthwise": (f"{IMAGE}, float[8,1,3,3] w", "c = Conv<group=8>(d, w)", "QLinearConv"),
    "case1-grey": ("float[1,1,16,16] x, float[8,1,3,3] w", "c = Conv(d, w)", "QLinearConv"),
    "case1-transposed": (f"{IMAGE}, float[8,4,2,2] w, float[4] b", "c = ConvTranspose<strides=[2,2]>(d, w, b)", ""),
    "case1-gemm": ("float[4,16] x, float[8,16] w, float[8] b", "c = Gemm<transB=1>(d, w, b)", "QGemm"),
    "case1-row": ("float[1,16] x, float[16,8] w", "c = Gemm(d, w)", "QGemm"),
    "case2-matmul": (f"{ROWS}, float[16,8] w, float[8] b", "a = MatMul(d, w)  c = Add(b, a)", "QGemm"),
    "case3-pool": (f"{IMAGE}, float[8,8,3,3] w", "a = Conv(d, w)  c = MaxPool<kernel_shape=[2,2]>(a)", "QLinearConv"),
    "case3-move": (f"{IMAGE}, float[8,8,3,3] w", "a = Transpose<perm=[0,1,3,2]>(d)  c = Conv(a, w)", "QLinearConv"),
    "case3-pad": (f"{IMAGE}, float[8,8,3,3] w, int64[8] n", "a = Pad(d, n)  c = Conv(a, w)", "QLinearConv"),
    "case3-add": (f"{IMAGE}, float[8,8,3,3] w, float[1,8,1,1] b", "a = Conv(d, w)  c = Add(a, b)", "QLinearConv"),
    "case3-mul": (f"{IMAGE}, float[8,8,3,3] w, float[1,8,1,1] b", "a = Conv(d, w)  c = Mul(a, b)", "QLinearConv"),
    "case3-normalization": (
        f"{IMAGE}, float[8,8,3,3] w, float[8] b",
        "a = Conv(d, w)  c = BatchNormalization(a, b, b, b, b)",
        "QLinearConv",
    ),
    "case4-softmax": (IMAGE, "c = Softmax(d)", "QLinearSoftmax"),
    "case4-move": (
        IMAGE,
        "a = Transpose<perm=[0,1,3,2]>(d)  e = Softmax<axis=-1>(a)  c = Transpose<perm=[0,1,3,2]>(e)",
        "QLinearSoftmax",
    ),
    "case5-pool": (
        IMAGE,
        "c = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1>(d)",
        "QLinearAveragePool",
    ),
    "case5-dilated": (IMAGE, "c = AveragePool<kernel_shape=[3,3], dilations=[2,2]>(d)", "QLinearAveragePool"),
}
LEFT: dict[str, tuple[str, str]] = {
    "case6-add": (IMAGE, "c = Add(d, d)"),
    "case6-mul": (IMAGE, "c = Mul(d, d)"),
    "case6-sigmoid": (IMAGE, "c = Sigmoid(d)"),
    "case6-leaky": (IMAGE, "c = LeakyRelu(d)"),
    "case6-concat": (IMAGE, "c = Concat<axis=1>(d, d)"),
    "case6-global-pool": (IMAGE, "c = GlobalAveragePool(d)"),
    "case6-product": (IMAGE, "c = MatMul(d, d)"),
    "case6-where": (f"{IMAGE}, bool[1,8,16,16] n, float b", "c = Where(n, d, b)"),
    "case6-move": (IMAGE, "c = Transpose<perm=[0,1,3,2]>(d)"),
    "case6-resize": (f"{IMAGE}, float[4] n", 'c = Resize<mode="linear">(d, , n)'),
    "case8-relu": (IMAGE, "a = Sin(x)  c = Relu(a)"),
    "case8-clip": (f"{IMAGE}, float b, float n", "a = Sin(x)  c = Clip(a, b, n)"),
}


def model_of(inputs: str, nodes: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Nodes between two roundings; the scale of the second covers what they give."""
    generator = np.random.default_rng(0)
    text = f"({inputs}, float s, uint8 z, float t, uint8 m) => (float[N] y) {{ {START} {nodes} {END} }}"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19]> t {text}')
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    feeds = {"x": generator.standard_normal(shapes["x"]).astype(np.float32)}
    low = np.uint8(0 if "Sin" in nodes else 128)
    constants: dict[str, Any] = {"s": np.float32(8 / 255), "z": np.uint8(128), "m": low}
    if "w" in shapes:  # channels of very different size, so that one scale for all is coarse
        channels = np.logspace(0, -2, shapes["w"][0]).reshape(-1, *[1] * (len(shapes["w"]) - 1))
        constants["w"] = (generator.standard_normal(shapes["w"]) * channels).astype(np.float32)
    if "b" in shapes:
        constants["b"] = np.asarray(0.5 + generator.random(shapes["b"]) if shapes["b"] else -0.5, np.float32)
    match shapes.get("n"):
        case [8]:
            constants["n"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
        case [4]:
            constants["n"] = np.array([1, 1, 2, 2], np.float32)
        case []:
            constants["n"] = np.float32(3)
        case [*shape]:
            constants["n"] = generator.random(shape) > 0.3
    for value in [v for v in model.graph.input if v.name != "x" and v.name != "t"]:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(constants[value.name]), value.name))
        model.graph.input.remove(value)
    for node in model.graph.node:
        node.name = node.output[0]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.node[-2:]
    probe.graph.output[0].name = "c"
    del probe.graph.input[1:]
    reach = float(np.abs(OrtSession(probe.SerializeToString(), optimize=False).run(feeds)["c"]).max())
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(np.float32(reach / 127)), "t"))
    del model.graph.input[1:]
    return model, feeds


def optimized(model: ir.Model, folder: Path) -> list[str]:
    assert ORT.rewrite is not None
    return [node.op_type for node in ORT.rewrite(model, folder).graph]


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    written, found = (OrtSession(model, optimize=o, threads=1).run(feeds)["y"] for o in (False, True))
    return written, found


@pytest.mark.parametrize("case", PREVENTED)
def test_what_is_float_in_the_plan_is_float_in_the_optimized_graph(case: str, tmp_path: Path) -> None:
    inputs, nodes, kernel = PREVENTED[case]
    proto, feeds = model_of(inputs, nodes)
    model = ir.from_proto(proto)
    expected = OrtSession(proto.SerializeToString(), optimize=False).run(feeds)["y"]
    keep_floats(model)
    onnx.checker.check_model(ir.to_proto(model))
    written, found = outputs(model, feeds)
    np.testing.assert_array_equal(written, expected)
    step = float(numpy_helper.to_array(next(i for i in proto.graph.initializer if i.name == "t")))
    assert np.abs(found - written).max() <= 1.01 * step and (found != written).mean() < 2e-3
    assert not {kernel, "QLinearConv", "QGemm"} & set(optimized(model, tmp_path))


@pytest.mark.parametrize("case", PREVENTED)
def test_without_prevention_the_runtime_changes_the_numbers(case: str, tmp_path: Path) -> None:
    """What would make a prevention superfluous."""
    proto, feeds = model_of(*PREVENTED[case][:2])
    model = ir.from_proto(proto)
    if case == "case5-dilated":
        with pytest.raises(Exception, match="QLinearAveragePool"):
            OrtSession(model)
        return
    written, found = outputs(model, feeds)
    assert (found != written).mean() > 0.01


@pytest.mark.parametrize("case", LEFT)
def test_other_kernels_give_the_numbers_of_the_graph(case: str, tmp_path: Path) -> None:
    proto, feeds = model_of(*LEFT[case])
    model = ir.from_proto(proto)
    before = [n.op_type for n in model.graph]
    keep_floats(model)
    assert [n.op_type for n in model.graph] == before
    written, found = outputs(model, feeds)
    assert (found != written).mean() < 2e-3
    assert not {"Relu", "Clip"} & set(optimized(model, tmp_path))


def test_case7_two_roundings_in_a_row_become_one(tmp_path: Path) -> None:
    """On other scales that changes numbers; on equal ones, which plans have, it does not."""
    for scale, equal in ((8 / 255, True), (5 / 255, False)):
        proto, feeds = model_of(IMAGE, "c = Identity(d)")
        for one in proto.graph.initializer:
            if one.name == "t":
                one.CopyFrom(numpy_helper.from_array(np.asarray(np.float32(scale)), "t"))
        model = ir.from_proto(proto)
        assert optimized(model, tmp_path).count("QuantizeLinear") == 1
        written, found = outputs(model, feeds)
        assert np.array_equal(written, found) == equal


def test_case9_blocks_of_int4_are_multiplied_by_rounded_tensors(tmp_path: Path) -> None:
    """The accuracy level 4 of MatMulNBits stands for INT8."""
    text = """<ir_version: 10, opset_import: ["" : 21]> t
        (float[4,64] x, int4[64,8] w, float[2,8] s) => (float[4,8] y) {
        d = DequantizeLinear<axis=0, block_size=32>(w, s)  y = MatMul(x, d) }"""
    proto = onnx.parser.parse_model(text)
    weights = np.random.default_rng(0).integers(-7, 8, (64, 8))
    proto.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, (64, 8), weights))
    proto.graph.initializer.append(numpy_helper.from_array(np.full((2, 8), 0.1, np.float32), "s"))
    del proto.graph.input[1:]
    assert ORT.rewrite is not None
    (node,) = ORT.rewrite(ir.from_proto(proto), tmp_path).graph
    assert node.op_type == "MatMulNBits" and node.attributes["accuracy_level"].as_int() == 4


@pytest.mark.parametrize("case", PREVENTED)
def test_case10_openvino_computes_floats_as_they_are_written(case: str) -> None:
    """Activations may be taken into the rounding, where a few numbers at half a step fall the other way."""
    pytest.importorskip("openvino")
    proto, feeds = model_of(*PREVENTED[case][:2])
    written = OrtSession(proto.SerializeToString(), optimize=False, threads=1).run(feeds)["y"]
    found = OPENVINO.open(ir.from_proto(proto)).run(feeds)["y"]
    step = float(numpy_helper.to_array(next(i for i in proto.graph.initializer if i.name == "t")))
    far = np.abs(found - written) > 0.5 * step
    assert far.mean() < 5e-3 and np.abs(found - written).max() <= 1.01 * step


def test_a_tensor_that_integer_kernels_read_too_keeps_its_scale(tmp_path: Path) -> None:
    """Only the float convolution reads the vector; the two share the integers."""
    nodes = "a = Conv(d, w)  p = QuantizeLinear(a, s, z)  e = DequantizeLinear(p, s, z)  c = Add(d, e)"
    proto, feeds = model_of(f"{IMAGE}, float[8,8,1,1] w", nodes)
    model = ir.from_proto(proto)
    keep_floats(model)
    written, found = outputs(model, feeds)
    assert (found != written).mean() < 2e-3
    operators = optimized(model, tmp_path)
    assert "QLinearAdd" in operators and "Conv" in operators and operators.count("QuantizeLinear") == 2


def test_every_numbered_case_has_a_test() -> None:
    numbers = set(re.findall(r"^Case (\d+)\.", str(floats.__doc__), re.MULTILINE))
    tests = [*PREVENTED, *LEFT, *(name.removeprefix("test_") for name in globals() if name.startswith("test_case"))]
    assert numbers == {m.group(1) for name in tests if (m := re.match(r"case(\d+)", name))}
