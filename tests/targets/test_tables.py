"""Tables that a Gather looks up, in fewer bits: bits, kernels, predictions, and what several readers of one share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.unpriced import empty_table

from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitGraph
from bitalloy.measure.prices import border_bytes, saved_bytes
from bitalloy.measure.roofline import estimate_costs
from bitalloy.measure.sizes import shared_weights, with_sizes
from bitalloy.model.heads import Reference, find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.calibrated import plan_artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.openvino import OpenVinoSession
from bitalloy.runtime.ort import OrtSession
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets import TARGETS
from bitalloy.targets.base import split
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe

INDICES = np.array([[0, 5, -1], [63, 5, 17]])
ROWS = 128


def table(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of different magnitude, not centred, so that blocks have scales and zero points of their own."""
    random = np.random.default_rng(seed)
    return ((random.standard_normal((rows, columns)) + 0.4) * random.uniform(0.05, 2, (rows, 1))).astype(np.float32)


def model(path: Path, body: str, constants: Mapping[str, np.ndarray]) -> Graph:
    """A model of `body` in ONNX's text form, with these constants and nodes named `/<result>/<operator>`."""
    parsed = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> tiny {body}')
    parsed.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items())
    for node in parsed.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.checker.check_model(parsed)
    onnx.save(parsed, path)
    return load_graph(path)


def one_table(path: Path, columns: int) -> Graph:
    body = f"(int64[2,3] i) => (float[2,3,{columns}] y) {{ g = Gather(w, i) y = Neg(g) }}"
    return model(path, body, {"w": table(ROWS, columns)})


def units_on(graph: Graph, target: str, schemes: Sequence[str] = ()) -> UnitGraph:
    known = [offer.scheme.name for offer in TARGETS[target].offers]
    return split(graph, TARGETS[target], find_heads(graph), schemes=schemes or known)


def stored(w: np.ndarray, scheme: str, *, by_row: bool = False) -> np.ndarray:
    """What is left of rows, written anew from the definitions: all arithmetic in float32."""
    if scheme in ("fp32", "w16"):
        return w if scheme == "fp32" else w.astype(np.float16).astype(np.float32)
    block = w.shape[1] if by_row else 128 if scheme.endswith("128") else 32
    found = np.empty_like(w)
    for start in range(0, w.shape[1], block):
        part = w[:, start : start + block]
        if scheme.startswith("w8"):
            step = (np.abs(part).max(axis=1, keepdims=True).astype(np.float64) / 127).astype(np.float32)
            found[:, start : start + block] = np.rint(part / step).astype(np.float32) * step
        else:
            low, high = (f(part.astype(np.float64), axis=1, keepdims=True) for f in (np.min, np.max))
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            step = ((high - low) / 15).astype(np.float32)
            zero = np.rint(-low / step.astype(np.float64)).astype(np.float32)
            steps = np.clip(np.rint(part / step), -zero, 15 - zero)
            found[:, start : start + block] = steps * step
    return found


@pytest.mark.parametrize("columns", [64, 100, 96])
@pytest.mark.parametrize("scheme", ["w16", "w8", "w4", "w4-128"])
def test_rows_are_bit_for_bit_those_of_the_definitions(tmp_path: Path, scheme: str, columns: int) -> None:
    """Whole blocks, a shorter last one, and an odd number of blocks; also an index that counts from the end."""
    graph = one_table(tmp_path / "net.onnx", columns)
    made = write_plan(graph, Recipe(units_on(graph, "ort-cpu"), TARGETS["ort-cpu"], {}), Plan({"/g/Gather": scheme}))
    onnx.checker.check_model(onnx.load_model_from_string(made.to_bytes()), full_check=True)
    assert len(made.to_bytes()) < {"w16": 0.55, "w8": 0.36}.get(scheme, 0.25) * graph.info.size_bytes + 600
    for optimize in (True, False):
        (found,) = OrtSession(made.to_bytes(), optimize=optimize).run({"i": INDICES}).values()
        assert np.array_equal(-found, stored(table(ROWS, columns), scheme)[INDICES])


