"""Plans of three schemes against enumeration, and the estimated cost behind them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.micro import build
from tests.search.neighbours import same_one_by_one

from bitalloy.core.plans import Budget
from bitalloy.core.records import Secant, TensorRange
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.measure.roofline import estimate_costs
from bitalloy.model.heads import find_heads
from bitalloy.search.choice import search
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.search.single import single_plans
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.base import split
from bitalloy.targets.devices import Device
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe
from bitalloy.targets.safety import judge, tensors_to_judge
from bitalloy.targets.tensorrt import TENSORRT

SLOW = Device(
    id="slow",
    name="a device of round numbers",
    capability=86,
    operations_per_second={BASELINE: 1e9, "fp16": 2e9, "int8": 4e9},
    bytes_per_second=1e9,
    start_us=0.5,
)
PAD = {"pads": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """Four convolutions, a residual Add and an Exp, which has no INT8: 3^5 * 2 plans."""
    nodes = [
        ("Conv", ("x", "w1"), "c1", PAD),
        ("Relu", ("c1",), "r1", {}),
        ("Conv", ("r1", "w2"), "c2", PAD),
        ("Add", ("c2", "r1"), "sum", {}),
        ("Exp", ("sum",), "e", {}),
        ("Conv", ("e", "w3"), "c3", PAD),
        ("Conv", ("c3", "w4"), "y", PAD),
    ]
    weights = {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), "w3": (8, 6, 3, 3), "w4": (4, 8, 3, 3)}
    path = Path(tmp_path_factory.mktemp("three")) / "m.onnx"
    graph = build(path, nodes, {"x": (1, 3, 8, 8)}, ("y", (1, 4, 8, 8)), weights)
    heads = find_heads(graph)
    units = split(graph, TENSORRT, heads)
    ranges = {t: (-4.0, 4.0) for t in tensors_to_judge(graph, units)}
    known = {t: TensorRange(tensor=t, low=-4, high=4, method="", magnitude=4, subnormal=0.01) for t in ranges}
    units = judge(graph, units, known)
    prober = Prober(graph, heads, [Recipe(units, TENSORRT, ranges)])
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32) * 0.3} for _ in range(4)]
    matrix = ProbeMatrix.concatenate([prober.measure(f, sample=i, probes=8, seed=0) for i, f in enumerate(feeds)])
    ones = (1.0,) * len(heads)
    secant = Secant(heads=matrix.heads, fractions=(1.0,), damage=(ones,), linear=ones, samples=0)
    return Problem(units, matrix, secant, estimate_costs(graph, units, SLOW), 100_000)


@pytest.fixture(scope="module")
def plans(problem: Problem) -> list[Plan]:
    """All plans there are."""
    schemes = product(*((BASELINE, *choices) for choices in problem.choices.values()))
    return [Plan(zip(problem.choices, chosen, strict=True)) for chosen in schemes]


def additive(problem: Problem, plan: Plan) -> float:
    return float(problem.aims @ problem.site_damage @ problem.matrix.select(rounded(problem.units, plan)))


def test_every_unit_has_its_schemes(problem: Problem, plans: list[Plan]) -> None:
    allowed = {u.id: u.allowed for u in problem.units.units}
    assert allowed.pop("e") == (BASELINE, "fp16")
    assert set(allowed.values()) == {(BASELINE, "fp16", "int8")} and len(allowed) == 5
    assert len(plans) == 2 * 3**5


def test_moves_are_what_each_plan_gives_by_itself(problem: Problem, plans: list[Plan]) -> None:
    """Where kernels round what they read."""
    assert len(problem.moves) == 2 * 5 + 1
    for plan in plans[::17]:
        same_one_by_one(problem, plan)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.65, 0.8, 0.95])
def test_program_finds_the_optimum_of_enumeration(problem: Problem, plans: list[Plan], share: float) -> None:
    """Borders of both kinds and the one scheme per unit are linearised without loss."""
    start = problem.latency_us(Plan())
    limits = Limits(latency_us=share * start)
    within = [p for p in plans if problem.latency_us(p) <= limits.latency_us]
    found = Program(problem).solve(limits, minimize="damage", gap=0.0)
    if not within:
        assert found is None
        return
    assert found is not None and problem.latency_us(found.plan) <= limits.latency_us * (1 + 1e-9)
    best = min(additive(problem, p) for p in within)
    assert additive(problem, found.plan) <= best * (1 + 1e-4) + 1e-5


def test_program_finds_the_fastest_plan_and_the_search_uses_all_schemes(problem: Problem, plans: list[Plan]) -> None:
    fastest = Program(problem).solve(Limits(), minimize="latency", gap=0.0)
    least = min(problem.latency_us(p) for p in plans)
    assert fastest is not None and problem.latency_us(fastest.plan) == pytest.approx(least, rel=1e-6)
    start = problem.latency_us(Plan())
    half = problem.latency_us(Plan.of("fp16", *problem.choices))
    middle = 0.5 * (least + half) / start  # FP16 everywhere is too slow
    plan = search(problem, Budget(latency_ratio=middle))
    int8, fp16 = (plan.chosen.units_in(name) for name in ("int8", "fp16"))
    assert int8 and fp16 and plan.predicted_latency_us <= middle * start
    assert dict(plan.chosen) == dict.fromkeys(int8, "int8") | dict.fromkeys(fp16, "fp16")
    within = [problem.total(p) for p in plans if problem.latency_us(p) <= middle * start]
    assert problem.total(plan.chosen) <= 1.1 * min(within)
    assert plan.chosen in {p.chosen for p in plan.pareto}
    reasons = {c.unit: c.reason for c in plan.choices}
    assert all("safe in FP16: values reach 4," in reason for reason in reasons.values())
    assert "sums of 54 products" in reasons["c2"]


def test_estimated_cost_is_the_arithmetic_that_it_says(problem: Problem) -> None:
    cost = {c.unit: c for c in problem.cost.units}
    assert problem.cost.estimated and problem.cost.device == f"{SLOW.name} (estimated from peak rates)"
    macs, weights, read, made = 64 * 6 * 54, 6 * 54, 6 * 64, 6 * 64
    assert cost["c2"].us[BASELINE] == pytest.approx(2 * macs / 1e3 + 0.5)
    assert cost["c2"].us["fp16"] == pytest.approx(2 * macs / 2e3 + 0.5)
    assert cost["c2"].us["int8"] == pytest.approx(2 * macs / 4e3 + 0.5)
    assert cost["c2"].bytes == {BASELINE: 4 * weights, "fp16": 2 * weights, "int8": weights}
    assert cost["e"].us[BASELINE] == pytest.approx(
        4 * (read + made) / 1e3 + 0.5
    )  # no arithmetic counted: memory decides
    assert cost["e"].us["fp16"] == pytest.approx(2 * (read + made) / 1e3 + 0.5) and "int8" not in cost["e"].us
    alone = problem.latency_us(Plan.of("fp16", "e")) - problem.latency_us(Plan())
    casts = (read + made) * 6 / 1e3  # one on each side, 4 + 2 bytes an element
    assert alone == pytest.approx(cost["e"].us["fp16"] - cost["e"].us[BASELINE] + casts)


def by_scheme(problem: Problem) -> dict[str, Plan]:
    """The two plans of one scheme, written out."""
    convolutions = ("c1", "r1", "c2", "sum", "c3", "y")
    units = [u.id for u in problem.units.units]
    assert set(units) <= {*convolutions, "e"}
    return {
        "fp16": Plan.of("fp16", *units),
        "int8": Plan.of("int8", *(u for u in units if u != "e")),
    }


def test_plans_of_one_scheme_are_predicted_by_the_tables(problem: Problem) -> None:
    expected = by_scheme(problem)
    found = {s.format.scheme: s for s in single_plans(problem, Budget(min_sqnr_db=-100))}
    assert {name: s.plan for name, s in found.items()} == expected
    whole = problem.latency_us(Plan())
    for name, plan in expected.items():
        told = found[name].format
        assert told.units == len(plan) and told.within
        assert told.predicted_ratio == pytest.approx(problem.latency_us(plan) / whole, abs=1e-4)
        assert told.predicted_size_bytes == problem.size_bytes(plan)
        assert list(told.predicted_db.values()) == pytest.approx(list(-10 * np.log10(problem.damage(plan))), abs=1e-3)


def test_the_best_plan_of_one_scheme_follows_the_budget(problem: Problem) -> None:
    """INT8 is the faster one here, FP16 the more exact one; where people run one of them anyway, that one is it."""
    assert problem.units.usual == "fp16"
    for floor in (0.0, 200.0):
        assert {s.format.scheme for s in single_plans(problem, Budget(min_sqnr_db=floor)) if s.format.best} == {"fp16"}
    problem = replace(problem, units=msgspec.structs.replace(problem.units, usual=BASELINE))
    plans = by_scheme(problem)
    whole, slower = problem.latency_us(Plan()), max(problem.latency_us(p) for p in plans.values())
    loud, quiet = (float(-10 * np.log10(problem.damage(plans[name])).min()) for name in ("int8", "fp16"))
    assert problem.latency_us(plans["int8"]) < problem.latency_us(plans["fp16"]) and loud + 5 < quiet
    for budget, best, within in (
        (Budget(min_sqnr_db=loud - 1), "int8", {"int8", "fp16"}),  # the fastest
        (Budget(min_sqnr_db=loud + 1), "fp16", {"fp16"}),  # the only one
        (Budget(min_sqnr_db=quiet + 1), "int8", set()),  # none keeps it: the fastest
        (Budget(latency_ratio=slower / whole + 0.01), "fp16", {"int8", "fp16"}),  # the most exact
        (Budget(latency_ratio=slower / whole - 0.01), "int8", {"int8"}),
        (Budget(size_bytes=max(map(problem.size_bytes, plans.values()))), "fp16", {"int8", "fp16"}),
        (Budget(max_drop={"any": 0.1}), "int8", {"int8", "fp16"}),
    ):
        found = [s.format for s in single_plans(problem, budget)]
        assert {s.scheme for s in found if s.best} == {best}, budget
        assert {s.scheme for s in found if s.within} == within, budget


def test_one_scheme_alone_is_no_choice(problem: Problem) -> None:
    units = tuple(u.without("fp16", "no reason") for u in problem.units.units)
    less = replace(problem, units=msgspec.structs.replace(problem.units, units=units))
    assert single_plans(less, Budget(latency_ratio=0.9)) == ()
