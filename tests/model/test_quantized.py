"""Quantized files as the float models that they round. The files come from ONNX Runtime's own tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from tests.models.operators import recurrent

from bitalloy import BitalloyError
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, constant, load_graph
from bitalloy.sensitivity.given import given_columns
from bitalloy.sensitivity.matrix import decibel
from bitalloy.sensitivity.probe import Prober

SIZE = (1, 3, 16, 16)


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=f"{output}_node", **attributes)


def conv_net() -> onnx.ModelProto:
    """Convolutions with Relu, SiLU, a residual Add, a depthwise layer, pools and a last product."""
    r = np.random.default_rng(0)
    weights = {
        "w1": r.normal(size=(16, 3, 3, 3)) * 0.2,
        "b1": r.normal(size=16) * 0.1,
        "w2": r.normal(size=(16, 16, 3, 3)) * 0.1,
        "b2": r.normal(size=16) * 0.1,
        "w3": r.normal(size=(16, 1, 3, 3)) * 0.4,
        "w4": r.normal(size=(16, 10)) * 0.3,
    }
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1] * 4),
        node("Relu", "c1", "r1"),
        node("MaxPool", "r1", "p1", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p1 w2 b2", "c2", pads=[1] * 4),
        node("Sigmoid", "c2", "s2"),
        node("Mul", "c2 s2", "m2"),
        node("Add", "m2 p1", "a2"),
        node("Conv", "a2 w3", "c3", pads=[1] * 4, group=16),
        node("Relu", "c3", "r3"),
        node("GlobalAveragePool", "r3", "g"),
        node("Flatten", "g", "fl"),
        node("MatMul", "fl w4", "y"),
    ]
    return model_of(nodes, weights, [1, 10])


def clip_net() -> onnx.ModelProto:
    """Layers whose range ends at 6, two branches that are joined, and a Gemm."""
    r = np.random.default_rng(1)
    weights = {
        "w1": r.normal(size=(8, 3, 3, 3)),
        "w2": r.normal(size=(8, 8, 1, 1)) * 0.4,
        "w3": r.normal(size=(8, 8, 3, 3)) * 0.1,
        "w4": r.normal(size=(16, 6)) * 0.1,
        "b4": r.normal(size=6),
        "zero": np.zeros(()),
        "six": np.full((), 6.0),
    }
    nodes = [
        node("Conv", "x w1", "c1", pads=[1] * 4, strides=[2, 2]),
        node("Clip", "c1 zero six", "k1"),
        node("Conv", "k1 w2", "c2"),
        node("Conv", "k1 w3", "c3", pads=[1] * 4),
        node("Concat", "c2 c3", "j", axis=1),
        node("GlobalAveragePool", "j", "g"),
        node("Flatten", "g", "fl"),
        node("Gemm", "fl w4 b4", "y"),
    ]
    return model_of(nodes, weights, [1, 6])


def mlp_net() -> onnx.ModelProto:
    """Products with a residual and a softmax."""
    r = np.random.default_rng(2)
    weights = {"w1": r.normal(size=(16, 32)) * 0.2, "w2": r.normal(size=(32, 16)) * 0.2, "w3": r.normal(size=(16, 8))}
    nodes = [
        node("MatMul", "x w1", "h1"),
        node("Relu", "h1", "r1"),
        node("MatMul", "r1 w2", "h2"),
        node("Add", "h2 x", "a2"),
        node("Softmax", "a2", "s3", axis=-1),
        node("MatMul", "s3 w3", "y"),
    ]
    return model_of(nodes, weights, [1, 3, 16, 8])


def model_of(nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SIZE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


NETS: dict[str, Callable[[], onnx.ModelProto]] = {"conv": conv_net, "clip": clip_net, "mlp": mlp_net}
SAMPLES = [np.random.default_rng(100 + i).uniform(0, 1, SIZE).astype(np.float32) for i in range(12)]
FORMS = ("qdq", "signed", "operators", "dynamic")


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._left: Iterator[np.ndarray] = iter(SAMPLES)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._left, None)
        return None if found is None else {"x": found}


def quantized(source: Path, form: str) -> Path:
    path = source.with_name(f"{form}.onnx")
    if form == "dynamic":
        quantize_dynamic(source, path, per_channel=True)
        return path
    quantize_static(
        source,
        path,
        Reader(),
        quant_format=QuantFormat.QOperator if form == "operators" else QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8 if form == "signed" else QuantType.QUInt8,
        extra_options={"ActivationSymmetric": form == "signed"},
    )
    return path


@pytest.fixture(params=NETS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "float.onnx"
    onnx.save(NETS[request.param](), path)
    return path


def outputs(model: Path | bytes, feeds: Sequence[np.ndarray], *, optimize: bool = True) -> np.ndarray:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.stack([session.run(None, {"x": x})[0] for x in feeds])


def with_stored_weights(source: Path, file: Path) -> bytes:
    """The float model, with what the quantized file holds in place of its weights and biases."""
    model, stored = onnx.load(source), {t.name: t for t in onnx.load(file).graph.initializer}
    for tensor in model.graph.initializer:
        numbers = stored.get(f"{tensor.name}_quantized")
        if numbers is None or (tensor.name.startswith("b") and f"{tensor.name}_quantized_scale" not in stored):
            continue  # a bias in steps of two other scales is float here
        names = [f"{tensor.name}{part}" for part in ("_scale", "_zero_point")]
        names = [n if n in stored else f"{tensor.name}_quantized{n.removeprefix(tensor.name)}" for n in names]
        scale, zero = (numpy_helper.to_array(stored[n]) for n in names)
        values = numpy_helper.to_array(numbers).astype(np.float32)
        shape = (-1, *(1,) * (values.ndim - 1)) if values.ndim != 2 else (1, -1)
        if scale.size > 1:
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        if values.ndim == 1:
            scale, zero = scale.reshape(-1), zero.reshape(-1)
        tensor.CopyFrom(numpy_helper.from_array((values - zero.astype(np.float32)) * scale, tensor.name))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("form", FORMS)
def test_the_float_form_is_the_float_model_with_the_stored_weights(source: Path, form: str) -> None:
    file = quantized(source, form)
    graph = load_graph(file)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in graph.nodes}
    assert not any("Q" in n.op_type or "Integer" in n.op_type for n in graph.nodes)
    expected = outputs(with_stored_weights(source, file), SAMPLES)
    assert outputs(graph.to_bytes(), SAMPLES) == pytest.approx(
        expected, rel=1e-4, abs=1e-4 * float(np.abs(expected).max())
    )
    assert graph.quantization
    assert any("quantized" in note for note in graph.changes)


def only(file: Path, kept: str) -> bytes:
    """A QDQ file with the rounding of one tensor alone: the other pairs are taken out, weights stay as stored."""
    model = onnx.load(file)
    constants = {t.name for t in model.graph.initializer}
    for item in model.graph.node:
        if item.op_type == "QuantizeLinear" and not constants.issuperset(item.input) and item.input[0] != kept:
            item.op_type = "Identity"
            del item.input[1:], item.attribute[:]
        if item.op_type == "DequantizeLinear" and item.input[0] not in constants:
            made = next(n for n in model.graph.node if item.input[0] in n.output)
            if made.op_type == "Identity":
                item.op_type = "Identity"
                del item.input[1:], item.attribute[:]
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


def test_each_rounding_is_predicted_as_it_is_executed(source: Path) -> None:
    """Signed grids: no Relu hides in them, so that pairs can be taken out one by one."""
    file = quantized(source, "signed")
    graph = load_graph(file)
    heads = find_heads(graph)
    columns = given_columns(graph)
    prober = Prober(graph, heads, (), beside=columns)
    rows = [prober.measure({"x": x}, sample=i, probes=24, seed=0) for i, x in enumerate(SAMPLES)]
    exact = outputs(graph.to_bytes(), SAMPLES)
    names = {n.input[0] for n in onnx.load(file).graph.node if n.op_type == "QuantizeLinear"}
    compared = [site for site in prober.sites if site in names][:6]
    assert len(compared) >= 4
    for site in compared:
        damage = np.mean([row.damage(row.select([site]))[:, 0] for row in rows])
        rounded = outputs(only(file, site), SAMPLES, optimize=False)
        measured = np.mean(((rounded - exact) ** 2).reshape(len(SAMPLES), -1).sum(1)) / np.mean(
            (exact**2).reshape(len(SAMPLES), -1).sum(1)
        )
        assert float(decibel(damage)) == pytest.approx(float(decibel(measured)), abs=1.0), site


def test_a_tensor_that_is_moved_is_not_rounded_twice(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(conv_net(), path)
    graph = load_graph(quantized(path, "signed"))
    sites = {column.site for column in given_columns(graph)}
    assert {"c1", "g", "y"} <= sites
    assert not {"r1", "p1", "fl"} & sites
    assert {"r1", "p1", "fl"} <= graph.quantization.tensors.keys()


def test_integers_that_come_in_are_dequantized(tmp_path: Path) -> None:
    constants: dict[str, np.ndarray] = {
        "s": np.array(0.5, np.float32),
        "z": np.array(3, np.uint8),
        "w": np.eye(4, dtype=np.float32),
    }
    graph = helper.make_graph(
        [node("DequantizeLinear", "x s z", "d"), node("MatMul", "d w", "y")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    x = np.arange(8, dtype=np.uint8).reshape(2, 4)
    assert outputs(load_graph(path).to_bytes(), [x])[0].tolist() == ((x.astype(np.float32) - 3) * 0.5).tolist()


def test_rows_of_a_stored_table_are_looked_up_as_floats(tmp_path: Path) -> None:
    table = np.arange(20, dtype=np.uint8).reshape(5, 4)
    constants: dict[str, np.ndarray] = {
        "t": table,
        "s": np.array(0.25, np.float32),
        "z": np.array(7, np.uint8),
        "w": np.eye(4).astype("f4"),
    }
    graph = helper.make_graph(
        [node("Gather", "t x", "q"), node("DequantizeLinear", "q s z", "d"), node("MatMul", "d w", "y")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    x = np.array([4, 0, 2])
    assert outputs(load_graph(path).to_bytes(), [x])[0].tolist() == ((table[x].astype(np.float32) - 7) * 0.25).tolist()


def test_weights_that_are_made_of_other_constants_are_rounded_when_the_file_is_read(tmp_path: Path) -> None:
    """A weight in half precision behind a Cast, rounded by a pair of its own."""
    weight = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float16)
    constants: dict[str, np.ndarray] = {"w": weight, "s": np.array(0.02, np.float32), "z": np.array(0, np.int8)}
    graph = helper.make_graph(
        [
            node("Cast", "w", "c", to=TensorProto.FLOAT),
            node("Transpose", "c", "t", perm=[1, 0]),
            node("QuantizeLinear", "t s z", "q"),
            node("DequantizeLinear", "q s z", "d"),
            node("MatMul", "x d", "y"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = load_graph(path)
    assert [n.op_type for n in found.nodes] == ["MatMul"]
    assert not found.quantization.tensors
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    expected = outputs(path, [x], optimize=False)
    np.testing.assert_allclose(outputs(found.to_bytes(), [x]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.UINT8),
            "gives rounded integers",
        ),
        (lambda m: m.graph.node[0].input.__setitem__(1, "x"), "scale that is computed"),
    ],
)
def test_what_has_no_float_form_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], said: str
) -> None:
    constants: dict[str, np.ndarray] = {"s": np.array(0.5, np.float32), "z": np.array(3, np.uint8)}
    graph = helper.make_graph(
        [node("QuantizeLinear", "x s z", "y")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [2, 4])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    change(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(BitalloyError, match=said):
        load_graph(path)


def test_a_float_model_has_no_roundings(source: Path) -> None:
    graph: Graph = load_graph(source)
    assert not graph.quantization
    assert given_columns(graph) == []


@pytest.mark.parametrize("per_channel", [False, True])
def test_matrices_of_an_lstm_are_dequantized(tmp_path: Path, per_channel: bool) -> None:
    """ONNX Runtime's own quantizer stores them transposed; the numbers are those of the float file within a step."""
    source, file = tmp_path / "float.onnx", tmp_path / "dynamic.onnx"
    source.write_bytes(recurrent("LSTM", "bidirectional"))
    quantize_dynamic(source, file, per_channel=per_channel, op_types_to_quantize=["LSTM"])
    assert "DynamicQuantizeLSTM" in {n.op_type for n in onnx.load(file).graph.node}
    found, given = load_graph(file), load_graph(source)
    (lstm,), (wanted,) = ([n for n in g.nodes if n.op_type == "LSTM"] for g in (found, given))
    for slot in (1, 2):
        numbers, exact = (constant(n.inputs[slot]) for n in (lstm, wanted))
        assert numbers is not None and exact is not None and numbers.shape == exact.shape
        step = np.abs(exact).max() / 127
        assert 0 < np.abs(numbers - exact).max() <= step
    shape = [int(d) for d in found.info.inputs[0].shape]
    feeds = [np.random.default_rng(s).standard_normal(shape).astype(np.float32) for s in range(4)]
    wanted_y, found_y = outputs(file, feeds), outputs(found.to_bytes(), feeds)
    error, signal = float(np.square(wanted_y - found_y).sum()), float(np.square(wanted_y).sum())
    assert error > 0 and 10 * np.log10(signal / error) > 25


