"""Moves and the program on drawn unit graphs, whose schemes no target has together: two that round, and one that casts.

All tables hold whole numbers, so that sums are exact in whatever order they are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitalloy.core.plans import BorderCost, CostTable, UnitCost
from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Edge, Placement, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.measure.prices import border_bytes, latency_us, saved_bytes
from bitalloy.search.moves import Moves
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.sensitivity.matrix import ProbeMatrix, straight
from bitalloy.targets.placement import all_conversions, all_sites, borders, rounded, scheme_pairs

SCHEMES = (
    Scheme(name=BASELINE),
    Scheme(name="fp16", activation="float16", weight="float16", cast=True),
    Scheme(name="int8", activation="uint8", weight="int8"),
    Scheme(name="int4", activation="int4", weight="int4"),
)
LOWER = tuple(scheme.name for scheme in SCHEMES[1:])
HEADS = ("left", "right")
FLOAT_BYTES = 10_000


@dataclass(frozen=True)
class Tensor:
    """A tensor of a drawn graph."""

    name: str
    producer: str | None = None
    root: str = ""
    """Tensor whose scale it has: itself where that is empty."""
    elements: int = 1
    concat: bool = False


@st.composite
def unit_graphs(draw: st.DrawFn, *, fewest: int, most: int) -> UnitGraph:
    """Chains with branches: units with and without weights, inner tensors and tails, on all placements of roundings."""
    placement = draw(st.sampled_from([Placement.ENDS, Placement.ENTRY]))
    sizes = st.integers(1, 50)
    tensors = [Tensor("x", elements=draw(sizes))]
    units: list[Unit] = []
    edges: list[UnitEdge] = []

    def connect(tensor: Tensor, consumer: str | None, *, own: bool = False) -> None:
        inside = own and placement is Placement.ENTRY
        rooted = tensor.producer is not None and not tensor.root
        edges.append(
            UnitEdge(
                tensor=tensor.name,
                uses=(Edge(tensor=tensor.name, node=consumer or "", slot=0),),
                producer=tensor.producer,
                consumer=consumer,
                root=tensor.root or tensor.name,
                rooted=rooted,
                elements=tensor.elements,
                passed_on=rooted and tensor.concat and placement is Placement.ENDS,
                placement=Placement.NONE if inside or draw(st.integers(0, 9)) == 0 else placement,
            )
        )

    for number in range(draw(st.integers(fewest, most))):
        name = f"u{number}"
        read = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique_by=lambda t: t.name))
        for tensor in read:
            connect(tensor, name)
        allowed = tuple(s for s in LOWER if draw(st.integers(0, 3)))
        fixed = draw(st.sampled_from([None] * 9 + [*allowed]))
        weights = (WeightSite(tensor=f"{name}.w", node=name, slot=1, axis=0, elements=4),) * draw(st.integers(0, 1))
        inner = (Edge(tensor=f"{name}.inner", node=name, slot=0),) * draw(st.integers(0, 1))
        units.append(
            Unit(
                id=name,
                kind="Drawn",
                region=name,
                core=(name,),
                tail=(),
                root=f"{name}.out",
                inner=inner,
                weights=weights,
                allowed=(BASELINE, *allowed) if fixed is None else (fixed,),
                macs=0,
            )
        )
        made = Tensor(f"{name}.out", name, elements=draw(sizes), concat=draw(st.booleans()))
        tensors.append(made)
        if draw(st.booleans()):
            connect(made, name, own=True)
            tensors.append(Tensor(f"{name}.tail", name, root=made.name, elements=draw(sizes)))
    for tensor in draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, unique_by=lambda t: t.name)):
        connect(tensor, None)
    return UnitGraph(target="drawn", model_sha256="0" * 64, units=tuple(units), edges=tuple(edges), schemes=SCHEMES)


def problem_of(units: UnitGraph, seed: int) -> Problem:
    """Tables of whole numbers for a graph. Some sites reach no head, and some conversions cost nothing."""
    random = np.random.default_rng(seed)

    def whole(high: int) -> int:
        return int(random.integers(0, high))

    sites = tuple(sorted({site.id for site in all_sites(units)}))
    sites = tuple(site for site in sites if random.random() < 0.95)
    samples, probes = int(random.integers(1, 4)), int(random.integers(1, 4))
    shape = samples, probes, len(sites)
    matrix = ProbeMatrix(
        HEADS,
        sites,
        tuple(random.integers(-3, 4, shape).astype(np.float32) for _ in HEADS),
        tuple(random.integers(0, 9, shape).astype(np.float32) for _ in HEADS),
        random.integers(1, 9, (samples, len(HEADS))).astype(np.float64),
    )
    # a network that does not bend
    linear = tuple(float(d) for d in matrix.site_damage().mean(axis=0).sum(axis=1) + 1)
    secant = Secant(heads=HEADS, fractions=(1.0,), damage=(linear,), linear=linear, samples=samples)
    prices = [(c, whole(3), whole(20), whole(90)) for c in all_conversions(SCHEMES) if random.random() < 0.9]
    cost = CostTable(
        target="drawn",
        device="none",
        threads=1,
        units=tuple(
            UnitCost(
                unit=u.id,
                us={name: float(1 + whole(60)) for name in (BASELINE, *u.choices)},
                bytes={name: whole(400) for name in (BASELINE, *u.choices)},
            )
            for u in units.units
        ),
        borders=tuple(
            BorderCost(source=c.source, sink=c.sink, us_per_element=float(each), us=float(us), bytes=float(size))
            for c, each, us, size in prices
        ),
        fixed_us=7.0,
        pure_us={},
        residual_percent=0.0,
    )
    return Problem(units, matrix, secant, cost, FLOAT_BYTES)


def every_plan(units: UnitGraph) -> list[Plan]:
    names = [u.id for u in units.units]
    return [Plan(zip(names, chosen, strict=True)) for chosen in product(*(u.allowed for u in units.units))]


@given(units=unit_graphs(fewest=2, most=6), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_neighbours_are_what_each_plan_gives_by_itself(units: UnitGraph, seed: int, data: st.DataObject) -> None:
    problem = problem_of(units, seed)
    matrix, cost = problem.matrix, problem.cost
    plan = Plan({u.id: data.draw(st.sampled_from(u.allowed), label=u.id) for u in units.units})
    found = Moves(units, problem.moves, matrix, cost).neighbours(plan)
    known = {site.id for site in all_sites(units)}
    assert len(problem.moves) == sum(len(u.choices) for u in units.units if BASELINE in u.allowed)
    for i, (unit, scheme) in enumerate(problem.moves):
        other = plan.moved(unit, BASELINE if plan.scheme_of(unit) == scheme else scheme)
        sites = rounded(units, other)
        assert sites <= known and set(borders(units, other)) <= set(all_conversions(SCHEMES))
        chosen = matrix.select(sites)
        together, alone = matrix.damage(chosen).mean(axis=0), matrix.site_damage().mean(axis=0) @ chosen
        np.testing.assert_allclose(found.together[i], together, rtol=1e-9, atol=1e-9, err_msg=str(other))
        np.testing.assert_allclose(found.alone[i], alone, rtol=1e-9, atol=1e-9, err_msg=str(other))
        assert found.latency_us[i] == latency_us(cost, units, other), other
        assert found.saved_bytes[i] == saved_bytes(cost, other) - border_bytes(cost, units, other), other


@settings(max_examples=100)
@given(
    units=unit_graphs(fewest=4, most=4),
    seed=st.integers(0, 2**32 - 1),
    shares=st.tuples(*[st.none() | st.floats(0, 1)] * 4),
)
def test_no_plan_is_better_than_that_of_the_program(
    units: UnitGraph, seed: int, shares: tuple[float | None, float | None, float | None, float | None]
) -> None:
    """By enumeration, within limits between the extremes of all plans, on latency, size and damage of each head."""
    problem, plans = problem_of(units, seed), every_plan(units)
    sites = [problem.sites(plan) for plan in plans]
    damages = np.array(sites) @ problem.site_damage.T
    goals = damages @ problem.aims
    latencies = np.array([latency_us(problem.cost, units, plan) for plan in plans])
    sizes = np.array([problem.size_bytes(plan) for plan in plans])

    def limit(values: np.ndarray, share: float | None) -> float:
        return np.inf if share is None else float(np.quantile(values, share, method="nearest")) + 0.5

    limits = Limits(
        latency_us=limit(latencies, shares[0]),
        size_bytes=limit(sizes, shares[1]),
        damage=(limit(damages[:, 0], shares[2]), limit(damages[:, 1], shares[3])),
    )
    allowed = np.where(np.isfinite(limits.damages(2)), straight(problem.secant, limits.damages(2)), np.inf)
    slack = 1e-5 * problem.site_damage.sum(axis=1)
    cheap = (latencies <= limits.latency_us) & (sizes <= limits.size_bytes)
    inside = cheap & (damages <= allowed - slack).all(axis=1)
    program = Program(problem)
    for minimize, values, tolerance in (("damage", goals, 1e-4), ("latency", latencies, 1e-3)):
        found = program.solve(limits, minimize=minimize, gap=0.0)
        if found is None:
            assert not inside.any()
            continue
        number = plans.index(found.plan)
        assert cheap[number] and (damages[number] <= allowed + slack).all()
        assert values[number] <= values[inside].min(initial=np.inf) + tolerance


@settings(max_examples=100)
@given(units=unit_graphs(fewest=2, most=4), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_variable_is_one_for_the_pairs_that_ask_for_it_and_free_for_others(
    units: UnitGraph, seed: int, data: st.DataObject
) -> None:
    """Whatever the relation is between the schemes at the two ends of a tensor: most of them no target has yet."""
    program = Program(problem_of(units, seed))
    edges = [e for e in units.edges if e.producer and e.consumer and e.producer != e.consumer]
    assume(edges)
    edge = data.draw(st.sampled_from(edges))
    everywhere = {(a.name, b.name) for a, b in scheme_pairs(units, edge)}
    assume(len(everywhere) > 1)
    asking = data.draw(st.sets(st.sampled_from(sorted(everywhere - {(BASELINE, BASELINE)})), min_size=1))
    known, variable = len(program._conditions), program._new()
    program._require(variable, edge, asking, everywhere)
    ends = str(edge.producer), str(edge.consumer)
    for pair in everywhere:
        chosen = {program._index[end] for end in zip(ends, pair, strict=True) if end[1] != BASELINE}
        least = max(
            bound - sum(factor for index, factor in terms.items() if index in chosen)
            for terms, bound in program._conditions[known:]
            if terms[variable] == 1
        )
        assert least == 1 if pair in asking else least <= 0, (pair, asking)
