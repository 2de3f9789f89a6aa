"""What a measurement does to the plan, and what the summary makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitalloy
from bitalloy.core.outcome import KernelEffect, LatencySpread, Triple
from bitalloy.core.planned import Measured, Metrics
from bitalloy.core.plans import Budget
from bitalloy.core.records import Estimate, Latency
from bitalloy.core.schemes import Plan
from bitalloy.measure.bench import unsteadiness
from bitalloy.model.heads import is_divergence
from bitalloy.report import figures
from bitalloy.report.verdict import DO_NOT, SHIP, ship_verdict
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.ort import OrtSession
from bitalloy.search.program import GAP
from bitalloy.verify import rounds
from bitalloy.verify.beside_float import measure_plan
from bitalloy.verify.headline import unrounded_share
from bitalloy.verify.rounds import MeasuredStanding, fits_best, missed_size
from bitalloy.verify.shipped import MeasuredPlan
from bitalloy.verify.summary import expected, predicted_sqnr, summarize_run

FLOOR_DB = 5.0
SIZES = {ONLY: Triple(reference=1, lowest=1, mixed=1)}
NO_METRICS = Metrics(metrics={}, confidence_shift={})


def timed(median_ms: float, p10_ms: float | None = None) -> Latency:
    return Latency(median_ms=median_ms, p10_ms=p10_ms or median_ms, p90_ms=2 * median_ms, count=40)


def measured(analysis: Any, ratio: float, *, p10_ms: float | None = None, spread: float = 0.01) -> Measured:
    """Good SQNR of all heads, and the mixed model at `ratio` of float's 10 ms, known within `spread`."""
    good = tuple(Estimate(value=30.0, low=29.0, high=31.0) for _ in analysis.heads)
    latency = LatencySpread(reference=timed(10.0, p10_ms), lowest=timed(8.0), mixed=timed(10.0 * ratio))
    lowest, mixed = (Estimate(value=r, low=r - spread, high=r + spread) for r in (0.8, ratio))
    return Measured(
        latency=latency, ratio_lowest=lowest, ratio_mixed=mixed, sqnr_lowest=good, sqnr_mixed=good, float32=good
    )


@pytest.fixture(scope="module")
def analysis(inputs: Any) -> Any:
    model = bitalloy.load(inputs.classifier)
    data = bitalloy.open_data(model, inputs.images)
    return bitalloy.analyze(
        model, data, bitalloy.Settings(samples=2, probes=2, calibration_samples=2, schemes=("int8",))
    )


@pytest.fixture(scope="module")
def planned(analysis: Any) -> Any:
    """A plan of all units at half of float's time, as a table says in which everything in INT8 is fast."""
    table = bitalloy.measure_cost(analysis)
    fast = tuple(
        msgspec.structs.replace(c, us={"fp32": 10.0, "int8": 4.0}) if "int8" in c.us else c for c in table.units
    )
    borders = tuple(msgspec.structs.replace(b, us=0.1, us_per_element=0.0) for b in table.borders)
    table = msgspec.structs.replace(table, units=fast, fixed_us=0.0, borders=borders)
    return bitalloy.plan(analysis, Budget(min_sqnr_db=FLOOR_DB), table=table)


def test_a_plan_above_the_floor_that_is_slower_than_float_is_searched_again(analysis: Any, planned: Any) -> None:
    budget = Budget(min_sqnr_db=FLOOR_DB)
    assert planned.predicted_ratio < 0.8
    following = rounds.next_search(analysis.units, budget, budget, planned, measured(analysis, 1.4))
    assert following is not None
    asked, table = following
    again = bitalloy.plan(analysis, asked, table=table)
    assert again.plan.chosen != planned.plan.chosen
    assert again.predicted_ratio <= 1.0 + GAP  # of the solver
    assert rounds.next_search(analysis.units, budget, budget, planned, measured(analysis, 0.9)) is None


def test_time_that_a_limit_leaves_buys_accuracy(analysis: Any, planned: Any) -> None:
    budget = Budget(latency_ratio=0.8)
    following = rounds.next_search(analysis.units, budget, budget, planned, measured(analysis, 0.6))
    assert following is not None and following[1] is planned.cost
    assert following[0].latency_ratio == pytest.approx(0.8 * 0.8 / 0.6, rel=1e-3)
    assert rounds.next_search(analysis.units, budget, budget, planned, measured(analysis, 0.78)) is None
    floor = Budget(latency_ratio=0.8, min_sqnr_db=FLOOR_DB)
    assert rounds.next_search(analysis.units, floor, floor, planned, measured(analysis, 0.6)) is None
    too_slow = rounds.next_search(analysis.units, following[0], budget, planned, measured(analysis, 0.95))
    assert too_slow is not None and too_slow[0].latency_ratio == 0.8 and too_slow[1] is not planned.cost


