"""Loading: what is refused and how it is said, how shapes are bound, and that the normal form computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, static_shape

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
YOLO = DATA / "models" / "yolo11n.onnx"
PROPERTY = settings(max_examples=15)
Array = np.ndarray[Any, Any]
Dims = Sequence[int | str | None]
node = helper.make_node


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Dims | None],
    outputs: Sequence[str] = ("y",),
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    ranks: int | None = None,
) -> onnx.ModelProto:
    shape = [None] * ranks if ranks is not None else None
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, kind, shape) for n in outputs],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def relu(**given: Any) -> onnx.ModelProto:
    return build([node("Relu", ["x"], ["y"])], {"x": [1, 3]}, **given)


Save = Callable[[onnx.ModelProto], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(model: onnx.ModelProto) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def run(model: bytes, feeds: Mapping[str, Array], *, optimize: bool = False) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds)))


def same(path: Path, net: Graph, feeds: Mapping[str, Array], tolerance: float = 1e-5) -> None:
    """The normal form is valid and well-formed, and computes what the file computes."""
    onnx.checker.check_model(net.to_bytes(), full_check=True)
    names = [n.name for n in net.nodes]
    assert len(set(names)) == len(names) and all(names)
    assert not {"Constant", "Dropout"} & {n.op_type for n in net.nodes}
    for n in net.nodes:
        for value in n.outputs:
            if value.name:
                static_shape(value)
    original = onnx.load_from_string(path.read_bytes())
    assert [o.name for o in original.graph.output] == list(net.output_names)
    for n in original.graph.node:
        n.ClearField("name")  # the runtime refuses two nodes of one name
    for expected, got in zip(run(original.SerializeToString(), feeds), run(net.to_bytes(), feeds), strict=True):
        assert expected.dtype == got.dtype
        np.testing.assert_allclose(
            got, expected, rtol=tolerance, atol=tolerance * float(np.abs(expected).max(initial=0))
        )


def ops(net: Graph) -> list[str]:
    return [n.op_type for n in net.nodes]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", range(13, 24))
def test_supported_opsets(save: Save, opset: int) -> None:
    path = save(relu(opset=opset, ranks=2))
    net = graph.load_graph(path)
    assert net.info.opset == opset
    same(path, net, {"x": normal(1, 3)})


@pytest.mark.parametrize(("opset", "read"), [(7, 13), (9, 13), (12, 13), (24, 23)])
def test_older_and_newer_opsets_are_converted(save: Save, opset: int, read: int) -> None:
    path = save(relu(opset=opset, ranks=2))
    net = graph.load_graph(path)
    assert net.info.opset == read
    assert any(f"opset {opset}" in note for note in net.changes)
    same(path, net, {"x": normal(1, 3)})


@pytest.mark.parametrize("opset", [1, 6, 99, 2**40])
def test_other_opsets_are_refused(save: Save, opset: int) -> None:
    with pytest.raises(ModelError, match=f"opset {opset}; supported are 7 to 23"):
        graph.load_graph(save(relu(opset=opset)))


def test_the_long_name_of_the_default_domain(save: Save) -> None:
    model = relu(ranks=2)
    model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"
    assert graph.load_graph(save(model)).info.opset == 17


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no.onnx", tmp_path):
        with pytest.raises(ModelError, match=r"No model file at .*bitalloy models"):
            graph.load_graph(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04" + bytes(100), bytes(1000), b"\xff" * 64, b"\x08\x08", b"{}\n" * 50]
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"not an ONNX file|holds no ONNX graph"):
        graph.load_graph(path)


@PROPERTY
@given(share=st.floats(0, 0.999))
def test_truncated_file(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    w = normal(8, 3, 3, 3)
    model = build([node("Conv", ["x", "w"], ["y"])], {"x": [1, 3, 8, 8]}, constants={"w": w}, ranks=4)
    data = model.SerializeToString()
    path = tmp_path_factory.mktemp("cut") / "model.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"truncated|holds no ONNX graph"):
        graph.load_graph(path)


@PROPERTY
@given(place=st.floats(0, 0.999), value=st.integers(0, 255))
def test_damaged_file_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, place: float, value: int) -> None:
    """Any single byte may change: the answer is a model or a ModelError, never another exception."""
    data = bytearray(relu(ranks=2).SerializeToString())
    data[int(len(data) * place)] = value
    path = tmp_path_factory.mktemp("bad") / "model.onnx"
    path.write_bytes(data)
    try:
        graph.load_graph(path)
    except ModelError as error:
        assert "Traceback" not in str(error)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(relu(ranks=2).SerializeToString().replace(b"Relu", b"\xff\xfe\xff\xfe"))
    with pytest.raises(ModelError, match=r"is damaged: a name is not text|not valid"):
        graph.load_graph(path)


def test_invalid_graph(save: Save) -> None:
    model = relu()
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelError, match=r"not valid ONNX.*nowhere") as caught:
        graph.load_graph(save(model))
    assert "Traceback" not in str(caught.value)


def test_unknown_operator(save: Save) -> None:
    with pytest.raises(ModelError, match=r"not valid ONNX.*NoSuchOp"):
        graph.load_graph(save(build([node("NoSuchOp", ["x"], ["y"])], {"x": [1, 3]})))


def test_custom_domain(save: Save) -> None:
    model = build([node("Inverse", ["x"], ["y"], domain="com.microsoft", name="g")], {"x": [1, 3]})
    model.opset_import.add(domain="com.microsoft", version=1)
    with pytest.raises(ModelError, match=r"domain 'com.microsoft'.*node 'g' \(Inverse\)"):
        graph.load_graph(save(model))
    unused = relu(ranks=2)
    unused.opset_import.add(domain="com.microsoft", version=1)
    graph.load_graph(save(unused))


def test_control_flow(save: Save) -> None:
    inside = helper.make_graph(
        [
            node("Mul", ["s", "s"], ["t"]),
            node("ReduceMax", ["t"], ["m"], keepdims=0),
            node("Less", ["m", "far"], ["on1"]),
        ],
        "turns",
        [
            helper.make_tensor_value_info("turn", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", 1, [1, 3]),
        ],
        [
            helper.make_tensor_value_info("on1", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", 1, [1, 3]),
        ],
    )
    turns = node("Loop", ["", "yes", "x"], ["y"], body=inside, name="turns")
    model = build([turns], {"x": [1, 3]}, constants={"yes": np.array(True), "far": np.array(9, np.float32)})
    with pytest.raises(ModelError, match=r"Control flow.*node 'turns' \(Loop\)"):
        graph.load_graph(save(model))


def test_random_numbers_and_training_mode(save: Save) -> None:
    with pytest.raises(ModelError, match=r"random numbers.*evaluation mode"):
        graph.load_graph(save(build([node("RandomNormalLike", ["x"], ["y"])], {"x": [1, 3]})))
    terms = {n: np.ones(3, np.float32) for n in "sbmv"}
    norm = node("BatchNormalization", ["x", *"sbmv"], ["y", "m2", "v2"], training_mode=1)
    with pytest.raises(ModelError, match=r"training mode.*BatchNormalization"):
        graph.load_graph(save(build([norm], {"x": [1, 3, 4]}, constants=terms)))
    drop = build([node("Dropout", ["x", "r", "t"], ["y"], name="drop")], {"x": [1, 3]}, ranks=2,
                 constants={"r": np.array(0.5, np.float32), "t": np.array(True)})  # fmt: skip
    with pytest.raises(ModelError, match=r"training mode.*'drop'"):
        graph.load_graph(save(drop))
    masked = build([node("Dropout", ["x"], ["y", "mask"], name="masked")], {"x": [1, 3]}, ranks=2)
    masked.graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 3]))
    with pytest.raises(ModelError, match=r"training mode.*'masked'"):
        graph.load_graph(save(masked))


def test_a_cast_like_another_tensor_is_a_cast(save: Save) -> None:
    nodes = [node("CastLike", ["x", "i"], ["c"]), node("CastLike", ["c", "x"], ["y"])]
    path = save(build(nodes, {"x": [1, 3]}, ranks=2, constants={"i": np.array(0, np.int32)}))
    net = graph.load_graph(path)
    assert [(n.op_type, graph.attribute(n, "to", None)) for n in net.nodes] == [("Cast", 6), ("Cast", 1)]
    same(path, net, {"x": normal(1, 3) * 5})


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_other_precisions_at_the_border(save: Save, kind: int) -> None:
    net = graph.load_graph(save(relu(kind=kind)))
    assert [n.op_type for n in net.nodes] == ["Cast", "Relu", "Cast"]
    assert {v.dtype for v in (*net.model.graph.inputs, *net.model.graph.outputs)} == {ir.DataType(kind)}


def test_half_precision_inside(save: Save) -> None:
    nodes = [
        node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        node("Relu", ["h"], ["r"], name="half"),
        node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    net = graph.load_graph(save(build(nodes, {"x": [1, 3]}, ranks=2)))
    assert {v.dtype for n in net.nodes for v in n.outputs} == {ir.DataType.FLOAT}


def test_sequences_and_sparse_weights(save: Save) -> None:
    model = relu()
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    model.graph.input.append(helper.make_value_info("s", helper.make_sequence_type_proto(kind)))
    with pytest.raises(ModelError, match="'s' is not a tensor"):
        graph.load_graph(save(model))
    model = relu()
    values, indices = helper.make_tensor("w", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    with pytest.raises(ModelError, match="sparse"):
        graph.load_graph(save(model))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(save: Save, value: float) -> None:
    w = normal(3, 3)
    w[1, 1] = value
    with pytest.raises(ModelError, match="Weight 'w' holds NaN or infinite"):
        graph.load_graph(save(build([node("MatMul", ["x", "w"], ["y"])], {"x": [1, 3]}, constants={"w": w}, ranks=2)))


def test_infinite_masks_are_allowed(save: Save) -> None:
    mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
    nodes = [node("Add", ["x", "mask"], ["a"]), node("Softmax", ["a"], ["y"])]
    path = save(build(nodes, {"x": [3, 3]}, constants={"mask": mask}, ranks=2))
    same(path, graph.load_graph(path), {"x": normal(3, 3)})
    mask[0, 0] = np.nan
    with pytest.raises(ModelError, match="'mask' holds NaN"):
        graph.load_graph(save(build(nodes, {"x": [3, 3]}, constants={"mask": mask}, ranks=2)))


def test_an_output_that_depends_on_no_input(save: Save) -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Exp", ["c"], ["z"])]
    with pytest.raises(ModelError, match=r"Output 'z' does not depend on any input.*without this output"):
        graph.load_graph(save(build(nodes, {"x": [1, 3]}, ["y", "z"], {"c": normal(2)}, ranks=None)))


# --- external data -----------------------------------------------------------------------------------------------


def external(folder: Path, location: str = "weights.bin", content: bytes | None = None) -> Path:
    """A model whose weight lies in `location`; `content` is written there when given."""
    w = normal(3, 3)
    model = build([node("MatMul", ["x", "w"], ["y"])], {"x": [1, 3]}, constants={"w": w}, ranks=2)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(w.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    if content is not None:
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


def test_external_data(tmp_path: Path) -> None:
    content = normal(3, 3).tobytes()
    path = external(tmp_path, "parts/weights.bin", content)
    net = graph.load_graph(path)
    np.testing.assert_array_equal(constant(net.value["w"]), normal(3, 3))
    assert net.info.size_bytes == path.stat().st_size + len(content)
    (tmp_path / "parts" / "weights.bin").write_bytes(normal(3, 3, seed=2).tobytes())
    changed = graph.load_graph(path)
    assert changed.info.sha256 != net.info.sha256


def test_missing_external_data(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'w'.*'weights.bin', which is missing. Copy it beside the model"):
        graph.load_graph(external(tmp_path))


def test_external_data_that_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"external data.*cannot be read|not valid|cannot be read") as caught:
        graph.load_graph(external(tmp_path, content=b"123"))
    assert "Traceback" not in str(caught.value)


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", tmp_path / "secret.bin"
    inside.mkdir()
    outside.write_bytes(normal(3, 3).tobytes())
    (inside / "link.bin").symlink_to(outside)
    (inside / "folder").symlink_to(tmp_path)
    for location in ("../secret.bin", str(outside), "link.bin", "folder/secret.bin", "parts/../../secret.bin", ""):
        with pytest.raises(ModelError, match=r"'w'.*leads outside of.*beside it"):
            graph.load_graph(external(inside, location))


# --- shapes ------------------------------------------------------------------------------------------------------


def test_the_batch_is_bound_to_one(save: Save) -> None:
    net = graph.load_graph(save(build([node("Relu", ["x"], ["y"])], {"x": ["batch", 3, 4]}, ranks=3)))
    assert net.info.inputs[0].shape == net.info.outputs[0].shape == (1, 3, 4)
    assert graph.load_graph(net.source, shapes={"x": (5, 3, 4)}).info.outputs[0].shape == (5, 3, 4)


@pytest.mark.parametrize("size", ["height", None])
def test_symbolic_shapes_need_a_size(save: Save, size: str | None) -> None:
    path = save(build([node("Relu", ["x"], ["y"])], {"x": ["n", 3, size]}, ranks=3))
    with pytest.raises(ModelError, match=r"'x' has symbolic shape nx3x.*--shape x=nx3x"):
        graph.load_graph(path)
    assert graph.load_graph(path, shapes={"x": (1, 3, 7)}).info.outputs[0].shape == (1, 3, 7)


def test_named_dimensions_are_shared(save: Save) -> None:
    nodes = [node("MatMul", ["x", "z"], ["y"])]
    path = save(build(nodes, {"x": ["n", "k"], "z": ["k", "m"]}, ranks=2))
    net = graph.load_graph(path, shapes={"z": (4, 5)})
    assert [s.shape for s in (*net.info.inputs, *net.info.outputs)] == [(1, 4), (4, 5), (1, 5)]


def test_names_that_sizes_contradict_are_no_names(save: Save) -> None:
    nodes = [node("ReduceMax", ["z"], ["m"], keepdims=0), node("Add", ["x", "m"], ["y"])]
    path = save(build(nodes, {"x": ["n", "k"], "z": ["n", "k"]}, ranks=2))
    net = graph.load_graph(path, shapes={"x": (1, 3), "z": (1, 5)})
    assert [s.shape for s in (*net.info.inputs, *net.info.outputs)] == [(1, 3), (1, 5), (1, 3)]
    assert [i.shape for i in net.declared] == [("n", "?"), ("n", "?")]
    assert any("dimension 'k' in common, but not its size" in note for note in net.changes)


def test_an_input_without_a_shape(save: Save) -> None:
    path = save(build([node("Relu", ["x"], ["y"])], {"x": None}))
    with pytest.raises(ModelError, match=r"'x' has no shape. Add --shape x="):
        graph.load_graph(path)
    assert graph.load_graph(path, shapes={"x": (2, 3)}).info.outputs[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "No input called .'z'.*'x'"),
        ({"x": (1, 3)}, "has 3 dimensions, but the shape"),
        ({"x": (1, 4, 4)}, "fixed to 3 on axis 1, but 4 was given"),
        ({"x": (-1, 3, 2)}, "no size may be negative"),
    ],
)
def test_shapes_that_do_not_fit(save: Save, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        graph.load_graph(save(build([node("Relu", ["x"], ["y"])], {"x": ["n", 3, "w"]}, ranks=3)), shapes=shapes)


def test_shapes_that_cannot_work(save: Save) -> None:
    path = save(build([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", "k"]}, constants={"w": normal(3, 4)}, ranks=2))
    with pytest.raises(ModelError, match="ONNX Runtime cannot run the model") as caught:
        graph.load_graph(path, shapes={"x": (1, 7)})
    assert "Traceback" not in str(caught.value)


def test_errors_print_nothing(save: Save) -> None:
    model = build([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 7]}, constants={"w": normal(3, 4)}, ranks=2)
    code = (
        "import sys; from bitalloy.core import errors; from bitalloy.model import load as graph\n"
        "try: graph.load_graph(sys.argv[1])\n"
        "except errors.ModelError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, save(model)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_weights_listed_as_inputs(save: Save) -> None:
    model = build(
        [node("MatMul", ["x", "w"], ["y"])], {"x": [1, 3], "w": [3, 3]}, constants={"w": normal(3, 3)}, ranks=2
    )
    net = graph.load_graph(save(model))
    assert net.input_names == ("x",) and len(net.info.inputs) == 1


def test_outputs_without_a_shape(save: Save) -> None:
    path = save(relu())
    assert graph.load_graph(path).info.outputs[0].shape == (1, 3)


def test_stale_shapes_in_the_file_are_ignored(save: Save) -> None:
    model = build([node("Relu", ["x"], ["m"]), node("Exp", ["m"], ["y"])], {"x": ["n", 3]}, ranks=2)
    model.graph.value_info.append(helper.make_tensor_value_info("m", 1, [8, 3]))
    net = graph.load_graph(save(model))
    assert static_shape(net.value["m"]) == (1, 3)


# --- the normal form ---------------------------------------------------------------------------------------------


def test_names_are_unique_and_kept(save: Save) -> None:
    nodes = [
        node("Relu", ["x"], ["b"], name="a"),
        node("Exp", ["b"], ["later"]),
        node("Neg", ["later"], ["d"], name="a"),
        node("Abs", ["d"], ["e"], name="later"),
        node("Tanh", ["e"], ["y"], name="a_1"),
    ]
    path = save(build(nodes, {"x": [1, 3]}, ranks=2))
    net = graph.load_graph(path)
    assert [n.name for n in net.nodes] == ["a", "later_1", "a_2", "later", "a_1"]
    assert net.node["later"].op_type == "Abs"
    same(path, net, {"x": normal(1, 3)})


def test_nodes_are_sorted_and_dead_ones_removed(save: Save) -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("Exp", ["x"], ["dead"]), node("Neg", ["r"], ["y"])]
    path = save(build(nodes, {"x": [1, 3]}, constants={"unused": normal(3)}, ranks=2))
    net = graph.load_graph(path)
    assert ops(net) == ["Relu", "Neg"]
    assert not net.model.graph.initializers


def test_identities_and_dropout(save: Save) -> None:
    nodes = [
        node("Identity", ["x"], ["i"]),
        node("Dropout", ["i"], ["d", "mask"]),
        node("Relu", ["d"], ["r"], name="relu"),
        node("Dropout", ["r", "ratio"], ["y"]),
        node("Identity", ["y"], ["z"]),
        node("Identity", ["x"], ["same"]),
        node("Dropout", ["x"], ["kept"]),
    ]
    outputs = ["y", "z", "same", "kept"]
    path = save(build(nodes, {"x": [1, 3]}, outputs, {"ratio": np.array(0.5, np.float32)}, ranks=2))
    net = graph.load_graph(path)
    assert sorted(ops(net)) == ["Identity", "Identity", "Identity", "Relu"]
    assert net.node["relu"].outputs[0].name == "y"
    same(path, net, {"x": normal(1, 3)})


def test_constants_become_initializers(save: Save) -> None:
    nodes = [
        node("Constant", [], ["c"], value=numpy_helper.from_array(normal(3))),
        node("Constant", [], ["f"], value_float=2.0),
        node("Constant", [], ["i"], value_ints=[3, 1]),
        node("Add", ["x", "c"], ["a"]),
        node("Mul", ["a", "f"], ["m"]),
        node("Reshape", ["m", "i"], ["y"]),
    ]
    path = save(build(nodes, {"x": [1, 3]}, ranks=2))
    net = graph.load_graph(path)
    assert ops(net) == ["Add", "Mul", "Reshape"]
    same(path, net, {"x": normal(1, 3)})


def test_half_precision_weights_are_widened(save: Save) -> None:
    nodes = [node("Cast", ["h"], ["w"], to=TensorProto.FLOAT), node("MatMul", ["x", "w"], ["y"])]
    path = save(build(nodes, {"x": [1, 3]}, constants={"h": normal(3, 2).astype(np.float16)}, ranks=2))
    net = graph.load_graph(path)
    assert ops(net) == ["MatMul"]
    weight = constant(net.nodes[0].inputs[1])
    assert weight is not None and weight.dtype == np.float32
    assert net.info.parameters == 6
    same(path, net, {"x": normal(1, 3)})


def test_shape_arithmetic_is_folded(save: Save) -> None:
    """As torch exports `x.view(x.size(0), -1, x.size(2) // 2, 2)` and an interpolation to the size of another map."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Gather", ["s", "two"], ["h"]),
        node("Div", ["h", "two"], ["half"]),
        *(node("Unsqueeze", [v, "axis"], [f"{v}u"]) for v in ("n", "half")),
        node("Concat", ["nu", "minus", "halfu", "pair"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["v"]),
        node("Shape", ["v"], ["vs"], start=2),
        node("Size", ["v"], ["count"]),
        node("Cast", ["count"], ["total"], to=TensorProto.FLOAT),
        node("Slice", ["s", "start", "end"], ["front"]),
        node("Concat", ["front", "vs"], ["sizes"], axis=0),
        node("Resize", ["x", "", "", "sizes"], ["r"], mode="nearest"),
        node("ReduceMean", ["r"], ["mean"], axes=[2, 3], keepdims=1),
        node("Div", ["mean", "total"], ["y"]),
    ]
    constants = {
        "zero": np.array(0), "two": np.array(2), "axis": np.array([0]), "minus": np.array([-1]), "pair": np.array([2]),
        "start": np.array([0]), "end": np.array([2]),
    }  # fmt: skip
    path = save(build(nodes, {"x": ["n", 3, "h", "w"]}, constants=constants, ranks=4))
    net = graph.load_graph(path, shapes={"x": (2, 3, 4, 6)})
    assert ops(net) == ["Resize", "ReduceMean", "Div"]
    same(path, net, {"x": normal(2, 3, 4, 6)})


