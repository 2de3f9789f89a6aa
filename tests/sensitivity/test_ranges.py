"""The range of every tensor is chosen by what its rounding does to the outputs: against execution on each range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.core.records import Settings
from bitalloy.model.heads import Reference, find_heads
from bitalloy.model.load import load_graph
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.prepare import prepare
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.columns import views
from bitalloy.sensitivity.exact import Switchboard, damage
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.sensitivity.ranges import best_candidates, chosen_columns, later_ranges
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import ACTIVATIONS, Site, rounded
from bitalloy.targets.recipe import Recipe

SCALES = (3.0, 1.0, 0.45)
"""Candidates: ranges of so many times what was seen. The first wastes steps, the last cuts tails off."""


@pytest.fixture(scope="module")
def candidates(case) -> list[dict[str, tuple[float, float]]]:
    return [{t: (low * s, high * s) for t, (low, high) in case.ranges.items()} for s in SCALES]


@pytest.fixture(scope="module")
def probed(case, candidates) -> tuple[ProbeMatrix, list[dict[str, str]], list[dict[str, str]]]:
    """One matrix for all candidates, and the columns of each: everywhere, and only behind Concats."""
    first, *others = candidates
    behind = [later_ranges(case.units, first, r) for r in others]
    recipes = [Recipe(case.units, ORT_CPU, r) for r in (*candidates, *behind)]
    prober = Prober(case.graph, case.heads, recipes)
    rows = [prober.measure(f, sample=i, probes=64, seed=3) for i, f in enumerate(case.feeds)]
    found = views(case.graph, recipes)
    return ProbeMatrix.concatenate(rows), found[: len(SCALES)], [found[0], *found[len(SCALES) :]]


@pytest.fixture(scope="module")
def alone(case, candidates) -> dict[str, np.ndarray]:
    """Tensor -> damage of its roundings by execution, (heads, candidates)."""
    places = {e.id: e.root for e in case.units.edges} | {e.id: e.tensor for u in case.units.units for e in u.inner}
    roots = {Site(place, "int8", ACTIVATIONS).id: tensor for place, tensor in places.items()}
    found: dict[str, np.ndarray] = {}
    for number, ranges in enumerate(candidates):
        board = Switchboard(case.graph, Recipe(case.units, ORT_CPU, ranges))
        sites = [s for s in board.sites if s in roots]
        exact, _ = damage(board, [board.gates({s}) for s in sites], case.heads, case.feeds)
        for site, values in zip(sites, exact.mean(axis=0).T, strict=True):
            found.setdefault(roots[site], np.zeros((len(case.heads), len(SCALES))))[:, number] += values
    return found


def test_the_best_range_by_execution_is_chosen(case, probed, alone) -> None:
    matrix, names, _ = probed
    best = best_candidates(matrix, names, case.units)
    plain = [i for i, h in enumerate(case.heads) if not h.kind]
    whole = matrix.damage(matrix.select(rounded(case.units, case.units.lowest()))).mean(axis=0)
    costs = {t: (d[plain] / whole[plain, None]).sum(axis=0) for t, d in alone.items()}
    worth = {t: c for t, c in costs.items() if c.max() > 1e-6}
    assert len(worth) > 8
    assert all(costs[t][best.get(t, 0)] <= 1.35 * c.min() for t, c in worth.items())
    assert {best[t] for t in worth} >= {1, 2} or {best[t] for t in worth} == {1}


def test_all_units_on_chosen_ranges_are_predicted(case, candidates, probed) -> None:
    """Methods are forced to differ along Concats: their columns stand in for what was not measured."""
    matrix, names, behind = probed
    joined = {e.root for e in case.units.edges if e.passed_on}
    assert joined, "the network has an INT8 Concat"
    for best in (best_candidates(matrix, names, case.units), {t: 1 + (t in joined) for t in case.ranges}):
        ranges = {t: candidates[best.get(t, 0)][t] for t in case.ranges}
        view = matrix.view(chosen_columns(names, behind, best, case.units))
        sites = rounded(case.units, case.units.lowest())
        assert sites <= set(view.sites) and any(s.endswith(" again in int8") for s in sites)
        board = Switchboard(case.graph, Recipe(case.units, ORT_CPU, ranges))
        exact, _ = damage(board, [board.gates(sites)], case.heads, case.feeds)
        found = decibel(view.damage(view.select(sites)).mean(axis=0))
        expected = decibel(exact.mean(axis=0)[:, 0])
        linear = expected > 8
        assert linear.any() and np.abs(found - expected)[linear].max() < 3


def test_operands_of_the_same_method_use_their_own_column(case, probed) -> None:
    _, names, behind = probed
    same = dict.fromkeys(case.ranges, 2)
    assert chosen_columns(names, behind, same, case.units) == names[2]
    assert chosen_columns(names, behind, {}, case.units) == names[0]


@pytest.mark.parametrize("needed", [True, False], ids=["needed", "not needed"])
def test_an_outlier_is_cut_where_the_network_does_not_listen(tmp_path: Path, needed: bool) -> None:
    """Channel 1 is 60 times larger than channel 0; only the weights behind it differ."""
    first = np.array([[[[1.0]]], [[[60.0]]]], np.float32)
    second = np.array([[[[1.0]], [[1.0 if needed else 0.0]]]], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], name="/a/Conv"),
            helper.make_node("Relu", ["a"], ["b"], name="/a/Relu"),
            helper.make_node("Conv", ["b", "v"], ["y"], name="/b/Conv"),
        ],
        "outlier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 16, 16])],
        initializer=[numpy_helper.from_array(first, "w"), numpy_helper.from_array(second, "v")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    net = load_graph(tmp_path / "m.onnx")
    heads = find_heads(net)
    units = split(net, ORT_CPU, heads)
    wide = dict.fromkeys(("x", "a", "b", "y"), (-240.0, 240.0))
    narrow = {**wide, "b": (-4.0, 4.0)}
    recipes = [Recipe(units, ORT_CPU, wide), Recipe(units, ORT_CPU, narrow)]
    prober = Prober(net, heads, recipes)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 1, 16, 16)).astype(np.float32)} for _ in range(4)]
    matrix = ProbeMatrix.concatenate([prober.measure(f, sample=i, probes=32, seed=0) for i, f in enumerate(feeds)])
    names = views(net, recipes)
    assert best_candidates(matrix, names, units)["b"] == (0 if needed else 1)


def test_an_analysis_says_what_its_choice_brought(case, tmp_path: Path) -> None:
    folder = tmp_path / "feeds"
    folder.mkdir()
    for i in range(40):
        x = np.random.default_rng(i).laplace(size=(1, 3, 32, 32)).astype(np.float32)  # long tails
        np.savez(folder / f"{i:02d}.npz", x=x)
    prepared = prepare(case.path, out=tmp_path / "run", data=folder)
    work = prepared.work
    found = analyze(prepared.model, prepared.data, Settings(samples=8), work=work)
    plain = analyze(prepared.model, prepared.data, Settings(samples=8, range_method="extended"), work=work)
    choice = found.choice
    assert choice is not None and plain.choice is None
    assert sum(choice.methods.values()) == len(found.calibration.ranges)
    assert len(choice.methods) > 1, "long tails are worth cutting somewhere"
    assert {r.method for r in plain.calibration.ranges} == {"minmax", "extended"}
    assert found.parts.disjoint and choice.samples == 8
    exact = OrtSession(case.path)
    for analysis, told in ((plain, choice.first_db), (found, choice.chosen_db)):
        lowest = OrtSession(analysis.variant(analysis.units.lowest()).to_bytes())
        energy, error = [], []
        for i in analysis.parts.verification[:8]:
            reference = Reference(exact.run(analysis.data.feeds(i)), case.heads)
            energy.append(reference.energy)
            error.append(reference.error(lowest.run(analysis.data.feeds(i))))
        measured = decibel(np.sum(error, axis=0) / np.sum(energy, axis=0))
        if analysis is plain or choice.kept:
            np.testing.assert_allclose([e.value for e in told], measured, atol=0.05)
