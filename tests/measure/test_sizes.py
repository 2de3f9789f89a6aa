"""Predicted sizes of plans against the files that are written: within 1 % on models of real size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.unpriced import empty_table

import bitalloy
from bitalloy.core.schemes import Plan
from bitalloy.measure.prices import border_bytes, saved_bytes
from bitalloy.measure.sizes import with_sizes
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.rewrite.calibrated import plan_artefact
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe

SAMPLES = Path(bitalloy.__file__).parent / "samples"


@pytest.mark.parametrize(
    ("name", "schemes"), [("yolo11n-shapes", ()), ("segformer-b0-shapes", ("w8", "int8-dynamic", "w4", "int8"))]
)
def test_predicted_sizes_are_those_of_the_files(name: str, schemes: Sequence[str], tmp_path: Path) -> None:
    graph = load_graph(SAMPLES / f"{name}.onnx")
    units = split(graph, ORT_CPU, find_heads(graph), schemes=schemes)
    recipe = Recipe(units, ORT_CPU, {tensor: (-4.0, 4.0) for tensor in graph.value})
    table = with_sizes(empty_table(units), units, lambda plan: plan_artefact(graph, recipe, plan))
    random = np.random.default_rng(77)
    for share in (0.3, 0.9):
        chosen = {u.id: str(random.choice(u.choices)) for u in units.units if u.choices and random.random() < share}
        plan = Plan(chosen)
        (written,) = plan_artefact(graph, recipe, plan).save(tmp_path / "mixed.onnx")
        predicted = table.float_bytes - saved_bytes(table, plan) + border_bytes(table, units, plan)
        assert predicted == pytest.approx(written.stat().st_size, rel=0.01)