def test_long_chains_of_shapes_are_folded(save: Save) -> None:
    """Every shape becomes known only when the one before it has been folded."""
    nodes, last = [], "x"
    for i in range(9):
        nodes += [
            node("Shape", [last], [f"s{i}"]),
            node("Cast", [f"s{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            node("Ceil", [f"f{i}"], [f"c{i}"]),
            node("Cast", [f"c{i}"], [f"t{i}"], to=TensorProto.INT64),
            node("Reshape", [last, f"t{i}"], [f"r{i}"]),
            node("Relu", [f"r{i}"], [f"x{i}"]),
        ]
        last = f"x{i}"
    nodes[-1].output[0] = "y"
    path = save(build(nodes, {"x": [2, 3]}, ranks=2))
    net = graph.load_graph(path)
    assert ops(net) == ["Reshape", "Relu"] * 9
    same(path, net, {"x": normal(2, 3)})


def test_shapes_that_only_the_runtime_knows(save: Save) -> None:
    """A window of two columns at a computed place."""
    nodes = [
        node("ReduceMax", ["x"], ["top"], axes=[0, 1], keepdims=0),
        node("Cast", ["top"], ["place"], to=TensorProto.INT64),
        node("Reshape", ["place", "one"], ["start"]),
        node("Add", ["start", "two"], ["end"]),
        node("Slice", ["x", "start", "end", "one"], ["y"]),
    ]
    constants = {"one": np.array([1]), "two": np.array([2])}
    path = save(build(nodes, {"x": [1, 3]}, constants=constants, ranks=2))
    assert graph.load_graph(path).info.outputs[0].shape == (1, 2)  # found on zeros


def test_a_selection_from_inputs_alone_is_refused(save: Save) -> None:
    nodes = [node("NonZero", ["x"], ["where"]), node("Cast", ["where"], ["y"], to=TensorProto.FLOAT)]
    with pytest.raises(ModelError, match=r"how many rows 'y' has.*ahead of the selection"):
        graph.load_graph(save(build(nodes, {"x": [1, 3]}, ranks=2)))


def test_text_is_refused(save: Save) -> None:
    nodes = [node("StringNormalizer", ["x"], ["z"]), node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)]
    with pytest.raises(ModelError, match=r"input 'x' is text.*expected numbers"):
        graph.load_graph(save(build(nodes, {"x": [4]}, kind=TensorProto.STRING)))


def test_outputs_beside_a_selection_stay_heads(save: Save) -> None:
    """The selected rows are told by the scores; the rows that are an output themselves need no second place."""
    nodes = [
        node("Relu", ["x"], ["rows"]),
        node("ReduceMax", ["rows"], ["scores"], axes=[1], keepdims=0),
        node("Greater", ["scores", "least"], ["mask"]),
        node("Compress", ["rows", "mask"], ["chosen"], axis=0),
        node("Pad", ["chosen", "pads"], ["y"]),
    ]
    constants = {"least": np.array(0.5, np.float32), "pads": np.array([0, 0, 1, 0])}
    net = graph.load_graph(save(build(nodes, {"x": [6, 3]}, ("rows", "y"), constants, ranks=2)))
    assert net.output_names == ("rows", "y", "scores") and net.shown == ("scores",)
    assert [h.output for h in find_heads(net)] == ["rows", "scores"]
    assert "('y')" in net.changes[-1] and "'rows', 'scores'" in net.changes[-1]


def norm_model(*, extra: Sequence[onnx.NodeProto] = (), outputs: Sequence[str] = ("y",), bias: bool = True) -> Any:
    rng = np.random.default_rng(0)
    constants = {"w": normal(4, 3, 3, 3), **({"b": normal(4)} if bias else {})}
    constants |= {k: rng.uniform(0.5, 2, 4).astype(np.float32) for k in ("scale", "shift", "mean", "var")}
    nodes = [
        node("Conv", ["x", "w", *(["b"] if bias else [])], ["c"], name="conv", pads=[1] * 4, strides=[2, 2]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], name="norm", epsilon=1e-3),
        node("Relu", ["n"], ["y"], name="act"),
        *extra,
    ]
    return build(nodes, {"x": [1, 3, 6, 6]}, outputs, constants, ranks=4)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded_into_the_conv(save: Save, *, bias: bool) -> None:
    path = save(norm_model(bias=bias))
    net = graph.load_graph(path)
    assert ops(net) == ["Conv", "Relu"] and net.nodes[0].name == "conv"
    same(path, net, {"x": normal(1, 3, 6, 6)}, 1e-4)


