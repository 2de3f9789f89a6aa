"""The rewritten model against the definitions in `tests/definition.py` and against ONNX Runtime's own fusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tests.cnn import Case, int8, with_pair_limit
from tests.definition import Simulation, asymmetric, limit_of, orders, pair_sums, per_channel, root

from bitalloy.core.errors import BitalloyError
from bitalloy.core.schemes import Plan
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.metadata import BORDER, TAG
from bitalloy.model.read import constant
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe

LIMITED = with_pair_limit(ORT_CPU, 128)
LIMITS = pytest.mark.parametrize("pair_limit", [128, None])


def rewritten(case: Case, units: Iterable[str], pair_limit: int | None = 128) -> bytes:
    recipe = case.recipe(with_pair_limit(ORT_CPU, pair_limit))
    return write_plan(case.graph, recipe, int8(units)).to_bytes()


def test_nothing_in_int8_is_the_identity(case: Case) -> None:
    before = case.graph.to_bytes()
    y = OrtSession(rewritten(case, ())).run(case.feeds[0])["y"]
    assert np.array_equal(y, OrtSession(before).run(case.feeds[0])["y"])
    assert case.graph.to_bytes() == before


@LIMITS
@settings(max_examples=12)
@given(data=st.data())
def test_any_plan_computes_what_the_definitions_say(
    case: Case, simulation: Simulation, pair_limit: int | None, data: st.DataObject
) -> None:
    """Executed as written, the artefact rounds what the plan names, where and as the specification says."""
    plan = data.draw(st.sets(st.sampled_from(sorted(case.units.able("int8")))))
    outputs = {name: [str(v.name) for v in node.outputs] for name, node in case.graph.node.items()}
    chosen = [u for u in case.units.units if u.id in plan]
    integer = [{*u.core, *u.tail} for u in chosen]
    made = {u.root for u in chosen} | {edge.tensor for u in chosen for edge in u.inner}
    made |= {name for u in chosen for node in u.tail for name in outputs[node]}
    model = rewritten(case, plan, pair_limit)
    for feeds in case.feeds[:2]:
        found = OrtSession(model, optimize=False).run(feeds)["y"]
        np.testing.assert_array_equal(found, simulation.run(feeds, integer, made, pair_limit))


@LIMITS
def test_constants_are_those_of_the_definitions(case: Case, pair_limit: int | None) -> None:
    model = onnx.load_model_from_string(rewritten(case, case.units.able("int8"), pair_limit))
    original = onnx.load_model_from_string(case.graph.to_bytes())
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    floats = {i.name: numpy_helper.to_array(i) for i in original.graph.initializer}
    makers = {name: n for n in model.graph.node for name in n.output}
    entered = {}
    for node in (n for n in model.graph.node if n.op_type == "QuantizeLinear"):
        grid = asymmetric(*case.ranges[root(original, node.input[0])])
        same(values[node.input[1]], grid.scale)
        same(values[node.input[2]], grid.zero)
        entered[node.output[0]] = grid
    layers = {n.name: n for n in original.graph.node if n.op_type == "Conv"}
    for node in (n for n in model.graph.node if n.op_type == "Conv"):
        x, w, *b = (makers[name] for name in node.input)
        weight = floats[layers[node.name].input[1]]
        grid = per_channel(weight, 0, limit_of(node, weight, pair_limit))
        for name, expected in zip(w.input, (grid.integers(weight), grid.scale, grid.zero), strict=True):
            same(values[name], expected)
        for bias in b:
            steps = entered[x.input[0]].scale * grid.scale
            integers = np.rint(floats[layers[node.name].input[2]] / steps.astype(np.float64)).astype(np.int32)
            for name, expected in zip(bias.input, (integers, steps, np.zeros_like(integers)), strict=True):
                same(values[name], expected)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Integers are equal; of floats the last bit depends on the order of a product."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype.kind == "f":
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    else:
        np.testing.assert_array_equal(found, expected, strict=True)


@settings(max_examples=12)
@given(st.data())
def test_any_plan_keeps_the_interface_and_equals_the_switched_network(
    case: Case, board: Switchboard, data: st.DataObject
) -> None:
    """The artefact, executed without fusion, must round exactly the sites that the plan names and no others."""
    plan = data.draw(st.sets(st.sampled_from(sorted(case.units.able("int8")))))
    model = onnx.load_model_from_string(rewritten(case, plan))
    onnx.checker.check_model(model)
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["y"]
    found = OrtSession(model.SerializeToString(), optimize=False).run(case.feeds[0])["y"]
    expected = board.run(case.feeds[0], board.gates(rounded(case.units, int8(plan))))["y"]
    exact = OrtSession(case.graph.to_bytes()).run(case.feeds[0])["y"]
    error = np.square(found - exact).sum()
    # biases are int32 in the artefact and float on the board: a few roundings at half a step fall the other way
    assert np.square(found - expected).sum() <= 0.06 * error + 1e-10 * np.square(exact).sum()


def test_runtime_fuses_all_int8_units_into_integer_kernels(case: Case, tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(rewritten(case, case.units.able("int8")), options, providers=["CPUExecutionProvider"])
    kernels = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kernels.count("QLinearConv") == 5
    assert "Conv" not in kernels and "FusedConv" not in kernels
    assert {"QLinearSigmoid", "QLinearMul", "QLinearAdd", "QLinearConcat"} <= set(kernels)
    assert "Relu" not in kernels


def test_fused_kernels_do_not_saturate(case: Case) -> None:
    """Extreme weights: the fused model must equal the unfused one, which has no 16-bit sums."""
    model = onnx.load(case.path)
    for weight in model.graph.initializer:
        if weight.name == "w1":
            extreme = np.where(numpy_helper.to_array(weight) > 0, 0.4, -0.4).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(extreme, "w1"))
    graph: Graph = case.graph
    changed = graph.clone()
    value = changed.graph.initializers["w1"]
    value.const_value = ir.tensor(
        numpy_helper.to_array(next(w for w in model.graph.initializer if w.name == "w1")), name="w1"
    )
    assert constant(value) is not None
    extreme_graph = Graph(graph.info, changed, graph.source)
    ranges = {**case.ranges, "r1": (0.0, 30.0), "c1": (-30.0, 30.0)}
    recipe = Recipe(case.recipe(LIMITED).units, LIMITED, ranges)
    data = write_plan(extreme_graph, recipe, int8(["/body/cv1/Conv"])).to_bytes()
    fused = OrtSession(data).run(case.feeds[0])["y"]
    plain = OrtSession(data, optimize=False).run(case.feeds[0])["y"]
    exact = OrtSession(extreme_graph.to_bytes()).run(case.feeds[0])["y"]
    assert np.square(fused - plain).sum() < 0.05 * np.square(plain - exact).sum()


def test_quantized_weights_respect_the_pair_limit(case: Case) -> None:
    model = onnx.load_model_from_string(rewritten(case, case.units.able("int8"), 128))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight_int8") and "/dw/" not in tensor.name:
            for rows in orders(numpy_helper.to_array(tensor), 0):
                assert pair_sums(rows).max() <= 128


def test_nodes_carry_their_unit(case: Case) -> None:
    model = write_plan(case.graph, case.recipe(), case.units.lowest()).model
    units = {u.id for u in case.units.units}
    assert all(n.metadata_props.get(TAG) in units | {BORDER} for n in model.graph)


def test_names_of_the_file_may_be_those_that_the_rewriting_would_choose(case: Case, tmp_path: Path) -> None:
    """Renaming tensors changes no number."""
    foreign = {
        "w1": "x/scale",
        "w2": "c0/zero_point",
        "b1": "/body/cv1/Conv/weight_int8",
        "b3": "/body/cv1/Conv/bias_int32",
        "c2": "a0/quantized",
        "m0": "sum/dequantized",
        "up": "/body/cv1/Conv/weight_int8/dequantized",
    }
    model = onnx.load(case.path)
    for node in model.graph.node:
        node.input[:] = [foreign.get(name, name) for name in node.input]
        node.output[:] = [foreign.get(name, name) for name in node.output]
    for weight in model.graph.initializer:
        weight.name = foreign.get(weight.name, weight.name)
    onnx.save(model, tmp_path / "renamed.onnx")
    graph = load_graph(tmp_path / "renamed.onnx")
    units = split(graph, LIMITED, find_heads(graph))
    ranges = {foreign.get(name, name): limits for name, limits in case.ranges.items()}
    found = write_plan(graph, Recipe(units, LIMITED, ranges), units.lowest()).to_bytes()
    expected = rewritten(case, case.units.able("int8"))
    assert np.array_equal(OrtSession(found).run(case.feeds[0])["y"], OrtSession(expected).run(case.feeds[0])["y"])


def test_unknown_and_forbidden_units_are_refused(case: Case) -> None:
    with pytest.raises(BitalloyError, match="does not have"):
        rewritten(case, {"nothing"})
    with pytest.raises(BitalloyError, match="INT8, where it cannot run: joins outputs of different meaning"):
        rewritten(case, {"/head/Concat"})
    with pytest.raises(BitalloyError, match="ort-cpu has no INT4"):
        write_plan(case.graph, case.recipe(), Plan.of("int4", "/stem/conv/Conv"))


@pytest.fixture(scope="module")
def simulation(case: Case) -> Simulation:
    return Simulation(onnx.load_model_from_string(case.graph.to_bytes()), case.ranges)


@pytest.fixture(scope="module")
def board(case: Case) -> Switchboard:
    return Switchboard(case.graph, case.recipe(LIMITED))


@pytest.mark.parametrize("chosen", [(), ("s",), ("p", "s"), ("p",)])
def test_softmax_runs_over_the_last_axis_whether_its_result_is_rounded_or_not(
    chosen: tuple[str, ...], tmp_path: Path
) -> None:
    """Executed as written, the model gives what the same roundings around the Softmax as it was given do."""
    text = '<ir_version: 9, opset_import: ["" : 17]> t (float[1,4,16,9] x) => (float[1,4,16,9] y) {'
    proto = onnx.parser.parse_model(f"{text} a = Sigmoid(x)  b = Softmax<axis=2>(a)  y = Sigmoid(b) }}")
    for node, name in zip(proto.graph.node, "psq", strict=True):
        node.name = name
    onnx.save(proto, tmp_path / "model.onnx")
    graph = load_graph(tmp_path / "model.onnx")
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 4, 16, 9)).astype(np.float32)}
    found = {}
    for target in (ORT_CPU, dataclasses.replace(ORT_CPU, slow_softmax=False)):
        recipe = Recipe(split(graph, target, find_heads(graph)), target, {"x": (-4.0, 4.0), "a": (0, 1), "b": (0, 0.2)})
        model = write_plan(graph, recipe, int8(chosen)).model
        (softmax,) = (node for node in model.graph if node.op_type == "Softmax")
        assert softmax.metadata_props[TAG] == "s"
        assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 2 * len(chosen) - (len(chosen) == 2)
        axis = softmax.attributes["axis"].as_int()
        found[axis] = OrtSession(ir.to_proto(model).SerializeToString(), optimize=False).run(feeds)["y"]
    np.testing.assert_allclose(found[-1], found[2], rtol=0, atol=1e-6)
