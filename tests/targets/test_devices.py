"""Devices that are data: what each makes of a target's schemes and costs, and FP8 on those that have it, end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.conftest import Network, save_feeds

import bitalloy as api
from bitalloy.core.errors import BitalloyError
from bitalloy.core.jobs import Contexts
from bitalloy.core.store import key_of
from bitalloy.core.units import UnitGraph
from bitalloy.measure.roofline import estimate_costs
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.targets import TARGETS, chosen_targets, on_devices, target
from bitalloy.targets.base import split
from bitalloy.targets.devices import A10, DEVICES, find_device
from bitalloy.targets.recipe import Recipe, open_recipe, recipe_opening
from bitalloy.targets.tensorrt import TENSORRT

WITHOUT_FP8 = {"t4", "a100", "a10", "orin"}
GEFORCE = {"rtx-4090", "rtx-5090", "gb10"}
"""Of their architecture sums in FP32 halve the rate of FP16 and FP8."""


@pytest.mark.parametrize("name", DEVICES)
def test_rates_are_those_of_a_device(name: str) -> None:
    """Each scheme is twice as fast as the one above it, FP8 at most as fast as INT8; FP8 from SM89 on."""
    device = DEVICES[name]
    rates = device.operations_per_second
    assert device.id == name and 10e9 < device.bytes_per_second < 1e13
    assert rates["fp16"] / rates["fp32"] == pytest.approx(8 if name == "t4" else 2, rel=0.03)
    assert rates["int8"] / rates["fp16"] == pytest.approx(4 if name in GEFORCE else 2, rel=0.03)
    assert {rates["fp16"]} == {rates[scheme] for scheme in ("bf16", "w4", "w8") if scheme in rates}
    assert ("bf16" in rates) == ("w4" in rates) == (device.capability >= 80)
    assert ("fp8" in rates) == (device.capability >= 89) == (name not in WITHOUT_FP8)
    assert rates.get("fp8", 0) <= rates["int8"]


def test_a_target_is_on_the_device_that_it_has_unless_another_is_asked_for() -> None:
    assert target("tensorrt") is TENSORRT and TENSORRT.device is A10 and target("tensorrt", "a10") == TENSORRT
    assert [s.name for s in TENSORRT.schemes] == ["fp32", "fp16", "bf16", "w8-row", "w4", "w4-128", "int8"]
    assert [s.name for s in target("tensorrt", "L4").schemes] == [
        "fp32",
        "fp16",
        "bf16",
        "w8-row",
        "fp8",
        "w4",
        "w4-128",
        "int8",
    ]
    assert "SM86" in TENSORRT.lacking_schemes["fp8"] and "SM89" in TENSORRT.lacking_schemes["fp8"]
    assert "SM87" in target("tensorrt", "orin").lacking_schemes["fp8"]
    assert not target("tensorrt", "l4").lacking_schemes
    assert [t.name for t in on_devices(TENSORRT).values()] == ["tensorrt"] * len(DEVICES)
    assert not on_devices(TARGETS["ort-cpu"])


def test_a_device_is_for_the_targets_that_are_estimated() -> None:
    first, second = chosen_targets(("ort-cpu", "tensorrt"), "h100")
    assert first is TARGETS["ort-cpu"] and second.device == find_device("h100")
    with pytest.raises(BitalloyError, match=r"--device l4.*'ort-cpu'.*measured.*ort-cuda, tensorrt"):
        chosen_targets(("ort-cpu", "openvino-cpu"), "l4")
    with pytest.raises(BitalloyError, match=r"Unknown device 'l5'.*a10, l4, l40s, rtx-4090, .*b200"):
        chosen_targets(("tensorrt",), "l5")


def network(path: Path) -> Path:
    """Convolutions with a residual, on a tensor of which one channel is far larger than the others, and two Gemms."""
    net = Network(3)
    spread = np.ones((24, 1, 1, 1), np.float32)
    spread[5] = 60
    first = net.op("Mul", net.weight(24, 3, 3, 3), net.constant(spread))
    x = net.op("Relu", net.op("Conv", "images", first, pads=[1] * 4, kernel_shape=[3, 3]))
    shrink = np.ones((1, 24, 1, 1), np.float32)
    shrink[0, 5] = 1 / 60
    second = net.op("Mul", net.weight(24, 24, 3, 3), net.constant(shrink))
    y = net.op("Relu", net.op("Conv", x, second, pads=[1] * 4, kernel_shape=[3, 3]))
    z = net.op("Add", net.conv(net.op("Relu", net.conv(y, 24, 32)), 32, 24), y)
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.conv(z, 24, 32, stride=2)), axis=1)
    onnx.save(net.model({"images": (1, 3, 16, 16)}, {net.op("Identity", net.gemm(pooled, 32, 10)): (1, 10)}), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network(tmp_path_factory.mktemp("outliers") / "outliers.onnx")


@pytest.fixture(scope="module")
def graph(model: Path) -> Graph:
    return load_graph(model)


def units_on(graph: Graph, device: str) -> UnitGraph:
    return split(graph, target("tensorrt", device), find_heads(graph))


def test_costs_are_those_of_the_device(graph: Graph) -> None:
    """Everything in so small a network waits for memory: times without the start are in the ratio of bandwidths."""
    tables = {name: estimate_costs(graph, units_on(graph, name), DEVICES[name]) for name in ("a10", "l4", "b200")}
    start = A10.start_us
    for name, table in tables.items():
        assert table.device == f"{DEVICES[name].name} (estimated from peak rates)"
        for row, base in zip(table.units, tables["a10"].units, strict=True):
            ratio = A10.bytes_per_second / DEVICES[name].bytes_per_second
            assert row.us["fp16"] - start == pytest.approx((base.us["fp16"] - start) * ratio, abs=4e-3)
    assert all(u.us["fp8"] == u.us["int8"] for u in tables["l4"].units if "fp8" in u.us)
    assert not any("fp8" in u.us for u in tables["a10"].units)


def test_a_recipe_is_opened_again_on_its_device(graph: Graph) -> None:
    keys = set()
    for device in ("", "l4", "l40s"):
        recipe = Recipe(units_on(graph, device), target("tensorrt", device), {})
        opening = recipe_opening(recipe)
        assert opening.kind == "recipe" and open_recipe(opening.spec, Contexts()) == recipe
        assert recipe.opset == (19 if device else 13)
        keys.add(key_of(opening))
    assert len(keys) == 3


def sqnr_db(before: Path, after: Path, feeds: list[dict[str, np.ndarray]]) -> float:
    """Of two files, by ONNX Runtime without the package, every node executed by its own kernel."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    first, second = (ort.InferenceSession(p, options, providers=["CPUExecutionProvider"]) for p in (before, after))
    pairs = [(first.run(None, f)[0], second.run(None, f)[0]) for f in feeds]
    noise = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in pairs)
    return 10 * math.log10(sum(float(np.square(a.astype(np.float64)).sum()) for a, _ in pairs) / noise)


