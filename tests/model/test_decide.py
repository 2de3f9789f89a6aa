"""Branches, loops and sequences that are known when a file is loaded: ONNX Runtime gives the same numbers without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.decide import deciding_inputs
from bitalloy.model.load import Graph, load_graph, load_open
from bitalloy.pipeline.prepare import prepare

FLOAT = TensorProto.FLOAT
node = helper.make_node


def body(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    inputs: Mapping[str, int] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> onnx.GraphProto:
    """A graph that a node runs; its first output is bool where it is called `on`."""
    kinds = [TensorProto.BOOL if name.startswith("on") else FLOAT for name in outputs]
    return helper.make_graph(
        list(nodes),
        "body",
        [
            helper.make_tensor_value_info(n, k, None if n not in ("turn", "on") else [])
            for n, k in (inputs or {}).items()
        ],
        [helper.make_tensor_value_info(n, k, None) for n, k in zip(outputs, kinds, strict=True)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )


class Loading:
    """Loads a model with the input x and the output y, and compares what both compute."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "case.onnx"

    def __call__(
        self,
        nodes: Sequence[onnx.NodeProto],
        constants: Mapping[str, Any] | None = None,
        *,
        x: Sequence[Any] = (2, 3),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        outputs: Sequence[str] = ("y",),
        opset: int = 17,
    ) -> Graph:
        graph = helper.make_graph(
            list(nodes),
            "case",
            [helper.make_tensor_value_info("x", FLOAT, list(x))],
            [helper.make_tensor_value_info(n, FLOAT, None) for n in outputs],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.save(model, self._path)
        loaded = load_graph(self._path, shapes=shapes)
        assert not {n.op_type for n in loaded.nodes} & (ops.CONTROL_FLOW | ops.SEQUENCE)
        assert len({n.name for n in loaded.nodes}) == len(loaded.nodes)
        sizes = [int(d) for d in loaded.info.inputs[0].shape]
        feeds = {"x": np.random.default_rng(0).standard_normal(sizes).astype(np.float32)}
        before, after = (
            ort.InferenceSession(m, providers=["CPUExecutionProvider"]).run(list(outputs), feeds)
            for m in (model.SerializeToString(), loaded.to_bytes())
        )
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
        return loaded


@pytest.fixture
def loading(tmp_path: Path) -> Loading:
    return Loading(tmp_path)


def kinds(graph: Graph) -> list[str]:
    return [n.op_type for n in graph.nodes]


# --- branches ----------------------------------------------------------------------------------------------------

RELU, SIGMOID = body([node("Relu", ["x"], ["t"])], ["t"]), body([node("Sigmoid", ["x"], ["e"])], ["e"])


@pytest.mark.parametrize("chosen", [True, False])
def test_a_constant_condition(loading: Loading, chosen: bool) -> None:
    branch = node("If", ["c"], ["b"], then_branch=RELU, else_branch=SIGMOID)
    found = loading([branch, node("Exp", ["b"], ["y"])], {"c": np.array(chosen)})
    assert kinds(found) == ["Relu" if chosen else "Sigmoid", "Exp"]


def test_the_result_is_an_output(loading: Loading) -> None:
    loading([node("If", ["c"], ["y"], then_branch=RELU, else_branch=SIGMOID)], {"c": np.array(True)})


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("opset", [11, 17])
def test_a_condition_that_follows_from_shapes(loading: Loading, size: int, opset: int) -> None:
    """As torch exports Squeeze of one axis."""
    squeeze = node("Squeeze", ["x"], ["t"], axes=[1]) if opset < 13 else node("Squeeze", ["x", "one"], ["t"])
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "one"], ["d"], axis=0),
        node("Equal", ["d", "one"], ["c"]),
        node(
            "If", ["c"], ["b"], then_branch=body([squeeze], ["t"]),
            else_branch=body([node("Identity", ["x"], ["e"])], ["e"]),
        ),
        node("Exp", ["b"], ["y"]),
    ]  # fmt: skip
    given = {"x": (2, size, 3)}
    found = loading(nodes, {"one": np.array([1], np.int64)}, x=(2, "n", 3), shapes=given, opset=opset)
    assert kinds(found) == (["Squeeze", "Exp"] if size == 1 else ["Exp"])