def test_batch_norm_at_the_output_keeps_the_output_name(save: Save) -> None:
    model = norm_model()
    del model.graph.node[2]
    model.graph.output[0].name = "n"
    path = save(model)
    net = graph.load_graph(path)
    assert ops(net) == ["Conv"] and net.output_names == ("n",)
    same(path, net, {"x": normal(1, 3, 6, 6)}, 1e-4)


@pytest.mark.parametrize(
    ("extra", "outputs"),
    [
        ([node("Exp", ["c"], ["z"])], ["y", "z"]),
        ([node("Exp", ["c"], ["e"]), node("Neg", ["c"], ["m"]), node("Sum", ["e", "m", "c"], ["z"])], ["y", "z"]),
        ([], ["y", "c"]),
    ],
)
def test_batch_norm_is_not_folded_where_the_conv_is_read_elsewhere(
    save: Save, extra: list[onnx.NodeProto], outputs: list[str]
) -> None:
    path = save(norm_model(extra=extra, outputs=outputs))
    net = graph.load_graph(path)
    assert "BatchNormalization" in ops(net)
    same(path, net, {"x": normal(1, 3, 6, 6)}, 1e-4)


def test_convs_that_share_a_weight_are_folded_apart(save: Save) -> None:
    model = norm_model(extra=[node("Conv", ["x", "w"], ["z"], pads=[1] * 4)], outputs=("y", "z"))
    path = save(model)
    net = graph.load_graph(path)
    assert sorted(ops(net)) == ["Conv", "Conv", "Relu"]
    same(path, net, {"x": normal(1, 3, 6, 6)}, 1e-4)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_ceil_mode_agrees_with_the_runtime(save: Save, op: str, size: int) -> None:
    """With a stride above the kernel the last window may start outside, which the runtime drops."""
    nodes = [node(op, ["x"], ["p"], kernel_shape=[1, 2], strides=[3, 3], ceil_mode=1), node("Relu", ["p"], ["y"])]
    path = save(build(nodes, {"x": [1, 1, size, size]}, ranks=4))
    try:
        net = graph.load_graph(path)
    except ModelError as error:
        assert "ceil_mode=0" in str(error)  # one axis rounds up, the other drops a window
        return
    feeds = {"x": normal(1, 1, size, size)}
    assert run(path.read_bytes(), feeds)[0].shape == net.info.outputs[0].shape
    same(path, net, feeds)


