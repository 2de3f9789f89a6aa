"""Sites and conversions of one tensor for every pair of schemes and every placement, from a table written by hand."""

from __future__ import annotations

import msgspec
import pytest

from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Edge, Placement, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.targets import placement
from bitalloy.targets.placement import Conversion, Site, conversions, own_sites, roundings

SCHEMES = (
    Scheme(name=BASELINE),
    Scheme(name="half", activation="float16", weight="float16", cast=True),
    Scheme(name="weights", weight="int8"),
    Scheme(name="int8", activation="uint8", weight="int8"),
    Scheme(name="mixed", activation="uint8", weight="int4"),
    Scheme(name="int4", activation="int4"),
)
OF = {scheme.name: scheme for scheme in SCHEMES}
FLOATS = (BASELINE, "half", "weights")
ROUNDING = ("int8", "mixed", "int4")
SAME = {("int8", "int8"), ("int8", "mixed"), ("mixed", "int8"), ("mixed", "mixed"), ("int4", "int4")}
"""Pairs of which one writes what the other reads."""
PAIRS = [(a, b) for a in OF for b in OF]


def tensor(kind: Placement, *, producer: str | None = "a", consumer: str | None = "b", **options: bool) -> UnitEdge:
    uses = (Edge(tensor="t", node=consumer or "", slot=0),)
    return UnitEdge(
        tensor="t", uses=uses, producer=producer, consumer=consumer, root="t", elements=7, placement=kind,
        rooted=options.get("rooted", True), passed_on=options.get("passed_on", False),
    )  # fmt: skip


def found_sites(edge: UnitEdge, source: str, sink: str) -> list[tuple[str, bool]]:
    sites = roundings(edge, OF[source], OF[sink])
    assert all((s.place, s.part, s.again) == ("t->b", placement.ACTIVATIONS, "again" in s.label) for s in sites)
    return [(s.id, s.end) for s in sites]


@pytest.mark.parametrize(("source", "sink"), PAIRS)
def test_roundings_at_both_ends(source: str, sink: str) -> None:
    """A unit that rounds does so with its result; one that reads something else rounds it for itself."""
    made = [(f"t->b in {source}", True)] if source in ROUNDING else []
    again = [(f"t->b again in {source}", True)] if source in ROUNDING else []
    read = [(f"t->b in {sink}", False)] if sink in ROUNDING and (source, sink) not in SAME else []
    after = [(f"t->b after {source} in {sink}", False)] if read and made else read
    assert found_sites(tensor(Placement.ENDS), source, sink) == made + after
    assert found_sites(tensor(Placement.ENDS, passed_on=True), source, sink) == again + after
    assert found_sites(tensor(Placement.ENDS, rooted=False), source, sink) == read


@pytest.mark.parametrize(("source", "sink"), PAIRS)
def test_roundings_where_tensors_enter_and_nowhere(source: str, sink: str) -> None:
    for rooted in (True, False):
        entered = found_sites(tensor(Placement.ENTRY, rooted=rooted, passed_on=rooted), source, sink)
        assert entered == ([(f"t->b in {sink}", False)] if sink in ROUNDING else [])
        assert not found_sites(tensor(Placement.NONE, rooted=rooted, passed_on=rooted), source, sink)


@pytest.mark.parametrize(("source", "sink"), PAIRS)
def test_conversions(source: str, sink: str) -> None:
    """Into and out of rounded numbers; a Cast where one end alone computes in another format, wherever it is."""
    leaves = [Conversion(source, "")] if source in ROUNDING and (source, sink) not in SAME else []
    enters = [Conversion("", sink)] if sink in ROUNDING and (source, sink) not in SAME else []
    cast = {source, sink} <= set(FLOATS) and (source == "half") != (sink == "half")
    casts = [Conversion(source, sink)] if cast else []
    for kind, expected in (
        (Placement.ENDS, [*casts, *leaves, *enters]), (Placement.ENTRY, [*casts, *enters]), (Placement.NONE, casts)
    ):  # fmt: skip
        found = conversions(tensor(kind), OF[source], OF[sink])
        assert list(found) == expected
        assert [c.rounding for c in found] == [not casts] * len(found)


def test_all_conversions_of_some_schemes() -> None:
    rounding = [Conversion(*ends) for name in ROUNDING for ends in ((name, ""), ("", name))]
    others = [(BASELINE, "half"), ("half", BASELINE), ("half", "weights"), ("weights", "half")]
    found = placement.all_conversions(SCHEMES)
    assert found == (*rounding, *(Conversion(*ends) for ends in others))
    assert [(c.source, c.sink) for c in sorted(found)] == sorted((c.source, c.sink) for c in found)


def unit(name: str, allowed: tuple[str, ...]) -> Unit:
    return Unit(
        id=name, kind="Drawn", region="", core=(name,), tail=(), root=f"{name}.out", macs=0, allowed=allowed,
        inner=(Edge(tensor=f"{name}.in", node=name, slot=0),),
        weights=tuple(WeightSite(tensor=f"{name}.w{i}", node=name, slot=i, axis=0, elements=1) for i in (1, 2)),
    )  # fmt: skip


