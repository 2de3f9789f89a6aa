"""Kernels that add pairs of products in 16 bits: which they are, and that no two weights overflow there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper
from tests.cnn import int8, with_pair_limit
from tests.definition import orders, pair_sums
from tests.micro import build

from bitalloy.model.heads import find_heads
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.runtime.ort import OrtSession
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.pairs import ADDS_PAIRS, Channels, channels_of
from bitalloy.targets.patterns import has_vnni
from bitalloy.targets.recipe import Recipe

LIMITS = st.sampled_from([128, 100, 33])
KERNELS: dict[str, tuple[str, list[int], list[int], dict[str, Any]]] = {
    # operator, shape of the input and of the weights, attributes
    "dense": ("Conv", [1, 16, 6, 6], [8, 16, 3, 3], {}),
    "pointwise": ("Conv", [1, 16, 6, 6], [8, 16, 1, 1], {}),
    "grouped": ("Conv", [1, 16, 6, 6], [8, 2, 3, 3], {"group": 8}),
    "one output of a group": ("Conv", [1, 16, 6, 6], [4, 4, 3, 3], {"group": 4}),
    "grey": ("Conv", [1, 1, 6, 6], [8, 1, 3, 3], {}),
    "grey, large kernel": ("Conv", [1, 1, 9, 9], [2, 1, 5, 5], {}),
    "grey signal": ("Conv", [1, 1, 16], [8, 1, 3], {}),
    "grey volume": ("Conv", [1, 1, 5, 5, 5], [8, 1, 3, 3, 3], {}),
    "multiplier": ("Conv", [1, 8, 6, 6], [16, 1, 3, 3], {"group": 8}),
    "large multiplier": ("Conv", [1, 2, 6, 6], [32, 1, 3, 3], {"group": 2}),
    "depthwise": ("Conv", [1, 8, 6, 6], [8, 1, 3, 3], {"group": 8}),
    "depthwise, odd channels": ("Conv", [1, 3, 9, 9], [3, 1, 5, 5], {"group": 3}),
    "depthwise signal": ("Conv", [1, 8, 16], [8, 1, 3], {"group": 8}),
    "depthwise volume": ("Conv", [1, 8, 5, 5, 5], [8, 1, 3, 3, 3], {"group": 8}),
    "one channel": ("Conv", [1, 1, 6, 6], [1, 1, 3, 3], {}),
    "matrix": ("MatMul", [4, 32], [32, 8], {}),
    "row": ("MatMul", [1, 32], [32, 8], {}),
    "column": ("MatMul", [4, 32], [32, 1], {}),
    "batch": ("MatMul", [2, 4, 32], [32, 8], {}),
    "gemm": ("Gemm", [4, 32], [32, 8], {}),
    "transposed gemm": ("Gemm", [1, 32], [8, 32], {"transB": 1}),
}
"""Every kind of integer product that a target makes kernels of."""
Kind = type[np.integer[Any]]


def weights(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Also with channels of zeros, and with neighbours that are equal, the largest or of opposite sign."""
    elements = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1, 1, width=32), st.floats(-1e4, 1e4, width=32))
    return hnp.arrays(np.float32, shape, elements=elements)


def product(kind: str, tensor: Kind, weight: Kind, *, rounded: bool) -> onnx.ModelProto:
    """A product of integers that are all at the upper end of their type, written as QDQ; `rounded` is the result."""
    operator, shape, kernel, attributes = KERNELS[kind]
    axis = 1 if operator == "MatMul" or (operator == "Gemm" and not attributes) else 0
    depth = np.prod(kernel) / kernel[axis]
    middle = 0 if weight is np.int8 else 128
    low = np.iinfo(tensor).min
    constants = {
        "w": np.full(kernel, middle + 127, weight),
        "ws": np.full(kernel[axis], 0.01, np.float32),
        "wz": np.full(kernel[axis], middle, weight),
        "s": np.float32(1 / 255),
        "z": tensor(low),
        "t": np.float32(depth * 1.27 / 255),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["e"], axis=axis),
        helper.make_node(operator, ["d", "e"], ["c" if rounded else "y"], name="c", **attributes),
    ]
    if rounded:
        nodes.append(helper.make_node("QuantizeLinear", ["c", "t", "z"], ["r"]))
        nodes.append(helper.make_node("DequantizeLinear", ["r", "t", "z"], ["y"]))
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def row_of(kind: str) -> tuple[str, Channels]:
    operator, _, kernel, attributes = KERNELS[kind]
    return operator, channels_of(ir.node(operator, [], attributes), tuple(kernel))


def test_every_row_is_executed() -> None:
    assert {row_of(kind) for kind in KERNELS} == set(ADDS_PAIRS)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(("tensor", "weight"), [(np.uint8, np.int8), (np.int8, np.int8), (np.uint8, np.uint8)])