def test_an_aim_that_prices_put_out_of_reach_comes_back_when_a_plan_is_faster() -> None:
    relaxed = Budget(latency_ratio=0.8, by_default=True)
    assert rounds.nearer_default(relaxed, 0.7, 0.7258).latency_ratio == 0.7258
    assert rounds.nearer_default(relaxed, 0.7, 0.6).latency_ratio == 0.7
    assert rounds.nearer_default(relaxed, 0.7, 0.9) == relaxed
    own = Budget(latency_ratio=0.8)
    assert rounds.nearer_default(own, 0.7, 0.6) is own


def test_a_size_budget_may_cost_time(analysis: Any, planned: Any) -> None:
    budget = Budget(size_bytes=10**9)
    assert rounds.next_search(analysis.units, budget, budget, planned, measured(analysis, 1.4)) is None


def shipped(planned: Any, found: Measured) -> MeasuredPlan:
    return MeasuredPlan(planned=planned, measured=found, sizes=SIZES, metrics=NO_METRICS)


def test_the_first_prediction_is_told_from_the_corrected_one(analysis: Any, planned: Any) -> None:
    """Tables whose every column is ten times as large predict 20 dB less; what was measured has its share."""
    found = shipped(planned, measured(analysis, 0.5))
    plain = [h for h in analysis.matrix.heads if not is_divergence(h)]
    probed, verified = analysis.matrix.samples, len(analysis.parts.verification)

    def pooled(predicted_db: float) -> float:
        energies = probed * 10 ** (-predicted_db / 10) + verified * 10 ** (-30 / 10)
        return -10 * math.log10(energies / (probed + verified))

    for pair in summarize_run(analysis, analysis, found, {}).sqnr_db.values():
        assert pair.lowest.predicted is not None
        assert pair.lowest.corrected == pytest.approx(pooled(pair.lowest.predicted), abs=0.02)
    secant = msgspec.structs.replace(analysis.secant, linear=tuple(100 * v for v in analysis.secant.linear))
    secant = msgspec.structs.replace(secant, damage=tuple(tuple(100 * v for v in row) for row in secant.damage))
    larger = replace(analysis, matrix=analysis.matrix.scaled(np.full((len(analysis.heads), 1), 10.0)))
    summary = summarize_run(analysis, replace(larger, secant=secant), found, {})
    for head in plain:
        lowest = summary.sqnr_db[head].lowest
        assert lowest.predicted is not None
        assert lowest.corrected == pytest.approx(pooled(lowest.predicted - 20), abs=0.1)


def test_what_unseen_samples_give_lies_between_what_two_parts_gave(analysis: Any) -> None:
    """Of two parts that agree the interval is narrower; of two that do not it holds both of their ends."""
    plan = analysis.units.lowest()
    for shift in (0.0, 12.0):
        tables = predicted_sqnr(analysis, plan)
        seen = tuple(Estimate(value=e.value - shift, low=e.low - shift, high=e.high - shift) for e in tables)
        for one, other, both in zip(tables, seen, expected(analysis, plan, seen), strict=True):
            assert other.value - 0.01 <= both.value <= one.value + 0.01
            assert both.low <= both.value <= both.high
            if shift:
                assert both.value - other.value < 6 < one.value - both.value, "the larger error counts most"
            elif one.high - one.low > 0.01:
                assert both.high - both.low < one.high - one.low


@pytest.mark.parametrize(("p10_ms", "busy"), [(9.0, False), (0.7, True)])
def test_times_of_a_busy_machine_are_not_believed(analysis: Any, planned: Any, p10_ms: float, busy: bool) -> None:
    found = measured(analysis, 0.12, p10_ms=p10_ms)
    summary = summarize_run(analysis, analysis, shipped(planned, found), {})
    assert any("machine was busy" in note for note in summary.notes) == busy
    assert (unsteadiness(found.latency.reference) > 10) == busy