def test_sites_inside_a_unit() -> None:
    inner = ("a.in->a#0", placement.ACTIVATIONS)
    weights = [(f"a.w{i}->a#{i}", placement.WEIGHTS) for i in (1, 2)]
    expected = {
        BASELINE: [], "half": [("a", placement.WHOLE)], "weights": weights, "int8": [inner, *weights],
        "mixed": [inner, *weights], "int4": [inner],
    }  # fmt: skip
    for name, places in expected.items():
        sites = own_sites(unit("a", ()), OF[name])
        assert list(sites) == [Site(place, name, part) for place, part in places]
        assert [s.id for s in sites] == [f"{place} in {name}" for place, _ in places]
        assert not any(s.end or s.again for s in sites)


def graph(first: tuple[str, ...], second: tuple[str, ...], *edges: UnitEdge) -> UnitGraph:
    units = (unit("a", first), unit("b", second))
    return UnitGraph(target="drawn", model_sha256="", units=units, edges=edges, schemes=SCHEMES)


def test_all_pairs_of_schemes_of_a_tensor() -> None:
    """Units that may not take a scheme do not have it; inputs and outputs of the graph are floats."""
    first, second = (BASELINE, "int4"), ("int8", "half")
    given, made, own, kept = (
        tensor(Placement.ENDS, producer=p, consumer=c) for p, c in ((None, "a"), ("b", None), ("a", "a"), ("a", "b"))
    )
    units = graph(first, second, given, made, own, kept)
    expected = {
        given: [(BASELINE, BASELINE), (BASELINE, "int4")],
        made: [("int8", BASELINE), ("half", BASELINE)],
        own: [(BASELINE, BASELINE), ("int4", "int4")],
        kept: [(BASELINE, "int8"), (BASELINE, "half"), ("int4", "int8"), ("int4", "half")],
    }
    for edge, pairs in expected.items():
        assert [(a.name, b.name) for a, b in placement.scheme_pairs(units, edge)] == pairs


def test_every_site_has_one_owner() -> None:
    """Of a tensor that both ends may round the producer, which rounds its result whoever reads it."""
    schemes = (BASELINE, "int8", "int4")
    between = tensor(Placement.ENDS, passed_on=True)
    units = graph(schemes, (BASELINE, "int8"), tensor(Placement.ENDS, producer=None, consumer="a"), between)
    assert [s.id for s in placement.possible_sites(units, between)] == [
        "t->b in int8", "t->b after int4 in int8", "t->b again in int8", "t->b again in int4"
    ]  # fmt: skip
    own = {f"{u}.{at} in {s}": u for u, names in (("a", schemes[1:]), ("b", ("int8",))) for s in names
           for at in (f"in->{u}#0", *((f"w1->{u}#1", f"w2->{u}#2") if s == "int8" else ()))}  # fmt: skip
    edges = {
        "t->a in int8": "a", "t->a in int4": "a", "t->b in int8": "b", "t->b after int4 in int8": "b",
        "t->b again in int8": "a", "t->b again in int4": "a",
    }  # fmt: skip
    assert placement.site_owners(units) == own | edges
    assert sorted({s.id for s in placement.all_sites(units)}) == sorted(own | edges)
    plain = msgspec.structs.replace(units, edges=(tensor(Placement.ENDS), tensor(Placement.ENDS, consumer=None)))
    owners = placement.site_owners(plain)
    assert (owners["t->b in int8"], owners["t->b in int4"], owners["t->(output) in int8"]) == ("a", "a", "a")
    loose = msgspec.structs.replace(units, edges=(tensor(Placement.ENDS, producer=None, consumer=None),))
    assert placement.site_owners(loose) == own


def test_what_a_plan_rounds_and_converts() -> None:
    """Each tensor that several units read is converted once; edges without a unit of the plan are left alone."""
    schemes = (BASELINE, "int8", "int4")
    twice, other = tensor(Placement.ENDS), tensor(Placement.ENDS, consumer="c")
    kept = msgspec.structs.replace(tensor(Placement.ENDS, producer="d", consumer="c"), tensor="k", elements=100)
    into = msgspec.structs.replace(tensor(Placement.ENDS, producer="d"), tensor="k", elements=100)
    units = graph(schemes, schemes, twice, other, kept, into)
    units = msgspec.structs.replace(units, units=(*units.units, unit("c", schemes), unit("d", schemes)))
    a = {"a.in->a#0 in int8", "a.w1->a#1 in int8", "a.w2->a#2 in int8"}
    assert placement.rounded(units, Plan()) == frozenset() and placement.borders(units, Plan()) == {}
    assert placement.rounded(units, Plan({"a": "int8"})) == a | {"t->b in int8", "t->c in int8"}
    assert placement.borders(units, Plan({"a": "int8"})) == {Conversion("int8", ""): (7.0, 1)}
    plan = Plan({"a": "int8", "b": "int4"})
    b = {"b.in->b#0 in int4", "t->b after int8 in int4", "k->b in int4"}
    assert placement.rounded(units, plan) == a | b | {"t->b in int8", "t->c in int8"}
    assert placement.borders(units, plan) == {Conversion("int8", ""): (7.0, 1), Conversion("", "int4"): (107.0, 2)}
    touched = [(e.id, s.name, t.name) for e, s, t in placement.touched(units, Plan({"b": "int4"}))]
    assert touched == [("t->b", BASELINE, "int4"), ("k->b", BASELINE, "int4")]
