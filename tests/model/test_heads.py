"""Which parts of the outputs are heads, and which of them are distributions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

import bitalloy
from bitalloy.core.errors import ModelError
from bitalloy.core.records import Head
from bitalloy.data.datasets import ArrayDataset
from bitalloy.model.heads import KL, Reference, find_heads, is_divergence
from bitalloy.model.load import Graph, load_graph
from bitalloy.sensitivity.exact import Switchboard, damage
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe

SIDE = 6
FRACTION = 1 / 16


def network(
    path: Path,
    nodes: Sequence[NodeProto],
    outputs: dict[str, list[int]],
    metadata: dict[str, str] | None = None,
    *,
    kind: int = TensorProto.FLOAT,
) -> Graph:
    """Two convolutions that make `t` (1, 5, 6, 6), and the nodes behind."""
    random = np.random.default_rng(0)
    weights = {"w0": random.normal(0, 0.4, (8, 3, 3, 3)), "w1": random.normal(0, 0.3, (5, 8, 3, 3))}
    body = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="act"),
        helper.make_node("Conv", ["b", "w1"], ["t"], name="second", pads=[1] * 4),
    ]
    graph = helper.make_graph(
        [*body, *nodes],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(n, kind, shape) for n, shape in outputs.items()],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return load_graph(path)


MAP = [1, 5, SIDE, SIDE]


def last(operator: str, output: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, ["t"], [output], name="last", **attributes)


@pytest.mark.parametrize(
    ("node", "want"),
    [
        (last("Sigmoid"), ("bernoulli", "probabilities", None)),
        (last("Softmax", axis=1), ("categorical", "probabilities", 1)),
        (last("Softmax"), ("categorical", "probabilities", 3)),
        (last("LogSoftmax", axis=-3), ("categorical", "logarithms", 1)),
        (last("Tanh"), None),
        (last("Relu"), None),
    ],
    ids=lambda v: v.op_type if isinstance(v, NodeProto) else "",
)
def test_the_last_operator_tells_a_distribution(
    tmp_path: Path, node: NodeProto, want: tuple[str, str, int | None] | None
) -> None:
    heads = find_heads(network(tmp_path / "net.onnx", [node], {"y": MAP}))
    assert [h.name for h in heads] == (["y", "y KL"] if want else ["y"])
    assert [(h.kind, h.given, h.classes) for h in heads if is_divergence(h.name)] == ([want] if want else [])


def test_a_sigmoid_may_be_reshaped_and_a_softmax_may_not(tmp_path: Path) -> None:
    for operator, want in (("Sigmoid", ["y", "y KL"]), ("Softmax", ["y"])):
        nodes = [last(operator, "s"), helper.make_node("Transpose", ["s"], ["y"], name="turn", perm=[0, 2, 3, 1])]
        heads = find_heads(network(tmp_path / "net.onnx", nodes, {"y": [1, SIDE, SIDE, 5]}))
        assert [h.name for h in heads] == want


def test_logits_are_a_distribution_where_the_family_says_so(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["t", "t"], ["logits"], name="last")]
    for metadata, want in (({}, []), ({"bitalloy.family": "segformer"}, [("categorical", "logits", 1)])):
        heads = find_heads(network(tmp_path / "net.onnx", nodes, {"logits": MAP}, metadata))
        assert [(h.kind, h.given, h.classes) for h in heads if h.kind] == want


@pytest.mark.parametrize(("name", "known"), [("logits", True), ("embedding", False)])
def test_logits_of_a_classifier_are_known_by_name(tmp_path: Path, name: str, known: bool) -> None:
    pool = helper.make_node("GlobalAveragePool", ["t"], ["g"], name="pool")
    nodes = [pool, helper.make_node("Flatten", ["g"], [name], name="flat")]
    heads = find_heads(network(tmp_path / "net.onnx", nodes, {name: [1, 5]}))
    assert [h.name for h in heads] == [name, *[name + KL] * known]


def test_what_the_metadata_leaves_out_is_no_head(tmp_path: Path) -> None:
    nodes = [last("Tanh", "logits"), helper.make_node("Relu", ["t"], ["cache"], name="other")]
    for metadata, want in (
        ({}, ["logits", "cache"]),
        ({"bitalloy.heads": '["cache"]'}, ["cache"]),
        ({"bitalloy.heads": '["absent"]'}, ["logits", "cache"]),
        ({"bitalloy.family": "segformer"}, ["logits", "logits KL"]),
        ({"bitalloy.family": "mobilesam"}, ["logits", "cache"]),  # knows neither
        ({"bitalloy.family": "unknown"}, ["logits", "cache"]),
    ):
        graph = network(tmp_path / "net.onnx", nodes, {"logits": MAP, "cache": MAP}, metadata)
        assert [h.name for h in find_heads(graph)] == want


def test_a_model_without_float_outputs_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)
    graph = network(tmp_path / "net.onnx", [node], {"y": [1, 3, SIDE, SIDE]}, kind=TensorProto.INT64)
    with pytest.raises(ModelError, match=r"no float output to compare; its outputs are \['y'\]"):
        find_heads(graph)


def test_errors_are_weighed_by_the_relevance_of_the_family() -> None:
    y = np.zeros((1, 3, 2))  # positions on axis 1: only the last chooses a token
    y[0, 2] = [3.0, 4.0]
    plain, weighed = (Head(name="logits", output="logits", tensor="t", family=f) for f in ("", "mobilevlm"))
    exact = Reference({"logits": y}, [plain, weighed])
    np.testing.assert_allclose(exact.energy, [25, 75])
    early, late = y.copy(), y.copy()
    early[0, 0], late[0, 2, 0] = 7.0, 5.0
    np.testing.assert_allclose(exact.error({"logits": early}), [98, 0])
    np.testing.assert_allclose(exact.error({"logits": late}), [4, 12])


@pytest.mark.parametrize(
    ("node", "metadata"),
    [
        (last("Sigmoid"), {}),
        (last("Softmax", axis=1), {}),
        (last("LogSoftmax", axis=1), {}),
        (helper.make_node("Mul", ["t", "t"], ["logits"], name="last"), {"bitalloy.family": "segformer"}),
        (helper.make_node("Reshape", ["t", "rows"], ["logits"], name="last"), {"bitalloy.family": "mobilevlm"}),
    ],
    ids=["sigmoid", "softmax", "log-softmax", "maps", "tokens"],
)
def test_predicted_damage_is_that_of_execution(tmp_path: Path, node: NodeProto, metadata: dict[str, str]) -> None:
    nodes = [node]
    if node.op_type == "Reshape":
        shape = numpy_helper.from_array(np.array([1, 36, 5]), "rows")
        nodes = [helper.make_node("Constant", [], ["rows"], value=shape), node]
    outputs = {node.output[0]: [1, 36, 5] if node.op_type == "Reshape" else MAP}
    graph = network(tmp_path / "net.onnx", nodes, outputs, metadata)
    heads = find_heads(graph)
    assert len(heads) == 2
    units = split(graph, ORT_CPU, heads)
    ranges = {e.root: (-4.0, 4.0) for e in units.edges}
    random = np.random.default_rng(3)
    feeds = [{"x": random.normal(0, 1, (1, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(3)]
    prober = Prober(graph, heads, [Recipe(units, ORT_CPU, ranges)])
    sites = rounded(units, units.lowest())
    damages = []
    for sample, feed in enumerate(feeds):
        matrix = prober.measure(feed, sample=sample, probes=(2, 512), seed=0)
        assert [r.shape[1] for r in matrix.rows] == [2, 512]
        damages.append(matrix.damage(matrix.select(sites))[:, 1])
    board = Switchboard(graph, Recipe(units, ORT_CPU, ranges))
    # all errors at a fraction of their size, so that the second order is all there is
    exact, energy = damage(board, [board.gates(sites, FRACTION)], heads, feeds)
    assert (energy[:, 1] == energy[0, 1]).all()
    assert FRACTION**2 * float(np.mean(damages)) == pytest.approx(float(exact[:, 1].mean()), rel=0.15)


def steep(factor: float, *nodes: NodeProto) -> list[NodeProto]:
    """What leads to a Softmax over five classes that is saturated where the factor is large."""
    constant = helper.make_node("Constant", [], ["factor"], value=numpy_helper.from_array(np.array(factor, np.float32)))
    return [constant, helper.make_node("Mul", ["t", "factor"], ["l"], name="steep"), *nodes]


SOFTMAX = helper.make_node("Softmax", ["l"], ["y"], name="last", axis=1)


def test_the_head_of_a_softmax_are_its_logits(tmp_path: Path) -> None:
    """By hand: logarithms of probabilities are logits but for a number per position, which centring takes out."""
    heads = find_heads(network(tmp_path / "net.onnx", steep(9, SOFTMAX), {"y": MAP}))
    assert [(h.name, h.tensor, h.given, h.kind) for h in heads] == [
        ("y", "l", "probabilities", ""),
        ("y KL", "y", "probabilities", "categorical"),
    ]
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 9, (2, *MAP))  # spread over 40 nats: the largest is all that probabilities show
    first, second = (np.exp(v - v.max(1, keepdims=True)) for v in logits)
    first, second = (p / p.sum(1, keepdims=True) for p in (first, second))
    exact = Reference({"y": first.astype(np.float32)}, heads[:1])
    moved = logits[1] - logits[0]
    assert exact.energy == pytest.approx(np.square(logits[0] - logits[0].mean(1, keepdims=True)).sum(), rel=1e-4)
    assert exact.error({"y": second.astype(np.float32)}) == pytest.approx(
        np.square(moved - moved.mean(1, keepdims=True)).sum(), rel=1e-4
    )


def test_damage_behind_a_saturated_softmax_is_predicted(tmp_path: Path) -> None:
    graph = network(tmp_path / "net.onnx", steep(40, SOFTMAX), {"y": MAP})
    heads = find_heads(graph)
    units = split(graph, ORT_CPU, heads)
    recipe = Recipe(units, ORT_CPU, {e.root: (-4.0, 4.0) for e in units.edges})
    feeds = [{"x": np.random.default_rng(i).normal(0, 0.5, (1, 3, SIDE, SIDE)).astype(np.float32)} for i in range(3)]
    prober, sites = Prober(graph, heads, [recipe]), rounded(units, units.lowest())
    rows = [prober.measure(feed, sample=i, probes=(256, 2), seed=0) for i, feed in enumerate(feeds)]
    matrix = type(rows[0]).concatenate(rows)
    predicted = matrix.damage(matrix.select(sites)).mean(axis=0)[0]
    board = Switchboard(graph, recipe)
    true = damage(board, [board.gates(sites)], heads, feeds)[0].mean(axis=0)[0, 0]
    assert true > 1e-4 and predicted == pytest.approx(true, rel=0.3)


def test_a_head_that_is_zero_on_the_samples_has_finite_numbers(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["far"], value=numpy_helper.from_array(np.array(-100, np.float32)))
    shut = [
        helper.make_node("Add", ["t", "far"], ["s"], name="far"),
        helper.make_node("Relu", ["s"], ["z"], name="shut"),
    ]
    graph = network(tmp_path / "net.onnx", [last("Tanh"), constant, *shut], {"y": MAP, "z": MAP})
    rng = np.random.default_rng(0)
    data = ArrayDataset([{"x": rng.normal(0, 1, (1, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(4)], label="d")
    analysis = bitalloy.confirm(bitalloy.analyze(graph, data, bitalloy.Settings(samples=4, probes=4)), 4)
    values = [e for r in analysis.table.rows for e in (r.sqnr_db.value, r.sqnr_db.low, r.sqnr_db.high)]
    assert np.isfinite(values).all()
    whole = next(r for r in analysis.table.rows if (r.scope, r.id, r.head) == ("unit", "first", "z"))
    assert whole.exact and whole.sqnr_db.value == 160  # executed: nothing opens the Relu
    assert analysis.choice is None or np.isfinite([e.low for e in analysis.choice.first_db]).all()
