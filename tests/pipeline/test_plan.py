"""Constraints and limits from the command line, plans from a run directory, and what a measurement corrects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import bitalloy
from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import UnreachableError
from bitalloy.core.outcome import Evaluation
from bitalloy.core.plans import FIRST, Budget, CostTable, PlanReport
from bitalloy.core.schemes import Plan
from bitalloy.core.store import RunDirectory
from bitalloy.measure.prices import latency_us
from bitalloy.runtime.ort import OrtSession
from bitalloy.search.planning import plan_peers, read_tables, tables_of
from bitalloy.sensitivity.matrix import decibel
from bitalloy.sensitivity.measuring import measured_damages
from bitalloy.targets.placement import rounded
from bitalloy.tasks.base import TaskResult
from bitalloy.tasks.detection import DETECTION
from bitalloy.tasks.evaluate import Evaluator
from bitalloy.tasks.open import interface_of
from bitalloy.verify.course import VerificationCourse
from bitalloy.verify.keeping import _first_that_holds, fastest_that_keeps, measure_metrics
from bitalloy.verify.neighbours import front_neighbours, measure_neighbours, with_measured_front
from bitalloy.verify.repair import TOLERATED_DB


@pytest.fixture(scope="module")
def finished(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of a copy of the detector with its constraint, after which model and data are gone."""
    line = inputs.command_line(tmp_path_factory.mktemp("planned"))
    model, scenes = line.folder / "detector.onnx", line.folder / "scenes"
    shutil.copy(inputs.detector, model)
    shutil.copytree(inputs.scenes, scenes)
    line.run(model, "--data", scenes, "--size", "0.6x", "--keep", "fp32:/conv0/*").succeeded()
    model.unlink()
    shutil.rmtree(scenes)
    return line


def test_a_run_holds_constraints_and_says_so(finished: Any) -> None:
    plan = json.loads((finished.folder / "run" / "plan.json").read_text())
    first = next(c for c in plan["choices"] if c["unit"] == "/conv0/Conv")
    assert first["scheme"] == "fp32" and "kept in FP32 as asked (fp32:/conv0/*)" in first["reason"]
    assert all("/conv0/Conv" not in point["schemes"] for point in plan["pareto"])
    assert plan["budget"]["keep"] == [{"scheme": "fp32", "pattern": "/conv0/*"}]


def test_planning_again_needs_neither_model_nor_data(finished: Any) -> None:
    before = (finished.folder / "run" / "plan.json").read_bytes()
    shown = json.loads(finished("plan", "run", "--size", "0.5x", "--keep", "int8:/conv0/*", "--json").succeeded().out)
    chosen = {c["unit"]: c["scheme"] for c in shown["choices"]}
    assert chosen["/conv0/Conv"] == "int8"
    assert all(point["schemes"]["/conv0/Conv"] == "int8" for point in shown["pareto"])
    assert json.loads((finished.folder / "run" / "replanned.json").read_text()) == shown
    assert (finished.folder / "run" / "plan.json").read_bytes() == before
    again = bitalloy.plan_again(finished.folder / "run")  # the run's own budget
    assert again.plan.budget.keep[0].pattern == "/conv0/*" and again.plan.budget.size_bytes is not None


def test_planning_again_without_the_task_keeps_the_time_of_the_run(finished: Any, tmp_path: Path) -> None:
    """Tables do not know the task; a plan without any limit would be float, whatever the run chose."""
    shutil.copytree(finished.folder / "run", tmp_path / "run")
    file = tmp_path / "run" / "plan.json"
    before = from_json(file.read_bytes(), PlanReport)
    file.write_bytes(to_json(msgspec.structs.replace(before, budget=Budget(max_drop={"AP50-95": 0.1}))))
    again = bitalloy.plan_again(tmp_path / "run").plan
    float_us = from_json((tmp_path / "run" / "cost.json").read_bytes(), CostTable).float_us
    assert again.budget.by_default and not again.budget.max_drop and again.budget.latency_ratio is not None
    assert again.budget.latency_ratio * float_us == pytest.approx(before.predicted_latency_us, rel=1e-3)
    assert again.predicted_latency_us <= 1.001 * before.predicted_latency_us


