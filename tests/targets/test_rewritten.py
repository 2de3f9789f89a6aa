"""What became of every node of a model in ONNX Runtime's own graph, against what its kernels must have taken in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tests.targets.conftest import CASES

from bitalloy.core.audited import Audit
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.measure.audit import audit_kernels, reconcile
from bitalloy.measure.tracing import profile, rewritten_graphs, trace
from bitalloy.model.metadata import TAG
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.ort import ORT
from bitalloy.runtime.steps import once
from bitalloy.targets.ort_cpu import ORT_CPU

FLOATS = {
    "activations": """(float[1,3,16,16] x, float[8,3,3,3] w1, float[8,8,3,3] w2, float[8] w3, float[8] w4)
        => (float[1,8,8,8] y) { c = Conv<pads=[1,1,1,1]>(x, w1)  r = Relu(c)  d = Conv<pads=[1,1,1,1]>(r, w2)
        b = BatchNormalization(d, w3, w3, w3, w4)  s = Sigmoid(b)  m = Mul(b, s)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(m)  y = Neg(p) }""",
    "transformer": """(float[1,5,8] x, float[8,16] w1, float[16] w2, float[16,8] w3, float[8] w4, float[1] wk)
        => (float[1,5,8] y) { m = MatMul(x, w1)  a = Add(m, w2)  g = Gelu(a)  n = MatMul(g, w3)  k = Add(n, x)
        l = LayerNormalization(k, w4, w4)  t = Transpose<perm=[0,2,1]>(l)  q = MatMul(l, t)  y = MatMul(q, l) }""",
    "constants": """(float[4,8] x, float[8] w1, float[8] w2) => (float[4,8] y) {
        c = Exp(w1)  d = Mul(c, w2)  e = Sin(x)  y = Mul(e, d) }""",
    "a pair alone": """(float[4,8] x, float scale, uint8 zero) => (float[4,8] y) {
        e = Sin(x)  q = QuantizeLinear(e, scale, zero)  d = DequantizeLinear(q, scale, zero)  y = Cos(d) }""",
    "a pair behind a move": """(float[4,8] x, float scale, uint8 zero) => (float[8,4] y) {
        e = Sin(x)  t = Transpose(e)  q = QuantizeLinear(t, scale, zero)  d = DequantizeLinear(q, scale, zero)
        y = Cos(d) }""",
}


def look(text: str, folder: Path) -> tuple[Audit, dict[str, tuple[str, ...]]]:
    """Audit of a model with one unit per node, and per unit the operators of the graph that do its work."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> tiny {" ".join(text.split())}')
    generator = np.random.default_rng(0)
    for value in [v for v in model.graph.input if v.name != "x"]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        kind = np.uint8 if value.name == "zero" else np.float32
        array = (np.abs(generator.standard_normal(shape)) / 4).astype(kind)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
        model.graph.input.remove(value)
    for node in model.graph.node:
        node.name = node.output[0]
    loaded = ir.from_proto(model)
    for node in loaded.graph:
        node.metadata_props[TAG] = str(node.name)
    both = (BASELINE, "int8")
    units = UnitGraph(
        target="ort-cpu",
        model_sha256="",
        units=tuple(
            Unit(
                id=n.name, kind=n.op_type, region="", core=(n.name,), tail=(), root=n.name, inner=(), weights=(),
                allowed=both, macs=0,
            )
            for n in model.graph.node
        ),
        edges=(),
        schemes=ORT_CPU.schemes,
    )  # fmt: skip
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    traced = trace(Artefact({ONLY: loaded}), (u.id for u in units.units))
    kernels = profile(traced, once({"x": generator.standard_normal(shape).astype(np.float32)}), folder)
    merged, graphs = reconcile(traced, kernels, rewritten_graphs(traced, folder))
    found = audit_kernels(units, Plan(), merged, "R", "1", graphs=graphs)
    assert all(node.ran for node in graphs[0].nodes) and len(graphs[0].nodes) == len(found.kernels)
    takers = {u.id: tuple(n.op for n in graphs[0].nodes if u.id in n.nodes) for u in units.units}
    return found, takers


def test_activations_run_in_the_kernel_before_them(tmp_path: Path) -> None:
    found, takers = look(FLOATS["activations"], tmp_path)
    same = {"c": "Conv", "r": "Conv", "d": "Conv", "b": "Conv", "s": "QuickGelu", "m": "QuickGelu", "p": "MaxPool"}
    assert takers == {unit: (op,) for unit, op in same.items()} | {"y": ("Neg",)}
    inside = {u.unit: u.cause for u in found.units if u.cause}
    assert inside["d"] == "runs inside Conv of 'b'" and inside["c"] == "runs inside Conv of 'r'"
    assert found.graphs[0].fused() == {"Conv": 2, "QuickGelu": 1}


