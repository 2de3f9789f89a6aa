"""Files of old opsets, with local functions and operators of ONNX Runtime, against ONNX Runtime on the file itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.core.errors import ModelError
from bitalloy.model.heads import find_heads
from bitalloy.model.layout import time_first
from bitalloy.model.load import load_graph
from bitalloy.model.read import static_shape
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU

RANDOM = np.random.default_rng(7)
MS = "com.microsoft"


def tensor(name: str, *shape: int, kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(RANDOM.standard_normal(shape).astype(kind), name)


def model(
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    shape: tuple[int, ...],
    opset: int,
    functions: list[onnx.FunctionProto] | None = None,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_model(graph, opset_imports=imports, functions=functions or [])
    made.ir_version = 8
    return made


def nbits(bits: int, zeros: bool) -> onnx.ModelProto:
    rows = RANDOM.integers(0, 256, (6, 3, 16 * bits // 8), dtype=np.uint8)
    points = RANDOM.integers(0, 256, 6 * (-(-3 * bits // 8)), dtype=np.uint8)
    constants = [
        numpy_helper.from_array(rows, "w"),
        numpy_helper.from_array(RANDOM.uniform(0.01, 0.1, 18).astype(np.float32), "s"),
    ]
    if zeros:
        constants.append(numpy_helper.from_array(points, "z"))
    sizes: dict[str, Any] = {"K": 40, "N": 6, "bits": bits, "block_size": 16}
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"] + ["z"] * zeros, ["y"], "product", domain=MS, accuracy_level=0, **sizes
    )
    return model([node], constants, (2, 5, 40), 17, domains=(MS,))


def one(op: str, *more: onnx.TensorProto, shape: tuple[int, ...] = (2, 5, 8), domain: str = MS, opset: int = 14,
        inputs: tuple[str, ...] | None = None, **attributes: Any) -> onnx.ModelProto:  # fmt: skip
    given = inputs if inputs is not None else ("x", *(t.name for t in more))
    node = helper.make_node(op, list(given), ["y"], "node", domain=domain, **attributes)
    return model([node], list(more), shape, opset, domains=(MS,) if domain else ())


def called() -> onnx.ModelProto:
    body = [helper.make_node("Sigmoid", ["a"], ["s"], "s"), helper.make_node("Mul", ["a", "s"], ["b"], "m")]
    function = helper.make_function("mine", "swish", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    node = helper.make_node("swish", ["x"], ["y"], "call", domain="mine")
    return model([node], [], (1, 4), 17, [function], ("mine",))


def skipping(op: str, *more: str) -> onnx.ModelProto:
    constants = [tensor("k", 2, 5, 8), tensor("g", 8), tensor("b", 8)]
    nodes = [
        helper.make_node(op, ["x", "k", "g", *more], ["n", "", "", "sum"], "skip", domain=MS, epsilon=1e-6),
        helper.make_node("Sub", ["n", "sum"], ["y"], "both"),
    ]
    return model(nodes, constants, (2, 5, 8), 14, domains=(MS,))


def old_upsample() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Upsample", ["x", "s"], ["u"], "up", mode="nearest"),
        helper.make_node("Softmax", ["u"], ["y"], "soft", axis=3),
    ]
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")
    return model(nodes, [scales], (1, 2, 3, 4), 9)


def old_classifier() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "g", "be", "m", "v"], ["n"], "norm"),
        helper.make_node("Clip", ["n"], ["r"], "clip", min=0.0, max=6.0),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Squeeze", ["p"], ["q"], "squeeze", axes=[2, 3]),
        helper.make_node("Gemm", ["q", "f", "fb"], ["y"], "full", transB=1),
    ]
    positive = numpy_helper.from_array(RANDOM.uniform(0.5, 1.5, 6).astype(np.float32), "v")
    named = [tensor("w", 6, 3, 3, 3), tensor("b", 6), tensor("g", 6), tensor("be", 6), tensor("m", 6), positive]
    return model(nodes, [*named, tensor("f", 4, 6), tensor("fb", 4)], (1, 3, 8, 8), 7)


def slices(opset: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Pad", ["x"], ["p"], "pad", pads=[0, 0, 1, 0, 0, 1], value=0.5),
        helper.make_node("Slice", ["p"], ["s"], "slice", axes=[2], starts=[1], ends=[6]),
        helper.make_node("ReduceSum", ["s"], ["r"], "sum", axes=[1], keepdims=1),
        helper.make_node("Unsqueeze", ["r"], ["y"], "more", axes=[0]),
    ]
    return model(nodes, [], (1, 3, 8), opset)


def halved(keep: bool, opset: int = 17) -> onnx.ModelProto:
    """A network in half precision, with its inputs and outputs in it, or in float32 behind Casts."""
    half, inner, made = TensorProto.FLOAT16, "x" if not keep else "xh", "y" if not keep else "yh"
    weights = [tensor("w", 4, 3, 3, 3, kind=np.float16), tensor("b", 4, kind=np.float16)]
    nodes = [
        helper.make_node("Conv", [inner, "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Constant", [], ["k"], "k", value=numpy_helper.from_array(np.array(0.5, np.float16))),
        helper.make_node("Mul", ["c", "k"], [made], "mul"),
    ]
    if keep:
        nodes = [helper.make_node("Cast", ["x"], ["xh"], "in", to=half), *nodes]
        nodes.append(helper.make_node("Cast", ["yh"], ["y"], "out", to=TensorProto.FLOAT))
    found = model(nodes, weights, (1, 3, 6, 6), opset)
    if not keep:
        for value in (*found.graph.input, *found.graph.output):
            value.type.tensor_type.elem_type = half
    return found


def doubled() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "m"), helper.make_node("Sigmoid", ["m"], ["y"], "s")]
    found = model(nodes, [tensor("w", 6, 5, kind=np.float64)], (2, 6), 17)
    for value in (*found.graph.input, *found.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return found


CASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "local function": called,
    "opset 7 classifier": old_classifier,
    "opset 9 Upsample and flat Softmax": old_upsample,
    "opset 8 Pad and Slice": lambda: slices(8),
    "opset 9 Pad and Slice": lambda: slices(9),
    "FusedConv": lambda: one(
        "FusedConv", tensor("w", 4, 3, 3, 3), tensor("b", 4), shape=(1, 3, 6, 6), activation="Relu"
    ),
    "FusedConv, LeakyRelu": lambda: one(
        "FusedConv", tensor("w", 4, 3, 3, 3), shape=(1, 3, 6, 6), activation="LeakyRelu", activation_params=[0.2]
    ),
    "FusedMatMul": lambda: one("FusedMatMul", tensor("w", 3, 8), transB=1, alpha=0.5),
    "Gelu": lambda: one("Gelu"),
    "BiasGelu": lambda: one("BiasGelu", tensor("b", 8)),
    "FastGelu": lambda: one("FastGelu", tensor("b", 8)),
    "QuickGelu": lambda: one("QuickGelu", alpha=1.3),
    "LayerNormalization below opset 17": lambda: one(
        "LayerNormalization", tensor("g", 8), tensor("b", 8), domain="", axis=-1, epsilon=1e-6
    ),
    "SimplifiedLayerNormalization": lambda: one("SimplifiedLayerNormalization", tensor("g", 8), domain="", axis=-1),
    "SkipLayerNormalization": lambda: skipping("SkipLayerNormalization", "b"),
    "SkipSimplifiedLayerNormalization": lambda: skipping("SkipSimplifiedLayerNormalization"),
    "MatMulNBits 4": lambda: nbits(4, zeros=False),
    "MatMulNBits 4 with zero points": lambda: nbits(4, zeros=True),
    "MatMulNBits 8 with zero points": lambda: nbits(8, zeros=True),
}


@pytest.mark.parametrize("name", CASES)
def test_conversion_computes_what_the_file_does(name: str, tmp_path: Path) -> None:
    """The normal form gives the numbers of the file, executed by ONNX Runtime without optimization."""
    path = tmp_path / "model.onnx"
    onnx.save(CASES[name](), path)
    graph = load_graph(path)
    feeds = {
        "x": np.random.default_rng(1).standard_normal([int(d) for d in graph.info.inputs[0].shape]).astype(np.float32)
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = ort.InferenceSession(str(path), options).run(None, feeds)
    (found,) = ort.InferenceSession(graph.to_bytes(), options).run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(n.domain for n in graph.nodes)
    assert graph.changes


@pytest.mark.parametrize(
    ("name", "made", "kind", "close"),
    [
        ("half inside", lambda: halved(keep=True), np.float32, 5e-3),
        ("half inside, opset 11", lambda: halved(keep=True, opset=11), np.float32, 5e-3),
        ("half", lambda: halved(keep=False), np.float16, 5e-3),
        ("double", doubled, np.float64, 1e-6),
    ],
)
def test_other_precisions_are_read_as_float32(
    name: str, made: Callable[[], onnx.ModelProto], kind: type, close: float, tmp_path: Path
) -> None:
    """Inside all is float32, inputs and outputs keep their types, and numbers differ by the file's own roundings."""
    path = tmp_path / "model.onnx"
    onnx.save(made(), path)
    graph = load_graph(path)
    shape = [int(d) for d in graph.info.inputs[0].shape]
    feeds: dict[str, Any] = {"x": np.random.default_rng(1).standard_normal(shape).astype(kind)}
    (expected,) = ort.InferenceSession(str(path)).run(None, feeds)
    (found,) = ort.InferenceSession(graph.to_bytes()).run(None, feeds)
    assert found.dtype == expected.dtype == kind
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=close, atol=close)
    inside = {v.dtype for n in graph.nodes for v in n.outputs if not v.is_graph_output()}
    assert inside <= {ir.DataType.FLOAT}
    head = find_heads(graph)[0]
    assert graph.value[head.tensor].dtype == ir.DataType.FLOAT
    assert any("another precision" in note for note in graph.changes)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_factors_of_a_product_go_into_its_constants(beta: float, tmp_path: Path) -> None:
    """A Gemm with factors, and a MatMul with a matrix of three dimensions, take the form that runtimes fuse."""
    path = tmp_path / "model.onnx"
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"], "gemm", alpha=2.0, beta=beta, transB=1),
        helper.make_node("Reshape", ["g", "s"], ["r"], "reshape"),
        helper.make_node("MatMul", ["r", "m"], ["y"], "matmul"),
    ]
    constants = [tensor("w", 5, 6), tensor("b", 1, 5), numpy_helper.from_array(np.array([1, 4, 5]), "s")]
    onnx.save(model(nodes, [*constants, tensor("m", 1, 5, 3)], (4, 6), 17), path)
    graph = load_graph(path)
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)}
    (expected,) = ort.InferenceSession(str(path)).run(None, feeds)
    (found,) = ort.InferenceSession(graph.to_bytes()).run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    units = split(graph, ORT_CPU, find_heads(graph))
    assert "int8" in next(u for u in units.units if u.id == "gemm").allowed
    matrix = graph.node["matmul"].inputs[1]
    assert matrix is not None
    assert static_shape(matrix) == (5, 3)