def test_the_front_as_table_and_as_json(inside: Any, finished: Any) -> None:
    shown = inside("plan", finished.folder / "run", "--front", "--json").succeeded()
    front = json.loads(shown.out)
    assert [p["predicted_latency_us"] for p in front["front"]] == sorted(
        p["predicted_latency_us"] for p in front["front"]
    )
    table = inside("plan", finished.folder / "run", "--front").succeeded().out
    assert table.count("chosen") == 1 and " INT8 " in table and "Predicted, not measured" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "fp32:nowhere"], ["--keep 'fp32:nowhere'", "matches no"]),
        (["--keep", "neck*"], ["--keep", "'neck*'", "fp32:"]),
        (["--keep", "int4:neck*"], ["--keep", "expected a scheme (fp32, w16, w8, "]),
        (["--keep", "int8:Concat"], ["asks for INT8", "because"]),
        (["--max-drop-db", "nose=20"], ["'nose'", "scores"]),
        (["--max-drop-db", "boxes=loud"], ["--max-drop-db", "finite"]),
        (["--max-drop-db", "20", "--max-drop-db", "30"], ["--max-drop-db", "twice"]),
    ],
    ids=" ".join,
)
def test_bad_constraints_are_refused(inside: Any, finished: Any, options: list[str], words: list[str]) -> None:
    text = inside("plan", finished.folder / "run", *options).refused()
    for word in words:
        assert word in text


def test_limits_out_of_reach_have_an_exit_code_of_their_own(inside: Any, finished: Any) -> None:
    text = inside("plan", finished.folder / "run", "--latency", "0.01x", "--keep", "fp32:/conv0/*").refused(4)
    assert "lowest latency" in text and "1 units are kept" in text


def test_a_folder_without_a_run_is_refused(inside: Any, here: Any) -> None:
    (here / "empty").mkdir()
    assert "no summary.json" in inside("plan", "empty", "--latency", "0.7x").refused()
    assert not list((here / "empty").iterdir())


def test_limits_without_labels_or_match_are_refused_before_the_analysis(inside: Any, inputs: Any) -> None:
    data = ("--data", inputs.images)
    assert "--eval" in inside.run(inputs.classifier, *data, "--max-drop", "0.3").refused()
    assert "matches no" in inside.run(inputs.classifier, *data, "--keep", "fp32:nowhere").refused()
    assert inside.files() <= {".bitalloy-run"}


def test_a_metric_that_the_task_does_not_have_is_refused(inside: Any, inputs: Any) -> None:
    data = ("--data", inputs.scenes, "--eval", inputs.labels)
    refused = inside.run(inputs.detector, *data, "--max-drop", "mIoU=0.1").refused()
    assert "'mIoU'" in refused and "AP50-95" in refused


@pytest.fixture(scope="module")
def analysis(inputs: Any) -> Any:
    model = bitalloy.load(inputs.detector)
    data = bitalloy.open_data(model, inputs.scenes)
    return bitalloy.analyze(model, data, bitalloy.Settings(samples=8, probes=4, calibration_samples=8))


@pytest.fixture(scope="module")
def table(analysis: Any) -> Any:
    """A cost table in which INT8 is fast everywhere, whatever this machine does at the moment."""
    found = bitalloy.measure_cost(analysis)
    fast = tuple(
        msgspec.structs.replace(c, us={"fp32": 10.0, "int8": 4.0}) if "int8" in c.us else c for c in found.units
    )
    borders = tuple(msgspec.structs.replace(b, us=0.1, us_per_element=0.0) for b in found.borders)
    return msgspec.structs.replace(found, units=fast, fixed_us=0.0, borders=borders)


def test_the_fastest_plan_that_keeps_a_task_metric(analysis: Any, table: Any, inputs: Any) -> None:
    """A limit that nothing misses gives the fastest plan; one below every drop the float model."""
    found = {}
    for most in (1.0, -1.0):
        planned = bitalloy.plan(analysis, Budget(max_drop={"AP50-95": most}), table=table)
        assert len(planned.plan.pareto) > 3
        evaluator = Evaluator(analysis, [inputs.labels], 4, bitalloy.Workspace())
        peers = plan_peers(tables_of(analysis, table), planned.plan.budget)
        kept = fastest_that_keeps(evaluator, planned, peers)
        tried = kept.judge.evaluations()
        assert 1 <= len(tried) <= len(peers) + 2 * np.ceil(np.log2(len(planned.plan.pareto))) + 1
        assert all(e.kept == (most > 0) for e in tried)
        found[most] = kept.point
        assert {p.chosen: kept.judge.judged(p.chosen) for p in peers} == dict.fromkeys([p.chosen for p in peers], True)
    assert found[1.0] == min(planned.plan.pareto, key=lambda p: p.predicted_latency_us)
    assert not found[-1.0].chosen