def test_onnx_runtime_adds_pairs_where_the_table_says_so(kind: str, tensor: Kind, weight: Kind) -> None:
    """All weights 127 steps, all tensors 255: where two products meet in 16 bits, nearly half of a sum is lost."""
    ones = {"x": np.ones(KERNELS[kind][1], np.float32)}
    expected = ADDS_PAIRS[row_of(kind)] and weight is np.int8 and not has_vnni()
    for rounded in (True, False):
        model = product(kind, tensor, weight, rounded=rounded).SerializeToString()
        written, found = (OrtSession(model, optimize=o, threads=1).run(ones)["y"] for o in (False, True))
        # without a rounding behind it a convolution stays in float
        saturates = expected and (rounded or KERNELS[kind][0] != "Conv")
        assert (np.abs(found - written).max() > 0.2 * written.max()) == saturates, rounded
        if not saturates:
            np.testing.assert_allclose(found, written, rtol=1e-2)


@pytest.mark.parametrize("kind", KERNELS)
def test_openvino_adds_no_pairs_that_the_table_leaves_out(kind: str) -> None:
    pytest.importorskip("openvino")
    model = product(kind, np.uint8, np.int8, rounded=True)
    ones = {"x": np.ones(KERNELS[kind][1], np.float32)}
    written = OrtSession(model.SerializeToString(), optimize=False, threads=1).run(ones)["y"]
    found = OPENVINO.open(ir.from_proto(model)).run(ones)["y"]
    adds = ADDS_PAIRS[row_of(kind)] and row_of(kind)[1] is not Channels.GREY
    assert (np.abs(found - written).max() > 0.2 * written.max()) == (adds and not has_vnni())


@pytest.mark.parametrize("kind", KERNELS)
def test_rewritten_models_do_not_saturate(tmp_path: Path, kind: str) -> None:
    """Adversarial weights: all as large as the largest, in all their signs; all values of the input are the largest."""
    operator, shape, kernel, attributes = KERNELS[kind]
    weight = np.ones(kernel, np.float32)
    weight[..., 1::2] *= -1 if kernel[-1] > 4 else 1
    nodes = [("Relu", ["x"], "r", {}), (operator, ["r", "w"], "c", attributes), ("Neg", ["c"], "y", {})]
    last = [*shape[:-1], kernel[0 if attributes else 1]]
    if operator == "Conv":
        last = [1, kernel[0], *(n - k + 1 for n, k in zip(shape[2:], kernel[2:], strict=True))]
    graph = build(tmp_path / "m.onnx", nodes, {"x": shape}, ("y", last), {"w": weight})
    device = with_pair_limit(target("ort-cpu"), 128)
    units = split(graph, device, find_heads(graph))
    depth = float(np.prod(kernel)) / last[1 if operator == "Conv" else -1]
    ranges = {"r": (0.0, 1.0), "c": (-depth, depth)}
    made = write_plan(graph, Recipe(units, device, ranges), int8(("c",))).to_bytes()
    ones = {"x": np.ones(shape, np.float32)}
    written, found = (OrtSession(made, optimize=o, threads=1).run(ones)["y"] for o in (False, True))
    np.testing.assert_allclose(found, written, atol=1.01 * 2 * depth / 255)
    exact = OrtSession(graph.model).run(ones)["y"]
    np.testing.assert_allclose(written, exact, atol=0.02 * depth)


@pytest.mark.parametrize("name", ["ort-cpu", "openvino-cpu", "tensorrt"])
@given(
    convolution=weights(3, 4, 2, 2),
    transposed=weights(3, 4, 2, 2),
    multiplier=weights(8, 1, 2, 2),
    product=weights(8, 5),
    rows=weights(4, 5),
    limit=LIMITS,
)
@settings(max_examples=12)
def test_no_two_neighbours_exceed_the_limit(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    convolution: np.ndarray,
    transposed: np.ndarray,
    multiplier: np.ndarray,
    product: np.ndarray,
    rows: np.ndarray,
    limit: int,
) -> None:
    graph = build(
        tmp_path_factory.mktemp("pairs") / "pairs.onnx",
        [
            ("Conv", ["x", "convolution"], "c", {}),
            ("ConvTranspose", ["c", "transposed"], "t", {}),
            ("Conv", ["t", "multiplier"], "d", {"group": 4, "strides": [2, 2]}),
            ("Flatten", ["d"], "f", {}),
            ("MatMul", ["f", "product"], "m", {}),
            ("Gemm", ["m", "rows"], "g", {"transB": 1}),
            ("Neg", ["g"], "y", {}),
        ],
        {"x": [1, 4, 3, 3]},
        ("y", [1, 4]),
        {
            "convolution": convolution,
            "transposed": transposed,
            "multiplier": multiplier,
            "product": product,
            "rows": rows,
        },
    )
    device = with_pair_limit(target(name), limit)
    units = split(graph, device, find_heads(graph))
    chosen = {"c", "t", "d", "m", "g"} & units.able("int8")
    assert {"c", "d", "m", "g"} <= chosen and ("t" in chosen) == (name == "tensorrt")
    ranges = {edge.root: (-1.0, 1.0) for edge in units.edges}
    made = onnx.load_model_from_string(write_plan(graph, Recipe(units, device, ranges), int8(chosen)).to_bytes())
    stored = {i.name: numpy_helper.to_array(i) for i in made.graph.initializer}
    for unit, axis in (("c", 0), ("t", 1), ("d", 0), ("m", 1), ("g", 0)):
        for order in orders(stored[f"{unit}/weight_int8"], axis) if unit in chosen else ():
            assert pair_sums(order).max() <= limit