@pytest.mark.parametrize("target", ["openvino-cpu", "tensorrt", "ort-cuda"])
def test_other_targets_say_the_same_in_standard_operators(tmp_path: Path, target: str) -> None:
    graph = one_table(tmp_path / "net.onnx", 64)
    units = units_on(graph, target)
    for scheme in {"w16", "w8", "w8-row", "w4"}.intersection(next(u for u in units.units if u.weights).allowed):
        made = write_plan(graph, Recipe(units, TARGETS[target], {}), Plan({"/g/Gather": scheme}))
        nodes = onnx.load_model_from_string(made.to_bytes()).graph.node
        assert not any(node.domain for node in nodes)
        (found,) = OrtSession(made.to_bytes()).run({"i": INDICES}).values()
        expected = stored(table(ROWS, 64), scheme, by_row=target != "openvino-cpu")
        assert np.array_equal(-found, expected[INDICES])


def test_openvino_keeps_the_numbers_of_eight_bits(tmp_path: Path) -> None:
    """Its execution graph gathers rows of INT8, where a DequantizeLinear of blocks would be unpacked when loaded."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'bitalloy[openvino]'")
    graph = one_table(tmp_path / "net.onnx", 64)
    made = write_plan(
        graph, Recipe(units_on(graph, "openvino-cpu"), TARGETS["openvino-cpu"], {}), Plan({"/g/Gather": "w8"})
    )
    session = OpenVinoSession(made.to_bytes(), profile=tmp_path)
    (found,) = session.run({"i": INDICES}).values()
    np.testing.assert_allclose(-found, stored(table(ROWS, 64), "w8")[INDICES], rtol=1e-6)
    assert ("Gather", "int8") in {(k.op.split()[0], k.precision) for k in session.kernels()}


def test_what_is_no_table(tmp_path: Path) -> None:
    """Too small, another axis, a row of an odd number of numbers, values beyond FP16."""
    body = """(int64[3] i) => (float[3,8] a, float[128,3] c, float[3,99] d, float[3,64] e) {
        a = Gather(small, i)  c = Gather<axis=1>(w, i)  d = Gather(odd, i)
        e = Gather(large, i) }"""
    constants = {
        "small": table(16, 8), "w": table(ROWS, 64), "odd": table(ROWS, 99), "large": table(ROWS, 64) * 1e5,
    }  # fmt: skip
    graph = model(tmp_path / "net.onnx", body, constants)
    units = {u.id: u for u in units_on(graph, "ort-cpu", ["w16", "w8", "w4", "w4-128"]).units}
    assert units["/a/Gather"].allowed == units["/c/Gather"].allowed == (BASELINE,)
    assert units["/d/Gather"].allowed == (BASELINE, "w16", "w8")
    assert "a row of the table has 99" in units["/d/Gather"].refused["w4"]
    assert units["/e/Gather"].allowed == (BASELINE, "w8", "w4", "w4-128")
    assert "FP16 would overflow" in units["/e/Gather"].refused["w16"]
    assert "4096 numbers or more" in units["/a/Gather"].refused["w8"]


def product_of_rows(path: Path) -> tuple[Graph, np.ndarray]:
    """Linear in the table, so that predictions are exact but for their probes."""
    matrix = np.random.default_rng(9).standard_normal((64, 5)).astype(np.float32)
    body = "(int64[2,3] i) => (float[2,3,5] y) { g = Gather(w, i) y = MatMul(g, m) }"
    return model(path, body, {"w": table(ROWS, 64), "m": matrix}), matrix


@pytest.mark.parametrize("scheme", ["w16", "w8", "w4"])
def test_damage_of_a_table_is_predicted_and_switched(tmp_path: Path, scheme: str) -> None:
    graph, matrix = product_of_rows(tmp_path / "net.onnx")
    heads, units = find_heads(graph), units_on(graph, "ort-cpu")
    recipe, plan = Recipe(units, TARGETS["ort-cpu"], {"g": (-4, 4), "y": (-4, 4)}), Plan({"/g/Gather": scheme})
    w, feeds = table(ROWS, 64), {"i": INDICES}
    exact = ((stored(w, scheme) - w)[INDICES].astype(np.float64) @ matrix) ** 2
    expected = exact.sum() / ((w[INDICES].astype(np.float64) @ matrix) ** 2).sum()
    found = Prober(graph, heads, [recipe]).measure(feeds, sample=0, probes=512, seed=0)
    sites = rounded(units, plan)
    assert found.damage(found.select(sites)).mean() == pytest.approx(expected, rel=0.15)
    board = Switchboard(graph, recipe)
    reference = Reference(board.run(feeds, board.gates(())), heads)
    assert reference.error(board.run(feeds, board.gates(sites))).sum() == pytest.approx(exact.sum(), rel=1e-3)


TIED = {
    "two lookups": (
        """(int64[2,3] i, int64[2,3] j) => (float[2,3,64] y) { a = Gather(w, i)  b = Gather(w, j)  y = Sub(a, b) }""",
        ("/a/Gather", "/b/Gather"),
    ),
    "Gemm": (
        "(int64[4] i) => (float[4,128] y) { g = Gather(w, i)  r = Tanh(g)  y = Gemm<transB=1>(r, w) }",
        ("/g/Gather", "/y/Gemm"),
    ),
    "transpose": (
        """(int64[2,3] i) => (float[2,3,128] y) { g = Gather(w, i)  r = Tanh(g)  t = Transpose<perm=[1,0]>(w)
        y = MatMul(r, t) }""",
        ("/g/Gather", "/y/MatMul"),
    ),
    "two products": (
        "(float[3,128] x, float[3,128] z) => (float[3,64] y) { a = MatMul(x, w)  b = MatMul(z, w)  y = Sub(a, b) }",
        ("/a/MatMul", "/b/MatMul"),
    ),
}
"""Two readers of one constant."""


def tied(path: Path, kind: str) -> Graph:
    return model(path, TIED[kind][0], {"w": table(ROWS, 64)})


PRICED = ("w16", "w8-row", "w8", "int8-dynamic", "fp16", "w4", "w4-128", "int8")
"""Schemes whose rows of 64 numbers differ: with blocks of 64 and of 128 they would be the same."""


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu", "ort-cuda"])
@pytest.mark.parametrize("kind", TIED)
def test_a_weight_of_two_readers_is_priced_as_it_is_written(tmp_path: Path, kind: str, target: str) -> None:
    """In every pair of schemes: floats stay as long as one of both reads them, and equal forms are stored once."""
    graph = tied(tmp_path / "net.onnx", kind)
    offered = {o.scheme.name for o in TARGETS[target].offers}
    units = units_on(graph, target, [s for s in PRICED if s in offered])
    recipe = Recipe(units, TARGETS[target], {tensor: (-4.0, 4.0) for tensor in graph.value})
    priced = with_sizes(
        empty_table(units),
        units,
        lambda plan: plan_artefact(graph, recipe, plan),
        shared=shared_weights(graph, recipe),
    )
    first, second = TIED[kind][1]
    for one, two in product(units.allowed[first], units.allowed[second]):
        plan = Plan({first: one, second: two})
        written = plan_artefact(graph, recipe, plan).size_bytes
        predicted = priced.float_bytes - saved_bytes(priced, plan) + border_bytes(priced, units, plan)
        assert predicted == pytest.approx(written, abs=1000), (one, two)  # of 33 kB of floats


@pytest.mark.parametrize(("kind", "scheme"), list(product(TIED, ["w8", "w4"])))
def test_both_readers_share_one_encoding(tmp_path: Path, kind: str, scheme: str) -> None:
    """The file holds the packed table once, also for a head that reads the transpose; one alone leaves the floats."""
    graph = tied(tmp_path / "net.onnx", kind)
    recipe = Recipe(units_on(graph, "ort-cpu"), TARGETS["ort-cpu"], {})
    first, second = TIED[kind][1]
    both, alone = (write_plan(graph, recipe, Plan.of(scheme, *names)) for names in ((first, second), (first,)))
    packed = ROWS * 64 * int(scheme[1]) // 8
    large = [t.nbytes for t in (v.const_value for v in both.model.graph.initializers.values()) if t.nbytes >= packed]  # type: ignore[union-attr]
    assert large == [packed]
    floats = [v for v in alone.model.graph.initializers.values() if v.const_value.nbytes == ROWS * 64 * 4]  # type: ignore[union-attr]
    assert len(floats) == 1 and len(alone.to_bytes()) > ROWS * 64 * 4 + packed
    feeds = {str(v.name): INDICES.reshape(-1)[:4] if v.shape.rank() == 1 else INDICES for v in graph.model.graph.inputs}  # type: ignore[union-attr]
    if "x" in feeds:
        feeds = {name: table(3, 128, seed) for seed, name in enumerate(feeds)}
    for made in (both, alone):
        one, other = (OrtSession(made.to_bytes(), optimize=optimize).run(feeds)["y"] for optimize in (True, False))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_floats_of_a_transpose_are_stored_once(tmp_path: Path) -> None:
    """Folding made two constants of the file's one; what is written has one again, and gives the same numbers."""
    graph = tied(tmp_path / "net.onnx", "transpose")
    recipe = Recipe(units_on(graph, "ort-cpu"), TARGETS["ort-cpu"], {"/r/Tanh": (-1.0, 1.0)})
    assert len([v for v in graph.model.graph.initializers.values() if v.const_value.nbytes == ROWS * 64 * 4]) == 2  # type: ignore[union-attr]
    written = plan_artefact(graph, recipe, Plan())
    assert written.size_bytes < graph.info.size_bytes + 1000
    feeds = {"i": INDICES}
    exact, found = (OrtSession(m).run(feeds)["y"] for m in (tmp_path / "net.onnx", written.models[ONLY]))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_the_search_knows_that_floats_stay(tmp_path: Path) -> None:
    """A size that only both readers together reach, and one that the table alone reaches beside another's floats."""
    graph = tied(tmp_path / "net.onnx", "Gemm")
    units = units_on(graph, "ort-cpu", ["w8"])
    recipe = Recipe(units, TARGETS["ort-cpu"], {tensor: (-4.0, 4.0) for tensor in graph.value})
    priced = with_sizes(
        empty_table(units), units, lambda plan: plan_artefact(graph, recipe, plan), shared=shared_weights(graph, recipe)
    )
    found = Prober(graph, find_heads(graph), [recipe]).measure(
        {"i": INDICES.reshape(-1)[:4]}, sample=0, probes=4, seed=0
    )
    straight = Secant(heads=found.heads, fractions=(1.0,), damage=((1e-6,),), linear=(1e-6,), samples=1)
    problem = Problem(units, found, straight, priced, priced.float_bytes)
    solved = Program(problem).solve(Limits(size_bytes=0.5 * priced.float_bytes), minimize="damage")
    assert solved is not None and solved.plan == Plan({"/g/Gather": "w8", "/y/Gemm": "w8"})
    for plan in (Plan(), solved.plan, Plan({"/g/Gather": "w8"})):
        _, _, sizes = problem.neighbours(plan)
        expected = [problem.size_bytes(problem.moved(plan, move)) for move in problem.moves]
        np.testing.assert_allclose(sizes, expected, atol=1)
    assert Program(problem).solve(Limits(size_bytes=0.2 * priced.float_bytes), minimize="damage") is None
    assert problem.smallest == solved.plan