def test_a_least_agreement_with_float_needs_no_labels(analysis: Any, table: Any, inputs: Any) -> None:
    for least in (0.0, 1.0):
        planned = bitalloy.plan(analysis, Budget(min_agreement=least, confidence=0.9), table=table)
        evaluator = Evaluator(analysis, [inputs.scenes], 4, bitalloy.Workspace())
        kept = fastest_that_keeps(evaluator, planned, plan_peers(tables_of(analysis, table), planned.plan.budget))
        assert dict(kept.judge.limits) == {"agreement": 1 - least}
        fastest = min(planned.plan.pareto, key=lambda p: p.predicted_latency_us)
        assert (kept.point == fastest) == (least == 0)


@pytest.mark.parametrize("count", range(1, 14))
def test_the_search_for_the_first_that_holds(count: int) -> None:
    """From every guess, for every answer; a right guess costs two looks, a wrong one twice those of halving."""
    for answer in range(count):
        for guess in range(count):
            looked: list[int] = []

            def holds(index: int, answer: int = answer, looked: list[int] = looked) -> bool:
                looked.append(index)
                return index >= answer

            assert _first_that_holds(count, guess, holds) == answer
            assert len(set(looked)) == len(looked) <= 2 * np.ceil(np.log2(count)) and count - 1 not in looked
            assert guess != answer or len(looked) <= 2