@pytest.mark.parametrize("broken", [{"pads": [0, 0]}, {"strides": [0, 1]}, {"kernel_shape": [2]}])
def test_broken_pools_are_refused(save: Save, broken: dict[str, list[int]]) -> None:
    given: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1, **broken}
    with pytest.raises(ModelError):
        graph.load_graph(save(build([node("MaxPool", ["x"], ["y"], **given)], {"x": [1, 1, 6, 6]}, ranks=4)))


def test_broken_norms_are_refused(save: Save) -> None:
    model = norm_model()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(normal(3, 3, 3, 3), "w"))
    with pytest.raises(ModelError):
        graph.load_graph(save(model))
    model = norm_model()
    wrong = next(t for t in model.graph.initializer if t.name == "var")
    wrong.CopyFrom(numpy_helper.from_array(np.full(4, -1, np.float32), "var"))
    with pytest.raises(ModelError, match="holds NaN"):
        graph.load_graph(save(model))


UNARY = ["Relu", "Sigmoid", "Tanh", "Identity", "Dropout", "Neg"]


@PROPERTY
@given(data=st.data())
def test_the_normal_form_computes_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}
    tensors = ["x"]
    for i in range(data.draw(st.integers(2, 8))):
        source, other = (data.draw(st.sampled_from(tensors)) for _ in range(2))
        kind = data.draw(st.sampled_from(["unary", "conv", "norm", "binary", "shape", "constant"]))
        name = data.draw(st.sampled_from(["", "same", f"node{i}"]))
        out = f"t{i}"
        if kind == "unary":
            nodes.append(node(data.draw(st.sampled_from(UNARY)), [source], [out], name=name))
        elif kind in ("conv", "norm"):
            constants[f"w{i}"] = (rng.standard_normal((4, 4, 3, 3)) / 6).astype(np.float32)
            nodes.append(node("Conv", [source, f"w{i}"], [f"c{i}"], pads=[1] * 4, name=name))
            if kind == "norm":
                terms = [f"{k}{i}" for k in ("scale", "shift", "mean", "var")]
                constants |= {k: rng.uniform(0.5, 1.5, 4).astype(np.float32) for k in terms}
                nodes.append(node("BatchNormalization", [f"c{i}", *terms], [out]))
                tensors += [f"c{i}"] * data.draw(st.booleans())
            else:
                nodes.append(node("Identity", [f"c{i}"], [out]))
        elif kind == "binary":
            nodes.append(node("Add", [source, other], [out], name=name))
        elif kind == "shape":
            nodes += [node("Shape", [other], [f"s{i}"]), node("Reshape", [source, f"s{i}"], [out], name=name)]
        else:
            constants[f"h{i}"] = rng.standard_normal(4).astype(np.float16)
            constants["last"] = np.array([1, 4, 1, 1])
            nodes += [
                node("Cast", [f"h{i}"], [f"f{i}"], to=TensorProto.FLOAT),
                node("Reshape", [f"f{i}", "last"], [f"k{i}"]),
                node("Mul", [source, f"k{i}"], [out]),
            ]
        tensors.append(out)
    outputs = sorted(data.draw(st.sets(st.sampled_from(tensors[1:]), min_size=1, max_size=3)))
    path = tmp_path_factory.mktemp("generated") / "model.onnx"
    path.write_bytes(build(nodes, {"x": ["batch", 4, 5, 5]}, outputs, constants, ranks=4).SerializeToString())
    same(path, graph.load_graph(path), {"x": rng.standard_normal((1, 4, 5, 5)).astype(np.float32)}, 1e-4)


