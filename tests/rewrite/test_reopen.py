"""Scaled and shifted weights of a program whose files leave sizes open: what is shipped has them too."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.cnn import int8

from bitalloy.core.schemes import Plan
from bitalloy.core.units import Offset, UnitGraph
from bitalloy.model.graphs.joining import Joined, join
from bitalloy.model.graphs.wiring import load_program
from bitalloy.model.heads import find_heads
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.divide import divide
from bitalloy.rewrite.equalize import exponents, find_places, scale
from bitalloy.rewrite.reopen import reopen
from bitalloy.runtime.ort import OrtSession
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe

WIDTH, COUNT = 8, 5


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """`first` -> `second`, each a normalization with uneven channels, a MatMul and an Add; any number of rows."""
    folder = tmp_path_factory.mktemp("program")
    for seed, (name, given, made) in enumerate((("first", "x", "h"), ("second", "h", "y"))):
        rng = np.random.default_rng(seed)
        arrays = {
            "gain": np.exp2(rng.integers(-4, 5, WIDTH)),
            "shift": rng.standard_normal(WIDTH),
            "weight": rng.standard_normal((WIDTH, WIDTH)),
            "bias": rng.standard_normal(WIDTH),
        }
        nodes = [
            helper.make_node("LayerNormalization", [given, "gain", "shift"], ["n"], name="norm", axis=-1),
            helper.make_node("MatMul", ["n", "weight"], ["m"], name="up"),
            helper.make_node("Add", ["m", "bias"], [made], name="add"),
        ]
        specs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "rows", WIDTH]) for n in (given, made)]
        constants = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
        graph = helper.make_graph(nodes, name, specs[:1], specs[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / f"{name}.onnx")
    content = {"graphs": {n: f"{n}.onnx" for n in ("first", "second")}, "wires": ["first:h -> second:h"]}
    (folder / "program.json").write_text(json.dumps(content))
    return join(load_program(folder, shapes={"first:x": (1, COUNT, WIDTH)}))


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((1, count, WIDTH)).astype(np.float32)


def run(models: dict[str, ir.Model], x: np.ndarray) -> np.ndarray:
    h = OrtSession(models["first"]).run({"x": x})["h"]
    return OrtSession(models["second"]).run({"h": h})["y"]


def shipped(program: Joined, mixed: ir.Model) -> dict[str, ir.Model]:
    parts = divide(mixed, program.program)
    return {n: reopen(p, program.opened[n].clone(), program.program.graphs[n].model) for n, p in parts.items()}


def given(program: Joined, x: np.ndarray) -> np.ndarray:
    """By the files."""
    folder = program.program.graphs["first"].source.parent
    h = OrtSession(folder / "first.onnx").run({"x": x})["h"]
    return OrtSession(folder / "second.onnx").run({"h": h})["y"]


def scaled(program: Joined) -> Joined:
    places = find_places(program)
    assert {p.tensor for p in places} == {"first/n", "second/n"}  # a wire is no place
    factors = exponents(program, places, [{"x": rows(COUNT)}])
    assert len(factors) == 2
    return scale(program, factors)


def test_scaled_float_graphs_compute_the_same_at_any_size(program: Joined) -> None:
    changed = scaled(program)
    models = shipped(changed, write_plan(changed, Recipe(_units(changed), ORT_CPU, {}), Plan()).model)
    one, other = (m.graph.initializers["gain"].const_value.numpy() for m in (models["first"], program.opened["first"]))  # type: ignore[union-attr]
    assert not np.array_equal(one, other)
    for count in (COUNT, 9):
        np.testing.assert_allclose(run(models, rows(count)), given(program, rows(count)), rtol=1e-4, atol=1e-4)


def test_rounded_graphs_with_corrected_biases_are_the_same_with_open_sizes(program: Joined) -> None:
    changed = scaled(program)
    ranges = {t: (-40.0, 40.0) for t in changed.value}
    units, plan = _units(changed), int8(["first/up", "second/up"])
    added = {
        "first/up": ("first/add", np.linspace(-1, 1, WIDTH)),
        "second/up": ("second/add", np.linspace(1, 2, WIDTH)),
    }
    offsets = {}
    for site in (w for u in units.units if u.id in plan for w in u.weights):
        node, values = added[site.node]
        offsets[f"{site.id} in int8"] = Offset(node=node, values=tuple(values.tolist()))
    mixed = write_plan(changed, Recipe(units, ORT_CPU, ranges, offsets), plan).model
    fixed, opened = divide(mixed, changed.program), shipped(changed, mixed)
    x = rows(COUNT)
    np.testing.assert_allclose(run(opened, x), run(fixed, x), rtol=1e-5, atol=1e-5)
    plain = shipped(changed, write_plan(changed, Recipe(units, ORT_CPU, ranges), plan).model)
    moved = run(opened, rows(9)) - run(plain, rows(9))
    assert np.abs(moved).mean() > 0.5
    assert opened["first"].graph.inputs[0].shape[1] == "rows"  # type: ignore[index]


def _units(graph: Joined) -> UnitGraph:
    return split(graph, ORT_CPU, find_heads(graph))
