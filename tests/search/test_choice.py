"""What is made of a budget, on three units whose damages add up: by enumeration, and word by word."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import msgspec
import numpy as np
import pytest

from bitalloy.core.errors import BudgetError, UnreachableError
from bitalloy.core.plans import Budget, CostTable, PlanReport, UnitCost, UnitDamage
from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Evidence, Unit, UnitGraph, WeightSite
from bitalloy.search.choice import ProvenPlan, complete_plan, search
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.sensitivity.matrix import ProbeMatrix

SCHEMES = (Scheme(name=BASELINE), Scheme(name="int8", activation="uint8", weight="int8"))
HEADS = ("y", "z", "y KL")
UNITS = ("a", "b", "c")
DAMAGE = np.array([[1e-4, 2e-3, 1e-3], [4e-3, 1e-4, 2e-4], [0.5, 0.5, 0.5]])
"""(heads, units): additive."""
FLOAT_US, LOWER_US = (100.0, 200.0, 400.0), (60.0, 120.0, 300.0)
FLOAT_BYTES = 2_000_000


def unit(name: str, **options: Any) -> Unit:
    return Unit(
        **{
            "id": name, "kind": "Drawn", "region": "", "core": (name,), "tail": (), "root": f"{name}.out", "inner": (),
            "weights": (WeightSite(tensor="w", node=name, slot=1, axis=0, elements=1),),
            "allowed": (BASELINE, "int8"), "macs": 0, **options,
        }
    )  # fmt: skip


def problem_of(*units: Unit, residual: float = 0.0, lower: tuple[float, ...] = LOWER_US, **options: Any) -> Problem:
    graph = UnitGraph(target="drawn", model_sha256="f" * 64, units=units, edges=(), schemes=SCHEMES)
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]).T[:, None].repeat(2, axis=1)
    rows = tuple(np.sqrt(d) * signs for d in DAMAGE)  # no two sites go together
    sites = tuple(f"w->{name}#1 in int8" for name in UNITS)
    matrix = ProbeMatrix(HEADS, sites, rows, tuple(r * r for r in rows), np.ones((4, 3)))
    whole = tuple(float(d) for d in DAMAGE.sum(axis=1))
    secant = Secant(heads=HEADS, fractions=(1.0,), damage=(whole,), linear=whole, samples=4)
    costs = tuple(
        UnitCost(unit=name, us={BASELINE: slow, "int8": fast}, bytes={BASELINE: 400_000, "int8": 100_000 * (i + 1)})
        for i, (name, slow, fast) in enumerate(zip(UNITS, FLOAT_US, lower, strict=True))
    )
    cost = CostTable(
        target="drawn", device="none", threads=1, units=costs, borders=(), fixed_us=0.0, pure_us={},
        residual_percent=residual, left_out_percent=(1.0, -1.0),
    )  # fmt: skip
    return Problem(graph, matrix, secant, cost, FLOAT_BYTES, **options)


@pytest.fixture
def problem() -> Problem:
    return problem_of(*map(unit, UNITS))


def enumerated() -> dict[frozenset[str], tuple[float, float, np.ndarray, float]]:
    """Units in INT8 -> latency, size, damage of the heads, and what is minimized."""
    found: dict[frozenset[str], tuple[float, float, np.ndarray, float]] = {}
    for bits in product((0, 1), repeat=3):
        chosen = np.array(bits)
        damage = DAMAGE @ chosen
        goal = sum(d / whole for d, whole in zip(damage[:2], DAMAGE[:2].sum(axis=1), strict=True)) / 2
        latency = float(np.where(chosen, LOWER_US, FLOAT_US).sum())
        size = FLOAT_BYTES - float(chosen @ [300_000, 200_000, 100_000])
        found[frozenset(u for u, b in zip(UNITS, bits, strict=True) if b)] = latency, size, damage, float(goal)
    return found


def lowered(report: PlanReport) -> set[str]:
    return {c.unit for c in report.choices if c.scheme == "int8"}


@pytest.mark.parametrize("limit", [480.0, 520.0, 560.0, 580.0, 600.0, 620.0, 660.0, 700.0])
def test_the_least_damage_within_a_latency(problem: Problem, limit: float) -> None:
    inside = {units: goal for units, (latency, _, _, goal) in enumerated().items() if latency <= limit + 1e-6}
    best = min(inside, key=lambda units: inside[units])
    for budget in (
        Budget(latency_ms=limit / 1e3),
        Budget(latency_ratio=limit / 700),
        Budget(latency_ratio=limit / 700, latency_ms=9.0),
        Budget(latency_ratio=1.0, latency_ms=limit / 1e3),
        Budget(latency_ms=limit / 1e3, min_sqnr_db=1.0),
        Budget(latency_ms=limit / 1e3, max_drop={"AP": 0.1}),
    ):
        found = search(problem, budget, front=False)
        assert lowered(found) == best
        assert found.predicted_latency_us == pytest.approx(enumerated()[best][0], abs=0.01)


@pytest.mark.parametrize("limit", [1_400_000, 1_500_000, 1_600_000, 1_700_000, 1_900_000, 2_000_000])
def test_the_least_damage_within_a_size(problem: Problem, limit: int) -> None:
    inside = {units: goal for units, (_, size, _, goal) in enumerated().items() if size <= limit}
    best = min(inside, key=lambda units: inside[units])
    for floor in (None, 1.0):
        found = search(problem, Budget(size_bytes=limit, min_sqnr_db=floor), front=False)
        assert lowered(found) == best and found.predicted_size_bytes == enumerated()[best][1]


@pytest.mark.parametrize("floors", [(20.0, None), (24.0, None), (None, 30.0), (27.0, 30.0), (29.9, 23.0), (45.0, 45.0)])
def test_the_fastest_plan_above_a_floor(problem: Problem, floors: tuple[float | None, float | None]) -> None:
    def inside(damage: np.ndarray) -> bool:
        return all(d <= 10 ** (-f / 10) for d, f in zip(damage[:2], floors, strict=True) if f is not None)

    able = {units: latency for units, (latency, _, damage, _) in enumerated().items() if inside(damage)}
    named = {h: f for h, f in zip(HEADS, floors, strict=False) if f is not None}
    found = search(problem, Budget(head_sqnr_db=named), front=False)
    assert lowered(found) == min(able, key=lambda units: able[units])
    if floors[0] == floors[1]:
        assert lowered(search(problem, Budget(min_sqnr_db=floors[0]), front=False)) == lowered(found)


@pytest.mark.parametrize("limit", [1_900_000, 1_800_000, 1_700_000, 1_600_000])
def test_of_plans_that_are_equally_fast_the_least_damaging(limit: int) -> None:
    """Where nothing is faster in INT8, the limit on size alone asks for it."""
    inside = {units: goal for units, (_, size, _, goal) in enumerated().items() if size <= limit}
    found = Program(problem_of(*map(unit, UNITS), lower=FLOAT_US)).solve(Limits(size_bytes=limit), minimize="latency")
    assert found is not None and found.solved and found.gap == 0.0
    assert set(found.plan) == min(inside, key=lambda units: inside[units])


def test_a_drop_alone_starts_from_the_middle(problem: Problem) -> None:
    """Between 480 us and 700 us; of the plans that take 590 us or less the one with the least damage."""
    found = search(problem, Budget(max_drop={"AP": 0.01}), front=False)
    inside = {units: goal for units, (latency, _, _, goal) in enumerated().items() if latency <= 590}
    assert lowered(found) == min(inside, key=lambda units: inside[units])
    sized = search(problem, Budget(max_drop={"AP": 0.01}, size_bytes=FLOAT_BYTES), front=False)
    assert not lowered(sized)


def test_a_head_that_is_none_is_refused(problem: Problem) -> None:
    for name in ("x", "y KL"):
        with pytest.raises(BudgetError, match=re.escape(f"a floor on '{name}', but the output heads are: y, z.")):
            search(problem, Budget(head_sqnr_db={name: 10.0}))


@pytest.mark.parametrize(
    ("residual", "reached"), [(0.0, 456.2), (1.0, 456.2), (5.0, 432.2), (12.0, 364.9), (80.0, 360.2)]
)
def test_a_latency_that_the_table_cannot_tell_from_the_least_is_tried(residual: float, reached: float) -> None:
    """Within twice its error, at least 5 and at most 25 %, of the least of 480 us."""
    problem = problem_of(*map(unit, UNITS), residual=residual)
    found = search(problem, Budget(latency_ms=reached / 1e3), front=False)
    assert lowered(found) == set(UNITS) and found.predicted_latency_us == 480
    with pytest.raises(UnreachableError):
        search(problem, Budget(latency_ms=(reached - 0.5) / 1e3), front=False)


def test_a_limit_just_out_of_reach_leaves_room(problem: Problem) -> None:
    """For plans up to 5 % above the limit, or half a percent above the least latency."""
    lower = (97.0, 120.0, 300.0)
    close = problem_of(*map(unit, UNITS), lower=lower)
    assert lowered(search(close, Budget(latency_ms=0.5165), front=False)) == {"b", "c"}
    assert lowered(search(problem_of(*map(unit, UNITS), lower=(99.0, 120.0, 300.0), residual=12.5),
                          Budget(latency_ms=0.39), front=False)) == {"b", "c"}  # fmt: skip
    assert lowered(search(problem_of(*map(unit, UNITS), lower=(96.0, 120.0, 300.0), residual=12.5),
                          Budget(latency_ms=0.39), front=False)) == {"a", "b", "c"}  # fmt: skip


def refused(problem: Problem, budget: Budget) -> tuple[str, float | None]:
    with pytest.raises(UnreachableError) as error:
        search(problem, budget, front=False)
    return str(error.value), error.value.reachable_ratio


def test_what_is_in_reach_is_said(problem: Problem) -> None:
    smallest, end = "the smallest size is 1.40 MB", "Relax the budget to that or beyond."
    text, ratio = refused(problem, Budget(latency_ratio=0.5))
    assert text == (
        "No plan meets the budget (latency ratio 0.5): the lowest latency in reach is 0.69x of float (0.48 ms); "
        f"{smallest}. {end}"
    )
    assert ratio == pytest.approx(480 / 700)
    text, ratio = refused(problem, Budget(latency_ms=0.3, head_sqnr_db={"z": 30.0}))
    assert text == (
        "No plan meets the budget (latency ms 0.3, SQNR floor dB of z 30.0): the lowest latency in reach within the "
        f"other limits is 0.74x of float (0.52 ms); {smallest}. {end}"
    )
    assert ratio == pytest.approx(520 / 700)
    text, _ = refused(problem, Budget(latency_ms=0.3, size_bytes=1_700_000))
    assert "(latency ms 0.3, size bytes 1700000): the lowest latency in reach within the other limits is 0.69x" in text
    text, _ = refused(problem, Budget(size_bytes=1_000_000))
    assert text == (
        "No plan meets the budget (size bytes 1000000): the lowest latency in reach is 0.69x of float (0.48 ms); "
        f"{smallest}. {end}"
    )
    text, ratio = refused(problem, Budget(size_bytes=1_000_000, min_sqnr_db=24.0))
    assert "(size bytes 1000000, SQNR floor dB 24.0): the lowest latency in reach is 0.74x" in text
    assert ratio == pytest.approx(520 / 700)


def test_floors_out_of_reach_say_what_is_in_reach() -> None:
    kept = problem_of(unit("a", allowed=("int8",), reason="as asked"), unit("b"), unit("c"))
    text, ratio = refused(kept, Budget(min_sqnr_db=70.0))
    assert text == (
        "No plan meets the budget (SQNR floor dB 70.0): the highest SQNR in reach is y 40.0 dB, z 24.0 dB, "
        "y KL 3.0 dB; the smallest size is 1.40 MB. Relax the budget to that or beyond."
    )
    assert ratio is None


def test_a_report_holds_what_the_tables_say(problem: Problem) -> None:
    steps: list[int] = []
    plan = Plan({"a": "int8", "c": "int8"})
    found = complete_plan(
        problem, Budget(min_sqnr_db=3.0), ProvenPlan(plan, 0.25, False), front=False, progress=steps.append
    )
    assert (found.model_sha256, found.target, found.budget) == ("f" * 64, "drawn", Budget(min_sqnr_db=3.0))
    assert found.chosen == plan and found.pareto == () and steps == [1]
    assert found.predicted_latency_us == 560 and found.predicted_size_bytes == 1_600_000
    assert found.optimality_gap == 0.25 and not found.solved
    assert [(h.head, h.predicted_db.value) for h in found.heads] == [
        (h, round(float(-10 * np.log10(d)), 3)) for h, d in zip(HEADS, DAMAGE[:, [0, 2]].sum(axis=1), strict=True)
    ]
    interval = found.predicted_latency_interval_us
    assert interval is not None and interval.low < 560 < interval.high
    assert complete_plan(problem, Budget(), ProvenPlan(plan, 0.0), front=False).solved
    drawn = complete_plan(problem, Budget(), ProvenPlan(plan, 0.0, False), front=True)
    assert plan in {p.chosen for p in drawn.pareto} and not drawn.solved
    whole = complete_plan(problem, Budget(), ProvenPlan(plan, 0.0))
    assert whole.solved and {plan, Plan(), problem.units.lowest()} <= {p.chosen for p in whole.pareto}


def test_the_seed_draws_the_intervals() -> None:
    problem = problem_of(*map(unit, UNITS))
    random = np.random.default_rng(0)
    rows = tuple(r * random.uniform(0.5, 1.5, (4, 2, 3)) for r in problem.matrix.rows)
    noisy = replace(problem, matrix=replace(problem.matrix, rows=rows, own=tuple(r * r for r in rows)))
    budget = Budget(latency_ratio=0.8)
    plain, same, other = (search(noisy, budget, front=False, seed=seed).heads for seed in (0, 0, 1))
    assert plain == same != other == complete_plan(
        noisy, budget, ProvenPlan(search(noisy, budget, front=False).chosen, 0.0), front=False, seed=1
    ).heads  # fmt: skip


def reasons(problem: Problem, plan: Plan) -> list[str]:
    return [c.reason for c in complete_plan(problem, Budget(), ProvenPlan(plan, 0.0), front=False).choices]


def test_reasons_word_by_word() -> None:
    """Units in INT8, in float, with no choice, slower in INT8 though taken or left, and measured alone."""
    lower = (60.4, 260.0, 300.0)
    row = {"c": {"int8": UnitDamage(head="z", sqnr_db=12.34, exact=True)}}
    problem = problem_of(*map(unit, UNITS), lower=lower, alone=row)
    assert reasons(problem, Plan({"a": "int8", "b": "int8"})) == [
        "saves 40 us; alone it leaves 24.0 dB on z (predicted)",
        "avoids borders between INT8 neighbours; alone it leaves 27.0 dB on y (predicted)",
        "INT8 would save 100 us with its borders, but alone it leaves 12.3 dB on z (measured)",
    ]
    assert reasons(problem, Plan())[1] == "INT8 is not faster here (60 us slower)"
    equal = problem_of(*map(unit, UNITS), lower=(100.0, 200.0, 400.0))
    assert reasons(equal, Plan())[0] == "INT8 is not faster here (0 us slower)"
    assert reasons(equal, Plan({"a": "int8"}))[0].startswith("avoids borders")
    kept = problem_of(
        unit("a", allowed=("int8",), reason="as asked"), unit("b", allowed=(BASELINE,), reason="by the user"), unit("c")
    )
    assert reasons(kept, Plan({"a": "int8"}))[:2] == [
        "as asked; alone it leaves 24.0 dB on z (predicted)", "by the user"
    ]  # fmt: skip
    none = problem_of(*(unit(name, allowed=(BASELINE,), reason=f"{name} stays") for name in UNITS))
    assert reasons(none, Plan()) == ["a stays", "b stays", "c stays"]


def test_evidence_follows_the_reason() -> None:
    good = Evidence(magnitude=1234.5, partial_sum=5678.9, subnormal=0.125, depth=9)
    bad = msgspec.structs.replace(good, reason="it would overflow")
    plain = msgspec.structs.replace(good, depth=0)
    problem = problem_of(
        unit("a", evidence={"int8": good}), unit("b", evidence={"int8": bad}), unit("c", evidence={"int8": plain})
    )
    assert [said.partition("; ")[2].removeprefix("alone it leaves 24.0 dB on z (predicted); ")
            for said in reasons(problem, Plan({"a": "int8"}))] == [
        "safe in INT8: values reach 1.23e+03, sums of 9 products reach at most 5.68e+03, 12 % subnormal",
        "not INT8: it would overflow",
        "safe in INT8: values reach 1.23e+03, 12 % subnormal",
    ]  # fmt: skip
