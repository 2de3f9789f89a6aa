"""Programs: the joined graph computes what its parts compute, gradients cross the wires, and it comes apart again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitalloy.adjoint.engine import Tap, build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.errors import ModelError
from bitalloy.core.schemes import Plan
from bitalloy.core.units import Edge
from bitalloy.model.graphs.joining import join
from bitalloy.model.graphs.wiring import GraphProgram, Wire, load_program
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.read import consumers
from bitalloy.model.weights import to_bytes
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.cast import as_specified
from bitalloy.rewrite.divide import divide
from bitalloy.runtime.ort import OrtSession
from bitalloy.targets import TARGETS
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe

node = helper.make_node
Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, list[int | str]],
    outputs: Mapping[str, int],
    constants: Mapping[str, Array],
    opset: int = 17,
) -> Path:
    """Write a float model; `outputs` maps names to ranks."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * r) for n, r in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def encoder(path: Path, last: str = "SiLU") -> Path:
    """Two convolutions; names that the decoder uses too. `last` makes the embeddings."""
    tail = {
        "SiLU": [node("Sigmoid", ["h"], ["s"], name="act/Sigmoid"), node("Mul", ["h", "s"], ["emb"], name="act/Mul")],
        "Softmax": [node("Softmax", ["h"], ["emb"], name="act/Softmax", axis=1)],
        "Conv": [node("Conv", ["h", "w2"], ["emb"], name="last/Conv")],
    }[last]
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], name="conv1/Conv", pads=[1] * 4),
        node("Relu", ["a"], ["r"], name="act1/Relu"),
        node("Conv", ["r", "w1"], ["h"], name="conv2/Conv", pads=[1] * 4, strides=[2, 2]),
        *tail,
        node("GlobalAveragePool", ["emb"], ["pooled"], name="pool"),
    ]
    constants = {
        "w": normal(6, 3, 3, 3, scale=0.4),
        "b": normal(6, seed=1),
        "w1": normal(8, 6, 3, 3, seed=2, scale=0.2),
    }
    if last == "Conv":
        constants["w2"] = normal(8, 8, 1, 1, seed=7, scale=0.4)
    return save(path, nodes, {"x": [1, 3, 12, 12]}, {"emb": 4, "pooled": 4}, constants)


def decoder(path: Path) -> Path:
    """Reads embeddings twice and a prompt; starts with a node that moves data."""
    nodes = [
        node("Transpose", ["image"], ["t"], name="conv1/Transpose", perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "w"], ["a"], name="conv1/MatMul"),
        node("MatMul", ["t", "w1"], ["g"], name="gate/MatMul"),
        node("Sigmoid", ["g"], ["s"], name="gate/Sigmoid"),
        node("Mul", ["a", "s"], ["m"], name="gate/Mul"),
        node("Add", ["m", "x"], ["h"], name="Add"),
        node("MatMul", ["h", "w2"], ["logits"], name="head/MatMul"),
    ]
    constants = {
        "w": normal(8, 8, seed=3, scale=0.4),
        "w1": normal(8, 8, seed=4, scale=0.4),
        "w2": normal(8, 5, seed=5),
    }
    return save(path, nodes, {"image": [1, 8, "rows", "columns"], "x": [1, 1, 1, 8]}, {"logits": 4}, constants)


def folder(path: Path, last: str = "SiLU", **changes: Any) -> Path:
    encoder(path / "encoder.onnx", last)
    decoder(path / "decoder.onnx")
    content = {
        "graphs": {"decoder": "decoder.onnx", "encoder": "encoder.onnx"},
        "wires": ["encoder:emb -> decoder:image"],
        **changes,
    }
    (path / "program.json").write_text(json.dumps(content))
    return path


