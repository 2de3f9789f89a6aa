"""Products whose kernel rounds what it reads: the shipped operators against numpy, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.conftest import Network

from bitalloy.core.errors import BitalloyError
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.metadata import KERNEL, TAG
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import conversions, rounded
from bitalloy.targets.recipe import Recipe

BLOCKS = {"w8": (8, 32), "w8-128": (8, 128), "w4-16": (4, 16), "w4": (4, 32), "w4-64": (4, 64), "w4-128": (4, 128)}
SCHEMES = (*BLOCKS, "int8-dynamic")


def network() -> onnx.ModelProto:
    """Four products: with a constant matrix and movers behind it, Gemm in both orders, one that makes the output."""
    net, random = Network(3), np.random.default_rng(3)

    def weight(*shape: int) -> str:
        return net.constant((random.standard_normal(shape) * random.uniform(0.2, 2.0, shape)).astype(np.float32))

    x = net.op("Transpose", net.op("MatMul", "x", weight(200, 96)), perm=[0, 2, 1])
    x = net.op("Tanh", net.op("Transpose", net.op("Reshape", x, net.constant(np.array([1, 96, 5]))), perm=[0, 2, 1]))
    bias = net.constant(random.standard_normal(70).astype(np.float32))
    x = net.op(
        "Relu", net.op("Gemm", net.op("Squeeze", x, net.constant(np.array([0]))), weight(70, 96), bias, transB=1)
    )
    x = net.op("Gemm", x, weight(70, 64))
    return net.model({"x": (1, 5, 200)}, {net.op("MatMul", x, weight(64, 12)): (5, 12)})


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path: Path = tmp_path_factory.mktemp("products") / "net.onnx"
    onnx.save(network(), path)
    return load_graph(path)


@pytest.fixture(scope="module")
def recipe(graph: Graph) -> Recipe:
    units = split(graph, ORT_CPU, find_heads(graph), schemes=(*SCHEMES, "int8"))
    ranges = {str(v.name): (-4.0, 4.0) for v in graph.value.values()}
    return Recipe(units, ORT_CPU, ranges)


@pytest.fixture(scope="module")
def feeds() -> Sequence[np.ndarray]:
    random = np.random.default_rng(8)
    return [(random.standard_normal((1, 5, 200)) * scale).astype(np.float32) for scale in (1.0, 0.1)]


def products(units: UnitGraph) -> list[str]:
    return [u.id for u in units.units if u.weights]


def fake_blocks(w: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Weights (K, N) in steps of their blocks: 8 bits around 0, 4 bits with zero points."""
    found = np.empty(w.shape)
    for start in range(0, len(w), block):
        part = w[start : start + block].astype(np.float64)
        if bits == 8:
            step = np.abs(part).max(axis=0) / 127
            found[start : start + block] = np.rint(part / step) * step
        else:
            low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
            step = (high - low) / 15
            zero = np.rint(-low / step)
            found[start : start + block] = (np.clip(np.rint(part / step) + zero, 0, 15) - zero) * step
    return found


def fake_rows(x: np.ndarray, block: int) -> np.ndarray:
    found = np.empty(x.shape)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block].astype(np.float64)
        step = np.maximum(np.abs(part).max(axis=-1, keepdims=True), 1e-30) / 127
        found[..., start : start + block] = np.rint(part / step) * step
    return found


def fake_tensor(x: np.ndarray) -> np.ndarray:
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step


def multiply(x: np.ndarray, w: np.ndarray, scheme: str) -> np.ndarray:
    if scheme == "int8-dynamic":
        # the scale of a channel leaves room for two neighbouring weights, which kernels without VNNI add in 16 bits
        pairs = np.abs(w[1:]) + np.abs(w[:-1])
        step = np.maximum(np.abs(w).max(axis=0), pairs.max(axis=0) if limited() else 0) / 127
        return fake_tensor(x) @ (np.rint(w / step) * step)
    bits, block = BLOCKS[scheme]
    return fake_rows(x, block) @ fake_blocks(w, bits, block)


def limited() -> bool:
    return ORT_CPU.offered(["int8-dynamic"])[0].scheme.pair_limit is not None


KINDS = ("MatMul", "Gemm across", "Gemm")
DEPTHS = {"MatMul": 200, "Gemm across": 96, "Gemm": 70}


def product(kind: str) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray, tuple[int, ...]]:
    """One product, its matrix (K, N), its bias and the shape of its input."""
    net, random, depth = Network(4), np.random.default_rng(4), DEPTHS[kind]
    w = (random.standard_normal((depth, 48)) * random.uniform(0.2, 2.0, (depth, 48))).astype(np.float32)
    bias = random.standard_normal(48).astype(np.float32)
    match kind:
        case "MatMul":
            y, bias = net.op("MatMul", "x", net.constant(w)), np.zeros(48, np.float32)
        case "Gemm":
            y = net.op("Gemm", "x", net.constant(w), net.constant(bias))
        case _:
            y = net.op("Gemm", "x", net.constant(np.ascontiguousarray(w.T)), net.constant(bias), transB=1)
    shape = (2, 3, depth) if kind == "MatMul" else (6, depth)
    return net.model({"x": shape}, {net.op("Relu", y): (*shape[:-1], 48)}), w, bias, shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_kernel_computes_what_the_definitions_say(tmp_path: Path, scheme: str, kind: str) -> None:
    net, w, bias, shape = product(kind)
    onnx.save(net, tmp_path / "net.onnx")
    graph = load_graph(tmp_path / "net.onnx")
    units = split(graph, ORT_CPU, find_heads(graph), schemes=SCHEMES)
    model = write_plan(graph, Recipe(units, ORT_CPU, {}), Plan.of(scheme, *products(units)))
    onnx.checker.check_model(onnx.load_model_from_string(model.to_bytes()), full_check=True)
    x = (np.random.default_rng(8).standard_normal(shape) * 3).astype(np.float32)
    expected = np.maximum(multiply(x, w, scheme) + bias, 0)
    exact = np.maximum(x @ w + bias, 0)
    for optimize in (True, False):
        (found,) = OrtSession(model.to_bytes(), optimize=optimize).run({"x": x}).values()
        off, lost = np.square(found - expected).sum(), np.square(expected - exact).sum()
        assert off < 1e-5 * lost, (off, lost)