def test_a_bias_in_whole_steps_becomes_one_of_the_convolution(tmp_path: Path) -> None:
    """Older quantizers add it to the integers, divided by both scales, before these are multiplied."""
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), "wz": np.array(0, np.int8),
        "ws": np.array(0.01, np.float32), "b": rng.standard_normal(4).astype(np.float32),
        "shape": np.array([1, 4, 1, 1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("Mul", "xs ws", "scale"),
        node("Div", "b scale", "steps"),
        node("Floor", "steps", "whole"),
        node("Cast", "whole", "bi", to=TensorProto.INT32),
        node("ConvInteger", "xq w xz wz", "yi"),
        node("Reshape", "bi shape", "br"),
        node("Add", "yi br", "sum"),
        node("Cast", "sum", "yf", to=TensorProto.FLOAT),
        node("Mul", "yf scale", "y"),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    weight = constants["w"].astype(np.float32) * 0.01
    patches = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), (1, 2))
    expected = np.einsum("chwij,ocij->ohw", patches, weight) + constants["b"][:, None, None]
    np.testing.assert_allclose(outputs(load_graph(path).to_bytes(), [x])[0, 0], expected, rtol=1e-4, atol=1e-4)


R = np.random.default_rng(0)
STEPS = R.integers(-127, 128, (16, 16)).astype(np.int8)
FORMS_OF_INTEGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a type without a zero point": (
        """<ir_version: 10, opset_import: ["" : 21]> g (float[4,16] x) => (float[4,16] y) {
        h = MatMul(x, w)  q = QuantizeLinear<output_dtype=3>(h, s)  d = DequantizeLinear(q, s)  y = MatMul(d, w) }""",
        {"s": np.float32(0.2), "w": R.normal(size=(16, 16)).astype(np.float32)},
    ),
    "a stored type without a zero point": (
        """<ir_version: 10, opset_import: ["" : 21]> g (float[4,16] x) => (float[4,16] y) {
        q = QuantizeLinear<output_dtype=3>(w, s)  d = DequantizeLinear(q, s)  y = MatMul(x, d) }""",
        {"s": np.float32(0.05), "w": R.normal(size=(16, 16)).astype(np.float32)},
    ),
    "a scale per channel of an image": (
        """<ir_version: 8, opset_import: ["" : 13]> g (uint8[1,3,3,3] x) => (float[1,4,3,3] y) {
        d = DequantizeLinear<axis=1>(x, s, z)  w = DequantizeLinear(q, t)  y = Conv<pads=[1,1,1,1]>(d, w) }""",
        {
            "s": np.array([0.01, 0.1, 1.0], np.float32), "z": np.array([10, 120, 200], np.uint8),
            "q": R.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), "t": np.float32(0.01),
        },
    ),
    "a scale per row of reshaped numbers": (
        """<ir_version: 8, opset_import: ["" : 13]> g (float[4,16] x) => (float[4,16] y) {
        q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  r = Reshape(n, shape)
        d = DequantizeLinear<axis=0>(r, t)  y = Gemm<transB=1>(a, d) }""",
        {
            "s": np.float32(0.03), "z": np.uint8(128), "n": STEPS.reshape(-1), "shape": np.array([16, 16]),
            "t": (10.0 ** np.linspace(-4, -1, 16)).astype(np.float32),
        },
    ),
    "two scales of one input": (
        """<ir_version: 8, opset_import: ["" : 13]> g (uint8[4,16] x) => (float[4,16] y, float[4,16] v) {
        w = DequantizeLinear(n, t)  a = DequantizeLinear(x, s, z)  b = DequantizeLinear(x, t, z)
        y = MatMul(a, w)  v = MatMul(b, w) }""",
        {"s": np.float32(0.5), "t": np.float32(0.01), "z": np.uint8(128), "n": STEPS},
    ),
    "a scaled product with a bias": (
        """<ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1]> g (float[4,16] x) => (float[4,16] y) {
        q = QuantizeLinear(x, s, z)  y = com.microsoft.QGemm<alpha=0.25>(q, s, z, n, t, zero, c) }""",
        {
            "s": np.float32(0.03), "z": np.uint8(128), "n": STEPS, "t": np.float32(0.01), "zero": np.int8(0),
            "c": R.integers(-9000, 9000, 16).astype(np.int32),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS_OF_INTEGERS)
def test_the_float_form_differs_by_roundings_alone(tmp_path: Path, form: str) -> None:
    text, constants = FORMS_OF_INTEGERS[form]
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    onnx.save(model, tmp_path / "q.onnx")
    (given,) = model.graph.input
    shape = [d.dim_value for d in given.type.tensor_type.shape.dim]
    random = np.random.default_rng(1)
    integers = given.type.tensor_type.elem_type == TensorProto.UINT8
    feeds = random.integers(0, 256, shape).astype(np.uint8) if integers else random.normal(size=shape)
    found = {}
    for name, file in (("file", model.SerializeToString()), ("float", load_graph(tmp_path / "q.onnx").to_bytes())):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        kind = np.uint8 if session.get_inputs()[0].type == "tensor(uint8)" else np.float32
        found[name] = session.run(None, {"x": feeds.astype(kind)})
    for exact, other in zip(found["file"], found["float"], strict=True):
        assert np.square(exact - other).sum() < 1e-3 * np.square(exact).sum()