@pytest.mark.parametrize(("ratio", "said"), [(0.9, "runs in 0.90x"), (1.0, "NOT measurably"), (1.1, "NOT faster")])
def test_advice_is_given_only_where_timing_tells(analysis: Any, planned: Any, ratio: float, said: str) -> None:
    summary = summarize_run(analysis, analysis, shipped(planned, measured(analysis, ratio, spread=0.05)), {})
    assert said in summary.headline
    assert ("deploy the float model" in summary.headline) == (ratio > 1.05)
    assert summary.latency_ratio_interval == Estimate(value=ratio, low=ratio - 0.05, high=ratio + 0.05)


def test_effects_of_kernels_are_notes_with_their_cause(analysis: Any, planned: Any) -> None:
    effect = KernelEffect(head="logits", optimized_db=17.5, written_db=36.1, cause="kernels saturate")
    run = replace(shipped(planned, measured(analysis, 0.5)), kernel_effects=(effect,))
    summary = summarize_run(analysis, analysis, run, {})
    assert summary.kernel_effects == (effect,)
    (note,) = (n for n in summary.notes if "kernel effect" in n)
    assert "logits" in note and "17.5 dB" in note and "36.1 dB" in note and note.endswith("kernels saturate.")


def test_a_plan_without_int8_is_never_called_faster(analysis: Any, planned: Any) -> None:
    everything = tuple(msgspec.structs.replace(c, scheme="fp32") for c in planned.plan.choices)
    plan = msgspec.structs.replace(planned.plan, choices=everything)
    idle = bitalloy.Planned(plan, planned.cost)
    summary = summarize_run(analysis, analysis, shipped(idle, measured(analysis, 0.12)), {})
    assert "NOT faster" in summary.headline


def test_a_file_whose_weights_are_inputs_does_not_stand_for_float(
    inputs: Any, analysis: Any, planned: Any, tmp_path: Path
) -> None:
    """ONNX Runtime prepares no weight of it in advance: any model would seem fast beside it."""
    proto = onnx.load(inputs.classifier)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(proto, tmp_path / "old.onnx")
    given = bitalloy.load(tmp_path / "old.onnx")
    like_old = replace(analysis, given=given)
    found = like_old.original().models[ONLY]
    assert isinstance(found, ir.Model)
    assert [v.name for v in found.graph.inputs] == [v.name for v in onnx.load(inputs.classifier).graph.input]
    notes = summarize_run(like_old, like_old, shipped(planned, measured(analysis, 0.9)), {}).notes
    count = len(proto.graph.initializer)
    assert any(f"'old.onnx' as it is does not stand for the float model: {count} of its weights" in n for n in notes)
    assert analysis.original().models[ONLY] == inputs.classifier


def test_a_file_with_two_nodes_of_one_name_is_measured(inside: Any, inputs: Any, here: Path) -> None:
    """Valid ONNX, but the runtime refuses it as it is."""
    model = onnx.load(inputs.classifier)
    for node in model.graph.node:
        node.name = "same"
    onnx.checker.check_model(model)
    onnx.save(model, here / "same.onnx")
    with pytest.raises(bitalloy.ModelError, match="same node name"):
        OrtSession(here / "same.onnx")
    inside.run(here / "same.onnx", "--data", inputs.images, "--max-drop-db", 5).succeeded()


def standing(ratio: float, size: int, sqnr: float) -> MeasuredStanding:
    return MeasuredStanding(ratio, 10 * ratio, size, {"y": sqnr})


def test_a_plan_that_is_better_but_for_the_size_wins_where_none_keeps_it() -> None:
    budget = Budget(size_bytes=1000)
    close, better, worse, small = (
        standing(0.9, 1010, 20.0),
        standing(0.8, 1012, 25.0),
        standing(0.7, 1005, 10.0),
        standing(1.0, 999, 5.0),
    )
    assert (fits_best(budget, [close, better]), fits_best(budget, [better, close])) == (1, 0)
    assert fits_best(budget, [close, better, small]) == 2
    assert fits_best(budget, [worse, close]) == 0
    assert missed_size(budget, 1010) == pytest.approx(0.01) and missed_size(budget, 1000) == 0.0
    assert missed_size(Budget(), 1e12) == 0.0


# -- float, rewritten --------------------------------------------------------------------------------


@given(st.floats(0.05, 2), st.floats(0, 0.5), st.floats(0.05, 2))
def test_the_part_of_the_gain_that_is_no_rounding(value: float, width: float, ratio: float) -> None:
    share = unrounded_share(Estimate(value=value, low=value - width, high=value + width), ratio)
    if value + width >= 1:
        assert share == 0, "timing does not tell that it is faster"
    elif ratio >= value:
        assert share == 1, "rounding gained nothing"
    else:
        assert 0 < share < 1 and 1 - share * (1 - ratio) == pytest.approx(value)


