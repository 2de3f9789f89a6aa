"""Units of the ort-cpu target and the roundings that a plan implies."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.records import Precision
from bitalloy.regions import ancestors, path_of
from bitalloy.targets import ORT_CPU
from bitalloy.targets.base import split


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
    assert joined.allowed == (Precision.FP32,)
    assert "different meaning" in joined.reason


def test_constant_operands_and_exclusions_stay_in_float(case) -> None:
    assert "/head/box/Mul" not in case.units.quantizable()
    units = split(case.graph, ORT_CPU, case.heads, exclude=frozenset({"/body/dw/Conv"}))
    excluded = next(u for u in units.units if u.id == "/body/dw/Conv")
    assert excluded.allowed == (Precision.FP32,)
    assert excluded.weights == ()


def test_heads_are_the_operands_of_the_last_concat(case) -> None:
    assert [(h.name, h.start, h.stop) for h in case.heads] == [
        ("boxes", 0, 4), ("scores", 4, 10), ("detections", 0, 4),
    ]  # fmt: skip
    assert [h.scores for h in case.heads] == [None, None, (4, 10)]


def test_an_edge_is_rounded_when_either_side_is_int8(case) -> None:
    """Counted by hand for the edge stem SiLU -> body convolution."""
    edge = next(e for e in case.units.edges if e.consumer == "/body/cv1/Conv")
    assert edge.producer == "/stem/act/Sigmoid" and edge.rooted
    for plan in (["/stem/act/Sigmoid"], ["/body/cv1/Conv"], ["/stem/act/Sigmoid", "/body/cv1/Conv"]):
        assert edge.id in case.units.rounded(frozenset(plan))
    assert edge.id not in case.units.rounded(frozenset({"/body/dw/Conv"}))


def test_an_int8_tail_is_rounded_once(case) -> None:
    """Split and Resize carry the integers of the Add: their outputs are not rounded again."""
    into_concat = [e for e in case.units.edges if e.consumer == "/neck/Concat" and e.producer == "/body/Add"]
    assert into_concat and all(not e.rooted for e in into_concat)
    both = case.units.rounded(frozenset({"/body/Add", "/neck/Concat"}))
    alone = case.units.rounded(frozenset({"/neck/Concat"}))
    assert not any(e.id in both for e in into_concat)
    assert all(e.id in alone for e in into_concat)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_more_int8_units_never_round_fewer_weights(case_units, data) -> None:
    free = sorted(case_units.quantizable())
    small = frozenset(data.draw(st.sets(st.sampled_from(free))))
    large = small | frozenset(data.draw(st.sets(st.sampled_from(free))))
    weights = {w.id for u in case_units.units for w in u.weights}
    assert case_units.rounded(small) & weights <= case_units.rounded(large) & weights


def test_regions_come_from_node_names(case) -> None:
    assert path_of(case.graph.node["/body/cv1/Conv"]) == ("body", "cv1")
    assert ancestors("body/cv1") == ("body/cv1", "body", "(model)")