def test_the_operators_and_their_units(graph: Graph, recipe: Recipe) -> None:
    units = products(recipe.units)
    plan = Plan(dict(zip(units, ("w4", "w4-128", "int8-dynamic", "w8"), strict=True)))
    nodes = onnx.load_model_from_string(write_plan(graph, recipe, plan).to_bytes()).graph.node
    packed = [n for n in nodes if n.op_type == "MatMulNBits"]
    sizes = [{a.name: a.i for a in n.attribute} for n in packed]
    assert [(s["K"], s["N"], s["bits"], s["block_size"], s["accuracy_level"]) for s in sizes] == [
        (200, 96, 4, 32, 4),
        (96, 70, 4, 128, 4),
        (64, 12, 8, 32, 4),
    ]
    assert [n.name for n in packed] == [units[0], units[1], units[3]]
    assert len(packed[1].input) == 6 and packed[1].input[5], "the bias is an operand"
    assert len(packed[2].input) == 3, "weights around 0 need no zero points"
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {n.op_type for n in nodes}
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in nodes}
    tags = [{p.key: p.value for p in n.metadata_props} for n in nodes]
    assert all(KERNEL not in t for t in tags)
    assert {t[TAG] for t, n in zip(tags, nodes, strict=True) if n.op_type == "MatMulInteger"} == {units[2]}


def test_a_switched_network_computes_the_same(graph: Graph, recipe: Recipe, feeds: Sequence[np.ndarray]) -> None:
    """Mixed with static INT8 before and behind, which hands on rounded numbers: these are rounded once more.

    And alone, with movers behind the product, whose numbers no kernel rounds.
    """
    units = products(recipe.units)
    board = Switchboard(graph, recipe)
    mixed = [("int8", "w4", "int8", "w8"), ("int8-dynamic", "int8", "w4-128", "int8-dynamic")]
    for schemes in [*mixed, *((scheme, "fp32", "fp32", "fp32") for scheme in SCHEMES)]:
        plan = Plan(dict(zip(units, schemes, strict=True)))
        session = OrtSession(write_plan(graph, recipe, plan).to_bytes(), optimize=False)
        for x in feeds:
            (found,) = session.run({"x": x}).values()
            (switched,) = board.run({"x": x}, board.gates(rounded(recipe.units, plan))).values()
            (float_,) = board.run({"x": x}, board.gates(())).values()
            off, lost = np.square(found - switched).sum(), np.square(float_ - switched).sum()
            assert off < 1e-3 * lost, (schemes, off, lost)


def test_kernels_write_floats(recipe: Recipe) -> None:
    """No conversion stands before or behind them but that of a static neighbour's own result."""
    units = recipe.units
    edge = next(e for e in units.edges if e.producer and e.consumer in products(units))
    for name in SCHEMES:
        scheme, static, plain = (units.scheme(n) for n in (name, "int8", "fp32"))
        assert conversions(edge, plain, scheme) == conversions(edge, scheme, plain) == ()
        assert [(c.source, c.sink) for c in conversions(edge, static, scheme)] == [("int8", "")]
        assert [(c.source, c.sink) for c in conversions(edge, scheme, static)] == [("", "int8")]


def test_what_is_no_product_with_a_constant_matrix_is_refused(case_units: UnitGraph) -> None:
    reasons = {u.kind: u.refused["w4"] for u in case_units.units if "w4" in u.refused}
    assert reasons["Conv"].startswith("only products with a constant matrix") and reasons["Conv"].endswith("not Conv")
    assert not case_units.able("w4") and case_units.able("int8")


@pytest.fixture(scope="module")
def case_units(tmp_path_factory: pytest.TempPathFactory) -> UnitGraph:
    net = Network(1)
    path = tmp_path_factory.mktemp("convolution") / "net.onnx"
    y = net.op("GlobalAveragePool", net.op("Relu", net.conv("x", 3, 8)))
    onnx.save(net.model({"x": (1, 3, 8, 8)}, {y: (1, 8, 1, 1)}), path)
    graph = load_graph(path)
    return split(graph, ORT_CPU, find_heads(graph), schemes=("w4", "int8"))


def test_without_being_asked_plans_do_not_use_them(graph: Graph) -> None:
    units = split(graph, ORT_CPU, find_heads(graph))
    assert [s.name for s in units.schemes] == ["fp32", "int8-dynamic", "int8"]
    with pytest.raises(BitalloyError, match="do not use it unless --schemes names it"):
        write_plan(graph, Recipe(units, ORT_CPU, {}), Plan.of("w4", products(units)[0]))
