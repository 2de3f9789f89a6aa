"""How gradients are joined, tapped, stopped and refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.adjoint.engine import Tap, build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.errors import UnsupportedOpError
from bitalloy.core.units import Edge
from bitalloy.runtime.ort import OrtSession

PROPERTY = settings(max_examples=15)
Array = np.ndarray[Any, Any]
node = onnx.helper.make_node


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def test_every_rule_is_named_in_a_test() -> None:
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_rules_*.py"))
    assert [op for op in RULES if f'"{op}"' not in text] == []


def test_probes_do_not_influence_each_other(rig: Any, micro: Any, tap: Any) -> None:
    x, w = normal(1, 3, 6, 6), normal(4, 3, 3, 3, seed=2)
    nodes = [
        node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1] * 4),
        node("Sigmoid", ["c"], ["s"]),
        node("Mul", ["c", "s"], ["m"]),
        node("MaxPool", ["m"], ["p"], kernel_shape=[2, 2]),
        node("Softmax", ["p"], ["y"], axis=1),
    ]
    net, v = rig.load(micro(nodes, {"x": x}, {"y": np.float32}, {"w": w})), normal(3, 1, 4, 2, 2, seed=3)
    taps = [tap("x", normal(*x.shape, seed=4), name="x"), tap("m", normal(1, 4, 3, 3, seed=5), name="m")]
    together = rig.run(net, {"x": x}, taps, {"y": v})["y"]
    for row in range(3):
        alone = rig.run(net, {"x": x}, taps, {"y": v[row : row + 1]})["y"]
        for name in ("x", "m"):
            np.testing.assert_allclose(alone[name][0], together[name][row], rtol=1e-5)


@pytest.mark.parametrize("opset", [13, 15, 18, 19, 21])
def test_the_opset_of_the_model_does_not_matter(rig: Any, micro: Any, tap: Any, opset: int) -> None:
    x, w, v = normal(1, 3, 6, 6), normal(4, 3, 3, 3, seed=2), normal(2, 1, 4, 1, 1, seed=3)
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        node("HardSigmoid", ["c"], ["s"]),
        node("Mul", ["c", "s"], ["m"]),
        node("AveragePool", ["m"], ["a"], kernel_shape=[2, 2]),
        node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2]),
        node("Softmax", ["p"], ["f"], axis=1),
        node("GlobalMaxPool", ["f"], ["y"]),
    ]
    rows = []
    for version in (17, opset):
        net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}, {"w": w}, version))
        rows.append(rig.run(net, {"x": x}, [tap("x", x, name="x")], {"y": v})["y"]["x"])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)


def test_silu(rig: Any, micro: Any, tap: Any) -> None:
    x, v = normal(2, 5), normal(3, 2, 5, seed=2)
    model = micro([node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])], {"x": x}, {"y": np.float32})
    a = rig.run(rig.load(model), {"x": x}, [tap("x", np.ones_like(x), name="x")], {"y": v})["y"]["x"]
    slope = sigmoid(x) * (1 + x * (1 - sigmoid(x)))
    np.testing.assert_allclose(a, (v * slope).sum((1, 2)), rtol=1e-5)


def test_elementwise_chains_cost_the_reverse_pass_one_product_per_tap(rig: Any, micro: Any, tap: Any) -> None:
    x = normal(2, 5)
    nodes = [
        node("Sigmoid", ["x"], ["s"]),
        node("Mul", ["x", "s"], ["m"]),
        node("Tanh", ["m"], ["t"]),
        node("Exp", ["t"], ["y"]),
    ]
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}))
    (head,) = build(net, {"y": "y"}, [tap("x", x), tap("t", x)], RULES).heads
    ops = [n.op_type for n in onnx.load_from_string(head.model.data).graph.node]
    assert ops.count("FusedMatMul") == 2
    assert not {"Mul", "Add", "Sub"} & set(ops)


def test_an_edge_tap_counts_the_way_through_its_consumer_only(rig: Any, micro: Any, tap: Any) -> None:
    x, w, e = normal(1, 2, 4, 4), normal(2, 2, 3, 3, seed=2), normal(1, 2, 4, 4, seed=3)
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1] * 4, name="conv"),
        node("Tanh", ["x"], ["t"], name="tanh"),
        node("Add", ["c", "t"], ["u"], name="add"),
        node("Add", ["u", "x"], ["y"], name="skip"),
    ]
    net, v = rig.load(micro(nodes, {"x": x}, {"y": np.float32}, {"w": w})), normal(2, 1, 2, 4, 4, seed=4)
    taps = [tap("x", e, n, s, name=n) for n, s in (("conv", 0), ("tanh", 0), ("skip", 1))] + [tap("x", e, name="all")]
    a = rig.run(net, {"x": x}, taps, {"y": v})["y"]
    np.testing.assert_allclose(a["skip"], (v * e).sum((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(a["tanh"], (v * e * (1 - np.tanh(x) ** 2)).sum((1, 2, 3, 4)), rtol=1e-4)
    np.testing.assert_allclose(a["conv"] + a["tanh"] + a["skip"], a["all"], rtol=1e-4)


def test_both_slots_of_one_consumer(rig: Any, micro: Any, tap: Any) -> None:
    x, e, v = normal(5), normal(5, seed=2), normal(2, 5, seed=3)
    net = rig.load(micro([node("Mul", ["x", "x"], ["y"], name="square")], {"x": x}, {"y": np.float32}))
    taps = [tap("x", e, "square", 0), tap("x", e, "square", 1), tap("x", e, name="all")]
    a = rig.run(net, {"x": x}, taps, {"y": v})["y"]
    np.testing.assert_allclose(a["x->square#0"], (v * x * e).sum(1), rtol=1e-5)
    np.testing.assert_allclose(a["x->square#1"], (v * x * e).sum(1), rtol=1e-5)
    np.testing.assert_allclose(a["all"], (v * 2 * x * e).sum(1), rtol=1e-5)


@PROPERTY
@given(data=st.data())
def test_windows_of_one_tensor(rig: Any, micro: Any, tap: Any, data: st.DataObject) -> None:
    """Slices, gathers and a whole consumer of one tensor; some tile it, some overlap, some lie on another axis."""
    x, e = normal(2, 6), normal(2, 6, seed=2)
    nodes, weight = [], np.zeros((2, 6))
    parts = data.draw(st.lists(st.tuples(st.sampled_from("srgw"), st.integers(0, 5), st.integers(1, 6)), min_size=1,
                               max_size=4))  # fmt: skip
    constants: dict[str, Array] = {}
    taps, expected = [tap("x", e, name="all")], {}
    for i, (kind, start, size) in enumerate(parts):
        factor = float(i + 2)
        mask = np.zeros((2, 6))
        if kind == "s":
            mask[:, start : start + size] = factor
            constants |= {f"b{i}": ints(start), f"e{i}": ints(start + size), f"a{i}": ints(1)}
            nodes.append(node("Slice", ["x", f"b{i}", f"e{i}", f"a{i}"], [f"p{i}"], name=f"n{i}"))
        elif kind == "r":
            mask[start % 2] = factor
            constants |= {f"b{i}": np.array(start % 2, np.int64)}
            nodes.append(node("Gather", ["x", f"b{i}"], [f"p{i}"], axis=0, name=f"n{i}"))
        elif kind == "g":
            mask[:, start] = factor
            constants |= {f"b{i}": ints(start)}
            nodes.append(node("Gather", ["x", f"b{i}"], [f"p{i}"], axis=1, name=f"n{i}"))
        else:
            mask[:] = factor
            nodes.append(node("Neg", ["x"], [f"n{i}y"], name=f"n{i}"))
            nodes.append(node("Neg", [f"n{i}y"], [f"p{i}"]))
        constants[f"f{i}"] = np.array(factor, np.float32)
        nodes.append(node("Mul", [f"p{i}", f"f{i}"], [f"m{i}"]))
        nodes.append(node("ReduceSum", [f"m{i}"], [f"t{i}"], keepdims=0))
        weight += mask
        taps.append(tap("x", e, f"n{i}", 0, name=f"edge{i}"))
        expected[f"edge{i}"] = (mask * e).sum()
    nodes.append(node("Sum", [f"t{i}" for i in range(len(parts))], ["y"]))
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}, constants))
    a = rig.run(net, {"x": x}, taps, {"y": np.array([1.0, -2.0], np.float32)})["y"]
    for name, value in {**expected, "all": (weight * e).sum()}.items():
        np.testing.assert_allclose(a[name], [value, -2 * value], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bounds", "ops"), [([0, 2, 5, 6], {"Concat"}), ([0, 2, 2, 6], {"Concat"}), ([0, 3], {"Pad"})])
def test_windows_that_tile_are_concatenated(rig: Any, micro: Any, tap: Any, bounds: list[int], ops: set[str]) -> None:
    x, nodes = normal(2, 6), []
    constants: dict[str, np.ndarray] = {}
    spans = [(a, b) for a, b in pairwise(bounds) if a < b]
    for i, (start, stop) in enumerate(spans):
        constants |= {f"b{i}": ints(start), f"e{i}": ints(stop), "axis": ints(1)}
        nodes.append(node("Slice", ["x", f"b{i}", f"e{i}", "axis"], [f"p{i}"]))
    nodes.append(node("Concat", [f"p{i}" for i in range(len(spans))], ["y"], axis=1))
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}, constants))
    (head,) = build(net, {"y": "y"}, [tap("x", x)], RULES).heads
    found = {n.op_type for n in onnx.load_from_string(head.model.data).graph.node}
    assert (found & {"Pad", "ScatterElements"}) == ops - {"Concat"}
    v = normal(2, 2, bounds[-1], seed=3)
    a = rig.run(net, {"x": x}, [tap("x", x, name="t")], {"y": v})["y"]["t"]
    np.testing.assert_allclose(a, (v * x[:, : bounds[-1]]).sum((1, 2)), rtol=1e-5)


def branches() -> list[onnx.NodeProto]:
    return [
        node("Tanh", ["x"], ["t"], name="tanh"),
        node("Exp", ["t"], ["e"], name="exp"),
        node("Add", ["e", "x"], ["y"], name="add"),
    ]


def test_nothing_flows_through_stops(rig: Any, micro: Any, tap: Any) -> None:
    x, v = normal(4), normal(2, 4, seed=2)
    net = rig.load(micro(branches(), {"x": x}, {"y": np.float32}))
    taps = [tap("x", x, name="x"), tap("t", x, name="t"), tap("e", x, name="e")]
    a = rig.run(net, {"x": x}, taps, {"y": v}, stops=frozenset({"exp"}))["y"]
    assert sorted(a) == ["e", "x"]
    np.testing.assert_allclose(a["x"], (v * x).sum(1), rtol=1e-5)
    np.testing.assert_allclose(a["e"], (v * x).sum(1), rtol=1e-5)


COMPARISONS = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]


@pytest.mark.parametrize("op", COMPARISONS)
def test_comparisons_stop_the_gradient(rig: Any, micro: Any, tap: Any, op: str) -> None:
    x, z, v = np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0, 2.0, 2.0], np.float32), normal(2, 3)
    nodes = [node(op, ["x", "z"], ["c"]), node("Where", ["c", "x", "z"], ["y"])]
    net = rig.load(micro(nodes, {"x": x, "z": z}, {"y": np.float32}))
    a = rig.run(net, {"x": x, "z": z}, [tap("x", np.ones(3), name="x")], {"y": v})["y"]["x"]
    chosen = {"Equal": x == z, "Greater": x > z, "GreaterOrEqual": x >= z, "Less": x < z, "LessOrEqual": x <= z}[op]
    np.testing.assert_allclose(a, v @ chosen.astype(np.float32), rtol=1e-5)


@pytest.mark.parametrize("op", ["Floor", "Ceil", "Round", "Sign"])
def test_steps_stop_the_gradient(rig: Any, micro: Any, tap: Any, op: str) -> None:
    x, v = normal(3), normal(2, 3)
    net = rig.load(micro([node(op, ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {"x": x}, {"y": np.float32}))
    a = rig.run(net, {"x": x}, [tap("x", np.ones(3), name="x")], {"y": v})["y"]["x"]
    steps: dict[str, Any] = {"Floor": np.floor, "Ceil": np.ceil, "Round": np.round, "Sign": np.sign}
    step = steps[op](x)
    np.testing.assert_allclose(a, v @ step, rtol=1e-5)


def test_an_operator_without_a_rule_is_refused_by_name(rig: Any, micro: Any, tap: Any) -> None:
    x = normal(4, 4)
    nodes = [node("Det", ["x"], ["d"], name="my/det"), node("Mul", ["d", "x"], ["y"], name="mul")]
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}))
    with pytest.raises(UnsupportedOpError, match=r"Node 'my/det' \(Det\) has no adjoint rule.*--exclude 'my/det'"):
        build(net, {"y": "y"}, [tap("x", x)], RULES)
    build(net, {"y": "y"}, [tap("x", x)], RULES, stops=frozenset({"my/det"}))
    build(net, {"y": "y"}, [tap("d", np.float32(1))], RULES)


def test_an_operator_without_a_rule_off_the_way_is_allowed(rig: Any, micro: Any, tap: Any) -> None:
    x = normal(4, 4)
    nodes = [node("Det", ["x"], ["d"]), node("Exp", ["x"], ["y"])]
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32, "d": np.float32}))
    assert len(build(net, {"y": "y"}, [tap("x", x)], RULES).heads[0].taps) == 1


def test_what_varies_with_nothing_tapped_needs_no_gradient(rig: Any, micro: Any, tap: Any) -> None:
    """Computed weights are fine where no tap lies before them, or a stop lies between."""
    x, k = normal(1, 2, 4, 4), normal(3, 2, 1, 1, seed=2)
    nodes = [node("Exp", ["k"], ["w"], name="weights"), node("Conv", ["x", "w"], ["y"])]
    net = rig.load(micro(nodes, {"x": x, "k": k}, {"y": np.float32}))
    feeds, v = {"x": x, "k": k}, normal(1, 1, 3, 4, 4)
    assert list(rig.run(net, feeds, [tap("x", x, name="x")], {"y": v})["y"]) == ["x"]
    with pytest.raises(UnsupportedOpError, match=r"computed input 1 \('w'\)"):
        build(net, {"y": "y"}, [tap("x", x), tap("k", k)], RULES)
    assert list(rig.run(net, feeds, [tap("x", x, name="x"), tap("k", k, name="k")], {"y": v},
                        stops=frozenset({"weights"}))["y"]) == ["x"]  # fmt: skip


def test_other_precisions_on_the_way_hand_on_the_gradient_of_float32(rig: Any, micro: Any, tap: Any) -> None:
    """The file computes an exponential in double between two Casts; it is analysed as one in float32."""
    x, v = normal(4), normal(3, 4)
    nodes = [
        node("Cast", ["x"], ["d"], to=11),
        node("Exp", ["d"], ["e"]),
        node("Cast", ["e"], ["y"], to=1, name="back"),
    ]
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}))
    a = rig.run(net, {"x": x}, [tap("x", np.ones(4), name="x")], {"y": v})["y"]["x"]
    np.testing.assert_allclose(a, v @ np.exp(x), rtol=1e-5)


def test_integers_carry_no_gradient(rig: Any, micro: Any, tap: Any) -> None:
    x, v = normal(4) * 3, normal(2, 4)
    nodes = [node("Cast", ["x"], ["i"], to=7), node("Cast", ["i"], ["f"], to=1), node("Mul", ["f", "x"], ["y"])]
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}))
    a = rig.run(net, {"x": x}, [tap("x", np.ones(4), name="x")], {"y": v})["y"]["x"]
    np.testing.assert_allclose(a, v @ np.trunc(x), rtol=1e-5)


def test_heads_inside_the_graph_and_shared_tensors(rig: Any, micro: Any, tap: Any) -> None:
    x, z = normal(4), normal(4, seed=2)
    nodes = [*branches(), node("Exp", ["z"], ["w"])]
    net = rig.load(micro(nodes, {"x": x, "z": z}, {"y": np.float32, "w": np.float32}))
    taps = [tap("x", x, name="x"), tap("e", x, name="e")]
    adjoint = build(net, {"first": "y", "second": "y", "inner": "e", "other": "w"}, taps, RULES)
    assert [h.taps for h in adjoint.heads] == [("e", "x"), ("e", "x"), ("e", "x"), ()]
    assert len(adjoint.energies) == 4
    primal = OrtSession(adjoint.primal).run({"x": x, "z": z})
    first, second, inner, other = (primal[e] for e in adjoint.energies)
    assert first == second != inner
    np.testing.assert_allclose(other, (np.exp(z) ** 2).sum(), rtol=1e-5)
    v = normal(3, 4)
    for head in adjoint.heads:
        fed = {head.cotangent: v, **{r: primal[r] for r in head.residuals}}
        sums, squares = head.by_tap(OrtSession(head.model).run(fed)[head.output])
        assert sums.shape == squares.shape == (3, len(head.taps))
    a = rig.run(net, {"x": x, "z": z}, taps, {"e": v})["e"]["e"]
    np.testing.assert_allclose(a, (v * x).sum(1), rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "adjoint/", "_adjoint/"])
def test_names_of_the_model_do_not_clash(rig: Any, micro: Any, tap: Any, prefix: str) -> None:
    x, w, v = normal(3), normal(3, seed=2), normal(2, 3, seed=3)
    a, b = f"{prefix}a", f"{prefix}v"
    nodes = [
        node("Exp", ["adjoint/p/1_Mul"], [a], name=f"{prefix}p/1_Reshape"),
        node("Mul", [a, "r/1_Reshape"], [b]),
        node("Neg", [b], ["cotangent"]),
    ]
    feeds = {"adjoint/p/1_Mul": x, "r/1_Reshape": w}
    net = rig.load(micro(nodes, feeds, {"cotangent": np.float32}))
    taps = [tap("adjoint/p/1_Mul", x, name="t"), tap("r/1_Reshape", w, name="u")]
    result = rig.run(net, feeds, taps, {"cotangent": v})["cotangent"]
    np.testing.assert_allclose(result["t"], -(v * np.exp(x) * w * x).sum(1), rtol=1e-5)
    np.testing.assert_allclose(result["u"], -(v * np.exp(x) * w).sum(1), rtol=1e-5)


def test_errors_may_be_computed_from_the_sample(rig: Any, micro: Any) -> None:
    x, v = normal(4) * 3, normal(2, 4)
    net = rig.load(micro([node("Exp", ["x"], ["y"])], {"x": x}, {"y": np.float32}))

    def rounding(p: Any, values: Any) -> Any:
        return p.like("Sub", p.like("Round", values["x"]), values["x"])

    a = rig.run(net, {"x": x}, [Tap("t", (Edge(tensor="x", node="", slot=0),), rounding)], {"y": v})["y"]["t"]
    np.testing.assert_allclose(a, (v * np.exp(x) * (np.round(x) - x)).sum(1), rtol=1e-4)


def test_taps_may_share_edges_and_have_several(rig: Any, micro: Any, tap: Any) -> None:
    x, w, v = normal(2, 6), normal(6, 3, seed=2), normal(3, 2, 3, seed=3)
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="product"),
        node("Slice", ["x", "zero", "three", "one"], ["s"], name="cut"),
        node("Slice", ["x", "three", "six", "one"], ["z"], name="rest"),
        node("Sum", ["m", "s", "z"], ["y"], name="sum"),
    ]
    constants = {"w": w, "zero": ints(0), "one": ints(1), "three": ints(3), "six": ints(6)}
    net = rig.load(micro(nodes, {"x": x}, {"y": np.float32}, constants))
    uses = {name: Edge(tensor="x", node=name, slot=0) for name in ("product", "cut", "rest")}
    single = [Tap(f"{name}{i}", (edge,), tap("x", x * i).error) for name, edge in uses.items() for i in (1, 2)]
    several = [Tap("two", (uses["product"], uses["rest"]), tap("x", x).error), tap("x", x, name="all")]
    several.append(Tap("three", tuple(uses.values()), tap("x", x).error))
    a = rig.run(net, {"x": x}, [*single, *several], {"y": v})["y"]
    for name in uses:
        np.testing.assert_allclose(a[f"{name}2"], 2 * a[f"{name}1"], rtol=1e-5)
    np.testing.assert_allclose(a["two"], a["product1"] + a["rest1"], rtol=1e-4)
    np.testing.assert_allclose(a["three"], a["all"], rtol=1e-4)
    np.testing.assert_allclose(a["cut1"], (v * x[:, :3]).sum((1, 2)), rtol=1e-5)


def test_an_identity_between_input_and_output(rig: Any, micro: Any, tap: Any) -> None:
    x, v = normal(4), normal(2, 4)
    net = rig.load(micro([node("Identity", ["x"], ["y"])], {"x": x}, {"y": np.float32}))
    a = rig.run(net, {"x": x}, [tap("x", x, name="x")], {"y": v})["y"]["x"]
    np.testing.assert_allclose(a, (v * x).sum(1), rtol=1e-5)


def test_build_leaves_the_graph_alone(rig: Any, micro: Any, tap: Any) -> None:
    x = normal(4)
    net = rig.load(micro(branches(), {"x": x}, {"y": np.float32}))
    before = net.to_bytes()
    build(net, {"y": "y"}, [tap("x", x), tap("t", x)], RULES)
    assert net.to_bytes() == before
