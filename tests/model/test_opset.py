"""Models brought to a later version of the ONNX operators compute the same, or are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitalloy.core.errors import ModelError
from bitalloy.model.load import load_graph
from bitalloy.model.opset import raise_opset
from bitalloy.runtime.ort import OrtSession

LEAST = 21
CASES = {
    "mean over axes": "(float[2,3,4,5] x) => (float[2,1,4,1] y) { y = ReduceMean<axes=[1,-1]>(x) }",
    "mean without its axes": "(float[2,3,4,5] x) => (float[2,4] y) { y = ReduceMean<axes=[1,3], keepdims=0>(x) }",
    "mean over all": "(float[2,3,4,5] x) => (float[1,1,1,1] y) { y = ReduceMean(x) }",
    "max over axes": "(float[2,3,4,5] x) => (float[2,3,1,1] y) { y = ReduceMax<axes=[2,3], keepdims=1>(x) }",
    "least of all": "(float[2,3,4,5] x) => (float y) { y = ReduceMin<keepdims=0>(x) }",
    "one constant for each": """(float[2,3,4,5] x) => (float[2,1,1,1] y) {
        a = ReduceMean<axes=[1]>(x)  b = ReduceMax<axes=[2]>(a)  y = ReduceL2<axes=[3]>(b) }""",
    "sum whose axes are an input": """(float[2,3,4,5] x, int64[1] axes) => (float[2,3,1,5] y) {
        y = ReduceSum(x, axes) }""",
    "equal parts": """(float[2,6,4] x) => (float[2,2,4] a, float[2,2,4] b, float[2,2,4] y) {
        a, b, y = Split<axis=1>(x) }""",
    "parts along the first axis": "(float[4,6] x) => (float[2,6] a, float[2,6] y) { a, y = Split(x) }",
    "parts of given sizes": """(float[2,6,4] x, int64[2] sizes) => (float[2,1,4] a, float[2,5,4] y) {
        a, y = Split<axis=1>(x, sizes) }""",
    "convolution": """(float[1,4,8,8] x, float[6,2,3,3] w, float[6] b) => (float[1,6,4,4] y) {
        y = Conv<group=2, pads=[1,1,1,1], strides=[2,2]>(x, w, b) }""",
    "residual": """(float[1,4,8,8] x, float[1,4,1,1] w) => (float[1,4,8,8] y) {
        a = Relu(x)  b = Mul(a, w)  y = Add(b, x) }""",
    "reshape": "(float[2,3,4] x, int64[2] shape) => (float[2,12] y) { y = Reshape(x, shape) }",
    "move": """(float[2,1,3] x, int64[1] axes) => (float[3,2] y) {
        a = Squeeze(x, axes)  y = Transpose<perm=[1,0]>(a) }""",
    "nearest": """(float[1,2,4,4] x, float[4] factors) => (float[1,2,8,8] y) {
        y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric",
        nearest_mode="floor">(x, , factors) }""",
    "linear": """(float[1,2,5,5] x, float[4] factors) => (float[1,2,10,10] y) {
        y = Resize<mode="linear">(x, , factors) }""",
    "cubic": """(float[1,2,5,5] x, float[4] factors) => (float[1,2,10,10] y) {
        y = Resize<mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1>(x, , factors) }""",
    "normalization of batches": """(float[2,3,4,4] x, float[3] w, float[3] b, float[3] mean, float[3] spread)
        => (float[2,3,4,4] y) { y = BatchNormalization<epsilon=0.01>(x, w, b, mean, spread) }""",
    "average": """(float[1,2,7,7] x) => (float[1,2,4,4] y) {
        y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(x) }""",
    "pool with a last window beyond": """(float[1,2,8,8] x) => (float[1,2,4,4] y) {
        a = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)  b = Relu(a)
        y = Add(a, b) }""",
    "padding": """(float[1,2,4] x, int64[6] pads) => (float[1,2,7] y) { y = Pad<mode="reflect">(x, pads) }""",
    "softmax": "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=1>(x) }",
    "types": "(float[2,3] x) => (float[2,3] y) { i = Cast<to=7>(x)  y = Cast<to=1>(i) }",
    "powers": """(float[2,3] x, float[1] w) => (float[2,3] y) {
        a = Abs(x)  b = Pow(a, w)  c = Sigmoid(b)  y = Sub(c, x) }""",
    "choice": "(float[2,3] x, float[2,3] w) => (float[2,3] y) { c = Greater(x, w)  y = Where(c, x, w) }",
}
UNTIL_17 = [case for case, text in CASES.items() if "Reduce" in text and "axes=" in text]
"""From opset 18 on these axes are an input."""
VALUES = {
    "axes": {4: [2], 3: [1]},
    "sizes": [1, 5],
    "shape": [2, -1],
    "factors": [1.0, 1.0, 2.0, 2.0],
    "pads": [0, 0, 1, 0, 0, 2],
    "spread": [0.5, 1.0, 2.0],
}


def build(text: str, opset: int) -> onnx.ModelProto:
    """The model of a text; inputs beside x are constants."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> tiny {" ".join(text.split())}')
    generator = np.random.default_rng(0)
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    for value in list(model.graph.input)[1:]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        given = VALUES.get(value.name, generator.standard_normal(shape))
        array = np.array(given[rank] if isinstance(given, dict) else given)
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(kind), value.name))
        model.graph.input.remove(value)
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    return model


def outputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes, as written."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    return OrtSession(model.SerializeToString(), optimize=False).run(feeds)


@pytest.mark.parametrize(
    ("case", "opset"),
    [(case, opset) for case in CASES for opset in (13, 17, 18) if opset < 18 or case not in UNTIL_17],
)
def test_a_raised_model_computes_the_same(case: str, opset: int, tmp_path: Path) -> None:
    text = CASES[case]
    if opset == 18:  # in this version the number of parts is said
        text = text.replace("Split<axis=1>(x)", "Split<axis=1, num_outputs=3>(x)")
        text = text.replace("Split(x)", "Split<num_outputs=2>(x)")
    before = build(text, opset)
    onnx.checker.check_model(before, full_check=True)
    loaded = ir.serde.deserialize_model(before)
    raise_opset(loaded, LEAST)
    after = ir.serde.serialize_model(loaded)
    assert after.opset_import[0].version == LEAST and after.ir_version == 10
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    expected, found = outputs(before), outputs(after)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        if "AveragePool" in text:  # the runtime has another kernel for it since opset 19, which sums in another order
            np.testing.assert_allclose(found[name], array, rtol=2e-6, atol=2e-7, strict=True)
        else:
            np.testing.assert_array_equal(found[name], array, strict=True)
    # and in normal form, as a plan raises it
    onnx.save(before, tmp_path / "model.onnx")
    normal = load_graph(tmp_path / "model.onnx").clone()
    raise_opset(normal, LEAST)
    proto = ir.serde.serialize_model(normal)
    onnx.checker.check_model(proto, full_check=True)
    for name, array in outputs(proto).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_a_later_model_stays_as_it_is() -> None:
    model = ir.serde.deserialize_model(build(CASES["residual"], 22))
    before = ir.serde.serialize_model(model).SerializeToString()
    raise_opset(model, LEAST)
    assert ir.serde.serialize_model(model).SerializeToString() == before


REFUSED = {
    "GroupNormalization": (
        18,
        """(float[2,4,3,3] x, float[2] w, float[2] b) => (float[2,4,3,3] y) {
            y = GroupNormalization<num_groups=2>(x, w, b) }""",
    ),
    "GridSample": (17, "(float[1,2,4,4] x, float[1,3,3,2] w) => (float[1,2,3,3] y) { y = GridSample(x, w) }"),
    "DFT": (17, "(float[2,4,1] x) => (float[2,4,2] y) { y = DFT(x) }"),
    "RoiAlign": (
        13,
        """(float[1,2,8,8] x, float[1,4] w, int64[1] zero) => (float[1,2,2,2] y) {
            y = RoiAlign<output_height=2, output_width=2>(x, w, zero) }""",
    ),
}
VALUES["zero"] = [0]


@pytest.mark.parametrize("op", REFUSED)
def test_operators_that_changed_are_refused(op: str) -> None:
    """By the name of the node, with what helps; from the version on that changed it, they stay as they are."""
    opset, text = REFUSED[op]
    model = ir.serde.deserialize_model(build(text, opset))
    with pytest.raises(
        ModelError, match=rf"'/y/{op}' \({op}\) means something else in opset 21.*Export the model with"
    ):
        raise_opset(model, LEAST)
    raise_opset(model, opset)
    assert model.opset_imports[""] == opset


def test_axes_have_names_that_no_tensor_has() -> None:
    """Also where the file has a tensor of the name that would be chosen."""
    model = build("(float[2,3] x) => (float[2,1] y) { y = ReduceMean<axes=[1]>(x) }", 17)
    taken = "/y/ReduceMean/axes"
    model.graph.input[0].name = taken
    model.graph.node[0].input[0] = taken
    loaded = ir.serde.deserialize_model(model)
    raise_opset(loaded, LEAST)
    proto = ir.serde.serialize_model(loaded)
    onnx.checker.check_model(proto, full_check=True)
    x = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
    found = OrtSession(proto.SerializeToString()).run({taken: x})["y"]
    np.testing.assert_allclose(found, x.mean(axis=1, keepdims=True), rtol=1e-6)