def test_the_file_is_never_changed(tmp_path: Path, save: Save) -> None:
    path = save(norm_model())
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    net = graph.load_graph(path)
    net.to_bytes()
    net.clone()
    assert path.read_bytes() == before and path.stat().st_mtime_ns == stamp
    assert os.listdir(tmp_path) == ["model.onnx"]  # noqa: PTH208
    assert graph.load_graph(path).info == net.info
    assert graph.load_graph(path).to_bytes() == net.to_bytes()


def test_a_clone_may_be_rewritten(save: Save) -> None:
    net = graph.load_graph(save(norm_model()))
    before = net.to_bytes()
    copy = net.clone()
    for item in list(copy.graph):
        item.name = f"{item.name}_changed"
    assert net.to_bytes() == before


@pytest.mark.skipif(not YOLO.is_file(), reason="no real checkpoint beside the repository")
def test_yolo11n() -> None:
    before = YOLO.read_bytes()
    net = graph.load_graph(YOLO)
    assert YOLO.read_bytes() == before
    assert net.info.inputs[0].shape == (1, 3, 640, 640) and net.info.outputs[0].shape == (1, 84, 8400)
    x = np.random.default_rng(0).uniform(0, 1, (1, 3, 640, 640)).astype(np.float32)
    (expected,), (got,) = run(before, {"images": x}, optimize=True), run(net.to_bytes(), {"images": x}, optimize=True)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
