"""The best plan of one scheme beside a mixed one: shown, and shipped where the mixed one loses."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

import bitalloy
from bitalloy.core.plans import Budget, ParetoPoint, SingleFormat
from bitalloy.core.records import Estimate
from bitalloy.core.schemes import Plan
from bitalloy.core.work import Workspace
from bitalloy.pipeline.run import render
from bitalloy.search.choice import ProvenPlan
from bitalloy.search.planning import plan_around
from bitalloy.search.single import SinglePlan
from bitalloy.verify.course import VerificationCourse
from bitalloy.verify.headline import headline_of
from bitalloy.verify.keeping import Kept

BUDGET = Budget(min_sqnr_db=0.0)


@pytest.fixture(scope="module")
def analysis(inputs: Any) -> Any:
    """On a target with two schemes, whose latencies are estimated: they are the same each time."""
    model = bitalloy.load(inputs.classifier)
    data = bitalloy.open_data(model, inputs.images)
    settings = bitalloy.Settings(targets=("tensorrt",), samples=2, probes=2, calibration_samples=2)
    return bitalloy.analyze(model, data, settings)


@pytest.fixture(scope="module")
def poor(analysis: Any) -> Any:
    """A plan that lowers one unit only."""
    planned = bitalloy.plan(analysis, BUDGET)
    course = VerificationCourse(analysis, planned, Workspace())
    unit = next(u for u in analysis.units.units if u.choices)
    decided = ProvenPlan(Plan.of(unit.choices[-1], unit.id), 0.0)
    return plan_around(course.tables, BUDGET, decided, front=False, work=Workspace())


def test_a_mixed_plan_that_loses_is_not_shipped(analysis: Any, poor: Any) -> None:
    course = VerificationCourse(analysis, poor, Workspace())
    best = next(s for s in course.singles if s.format.best)
    assert best.format.within and best.format.predicted_ratio == min(s.format.predicted_ratio for s in course.singles)
    course._try(poor, BUDGET, "search")
    assert course.best.planned.plan.chosen == best.plan != poor.plan.chosen
    assert course.best.measured.ratio == pytest.approx(best.format.predicted_ratio, abs=1e-3)
    assert course.best.mixed.size_bytes == analysis.artefact(best.plan).size_bytes
    assert [(r.source, r.shipped) for r in course.rounds()] == [("search", False), ("single", True)]
    assert course.completed().plan.chosen == best.plan


def test_a_mixed_plan_that_wins_is(analysis: Any) -> None:
    """The plan that is found for a latency that no scheme alone reaches with as little damage."""
    planned = bitalloy.plan(analysis, BUDGET)
    course = VerificationCourse(analysis, planned, Workspace())
    course._try(planned, BUDGET, "search")
    rival = course._tried[0].rival
    ratio = course.best.measured.ratio
    assert ratio <= planned.predicted_ratio + 1e-3
    assert rival is None or ratio <= rival.measured.ratio
    assert sum(r.shipped for r in course.rounds()) == 1


def test_all_columns_speak_of_the_same_model(analysis: Any) -> None:
    """A model between both: its limit on latency is what FP16 takes, so that FP16 is the best scheme alone."""
    course = VerificationCourse(analysis, bitalloy.plan(analysis, BUDGET), Workspace())
    ratios = {s.format.scheme: s.format.predicted_ratio for s in course.singles}
    asked = Budget(latency_ratio=ratios["fp16"] + 0.001)
    verified = bitalloy.verify(analysis, bitalloy.plan(analysis, asked))
    summary = verified.summary
    assert [s.scheme for s in summary.single_formats] == sorted(ratios, key=lambda name: ratios[name])
    (best,) = (s for s in summary.single_formats if s.best)
    whole = Plan.of(best.scheme, *analysis.units.able(best.scheme))
    assert best.scheme == "fp16" and whole not in (verified.planned.plan.chosen, analysis.units.lowest())
    assert summary.latency_ms.single is not None and summary.latency_spread_ms.single is not None
    assert summary.latency_ms.single / summary.latency_ms.reference == pytest.approx(best.predicted_ratio, abs=1e-3)
    assert summary.size_bytes.single == analysis.artefact(whole).size_bytes
    for head, pair in summary.sqnr_db.items():
        assert pair.single is not None and pair.single.measured == pytest.approx(best.predicted_db[head], abs=6)
        assert pair.single.predicted == pytest.approx(best.predicted_db[head], abs=1)
    sources = [r.source for r in summary.rounds]
    assert sources.count("single") == 1 and summary.single_latency_ratio is None  # estimated
    page = render(verified)
    assert (
        ">FP16</th>" in page
        and page.index(">FP16</th>") < page.index(">mixed</th>")
        and "Plans of one scheme" in page
        and "all FP16" in page
    )
    rows = re.findall(r"<tr[^>]*>\s*<th scope=.row.[^>]*>(?:File size|Latency, estimated).*?</tr>", page, re.DOTALL)
    assert len(rows) >= 2 and all(row.count("<td") == 4 for row in rows)


def single(name: str, ratio: float, *, within: bool = True) -> SinglePlan:
    told = SingleFormat(
        scheme=name, units=1, predicted_ratio=ratio, predicted_size_bytes=1, predicted_db={}, within=within
    )
    return SinglePlan(Plan.of(name, "u"), told)


def test_under_a_limit_on_a_metric_the_plan_that_was_judged_is_shipped(analysis: Any, poor: Any) -> None:
    planned = bitalloy.plan(analysis, Budget(max_drop={"m": 0.1}))
    judge: Any = None
    for of_one_scheme in (True, False):
        course = VerificationCourse(analysis, planned, Workspace())
        other = next(s for s in course.singles if not s.format.best)
        chosen = other.plan if of_one_scheme else poor.plan.chosen
        point = ParetoPoint(
            schemes=dict(chosen), predicted_latency_us=1.0, size_bytes=1, damage=0.0, sqnr_db=(), optimality_gap=0
        )
        course.decide(Kept(point, (), judge))
        assert course.best.planned.plan.chosen == chosen
        assert course.single == next(s.plan for s in course.singles if s.format.scheme == "fp16")


def test_a_plan_that_is_not_faster_than_half_precision_says_so(analysis: Any) -> None:
    """A floor that INT8 cannot keep leaves FP16; a plan that takes much less is told beside it."""
    summary = bitalloy.verify(analysis, bitalloy.plan(analysis, Budget(min_sqnr_db=50.0))).summary
    found = summary.usual_latency_ratio
    assert summary.usual_scheme == "fp16" and found is not None
    assert found.value > 0.98 and found.low <= found.value <= found.high
    beside = next(s.predicted_ratio for s in summary.single_formats if s.scheme == "fp16")
    assert found.value == pytest.approx(summary.predicted_latency_ratio / beside, rel=2e-3)
    assert summary.headline.startswith("Keep FP16: ")
    less = Estimate(value=0.62, low=0.5, high=0.9)
    faster = headline_of(msgspec.structs.replace(summary, usual_latency_ratio=less))
    assert "Keep" not in faster and "0.62x of FP16's (not measured: 0.50 to 0.90)" in faster


def test_the_usual_budget_is_a_part_of_what_people_have_anyway(inside: Any, inputs: Any) -> None:
    inside.run(inputs.classifier, "--data", inputs.images, "--target", "tensorrt").succeeded()
    summary = inside.summary()
    half = next(s["predicted_ratio"] for s in summary["single_formats"] if s["scheme"] == "fp16")
    asked = summary["budget"]["latency_ratio"]
    assert asked == pytest.approx(0.7 * half, abs=1e-3) or "out of reach on NVIDIA" in " ".join(summary["notes"])
