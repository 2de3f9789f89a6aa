"""What a run's status says of its limits, and that the headline and the exit code say the same."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from tests.report.conftest import make_run

from bitalloy.core.outcome import MetricComparison, Summary
from bitalloy.core.plans import FIRST, Budget
from bitalloy.core.records import Estimate, MetricValue
from bitalloy.core.status import LimitStatus, Verdict, ceiling_verdict, chance_verdict, chance_within, worst_verdict
from bitalloy.measure import bench
from bitalloy.report.text import limit_text
from bitalloy.verify.headline import headline_of
from bitalloy.verify.status import status_of

NUMBERS = st.floats(-1, 1)
CONFIDENCES = st.floats(0.51, 0.99)
ORDER = [Verdict.MISSED, Verdict.UNDECIDED, Verdict.MET]
"""Verdicts on a drop, as its limit grows."""


@st.composite
def drops(draw: Any) -> Estimate:
    value = draw(NUMBERS)
    return Estimate(value=value, low=value - draw(st.floats(0, 0.5)), high=value + draw(st.floats(0, 0.5)))


# -- rules -------------------------------------------------------------------------------------------


@given(drops(), NUMBERS)
def test_the_chance_is_that_of_a_normal_error(drop: Estimate, asked: float) -> None:
    error = (drop.high - drop.low) / (2 * norm.ppf(0.975))
    expected = norm.cdf(asked, drop.value, error) if error > 0 else float(drop.value <= asked)
    assert chance_within(drop, asked) == pytest.approx(expected, abs=1e-6)


@given(drops(), st.lists(NUMBERS, min_size=2, max_size=5), CONFIDENCES)
def test_a_wider_limit_is_never_judged_worse(drop: Estimate, limits: list[float], confidence: float) -> None:
    found = [ORDER.index(chance_verdict(chance_within(drop, asked), confidence)) for asked in sorted(limits)]
    assert found == sorted(found)


@given(drops(), NUMBERS, CONFIDENCES, CONFIDENCES)
def test_more_confidence_decides_less_and_never_the_other_way(
    drop: Estimate, asked: float, one: float, other: float
) -> None:
    bold, careful = (chance_verdict(chance_within(drop, asked), c) for c in sorted((one, other)))
    assert careful in (bold, Verdict.UNDECIDED)


@given(drops(), NUMBERS, CONFIDENCES)
def test_a_decided_drop_lies_on_the_side_that_its_value_says(drop: Estimate, asked: float, confidence: float) -> None:
    verdict = chance_verdict(chance_within(drop, asked), confidence)
    if drop.low == drop.high:
        assert verdict != Verdict.UNDECIDED, "what has no noise is decided"
    if verdict != Verdict.UNDECIDED:
        assert (verdict == Verdict.MET) == (drop.value <= asked)


@given(st.floats(0.001, 1000), st.floats(0.5, 2), st.floats(0, 0.3))
def test_a_ceiling_has_three_verdicts(asked: float, share: float, tolerance: float) -> None:
    got = asked * share
    verdict = ceiling_verdict(got, asked, tolerance=tolerance)
    assert (verdict == Verdict.MET) == (got <= asked)
    assert (verdict == Verdict.MISSED) == (got > asked * (1 + tolerance))


@given(st.lists(st.sampled_from([Verdict.MET, Verdict.WITHIN, Verdict.UNDECIDED, Verdict.MISSED])))
def test_the_worst_limit_is_the_verdict_on_all(verdicts: list[Verdict]) -> None:
    for name in ("missed", "undecided", "met within tolerance", "met"):
        if name in verdicts:
            assert worst_verdict(verdicts) == name
            return
    assert worst_verdict(verdicts) == "no limits"


def test_what_is_no_number_is_never_met() -> None:
    nan = float("nan")
    assert ceiling_verdict(nan, 1.0) == Verdict.MISSED
    assert chance_verdict(chance_within(Estimate(value=nan, low=nan, high=nan), 1.0), 0.8) == Verdict.UNDECIDED


# -- facts -------------------------------------------------------------------------------------------


def judged(**changes: object) -> Summary:
    return make_run(blocks=2).with_summary(**changes).summary


def only(summary: Summary) -> LimitStatus:
    (limit,) = summary.status.limits
    assert summary.status.verdict == limit.verdict
    return limit


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "met"), (0.96, "met within tolerance"), (0.951, "missed")], ids=str
)
def test_latency_is_judged_with_its_tolerance(factor: float, verdict: str) -> None:
    facts = judged()
    interval = Estimate(value=facts.latency_ratio, low=0.1, high=0.99)
    limit = only(judged(budget=Budget(latency_ratio=factor * facts.latency_ratio), latency_ratio_interval=interval))
    assert (limit.verdict, limit.got, limit.interval, limit.tolerance) == (verdict, interval.value, interval, 0.05)
    limit = only(judged(budget=Budget(latency_ms=factor * facts.latency_ms.mixed)))
    assert (limit.kind, limit.verdict, limit.got) == ("latency_ms", verdict, facts.latency_ms.mixed)


def test_an_estimated_latency_decides_nothing() -> None:
    limit = only(judged(budget=Budget(latency_ratio=5.0), latency_estimated=True))
    assert (limit.verdict, limit.reason) == ("undecided", "estimated, not measured")


def test_a_size_has_no_tolerance() -> None:
    size = int(judged().size_bytes.mixed)
    assert [only(judged(budget=Budget(size_bytes=size - i))).verdict for i in (0, 1)] == ["met", "missed"]


def test_floors_are_judged_by_the_worst_head_and_by_each() -> None:
    facts = judged()
    found = {head: pair.mixed.measured for head, pair in facts.sqnr_db.items()}
    low, high = sorted(found, key=found.__getitem__)
    between = (found[low] + found[high]) / 2
    limit = only(judged(budget=Budget(min_sqnr_db=between)))
    assert (limit.verdict, limit.head, limit.got) == ("missed", low, found[low])
    assert limit.interval == facts.sqnr_interval_db[low]
    both = judged(budget=Budget(head_sqnr_db={low: between, high: between})).status
    assert [(one.head, one.verdict) for one in both.limits] == [(low, "missed"), (high, "met")]
    assert only(judged(budget=Budget(head_sqnr_db={"nowhere": 1.0}))).verdict == "undecided"


def test_drops_are_judged_by_their_interval_and_the_first_metric_by_its_place() -> None:
    """Of 0.004 [-0.003, 0.011], a normal error puts 0.8 of all below 0.0070."""
    for asked, confidence, verdict in itertools.chain(
        ((a, 0.8, v) for a, v in ((0.0071, "met"), (0.0069, "undecided"), (0.0011, "undecided"), (0.0009, "missed"))),
        ((0.0071, 0.9, "undecided"), (0.0069, 0.75, "met")),
    ):
        for name in (FIRST, "AP50-95"):
            limit = only(judged(budget=Budget(max_drop={name: asked}, confidence=confidence)))
            assert (limit.verdict, limit.metric, limit.got) == (verdict, "AP50-95", 0.004), asked
            assert bool(limit.reason) == (verdict == "undecided")
    without = only(judged(budget=Budget(max_drop={"AP50": 0.5})))  # has no paired resamples
    assert (without.verdict, without.interval) == ("undecided", None)
    assert without.got == pytest.approx(0.003) and "within the limit as measured" in without.reason


@pytest.mark.parametrize("higher", [True, False], ids=["accuracy", "error rate"])
def test_few_samples_that_agree_decide_nothing(higher: bool) -> None:
    """Where float and mixed say the same, 5 samples leave a standard deviation of 0.08, and 500 none to speak of."""
    for n, verdict in ((5, "undecided"), (500, "met")):
        value = MetricValue(value=float(higher), low=float(higher), high=float(higher), n=n)
        same = MetricComparison(
            reference=value, lowest=value, mixed=value, drop_mixed=Estimate(value=0.0, low=0.0, high=0.0),
            higher_is_better=higher,
        )  # fmt: skip
        limit = only(judged(metrics={"m": same}, budget=Budget(max_drop={"m": 0.01})))
        assert limit.verdict == verdict, n
    one = MetricValue(value=0.999, low=0.999, high=0.999, n=1)
    lost = msgspec.structs.replace(same, mixed=one, drop_mixed=Estimate(value=0.001, low=0.001, high=0.001))
    assert judged(metrics={"m": lost}).status.warnings == ()


def test_limits_hold_together_with_the_confidence_that_was_asked_for() -> None:
    """0.004 [-0.003, 0.011] is within 0.0071 with 0.807: enough for one limit at 0.8, and not for one of two."""
    facts = judged()
    metrics = {"a": facts.metrics["AP50-95"], "b": facts.metrics["AP50-95"]}
    one = judged(metrics=metrics, budget=Budget(max_drop={"a": 0.0071})).status
    two = judged(metrics=metrics, budget=Budget(max_drop={"a": 0.0071, "b": 0.5})).status
    assert (one.verdict, two.verdict) == ("met", "undecided")
    assert "90% was asked for" in two.limits[0].reason


def test_a_metric_that_should_be_low_is_not_lost_but_raised() -> None:
    facts = judged()
    rises = msgspec.structs.replace(
        facts.metrics["AP50-95"], higher_is_better=False, drop_mixed=Estimate(value=0.8, low=0.5, high=1.1)
    )
    said = judged(metrics={"perplexity": rises})
    assert "raises perplexity by 0.8000 (95 % interval 0.5000 to 1.1000)" in headline_of(said)
    assert said.status.warnings[0].startswith("perplexity rises by 0.8000")
    falls = msgspec.structs.replace(rises, drop_mixed=Estimate(value=-0.2, low=-0.3, high=0.1))
    said = judged(metrics={"perplexity": falls})
    assert "lowers perplexity by 0.2000 (95 % interval -0.1000 to 0.3000)" in headline_of(said)


def test_only_losses_beyond_noise_that_no_limit_covers_are_warned_of() -> None:
    facts = judged()
    lost = msgspec.structs.replace(facts.metrics["AP50-95"], drop_mixed=Estimate(value=0.02, low=0.001, high=0.03))
    metrics = {"AP50-95": lost, "AP50": facts.metrics["AP50"]}
    assert judged().status.warnings == ()
    (warning,) = judged(metrics=metrics).status.warnings
    assert "AP50-95" in warning and "0.0200" in warning and "0.0010 to 0.0300" in warning
    assert judged(metrics=metrics, budget=Budget(max_drop={FIRST: 0.5})).status.warnings == ()
    assert judged(metrics=metrics, budget=Budget(max_drop={"AP50": 0.5})).status.warnings == (warning,)


def test_the_headline_leads_with_time_loss_and_size() -> None:
    facts = judged(latency_ratio=0.7, latency_ratio_interval=Estimate(value=0.7, low=0.68, high=0.72))
    share = facts.size_bytes.mixed / facts.size_bytes.reference
    said = headline_of(facts)
    assert said.startswith(
        "The mixed model runs in 0.70x of float's time (95 % interval 0.68 to 0.72), loses 0.0040 of AP50-95 "
        f"(95 % interval -0.0030 to 0.0110) and has {share:.2f}x of the given file's size; its limit is met. "
    )
    plain = headline_of(msgspec.structs.replace(facts, metrics={}))
    head, pair = min(facts.sqnr_db.items(), key=lambda item: item[1].mixed.measured)
    assert (
        f"time (95 % interval 0.68 to 0.72), leaves {pair.mixed.measured:.1f} dB on its worst output, {head}" in plain
    )
    gained = msgspec.structs.replace(
        facts.metrics["AP50-95"], drop_mixed=Estimate(value=-0.002, low=-0.003, high=0.001)
    )
    said = headline_of(msgspec.structs.replace(facts, metrics={"AP50-95": gained}))
    assert "gains 0.0020 of AP50-95 (95 % interval -0.0010 to 0.0030)" in said


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(), "; no limits were set."),
        (Budget(latency_ratio=0.1), "; MISSED: latency over float 0."),
        (Budget(max_drop={FIRST: 0.005}), "; UNDECIDED: drop of AP50-95 0.0040"),
        (Budget(latency_ratio=1.0, min_sqnr_db=1.0), "; all its limits are met."),
    ],
    ids=["none", "missed", "undecided", "met"],
)
def test_the_headline_says_what_the_status_says(budget: Budget, words: str) -> None:
    assert words in headline_of(judged(budget=budget))


def test_what_nobody_asked_for_is_never_missed() -> None:
    """The search needs something to aim at; a reader must not be told that a limit of theirs is missed."""
    aimed = judged(budget=Budget(latency_ratio=0.1, by_default=True))
    limit = only(aimed)
    assert aimed.status.verdict == "no limits" and aimed.status.proven
    assert limit_text(limit).endswith("nothing was asked and the search aimed at 0.100x")
    said = headline_of(aimed)
    assert "no limits were set" in said and "MISSED" not in said
    estimated = judged(budget=Budget(latency_ratio=0.1, by_default=True), latency_estimated=True)
    assert only(estimated).reason == "estimated, not measured" and estimated.status.proven
    assert not judged(budget=Budget(latency_ratio=0.1)).status.proven


def test_the_status_does_not_depend_on_an_earlier_one() -> None:
    facts = judged(budget=Budget(latency_ratio=0.1))
    assert status_of(facts) == facts.status
    assert status_of(msgspec.structs.replace(facts, status=judged().status, headline="")) == facts.status


# -- exit codes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in which the runs below share one analysis."""
    return inputs.command_line(tmp_path_factory.mktemp("codes")).folder


