"""The search against exhaustive enumeration, its front, and that it gives the same plan on any number of cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.search.neighbours import same_one_by_one

from bitalloy.core.plans import BorderCost, Budget, CostTable, UnitCost
from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitGraph
from bitalloy.search.choice import search
from bitalloy.search.front import polish
from bitalloy.search.problem import Problem
from bitalloy.search.program import GAP, Limits, Program
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import all_sites, rounded
from bitalloy.targets.safety import HALF_PRECISION

ROOT = Path(__file__).parents[2]


def problem_of(case, seed: int, units: UnitGraph | None = None) -> Problem:
    """Tables with damages of very different size and a gain in time for every unit, drawn at random."""
    random, units = np.random.default_rng(seed), units or case.units
    free, half = units.able("int8"), units.able("fp16")
    sites = sorted({site.id for site in all_sites(units)})
    size = 10 ** random.normal(-2.0, 0.5, len(sites))
    heads = tuple(h.name for h in case.heads)
    rows = tuple((random.standard_normal((6, 3, len(sites))) * size).astype(np.float32) for _ in heads)
    own = tuple(0.8 * np.square(r) for r in rows)
    matrix = ProbeMatrix(heads, tuple(sites), rows, own, random.uniform(0.5, 1.5, (6, len(heads))))
    whole = matrix.damage(matrix.select(sites)).mean(axis=0)
    secant = Secant(
        heads=heads,
        fractions=(0.35, 1.0),
        damage=(tuple(0.13 * whole), tuple(0.8 * whole)),
        linear=tuple(whole),
        samples=6,
    )
    rows_ = [
        UnitCost(
            unit=u.id,
            us={BASELINE: (slow := float(random.uniform(50, 200)))}
            | ({"int8": slow * float(random.uniform(0.3, 1.1))} if u.id in free else {})
            | ({"fp16": 0.6 * slow} if u.id in half else {}),
            bytes={name: {BASELINE: 400, "fp16": 200, "int8": 100}[name] for name in u.allowed},
        )
        for u in units.units
    ]
    borders = [
        BorderCost(source=source, sink=sink, us_per_element=1e-3, us=4.0)
        for source, sink in (("int8", ""), ("", "int8"))
    ]
    if half:
        borders += [
            BorderCost(source=source, sink=sink, us_per_element=2e-3, us=3.0)
            for source, sink in ((BASELINE, "fp16"), ("fp16", BASELINE))
        ]
    cost = CostTable(
        target="ort-cpu",
        device="none",
        threads=1,
        units=tuple(rows_),
        borders=tuple(borders),
        fixed_us=20.0,
        pure_us={BASELINE: 1000.0, "int8": 500.0},
        residual_percent=1.0,
    )
    return Problem(units, matrix, secant, cost, 10_000)


def every_plan(problem: Problem) -> list[Plan]:
    names = problem.choices
    schemes = product(*((BASELINE, *choices) for choices in names.values()))
    return [Plan(zip(names, chosen, strict=True)) for chosen in schemes]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("half", [False, True])
def test_moves_are_what_each_plan_gives_by_itself(case, seed: int, half: bool) -> None:
    """Where kernels read and write integers; also beside FP16, which no target of that kind has."""
    offers = (HALF_PRECISION, *ORT_CPU.offers) if half else ORT_CPU.offers
    units = split(case.graph, replace(ORT_CPU, offers=offers), case.heads)
    problem, random = problem_of(case, seed, units), np.random.default_rng(seed)
    count = len(problem.choices)
    assert len(problem.moves) == sum(len(c) for c in problem.choices.values()) > count * half
    for _ in range(4):
        drawn = {u: str(random.choice([BASELINE, *choices])) for u, choices in problem.choices.items()}
        same_one_by_one(problem, Plan(drawn))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_program_is_optimal_within_its_gap(case, seed: int, share: float) -> None:
    """Of all plans within the limit, by enumeration; the limit lies between the fastest plan and float."""
    problem = problem_of(case, seed)
    times = [problem.latency_us(p) for p in every_plan(problem)]
    limit = min(times) + share * (problem.latency_us(Plan()) - min(times))
    goal = problem.aims @ problem.site_damage

    def additive(plan: Plan) -> float:
        return float(goal @ problem.matrix.select(rounded(problem.units, plan)))

    best = min(additive(p) for p in every_plan(problem) if problem.latency_us(p) <= limit)
    found = Program(problem).solve(Limits(latency_us=limit), minimize="damage")
    assert found is not None and found.solved and found.gap <= GAP
    assert problem.latency_us(found.plan) <= limit * (1 + 1e-6)
    assert best * (1 - 1e-6) <= additive(found.plan) <= best * (1 + 2 * GAP)
    polished = polish(problem, found.plan, Limits(latency_us=limit))
    assert problem.total(polished) <= problem.total(found.plan) and problem.latency_us(polished) <= limit * (1 + 1e-6)


def test_no_plan_of_the_front_is_beaten_by_another(case) -> None:
    problem = problem_of(case, 0)
    plan = search(problem, Budget(latency_ratio=0.85))
    points = [(p.predicted_latency_us, p.damage) for p in plan.pareto]
    assert points == sorted(points) and len({p.chosen for p in plan.pareto}) == len(points)
    assert all(after < before for (_, before), (_, after) in pairwise(points))
    assert plan.chosen in {p.chosen for p in plan.pareto}
    assert plan.solved and all(0 <= p.optimality_gap <= 0.03 for p in plan.pareto)
    # the plans are those that enumeration finds, up to the gap and what local search leaves: at each latency of the
    # front, no plan does less than half its damage
    everything = [(problem.latency_us(p), problem.total(p)) for p in every_plan(problem)]
    for latency, damage in points:
        assert damage <= 2 * min(d for t, d in everything if t <= latency + 0.01) + 1e-12


def test_one_core_or_all_give_the_same_plan(case) -> None:
    cores = os.sched_getaffinity(0)
    found = []
    try:
        for some in ({min(cores)}, cores):
            os.sched_setaffinity(0, some)
            found.append(search(problem_of(case, 1), Budget(latency_ratio=0.85)))
    finally:
        os.sched_setaffinity(0, cores)
    assert found[0] == found[1]


def test_a_limit_of_the_solver_is_said(case, monkeypatch) -> None:
    """Where the tree may not be searched, the plan says that the gap was not closed, or is proven all the same."""
    problem = problem_of(case, 2)
    whole = search(problem, Budget(latency_ratio=0.85), front=False)
    assert whole.solved
    monkeypatch.setattr("bitalloy.search.program.milp", _stopped)
    stopped = search(problem, Budget(latency_ratio=0.85), front=False)
    assert not stopped.solved
    assert msgspec.json.decode(msgspec.json.encode(stopped))["solved"] is False


def _stopped(*arguments, **named):
    """The real solver, whose result says that it came to its limit."""
    from scipy.optimize import milp

    result = milp(*arguments, **named)
    result.status = 1
    return result


def test_twenty_plans_of_a_large_network() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "search_time.py"), "--units", "60"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True)
    figures = json.loads(shown.stdout.splitlines()[-1])
    assert figures["plans"] >= 20 and figures["same"] and figures["solved"] and figures["gap"] <= 0.03