def test_names_that_the_runtime_makes_up_are_traced_by_tensors(tmp_path: Path) -> None:
    """A kernel called SkipLayerNormalization has a unit, and so has a Transpose that is a flag of a product."""
    found, takers = look(FLOATS["transformer"], tmp_path)
    assert takers["k"] == takers["l"] == ("SkipLayerNormalization",)
    assert takers["t"] == takers["q"] == ("FusedMatMul",)
    assert takers["m"] == takers["a"] and len(takers["m"]) == 1
    normalization = next(k for k in found.kernels if k.op == "SkipLayerNormalization")
    assert normalization.unit == "k"


def test_what_is_folded_says_so(tmp_path: Path) -> None:
    found, takers = look(FLOATS["constants"], tmp_path)
    assert takers == {"c": (), "d": (), "e": ("Sin",), "y": ("Mul",)}
    assert found.graphs[0].folded == ("c", "d")
    assert [bool("folded" in u.cause) for u in found.units] == [True, True, False, False]


def test_a_pair_without_integer_kernels_is_left_unfused(tmp_path: Path) -> None:
    found, takers = look(FLOATS["a pair alone"], tmp_path)
    assert found.graphs[0].unfused == ("q",)
    assert takers["q"] == ("QuantizeLinear",) and takers["d"] == ("DequantizeLinear",)
    assert "1 pairs of QuantizeLinear" in found.graphs[0].sentence()


@pytest.mark.parametrize(
    ("node", "executed"),
    [("Conv(d, w)", "int8"), ("Conv(d, w, wb)", "int8"), ("ConvTranspose(d, w, wb)", BASELINE), ("Relu(d)", "int8")],
)
def test_weights_that_the_runtime_rounds_are_seen(node: str, executed: str, tmp_path: Path) -> None:
    """Also where it reads them as floats again, and no kernel works on integers."""
    text = f"""(float[1,4,8,8] x, float scale, uint8 zero, float[4,4,3,3] w, float[4] wb) => (float[N,C,H,W] y) {{
        q = QuantizeLinear(x, scale, zero)  d = DequantizeLinear(q, scale, zero)  c = {node}
        o = QuantizeLinear(c, scale, zero)  y = DequantizeLinear(o, scale, zero) }}"""
    found, _ = look(text, tmp_path)
    weighted = "w" in node
    assert found.graphs[0].rounded == (("c",) if weighted else ())
    (unit,) = (u for u in found.units if u.unit == "c")
    assert unit.rounded == weighted == (unit in found.differences() and "rounded its weights" in unit.cause)
    assert unit.executed == executed or not weighted
    assert ("1 nodes whose float weights were rounded" in found.graphs[0].sentence()) == weighted


def test_rounding_that_was_moved_does_the_work_of_no_other_node(tmp_path: Path) -> None:
    """The Transpose runs on integers, behind a QuantizeLinear that is named after the Sin which it rounds now."""
    found, takers = look(FLOATS["a pair behind a move"], tmp_path)
    assert takers["e"] == ("Sin",) and takers["t"] == ("Transpose",)
    assert [k.precision for k in found.kernels if k.op == "Transpose"] == ["int8"]


def test_pairs_between_integer_kernels_are_taken_in(rewrite: Callable[..., object], tmp_path: Path) -> None:
    """A kernel reads what the DequantizeLinear before it read, and gives what the QuantizeLinear behind it gave."""
    case = rewrite("ort-cpu", "case1-conv")
    traced = trace(case.artefact, (u.id for u in case.units.units))  # type: ignore[attr-defined]
    _, (graph,) = reconcile(traced, [], rewritten_graphs(traced, tmp_path))
    convolutions = [set(n.nodes) for n in graph.nodes if n.op == "QLinearConv"]
    bias, weight = "/c/Conv/bias_int32/DequantizeLinear", "/{}/Conv/weight_int8/DequantizeLinear"
    assert convolutions == [
        {"x/DequantizeLinear", weight.format("c"), bias, "/c/Conv", "/r/Relu", "r/QuantizeLinear"},
        {"r/DequantizeLinear", weight.format("d"), "/d/Conv", "d/QuantizeLinear"},
    ]
    assert not graph.unfused and not graph.folded and not graph.removed
    assert not any(n.ran for n in graph.nodes)  # no profile was given


@pytest.mark.parametrize("numbered", CASES["ort-cpu"])
def test_every_node_has_a_place(rewrite: Callable[..., object], numbered: str, tmp_path: Path) -> None:
    made = rewrite("ort-cpu", numbered)
    nodes = {str(n.name) for n in made.model.graph}  # type: ignore[attr-defined]
    traced = trace(made.artefact, (u.id for u in made.units.units))  # type: ignore[attr-defined]
    _, (graph,) = reconcile(traced, [], rewritten_graphs(traced, tmp_path))
    assert nodes == {n for node in graph.nodes for n in node.nodes} | {*graph.folded, *graph.removed}


def test_a_graph_that_cannot_be_written_is_no_end(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> t (float[4] x) => (float[4] y) { y = Neg(x) }'
    )
    traced = trace(Artefact({ONLY: ir.from_proto(model)}, runtime=ORT), ())
    _, (graph,) = reconcile(traced, [], rewritten_graphs(traced, tmp_path / "absent"))
    assert "could not write the graph" in graph.unknown and graph.unknown in graph.sentence()
    assert not graph.nodes
