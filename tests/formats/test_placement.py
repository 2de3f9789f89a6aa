"""Where `tensorrt` and `ort-cuda` put Q, DQ and Cast: a golden text graph per numbered case.

To write the files again after a deliberate change: `python -m tests.formats.test_placement` from the repository.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.formats.micro import build, text_of

from bitalloy.apply import apply
from bitalloy.errors import BitalloyError
from bitalloy.graph import Graph
from bitalloy.halving import specified
from bitalloy.heads import find_heads
from bitalloy.records import HALF, Precision, UnitGraph
from bitalloy.runtime import OrtSession
from bitalloy.targets import ORT_CUDA, TENSORRT, Target
from bitalloy.targets.base import split

GOLDEN = Path(__file__).parent / "golden"
PAD = {"pads": [1, 1, 1, 1]}


def conv_bn_activation(path: Path) -> Graph:
    ones = np.ones(4)
    nodes = [
        ("Conv", ("x", "w1", "b1"), "c1", PAD),
        ("BatchNormalization", ("c1", "gamma", "beta", "mean", "var"), "n1", {}),
        ("Sigmoid", ("n1",), "s1", {}),
        ("Mul", ("n1", "s1"), "a1", {}),
        ("Conv", ("a1", "w2"), "c2", PAD),
        ("Relu", ("c2",), "y", {}),
    ]
    weights = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "gamma": ones, "beta": ones, "mean": ones}
    return build(path, nodes, {"x": (1, 3, 8, 8)}, ("y", (1, 4, 8, 8)), {**weights, "var": ones})


def residual(path: Path) -> Graph:
    nodes = [
        ("Conv", ("x", "w1"), "c1", PAD),
        ("Relu", ("c1",), "r1", {}),
        ("Conv", ("r1", "w2"), "c2", PAD),
        ("Add", ("c2", "r1"), "sum", {}),
        ("Relu", ("sum",), "r2", {}),
        ("Conv", ("r2", "w3"), "y", PAD),
    ]
    weights = {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "w3": (4, 4, 3, 3)}
    return build(path, nodes, {"x": (1, 3, 8, 8)}, ("y", (1, 4, 8, 8)), weights)


def attention(path: Path) -> Graph:
    nodes = [
        ("MatMul", ("q", "k"), "qk", {}),
        ("Mul", ("qk", "scale"), "scaled", {}),
        ("Softmax", ("scaled",), "p", {"axis": -1}),
        ("MatMul", ("p", "v"), "y", {}),
    ]
    shapes = {"q": (1, 2, 6, 4), "k": (1, 2, 4, 6), "v": (1, 2, 6, 4)}
    return build(path, nodes, shapes, ("y", (1, 2, 6, 4)), {"scale": np.array(0.5)})


def concat(path: Path) -> Graph:
    nodes = [
        ("Conv", ("x", "w1"), "c1", PAD),
        ("Conv", ("x", "w2"), "c2", PAD),
        ("Concat", ("c1", "c2"), "cat", {"axis": 1}),
        ("MaxPool", ("cat",), "m", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Conv", ("m", "w3"), "y", PAD),
    ]
    weights = {"w1": (4, 3, 3, 3), "w2": (4, 3, 3, 3), "w3": (4, 8, 3, 3)}
    return build(path, nodes, {"x": (1, 3, 8, 8)}, ("y", (1, 4, 4, 4)), weights)


def matmul_gelu(path: Path) -> Graph:
    nodes = [
        ("MatMul", ("x", "w1"), "m1", {}),
        ("Add", ("m1", "b1"), "a1", {}),
        ("Div", ("a1", "root"), "d", {}),
        ("Erf", ("d",), "e", {}),
        ("Add", ("e", "one"), "e1", {}),
        ("Mul", ("a1", "e1"), "g", {}),
        ("Mul", ("g", "half"), "h", {}),
        ("MatMul", ("h", "w2"), "m2", {}),
        ("Add", ("m2", "b2"), "y", {}),
    ]
    weights = {"w1": (4, 8), "b1": (8,), "w2": (8, 4), "b2": (4,), "root": np.array(2**0.5), "one": np.array(1.0)}
    return build(path, nodes, {"x": (1, 5, 4)}, ("y", (1, 5, 4)), {**weights, "half": np.array(0.5)})


def transposed(path: Path) -> Graph:
    nodes = [
        ("ConvTranspose", ("x", "w1", "b1"), "t", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Flatten", ("t",), "f", {}),
        ("Gemm", ("f", "w2", "b2"), "y", {"transB": 1}),
    ]
    weights = {"w1": (3, 4, 2, 2), "b1": (4,), "w2": (5, 64), "b2": (5,)}
    return build(path, nodes, {"x": (1, 3, 2, 2)}, ("y", (1, 5)), weights)


Plan = Callable[[UnitGraph], frozenset[str]]
CASES: dict[str, tuple[Target, Callable[[Path], Graph], Plan]] = {
    "tensorrt-1-conv-bn-activation": (TENSORRT, conv_bn_activation, UnitGraph.quantizable),
    "tensorrt-1-transposed-gemm": (TENSORRT, transposed, UnitGraph.quantizable),
    "tensorrt-2-residual": (TENSORRT, residual, UnitGraph.quantizable),
    "tensorrt-3-attention": (TENSORRT, attention, UnitGraph.lowest),
    "tensorrt-4-concat": (TENSORRT, concat, UnitGraph.lowest),
    "tensorrt-5-matmul-bias-gelu": (TENSORRT, matmul_gelu, UnitGraph.lowest),
    "tensorrt-6-half-beside-int8": (TENSORRT, residual, lambda units: frozenset({"c1", f"c2{HALF}", "y"})),
    "ort-cuda-1-half": (ORT_CUDA, concat, UnitGraph.lowest),
}


def rewritten(name: str, folder: Path) -> tuple[Graph, UnitGraph, frozenset[str], object]:
    target, make, plan = CASES[name]
    graph = make(folder / f"{name}.onnx")
    units = split(graph, target, find_heads(graph))
    ranges = {tensor: (-4.0, 4.0) for tensor in graph.value}
    return graph, units, plan(units), apply(graph, units, plan(units), ranges, target).model


@pytest.mark.parametrize("name", CASES)
def test_text_graph_is_the_golden_one(name: str, tmp_path: Path) -> None:
    *_, model = rewritten(name, tmp_path)
    assert text_of(model) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CASES)
def test_rewritten_model_is_valid_and_close_to_float(name: str, tmp_path: Path) -> None:
    """Shape and type inference of ONNX agrees with the graph, and the numbers are those of the float model, rounded."""
    graph, _, plan, model = rewritten(name, tmp_path)
    proto = onnx.load_model_from_string(apply_bytes(model))
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    assert plan
    rng = np.random.default_rng(1)
    feeds = {v.name: rng.standard_normal([int(d) for d in v.shape]).astype(np.float32) for v in graph.info.inputs}
    exact, found = OrtSession(graph.model).run(feeds)["y"], OrtSession(specified(model)).run(feeds)["y"]
    assert found.dtype == np.float32
    noise = np.square(found - exact).sum() / np.square(exact).sum()
    assert 1e-9 < noise < 2e-2


def apply_bytes(model: object) -> bytes:
    from bitalloy.weights import to_bytes

    return to_bytes(model)  # type: ignore[arg-type]


def test_int8_of_tensorrt_is_symmetric_and_biases_stay_float(tmp_path: Path) -> None:
    for name in ("tensorrt-1-conv-bn-activation", "tensorrt-1-transposed-gemm", "tensorrt-2-residual"):
        *_, model = rewritten(name, tmp_path)
        proto = onnx.load_model_from_string(apply_bytes(model))
        values = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
        rounding = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert rounding
        for node in rounding:
            zero = values[node.input[2]]
            assert zero.dtype == np.int8 and not zero.any()
        assert not any(v.dtype == np.int32 for v in values.values())


def test_cuda_has_no_int8(tmp_path: Path) -> None:
    graph = concat(tmp_path / "m.onnx")
    units = split(graph, ORT_CUDA, find_heads(graph))
    assert not units.quantizable()
    with pytest.raises(BitalloyError, match=r"'c1' in INT8.*no INT8 kernels"):
        apply(graph, units, frozenset({"c1"}), {}, ORT_CUDA)
    with pytest.raises(BitalloyError, match="one precision"):
        both = split(graph, TENSORRT, find_heads(graph))
        apply(graph, both, frozenset({"c1", f"c1{HALF}"}), {}, TENSORRT)


def test_residual_operand_that_fuses_is_the_later_one(tmp_path: Path) -> None:
    """Of Conv -> Conv -> Add the second Conv runs with the Add; the other operand carries the pair."""
    graph = residual(tmp_path / "m.onnx")
    units = split(graph, TENSORRT, find_heads(graph))
    add = next(u for u in units.units if u.kind == "Add")
    assert Precision.INT8 in add.allowed and add.core == ("sum", "r2")
    assert units.rounded(frozenset({add.id})) == {"r1->sum"}


if __name__ == "__main__":
    import tempfile

    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{case}.txt").write_text(text_of(rewritten(case, Path(folder))[-1]))  # type: ignore[arg-type]
