"""A small convolutional network with every pattern that the ort-cpu target knows, and random samples for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitalloy.core.records import Head
from bitalloy.core.schemes import Granularity, Plan
from bitalloy.core.units import Offset, UnitGraph
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.runtime.ort import OrtSession
from bitalloy.targets.base import Target, split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """A model, its units, ranges that cover the samples, and the samples."""

    path: Path
    graph: Graph
    heads: tuple[Head, ...]
    units: UnitGraph
    ranges: Mapping[str, tuple[float, float]]
    feeds: list[dict[str, np.ndarray]]

    def recipe(self, device: Target = ORT_CPU, offsets: Mapping[str, Offset] | None = None) -> Recipe:
        """How a variant of the target rounds the model."""
        return Recipe(msgspec.structs.replace(self.units, schemes=device.schemes), device, self.ranges, offsets or {})


def with_pair_limit(device: Target, limit: int | None) -> Target:
    """A target on a processor whose INT8 kernels have another limit."""
    offers = (
        replace(offer, scheme=msgspec.structs.replace(offer.scheme, pair_limit=limit))
        if offer.scheme.weight == "int8" and offer.scheme.granularity is Granularity.CHANNEL
        else offer
        for offer in device.offers
    )
    return replace(device, offers=tuple(offers))


def int8(units: Iterable[str]) -> Plan:
    """The plan with some units in INT8 and all others as they are."""
    return Plan.of("int8", *units)


def build_cnn(path: Path, seed: int = 0) -> None:
    """Conv-SiLU, Conv-Relu, residual Add, Split, MaxPool, Concat, Resize, grouped Conv, Gemm, two heads joined."""
    rng = np.random.default_rng(seed)
    weights = {
        "w0": rng.standard_normal((8, 3, 3, 3)) * 0.3,
        "b0": rng.standard_normal(8) * 0.1,
        "w1": rng.standard_normal((8, 8, 3, 3)) * 0.15,
        "b1": rng.standard_normal(8) * 0.1,
        "w2": rng.standard_normal((8, 1, 3, 3)) * 0.4,
        "w3": rng.standard_normal((4, 16, 1, 1)) * 0.3,
        "b3": rng.standard_normal(4) * 0.1,
        "w4": rng.standard_normal((6, 16, 1, 1)) * 0.3,
    }
    inits = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    inits.append(numpy_helper.from_array(np.array([4, 4], np.int64), "parts"))
    inits.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    for name, shape in (("flat4", [1, 4, -1]), ("flat6", [1, 6, -1])):
        inits.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    inits.append(numpy_helper.from_array(np.array(40.0, np.float32), "forty"))
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="/stem/conv/Conv", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Sigmoid", ["c0"], ["s0"], name="/stem/act/Sigmoid"),
        helper.make_node("Mul", ["c0", "s0"], ["a0"], name="/stem/act/Mul"),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], name="/body/cv1/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="/body/cv1/Relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="/body/dw/Conv", pads=[1] * 4, group=8),
        helper.make_node("Add", ["a0", "c2"], ["sum"], name="/body/Add"),
        helper.make_node("Split", ["sum", "parts"], ["p0", "p1"], name="/body/Split", axis=1),
        helper.make_node("MaxPool", ["p0"], ["m0"], name="/neck/MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["m0", "", "scales"], ["up"], name="/neck/Resize", mode="nearest"),
        helper.make_node("Concat", ["up", "p1", "r1"], ["cat"], name="/neck/Concat", axis=1),
        helper.make_node("Conv", ["cat", "w3", "b3"], ["boxes0"], name="/head/box/Conv"),
        helper.make_node("Reshape", ["boxes0", "flat4"], ["boxes1"], name="/head/box/Reshape"),
        helper.make_node("Mul", ["boxes1", "forty"], ["boxes"], name="/head/box/Mul"),
        helper.make_node("Conv", ["cat", "w4"], ["logits0"], name="/head/cls/Conv"),
        helper.make_node("Reshape", ["logits0", "flat6"], ["logits"], name="/head/cls/Reshape"),
        helper.make_node("Sigmoid", ["logits"], ["scores"], name="/head/cls/Sigmoid"),
        helper.make_node("Concat", ["boxes", "scores"], ["y"], name="/head/Concat", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10, 256])],
        initializer=inits,
    )
    # the joined Concat reads 16 + 4 + 4 channels
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


def tensors_of(units: UnitGraph) -> list[str]:
    """Tensors that may be rounded."""
    return sorted({e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner})


def observed(path: Path) -> Case:
    """The small network, written to a path, with ranges observed by running it."""
    build_cnn(path)
    graph = load_graph(path)
    heads = find_heads(graph)
    units = split(graph, ORT_CPU, heads)
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(8)]
    probe = onnx.load(path)
    names = [t for t in tensors_of(units) if t not in ("x", "y")]
    probe.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = OrtSession(probe.SerializeToString())
    seen = [{**session.run(f), **f} for f in feeds]
    ranges = {
        t: (min(float(s[t].min()) for s in seen), max(float(s[t].max()) for s in seen)) for t in tensors_of(units)
    }
    return Case(path, graph, heads, units, ranges, feeds)
