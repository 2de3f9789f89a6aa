"""What gradients do not see is executed: against plain ONNX Runtime on models that the plan rewrites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import numpy_helper
from tests.micro import Node, build

import bitalloy
from bitalloy.core.schemes import Plan
from bitalloy.data.datasets import ArrayDataset
from bitalloy.model.load import Graph
from bitalloy.model.read import constant
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.ort import AS_WRITTEN
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.measuring import confirm
from bitalloy.targets.placement import rounded

SAMPLES = 4
QUICK = bitalloy.Settings(
    samples=SAMPLES, probes=8, calibration_samples=SAMPLES, equalize=False, bias_correction=False, range_method="minmax"
)
WEIGHTS: dict[str, Sequence[int] | np.ndarray] = {
    "w": (16, 16),
    "v": (16, 16),
    "u": (16, 8),
    "step": np.array(3.0),
    "region": np.array([[0, 0, 0, 15, 15]]),
}


def ints(name: str, *values: int) -> Node:
    return "Constant", [], name, {"value": numpy_helper.from_array(np.array(values, np.int64))}


START: list[Node] = [("MatMul", ["x", "w"], "a", {}), ("Relu", ["a"], "b", {})]
END: list[Node] = [("MatMul", ["c", "u"], "y", {})]


@dataclass(frozen=True)
class Blind:
    """A network whose unit `a` has a way to the output that gradients miss."""

    nodes: list[Node]
    exclude: tuple[str, ...] = ()


CASES = {
    "excluded": Blind([*START, ("Tanh", ["b"], "c", {}), *END], ("c",)),
    "excluded beside a way that is seen": Blind(
        [*START, ("Mul", ["b", "b"], "m", {}), ("Add", ["b", "m"], "c", {}), *END], ("m",)
    ),
    "rounded": Blind([*START, ("Mul", ["b", "step"], "m", {}), ("Round", ["m"], "c", {}), *END]),
    "rounded beside a way that is seen": Blind(
        [*START, ("Mul", ["b", "step"], "m", {}), ("Round", ["m"], "r", {}), ("Add", ["b", "r"], "c", {}), *END]
    ),
    "through integers": Blind([*START, ("Cast", ["b"], "i", {"to": 6}), ("Cast", ["i"], "c", {"to": 1}), *END]),
    "an index": Blind(
        [
            *START,
            ("ArgMax", ["b"], "i", {"axis": 1, "keepdims": 1}),
            ints("sixteen", 1, 16),
            ("Expand", ["i", "sixteen"], "j", {}),
            ("GatherElements", ["b", "j"], "g", {"axis": 1}),
            ("MatMul", ["g", "v"], "c", {}),
            *END,
        ]
    ),
    "an operator without adjoint": Blind(
        [
            *START,
            ints("image", 1, 2, 16, 16),
            ("Reshape", ["b", "image"], "i", {}),
            ("MaxRoiPool", ["i", "region"], "g", {"pooled_shape": [16, 16]}),
            ints("rows", 32, 16),
            ("Reshape", ["g", "rows"], "c", {}),
            *END,
        ]
    ),
    "a rule that does not cover its use": Blind([*START, ("Einsum", ["b"], "c", {"equation": "...->..."}), *END]),
    "saturated": Blind([*START, ("HardSigmoid", ["b"], "c", {"alpha": 1e6, "beta": -3e5}), *END]),
}


def analysis_of(folder: Path, case: Blind, *targets: str) -> Analysis:
    model = build(folder / "m.onnx", case.nodes, {"x": (32, 16)}, ("y", (32, 8)), WEIGHTS)
    rng = np.random.default_rng(1)
    # a third of so few samples serves probing
    data = ArrayDataset(
        [{"x": rng.standard_normal((32, 16)).astype(np.float32)} for _ in range(3 * SAMPLES)], label="d"
    )
    settings = msgspec.structs.replace(QUICK, exclude=case.exclude, targets=targets or QUICK.targets)
    return bitalloy.analyze(model, data, settings)


def executed_db(analysis: Analysis, plan: Plan) -> float:
    """SQNR on the probing samples of the model that a plan makes, in ONNX Runtime without optimization."""
    noise = energy = 0.0
    reference, mixed = (
        Artefact({ONLY: analysis.variant(p).model}, runtime=AS_WRITTEN).session() for p in (Plan(), plan)
    )
    for index in analysis.parts.probe:
        feeds = analysis.data.feeds(index)
        exact, found = reference.run(feeds)["y"].astype(np.float64), mixed.run(feeds)["y"]
        noise, energy = noise + np.square(found - exact).sum(), energy + np.square(exact).sum()
    return float(decibel(np.array(noise / energy)))


@pytest.mark.parametrize("name", CASES)
def test_damage_that_gradients_miss_is_executed(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(tmp_path, CASES[name])
    plan = Plan.of("int8", "a")
    true = executed_db(analysis, plan)
    assert true < 60
    matrix = analysis.matrix
    sites = rounded(analysis.units, plan)
    assert {site for _, site in matrix.executed} >= sites
    predicted = float(decibel(matrix.damage(matrix.select(sites)).mean(axis=0))[0])
    # the sum of what single sites do; what flips beyond a step grows with the error, not with its square
    assert -7 < predicted - true < 3
    rows = {r.id: r for r in analysis.table.rows if (r.scope, r.part) == ("unit", "all")}
    assert rows["a"].exact
    confirmed = confirm(analysis, 0)
    row = next(r for r in confirmed.table.rows if (r.scope, r.part, r.id, r.scheme) == ("unit", "all", "a", "int8"))
    assert row.exact and abs(row.sqnr_db.value - true) < 0.1


def test_what_gradients_see_is_not_executed(tmp_path: Path) -> None:
    """Activations written with Where have comparisons in them, which is no reason to execute anything."""
    zero: list[Node] = [("Sub", ["a", "a"], "z", {}), ("Greater", ["a", "z"], "g", {}), ("Mul", ["a", "step"], "m", {})]
    case = Blind([START[0], *zero, ("Where", ["g", "m", "a"], "c", {}), *END])
    assert {site for _, site in analysis_of(tmp_path, case).matrix.executed} == {"a->g in int8", "a->z in int8"}


def test_units_that_compute_in_another_format_are_executed_as_models(tmp_path: Path) -> None:
    """Gates cannot switch them; numpy rounds what enters the unit, its weight and its result to half precision."""
    analysis = analysis_of(tmp_path, CASES["excluded"], "tensorrt")
    w, u = (np.asarray(constant(analysis.graph.value[n]), np.float64) for n in "wu")

    def half(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float16).astype(np.float64)

    noise = energy = 0.0
    for x in (analysis.data.feeds(index)["x"].astype(np.float64) for index in analysis.parts.probe):
        exact, found = x @ w, half(half(x) @ half(w))
        exact, found = (np.tanh(np.maximum(a, 0)) @ u for a in (exact, found))
        noise, energy = noise + np.square(found - exact).sum(), energy + np.square(exact).sum()
    row = next(r for r in analysis.table.rows if (r.scope, r.id, r.scheme) == ("unit", "a", "fp16"))
    assert row.exact and abs(row.sqnr_db.value - float(decibel(np.array(noise / energy)))) < 0.5


def test_large_models_keep_in_float_what_gradients_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "large", True)
    analysis = analysis_of(tmp_path, CASES["excluded"])
    unit = next(u for u in analysis.units.units if u.id == "a")
    assert unit.allowed == ("fp32",) and "unknown" in unit.why and not analysis.matrix.executed


def test_rounding_again_on_the_same_scale_is_known_to_do_nothing(tmp_path: Path) -> None:
    """What a pool gives has the scale of what it reads, so a Concat of both rounds nothing when it rounds again."""
    nodes: list[Node] = [
        ("Conv", ["x", "k"], "a", {"pads": [1] * 4}),
        ("Relu", ["a"], "b", {}),
        ("MaxPool", ["b"], "p", {"kernel_shape": [3, 3], "pads": [1] * 4}),
        ("Concat", ["b", "p"], "c", {"axis": 1}),
        ("Conv", ["c", "l"], "d", {}),
        ("Conv", ["d", "m"], "y", {}),
    ]
    weights: dict[str, Sequence[int] | np.ndarray] = {"k": (8, 4, 3, 3), "l": (8, 16, 1, 1), "m": (4, 8, 1, 1)}
    model = build(tmp_path / "m.onnx", nodes, {"x": (1, 4, 8, 8)}, ("y", (1, 4, 8, 8)), weights)
    rng = np.random.default_rng(1)
    data = ArrayDataset([{"x": rng.standard_normal((1, 4, 8, 8)).astype(np.float32)} for _ in range(2)], label="d")
    analysis = bitalloy.analyze(model, data, msgspec.structs.replace(QUICK, samples=2, calibration_samples=2))
    again = [s for s in analysis.matrix.sites if s == "c->d again in int8"]
    assert again and not analysis.matrix.rows[0][..., analysis.matrix.column[again[0]]].any()
    assert not analysis.matrix.executed


def test_a_matrix_remembers_what_was_executed(tmp_path: Path) -> None:
    matrix = analysis_of(tmp_path, CASES["excluded"]).matrix
    again = ProbeMatrix.from_bytes(matrix.to_bytes())
    assert again.executed == matrix.executed != frozenset()
    names = {f"other {site}": site for site in matrix.sites}
    assert {(h, s.removeprefix("other ")) for h, s in again.view(names).executed} == matrix.executed
