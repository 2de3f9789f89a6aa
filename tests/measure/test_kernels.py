"""What a runtime's optimization changes is found, with its cause, in models that were made to show each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tests.cnn import int8, with_pair_limit
from tests.micro import Node, build

from bitalloy.core.outcome import KernelEffect
from bitalloy.measure.kernels import CAUSES, ROUNDED_WEIGHTS, SATURATING, UNEXPLAINED, kernel_effects
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.calibrated import plan_artefact
from bitalloy.rewrite.floats import keep_floats
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY, Runtime
from bitalloy.runtime.ort import ORT, OrtSession
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.patterns import has_vnni
from bitalloy.targets.recipe import Recipe

OTHERWISE = list(CAUSES)[-1]


@dataclass(frozen=True)
class Made:
    """A model whose first units run in INT8, and its float form."""

    graph: Graph
    recipe: Recipe
    model: Artefact
    feeds: list[dict[str, np.ndarray]]

    def effects(self, runtime: Runtime = ORT) -> tuple[KernelEffect, ...]:
        shipped = Artefact(self.model.models, runtime=runtime)
        reference = Artefact({ONLY: self.graph.model})
        return kernel_effects(reference, shipped, find_heads(self.graph), lambda: iter(self.feeds))


def made(
    path: Path,
    nodes: list[Node],
    lowered: list[str],
    arrays: Mapping[str, np.ndarray],
    shape: list[int],
    pair_limit: int | None = 128,
) -> Made:
    """Every tensor has the range of its values; nothing is done for what stays in float."""
    generator = np.random.default_rng(1)
    feeds = [{"x": generator.random(shape).astype(np.float32)} for _ in range(2)]
    probe = build(path / "all.onnx", nodes, {"x": shape}, ("y", [1]), arrays)
    model = probe.model.clone()
    tensors = [v for node in model.graph for v in node.outputs]
    model.graph.outputs.extend(v for v in tensors if not v.is_graph_output())
    seen = [{**OrtSession(model, optimize=False).run(one), **one} for one in feeds]
    graph = build(path / "m.onnx", nodes, {"x": shape}, ("y", seen[0]["y"].shape), arrays)
    device = with_pair_limit(ORT_CPU, pair_limit)
    units = split(graph, device, find_heads(graph))
    ranges = {e.root: (min(s[e.root].min() for s in seen), max(s[e.root].max() for s in seen)) for e in units.edges}
    recipe = Recipe(units, device, {name: (float(low), float(high)) for name, (low, high) in ranges.items()})
    return Made(graph, recipe, Artefact({ONLY: write_plan(graph, recipe, int8(lowered)).model}), feeds)


def grey(path: Path) -> Made:
    """Bright images and kernels of one sign, without a pair limit."""
    nodes: list[Node] = [("Conv", ["x", "w"], "c", {}), ("Neg", ["c"], "y", {})]
    weight = np.random.default_rng(0).uniform(0.8, 1, (8, 1, 5, 5))
    return made(path, nodes, ["c"], {"w": weight}, [1, 1, 12, 12], pair_limit=None)


def between(path: Path) -> Made:
    """A float depthwise convolution between two in INT8; the weights of a channel that is always 0 are very large."""
    generator = np.random.default_rng(0)
    nodes: list[Node] = [
        ("Conv", ["x", "a"], "c", {}),
        ("Conv", ["c", "d"], "e", {"group": 16}),
        ("Conv", ["e", "b"], "f", {}),
        ("Neg", ["f"], "y", {}),
    ]
    arrays = {
        "a": generator.standard_normal((16, 3, 3, 3)) / 8,
        "d": generator.standard_normal((16, 1, 3, 3)),
        "b": generator.standard_normal((16, 16, 1, 1)) / 4,
    }
    arrays["a"][0], arrays["d"][0] = 0.0, 100.0
    return made(path, nodes, ["c", "f"], arrays, [1, 3, 12, 12])


def pool(path: Path) -> Made:
    """A float AveragePool, whose integer kernel is wrong, between two convolutions in INT8."""
    uneven = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1}
    nodes: list[Node] = [
        ("Conv", ["x", "a"], "c", {}),
        ("AveragePool", ["c"], "p", uneven),
        ("Conv", ["p", "b"], "f", {}),
        ("Neg", ["f"], "y", {}),
    ]
    generator = np.random.default_rng(0)
    arrays = {"a": generator.random((4, 3, 1, 1)) / 9, "b": generator.random((4, 4, 1, 1)) / 9}
    return made(path, nodes, ["c", "f"], arrays, [1, 3, 16, 16])


def test_saturation_is_told_by_its_name(tmp_path: Path) -> None:
    found = grey(tmp_path).effects()
    if has_vnni():
        assert not found
        return
    (effect,) = found
    assert effect.cause == SATURATING and effect.optimized_db < effect.written_db - 10


def test_rounded_weights_are_told_by_the_pass_that_rounds_them(tmp_path: Path) -> None:
    case = between(tmp_path)
    (effect,) = case.effects()
    assert effect.cause == ROUNDED_WEIGHTS and effect.optimized_db < effect.written_db - 1
    (model,) = case.model.models.values()
    assert not isinstance(model, Path)
    keep_floats(model)
    assert case.effects() == ()


def test_integer_kernels_that_are_wrong_are_told(tmp_path: Path) -> None:
    case = pool(tmp_path)
    (effect,) = case.effects()
    assert effect.cause == OTHERWISE and effect.optimized_db < effect.written_db - 5
    (model,) = case.model.models.values()
    assert not isinstance(model, Path)
    keep_floats(model)
    assert case.effects() == ()


def test_shipped_models_keep_their_floats(tmp_path: Path) -> None:
    case = between(tmp_path)
    shipped = plan_artefact(case.graph, case.recipe, int8(["c", "f"]))
    assert replace(case, model=shipped).effects() == ()


class Disturbed(OrtSession):
    """A session of a runtime that adds noise of its own."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value * np.float32(1.2) for name, value in super().run(feeds).items()}


@pytest.mark.parametrize("unoptimized", [True, False])
def test_what_no_execution_explains_is_not_known(tmp_path: Path, unoptimized: bool) -> None:
    other = Runtime("Other", Disturbed if unoptimized else OrtSession, lambda: "1")
    found = between(tmp_path).effects(other)
    assert [effect.cause for effect in found] == [UNEXPLAINED]


def test_a_model_that_runs_as_written_has_none(tmp_path: Path) -> None:
    case = between(tmp_path)
    reference = Artefact({ONLY: case.graph.model})
    assert kernel_effects(reference, reference, find_heads(case.graph), lambda: case.feeds) == ()
