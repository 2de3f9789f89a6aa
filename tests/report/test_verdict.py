"""The first screen of a report: whether to ship the model."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bitalloy.core.plans import Budget, SingleFormat
from bitalloy.core.records import Estimate
from bitalloy.core.schemes import BASELINE
from bitalloy.report.verdict import DO_NOT, SHIP, UNDECIDED, ship_verdict

ROOMY = Budget(size_bytes=10**9)


def answer(run: Any, **changes: Any) -> tuple[str, str]:
    changed = run.with_summary(**changes)
    found = ship_verdict(changed.summary, changed.plan, changed.cost)
    return found.answer, found.why


def test_the_answer_follows_from_what_was_asked_and_measured(make_run: Any) -> None:
    run = make_run()
    assert answer(run, budget=ROOMY)[0] == SHIP
    assert answer(run, budget=Budget(size_bytes=10))[0] == DO_NOT
    slower = Estimate(value=1.1, low=1.05, high=1.2)
    assert answer(run, budget=ROOMY, latency_ratio=1.1, latency_ratio_interval=slower)[0] == DO_NOT
    unsure = Estimate(value=0.97, low=0.9, high=1.04)
    found, why = answer(run, budget=ROOMY, latency_ratio=0.97, latency_ratio_interval=unsure)
    assert found == UNDECIDED and "0.90x to 1.04x" in why


def test_what_the_search_aimed_at_by_itself_decides_nothing(make_run: Any) -> None:
    aim = Budget(latency_ratio=0.01, by_default=True)
    found, why = answer(make_run(), budget=aim)
    assert found == SHIP and why.startswith("It is faster, and no metric drops beyond its noise: ")
    assert answer(make_run(), budget=Budget(latency_ratio=0.01))[0] == DO_NOT
    assert answer(make_run(metrics=False), budget=aim)[0] == UNDECIDED


def test_times_of_a_busy_machine_ship_nothing(make_run: Any) -> None:
    spread = make_run().summary.latency_spread_ms
    slow = msgspec.structs.replace(spread.mixed, p10_ms=spread.mixed.median_ms / 1.6)
    found, why = answer(make_run(), budget=ROOMY, latency_spread_ms=msgspec.structs.replace(spread, mixed=slow))
    assert found == UNDECIDED and "busy" in why
    near = msgspec.structs.replace(spread.mixed, p10_ms=spread.mixed.median_ms / 1.4)
    assert answer(make_run(), budget=ROOMY, latency_spread_ms=msgspec.structs.replace(spread, mixed=near))[0] == SHIP


def test_without_a_task_a_limit_on_accuracy_is_needed(make_run: Any) -> None:
    run = make_run(metrics=False)
    assert answer(run, budget=ROOMY)[0] == UNDECIDED
    assert answer(run, budget=Budget(min_sqnr_db=0.0))[0] == SHIP


@pytest.mark.parametrize(("ratio", "within", "expected"), [(1.0, True, DO_NOT), (1.0, False, SHIP), (0.7, True, SHIP)])
def test_a_plan_must_beat_what_people_run_anyway(make_run: Any, ratio: float, within: bool, expected: str) -> None:
    half = SingleFormat(
        scheme="fp16", units=1, predicted_ratio=0.5, predicted_size_bytes=1, predicted_db={}, within=within
    )
    beside = Estimate(value=ratio, low=ratio, high=ratio)
    changes = {"usual_scheme": "fp16", "usual_latency_ratio": beside, "single_formats": (half,)}
    assert answer(make_run(), budget=ROOMY, **changes)[0] == expected


def test_units_that_stay_are_summed_up_by_reason(make_run: Any) -> None:
    run = make_run()
    staying = ship_verdict(run.summary, run.plan, run.cost).staying
    floats = [c.unit for c in run.plan.choices if c.scheme == BASELINE]
    whole = sum(u.us[BASELINE] for u in run.cost.units)
    assert sum(one.count for one in staying) == len(floats) > 0
    expected = sum(u.us[BASELINE] for u in run.cost.units if u.unit in floats) / whole
    assert sum(one.share for one in staying) == pytest.approx(expected)
    assert [one.share for one in staying] == sorted((one.share for one in staying), reverse=True)
    grouped = tuple(msgspec.structs.replace(c, group="the same") for c in run.plan.choices)
    together = ship_verdict(run.summary, msgspec.structs.replace(run.plan, choices=grouped), run.cost).staying
    assert [(t.reason, t.count) for t in together] == [("the same", len(floats))]