@pytest.fixture
def classify(inputs: Any, inside: Any, run_folder: Any) -> Any:
    """The real command line on the classifier."""
    inside.folder = run_folder
    return lambda *options: inside.run(inputs.classifier, "--data", inputs.images, *options)


def test_a_limit_that_is_not_kept_fails_where_that_is_asked_for(
    classify: Any, inside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that measures every model at three times of float's latency, whatever its table says."""
    options = ("--latency", "1.2x")
    with monkeypatch.context() as patch:
        patch.setattr(bench, "paired_ratio", lambda *times: Estimate(value=3.0, low=2.9, high=3.1))
        found = classify(*options, "--fail-on-miss")
    assert found.code == 3 and "MISSED: latency over float 3.000x (95 % interval 2.900x to 3.100x)" in found.out
    assert "Exit code 3" in found.err and "Traceback" not in found.err
    assert {"mixed.onnx", "report.html", "summary.json"} <= inside.results()
    assert inside.summary()["status"]["verdict"] == "missed"
    shown = json.loads(classify("--size", "0.6x", "--fail-on-miss", "--json").succeeded().out)
    assert shown["status"]["verdict"] == "met"


def test_without_limits_none_is_missed(classify: Any, inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bench, "paired_ratio", lambda *times: Estimate(value=0.99, low=0.98, high=0.995))
        found = classify("--fail-on-miss").succeeded()
    assert "MISSED" not in found.out and "missed" not in found.out
    status = inside.summary()["status"]
    assert status["verdict"] == "no limits" and status["limits"][0]["asked"] <= status["limits"][0]["got"]
    page = (inside.folder / "run" / "report.html").read_text()
    assert "Do not ship it" not in page and "nothing was asked and the search aimed at" in page
    assert "nothing to check" in inside("check", "run").refused(2)


def test_an_undecided_limit_fails_too(classify: Any, inside: Any) -> None:
    found = classify("--target", "tensorrt", "--latency", "0.95x", "--fail-on-miss")
    assert found.code == 3 and "undecided: latency over float" in found.out
    assert inside.summary()["status"]["limits"][0]["reason"] == "estimated, not measured"


def test_limits_out_of_reach_and_mistakes_have_other_codes(classify: Any) -> None:
    assert "smallest size" in classify("--size", "1KB", "--fail-on-miss").refused(4)
    assert "--eval" in classify("--max-drop", "AP50=0.1", "--fail-on-miss").refused(2)


def test_help_names_the_exit_codes(inside: Any) -> None:
    text = " ".join(inside("run", "--help").succeeded().out.split())
    assert "--fail-on-miss" in text and "--confidence" in text
    assert "Exit code 0: done; 2: the command must be corrected; 3: done, but with --fail-on-miss" in text
