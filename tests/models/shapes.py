"""Small models of kinds that users bring: open, nameless and several sizes, states, integer outputs, last products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Feeds = dict[str, np.ndarray]
Shape = Sequence[int | str | None]


@dataclass(frozen=True)
class SmallModel:
    """A model and what is expected of it."""

    model: onnx.ModelProto
    sizes: Mapping[str, tuple[int, ...]]
    """Input -> shape of the samples."""
    others: Sequence[Mapping[str, tuple[int, ...]]] = ()
    """Other shapes that the shipped model must take."""
    kept_open: bool = False
    """Whether the shipped model has the open sizes of the file."""
    shown: tuple[str, ...] = ()
    """What is compared in place of integer outputs."""
    last_int8: str = ""
    """Unit of the last product, which must be able to run in static INT8."""

    def feeds(self, seed: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Feeds:
        """Draw a sample; all inputs are float32."""
        random = np.random.default_rng(seed)
        return {
            name: random.standard_normal((shapes or {}).get(name, shape)).astype(np.float32)
            for name, shape in self.sizes.items()
        }


@dataclass
class _Body:
    """Nodes and constants of a model that grows."""

    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def weight(self, name: str, *shape: int) -> str:
        """Store random numbers whose products keep the size of what they read."""
        spread = 1 / np.sqrt(math.prod(shape[1:] if len(shape) == 4 else shape[:-1]))
        self.constants[name] = (self._random.standard_normal(shape) * spread).astype(np.float32)
        return name

    def whole(self, name: str, *numbers: int) -> str:
        """Store integers."""
        self.constants[name] = np.array(numbers, np.int64)
        return name

    def op(self, kind: str, inputs: str, output: str, **attributes: Any) -> str:
        """Add a node; names are separated by blanks, and the first output names the node."""
        made = output.split()
        self.nodes.append(helper.make_node(kind, inputs.split(), made, name=f"{made[0]}_node", **attributes))
        return made[0]

    def convolved(self) -> str:
        """Two convolutions over `x` (n, 3, h, w) that make `map` (n, 8, h, w)."""
        self.op("Conv", f"x {self.weight('w0', 8, 3, 3, 3)}", "a", pads=[1] * 4)
        self.op("Relu", "a", "b")
        self.op("Conv", f"b {self.weight('w1', 8, 8, 3, 3)}", "c", pads=[1] * 4)
        return self.op("Relu", "c", "map")

    def model(self, inputs: Mapping[str, Shape], outputs: Mapping[str, tuple[int, Shape | None]]) -> onnx.ModelProto:
        """Write the model."""
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info(n, FLOAT, list(s)) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, t, None if s is None else list(s)) for n, (t, s) in outputs.items()],
            [numpy_helper.from_array(a, n) for n, a in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


IMAGE = {"x": (1, 3, 16, 16)}


def _classifier() -> _Body:
    body = _Body()
    body.op("GlobalAveragePool", body.convolved(), "pooled")
    body.op("Flatten", "pooled", "flat")
    body.op("Gemm", f"flat {body.weight('w2', 8, 6)}", "y")
    return body


def _image(shape: Shape, *others: tuple[int, ...], named: Shape | None = None) -> SmallModel:
    model = _classifier().model({"x": shape}, {"y": (FLOAT, named)})
    return SmallModel(model, IMAGE, [{"x": other} for other in others], kept_open=True)


def minus_one() -> SmallModel:
    """A batch that is written as -1."""
    found = _image([1, 3, 16, 16], (3, 3, 16, 16))
    found.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    return found


def nameless() -> SmallModel:
    """Two open sizes that are both called `?`."""
    return _image([1, 3, "?", "?"], (1, 3, 24, 12), (1, 3, 8, 40))


def named_batch() -> SmallModel:
    """A batch with a name, also on the output."""
    return _image(["N", 3, 16, 16], (2, 3, 16, 16), (5, 3, 16, 16), named=["N", 6])


def tokens() -> SmallModel:
    """Attention over any number of tokens, with shapes that are computed and a scale from them."""
    body, width, heads = _Body(), 16, 4
    body.whole("first", 1)
    for name in ("q", "k", "v"):
        body.op("MatMul", f"x {body.weight(f'w_{name}', width, width)}", f"{name}_flat")
        body.op("Shape", "x", f"{name}_shape")
        body.op("Gather", f"{name}_shape first", f"{name}_count")
        body.op("Concat", f"{body.whole(f'{name}_batch', 1)} {name}_count {body.whole(f'{name}_heads', heads, 4)}",
                f"{name}_target", axis=0)  # fmt: skip
        body.op("Reshape", f"{name}_flat {name}_target", f"{name}_split")
        body.op("Transpose", f"{name}_split", name, perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3])
    body.op("MatMul", "q k", "scores")
    body.op("Softmax", "scores", "weights", axis=-1)
    body.op("MatMul", "weights v", "mixed")
    body.op("Transpose", "mixed", "turned", perm=[0, 2, 1, 3])
    body.op("Reshape", f"turned {body.whole('joined', 0, 0, width)}", "together")
    body.op("MatMul", f"together {body.weight('w_o', width, 8)}", "y")
    model = body.model({"x": [1, "tokens", width]}, {"y": (FLOAT, [1, "tokens", 8])})
    others = [{"x": (1, 20, width)}, {"x": (1, 5, width)}]
    return SmallModel(model, {"x": (1, 12, width)}, others, kept_open=True, last_int8="y_node")


def scaled_products() -> SmallModel:
    """Factors of a Gemm, a bias of one row and a matrix of three dimensions, at an open batch."""
    body = _Body()
    body.op("Gemm", f"x {body.weight('w0', 16, 16)} {body.weight('b0', 1, 16)}", "a", alpha=2.0, beta=0.5)
    body.op("Relu", "a", "b")
    body.op("Unsqueeze", f"b {body.whole('axis', 0)}", "c")
    body.op("MatMul", f"c {body.weight('w1', 1, 16, 16)}", "d")
    body.op("Relu", "d", "e")
    body.op("MatMul", f"e {body.weight('w2', 16, 8)}", "y")
    model = body.model({"x": ["n", 16]}, {"y": (FLOAT, [1, "n", 8])})
    return SmallModel(model, {"x": (4, 16)}, [{"x": (9, 16)}, {"x": (1, 16)}], kept_open=True)


def misnamed() -> SmallModel:
    """Two inputs whose last two dimensions have the same names, by their position, and other sizes."""
    body = _Body()
    body.op("MatMul", f"x {body.weight('w0', 16, 16)}", "a")
    body.op("ReduceMean", "boxes", "mean", axes=[1, 2], keepdims=0)
    body.op("Add", "a mean", "b")
    body.op("Relu", "b", "c")
    body.op("MatMul", f"c {body.weight('w1', 16, 8)}", "y")
    model = body.model({"x": ["batch", "height", "width"], "boxes": ["batch", "height", "width"]}, {"y": (FLOAT, None)})
    others = [{"x": (1, 9, 16), "boxes": (1, 5, 4)}]
    return SmallModel(model, {"x": (1, 6, 16), "boxes": (1, 5, 4)}, others, kept_open=True)


def weight_of_a_shape() -> SmallModel:
    """A matrix that is repeated for every row of the batch: it is stored at one size, and computed at open ones."""
    body = _Body()
    body.op("Shape", "x", "shape")
    body.op("Slice", f"shape {body.whole('zero', 0)} {body.whole('one', 1)}", "batch")
    body.op("Concat", f"batch {body.whole('matrix', 16, 16)}", "target", axis=0)
    body.op("Expand", f"{body.weight('w0', 16, 16)} target", "repeated")
    body.op("MatMul", "x repeated", "a")
    body.op("Relu", "a", "b")
    body.op("MatMul", f"b {body.weight('w1', 16, 8)}", "y")
    return SmallModel(body.model({"x": ["n", 4, 16]}, {"y": (FLOAT, ["n", 4, 8])}), {"x": (1, 4, 16)})


def fixed_batch() -> SmallModel:
    """A batch of 4 that is fixed."""
    return SmallModel(_classifier().model({"x": [4, 3, 16, 16]}, {"y": (FLOAT, [4, 6])}), {"x": (4, 3, 16, 16)})


def state() -> SmallModel:
    """A state of four dimensions with a batch of 2, beside rows of numbers."""
    body = _Body()
    body.op("MatMul", f"x {body.weight('w0', 16, 16)}", "a")
    body.op("Relu", "a", "b")
    body.op("ReduceMean", "state", "mean", axes=[0, 1, 2, 3], keepdims=0)
    body.op("Add", "b mean", "c")
    body.op("MatMul", f"c {body.weight('w1', 16, 8)}", "y")
    model = body.model({"x": [2, 16], "state": [2, 1, 5, 6]}, {"y": (FLOAT, [2, 8])})
    return SmallModel(model, {"x": (2, 16), "state": (2, 1, 5, 6)})


def _integers(kind: int, shape: Shape, shown: str, *nodes: tuple[str, str, str, dict[str, Any]]) -> SmallModel:
    body = _Body()
    body.convolved()
    body.op("Conv", f"map {body.weight('w2', 6, 8, 1, 1)}", "scores")
    body.constants |= {n: np.array(v, np.float32) for n, v in (("half", 0.5), ("zero", 0), ("four", 4))}
    body.whole("five", 5)
    body.whole("last", -1)
    for operator, inputs, output, attributes in nodes:
        body.op(operator, inputs, output, **attributes)
    return SmallModel(body.model({"x": IMAGE["x"]}, {"y": (kind, shape)}), IMAGE, shown=tuple(shown.split()))


MAP = [1, 6, 16, 16]
INTEGERS: Mapping[str, Callable[[], SmallModel]] = {
    "arg_max": lambda: _integers(
        INT64, [1, 16, 16], "soft", ("Softmax", "scores", "soft", {"axis": 1}),
        ("ArgMax", "soft", "y", {"axis": 1, "keepdims": 0}),
    ),
    "arg_min": lambda: _integers(INT64, [1, 1, 16, 16], "scores", ("ArgMin", "scores", "y", {"axis": 1})),
    "label": lambda: _integers(
        INT64, [1, 16, 16, 1], "scores", ("ArgMax", "scores", "index", {"axis": 1, "keepdims": 0}),
        ("Unsqueeze", "index last", "y", {}),
    ),
    "top_k": lambda: _integers(INT64, [1, 5, 16, 16], "values", ("TopK", "scores five", "values y", {"axis": 1})),
    "cast": lambda: _integers(
        INT64, MAP, "scaled", ("Mul", "scores four", "scaled", {}), ("Cast", "scaled", "y", {"to": INT64}),
    ),
    "greater": lambda: _integers(BOOL, MAP, "scores", ("Greater", "scores half", "y", {})),
    "both": lambda: _integers(
        BOOL, MAP, "scores", ("Greater", "scores zero", "above", {}), ("Less", "scores half", "below", {}),
        ("And", "above below", "y", {}),
    ),
    "equal": lambda: _integers(
        BOOL, MAP, "clipped", ("Relu", "scores", "clipped", {}), ("Equal", "clipped zero", "y", {}),
    ),
    "non_zero": lambda: _integers(
        INT64, [4, "n"], "clipped", ("Relu", "scores", "clipped", {}), ("NonZero", "clipped", "y", {}),
    ),
}  # fmt: skip


def boxes() -> SmallModel:
    """Non-maximum suppression whose indices are the only output."""
    body = _Body()
    body.convolved()
    body.op("Conv", f"map {body.weight('w2', 6, 8, 1, 1)}", "head")
    body.op("Reshape", f"head {body.whole('rows', 1, 6, 256)}", "flat")
    body.op("Split", f"flat {body.whole('parts', 4, 2)}", "corners logits", axis=1)
    body.op("Sigmoid", "logits", "scores")
    body.op("Transpose", "corners", "boxes", perm=[0, 2, 1])
    body.whole("most", 5)
    body.constants |= {"overlap": np.array([0.5], np.float32), "least": np.array([0.6], np.float32)}
    body.op("NonMaxSuppression", "boxes scores most overlap least", "y")
    return SmallModel(body.model({"x": IMAGE["x"]}, {"y": (INT64, ["n", 3])}), IMAGE, shown=("boxes", "scores"))


def _selected(shape: Shape, shown: str, *nodes: tuple[str, str, str, dict[str, Any]]) -> SmallModel:
    """Rows, 4 numbers and a score each, of which some are chosen by their scores."""
    body = _Body()
    body.convolved()
    body.op("Conv", f"map {body.weight('w2', 5, 8, 1, 1)}", "head")
    body.op("Reshape", f"head {body.whole('rows', 5, -1)}", "flat")
    body.op("Transpose", "flat", "turned", perm=[1, 0])
    body.op("Split", f"turned {body.whole('parts', 4, 1)}", "boxes logits", axis=1)
    body.op("Sigmoid", "logits", "scored")
    body.op("Squeeze", f"scored {body.whole('one', 1)}", "scores")
    body.constants |= {"least": np.array(0.5, np.float32), "axis": np.array([0], np.int64)}
    body.op("Greater", "scores least", "mask")
    for operator, inputs, output, attributes in nodes:
        body.op(operator, inputs, output, **attributes)
    body.weight("w3", 4, 3)
    used = {name for node in body.nodes for name in node.input}
    body.constants = {name: array for name, array in body.constants.items() if name in used}
    model = body.model({"x": [1, 3, "h", "w"]}, {"y": (FLOAT, shape)})
    return SmallModel(model, IMAGE, [{"x": (1, 3, 12, 24)}], kept_open=True, shown=tuple(shown.split()))


def suppressed() -> SmallModel:
    """The boxes that a suppression keeps, as exports with their post-processing give them."""
    small = boxes()
    nodes = [
        helper.make_node("Gather", ["kept", "two"], ["index"], "index_node", axis=1),
        helper.make_node("Gather", ["boxes", "index"], ["y"], "y_node", axis=1),
    ]
    graph = small.model.graph
    graph.node[-1].name, graph.node[-1].output[0] = "kept_node", "kept"
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array(2), "two"))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, [1, "n", 4]))
    return small


FOUND: Sequence[tuple[str, str, str, dict[str, Any]]] = (
    ("NonZero", "mask", "found", {}),
    ("Squeeze", "found axis", "index", {}),
)
SELECTED: Mapping[str, Callable[[], SmallModel]] = {
    "suppressed": suppressed,
    "found": lambda: _selected(["n", 4], "boxes scores", *FOUND, ("Gather", "boxes index", "y", {"axis": 0})),
    "compressed": lambda: _selected(["n", 4], "boxes scores", ("Compress", "boxes mask", "y", {"axis": 0})),
    "first": lambda: _selected(
        ["n", 4], "boxes scores",
        ("Cast", "mask", "ones", {"to": INT64}), ("ReduceSum", "ones axis", "count", {}),
        ("TopK", "scores count", "values index", {}), ("Gather", "boxes index", "y", {"axis": 0}),
    ),
    "computed_behind": lambda: _selected(
        ["n", 3], "boxes scores", *FOUND, ("Gather", "boxes index", "rows_found", {"axis": 0}),
        ("MatMul", "rows_found w3", "product", {}), ("Relu", "product", "y", {}),
    ),
}  # fmt: skip


def _last(name: str) -> SmallModel:
    body = _Body()
    body.op("MatMul", f"x {body.weight('w0', 16, 16)}", "a")
    body.op("Relu", "a", "b")
    wide = body.weight("w1", 16, 8)
    if name == "Gemm":
        body.op("Gemm", f"b {wide} {body.weight('bias', 8)}", "y")
    elif name == "Transpose":
        body.op("MatMul", f"b {wide}", "m")
        body.op("Transpose", "m", "y", perm=[1, 0])
    else:
        body.op("MatMul", f"b {wide}", "y")
    shape = [8, 4] if name == "Transpose" else [4, 8]
    unit = "m_node" if name == "Transpose" else "y_node"
    return SmallModel(body.model({"x": [4, 16]}, {"y": (FLOAT, shape)}), {"x": (4, 16)}, last_int8=unit)


MODELS: Mapping[str, Callable[[], SmallModel]] = {
    "minus_one": minus_one,
    "nameless": nameless,
    "named_batch": named_batch,
    "tokens": tokens,
    "scaled_products": scaled_products,
    "misnamed": misnamed,
    "weight_of_a_shape": weight_of_a_shape,
    "fixed_batch": fixed_batch,
    "state": state,
    "boxes": boxes,
    **INTEGERS,
    **SELECTED,
    "last_gemm": lambda: _last("Gemm"),
    "last_matmul": lambda: _last("MatMul"),
    "last_transpose": lambda: _last("Transpose"),
}
"""Name -> function that makes the model."""