def test_branches_in_branches_and_the_same_names_side_by_side(loading: Loading) -> None:
    add = node("Add", ["x", "j"], ["t"])
    inner = node(
        "If", ["c"], ["i"], then_branch=body([add], ["t"], constants={"j": np.float32(3)}), else_branch=SIGMOID
    )
    twice = body([inner, node("Mul", ["i", "k"], ["m"])], ["m"], constants={"k": np.float32(2)})
    outer = node("If", ["c"], ["b"], then_branch=twice, else_branch=RELU)
    again = node("If", ["c"], ["b2"], then_branch=twice, else_branch=RELU)
    found = loading([outer, again, node("Add", ["b", "b2"], ["y"])], {"c": np.array(True)})
    assert kinds(found) == ["Add", "Mul", "Add", "Mul", "Add"]


def test_what_is_not_chosen_may_be_anything(tmp_path: Path) -> None:
    strange = body([node("Strange", ["x"], ["e"], domain="org.example")], ["e"])
    model = helper.make_model(
        helper.make_graph(
            [node("If", ["c"], ["y"], then_branch=RELU, else_branch=strange)],
            "case",
            [helper.make_tensor_value_info("x", FLOAT, [2, 3])],
            [helper.make_tensor_value_info("y", FLOAT, None)],
            [numpy_helper.from_array(np.array(True), "c")],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("org.example", 1)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    assert kinds(load_graph(tmp_path / "m.onnx")) == ["Relu"]


def test_a_dead_branch_reads_nothing(loading: Loading) -> None:
    """What it read must not count as read: fusions ask for a single reader."""
    both = body([node("Exp", ["a"], ["e"])], ["e"])
    branch = node("If", ["c"], ["b"], then_branch=RELU, else_branch=both)
    found = loading([node("Relu", ["x"], ["a"]), branch, node("Add", ["a", "b"], ["y"])], {"c": np.array(True)})
    assert len(found.value["a"].uses()) == 1


def of_the_data(then: onnx.GraphProto, other: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [
        node("ReduceSum", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "limit"], ["c"]),
        node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other),
    ]


@pytest.mark.parametrize("limit", [-1e9, 1e9])
def test_what_the_data_decides_is_chosen_from_both_branches(loading: Loading, limit: float) -> None:
    found = loading(of_the_data(RELU, SIGMOID), {"limit": np.float32(limit)})
    assert {"Relu", "Sigmoid", "Where"} <= {n.op_type for n in found.nodes}
    assert any("both run" in note for note in found.changes)


def test_a_condition_may_have_an_axis_that_its_results_have_not(tmp_path: Path) -> None:
    """As ONNX allows it: one element in any shape. Both results are scalars, and so is what is chosen of them."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
        net (float[1,16] x) => (float s) {
        t = ReduceSum<keepdims=1>(x)  one = Constant<value_ints=[1]>()  r = Reshape(t, one)
        z = Constant<value_floats=[0.0]>()  c = Greater(r, z)
        s = If(c)<then_branch = a() => (float p) { p = ReduceMax<keepdims=0>(x) },
                  else_branch = b() => (float q) { q = ReduceMin<keepdims=0>(x) }> }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    file = load_graph(tmp_path / "m.onnx").to_bytes()
    for sign in (1, -1):
        x = (sign * np.arange(1, 17, dtype=np.float32))[None]
        (found,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        assert found.shape == () and found == sign * 16


def test_branches_of_different_shapes_are_refused(loading: Loading) -> None:
    row = body([node("Gather", ["x", "first"], ["g"], axis=0)], ["g"])
    with pytest.raises(ModelError, match=r"'choice.*\[2,3\] and \[1,3\]"):
        loading(of_the_data(RELU, row), {"limit": np.float32(0), "first": np.array([0])})


def rated(folder: Path) -> Path:
    """A model with one branch for a rate of 16000, which reads twice as much as the other."""
    half = body([node("MaxPool", ["x"], ["p"], kernel_shape=[2], strides=[2]), node("Relu", ["p"], ["r"])], ["r"])
    model = helper.make_model(
        helper.make_graph(
            [
                node("Cast", ["rate"], ["f"], to=FLOAT),
                node("Equal", ["f", "fast"], ["c"]),
                node("If", ["c"], ["y"], then_branch=half, else_branch=SIGMOID),
            ],
            "case",
            [
                helper.make_tensor_value_info("x", FLOAT, [1, 3, None]),
                helper.make_tensor_value_info("rate", TensorProto.INT64, []),
            ],
            [helper.make_tensor_value_info("y", FLOAT, None)],
            [numpy_helper.from_array(np.array(16000, np.float32), "fast")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, folder / "rated.onnx")
    return folder / "rated.onnx"


@pytest.mark.parametrize(("rate", "size", "kept"), [(16000, 8, "MaxPool"), (8000, 4, "Sigmoid")])
def test_an_input_that_is_always_the_same_decides(tmp_path: Path, rate: int, size: int, kept: str) -> None:
    path = rated(tmp_path)
    assert deciding_inputs(onnx.load(path)) == ("rate",)
    found = load_graph(path, shapes={"x": (1, 3, size)}, fixed={"rate": rate})
    assert kept in {n.op_type for n in found.nodes} and "If" not in {n.op_type for n in found.nodes}
    assert [i.name for i in found.info.inputs] == ["x", "rate"]
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, size)).astype(np.float32), "rate": np.array(rate)}
    same, given = (ort.InferenceSession(m, providers=["CPUExecutionProvider"]) for m in (found.to_bytes(), path))
    np.testing.assert_allclose(same.run(None, feeds)[0], given.run(None, feeds)[0], rtol=1e-6)
    assert any(f"'rate' is {rate} in every sample" in note for note in found.changes)
    other = load_graph(path, shapes={"x": (1, 3, size)}, fixed={"rate": 24000 - rate})
    assert found.identity != other.identity


def test_samples_tell_which_inputs_never_change(tmp_path: Path) -> None:
    path, (alike, mixed) = rated(tmp_path), (tmp_path / "alike", tmp_path / "mixed")
    for folder, rates in ((alike, (8000, 8000)), (mixed, (8000, 16000))):
        folder.mkdir()
        for index, rate in enumerate(rates):
            np.savez(folder / f"{index}.npz", x=np.ones((1, 3, 4), np.float32), rate=np.array(rate))
    opened = prepare(path, out=tmp_path / "run", data=alike)
    assert opened.model.fixed == {"rate": 8000} and "Sigmoid" in {n.op_type for n in opened.model.nodes}
    with pytest.raises(ModelError, match=r"the shapes \[1,3,2\] and \[1,3,4\]"):
        prepare(path, out=tmp_path / "other", data=mixed)


def test_open_sizes(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [node("If", ["c"], ["y"], then_branch=RELU, else_branch=SIGMOID)],
            "case",
            [helper.make_tensor_value_info("x", FLOAT, ["n", 3])],
            [helper.make_tensor_value_info("y", FLOAT, ["n", 3])],
            [numpy_helper.from_array(np.array(False), "c")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    assert [n.op_type for n in load_open(tmp_path / "m.onnx").graph] == ["Sigmoid"]


# --- loops -------------------------------------------------------------------------------------------------------


def test_a_loop_of_known_length(loading: Loading) -> None:
    inside = body(
        [
            node("Identity", ["on"], ["on_out"]),
            node("Add", ["s", "x"], ["s1"]),
            node("Cast", ["turn"], ["t"], to=FLOAT),
            node("Mul", ["s1", "t"], ["s2"]),
            node("Exp", ["s2"], ["r"]),
        ],
        ["on_out", "s2", "r"],
        {"turn": TensorProto.INT64, "on": TensorProto.BOOL, "s": FLOAT},
    )
    loop = node("Loop", ["n", "c", "x"], ["last", "all"], body=inside)
    total = node("ReduceSum", ["all", "zero"], ["sum"], keepdims=0)
    loading(
        [loop, total, node("Add", ["last", "sum"], ["y"])],
        {"n": np.array(3), "c": np.array(True), "zero": np.array([0])},
    )


@pytest.mark.parametrize("back", [0, 1])
def test_a_scan(loading: Loading, back: int) -> None:
    inside = body(
        [node("Add", ["s", "row"], ["s1"]), node("Tanh", ["s1"], ["s2"]), node("Exp", ["s2"], ["r"])],
        ["s2", "r"],
        {"s": FLOAT, "row": FLOAT},
    )
    scan = node(
        "Scan", ["start", "x"], ["last", "all"], body=inside, num_scan_inputs=1, scan_input_axes=[1],
        scan_output_axes=[1], scan_input_directions=[back], scan_output_directions=[1 - back],
    )  # fmt: skip
    loading(
        [scan, node("Unsqueeze", ["last", "one"], ["l"]), node("Add", ["all", "l"], ["y"])],
        {"start": np.zeros(2, np.float32), "one": np.array([1])},
        x=(2, 4),
    )


def test_a_list_that_a_loop_makes(loading: Loading) -> None:
    """As torch scripts write them."""
    inside = helper.make_graph(
        [
            node("Add", ["x", "x"], ["twice"]),
            node("SequenceInsert", ["s", "twice"], ["s1"]),
            node("Identity", ["on"], ["on_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("s", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("s1", FLOAT, None),
        ],
    )
    found = loading(
        [
            node("SequenceEmpty", [], ["empty"]),
            node("Loop", ["n", "", "empty"], ["list"], body=inside),
            node("ConcatFromSequence", ["list"], ["y"], axis=0, new_axis=1),
        ],
        {"n": np.array(3)},
    )
    assert found.info.outputs[0].shape == (3, 2, 3)


# --- sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(("split", "keep"), [(None, 0), (None, 1), (2, 1), ([1, 3, 1], 1)], ids=str)
def test_split_into_a_sequence(loading: Loading, split: Any, keep: int, opset: int) -> None:
    names = ["x"] if split is None else ["x", "sizes"]
    nodes = [
        node("SplitToSequence", names, ["s"], axis=1, keepdims=keep),
        node("SequenceAt", ["s", "at"], ["a"]),
        node("SequenceAt", ["s", "last"], ["b"]),
        node("Exp", ["a"], ["y"]),
        node("Exp", ["b"], ["z"]),
    ]
    constants = {"at": np.array(1), "last": np.array(-1)}
    if split is not None:
        constants["sizes"] = np.array(split)
    loading(nodes, constants, x=(2, 5), outputs=("y", "z"), opset=opset)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("new", [0, 1])
def test_sequences_are_built_and_joined(loading: Loading, axis: int, new: int) -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Exp", ["x"], ["b"]),
        node("SequenceConstruct", ["a", "b"], ["s"]),
        node("SequenceInsert", ["s", "x", "m1"], ["s1"]),
        node("SequenceInsert", ["s1", "a"], ["s2"]),
        node("SequenceErase", ["s2", "zero"], ["s3"]),
        node("SequenceErase", ["s3"], ["s4"]),
        node("Identity", ["s4"], ["s5"]),
        node("ConcatFromSequence", ["s5"], ["c"], axis=axis, new_axis=new),
        node("SequenceLength", ["s5"], ["n"]),
        node("Cast", ["n"], ["nf"], to=FLOAT),
        node("Mul", ["c", "nf"], ["y"]),
    ]
    loading(nodes, {"m1": np.array(-1), "zero": np.array(0)})


def test_one_sequence_read_twice_is_split_once(loading: Loading) -> None:
    nodes = [
        node("SplitToSequence", ["x"], ["s"], axis=0),
        node("ConcatFromSequence", ["s"], ["a"], axis=0),
        node("ConcatFromSequence", ["s"], ["b"], axis=1),
        node("Exp", ["a"], ["y"]),
        node("Exp", ["b"], ["z"]),
    ]
    assert kinds(loading(nodes, outputs=("y", "z"))).count("Split") == 1


def test_a_computed_position_is_refused(loading: Loading) -> None:
    nodes = [
        node("SplitToSequence", ["x"], ["s"], axis=0),
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["at"], to=TensorProto.INT64),
        node("SequenceAt", ["s", "at"], ["y"], name="pick"),
    ]
    with pytest.raises(ModelError, match="sequence whose tensors or positions are not known"):
        loading(nodes)
