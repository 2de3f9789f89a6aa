"""Which units are safe in FP16, and what FP16 computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.micro import Node, build

from bitalloy.core.records import TensorRange
from bitalloy.core.schemes import Plan
from bitalloy.core.units import Evidence, Unit
from bitalloy.model.heads import find_heads
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.cast import as_specified
from bitalloy.runtime.ort import AS_WRITTEN, OrtSession
from bitalloy.targets.base import split
from bitalloy.targets.recipe import Recipe
from bitalloy.targets.safety import judge, tensors_to_judge
from bitalloy.targets.tensorrt import TENSORRT

SHAPES = {"x": (1, 2, 4, 4)}


def chain(path, w1: np.ndarray, w2: np.ndarray):
    nodes: list[Node] = [("Conv", ("x", "w1"), "c1", {}), ("Conv", ("c1", "w2"), "y", {})]
    out = (1, w2.shape[0], 4, 4)
    return build(path, nodes, {"x": (1, w1.shape[1], 4, 4)}, ("y", out), {"w1": w1, "w2": w2})


def judged(graph, **magnitudes: float | tuple[float, float]):
    units = split(graph, TENSORRT, find_heads(graph))
    ranges = {}
    for name in tensors_to_judge(graph, units):
        given = magnitudes.get(name, 1.0)
        magnitude, subnormal = given if isinstance(given, tuple) else (given, 0.0)
        ranges[name] = TensorRange(
            tensor=name, low=-1.0, high=1.0, method="percentile", magnitude=magnitude, subnormal=subnormal
        )
    return {u.id: u for u in judge(graph, units, ranges).units}


def half(unit: Unit) -> Evidence:
    return unit.evidence["fp16"]


@pytest.fixture
def small(tmp_path):
    """Sums of 2 products with weights 0.5 and -1.5: a running sum reaches at most twice its input."""
    return chain(tmp_path / "m.onnx", np.full((2, 2, 1, 1), 0.5), np.array([[[[0.5]], [[-1.5]]]]))


def test_safe_units_keep_fp16_with_the_evidence(small) -> None:
    units = judged(small, c1=(300.0, 0.25))
    assert all("fp16" in u.allowed and not half(u).reason for u in units.values())
    second = half(units["y"])
    assert (second.magnitude, second.subnormal, second.depth) == (300.0, 0.25, 2)
    assert second.partial_sum == pytest.approx(600.0)
    assert second.error == pytest.approx(2**0.5 / 2048, rel=1e-3)


def test_values_near_the_end_of_fp16_are_refused_in_both_units_that_touch_them(small) -> None:
    """The range method may cut values off: what counts is the largest that was seen, with headroom of 2."""
    units = judged(small, c1=33_000.0)
    for unit in units.values():
        assert "fp16" not in unit.allowed and "int8" in unit.allowed
        assert "values reach 3.3e+04" in half(unit).reason
    assert all("fp16" in u.allowed for u in judged(small, c1=32_000.0, x=10.0, y=10.0).values())


def test_running_sums_are_bounded_by_the_weights(tmp_path) -> None:
    weights = np.stack([np.full((4, 1, 1), 2.5), np.full((4, 1, 1), -0.1)])
    graph = chain(tmp_path / "m.onnx", np.full((4, 4, 1, 1), 0.1), weights)
    assert half(judged(graph, c1=6_000.0)["y"]).partial_sum == pytest.approx(60_000)
    refused = judged(graph, c1=7_000.0)
    assert "the sum may reach 7e+04" in half(refused["y"]).reason
    assert "fp16" in refused["c1"].allowed


def test_subnormal_and_deep_sums_are_refused(small, tmp_path) -> None:
    units = judged(small, y=(1.0, 0.6))
    assert "60 % of a tensor lies below 6.1e-5" in half(units["y"]).reason
    assert "fp16" in units["c1"].allowed
    deep = chain(tmp_path / "deep.onnx", np.full((16_500, 1, 1, 1), 1e-3), np.full((1, 16_500, 1, 1), 1e-3))
    units = judged(deep)
    assert "sum of 16500 products would lose 6.3 %" in half(units["y"]).reason
    assert "fp16" in units["c1"].allowed


def test_a_constant_that_overflows_is_refused(tmp_path) -> None:
    graph = chain(tmp_path / "m.onnx", np.full((1, 2, 1, 1), 7e4), np.full((1, 1, 1, 1), 1e-4))
    units = judged(graph)
    assert "values reach 7e+04" in half(units["c1"]).reason and "fp16" in units["y"].allowed


def test_specified_computes_every_rounding_that_the_graph_says(case) -> None:
    """Against torch: float32 arithmetic on half inputs, each result rounded to half."""
    torch = pytest.importorskip("torch")
    units = split(case.graph, TENSORRT, case.heads)
    recipe, plan = Recipe(units, TENSORRT, {}), Plan.of("fp16", "/stem/conv/Conv", "/body/cv1/Conv")
    mixed = write_plan(case.graph, recipe, plan).model
    proto = onnx.load_model_from_string(write_plan(case.graph, recipe, plan).to_bytes())
    stored = {i.name: i.data_type for i in proto.graph.initializer}
    assert sorted(v for n, v in stored.items() if n.endswith("/half")) == [onnx.TensorProto.FLOAT16] * 4
    exposed = as_specified(mixed)
    value = next(v for n in exposed.graph for v in n.outputs if v.name == "r1/single")
    exposed.graph.outputs.append(value)
    found = OrtSession(exposed, optimize=False).run(case.feeds[0])["r1/single"]

    weights = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in onnx.load(case.path).graph.initializer}

    def to_half(t):
        return t.half().float()

    def conv(x, w, b, stride):
        return to_half(
            torch.nn.functional.conv2d(x, to_half(weights[w]), to_half(weights[b]), stride=stride, padding=1)
        )

    c0 = conv(to_half(torch.tensor(case.feeds[0]["x"])), "w0", "b0", 2)
    a0 = to_half(c0 * to_half(torch.sigmoid(c0)))
    expected = torch.relu(conv(a0, "w1", "b1", 1)).numpy()
    # sums in another order fall on the other side of a rounding here and there
    assert (found == expected).mean() > 0.98
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_int8_of_other_devices_is_computed_as_written() -> None:
    """All weights and values at the ends of int8: kernels that add pairs of products in 16 bits would saturate."""
    random = np.random.default_rng(0)
    weight = random.choice([-127, 127], (64, 8)).astype(np.int8)
    scale, zero = (
        numpy_helper.from_array(np.array(value), name) for value, name in ((np.float32(0.01), "s"), (np.int8(0), "z"))
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["e"]),
        helper.make_node("MatMul", ["d", "e"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, k]) for n, k in (("x", 64), ("y", 8))]
    constants = [scale, zero, numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    x = random.choice(np.array([-1.27, 1.27], np.float32), (4, 64))
    found = AS_WRITTEN.open(ir.serde.deserialize_model(model)).run({"x": x})["y"]
    np.testing.assert_allclose(found, x.astype(np.float64) @ (0.01 * weight.astype(np.float64)), atol=1e-3)
