"""Whole graphs: directional derivatives against central differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from bitalloy.adjoint.engine import Tap, build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.units import Edge
from bitalloy.model import load as graph
from bitalloy.model.read import attribute, constant, static_shape
from bitalloy.runtime.ort import OrtSession

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
YOLO = DATA / "models" / "yolo11n.onnx"
Array = np.ndarray[Any, Any]
node = onnx.helper.make_node


class Net:
    """Writes a small detection-like network with random weights."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        name = f"{op_type}{len(self.nodes)}"
        made = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(node(op_type, inputs, made, name=name, **attributes))
        return made[0] if outputs == 1 else made

    def const(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def conv(self, x: str, channels: int, out: int, kernel: int, stride: int = 1, group: int = 1) -> str:
        w = self.rng.standard_normal((out, channels // group, kernel, kernel)) / np.sqrt(channels // group) / kernel
        b = self.rng.standard_normal(out) * 0.2
        y = self.op("Conv", x, self.const(w.astype(np.float32)), self.const(b.astype(np.float32)), group=group,
                    strides=[stride] * 2, pads=[kernel // 2] * 4)  # fmt: skip
        return str(self.op("Mul", y, self.op("Sigmoid", y)))

    def attention(self, x: str, channels: int, size: int) -> str:
        """One head over size * size positions, with a positional convolution."""
        qkv = self.op("Reshape", self.conv(x, channels, 3 * channels, 1), self.ints(1, 3 * channels, size * size))
        q, k, v = self.op("Split", qkv, self.ints(channels, channels, channels), outputs=3, axis=1)
        scores = self.op("MatMul", self.op("Transpose", q, perm=[0, 2, 1]), k)
        weights = self.op("Softmax", self.op("Mul", scores, self.const(np.float32(channels**-0.5))), axis=-1)
        mixed = self.op("MatMul", v, self.op("Transpose", weights, perm=[0, 2, 1]))
        mixed = self.op("Reshape", mixed, self.ints(1, channels, size, size))
        return str(self.op("Add", mixed, self.conv(x, channels, channels, 3, group=channels)))

    def pyramid(self, x: str) -> str:
        pooled = [x]
        for _ in range(2):
            pooled.append(self.op("MaxPool", pooled[-1], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]))
        return str(self.op("Concat", *pooled, axis=1))

    def detector(self) -> onnx.ModelProto:
        """Input (1, 3, 16, 16), output (1, 6, 80): boxes through an expectation over bins, scores through a sigmoid."""
        p2 = self.conv("x", 3, 8, 3, 2)
        a, b = self.op("Split", p2, self.ints(4, 4), outputs=2, axis=1)
        c2f = self.op("Concat", a, b, self.op("Add", b, self.conv(b, 4, 4, 3)), axis=1)
        p3 = self.pyramid(self.conv(c2f, 12, 8, 3, 2))
        p3 = self.attention(self.conv(p3, 24, 8, 1), 8, 4)
        scales = self.const(np.array([1, 1, 2, 2], np.float32))
        up = self.op("Resize", p3, "", scales, mode="nearest", nearest_mode="floor",
                     coordinate_transformation_mode="asymmetric")  # fmt: skip
        fused = self.conv(self.op("Concat", up, c2f, axis=1), 20, 8, 3)
        heads = []
        for level, size in ((fused, 8), (p3, 4)):
            flat = self.op("Reshape", self.conv(level, 8, 18, 1), self.ints(1, 18, size * size))
            heads.append(flat)
        raw = self.op("Concat", *heads, axis=2)
        box, score = self.op("Split", raw, self.ints(16, 2), outputs=2, axis=1)
        bins = self.op("Softmax", self.op("Reshape", box, self.ints(1, 4, 4, 80)), axis=2)
        expected = self.op("ReduceSum", self.op("Mul", bins, self.const(np.arange(4, dtype=np.float32).reshape(4, 1))),
                           self.ints(2), keepdims=0)  # fmt: skip
        low, high = (
            self.op("Slice", expected, self.ints(i), self.ints(i + 2), self.ints(1), self.ints(1)) for i in (0, 2)
        )
        centre = self.op("Div", self.op("Add", low, high), self.const(np.float32(2)))
        boxes = self.op("Concat", centre, self.op("Sub", high, low), axis=1)
        self.nodes.append(node("Concat", [boxes, self.op("Sigmoid", score)], ["y"], axis=1))
        x = np.zeros((1, 3, 16, 16), np.float32)
        helper = onnx.helper
        made = helper.make_graph(
            self.nodes,
            "detector",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 6, 80))],
            [onnx.numpy_helper.from_array(a, n) for n, a in self.constants.items()],
        )
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    double = onnx.ModelProto()
    double.CopyFrom(model)
    scales = {n.input[2] for n in model.graph.node if n.op_type == "Resize"}  # stay float32 by ONNX
    for tensor in double.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in scales:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in [*double.graph.input, *double.graph.output]:
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return double


@pytest.mark.parametrize("seed", [0, 1])
def test_small_detector(rig: Any, tap: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = Net(seed).detector()
    x, e = rng.standard_normal((2, 1, 3, 16, 16)).astype(np.float32)
    v = rng.standard_normal((3, 1, 6, 80)).astype(np.float32)
    reference: Any = ReferenceEvaluator(in_float64(model))
    step = 1e-5
    (plus,), (minus,) = (reference.run(None, {"x": x.astype(np.float64) + s * e}) for s in (step, -step))
    change = (plus - minus) / (2 * step)
    a = rig.run(rig.load(model), {"x": x}, [tap("x", e, name="x")], {"y": v})["y"]["x"]
    np.testing.assert_allclose(a, (v * change).sum((1, 2, 3)), rtol=1e-3)


def test_small_detector_at_tensors_inside(rig: Any, tap: Any) -> None:
    """The gradient at each tensor inside: perturb it through an input that is added there."""
    rng = np.random.default_rng(3)
    model = Net(3).detector()
    net = rig.load(model)
    x = rng.standard_normal((1, 3, 16, 16)).astype(np.float32)
    v = rng.standard_normal((1, 1, 6, 80)).astype(np.float32)
    tensors = [n.outputs[0] for n in net.nodes if n.op_type in ("Conv", "Mul", "Softmax", "Concat", "Reshape")]
    errors = {str(t.name): rng.standard_normal(static_shape(t)).astype(np.float32) for t in tensors}
    a = rig.run(net, {"x": x}, [tap(n, e, name=n) for n, e in errors.items()], {"y": v})["y"]
    step = 1e-5
    for name, error in list(errors.items())[::3]:
        bent = onnx.ModelProto()
        bent.CopyFrom(in_float64(model))
        for item in bent.graph.node:
            for slot, used in enumerate(item.input):
                item.input[slot] = "bent" if used == name else used
        at = next(i for i, item in enumerate(bent.graph.node) if name in item.output)
        bent.graph.node.insert(at + 1, node("Add", [name, "error"], ["bent"]))
        bent.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("error", 11, error.shape))
        if name == "y":
            bent.graph.output[0].name = "bent"
        reference: Any = ReferenceEvaluator(bent)
        (plus,), (minus,) = (
            reference.run(None, {"x": x.astype(np.float64), "error": s * error.astype(np.float64)})
            for s in (step, -step)
        )
        expected = (v[0] * (plus - minus)).sum() / (2 * step)
        np.testing.assert_allclose(a[name][0], expected, rtol=1e-3, atol=1e-5)


def test_rows_of_a_softmax_that_are_masked_as_a_whole(rig: Any, tap: Any, micro: Any) -> None:
    """Such a row is NaN in the softmax and 0 behind the Where that exporters add; its gradient is 0."""
    x, v = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    mask = np.array([[0, 0, -np.inf], [-np.inf] * 3], np.float32)
    nodes = [
        node("Add", ["x", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["s"]),
        node("IsNaN", ["s"], ["nan"]),
        node("Where", ["nan", "zero", "s"], ["y"]),
    ]
    model = micro(nodes, {"x": x}, {"y": np.float32}, {"mask": mask, "zero": np.float32(0)})
    taps = [tap("x", np.eye(6)[i].reshape(2, 3), name=str(i)) for i in range(6)]
    a = rig.run(rig.load(model), {"x": x}, taps, {"y": v[None]})["y"]
    y = np.exp(x[0, :2]) / np.exp(x[0, :2]).sum()
    expected = [*(y * (v[0, :2] - (y * v[0, :2]).sum())), 0, 0, 0, 0]
    np.testing.assert_allclose([a[str(i)][0] for i in range(6)], expected, rtol=1e-5)


@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_is_taken_apart(rig: Any, tap: Any, micro: Any, grouped: int, causal: int) -> None:
    """Attention of opset 23, after rotary positions, with products of its own in the normal form."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, 3, 4)).astype(np.float32) for h in (2, 2 // grouped, 2 // grouped))
    cos, sin = rng.standard_normal((2, 1, 3, 2)).astype(np.float32)
    nodes = [
        node("RotaryEmbedding", ["q", "cos", "sin"], ["r"], name="rope"),
        node("Attention", ["r", "k", "v"], ["y"], name="attention", is_causal=causal),
    ]
    net = rig.load(micro(nodes, {"q": q, "k": k, "v": v}, {"y": np.float32}, {"cos": cos, "sin": sin}, 23))
    products = [n.name for n in net.nodes if n.op_type == "MatMul"]
    assert len(products) == 2
    assert all(str(n).startswith("attention/") for n in products)
    errors = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in (("q", q), ("k", k), ("v", v))}
    cotangent = rng.standard_normal((1, 1, 2, 3, 4)).astype(np.float32)
    a = rig.run(net, {"q": q, "k": k, "v": v}, [tap(n, e, name=n) for n, e in errors.items()], {"y": cotangent})["y"]
    tensors = [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (q, k, v)]
    c, s = (torch.from_numpy(x.astype(np.float64))[:, None] for x in (cos, sin))
    first, second = tensors[0].split(2, -1)
    turned = torch.cat([first * c - second * s, first * s + second * c], -1)
    y = torch.nn.functional.scaled_dot_product_attention(
        turned, tensors[1], tensors[2], is_causal=bool(causal), enable_gqa=grouped == 2
    )
    gradients = torch.autograd.grad(y, tensors, torch.from_numpy(cotangent[0].astype(np.float64)))
    for (name, error), gradient in zip(errors.items(), gradients, strict=True):
        np.testing.assert_allclose(a[name][0], (gradient.numpy() * error).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not YOLO.is_file(), reason="no real checkpoint beside the repository")
def test_yolo11n() -> None:
    """Directions in the input and in two weights.

    Noise in float32 is about 1e-6 of the output, and max-pooling has kinks: differences at two steps are
    extrapolated, and the cotangent is taken along the change, where the signal is strongest.
    """
    net = graph.load_graph(YOLO)
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 3 * np.pi, 640)
    x = np.stack([0.5 + 0.4 * np.sin(grid + c)[:, None] * np.cos(grid * (c + 1) / 2) for c in range(3)])[None]
    x = (x + rng.uniform(-0.05, 0.05, x.shape)).astype(np.float32)
    bend = np.broadcast_to(np.sin(grid * 2)[:, None], (1, 3, 640, 640)).astype(np.float32)
    convs = [n for n in net.nodes if n.op_type == "Conv"]
    chosen = [convs[3], convs[40]]
    names = [str(c.inputs[1].name) for c in chosen]  # type: ignore[union-attr]
    weights = [np.asarray(constant(c.inputs[1])) for c in chosen]
    deltas = [(w * rng.uniform(-1, 1, w.shape)).astype(np.float32) for w in weights]
    bent = onnx.load_from_string(net.to_bytes())
    for tensor in list(bent.graph.initializer):
        if tensor.name in names:  # the weight becomes an input
            bent.graph.input.add().CopyFrom(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
            bent.graph.initializer.remove(tensor)
    session = OrtSession(bent.SerializeToString())
    base = {"images": x, **dict(zip(names, weights, strict=True))}

    def difference(name: str, direction: Array, step: float) -> Array:
        plus, minus = (session.run({**base, name: base[name] + np.float32(s) * direction})["output0"].astype(np.float64)
                       for s in (step, -step))  # fmt: skip
        return (plus - minus) / (2 * step)

    changes = {
        n: np.mean([difference(n, d, s) for s in (1e-4, 2e-4, 4e-4)], axis=0)
        for n, d in zip(base, [bend, *deltas], strict=True)
    }
    cotangents = np.concatenate([c / np.linalg.norm(c) for c in changes.values()])[:, None].astype(np.float32)

    def weight_tap(i: int) -> Tap:
        conv = chosen[i]
        kept: dict[str, Any] = {k: attribute(conv, k, None) for k in conv.attributes}
        return Tap(names[i], (Edge(tensor=str(conv.outputs[0].name), node="", slot=0),), lambda p, values: p.op(
            "Conv", values[str(conv.inputs[0].name)], p.const(deltas[i]), shape=static_shape(conv.outputs[0]),  # type: ignore[union-attr]
            **kept))  # fmt: skip

    image_tap = Tap("images", (Edge(tensor="images", node="", slot=0),), lambda p, _: p.const(bend))
    adjoint = build(net, {"y": "output0"}, [image_tap, weight_tap(0), weight_tap(1)], RULES)
    (head,) = adjoint.heads
    primal = OrtSession(adjoint.primal).run({"images": x})
    fed = {head.cotangent: cotangents, **{r: primal[r] for r in head.residuals}}
    a, _ = head.by_tap(OrtSession(head.model).run(fed)[head.output])
    for column, name in enumerate(head.taps):
        size = np.linalg.norm(changes[name])
        for row, change in enumerate(changes):
            expected = (cotangents[row].astype(np.float64) * changes[name]).sum()
            assert abs(a[row, column] - expected) < size * (1e-3 if name == change else 4e-3)
