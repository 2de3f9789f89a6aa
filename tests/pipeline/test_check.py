"""Gates on finished runs: exit codes, what counts as worse than a baseline, and what CI gets to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from tests.report.conftest import Run, make_run

import bitalloy
from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import DropEstimate
from bitalloy.core.plans import Budget
from bitalloy.core.records import Estimate
from bitalloy.core.summaries import write_summary

LIMITS = Budget(latency_ratio=0.9, max_drop={"AP50-95": 0.05})


def stored(folder: Path, name: str, run: Run | None = None, **changes: Any) -> Path:
    """The files of a run that gates read; its summary with some changes."""
    run = run or make_run(blocks=2)
    known = {"latency_ratio_interval": around(run.summary.latency_ratio, 0.02), "budget": LIMITS, **changes}
    (folder / name).mkdir()
    (folder / name / "summary.json").write_bytes(write_summary(run.with_summary(**known).summary))
    (folder / name / "plan.json").write_bytes(to_json(run.plan))
    return folder / name


def around(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def with_drop(drop: Estimate | None) -> dict[str, Any]:
    metrics = make_run(blocks=2).summary.metrics
    return {"metrics": {"AP50-95": msgspec.structs.replace(metrics["AP50-95"], drop_mixed=drop)}}


def changes(found: Any) -> dict[str, str]:
    return {one.name: str(one.change) for one in found}


def test_a_run_is_judged_by_its_limits_and_by_others(tmp_path: Path) -> None:
    run = stored(tmp_path, "run")
    ratio = make_run(blocks=2).summary.latency_ratio
    found = bitalloy.check(run)
    assert found.passed and found.verdict == "met" and len(found.limits) == 2
    missed = bitalloy.check(run, budget=Budget(latency_ratio=ratio / 2))
    assert not missed.passed and missed.verdict == "missed" and missed.reason.startswith("missed: latency over float")
    assert [limit.asked for limit in missed.limits] == [ratio / 2, found.limits[1].asked], "each replaces its own"
    strict = stored(tmp_path, "strict", budget=Budget(max_drop={"AP50-95": -1.0}))
    loose = bitalloy.check(strict, budget=Budget(latency_ratio=ratio * 5))
    assert not loose.passed and [limit.verdict for limit in loose.limits] == ["met", "missed"]
    assert bitalloy.check(strict, budget=Budget(max_drop={"AP50-95": 0.5})).passed
    with pytest.raises(bitalloy.BudgetError, match=r"'boxs'.*boxes"):
        bitalloy.check(run, budget=Budget(head_sqnr_db={"boxs": 30.0}), allow_undecided=True)
    with pytest.raises(bitalloy.BudgetError, match=r"did not measure the metric 'accuracy'. It measured: AP50-95"):
        bitalloy.check(run, budget=Budget(max_drop={"accuracy": 0.1}))
    with pytest.raises(bitalloy.BudgetError, match="nothing to check"):
        bitalloy.check(stored(tmp_path, "free", budget=Budget()))
    with pytest.raises(bitalloy.BudgetError, match="nothing to check"):
        bitalloy.check(stored(tmp_path, "aimed", budget=Budget(latency_ratio=ratio / 2, by_default=True)))
    with pytest.raises(bitalloy.RunDirectoryError, match="no finished run"):
        bitalloy.check(tmp_path)


def test_what_is_undecided_passes_only_where_that_is_allowed(tmp_path: Path) -> None:
    run = stored(tmp_path, "run", **with_drop(None))
    assert (bitalloy.check(run).verdict, bitalloy.check(run).passed) == ("undecided", False)
    assert bitalloy.check(run, allow_undecided=True).passed


def test_a_limit_that_was_estimated_for_another_value_is_judged_again(tmp_path: Path) -> None:
    estimate = DropEstimate(drop=around(0.01, 0.002), limit=0.05, probability=0.99, confidence=0.8, plans=3, images=100)
    run = stored(tmp_path, "run", drop_estimates={"AP50-95": estimate})
    verdicts = [bitalloy.check(run, budget=Budget(max_drop={"AP50-95": most})).verdict for most in (0.05, 0.001)]
    assert verdicts == ["met", "missed"]


@pytest.mark.parametrize(
    ("half", "shift", "change"),
    [(0.02, 0.02, "within noise"), (0.02, 0.03, "worse"), (0.02, -0.03, "better"), (0.05, 0.07, "within noise")],
)
def test_worse_is_what_exceeds_the_noise_of_both(half: float, shift: float, change: str, tmp_path: Path) -> None:
    """Of two intervals of 0.02 either way, the difference has one of 0.0283."""
    ratio = make_run(blocks=2).summary.latency_ratio
    base = stored(tmp_path, "base", latency_ratio_interval=around(ratio, half))
    changed: dict[str, Any] = {"latency_ratio": ratio + shift, "latency_ratio_interval": around(ratio + shift, half)}
    new = stored(tmp_path, "new", **changed, budget=Budget(latency_ratio=2.0))
    found = bitalloy.check(new, baseline=base)
    assert changes(found.against)["latency over float"] == change
    assert found.passed == (change != "worse") and [limit.verdict for limit in found.limits] == ["met"]
    again = {one.name: one for one in bitalloy.diff(base, new).numbers}["latency over float"]
    assert again.difference is not None and again.difference.value == pytest.approx(shift)
    assert again.difference.high - again.difference.value == pytest.approx(half * 2**0.5)


def test_a_baseline_does_not_hide_that_the_run_misses_its_own_limit(tmp_path: Path) -> None:
    ratio = make_run(blocks=2).summary.latency_ratio
    base = stored(tmp_path, "base", budget=Budget(latency_ratio=ratio / 2, by_default=True))
    new = stored(tmp_path, "new", budget=Budget(latency_ratio=ratio / 2))
    assert not bitalloy.check(new, baseline=base).passed
    again = bitalloy.check(base, baseline=new)
    assert again.passed and again.limits == ()


def test_every_kind_of_limit_can_be_checked_afterwards(tmp_path: Path, inside: Any) -> None:
    """On the files of a run alone, each limit on both sides of what is there."""
    summary = make_run(blocks=2).summary
    inside.folder = tmp_path
    stored(tmp_path, "run")
    head, pair = min(summary.sqnr_db.items(), key=lambda item: item[1].mixed.measured)
    share = summary.size_bytes.mixed / summary.size_bytes.reference
    for option, kept, missed in (
        ("--size", f"{share + 0.01}x", f"{share - 0.01}x"),
        ("--max-drop-db", f"{pair.mixed.measured - 1}", f"{pair.mixed.measured + 1}"),
        ("--max-drop-db", f"{head}={pair.mixed.measured - 1}", f"{head}={pair.mixed.measured + 1}"),
        ("--max-latency", f"{summary.latency_ratio + 0.01}x", f"{summary.latency_ratio / 2}x"),
    ):
        assert "Passed." in inside("check", "run", option, kept).succeeded().out
        found = inside("check", "run", option, missed)
        assert found.code == 3 and "Not passed." in found.out, option


def test_drops_and_sizes_count_against_a_baseline(tmp_path: Path) -> None:
    base = stored(tmp_path, "base", **with_drop(around(0.01, 0.003)))
    size = make_run(blocks=2).summary.size_bytes
    worse = stored(
        tmp_path,
        "worse",
        **with_drop(around(0.02, 0.003)),
        size_bytes=msgspec.structs.replace(size, mixed=1.5 * size.mixed),
    )
    assert changes(bitalloy.check(worse, baseline=base).against) == {
        "latency over float": "same", "size": "worse", "drop of AP50-95": "worse",
    }  # fmt: skip
    assert bitalloy.check(base, baseline=worse).passed
    with pytest.raises(bitalloy.RunDirectoryError, match="did not measure 'AP50-95'"):
        bitalloy.check(stored(tmp_path, "bare", metrics={}), baseline=base)


def test_latencies_of_other_machines_are_not_compared(tmp_path: Path) -> None:
    base, other = stored(tmp_path, "base"), stored(tmp_path, "other", device="another processor")
    found = bitalloy.check(other, baseline=base)
    assert changes(found.against)["latency over float"] == "unknown" and found.verdict == "undecided"
    with pytest.raises(bitalloy.RunDirectoryError, match="Compare runs for one target"):
        bitalloy.check(stored(tmp_path, "gpu", target="tensorrt"), baseline=base)


def test_a_difference_names_plans_versions_and_data(tmp_path: Path) -> None:
    run = make_run(blocks=2)
    moved = run.plan.choices[0]
    other = "fp32" if moved.scheme != "fp32" else "int8"
    choices = (msgspec.structs.replace(moved, scheme=other), *run.plan.choices[1:])
    second = make_run(blocks=2)
    object.__setattr__(second, "plan", msgspec.structs.replace(run.plan, choices=choices))
    data = msgspec.structs.replace(run.summary.calibration, count=3)
    versions = {**run.summary.versions, "onnxruntime": "9.9"}
    found = bitalloy.diff(
        stored(tmp_path, "a", run), stored(tmp_path, "b", second, calibration=data, versions=versions)
    )
    assert [(u.unit, u.first, u.second) for u in found.units] == [(moved.unit, moved.scheme, other)]
    assert found.versions == {"onnxruntime": (run.summary.versions.get("onnxruntime", ""), "9.9")}
    assert found.data == {"calibration": (run.summary.calibration, data)} and found.same_model and found.same_target
    assert {str(one.change) for one in found.numbers} == {"same"}


def test_the_command_line_fails_and_tells_ci(inside: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(here, "run", model="a|b % c")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "step.md"))
    words = ["check", "run", "--max-drop", "AP50-95=0.05", "--max-latency", "0.01x", "--junit", "out/check.xml"]
    done = inside(*words, "--json")
    assert done.code == 3 and json.loads(done.out)["passed"] is False
    (annotation,) = [line for line in done.err.splitlines() if line.startswith("::error")]
    assert "latency over float" in annotation and "95 %25 interval" in annotation
    reason = done.err.splitlines()[-1]
    assert reason.startswith("missed: latency over float") and "asked at most 0.010x" in reason
    suite = ElementTree.parse(here / "out" / "check.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "1")
    failed = [case.attrib["name"] for case in suite if case.find("failure") is not None]
    assert failed == ["latency over float"]
    page = (here / "step.md").read_text()
    assert "not passed" in page and "❌ latency over float" in page and "✅ drop of AP50-95" in page
    passed = inside("check", "run").succeeded()
    assert "Passed." in passed.out and "::error" not in passed.err
    assert (here / "step.md").read_text().startswith(page)
    assert "no finished run" in inside("check", "elsewhere").refused()
    assert "expected a number with a unit" in inside("check", "run", "--max-latency", "fast").refused()


def test_the_command_line_tells_differences(inside: Any, here: Path) -> None:
    stored(here, "a"), stored(here, "b", device="another")
    shown = inside("diff", "a", "b").succeeded().out
    assert "latency over float" in shown and "other processors" in shown and "Units in another scheme: 0." in shown
    assert json.loads(inside("diff", "a", "b", "--json").succeeded().out)["units"] == []
