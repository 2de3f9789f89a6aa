"""What patterns of a budget do to units, and to the search."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest

from bitalloy.core.errors import BitalloyError
from bitalloy.core.plans import BorderCost, Budget, CostTable, Keep, UnitCost, UnitDamage
from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.search.choice import ProvenPlan, complete_plan, search
from bitalloy.search.constraints import constrain
from bitalloy.search.planning import operators_of
from bitalloy.search.problem import Problem
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.placement import all_sites


def keep(*texts: str) -> tuple[Keep, ...]:
    return tuple(Keep(scheme=t.partition(":")[0], pattern=t.partition(":")[2]) for t in texts)


def narrowed(case, *texts: str):
    return constrain(case.units, keep(*texts), operators_of(case.graph)).units


def fixed(units, scheme: str) -> set[str]:
    """Units that a pattern decided."""
    return {u.id for u in units.units if u.allowed == (scheme,) and u.reason.startswith("kept in")}


@pytest.fixture(scope="module")
def problem(case) -> Problem:
    """Tables in which INT8 halves the time of every unit and every site does the same damage."""
    units = case.units
    sites = sorted({site.id for site in all_sites(units)})
    rows = np.random.default_rng(0).standard_normal((4, 2, len(sites))).astype(np.float32) * 1e-2
    heads = tuple(h.name for h in case.heads)
    matrix = ProbeMatrix(
        heads,
        tuple(sites),
        tuple(rows for _ in heads),
        tuple(np.square(rows) for _ in heads),
        np.ones((4, len(heads))),
    )
    whole = tuple(float(d) for d in matrix.damage(matrix.select(sites)).mean(axis=0))
    secant = Secant(heads=heads, fractions=(1.0,), damage=(whole,), linear=whole, samples=4)
    free = units.able("int8")
    cost = CostTable(
        target="ort-cpu",
        device="none",
        threads=1,
        units=tuple(
            UnitCost(
                unit=u.id,
                us={BASELINE: 100.0} | ({"int8": 50.0} if u.id in free else {}),
                bytes={BASELINE: 400} | ({"int8": 100} if u.id in free else {}),
            )
            for u in units.units
        ),
        borders=tuple(
            BorderCost(source=source, sink=sink, us_per_element=0.0, us=5.0)
            for source, sink in (("int8", ""), ("", "int8"))
        ),
        fixed_us=10.0,
        pure_us={BASELINE: 1000.0, "int8": 500.0},
        residual_percent=1.0,
    )
    return Problem(units, matrix, secant, cost, 10_000)


def test_a_pattern_finds_units_by_region_node_kind_and_operator(case) -> None:
    by_id = {u.id: u for u in case.units.units}
    free = case.units.able("int8")
    assert fixed(narrowed(case, "fp32:body"), BASELINE) == {
        u for u in by_id if "/body/" in u and by_id[u].region.startswith("body")
    }
    assert fixed(narrowed(case, "fp32:/body/cv1/Relu"), BASELINE) == {
        u.id for u in case.units.units if "/body/cv1/Relu" in (*u.core, *u.tail)
    }
    convolutions = {u.id for u in case.units.units if any("Conv" in n for n in u.core)}
    assert fixed(narrowed(case, "int8:Conv"), "int8") == convolutions & free
    assert fixed(narrowed(case, "fp32:*"), BASELINE) == set(by_id)


def test_the_last_pattern_holds_and_says_so(case) -> None:
    units = narrowed(case, "fp32:body", "int8:/body/cv1/*")
    inner = {u.id for u in units.units if u.id.startswith("/body/cv1/")}
    assert inner and fixed(units, "int8") == inner & case.units.able("int8")
    assert not fixed(units, BASELINE) & inner
    assert all("int8:/body/cv1/*" in u.reason for u in units.units if u.id in fixed(units, "int8"))
    rest = next(u for u in units.units if u.id in fixed(units, BASELINE))
    assert "fp32:body" in rest.reason and rest.choices == ()
    places = {site.place for site in all_sites(units)}
    assert not places & {part.id for u in units.units if not u.choices for part in (*u.weights, *u.inner)}


def test_numbers_of_a_range(case) -> None:
    """`{0..1}` names what both numbers name, and no third."""
    one = fixed(narrowed(case, "fp32:/body/cv{0..1}/*"), BASELINE)
    assert one == fixed(narrowed(case, "fp32:/body/cv1/*"), BASELINE) != set()
    with pytest.raises(BitalloyError, match="matches no unit"):
        narrowed(case, "fp32:/body/cv{2..9}/*")
    with pytest.raises(BitalloyError, match=re.escape("{9..2}")):
        narrowed(case, "fp32:/body/cv{9..2}/*")


def test_what_cannot_be_is_refused_with_the_reason(case) -> None:
    with pytest.raises(BitalloyError, match=r"Close to it: .*body"):
        narrowed(case, "fp32:bodi")
    refused = next(u for u in case.units.units if u.id not in case.units.able("int8"))
    with pytest.raises(BitalloyError, match=re.escape(refused.id)) as error:
        narrowed(case, f"int8:{refused.id}")
    assert refused.refused["int8"] and refused.refused["int8"] in str(error.value)
    with pytest.raises(BitalloyError, match="FP16"):
        narrowed(case, "fp16:body")


def test_a_region_in_int8_leaves_what_cannot_and_says_why(case) -> None:
    units = narrowed(case, "int8:head")
    unable = [u for u in units.units if u.region.startswith("head") and u.id not in case.units.able("int8")]
    assert unable and all("INT8 was asked for (int8:head)" in u.reason for u in unable)


def test_every_plan_of_the_search_holds_them(case, problem) -> None:
    units = narrowed(case, "fp32:/body/cv1/*", "int8:/stem/*")
    forced, barred = fixed(units, "int8"), fixed(units, BASELINE)
    assert forced and barred & case.units.able("int8")
    free = search(problem, Budget(latency_ratio=0.8))
    bound = Problem(units, problem.matrix, problem.secant, problem.cost, problem.float_bytes)
    plan = search(bound, Budget(latency_ratio=0.8))
    for chosen in (plan.chosen, *(p.chosen for p in plan.pareto)):
        lowered = chosen.units_in("int8")
        assert forced <= lowered and not barred & lowered
    assert plan.predicted_latency_us <= 0.8 * problem.latency_us(Plan()) + 1e-6
    assert bound.total(plan.chosen) >= problem.total(free.chosen) * (1 - 1e-9)
    reasons = {c.unit: c.reason for c in plan.choices}
    assert all("as asked (int8:/stem/*); alone it leaves" in reasons[u] for u in forced)
    assert all("as asked (fp32:/body/cv1/*)" in reasons[u] for u in barred)


def test_without_a_choice_there_is_the_float_plan_alone(case, problem) -> None:
    units = narrowed(case, "fp32:*")
    bound = Problem(units, problem.matrix, problem.secant, problem.cost, problem.float_bytes)
    for budget in (Budget(latency_ratio=1.0), Budget(min_sqnr_db=20.0), Budget(size_bytes=problem.float_bytes)):
        plan = search(bound, budget)
        assert plan.chosen == Plan() and plan.solved and [p.chosen for p in plan.pareto] == [Plan()]
    with pytest.raises(BitalloyError, match=re.escape("is 1.00x of float")):
        search(bound, Budget(latency_ratio=0.5))


def test_floors_of_single_heads_hold(problem) -> None:
    heads = problem.matrix.heads
    plain = search(problem, Budget(min_sqnr_db=15.0))
    strict = search(problem, Budget(min_sqnr_db=15.0, head_sqnr_db={heads[0]: 30.0}))
    assert problem.damage(strict.chosen)[0] <= 10**-3.0
    assert problem.damage(plain.chosen)[0] > 10**-3.0
    assert strict.predicted_latency_us > plain.predicted_latency_us
    with pytest.raises(BitalloyError, match=f"floor on 'nose'.*{heads[0]}"):
        search(problem, Budget(head_sqnr_db={"nose": 10.0}))


def test_limits_together_say_what_is_in_reach(problem) -> None:
    """And that is accepted when it is asked for."""
    budget = Budget(latency_ratio=0.3, head_sqnr_db={problem.matrix.heads[0]: 25.0})
    with pytest.raises(BitalloyError, match="within the other limits") as error:
        search(problem, budget)
    said = re.search(r"is ([\d.]+)x of float", str(error.value))
    assert said is not None
    named = float(said[1])
    found = search(problem, msgspec.structs.replace(budget, latency_ratio=named + 0.01))
    assert found.predicted_latency_us <= (named + 0.01) * problem.latency_us(Plan()) + 1e-6


def test_a_limit_far_out_of_reach_is_refused_however_coarse_the_table(problem) -> None:
    """A table that a busy machine left with an error of 80 % does not make every limit one that may be met."""
    rough = msgspec.structs.replace(problem.cost, residual_percent=80.0)
    coarse = Problem(problem.units, problem.matrix, problem.secant, rough, problem.float_bytes)
    with pytest.raises(BitalloyError, match="lowest latency in reach") as error:
        search(coarse, Budget(latency_ratio=0.1))
    said = re.search(r"is ([\d.]+)x of float", str(error.value))
    assert said is not None
    near = search(coarse, Budget(latency_ratio=0.85 * float(said[1])))
    assert near.predicted_latency_us == pytest.approx(float(said[1]) * problem.latency_us(Plan()), rel=0.02)


def test_reasons_quote_the_table_and_say_what_stands_against_a_unit(case, problem) -> None:
    """One source for each number: the table's row, and the latency of the plan with that unit moved."""
    row = UnitDamage(head=problem.matrix.heads[0], sqnr_db=43.3, exact=True)
    known = {unit: {"int8": row} for unit in problem.choices}
    dear = tuple(msgspec.structs.replace(b, us=1e3) for b in problem.cost.borders)
    tables = [problem.cost, msgspec.structs.replace(problem.cost, borders=dear)]
    seen = set()
    for unit, table in product(sorted(problem.choices)[:3], tables):
        told, plan = replace(problem, alone=known, cost=table), Plan.of("int8", unit)
        found = complete_plan(told, Budget(), ProvenPlan(plan, 0.0), front=False)
        costs = {c.unit: c for c in table.units}
        for choice in found.choices:
            if choice.unit not in problem.choices:
                continue
            saved = costs[choice.unit].saved_us("int8")
            left = f"alone it leaves 43.3 dB on {row.head} (measured)"
            added = told.latency_us(plan.moved(choice.unit, "int8")) - told.latency_us(plan)
            if choice.scheme == "int8":
                assert choice.reason.endswith(left)
            elif added < 0:
                assert choice.reason == f"INT8 would save {-added:.0f} us with its borders, but {left}"
            elif saved > 0:
                assert (
                    choice.reason
                    == f"INT8 would save {saved:.0f} us, but its borders would cost {saved + added:.0f} us"
                )
            else:
                assert "not faster here" in choice.reason
            seen.add((choice.scheme, added < 0, saved > 0))
    assert len(seen) >= 3
    plain = complete_plan(problem, Budget(), ProvenPlan(Plan.of("int8", unit), 0.0), front=False)
    assert any("(predicted)" in c.reason for c in plain.choices)
