"""Bias correction: what is added where, and that the mean error goes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.apply import apply
from bitalloy.biases import corrections, find_biases
from bitalloy.graph import Graph, load
from bitalloy.heads import find_heads
from bitalloy.records import UnitGraph
from bitalloy.runtime import OrtSession
from bitalloy.targets import ORT_CPU
from bitalloy.targets.base import split


def test_biases_of_int8_layers_are_found(case) -> None:
    int8 = case.units.quantizable()
    found = find_biases(case.graph, case.units, int8)
    nodes = {b.node for b in found}
    assert nodes == {w.node for u in case.units.units if u.id in int8 for w in u.weights} - {
        "/body/dw/Conv",
        "/head/cls/Conv",
    }
    assert {"/stem/conv/Conv", "/body/cv1/Conv"} <= nodes
    assert find_biases(case.graph, case.units, frozenset({"/body/dw/Conv"})) == ()  # without bias, as `/head/cls/Conv`
    assert find_biases(case.graph, case.units, frozenset()) == ()


def test_an_offset_moves_the_bias_alone(case) -> None:
    """Against the same model with another bias in its file's place."""
    offset = np.linspace(-0.5, 0.5, 8)
    found = apply(case.graph, case.units, frozenset(), case.ranges, ORT_CPU, {"/stem/conv/Conv": offset}).to_bytes()
    model = onnx.load(case.path)
    for tensor in model.graph.initializer:
        if tensor.name == "b0":
            shifted = (numpy_helper.to_array(tensor) + offset).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(shifted, "b0"))
    expected = OrtSession(model.SerializeToString()).run(case.feeds[0])["y"]
    np.testing.assert_allclose(OrtSession(found).run(case.feeds[0])["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, UnitGraph, list[dict[str, np.ndarray]]]:
    """Layers whose inputs are far from 0 on average, so that rounded weights move the mean of what they make."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("skewed") / "net.onnx"
    shapes = {
        "w": (16, 8),
        "b": (8,),
        "v": (6, 4, 3, 3),
        "c": (6,),
        "g": (5, 8),
        "d": (5,),
        "last": (5, 2),
        "out": (2, 6, 1, 1),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="/up/MatMul"),
        helper.make_node("Add", ["b", "m"], ["h"], name="/up/Add"),
        helper.make_node("Gemm", ["h", "g", "d"], ["f"], name="/gemm/Gemm", transB=1),
        helper.make_node("Gemm", ["f", "last"], ["y"], name="/last/Gemm"),
        helper.make_node("Conv", ["image", "v", "c"], ["i"], name="/conv/Conv", group=2),
        helper.make_node("Conv", ["i", "out"], ["z"], name="/out/Conv"),
    ]
    graph = helper.make_graph(
        nodes,
        "skewed",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [200, 16]),
            helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 8, 20, 20]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [200, 2]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2, 18, 18]),
        ],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    loaded = load(path)
    feeds = [
        {
            "x": (rng.standard_normal((200, 16)) + 3).astype(np.float32),
            "image": (rng.standard_normal((1, 8, 20, 20)) + 3).astype(np.float32),
        }
        for _ in range(4)
    ]
    return loaded, split(loaded, ORT_CPU, find_heads(loaded)), feeds


def outputs_of(model: onnx.ModelProto, names: list[str], feeds: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tensors of all samples, executed as written."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = OrtSession(copy.SerializeToString(), optimize=False)
    seen = [session.run(f) for f in feeds]
    return {n: np.stack([s[n] for s in seen]).astype(np.float64) for n in names}


@pytest.mark.parametrize(
    ("layer", "holder", "result", "axes"),
    [
        ("/up/MatMul", "/up/Add", "h", (0, 1)),
        ("/gemm/Gemm", "/gemm/Gemm", "f", (0, 1)),
        ("/conv/Conv", "/conv/Conv", "i", (0, 1, 3, 4)),
    ],
)
@pytest.mark.parametrize("clipped", [False, True])
def test_the_mean_error_of_a_layer_goes(
    skewed, layer: str, holder: str, result: str, axes: tuple[int, ...], clipped: bool
) -> None:
    """Executed: what is left is the mean of roundings that are as often up as down. Also where its input is cut off."""
    graph, units, feeds = skewed
    names = ["m", "h", "f", "i"]
    exact = outputs_of(onnx.load(graph.source), names, feeds)
    seen = {**exact, **{n: np.stack([f[n] for f in feeds]) for n in ("x", "image")}}
    ranges = {n: (float(v.min()), float(v.max())) for n, v in seen.items()}
    entering = graph.node[layer].inputs[0].name
    if clipped:
        ranges[entering] = (ranges[entering][0], float(np.quantile(seen[entering], 0.9)))
    (bias,) = biases = find_biases(graph, units, frozenset({layer}))
    assert bias.node == holder
    offsets = corrections(graph, biases, ranges, ORT_CPU, feeds)

    def error(offsets: dict[str, np.ndarray] | None = None) -> np.ndarray:
        rounded = onnx.load_model_from_string(
            apply(graph, units, frozenset({layer}), ranges, ORT_CPU, offsets).to_bytes()
        )
        return (outputs_of(rounded, [result], feeds)[result] - exact[result]).mean(axis=axes)

    before, after = np.abs(error()), np.abs(error(offsets))
    assert after.max() < 0.2 * before.max(), (before, after)
