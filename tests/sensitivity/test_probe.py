"""The probe matrix against exact re-execution, and the statistics around it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.core.records import DataInfo, Secant
from bitalloy.core.schemes import Plan
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.sensitivity.exact import Switchboard, damage, secant
from bitalloy.sensitivity.matrix import ProbeMatrix, bend, decibel, draws, estimate_sqnr, straight
from bitalloy.sensitivity.probe import Prober
from bitalloy.sensitivity.table import ranked_alike, sensitivities
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe


@pytest.fixture(scope="module")
def board(case) -> Switchboard:
    return Switchboard(case.graph, Recipe(case.units, ORT_CPU, case.ranges))


@pytest.fixture(scope="module")
def matrix(case) -> ProbeMatrix:
    prober = Prober(case.graph, case.heads, [Recipe(case.units, ORT_CPU, case.ranges)])
    return ProbeMatrix.concatenate([prober.measure(f, sample=i, probes=64, seed=3) for i, f in enumerate(case.feeds)])


def test_every_unit_agrees_with_exact_execution(case, board, matrix) -> None:
    free = sorted(case.units.able("int8"))
    sets = [rounded(case.units, Plan.of("int8", u)) for u in free]
    exact, _ = damage(board, [board.gates(s) for s in sets], case.heads, case.feeds)
    exact_db = decibel(exact.mean(axis=0))
    predicted_db = decibel(np.stack([matrix.damage(matrix.select(s)).mean(axis=0) for s in sets], axis=1))
    for head in range(len(case.heads)):
        reached = exact_db[head] < 120
        assert np.abs(exact_db[head] - predicted_db[head])[reached].max() < 1.5


def test_whole_plans_agree_with_exact_execution(case, board, matrix) -> None:
    """Interactions included: random plans, measured by switching their sites on together.

    A head whose error is as large as itself has left what a tangent can tell; how large it gets depends on the CPU,
    whose kernels decide the scales of weights.
    """
    rng = np.random.default_rng(5)
    free = sorted(case.units.able("int8"))
    plans = [Plan.of("int8", *(u for u in free if rng.random() < p)) for p in (0.2, 0.4, 0.6, 0.8, 1.0)]
    sets = [rounded(case.units, p) for p in plans]
    exact, _ = damage(board, [board.gates(s) for s in sets], case.heads, case.feeds)
    for i, sites in enumerate(sets):
        predicted, measured = (
            decibel(matrix.damage(matrix.select(sites)).mean(axis=0)),
            decibel(exact.mean(axis=0)[:, i]),
        )
        linear = measured > 10
        assert linear.sum() >= 2 and np.abs(predicted - measured)[linear].max() < 2.5


def test_a_closed_board_is_the_float_network(case, board) -> None:
    from bitalloy.runtime.ort import OrtSession

    y = board.run(case.feeds[0], board.gates(()))["y"]
    np.testing.assert_allclose(y, OrtSession(case.graph.to_bytes()).run(case.feeds[0])["y"], rtol=1e-5, atol=1e-4)


def test_rows_do_not_depend_on_order_or_grouping(case) -> None:
    prober = Prober(case.graph, case.heads, [Recipe(case.units, ORT_CPU, case.ranges)])
    forward = [prober.measure(case.feeds[i], sample=i, probes=2, seed=0) for i in (0, 1)]
    backward = [prober.measure(case.feeds[i], sample=i, probes=2, seed=0) for i in (1, 0)]
    for a, b in zip(forward[0].rows, backward[1].rows, strict=True):
        np.testing.assert_array_equal(a, b)
    again = ProbeMatrix.from_bytes(forward[0].to_bytes())
    assert again.sites == forward[0].sites and again.heads == forward[0].heads
    np.testing.assert_array_equal(again.rows[1], forward[0].rows[1])


def test_intervals_contain_the_value_of_more_samples(case, matrix) -> None:
    part = matrix.subset(slice(4))
    chosen = matrix.select(rounded(case.units, case.units.lowest()))
    for small, large in zip(
        estimate_sqnr(part, chosen, draws(4, 0)), estimate_sqnr(matrix, chosen, draws(8, 0)), strict=True
    ):
        assert small.low <= small.value <= small.high
        assert small.low - 1.0 <= large.value <= small.high + 1.0


def test_secant_corrects_towards_the_measured_path(case, board, matrix) -> None:
    sites = rounded(case.units, case.units.lowest())
    bent = secant(board, matrix, sites, case.heads, case.feeds)
    linear = matrix.damage(matrix.select(sites)).mean(axis=0)
    exact, _ = damage(board, [board.gates(sites)], case.heads, case.feeds)
    np.testing.assert_allclose(linear * bend(bent, linear), exact.mean(axis=0)[:, 0], rtol=1e-6)


def test_bend_and_straight_are_inverse() -> None:
    bent = Secant(
        heads=("a", "b"), fractions=(0.5, 1.0), damage=((0.02, 0.002), (0.04, 0.01)), linear=(0.1, 0.008), samples=4
    )
    np.testing.assert_allclose(bend(bent, np.array([0.0, 0.0])), 1.0)
    np.testing.assert_allclose(bend(bent, np.array([0.1, 0.008])), [0.4, 1.25])
    for limit in (1e-4, 1e-3, 5e-3):
        linear = straight(bent, limit)
        assert (linear * bend(bent, linear) <= limit * (1 + 1e-9)).all()
        assert (linear * 1.02 * bend(bent, linear * 1.02) >= limit * 0.99).all()


def test_table_splits_weights_from_activations(case, matrix) -> None:
    sites = rounded(case.units, case.units.lowest())
    linear = tuple(float(d) for d in matrix.damage(matrix.select(sites)).mean(axis=0))
    flat = Secant(heads=matrix.heads, fractions=(1.0,), damage=(linear,), linear=linear, samples=8)
    info = DataInfo(name="random", count=8, seed=0, sha256="0" * 64, preprocessing="none")
    table = sensitivities(matrix, case.units, info, flat, seed=0)
    rows = {(r.scope, r.id, r.part, r.head): r for r in table.rows}
    for head in matrix.heads:
        whole = rows["unit", "/body/cv1/Conv", "all", head].sqnr_db.value
        parts = [rows["unit", "/body/cv1/Conv", p, head].sqnr_db.value for p in ("weights", "activations")]
        assert whole <= max(parts) + 3
        assert rows["region", "(model)", "all", head].sqnr_db.value <= whole
    assert not any(r.flagged for r in table.rows)


def test_relevance_weighs_boxes_by_confidence_and_size() -> None:
    from bitalloy.core.records import Head
    from bitalloy.model.heads import Reference

    head = Head(name="detections", output="y", tensor="t", axis=1, start=0, stop=4, scores=(4, 6))
    y = np.zeros((1, 6, 2))
    y[0, :, 0] = [100, 50, 20, 10, 0.1, 0.5]
    y[0, :, 1] = [300, 200, 0.5, 80, 0.2, 0.1]
    found = y + np.array([2.0, 1.0, 4.0, 1.0, 0.3, 0.3])[None, :, None]
    first = 0.5**4 * (0.1**2 + 0.1**2 + 0.2**2 + 0.1**2)
    second = 0.2**4 * (2.0**2 + (1 / 80) ** 2 + 4.0**2 + (1 / 80) ** 2)  # half a pixel wide counts as one
    exact = Reference({"y": y}, [head])
    assert exact.error({"y": found})[0] == pytest.approx(first + second)
    assert exact.energy[0] == pytest.approx(4 * (0.5**4 + 0.2**4))


def test_an_output_that_is_also_read_inside_is_rounded_once(tmp_path) -> None:
    """`mid` leaves the graph and feeds the Conv that makes `y`: its rounding on the way out must not reach `y`."""
    rng = np.random.default_rng(0)
    path = tmp_path / "tapped.onnx"
    weights = {n: rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * 0.2 for n in ("w0", "w1", "w2")}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w0"], ["mid"], name="first", pads=[1] * 4),
            helper.make_node("Conv", ["mid", "w1"], ["z"], name="second", pads=[1] * 4),
            helper.make_node("Conv", ["z", "w2"], ["y"], name="third", pads=[1] * 4),
        ],
        "tapped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in ("mid", "y")],
        initializer=[numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    loaded = load_graph(path)
    heads = find_heads(loaded)
    assert [h.name for h in heads] == ["mid", "y"]
    units = split(loaded, ORT_CPU, heads[1:])  # `mid` is no head, so its unit may run in INT8
    leaving, inside = "mid->(output) in int8", "mid->second in int8"
    assert {leaving, inside} <= rounded(units, units.lowest())
    ranges = {e.root: (-4.0, 4.0) for e in units.edges}
    feeds = [{"x": rng.standard_normal((1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]
    board = Switchboard(loaded, Recipe(units, ORT_CPU, ranges))
    for part in (heads, heads[1:]):
        prober = Prober(loaded, part, [Recipe(units, ORT_CPU, ranges)])
        rows = ProbeMatrix.concatenate([prober.measure(f, sample=i, probes=64, seed=0) for i, f in enumerate(feeds)])
        for sites in ({leaving}, {inside}, {leaving, inside}):
            exact, _ = damage(board, [board.gates(sites)], part, feeds)
            found = rows.damage(rows.select(sites)).mean(axis=0)
            reached = exact.mean(axis=0)[:, 0] > 0
            assert reached.tolist() == (found > 0).tolist()
            assert np.abs(decibel(found) - decibel(exact.mean(axis=0)[:, 0]))[reached].max(initial=0.0) < 0.5


def test_halves_that_rank_units_the_other_way_round_have_not_settled() -> None:
    assert not ranked_alike(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0]))
    assert ranked_alike(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 5.0]))
