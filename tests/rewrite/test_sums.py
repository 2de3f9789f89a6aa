"""Sums of rounded numbers in FP16: the same numbers but for one rounding, executed by ONNX Runtime node by node."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.model.read import constant
from bitalloy.model.weights import to_bytes
from bitalloy.rewrite.cast import as_specified
from bitalloy.rewrite.sums import halve_sums

SHAPES = {"Conv": (1, 8, 9, 9), "MatMul": (2, 5, 8), "Gemm": (5, 8)}
WEIGHTS = {"Conv": (6, 8, 3, 3), "MatMul": (8, 6), "Gemm": (6, 8)}


def product(
    op: str, *, stored: int = TensorProto.INT8, bias: bool = True, offset: int = 0, peak: bool = False
) -> ir.Model:
    """X rounded, times stored weights per channel; `peak` puts the largest number everywhere."""
    random, eight = np.random.default_rng(0), stored == TensorProto.FLOAT8E4M3FN
    top, axis = (448.0, 127.0)[not eight], 1 if op == "MatMul" else 0
    numbers = np.full(WEIGHTS[op], top) if peak else random.uniform(-top, top, WEIGHTS[op])
    if not eight:
        numbers = np.round(numbers)
    zero = [0.0 if eight else offset]
    steps = random.uniform(0.5, 1.5, 6) * (10.0 ** -np.arange(6.0) if not peak else 1e-3)
    constants = [
        helper.make_tensor("w", stored, WEIGHTS[op], numbers.ravel().tolist()),
        helper.make_tensor("zx", stored, [], zero),
        helper.make_tensor("zw", stored, [6], [0.0 if eight else 0] * 6),
        numpy_helper.from_array(np.array(0.013, np.float32), "sx"),
        numpy_helper.from_array(steps.astype(np.float32), "sw"),
        numpy_helper.from_array(random.standard_normal(6).astype(np.float32), "b"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"], name="D"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=axis, name="W"),
        helper.make_node(op, ["d", "dw", *["b"][: bias and op != "MatMul"]], ["s"], name="P"),
        helper.make_node("Identity", ["s"], ["y"], name="I"),
        helper.make_node("Abs", ["d"], ["kept"], name="A"),
    ]
    if op == "Gemm":
        nodes[3].attribute.append(helper.make_attribute("transB", 1))
    shapes = [("x", SHAPES[op])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "kept")],
        [c for c in constants if bias or c.name != "b"],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


def executed(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(to_bytes(as_specified(model)), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


@pytest.mark.parametrize("stored", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_only_the_sums_are_rounded(op: str, stored: int, bias: bool) -> None:
    """To eleven bits of the sum without its bias, which has a size of its own in every channel."""
    x = np.random.default_rng(1).standard_normal(SHAPES[op]).astype(np.float32)
    before, alone = (product(op, stored=stored, bias=b) for b in (bias, False))
    after = before.clone()
    halve_sums(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    made = next(n for n in after.graph if n.op_type == op)
    assert made.outputs[0].dtype == ir.DataType.FLOAT16 and len([v for v in made.inputs if v is not None]) == 2
    (y, kept), (changed, same), (sums, _) = executed(before, x), executed(after, x), executed(alone, x)
    assert np.array_equal(kept, same)
    axes = (0, 2, 3) if op == "Conv" else tuple(range(sums.ndim - 1))
    noise = 3e-6 * np.abs(sums).max(axis=axes, keepdims=True)  # of summing float32 numbers in another order
    assert (np.abs(changed - y) <= np.abs(sums) * 2.0**-11 + noise).all()
    assert (changed != y).any()


@pytest.mark.parametrize("stored", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
def test_the_largest_sum_stays_finite(stored: int) -> None:
    before = product("Conv", stored=stored, peak=True)
    after = before.clone()
    halve_sums(after)
    x = np.full(SHAPES["Conv"], 1e6, np.float32)
    (y, _), (changed, _) = executed(before, x), executed(after, x)
    assert np.isfinite(changed).all() and np.allclose(changed, y, rtol=2.0**-10)
    (scale, *_) = [constant(n.inputs[1]) for n in after.graph if n.outputs[0].dtype == ir.DataType.FLOAT16]
    assert scale is not None and np.log2(float(scale)).is_integer()


def test_what_is_not_symmetric_or_not_rounded_stays() -> None:
    for model in (product("Conv", offset=3), product("Gemm")):
        if model.graph[3].op_type == "Gemm":
            model.graph[3].attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
        before = [n.name for n in model.graph]
        halve_sums(model)
        assert [n.name for n in model.graph] == before