def rewritten(analysis: Any, ratio: float, plain: float) -> Measured:
    """A mixed model at `ratio`, and the float model after the same rewrites at `plain` of float's time."""
    found = measured(analysis, ratio)
    exact = tuple(Estimate(value=140.0, low=139.0, high=141.0) for _ in analysis.heads)
    return msgspec.structs.replace(
        found,
        latency=msgspec.structs.replace(found.latency, rewritten=timed(10.0 * plain)),
        ratio_rewritten=Estimate(value=plain, low=plain - 0.01, high=plain + 0.01),
        sqnr_rewritten=exact,
    )


@pytest.mark.parametrize(
    ("ratio", "plain", "said"),
    [
        (0.71, 0.77, "79% of the time that the mixed model saves comes without any rounding"),
        (0.80, 0.77, "All that is saved comes without any rounding"),
        (0.50, 0.95, ""),
        (0.71, 0.995, ""),
    ],
)
def test_what_rewriting_gains_is_not_credited_to_precision(
    analysis: Any, planned: Any, ratio: float, plain: float, said: str
) -> None:
    summary = summarize_run(analysis, analysis, shipped(planned, rewritten(analysis, ratio, plain)), {})
    notes = [n for n in summary.notes if "without any rounding" in n]
    assert [n.startswith(said) and "--keep fp32:'*'" in n for n in notes] == ([True] if said else [])
    assert (f"{plain:.2f}x without any rounding)" in summary.headline) == (plain + 0.01 < 1)
    assert summary.latency_ms.rewritten == pytest.approx(10 * plain)
    for pair in summary.sqnr_db.values():
        assert pair.rewritten is not None and pair.rewritten.measured == 140.0
    columns = figures.model_columns(summary, analysis.units)
    assert columns == ("float", "float, rewritten", "all-INT8", "mixed")
    groups = figures.key_figures(summary, analysis.units, planned.cost)
    rows = {row.name: row for group in groups for row in group.rows}
    assert all(len(row.cells) == len(columns) for row in rows.values())
    assert [cell.text for cell in rows["Latency over float"].cells][:2] == ["1.00×", f"{plain:.2f}×"]


@pytest.mark.parametrize(("plain", "own"), [(7.0, True), (10.0, False)])
def test_a_plan_without_int8_has_the_time_of_its_rewriting(
    analysis: Any, planned: Any, plain: float, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is faster than the given file; otherwise the two count as one model."""
    times = {"float": 10.0, "mixed": plain, "lowest": 8.0}

    def sittings(models: Any, steps: Any, *, then: Any, **_: Any) -> dict[str, np.ndarray]:
        sessions = {name: open_() for name, open_ in models.items()}
        then(sessions)
        return {name: np.full((2, 3, len(steps)), times[name]) for name in sessions}

    monkeypatch.setattr("bitalloy.measure.bench.time_sittings", sittings)
    idle = tuple(msgspec.structs.replace(c, scheme="fp32") for c in planned.plan.choices)
    nothing = bitalloy.Planned(msgspec.structs.replace(planned.plan, choices=idle), planned.cost)
    found = measure_plan(analysis, nothing, analysis.artefact(Plan()), [0, 1], bitalloy.Workspace())
    assert found.ratio_rewritten is not None and found.sqnr_rewritten is not None
    assert (found.ratio_rewritten.value, found.ratio) == (plain / 10, plain / 10)
    assert all(estimate.value > 100 for estimate in found.sqnr_rewritten)
    summary = summarize_run(analysis, analysis, shipped(nothing, found), {})
    assert ("NOT faster" in summary.headline) != own
    assert ("Nothing is lowered: the mixed model is float, rewritten, and runs in 0.70x" in summary.headline) == own
    assert ship_verdict(summary, nothing.plan, nothing.cost).answer == (SHIP if own else DO_NOT)


def test_of_a_large_model_it_is_not_measured_and_that_is_said(analysis: Any, planned: Any) -> None:
    graph = replace(analysis.graph)
    vars(graph)["large"] = True
    large = replace(analysis, graph=graph)
    notes = summarize_run(large, large, shipped(planned, measured(large, 0.5)), {}).notes
    assert any("was not measured, because the model is large" in note for note in notes)