def test_newest_opset_is_read_where_nothing_changed(tmp_path: Path) -> None:
    """Opset 24 has a new Cast and TopK, in types alone; its Attention is another operator."""
    path = tmp_path / "model.onnx"
    plain = model([helper.make_node("Reshape", ["x", "s"], ["y"], "r")], [], (2, 6), 24)
    plain.graph.initializer.append(numpy_helper.from_array(np.array([3, 4]), "s"))
    onnx.save(plain, path)
    assert load_graph(path).info.opset == 23
    onnx.save(model([helper.make_node("Swish", ["x"], ["y"], "s")], [], (2, 6), 24), path)
    with pytest.raises(ModelError, match="'s' \\(Swish\\) does not exist in opset 23"):
        load_graph(path)


def test_a_conversion_that_changes_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converted file is executed beside the file as it was."""
    path = tmp_path / "model.onnx"
    onnx.save(slices(9), path)
    convert = onnx.version_converter.convert_version

    def wrong(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
        made = convert(proto, version)
        node = next(n for n in made.graph.node if n.op_type == "ReduceSum")
        node.op_type = "ReduceSumSquare"
        del node.input[1:]
        return made

    monkeypatch.setattr(onnx.version_converter, "convert_version", wrong)
    with pytest.raises(ModelError, match=r"gives other numbers after its conversion|cannot be executed any more"):
        load_graph(path)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: one("FusedConv", tensor("w", 4, 3, 3, 3), shape=(1, 3, 6, 6), activation="Wave"), "'Wave' is unknown"),
        (lambda: one("Inverse", shape=(1, 4, 4)), "Operator domain 'com.microsoft'"),
        (lambda: slices(6), "opset 6; supported are 7"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_says_so(made: Callable[[], onnx.ModelProto], told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(made(), path)
    with pytest.raises(ModelError, match=told):
        load_graph(path)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_batch_first_is_time_first_between_transposes(op: str, gates: int) -> None:
    """Of both directions, with first and last states; the oracle is ONNX Runtime on arrays that numpy turns."""
    time, batch, width, hidden, states = 4, 3, 5, 2, ("H", "C") if op == "LSTM" else ("H",)
    shapes = {"x": (batch, time, width), **{f"first{s}": (batch, 2, hidden) for s in states}}
    made = ["y", *(f"last{s}" for s in states)]
    inputs = ["x", "W", "R", "", "", *(f"first{s}" for s in states)]
    weights = (tensor("W", 2, gates * hidden, width), tensor("R", 2, gates * hidden, hidden))

    def layer(*, turned: bool) -> onnx.ModelProto:
        node = helper.make_node(op, inputs, made, "layer", hidden_size=hidden, direction="bidirectional", layout=turned)
        kind = TensorProto.FLOAT
        given = [helper.make_tensor_value_info(n, kind, None) for n in shapes]
        given[0] = helper.make_tensor_value_info("x", kind, [None] * 3)
        results = [helper.make_tensor_value_info(n, kind, None) for n in made]
        graph = helper.make_graph([node], "layer", given, results, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    rng = np.random.default_rng(2)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found = ort.InferenceSession(time_first(layer(turned=True)).SerializeToString()).run(made, feeds)
    turned = {name: np.ascontiguousarray(array.swapaxes(0, 1)) for name, array in feeds.items()}
    y, *last = ort.InferenceSession(layer(turned=False).SerializeToString()).run(made, turned)
    for one, other in zip(found, [y.transpose(2, 0, 1, 3), *(v.swapaxes(0, 1) for v in last)], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_that_onnx_runtime_does_not_execute_is_compared_in_normal_form(tmp_path: Path) -> None:
    node = helper.make_node("GRU", ["x", "W", "R"], ["y"], "layer", hidden_size=2, layout=1)
    made = model([node], [tensor("W", 1, 6, 5), tensor("R", 1, 6, 2)], (3, 4, 5), 17)
    onnx.save(made, tmp_path / "net.onnx")
    net = load_graph(tmp_path / "net.onnx")
    assert net.unfit == "ONNX Runtime does not execute it" and "time first" in net.changes[0]
    assert net.info.outputs[0].shape == (3, 4, 1, 2)