def run(model: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By ONNX Runtime itself, as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model.read_bytes() if isinstance(model, Path) else to_bytes(model)
    onnx.checker.check_model(data)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def feeds(seed: int = 0) -> tuple[Array, Array]:
    return normal(1, 3, 12, 12, seed=seed + 10), normal(1, 1, 1, 8, seed=seed + 11)


def ranges_of(graph: Graph, samples: list[dict[str, Array]]) -> dict[str, tuple[float, float]]:
    """Extremes of every tensor, seen by running the graph with all tensors as outputs."""
    proto = onnx.load_from_string(graph.to_bytes())
    names = [v for n in graph.nodes for v in (str(o.name) for o in n.outputs)]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    seen = [{**dict(zip(names, session.run(None, s), strict=True)), **s} for s in samples]
    return {n: (min(float(s[n].min()) for s in seen), max(float(s[n].max()) for s in seen)) for n in seen[0]}


def test_joined_equals_parts_by_hand(tmp_path: Path) -> None:
    program = load_program(folder(tmp_path))
    whole = join(program)
    assert whole.input_names == ("decoder/x", "encoder/x")  # both have an x
    assert whole.output_names == ("logits", "pooled")
    assert program.order == ("encoder", "decoder")
    x, prompt = feeds()
    first = run(tmp_path / "encoder.onnx", {"x": x})
    second = run(tmp_path / "decoder.onnx", {"image": first["emb"], "x": prompt})
    found = run(whole.model, {"encoder/x": x, "decoder/x": prompt})
    np.testing.assert_array_equal(found["logits"], second["logits"])
    np.testing.assert_array_equal(found["pooled"], first["pooled"])
    inner = run(join(program, inner=True).model, {"encoder/x": x, "decoder/x": prompt})
    np.testing.assert_array_equal(inner["encoder/emb"], first["emb"])
    assert [h.name for h in find_heads(join(program, inner=True))] == ["logits", "encoder/emb", "pooled"]


def test_the_parts_are_not_changed(tmp_path: Path) -> None:
    program = load_program(folder(tmp_path))
    before = {name: g.to_bytes() for name, g in program.graphs.items()}
    whole = join(program)
    joined = whole.to_bytes()
    divide(whole.model, program)
    assert {name: g.to_bytes() for name, g in program.graphs.items()} == before
    assert whole.to_bytes() == joined
    tensor = program.graphs["decoder"].value["w2"].const_value
    copy = whole.value["decoder/w2"].const_value
    assert tensor is not None and copy is not None
    assert tensor.name == "w2" and copy.name == "decoder/w2"


def test_gradients_cross_the_wire(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = join(load_program(folder(tmp_path)))
    error = normal(1, 6, 12, 12, seed=20)
    tap = Tap("r", (Edge(tensor="encoder/r", node="", slot=0),), lambda p, values: p.const(error))
    adjoint = build(whole, {"logits": "logits"}, [tap], RULES)
    x, prompt = feeds()
    state = OrtSession(adjoint.primal).run({"encoder/x": x, "decoder/x": prompt})
    head = adjoint.heads[0]
    cotangents = normal(3, *head.shape, seed=21)
    fed = {head.cotangent: cotangents, **{r: state[r] for r in head.residuals}}
    found, _ = head.by_tap(OrtSession(head.model).run(fed)[head.output])
    found = found[:, 0]

    weight = {
        f"{name}/{i.name}": torch.from_numpy(numpy_helper.to_array(i).copy())
        for name in ("encoder", "decoder")
        for i in onnx.load(tmp_path / f"{name}.onnx").graph.initializer
    }
    conv = torch.nn.functional.conv2d
    r = conv(torch.from_numpy(x), weight["encoder/w"], weight["encoder/b"], padding=1).relu().requires_grad_()
    t = torch.nn.functional.silu(conv(r, weight["encoder/w1"], padding=1, stride=2)).permute(0, 2, 3, 1)
    gated = t @ weight["decoder/w"] * (t @ weight["decoder/w1"]).sigmoid()
    logits = (gated + torch.from_numpy(prompt)) @ weight["decoder/w2"]
    for row, cotangent in zip(found, cotangents, strict=True):
        (gradient,) = torch.autograd.grad(logits, r, torch.from_numpy(cotangent), retain_graph=True)
        np.testing.assert_allclose(row, float((gradient.numpy() * error).sum()), rtol=1e-4)


def test_divided_as_joined(tmp_path: Path) -> None:
    program = load_program(folder(tmp_path))
    parts = divide(join(program).model, program)
    assert list(parts) == ["decoder", "encoder"]
    for name, part in parts.items():
        original = program.graphs[name]
        assert [n.name for n in part.graph] == [n.name for n in original.nodes]
        assert set(part.graph.initializers) == set(original.model.graph.initializers)
    x, prompt = feeds()
    emb = run(tmp_path / "encoder.onnx", {"x": x})
    assert all(np.array_equal(run(parts["encoder"], {"x": x})[k], v) for k, v in emb.items())
    fed = {"image": emb["emb"], "x": prompt}
    assert np.array_equal(run(parts["decoder"], fed)["logits"], run(tmp_path / "decoder.onnx", fed)["logits"])


@pytest.fixture(scope="module", params=["SiLU", "Softmax", "Conv"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Program, its joined graph with and without inner outputs, and units and ranges on each target."""
    program = load_program(folder(tmp_path_factory.mktemp("program"), request.param))
    cases = {}
    for inner in (False, True):
        whole = join(program, inner=inner)
        samples = [dict(zip(("encoder/x", "decoder/x"), feeds(s), strict=True)) for s in range(3)]
        ranges = ranges_of(whole, samples)
        for target in (TARGETS[t] for t in ("ort-cpu", "tensorrt", "ort-cuda")):
            units = split(whole, target, find_heads(whole)[:1], schemes=["int8"] if target is ORT_CPU else ())
            cases[inner, target.name] = whole, units, ranges, target
    return program, cases


@settings(max_examples=30)
@given(data=st.data())
def test_divided_after_rewriting(rounded: Any, data: st.DataObject) -> None:
    """Whatever units are in INT8 or FP16, the parts in turn give what the rewritten whole gives, bit by bit."""
    program, cases = rounded
    case = data.draw(st.sampled_from(sorted(cases)), label="inner, target")
    whole, units, ranges, target = cases[case]
    kind = data.draw(st.sampled_from(["lowest", "FP16", "encoder", "decoder", "some"]), label="plan")
    plan = Plan()
    for unit in units.units:
        if kind == "some":
            plan = plan.moved(unit.id, data.draw(st.sampled_from(unit.allowed), label=unit.id))
        elif kind == "FP16" and "fp16" in unit.allowed:
            plan = plan.moved(unit.id, "fp16")
        elif kind in ("lowest", unit.id.partition("/")[0]):
            plan = plan.moved(unit.id, unit.allowed[-1])
    mixed = write_plan(whole, Recipe(units, target, ranges), plan)
    before = mixed.to_bytes()
    x, prompt = feeds()
    expected = run(as_specified(mixed.model), {"encoder/x": x, "decoder/x": prompt})
    parts = divide(mixed.model, program)
    first = run(as_specified(parts["encoder"]), {"x": x})
    second = run(as_specified(parts["decoder"]), {"image": first["emb"], "x": prompt})
    np.testing.assert_array_equal(second["logits"], expected["logits"])
    np.testing.assert_array_equal(first["pooled"], expected["pooled"])
    for name, part in parts.items():
        info = program.graphs[name].info
        for specs, values in ((info.inputs, part.graph.inputs), (info.outputs, part.graph.outputs)):
            assert [(s.name, s.dtype, s.shape) for s in specs] == [
                (v.name, v.dtype and v.dtype.name, tuple(v.shape.numpy())) for v in values if v.shape
            ]
        assert {v.dtype for v in (*part.graph.inputs, *part.graph.outputs)} == {ir.DataType.FLOAT}
        made = {n.name: n.outputs[0].dtype for n in part.graph}
        for unit in units.units:  # arithmetic went where the plan put it
            if unit.id.startswith(f"{name}/"):
                half = plan.scheme_of(unit.id) == "fp16"
                assert all((made.get(n.removeprefix(f"{name}/")) == ir.DataType.FLOAT16) == half for n in unit.core)
    stored = {name: {v.dtype.name for v in p.graph.initializers.values() if v.dtype} for name, p in parts.items()}
    for name in parts:  # and rounding
        weighted = [u for u in units.units if plan.scheme_of(u.id) == "int8" and u.weights and u.id.startswith(name)]
        assert ("INT8" in stored[name]) == bool(weighted)
    assert mixed.to_bytes() == before


def test_what_is_made_in_fp16_crosses_a_wire_in_float32(rounded: Any) -> None:
    """Also where both ends are in FP16: each graph has a Cast of its own, and the files fit each other as before."""
    program, cases = rounded
    whole, units, ranges, target = cases[False, "ort-cuda"]
    unit = next(u for u in units.units if u.root == "encoder/emb")
    assert unit.tail == ("decoder/conv1/Transpose",)
    parts = divide(write_plan(whole, Recipe(units, target, ranges), Plan.of("fp16", unit.id)).model, program)
    last = parts["encoder"].graph.outputs[0].producer()
    assert last is not None and last.op_type == "Cast"
    assert last.inputs[0] is not None and last.inputs[0].dtype == ir.DataType.FLOAT16
    assert [use.node.op_type for use in consumers(parts["decoder"].graph.inputs[0])] == ["Cast"]
    x, prompt = feeds()
    emb = run(as_specified(parts["encoder"]), {"x": x})["emb"]
    assert emb.dtype == np.float32 and np.array_equal(emb, emb.astype(np.float16).astype(np.float32))
    assert run(parts["decoder"], {"image": emb, "x": prompt})["logits"].dtype == np.float32


def test_an_int8_producer_rounds_its_output_itself(rounded: Any) -> None:
    """Or the runtime could not run it in INT8; to the consumer nothing changes."""
    program, cases = rounded
    whole, units, ranges, _ = cases[False, "ort-cpu"]
    unit = next(u for u in units.units if u.root == "encoder/emb")
    mixed = write_plan(whole, Recipe(units, ORT_CPU, ranges), Plan.of("int8", unit.id))
    parts = divide(mixed.model, program)
    last = parts["encoder"].graph.outputs[0].producer()
    assert last is not None and last.op_type == "DequantizeLinear"
    levels = np.unique(run(parts["encoder"], {"x": feeds()[0]})["emb"])
    assert len(levels) <= 256


def test_one_output_feeds_several_graphs(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "graphs": {"encoder": "encoder.onnx", "a": "decoder.onnx", "b": "decoder.onnx"},
        "wires": ["encoder:emb -> a:image", "encoder:emb->b:image"],
    }
    program = load_program(folder(tmp_path, **content))
    whole = join(program)
    assert whole.input_names == ("encoder/x", "a/x", "b/x")
    assert whole.output_names == ("pooled", "a/logits", "b/logits")
    x, prompt = feeds()
    found = run(whole.model, {"encoder/x": x, "a/x": prompt, "b/x": 2 * prompt})
    emb = run(tmp_path / "encoder.onnx", {"x": x})["emb"]
    for name, factor in (("a", 1), ("b", 2)):
        expected = run(tmp_path / "decoder.onnx", {"image": emb, "x": np.float32(factor) * prompt})
        np.testing.assert_array_equal(found[f"{name}/logits"], expected["logits"])


def test_open_sizes_come_through_the_wire_or_are_given(tmp_path: Path) -> None:
    program = load_program(folder(tmp_path))
    assert program.graphs["decoder"].info.inputs[0].shape == (1, 8, 6, 6)
    with pytest.raises(
        ModelError, match=r"'decoder:image' was given as \[1, 8, 2, 2\], but its wire brings \[1, 8, 6, 6\]"
    ):
        load_program(tmp_path, shapes={"decoder:image": (1, 8, 2, 2)})
    alone = folder(tmp_path, wires=[])
    with pytest.raises(ModelError, match=r"Graph 'decoder' of .*'image' has symbolic shape"):
        load_program(alone)
    program = load_program(alone, shapes={"decoder:image": (1, 8, 2, 3)})
    assert program.graphs["decoder"].info.outputs[0].shape == (1, 2, 3, 5)
    with pytest.raises(ModelError, match=r"No graph of .* has the inputs .'third:x'."):
        load_program(alone, shapes={"decoder:image": (1, 8, 2, 3), "third:x": (1,)})


IMAGE = "encoder:emb -> decoder:image"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wires": ["third:emb -> decoder:image"]}, "names the graph 'third'; the program has"),
        ({"wires": ["encoder:nothing -> decoder:image"]}, r"graph 'encoder' has no output 'nothing'; it has \['emb'"),
        ({"wires": ["encoder:emb -> decoder:nothing"]}, r"No input called \['nothing'\]"),
        ({"wires": [IMAGE, "encoder:emb -> decoder:x"]}, r"Graph 'decoder'.*fixed to 1 on axis 1, but 8 was given"),
        ({"wires": [IMAGE, IMAGE]}, "2 wires lead to the input 'image'"),
        ({"wires": [IMAGE, "decoder:logits -> encoder:x"]}, "close a cycle: .*encoder.*decoder"),
        ({"wires": ["encoder -> decoder:image"]}, "A wire reads 'graph:output -> graph:input', got 'encoder -> "),
        ({"graphs": {"a/b": "encoder.onnx"}, "wires": []}, "letters, digits"),
        ({"graphs": {"encoder": "../secret.onnx"}, "wires": []}, "leads outside of"),
        ({"graphs": {"encoder": "/etc/passwd"}, "wires": []}, "leads outside of"),
        ({"graphs": {"encoder": "missing.onnx"}, "wires": []}, "Graph 'encoder' of .*No model file"),
        ({"graphs": {}, "wires": []}, "at least one graph"),
        ({"extra": 1}, "is not a program: .*extra"),
        ({"graphs": ["encoder.onnx"]}, "is not a program"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_program(folder(tmp_path, **changes))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "program"
    inside.mkdir()
    encoder(tmp_path / "secret.onnx")
    (inside / "link.onnx").symlink_to(tmp_path / "secret.onnx")
    (inside / "program.json").write_text('{"graphs": {"a": "link.onnx"}}')
    with pytest.raises(ModelError, match="leads outside of"):
        load_program(inside)


def test_no_program_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"No program at .*program.json"):
        load_program(tmp_path)
    (tmp_path / "program.json").write_text("{")
    with pytest.raises(ModelError, match="is not a program"):
        load_program(tmp_path / "program.json")


def test_wires_that_do_not_fit(tmp_path: Path) -> None:
    path = folder(tmp_path)
    graphs = {
        "encoder": load_graph(path / "encoder.onnx"),
        "decoder": load_graph(path / "decoder.onnx", shapes={"image": (1, 8, 2, 2)}),
    }
    with pytest.raises(ModelError, match=r"joins FLOAT \[1, 8, 6, 6\] to FLOAT \[1, 8, 2, 2\]"):
        GraphProgram(graphs, (Wire("encoder", "emb", "decoder", "image"),))
    other = load_graph(save(tmp_path / "o.onnx", [node("Relu", ["x"], ["y"])], {"x": [1, 3]}, {"y": 2}, {}, opset=18))
    with pytest.raises(ModelError, match=r"same opset, got \{'encoder': 17, 'other': 18\}"):
        GraphProgram({"encoder": graphs["encoder"], "other": other}, ())


def test_a_model_of_another_program_is_refused(tmp_path: Path) -> None:
    program = load_program(folder(tmp_path))
    with pytest.raises(ModelError, match="was not made from"):
        divide(program.graphs["encoder"].model, program)
