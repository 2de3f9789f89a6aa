"""Weights stored in blocks beside a product in FP16, and units in BF16: what is shipped, executed and predicted."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from tests.conftest import Network, save_feeds
from tests.small_programs import write_language

import bitalloy as api
from bitalloy.core.schemes import Plan
from bitalloy.model.graphs.joining import join
from bitalloy.model.graphs.wiring import load_program
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.model.read import static_shape
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.calibrated import plan_artefact
from bitalloy.rewrite.cast import as_specified
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.ort import AS_WRITTEN
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.recipe import Recipe

STORED = {
    ("ort-cuda", "w8"): (8, 32, False),
    ("ort-cuda", "w4"): (4, 32, True),
    ("ort-cuda", "w4-128"): (4, 128, True),
    ("tensorrt", "w4"): (4, 64, False),
    ("tensorrt", "w4-128"): (4, 128, False),
}
"""Target and scheme -> bits, block, and whether blocks have zero points."""
DEPTH, COLUMNS = 256, 48


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def stored(w: np.ndarray, bits: int, block: int, zeros: bool) -> np.ndarray:
    """Weights (K, N) in steps of their blocks, which are FP16 numbers."""
    found = np.empty(w.shape)
    for start in range(0, len(w), block):
        part = w[start : start + block].astype(np.float64)
        low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
        top = 2 ** (bits - 1) - 1
        step = half((high - low) / 15 if zeros else np.maximum(-low, high) / top)
        if zeros:
            zero = np.rint(-low / ((high - low) / 15))
            found[start : start + block] = (np.clip(np.rint(part / step) + zero, 0, 15) - zero) * step
        else:
            found[start : start + block] = np.clip(np.rint(part / step), -top, top) * step
    return found


def product(path: Path, *, turned: bool) -> tuple[np.ndarray, np.ndarray]:
    """A model of one product with a bias; returns its matrix (K, N) and its bias."""
    net, random = Network(4), np.random.default_rng(4)
    w = (random.standard_normal((DEPTH, COLUMNS)) * random.uniform(0.2, 2.0, (DEPTH, COLUMNS))).astype(np.float32)
    bias = random.standard_normal(COLUMNS).astype(np.float32)
    if turned:
        y = net.op("Gemm", "x", net.constant(np.ascontiguousarray(w.T)), net.constant(bias), transB=1)
    else:
        y = net.op("Add", net.op("MatMul", "x", net.constant(w)), net.constant(bias))
    onnx.save(net.model({"x": (5, DEPTH)}, {net.op("Identity", y): (5, COLUMNS)}), path)
    return w, bias


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("name", "scheme"), STORED)
def test_stored_weights_are_multiplied_in_fp16(tmp_path: Path, name: str, scheme: str, turned: bool) -> None:
    w, bias = product(tmp_path / "net.onnx", turned=turned)
    graph, device = load_graph(tmp_path / "net.onnx"), target(name)
    units = split(graph, device, find_heads(graph), schemes=(scheme,))
    made = write_plan(graph, Recipe(units, device, {}), Plan.of(scheme, *units.able(scheme)))
    shipped = onnx.load_model_from_string(made.to_bytes())
    onnx.checker.check_model(shipped, full_check=True)
    x = np.random.default_rng(8).standard_normal((5, DEPTH)).astype(np.float32)
    (found,) = AS_WRITTEN.open(as_specified(made.model)).run({"x": x}).values()
    products = half(x) @ stored(w, *STORED[name, scheme])
    expected = half(products + half(bias))
    exact = x.astype(np.float64) @ w + bias
    lost = np.square(expected - exact).sum()
    assert np.square(found - expected).sum() < 3e-3 * lost  # sums are rounded to FP16 once or twice
    options = ort.SessionOptions()
    session = ort.InferenceSession(shipped.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (by_itself,) = session.run(None, {"x": x})
    assert np.square(by_itself - expected).sum() < 3e-2 * lost


def test_int4_is_read_in_the_type_of_the_product(tmp_path: Path) -> None:
    """Nothing stands between the weight and the product: TensorRT would write all weights in FP16 there."""
    product(tmp_path / "net.onnx", turned=False)
    graph, device = load_graph(tmp_path / "net.onnx"), target("tensorrt")
    units = split(graph, device, find_heads(graph), schemes=("w4",))
    made = write_plan(graph, Recipe(units, device, {}), Plan.of("w4", *units.able("w4")))
    shipped = onnx.load_model_from_string(made.to_bytes())
    assert shipped.opset_import[0].version == 21
    kept = {i.name: i for i in shipped.graph.initializer}
    (reader,) = (n for n in shipped.graph.node if n.op_type == "DequantizeLinear")
    (multiplied,) = (n for n in shipped.graph.node if n.op_type == "MatMul")
    weight, scale, zero = (kept[name] for name in reader.input)
    assert multiplied.input[1] == reader.output[0]
    assert (weight.data_type, scale.data_type) == (TensorProto.INT4, TensorProto.FLOAT16)
    assert list(scale.dims) == [DEPTH // 64, COLUMNS] and {a.name: a.i for a in reader.attribute}["block_size"] == 64
    assert not any(zero.raw_data) and not any(zero.int32_data)


def test_tiny_weights_keep_a_scale(tmp_path: Path) -> None:
    """A scale of 1e-9 is 0 in FP16, and stands for no number."""
    net = Network(1)
    w = np.full((64, 8), 1e-8, np.float32)
    onnx.save(
        net.model({"x": (2, 64)}, {net.op("Relu", net.op("MatMul", "x", net.constant(w))): (2, 8)}), tmp_path / "n"
    )
    graph, device = load_graph(tmp_path / "n"), target("tensorrt")
    units = split(graph, device, find_heads(graph), schemes=("w4",))
    made = write_plan(graph, Recipe(units, device, {}), Plan.of("w4", *units.able("w4")))
    (reader,) = (n for n in made.model.graph if n.op_type == "DequantizeLinear")
    assert reader.inputs[1].const_value.numpy().min() == np.float16(2.0**-24)  # type: ignore[union-attr]


WIDTH = 512


def language_like(path: Path) -> Path:
    """A feed-forward network with a residual, then numbers that overflow FP16, then a last product."""
    net = Network(6)
    inner = net.op("Relu", net.op("MatMul", "x", net.weight(WIDTH, 2 * WIDTH)))
    x = net.op("Add", "x", net.op("MatMul", inner, net.weight(2 * WIDTH, WIDTH)))
    big = net.op("Mul", x, net.constant(np.full((1,), 3e5, np.float32)))
    small = net.op("Tanh", net.op("Mul", big, net.constant(np.full((1,), 1e-6, np.float32))))
    y = net.op("MatMul", small, net.weight(WIDTH, WIDTH))
    onnx.save(net.model({"x": (8, WIDTH)}, {net.op("Identity", y): (8, WIDTH)}), path)
    return path


@pytest.mark.parametrize(
    ("name", "schemes", "floor"),
    [("tensorrt", ("w4",), 12.0), ("ort-cuda", ("w4", "fp16"), 12.0), ("tensorrt", ("bf16",), 30.0)],
)
def test_what_is_planned_is_predicted_and_executed(
    tmp_path: Path, name: str, schemes: tuple[str, ...], floor: float
) -> None:
    feeds = save_feeds(tmp_path / "feeds", count=24, x=(8, WIDTH))
    settings = api.Settings(
        targets=(name,), samples=8, probes=16, calibration_samples=16, range_method="minmax", schemes=schemes,
        equalize=False, bias_correction=False,
    )  # fmt: skip
    budget = api.Budget(min_sqnr_db=floor)
    found = api.run(
        language_like(tmp_path / "net.onnx"), data=feeds, out=tmp_path / "run", settings=settings, budget=budget
    )
    plan = found.planned.plan.chosen
    assert sum(s == schemes[0] for s in plan.values()) >= 2, plan
    (head,) = found.summary.sqnr_db.values()
    assert head.mixed.predicted is not None and head.mixed.measured is not None
    assert abs(head.mixed.predicted - head.mixed.measured) < 1.5
    shipped = onnx.load(tmp_path / "run/mixed.onnx")
    onnx.checker.check_model(shipped, full_check=True)
    kinds = {i.data_type for i in shipped.graph.initializer} | {a.i for n in shipped.graph.node for a in n.attribute}
    assert (TensorProto.BFLOAT16 in kinds) == (schemes == ("bf16",))


def test_brain_floats_hold_what_halves_do_not(tmp_path: Path) -> None:
    """The numbers of as-specified execution are those of bfloat16, node by node."""
    graph, device = load_graph(language_like(tmp_path / "net.onnx")), target("tensorrt")
    units = split(graph, device, find_heads(graph), schemes=("bf16",))
    made = write_plan(graph, Recipe(units, device, {}), Plan.of("bf16", *units.able("bf16")))
    assert made.model.opset_imports[""] == 22
    x = np.random.default_rng(3).standard_normal((8, WIDTH)).astype(np.float32)
    (found,) = AS_WRITTEN.open(as_specified(made.model)).run({"x": x}).values()
    w = [
        v.const_value.numpy()
        for n in graph.nodes
        if n.op_type == "MatMul"
        for v in n.inputs
        if v is not None and v.const_value is not None
    ]

    def brain(a: np.ndarray) -> np.ndarray:
        return a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)

    a = brain(x)
    hidden = brain(np.maximum(brain(a @ brain(w[0])), 0) @ brain(w[1]))
    big = brain(brain(a + hidden) * brain(np.array(3e5)))
    expected = brain(brain(np.tanh(brain(big * brain(np.array(1e-6))))) @ brain(w[2]))
    assert np.abs(big).max() > 65504
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    assert np.square(found - expected).sum() < 1e-4 * np.square(expected).sum()


def test_a_program_ships_stored_weights_with_open_sizes(tmp_path: Path) -> None:
    """The decoder multiplies by stored weights in FP16 for any number of positions, as the joined model does."""
    folder = write_language(tmp_path / "language")
    shapes = {"embedding:before": (1, 2), "embedding:image_features": (1, 4, 16), "embedding:after": (1, 4)}
    cache = {f"decoder:past.{i}.{k}": (1, 2, 0, 8) for i in range(2) for k in ("key", "value")}
    shapes |= {"decoder:attention_mask": (1, 10), "decoder:position_ids": (1, 10), **cache}
    graph, device = join(load_program(folder, shapes=shapes)), target("ort-cuda")
    units = split(graph, device, find_heads(graph), schemes=("fp16", "w4"))
    down = [u for u in units.able("w4") if "down" in u]
    assert len(down) == 2
    half_units = [u for u in units.able("fp16") if "mlp" in u and u not in down]
    plan = Plan({**dict.fromkeys(half_units, "fp16"), **dict.fromkeys(down, "w4")})
    recipe = Recipe(units, device, {})
    artefact = plan_artefact(graph, recipe, plan)
    decoder = artefact.models["decoder"]
    assert isinstance(decoder, ir.Model)
    assert [n.op_type for n in decoder.graph].count("MatMulNBits") == 2
    assert {v.dtype for n in decoder.graph if n.op_type == "MatMulNBits" for v in n.outputs} == {ir.DataType.FLOAT16}
    onnx.checker.check_model(ir.to_proto(decoder), full_check=True)
    random = np.random.default_rng(2)
    feeds: dict[str, np.ndarray] = {
        str(v.name): np.zeros(static_shape(v), np.int64)
        if v.dtype == ir.DataType.INT64
        else random.standard_normal(static_shape(v)).astype(np.float32)
        for v in graph.model.graph.inputs
    }
    feeds["attention_mask"] = np.ones((1, 10), np.int64)
    feeds["position_ids"] = np.arange(10)[None]
    parts = {name: as_specified(m) for name, m in artefact.models.items() if isinstance(m, ir.Model)}
    whole = AS_WRITTEN.open(as_specified(write_plan(graph, recipe, plan).model)).run(feeds)
    divided = Artefact(parts, artefact.program, AS_WRITTEN).session().run(feeds)
    float_ = AS_WRITTEN.open(graph.model).run(feeds)
    lost = np.square(whole["logits"] - float_["logits"]).sum()
    assert np.square(divided["logits"] - whole["logits"]).sum() < 1e-3 * lost
    longer = {
        "inputs_embeds": random.standard_normal((1, 3, 16)).astype(np.float32),
        "attention_mask": np.ones((1, 8), int),
    }
    longer |= {"position_ids": np.arange(5, 8)[None]}
    longer |= {k.removeprefix("decoder:"): np.zeros((1, 2, 5, 8), np.float32) for k in cache}
    assert AS_WRITTEN.open(parts["decoder"]).run(longer)["logits"].shape[1] == 3
