"""Estimates from peak rates: what rows wait for, and the steps of a language model at their own sizes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from tests.conftest import Network
from tests.small_programs import HEADS, WIDTH, write_language

from bitalloy.core.records import Workload
from bitalloy.core.schemes import Plan
from bitalloy.measure.prices import latency_us
from bitalloy.measure.roofline import estimate_costs, ratio_interval
from bitalloy.measure.workload import optimization_profiles, sized_steps, workload_of
from bitalloy.model.graphs.joining import Joined, join
from bitalloy.model.graphs.wiring import load_program
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.model.read import static_shape
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.devices import A10

PROMPT, NEW = 24, 6
ENDLESS = 1e30


def times_of_a_product(folder: Path, name: str, rows: int) -> dict[str, float]:
    """Estimated microseconds of a product with a matrix of 4096 x 4096, by scheme, without the start of the kernel."""
    net = Network(1)
    y = net.op("MatMul", "x", net.constant(np.ones((4096, 4096), np.float32)))
    onnx.save(net.model({"x": (rows, 4096)}, {net.op("Relu", y): (rows, 4096)}), folder / "net.onnx")
    graph, device = load_graph(folder / "net.onnx"), target(name)
    schemes = tuple(o.scheme.name for o in device.runnable)
    units = split(graph, device, find_heads(graph), schemes=schemes)
    row = next(u for u in estimate_costs(graph, units, A10).units if "MatMul" in u.unit)
    return {scheme: us - A10.start_us for scheme, us in row.us.items()}


@pytest.mark.parametrize("name", ["ort-cuda", "tensorrt"])
def test_few_rows_wait_for_weights_and_many_for_arithmetic(tmp_path: Path, name: str) -> None:
    """4 bits and a scale of 16 for each block are read in about a quarter of the time of 16 bits; products are FP16."""
    one, many = (times_of_a_product(tmp_path, name, rows) for rows in (1, 4096))
    assert one["fp16"] == pytest.approx(4096 * 4096 * 2 / A10.bytes_per_second * 1e6, rel=0.01)
    block = {"ort-cuda": 32, "tensorrt": 64}[name]
    assert one["fp16"] / one["w4"] == pytest.approx(16 / (4 + (16 + 4) / block), rel=0.01)
    assert one["fp16"] / one["w4-128"] > one["fp16"] / one["w4"] > 3.4
    assert many["w4"] == many["fp16"] == pytest.approx(2 * 4096**3 / A10.operations_per_second["fp16"] * 1e6, rel=0.01)
    if name == "ort-cuda":
        assert one["w4"] < one["w8"] < one["fp16"] and many["w8"] == many["fp16"]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    folder = write_language(tmp_path_factory.mktemp("language"))
    shapes = {"embedding:before": (1, 2), "embedding:image_features": (1, 4, WIDTH), "embedding:after": (1, 4)}
    cache = {f"decoder:past.{i}.{k}": (1, HEADS, 0, WIDTH // HEADS) for i in range(2) for k in ("key", "value")}
    shapes |= {"decoder:attention_mask": (1, 10), "decoder:position_ids": (1, 10), **cache}
    return join(load_program(folder, shapes=shapes))


def test_steps_have_their_own_sizes(language: Joined) -> None:
    """The head sees every position of a prompt and one of a token; a token's scores reach over the cache and itself."""
    workload = workload_of(language, Workload(prompt=PROMPT, new=NEW))
    prefill, token = sized_steps(language, workload)
    assert (prefill.times, token.times) == (1, NEW)
    head = next(n for n in language.node if "lm_head" in n)
    softmax = next(n for n in language.node if "Softmax" in n)
    vocabulary = static_shape(language.node[head].outputs[0])[-1]
    assert static_shape(prefill.nodes[head].outputs[0]) == (1, PROMPT, vocabulary)
    assert static_shape(token.nodes[head].outputs[0]) == (1, 1, vocabulary)
    assert static_shape(prefill.nodes[softmax].outputs[0]) == (1, HEADS, PROMPT, PROMPT)
    assert static_shape(token.nodes[softmax].outputs[0]) == (1, HEADS, 1, PROMPT + NEW // 2 + 1)
    assert {n.partition("/")[0] for n in token.nodes} == {"decoder"}
    assert {n.partition("/")[0] for n in prefill.nodes} == {"vision", "embedding", "decoder"}
    usual = sized_steps(language, workload_of(language, Workload(prompt=10, new=0)))
    assert len(usual) == 1 and usual[0].nodes is language.node


@pytest.mark.parametrize("name", ["ort-cuda", "tensorrt"])
def test_a_unit_takes_the_sum_over_the_steps(language: Joined, name: str) -> None:
    """With endless bandwidth that of the arithmetic of all tokens, with endless arithmetic that of all reads."""
    device = target(name)
    units = split(language, device, find_heads(language), schemes=("fp16", "w4"))
    answer = workload_of(language, Workload(prompt=PROMPT, new=NEW))
    head = next(u for u in units.units if "lm_head" in u.id)
    vocabulary = static_shape(language.value[head.root])[-1]
    rates = A10.operations_per_second
    fast = msgspec.structs.replace(
        A10, bytes_per_second=ENDLESS, start_us=0.0, operations_per_second=dict.fromkeys(rates, 1e6)
    )
    (row,) = (u for u in estimate_costs(language, units, fast, answer).units if u.unit == head.id)
    assert row.us["fp16"] == pytest.approx(2 * WIDTH * vocabulary * (PROMPT + NEW), rel=1e-6)
    wide = msgspec.structs.replace(
        A10, bytes_per_second=1e6, start_us=0.0, operations_per_second=dict.fromkeys(rates, ENDLESS)
    )
    (row,) = (u for u in estimate_costs(language, units, wide, answer).units if u.unit == head.id)
    moved = [2 * (rows * WIDTH + WIDTH * vocabulary + rows * vocabulary) for rows in (PROMPT, 1)]
    assert row.us["fp16"] == pytest.approx(moved[0] + NEW * moved[1], rel=1e-6)
    vision = next(u.id for u in units.units if u.id.startswith("vision/") and u.kind == "Conv")
    start = msgspec.structs.replace(A10, bytes_per_second=ENDLESS, operations_per_second=dict.fromkeys(rates, ENDLESS))
    found = {u.unit: u.us["fp16"] for u in estimate_costs(language, units, start, answer).units if "fp16" in u.us}
    assert found[vision] == start.start_us and found[head.id] == start.start_us * (1 + NEW)


def test_borders_are_crossed_in_every_step(language: Joined) -> None:
    units = split(language, target("ort-cuda"), find_heads(language), schemes=("fp16",))
    once, again = (
        estimate_costs(language, units, A10, workload_of(language, Workload(prompt=10, new=new))) for new in (0, NEW)
    )
    plain = estimate_costs(language, units, A10)
    assert [b.us for b in once.borders] == [b.us for b in plain.borders] == [A10.start_us] * len(once.borders)
    for few, many in zip(once.borders, again.borders, strict=True):
        assert A10.start_us < many.us <= A10.start_us * (1 + NEW) and many.us_per_element > few.us_per_element


def test_profiles_reach_from_one_position_to_a_prompt_behind_a_full_cache(language: Joined) -> None:
    """A prompt of `PROMPT` positions and `NEW` tokens; what is usual is the token in the middle of the answer."""
    workload = workload_of(language, Workload(prompt=PROMPT, new=NEW))
    found = optimization_profiles(language, language.opened, workload)
    assert set(found) == {"embedding", "decoder"}
    decoder, last, mean = found["decoder"], PROMPT + NEW, PROMPT + NEW // 2
    assert decoder["inputs_embeds"] == ((1, 1, WIDTH), (1, 1, WIDTH), (1, PROMPT, WIDTH))
    assert decoder["attention_mask"] == ((1, 1), (1, mean + 1), (1, PROMPT + last))
    assert decoder["past.0.key"] == tuple((1, HEADS, size, WIDTH // HEADS) for size in (0, mean, last))
    assert found["embedding"]["before"] == ((1, 2),) * 3 and found["embedding"]["after"] == ((1, PROMPT - 6),) * 3


def test_profiles_of_images_hold_all_sizes_that_are_asked_for(tmp_path: Path) -> None:
    """What no other size names stays as in the samples."""
    text = "(float[n,3,h,32] x, float[1] s) => (float[n,3,h,32] y) { y = Mul(x, s) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g {text}'), tmp_path / "open.onnx")
    graph = load_graph(tmp_path / "open.onnx", shapes={"x": (1, 3, 64, 32)})
    others: list[dict[str, tuple[int, ...]]] = [{"x": (4, 3, 64, 32)}, {"x": (1, 3, 96, 32)}]
    found = optimization_profiles(graph, {"model": graph.open_model}, None, others)
    assert found == {"model": {"x": ((1, 3, 64, 32), (1, 3, 64, 32), (4, 3, 96, 32))}}


def test_a_ratio_lies_between_what_a_device_may_do(tmp_path: Path) -> None:
    """Two products that wait for arithmetic: at half their peak lowered ones gain nothing; float is not in doubt."""
    net = Network(1)
    y = "x"
    for _ in range(2):
        y = net.op("MatMul", y, net.constant(np.ones((4096, 4096), np.float32)))
    onnx.save(net.model({"x": (4096, 4096)}, {net.op("Relu", y): (4096, 4096)}), tmp_path / "net.onnx")
    graph, device = load_graph(tmp_path / "net.onnx"), target("tensorrt")
    units = split(graph, device, find_heads(graph))
    half = Plan.of("fp16", *units.able("fp16"))
    assert device.device is not None
    found = ratio_interval(graph, units, device.device, half, Plan())
    table = estimate_costs(graph, units, device.device)
    assert found.value == pytest.approx(latency_us(table, units, half) / table.float_us, rel=1e-3)
    assert found.low <= 0.55 and found.high >= 0.95
    for plan in (half, Plan()):
        same = ratio_interval(graph, units, device.device, plan, plan)
        assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_rounding_apart_costs_a_kernel_that_reads_the_sums(tmp_path: Path) -> None:
    """2 bytes of every sum are read and 1 is written, in a kernel that starts by itself; other schemes pay nothing."""
    net = Network(1)
    y = net.op("Conv", "x", net.constant(np.ones((64, 32, 1, 1), np.float32)))
    onnx.save(net.model({"x": (1, 32, 100, 100)}, {net.op("Relu", y): (1, 64, 100, 100)}), tmp_path / "net.onnx")
    graph, found = load_graph(tmp_path / "net.onnx"), {}
    for name in ("tensorrt", "tensorrt-rtx"):
        device = target(name)
        units = split(graph, device, find_heads(graph))
        costs = estimate_costs(graph, units, A10, rounds_apart=device.rounds_apart)
        found[name] = next(u.us for u in costs.units if "Conv" in u.unit)
    apart = {scheme: us - found["tensorrt"][scheme] for scheme, us in found["tensorrt-rtx"].items()}
    assert apart["int8"] == pytest.approx(A10.start_us + 640_000 * 3 / A10.bytes_per_second * 1e6, abs=2e-3)
    assert apart["fp32"] == apart["fp16"] == 0
