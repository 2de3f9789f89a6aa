"""Scaling between layers: the float network stays as it is, bit by bit, and channels become alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitalloy.model.load import Graph, load_graph
from bitalloy.model.read import constant
from bitalloy.rewrite.equalize import CROSS_LAYER, LARGEST_POWER, NEVER, SMOOTHING, exponents, find_places, scale
from bitalloy.runtime.ort import OrtSession

WIDTH = 8


class Net:
    """A growing graph with badly scaled channels."""

    def __init__(self, seed: int, opset: int = 17) -> None:
        self.random, self.opset = np.random.default_rng(seed), opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"/{name}/{kind}", **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def spread(self, *shape: int) -> str:
        """Normal numbers; those along the first axis differ in size by up to 2^6."""
        sizes = np.exp2(self.random.integers(-3, 4, (shape[0], *[1] * (len(shape) - 1))))
        return self.constant(self.random.standard_normal(shape) * sizes)

    def layer_norm(self, x: str) -> str:
        return self.op("LayerNormalization", x, self.spread(WIDTH), self.spread(WIDTH), axis=-1)

    def rms_norm(self, x: str) -> str:
        mean = self.op("ReduceMean", self.op("Mul", x, x), axes=[-1], keepdims=1)
        return self.op("Mul", self.spread(WIDTH), self.op("Div", x, self.op("Sqrt", mean)))

    def old_norm(self, x: str) -> str:
        """As exports before opset 17 write it: Mul and Add of a vector."""
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1], keepdims=1))
        return self.op("Add", self.op("Mul", centred, self.spread(WIDTH)), self.constant(np.ones((1, WIDTH))))

    def conv(self, x: str, inside: int, outside: int, group: int = 1) -> str:
        return self.op(
            "Conv", x, self.spread(outside, inside // group, 3, 3), self.spread(outside), pads=[1] * 4, group=group
        )

    def gemm(self, x: str, inside: int, outside: int, turned: int) -> str:
        shape = (outside, inside) if turned else (inside, outside)
        return self.op("Gemm", x, self.spread(*shape), self.spread(outside), transB=turned)

    def matmul(self, x: str, inside: int, outside: int) -> str:
        return self.op("MatMul", x, self.constant(self.random.standard_normal((inside, outside))))

    def load(self, path: Path, inputs: Mapping[str, Sequence[int]], outputs: Sequence[str]) -> Graph:
        specs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "net", specs, results, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return load_graph(path)


def feeds_of(graph: Graph, count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [
        {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in graph.info.inputs}  # type: ignore[arg-type]
        for _ in range(count)
    ]


def equalized(graph: Graph) -> tuple[Graph, dict[Any, tuple[int, ...]]]:
    factors = exponents(graph, find_places(graph), feeds_of(graph))
    return scale(graph, factors), factors


def assert_same_function(before: Graph, after: Graph) -> None:
    """Executed as written, so that no fusion changes the order of sums."""
    one, two = (OrtSession(g.to_bytes(), optimize=False) for g in (before, after))
    for sample in feeds_of(before):
        a, b = one.run(sample), two.run(sample)
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-5 * np.abs(a[name]).max())


@settings(max_examples=40)
@given(st.data())
def test_any_chain_computes_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    net = Net(data.draw(st.integers(0, 1000)))
    active = data.draw(st.sampled_from(["Relu", "LeakyRelu", "PRelu", "Sigmoid", "none"]))

    def activation(x: str, sides: int) -> str:
        if active == "PRelu":
            return net.op(active, x, net.constant(np.full((WIDTH, *[1] * sides), 0.2)))
        return x if active == "none" else net.op(active, x)

    expected = 0 if active == "Sigmoid" else 1
    if data.draw(st.booleans()):
        shape: tuple[int, ...] = (1, WIDTH, 6, 6)
        group, next_ = data.draw(st.sampled_from([1, 2, WIDTH])), data.draw(st.sampled_from([1, 4, WIDTH]))
        x = activation(net.conv("x", WIDTH, WIDTH, group), 2)
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]) if data.draw(st.booleans()) else x
        y = net.conv(x, WIDTH, WIDTH, next_)
    elif data.draw(st.booleans()):
        shape = (5, WIDTH)
        turned = data.draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
        y = net.gemm(activation(net.gemm("x", WIDTH, WIDTH, turned[0]), 0), WIDTH, 4, turned[1])
    else:
        shape = (1, 5, WIDTH)
        kind = data.draw(st.sampled_from(["layer_norm", "rms_norm", "old_norm"]))
        normed = getattr(net, kind)("x")
        y, expected = net.op("Concat", *(net.matmul(normed, WIDTH, n) for n in (3, 4)), axis=-1), 1
    graph = net.load(tmp_path_factory.mktemp("chain") / "net.onnx", {"x": shape}, [y])
    before = graph.to_bytes()
    assert len(find_places(graph)) == expected
    after, factors = equalized(graph)
    assert_same_function(graph, after)
    assert graph.to_bytes() == before
    assert [n.name for n in after.nodes] == [n.name for n in graph.nodes]
    assert set(after.model.graph.initializers) == set(graph.model.graph.initializers)
    assert bool(after.rewritten) == bool(factors) and (after.identity != graph.identity) == bool(factors)


def test_factors_are_those_of_the_paper_to_the_nearest_power_of_two(tmp_path: Path) -> None:
    """By hand, from numpy: sqrt(max|X_j| / max|W_j|), the median channel unscaled."""
    net = Net(0)
    y = net.op("MatMul", net.layer_norm("x"), net.spread(WIDTH, 4))
    graph = net.load(tmp_path / "net.onnx", {"x": (1, 5, WIDTH)}, [y])
    _, factors = equalized(graph)
    gain, shift, weight = (np.asarray(constant(graph.value[f"c{i}"])) for i in range(3))
    seen = []
    for sample in feeds_of(graph):
        x = sample["x"].astype(np.float64)
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        seen.append(np.abs(unit * gain + shift).max(axis=(0, 1)))
    exact = 0.5 * np.log2(np.max(seen, axis=0) / np.abs(weight).max(axis=1))
    exact -= np.median(exact)
    ((place, powers),) = factors.items()
    assert place.rule == SMOOTHING and place.tensor == "t0"
    assert np.abs(np.array(powers) - exact).max() <= 0.5 + 1e-4 and any(powers)


def test_a_constant_that_others_read_is_copied(tmp_path: Path) -> None:
    net = Net(1)
    shared = net.spread(WIDTH)
    one = net.op("LayerNormalization", "x", shared, axis=-1)
    two = net.op("LayerNormalization", "z", shared, axis=-1)
    y = net.op("Add", net.matmul(one, WIDTH, WIDTH), two)
    graph = net.load(tmp_path / "net.onnx", {"x": (1, 5, WIDTH), "z": (1, 5, WIDTH)}, [y])
    after, factors = equalized(graph)
    assert len(factors) == 1
    assert_same_function(graph, after)
    assert np.array_equal(constant(after.value[shared]), constant(graph.value[shared]))  # type: ignore[arg-type]


def _read_by_another(net: Net) -> list[str]:
    x = net.layer_norm("x")
    return [net.op("Add", net.matmul(x, WIDTH, WIDTH), x)]


def _leaves(net: Net) -> list[str]:
    x = net.layer_norm("x")
    return [net.matmul(x, WIDTH, 4), x]


def _shared_weights(net: Net) -> list[str]:
    weight = net.spread(WIDTH, WIDTH)
    first = net.op("MatMul", net.layer_norm("x"), weight)
    return [net.op("MatMul", net.op("Sigmoid", first), weight)]


def _second_operand(net: Net) -> list[str]:
    return [net.op("MatMul", net.constant(np.ones((1, 4, 5))), net.layer_norm("x"))]


def _computed_weights(net: Net) -> list[str]:
    return [net.op("MatMul", net.layer_norm("x"), net.op("Transpose", "x", perm=[0, 2, 1]))]


def _scalar(net: Net) -> list[str]:
    return [net.matmul(net.op("Mul", net.op("Sigmoid", "x"), net.constant(np.array([2.0]))), WIDTH, 4)]


def _turned(net: Net) -> list[str]:
    x = net.op("Transpose", net.layer_norm("x"), perm=[0, 2, 1])
    return [net.matmul(x, 5, 4)]


@pytest.mark.parametrize(
    "build",
    [_read_by_another, _leaves, _shared_weights, _second_operand, _computed_weights, _scalar, _turned],
)
def test_what_is_read_otherwise_stays(tmp_path: Path, build: Any) -> None:
    net = Net(2)
    graph = net.load(tmp_path / "net.onnx", {"x": (1, 5, WIDTH)}, build(net))
    assert find_places(graph) == ()


def test_dead_channels_and_axes_as_inputs(tmp_path: Path) -> None:
    """What reads a channel of zeros becomes 0, as what makes one that nothing reads; opset 18 takes axes as input."""
    net = Net(3, opset=18)
    weight = net.random.standard_normal((WIDTH, 4)) * np.exp2(np.arange(WIDTH) - 4)[:, None]
    weight[2] = 0
    gain = np.ones(WIDTH)
    gain[5] = 0
    x = net.op("Mul", "x", net.constant(gain))
    graph = net.load(tmp_path / "net.onnx", {"x": (1, 5, WIDTH)}, [net.op("MatMul", x, net.constant(weight))])
    after, factors = equalized(graph)
    (powers,) = factors.values()
    assert (powers[2], powers[5]) == (NEVER, -NEVER)
    assert_same_function(graph, after)
    made, read = (
        next(a for v in after.value.values() if (a := constant(v)) is not None and a.shape == s)
        for s in ((WIDTH,), (WIDTH, 4))
    )
    assert made[2] == 0 and not read[5].any() and made[3] != 0 and read[3].all()


def test_outputs_that_a_node_leaves_out_are_no_places(tmp_path: Path) -> None:
    net = Net(8)
    weights = [net.spread(1, 4 * WIDTH, WIDTH), net.spread(1, 4 * WIDTH, WIDTH)]
    net.nodes.append(helper.make_node("LSTM", ["x", *weights], ["", "h"], name="lstm", hidden_size=WIDTH))
    graph = net.load(tmp_path / "net.onnx", {"x": (3, 1, WIDTH)}, [net.matmul("h", WIDTH, 4)])
    assert find_places(graph) == ()


def test_channels_become_alike(tmp_path: Path) -> None:
    """The tensor's channels and the weights' rows meet in the middle."""
    net = Net(4)
    hidden = net.op("Relu", net.conv("x", WIDTH, WIDTH))
    graph = net.load(tmp_path / "net.onnx", {"x": (1, WIDTH, 6, 6)}, [net.conv(hidden, WIDTH, 4)])
    after, factors = equalized(graph)
    ((place, _),) = factors.items()
    assert place.rule == CROSS_LAYER

    def sizes(one: Graph) -> np.ndarray:
        model = onnx.load_model_from_string(one.to_bytes())
        model.graph.output.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, None))
        session = OrtSession(model.SerializeToString())
        return np.max([np.abs(session.run(f)[hidden]).max(axis=(0, 2, 3)) for f in feeds_of(one)], axis=0)

    assert np.log2(sizes(after)).std() < 0.75 * np.log2(sizes(graph)).std()


def _batch_norm(net: Net, x: str) -> str:
    variances = net.constant(np.exp2(net.random.integers(-8, 8, WIDTH)))
    return net.op("BatchNormalization", x, net.spread(WIDTH), net.spread(WIDTH), net.spread(WIDTH), variances)


def _instance_norm(net: Net, x: str) -> str:
    return net.op("InstanceNormalization", x, net.spread(WIDTH), net.spread(WIDTH))


def _affine(net: Net, x: str) -> str:
    """As exports write a normalization over the channels of an image."""
    return net.op("Add", net.op("Mul", net.spread(WIDTH, 1, 1), x), net.constant(np.ones((1, WIDTH, 1, 1))))


@pytest.mark.parametrize("active", ["Relu", ""])
@pytest.mark.parametrize("norm", [_batch_norm, _instance_norm, _affine])
def test_normalizations_over_channels_of_images_are_places(tmp_path: Path, norm: Any, active: str) -> None:
    """A Relu ahead of it keeps a BatchNormalization from being folded."""
    net = Net(6)
    x = norm(net, net.op("Relu", net.conv("x", WIDTH, WIDTH)))
    y = net.conv(net.op(active, x) if active else x, WIDTH, 4)
    graph = net.load(tmp_path / "net.onnx", {"x": (1, WIDTH, 6, 6)}, [y])
    (place,) = find_places(graph)
    assert (place.rule, place.axis) == (SMOOTHING, 1)
    after, factors = equalized(graph)
    assert len(set(factors[place])) > 1
    assert_same_function(graph, after)


def _small_channels(tmp_path: Path, weight: np.ndarray, bias: np.ndarray, reader: np.ndarray) -> tuple[int, ...]:
    net = Net(7)
    hidden = net.op("Relu", net.op("Conv", "x", net.constant(weight), net.constant(bias)))
    y = net.op("Conv", hidden, net.constant(reader))
    graph = net.load(tmp_path / "net.onnx", {"x": (1, WIDTH, 6, 6)}, [y])
    after, factors = equalized(graph)
    assert_same_function(graph, after)
    (powers,) = factors.values()
    return powers


def test_channels_that_weights_make_tiny_are_scaled_as_far_as_it_takes(tmp_path: Path) -> None:
    """One that is only small on the samples is not: what no sample showed must not explode."""
    rng = np.random.default_rng(0)
    weight, reader = (np.sign(rng.standard_normal((WIDTH, WIDTH, 1, 1))) for _ in range(2))
    bias = np.zeros(WIDTH)
    weight[2] *= 2.0**-30
    reader[:, 2] *= 2.0**10
    bias[5] = -6.0  # mostly shut, though its weights are as large as any
    reader[:, 5] *= 2.0**24
    powers = _small_channels(tmp_path, weight, bias, reader)
    assert powers[2] == -20 or powers[2] == -19
    assert powers[5] == -LARGEST_POWER and max(map(abs, powers[:2])) <= 1