def runs_of(monkeypatch: pytest.MonkeyPatch, image: str) -> dict[int, int]:
    """Session -> runs that get an image, counted where they happen from now on."""
    counts: dict[int, int] = {}
    kept: list[OrtSession] = []  # or a number might come again
    plain = OrtSession.run

    def run(self: OrtSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if image in feeds:
            kept.append(self)
            counts[id(self)] = counts.get(id(self), 0) + 1
        return plain(self, feeds)

    monkeypatch.setattr(OrtSession, "run", run)
    return counts


def test_a_model_is_executed_once_over_the_labels(
    analysis: Any, table: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is compared, in a run directory or without one; what is stored is found again."""
    image = analysis.graph.info.inputs[0].name
    planned = bitalloy.plan(analysis, Budget(max_drop={FIRST: 0.02}), table=table)
    int8, fast = analysis.units.lowest(), planned.plan.chosen
    peers = plan_peers(tables_of(analysis, table), planned.plan.budget)
    found = []
    for store in (None, RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")):
        with monkeypatch.context() as patch:
            counts = runs_of(patch, image)
            evaluator = Evaluator(analysis, [inputs.labels], 4, bitalloy.Workspace(store))
            kept = fastest_that_keeps(evaluator, planned, peers)
            tried = kept.judge.evaluations()
            found.append((kept.point, tried, measure_metrics(evaluator, int8, fast)))
            again = len(found) == 3
            assert set(counts.values()) == (set() if again else {4})
            plans = {p.chosen for p in planned.plan.pareto if len(p.chosen) in used(tried)}
            assert again or 3 <= len(counts) <= len(plans | {int8, fast}) + 1
    assert found[0] == found[1] == found[2]


def used(tried: Sequence[Evaluation]) -> set[int]:
    """Sizes of the plans that were evaluated."""
    return {sum(e.schemes.values()) for e in tried}


def test_an_evaluation_goes_on_where_it_was_stopped(
    analysis: Any, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what one evaluation by the task's own means gives, with a thread for every core."""
    monkeypatch.setattr("bitalloy.tasks.evaluate.SHARD", 2)
    image = analysis.graph.info.inputs[0].name
    plain, done = OrtSession.run, []

    def stops(self: OrtSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if image in feeds:
            done.append(1)
            if len(done) > 4:
                raise KeyboardInterrupt
        return plain(self, feeds)

    def compared() -> TaskResult:
        evaluator = Evaluator(analysis, [inputs.labels], None, bitalloy.Workspace(RunDirectory(tmp_path / "run")))
        (result,) = evaluator.results({"float": evaluator.reference, "int8": evaluator.subject(int8)}, "evaluate")
        return result

    int8 = analysis.units.lowest()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OrtSession, "run", stops)
        compared()
    with monkeypatch.context() as patch:
        counts = runs_of(patch, image)
        result = compared()
    data = DETECTION.open(inputs.labels, interface_of(analysis.graph))
    total = len(data.choose(None, 0))
    assert sorted(counts.values()) == [total - 4, total]
    models = {"float": analysis.original().session().run, "int8": analysis.artefact(int8).session().run}
    assert result == DETECTION.evaluate(models, data, seed=analysis.settings.seed)


def test_a_limit_on_a_task_metric_ends_with_a_verified_plan(analysis: Any, table: Any, inputs: Any) -> None:
    planned = bitalloy.plan(analysis, Budget(max_drop={FIRST: 1.0}), table=table, front=False)
    verified = bitalloy.verify(analysis, planned, labels=inputs.labels, limit=4)
    summary = verified.summary
    assert summary.evaluations and set(summary.evaluations[0].drops) == {"AP50-95"}
    assert [r.shipped for r in summary.rounds].count(True) == 1
    fastest = min(verified.planned.plan.pareto, key=lambda p: p.predicted_latency_us)
    assert verified.planned.plan.chosen == fastest.chosen


def test_neighbours_on_the_front_are_measured(analysis: Any, table: Any) -> None:
    with pytest.raises(UnreachableError) as least:
        bitalloy.plan(analysis, Budget(latency_ratio=0.001), table=table)
    assert least.value.reachable_ratio is not None
    float_ratio = latency_us(table, analysis.units, Plan()) / table.float_us
    halfway = (least.value.reachable_ratio + float_ratio) / 2
    plan = bitalloy.plan(analysis, Budget(latency_ratio=halfway), table=table).plan
    points = front_neighbours(plan)
    assert 3 <= len(points) <= 7 and plan.chosen in {p.chosen for p in points}
    order = [p.chosen for p in plan.pareto]
    assert [order.index(p.chosen) for p in points] == list(
        range(order.index(points[0].chosen), order.index(points[-1].chosen) + 1)
    )
    found = with_measured_front(plan, points, measure_neighbours(analysis, points, [0, 1, 2], bitalloy.Workspace()))
    seen = [p for p in found.pareto if p.measured_ratio is not None]
    assert [p.chosen for p in seen] == [p.chosen for p in points]
    exact, _ = measured_damages(
        analysis, [rounded(analysis.units, p.chosen) for p in points], range(3), work=bitalloy.Workspace()
    )
    oracle = decibel(exact.mean(axis=0)).T  # by execution with gates, not by the shipped models
    heads = [i for i, h in enumerate(analysis.heads) if not h.kind]
    shipped = np.array([p.measured_db for p in seen])
    np.testing.assert_allclose(shipped[:, heads], oracle[:, heads], atol=1.5)


# -- what a measurement corrects -------------------------------------------------------------------------


def distorted(analysis: Any, unit: str, factor: float) -> Any:
    """An analysis that believes the damage of one unit's sites to be smaller by a factor."""
    matrix = analysis.matrix
    columns = [matrix.column[s] for s in rounded(analysis.units, Plan.of("int8", unit)) if s in matrix.column]
    scale = np.ones(len(matrix.sites), np.float32)
    scale[columns] = factor**-0.5
    changed = replace(
        matrix, rows=tuple(r * scale for r in matrix.rows), own=tuple(o * scale * scale for o in matrix.own)
    )
    return replace(analysis, matrix=changed)


def test_a_wrong_prediction_is_traced_to_its_unit_and_corrected(analysis: Any, table: Any) -> None:
    heads = [h.name for h in analysis.heads if not h.kind]
    worst = min(
        (r for r in analysis.table.rows if r.scope == "unit" and r.head in heads), key=lambda r: r.sqnr_db.value
    )
    wrong = distorted(analysis, worst.id, 50.0)
    budget = Budget(latency_ratio=2.0, keep=(bitalloy.Keep(scheme="int8", pattern="*"),))
    planned = bitalloy.plan(wrong, budget, table=table, front=False)
    assert worst.id in planned.plan.chosen.units_in("int8")
    course = VerificationCourse(wrong, planned, bitalloy.Workspace())
    course.search()
    first = course.rounds()[0].repair
    assert first is not None and min(first.gap_db.values()) < -TOLERATED_DB
    own = next(r for r in first.remeasured if r.units == (worst.id,))
    assert max(own.change_db.values()) > 6.0
    after = course.completed().plan
    for head, real in zip(after.heads, course.best.measured.sqnr_mixed, strict=True):
        if head.head in heads:  # of the 17 dB that were planted at most an eighth is left
            assert abs(head.predicted_db.value - real.value) <= 17 / 8, head.head


def test_a_run_directory_of_another_version_is_refused(inside: Any, finished: Any) -> None:
    path = finished.folder / "run" / "planning.json"
    content = path.read_bytes()
    try:
        path.write_text("{}")
        assert "planning.json" in inside("plan", finished.folder / "run").refused()
    finally:
        path.write_bytes(content)
    assert read_tables(finished.folder / "run").matrix.samples > 0
