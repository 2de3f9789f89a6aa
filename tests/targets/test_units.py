"""Units of the ort-cpu target and the roundings that a plan implies."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests.cnn import int8

from bitalloy.core.schemes import BASELINE
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.model.regions import ancestors, path_of
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.ort import OrtSession
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe


def test_patterns_become_units(case) -> None:
    kinds = {u.id: (u.kind, u.core, u.tail) for u in case.units.units}
    assert kinds["/stem/act/Sigmoid"] == ("SiLU", ("/stem/act/Sigmoid", "/stem/act/Mul"), ())
    assert kinds["/body/cv1/Conv"] == ("Conv", ("/body/cv1/Conv", "/body/cv1/Relu"), ())
    assert kinds["/body/Add"] == ("Add", ("/body/Add",), ("/body/Split", "/neck/MaxPool", "/neck/Resize"))
    assert kinds["/head/cls/Conv"] == ("Conv", ("/head/cls/Conv",), ("/head/cls/Reshape",))


def test_every_node_belongs_to_exactly_one_unit(case) -> None:
    owned = list(itertools.chain.from_iterable((*u.core, *u.tail) for u in case.units.units))
    assert sorted(owned) == sorted(str(n.name) for n in case.graph.nodes)


def test_outputs_of_different_meaning_never_share_a_scale(case) -> None:
    joined = next(u for u in case.units.units if u.id == "/head/Concat")
    assert joined.allowed == (BASELINE,)
    assert "different meaning" in joined.why


def test_constant_operands_and_exclusions_stay_in_float(case) -> None:
    assert "/head/box/Mul" not in case.units.able("int8")
    units = split(case.graph, ORT_CPU, case.heads, exclude=frozenset({"/body/dw/Conv"}))
    excluded = next(u for u in units.units if u.id == "/body/dw/Conv")
    assert excluded.allowed == (BASELINE,)
    assert excluded.weights == ()


def test_heads_are_the_operands_of_the_last_concat(case) -> None:
    assert [(h.name, h.start, h.stop) for h in case.heads] == [
        ("boxes", 0, 4), ("scores", 4, 10), ("detections", 0, 4), ("scores KL", 4, 10),
    ]  # fmt: skip
    assert [h.scores for h in case.heads] == [None, None, (4, 10), None]


def test_an_edge_is_rounded_when_either_side_is_int8(case) -> None:
    """Counted by hand for the edge stem SiLU -> body convolution."""
    edge = next(e for e in case.units.edges if e.consumer == "/body/cv1/Conv")
    assert edge.producer == "/stem/act/Sigmoid" and edge.rooted
    for plan in (["/stem/act/Sigmoid"], ["/body/cv1/Conv"], ["/stem/act/Sigmoid", "/body/cv1/Conv"]):
        assert f"{edge.id} in int8" in rounded(case.units, int8(plan))
    assert f"{edge.id} in int8" not in rounded(case.units, int8(["/body/dw/Conv"]))


def test_an_int8_tail_is_rounded_once(case) -> None:
    """Split and Resize carry the integers of the Add: their outputs are not rounded again."""
    into_concat = [e for e in case.units.edges if e.consumer == "/neck/Concat" and e.producer == "/body/Add"]
    assert into_concat and all(not e.rooted for e in into_concat)
    both = rounded(case.units, int8(["/body/Add", "/neck/Concat"]))
    alone = rounded(case.units, int8(["/neck/Concat"]))
    assert not any(f"{e.id} in int8" in both for e in into_concat)
    assert all(f"{e.id} in int8" in alone for e in into_concat)


@settings(max_examples=50)
@given(st.data())
def test_more_int8_units_never_round_fewer_weights(case_units, data) -> None:
    free = sorted(case_units.able("int8"))
    small = frozenset(data.draw(st.sets(st.sampled_from(free))))
    large = small | frozenset(data.draw(st.sets(st.sampled_from(free))))
    weights = {f"{w.id} in int8" for u in case_units.units for w in u.weights}
    everything = rounded(case_units, case_units.lowest_gated())
    assert weights <= everything
    assert rounded(case_units, int8(small)) & weights <= rounded(case_units, int8(large)) & weights


def test_regions_come_from_node_names(case) -> None:
    assert path_of(case.graph.node["/body/cv1/Conv"]) == ("body", "cv1")
    assert ancestors("body/cv1") == ("body/cv1", "body", "(model)")


@pytest.mark.parametrize(
    ("attributes", "runs"),
    [
        ({}, True),
        ({"pads": [1] * 4}, True),
        ({"ceil_mode": 1}, True),
        ({"count_include_pad": 1, "pads": [1] * 4}, True),
        ({"count_include_pad": 1, "ceil_mode": 1}, False),
        ({"dilations": [2, 2]}, False),
    ],
)
def test_average_pools_run_in_int8_where_the_kernel_is_right(tmp_path, attributes, runs) -> None:
    """Of a pool in INT8 the fused kernel must give what the separate operators give, within one step."""
    pool = helper.make_node("AveragePool", ["d"], ["p"], "pool", kernel_shape=[3, 3], strides=[2, 2], **attributes)
    nodes = [helper.make_node("Relu", ["x"], ["d"], "relu"), pool, helper.make_node("Neg", ["p"], ["y"], "end")]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4, 34, 34]), ("y", None)))
    model = helper.make_model(
        helper.make_graph(nodes, "pool", [x], [y]), opset_imports=[helper.make_opsetid("", 19)], ir_version=9
    )
    onnx.save(model, tmp_path / "pool.onnx")
    graph = load_graph(tmp_path / "pool.onnx")
    units = split(graph, ORT_CPU, find_heads(graph))
    assert units.able("int8") == ({"pool"} if runs else set())
    high = 4.0
    recipe = Recipe(units, ORT_CPU, {"d": (0.0, high), "p": (0.0, high)})
    found = write_plan(graph, recipe, units.lowest_gated()).to_bytes()
    feeds = {"x": np.random.default_rng(0).uniform(0, high, (1, 4, 34, 34)).astype(np.float32)}
    fused, plain = (OrtSession(found, optimize=o).run(feeds)["y"] for o in (True, False))
    assert np.abs(fused - plain).max() <= 1.01 * high / 255
