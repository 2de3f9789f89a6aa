"""Bias correction: what is added where, and that the mean error goes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.cnn import int8

from bitalloy.core.units import Offset, UnitGraph
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.biases import bias_offsets, find_biases, mean_inputs
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.exact import Switchboard, damage
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe


def test_biases_of_int8_layers_are_found(case) -> None:
    able = case.units.able("int8")
    nodes = {b.node for b in find_biases(case.graph, case.units)}
    without_bias = {"/body/dw/Conv", "/head/cls/Conv"}
    assert nodes == {w.node for u in case.units.units if u.id in able for w in u.weights} - without_bias
    assert {"/stem/conv/Conv", "/body/cv1/Conv"} <= nodes


def offsets_of(case) -> dict[str, Offset]:
    """Far larger than any that a correction gives."""
    biases = find_biases(case.graph, case.units)
    channels = {b.weight.id: case.graph.node[b.node].inputs[2].shape[0] for b in biases}
    return {f"{b.weight.id} in int8": Offset(node=b.node, values=(0.25,) * channels[b.weight.id]) for b in biases}


def test_an_offset_moves_the_bias_of_a_rounded_layer_and_no_other(case) -> None:
    """Against the same plan on a file with another bias in its place."""
    plan, node = int8(["/stem/conv/Conv"]), "/stem/conv/Conv"
    found = write_plan(case.graph, case.recipe(offsets=offsets_of(case)), plan).to_bytes()
    model = onnx.load(case.path)
    name = next(n for n in model.graph.node if n.name == node).input[2]
    for tensor in model.graph.initializer:
        if tensor.name == name:
            shifted = (numpy_helper.to_array(tensor) + 0.25).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(shifted, name))
    path = case.path.with_name("shifted.onnx")
    onnx.save(model, path)
    expected = write_plan(load_graph(path), case.recipe(), plan).to_bytes()
    y, wanted = (OrtSession(m).run(case.feeds[0])["y"] for m in (found, expected))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    plain = write_plan(case.graph, case.recipe(), plan).to_bytes()
    assert np.abs(OrtSession(plain).run(case.feeds[0])["y"] - wanted).max() > 0.01


def test_gates_move_biases_as_the_rewritten_model_does(case) -> None:
    recipe = case.recipe(offsets=offsets_of(case))
    board, plan = Switchboard(case.graph, recipe), case.units.lowest()
    gated = board.run(case.feeds[0], board.gates(rounded(case.units, plan)))["y"]
    rewritten = write_plan(case.graph, recipe, plan).to_bytes()
    expected = OrtSession(rewritten, optimize=False).run(case.feeds[0])["y"]
    plain = Switchboard(case.graph, case.recipe())
    without = plain.run(case.feeds[0], plain.gates(rounded(case.units, plan)))["y"]
    assert np.abs(gated - expected).max() < 0.05 * np.abs(without - expected).max()


def test_the_probe_matrix_sees_the_offsets(case) -> None:
    """Against execution, with offsets so small that the network stays linear and so large that rounding is nothing."""
    offsets = {s: Offset(node=o.node, values=(0.02,) * len(o.values)) for s, o in offsets_of(case).items()}
    recipe = case.recipe(offsets=offsets)
    prober, board = Prober(case.graph, case.heads, [recipe]), Switchboard(case.graph, recipe)
    rows = [prober.measure(f, sample=i, probes=64, seed=1) for i, f in enumerate(case.feeds)]
    matrix, site = ProbeMatrix.concatenate(rows), next(s for s in offsets if s.endswith("/body/cv1/Conv#1 in int8"))
    exact, _ = damage(board, [board.gates({site})], case.heads, case.feeds)
    predicted = decibel(matrix.damage(matrix.select({site})).mean(axis=0))
    np.testing.assert_allclose(predicted, decibel(exact.mean(axis=0)[:, 0]), atol=1.0)


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
    loaded = load_graph(path)
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
def test_the_mean_error_of_a_layer_goes(skewed, layer: str, holder: str, result: str, axes: tuple[int, ...]) -> None:
    """Executed: what is left is the mean of roundings that are as often up as down."""
    graph, units, feeds = skewed
    names = ["m", "h", "f", "i"]
    exact = outputs_of(onnx.load(graph.source), names, feeds)
    seen = {**exact, **{n: np.stack([f[n] for f in feeds]) for n in ("x", "image")}}
    ranges = {n: (float(v.min()), float(v.max())) for n, v in seen.items()}
    biases = [b for b in find_biases(graph, units) if b.weight.node == layer]
    assert [b.node for b in biases] == [holder]
    found = bias_offsets(graph, biases, Recipe(units, ORT_CPU, ranges), mean_inputs(graph, biases, feeds))

    def error(offsets: dict[str, Offset] | None = None) -> np.ndarray:
        recipe = Recipe(units, ORT_CPU, ranges, offsets or {})
        made = onnx.load_model_from_string(write_plan(graph, recipe, int8([layer])).to_bytes())
        return (outputs_of(made, [result], feeds)[result] - exact[result]).mean(axis=axes)

    before, after = np.abs(error()), np.abs(error(found))
    assert after.max() < 0.2 * before.max(), (before, after)