def test_both_damages_of_a_shared_table_count(tmp_path: Path) -> None:
    """A reader each: damage of both is the sum of their own, and their product where they meet."""
    graph = tied(tmp_path / "net.onnx", "two lookups")
    units, heads = units_on(graph, "ort-cpu"), find_heads(graph)
    recipe = Recipe(units, TARGETS["ort-cpu"], {})
    feeds = {"i": INDICES, "j": INDICES[::-1].copy()}
    found = Prober(graph, heads, [recipe]).measure(feeds, sample=0, probes=512, seed=0)
    w = table(ROWS, 64)
    delta = (stored(w, "w4") - w).astype(np.float64)
    expected = ((delta[feeds["i"]] - delta[feeds["j"]]) ** 2).sum() / ((w[feeds["i"]] - w[feeds["j"]]) ** 2).sum()
    plan = Plan({"/a/Gather": "w4", "/b/Gather": "w4"})
    assert found.damage(found.select(rounded(units, plan))).mean() == pytest.approx(expected, rel=0.2)


def test_estimates_read_the_rows_that_are_looked_up(tmp_path: Path) -> None:
    """On a device that is not here: a large table costs no more time than a small one, and fewer bytes in INT8."""
    costs = []
    for rows in (ROWS, 64 * ROWS):
        body = "(int64[2,3] i) => (float[2,3,64] y) { g = Gather(w, i) y = Neg(g) }"
        graph = model(tmp_path / f"{rows}.onnx", body, {"w": table(rows, 64)})
        target = TARGETS["ort-cuda"]
        units = units_on(graph, "ort-cuda")
        assert target.device is not None
        costs.append({c.unit: c for c in estimate_costs(graph, units, target.device).units}["/g/Gather"])
    assert costs[0].us == costs[1].us and set(costs[0].us) == {"fp32", "fp16", "w8-row"}
    assert costs[1].bytes["w8-row"] * 3.9 < costs[1].bytes["fp32"]
