"""Scores that a mask makes infinite: which tensors may be so, and what becomes of their units."""

from __future__ import annotations

from collections.abc import Sequence
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
from bitalloy.model.masked import masked_tensors
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import decibel
from bitalloy.targets.placement import rounded

SIZE = 16
KEEP: Node = ("Constant", [], "keep", {"value": numpy_helper.from_array(np.tril(np.ones((SIZE, SIZE))) > 0)})
SHAPE: Node = ("Constant", [], "shape", {"value": numpy_helper.from_array(np.array([1, SIZE, SIZE]))})
SCORES: list[Node] = [KEEP, SHAPE, ("MatMul", ["x", "w"], "q", {}), ("MatMul", ["q", "v"], "s", {})]
MASKED: Node = ("Where", ["keep", "s", "low"], "m", {})
SOFTMAX: Node = ("Softmax", ["m"], "p", {"axis": -1})
END: Node = ("MatMul", ["p", "u"], "y", {})
WEIGHTS: dict[str, Sequence[int] | np.ndarray] = {
    "w": (SIZE, SIZE),
    "v": (SIZE, SIZE),
    "u": (SIZE, SIZE),
    "low": np.array(-np.inf),
    "tri": np.triu(np.full((SIZE, SIZE), -np.inf), 1),
    "zero": np.array(0.0),
    "least": np.array(-2.0),
}


def net(path: Path, nodes: list[Node]) -> Graph:
    return build(path / "m.onnx", nodes, {"x": (SIZE, SIZE)}, ("y", (SIZE, SIZE)), WEIGHTS)


HARMLESS: dict[str, tuple[list[Node], set[str]]] = {
    "Where and Softmax": ([*SCORES, MASKED, SOFTMAX, END], {"m"}),
    "a mask that is added": ([*SCORES, ("Add", ["s", "tri"], "m", {}), SOFTMAX, END], {"m"}),
    "moved on the way": (
        [
            *SCORES,
            MASKED,
            ("Unsqueeze", ["m", "axis"], "n", {}),
            ("Softmax", ["n"], "o", {}),
            ("Squeeze", ["o"], "p", {}),
            END,
        ],
        {"m", "n"},
    ),
    "Max": ([*SCORES, MASKED, ("Max", ["m", "least"], "p", {}), END], {"m"}),
    "a softmax in pieces": (
        [
            *SCORES,
            MASKED,
            ("ReduceMax", ["m"], "top", {"axes": [1]}),
            ("Sub", ["m", "top"], "d", {}),
            ("Exp", ["d"], "e", {}),
            ("ReduceSum", ["e", "one"], "t", {}),
            ("Div", ["e", "t"], "p", {}),
            END,
        ],
        {"m", "d"},
    ),
}
HARMFUL: dict[str, list[Node]] = {
    "a product": [*SCORES, MASKED, ("MatMul", ["m", "u"], "y", {})],
    "another reader": [*SCORES, MASKED, SOFTMAX, ("Mul", ["m", "p"], "y", {})],
    "an output": [*SCORES, ("Where", ["keep", "s", "low"], "y", {})],
}
AXES: list[Node] = [
    ("Constant", [], "axis", {"value": numpy_helper.from_array(np.array([0]))}),
    ("Constant", [], "one", {"value": numpy_helper.from_array(np.array([1]))}),
]


@pytest.mark.parametrize("name", HARMLESS)
def test_infinity_is_harmless_where_operators_end_it(name: str, tmp_path: Path) -> None:
    nodes, expected = HARMLESS[name]
    assert masked_tensors(net(tmp_path, [*AXES, *nodes])) == expected


@pytest.mark.parametrize("name", HARMFUL)
def test_it_is_not_where_anything_else_reads_it(name: str, tmp_path: Path) -> None:
    assert "m" not in masked_tensors(net(tmp_path, HARMFUL[name]))


def analysis_of(tmp_path: Path, nodes: list[Node], target: str) -> Analysis:
    rng = np.random.default_rng(1)
    data = ArrayDataset([{"x": rng.standard_normal((SIZE, SIZE)).astype(np.float32)} for _ in range(12)], label="d")
    settings = bitalloy.Settings(targets=(target,), samples=4, probes=8, calibration_samples=4, range_method="minmax")
    settings = msgspec.structs.replace(settings, equalize=False, bias_correction=False)
    return bitalloy.analyze(net(tmp_path, [*AXES, *nodes]), data, settings)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("name", ["Where and Softmax", "a softmax in pieces"])
def test_models_with_masks_are_planned(name: str, target: str, tmp_path: Path) -> None:
    """What is predicted for all that can be rounded is what the rewritten model does in ONNX Runtime."""
    analysis = analysis_of(tmp_path, HARMLESS[name][0], target)
    (infinite,) = [r for r in analysis.calibration.ranges if r.tensor == "m"]
    assert infinite.infinite and max(abs(infinite.low), abs(infinite.high)) < 100
    near = [u for e in analysis.units.edges if e.root == "m" for u in (e.producer, e.consumer)]
    assert near and all("int8" not in u.allowed for u in analysis.units.units if u.id in near)
    plan = analysis.units.lowest()
    reference, mixed = (analysis.executable(analysis.artefact(p)).session() for p in (Plan(), plan))
    pairs = [(reference.run(f)["y"], mixed.run(f)["y"]) for f in map(analysis.data.feeds, analysis.parts.probe)]
    noise, energy = (
        sum(float(np.square(v).sum()) for v in vs) for vs in ([b - a for a, b in pairs], [a for a, _ in pairs])
    )
    matrix = analysis.matrix
    predicted = float(decibel(matrix.damage(matrix.select(rounded(analysis.units, plan))).mean(axis=0))[0])
    assert predicted < 60 and abs(predicted - float(decibel(np.array(noise / energy)))) < 1.5