def test_fp8_is_planned_predicted_and_executed(model: Path, tmp_path: Path) -> None:
    """Where one channel dwarfs the others, a step of INT8 swallows them, and FP8 keeps them."""
    feeds = save_feeds(tmp_path / "feeds", count=40, images=(1, 3, 16, 16))
    settings = api.Settings(
        targets=("tensorrt",), device="l4", samples=8, probes=16, calibration_samples=16, range_method="minmax",
        equalize=False, bias_correction=False,
    )  # fmt: skip
    found = api.run(model, data=feeds, out=tmp_path / "run", settings=settings, budget=api.Budget(min_sqnr_db=30.0))
    chosen = found.planned.plan.chosen
    assert chosen.scheme_of("/conv4/Conv") == "fp8", chosen
    assert found.summary.device.startswith("NVIDIA L4") and any("NVIDIA L4" in n for n in found.summary.notes)
    shipped = onnx.load(tmp_path / "run/mixed.onnx")
    onnx.checker.check_model(shipped, full_check=True)
    assert shipped.opset_import[0].version == 19
    assert onnx.TensorProto.FLOAT8E4M3FN in {i.data_type for i in shipped.graph.initializer}
    samples = [dict(np.load(f)) for f in sorted(feeds.glob("*.npz"))]
    executed = sqnr_db(model, tmp_path / "run/mixed.onnx", samples)
    (head,) = found.summary.sqnr_db.values()
    assert head.mixed.predicted is not None
    assert abs(head.mixed.predicted - executed) < 1, (head.mixed, executed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "tensorrt", "--keep", "fp8:*Conv"), ("FP8", "SM86", "SM89", "--device l4")),
        (("--keep", "fp8:*Conv"), ("ort-cpu has no FP8", "--target tensorrt")),
        (("--device", "l4"), ("--device l4", "'ort-cpu'", "tensorrt")),
        (("--target", "tensorrt", "--device", "v100"), ("Unknown device 'v100'", "l4")),
    ],
)
def test_what_a_device_lacks_is_said_with_what_can_be_done(
    inside: Any, inputs: Any, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused = inside.run(inputs.classifier, "--data", inputs.images, *options).refused()
    assert all(word in refused for word in words), refused


def test_devices_are_listed(inside: Any) -> None:
    assert "l4" in inside("targets").succeeded().out
