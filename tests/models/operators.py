"""Small models, of a few kB, around operators that users bring: products on both sides, the operator in the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
Parts = tuple[list[onnx.NodeProto], Mapping[str, Any]]
"""Nodes from the tensor `a` to the tensor `b`, and their constants."""
WIDTH, LENGTH, HIDDEN = 8, 12, 6
SIZE = 10
"""Sides of images."""


def random(*shape: int, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def model(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any], x: Sequence[int], opset: int = 17) -> bytes:
    """The input x and the output y."""
    graph = helper.make_graph(
        list(nodes),
        "operators",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(made.SerializeToString())


def over_time(parts: Parts, channels: int) -> bytes:
    """Conv, Relu, a layer over time (time, batch, channels), Conv."""
    nodes, constants = parts
    return model(
        [
            node("Conv", ["x", "w0", "b0"], ["c0"], name="before", pads=[1, 1]),
            node("Relu", ["c0"], ["r0"], name="relu"),
            node("Transpose", ["r0"], ["a"], name="in", perm=[2, 0, 1]),
            *nodes,
            node("Transpose", ["b"], ["t"], name="out", perm=[1, 2, 0]),
            node("Conv", ["t", "w1"], ["c1"], name="behind", pads=[1, 1]),
            node("Relu", ["c1"], ["r1"], name="relu behind"),
            node("Conv", ["r1", "w2"], ["y"], name="last"),
        ],
        {
            "w0": random(WIDTH, 4, 3),
            "b0": random(WIDTH),
            "w1": random(WIDTH, channels, 3),
            "w2": random(5, WIDTH, 1),
            **constants,
        },
        (1, 4, LENGTH),
    )  # fmt: skip


def on_images(parts: Parts, opset: int = 17) -> bytes:
    """Conv, Relu, something that keeps the shape of an image, Conv."""
    nodes, constants = parts
    return model(
        [
            node("Conv", ["x", "w0", "b0"], ["c0"], name="before", pads=[1] * 4),
            node("Relu", ["c0"], ["a"], name="relu"),
            *nodes,
            node("Conv", ["b", "w1"], ["c1"], name="behind", pads=[1] * 4),
            node("Relu", ["c1"], ["r1"], name="relu behind"),
            node("Conv", ["r1", "w2"], ["y"], name="last"),
        ],
        {
            "w0": random(WIDTH, 3, 3, 3),
            "b0": random(WIDTH),
            "w1": random(WIDTH, WIDTH, 3, 3),
            "w2": random(5, WIDTH, 1, 1),
            **constants,
        },
        (1, 3, SIZE, SIZE),
        opset,
    )  # fmt: skip


def recurrent(op: str, direction: str = "forward", lengths: Sequence[int] | None = None, **attributes: Any) -> bytes:
    """A recurrent layer whose directions are joined as exporters do it."""
    count, gates = 2 if direction == "bidirectional" else 1, {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    constants: dict[str, Any] = {
        "W": random(count, gates * HIDDEN, WIDTH, scale=0.5),
        "R": random(count, gates * HIDDEN, HIDDEN, scale=0.5),
        "B": random(count, 2 * gates * HIDDEN),
        "joined": np.array([LENGTH, 1, count * HIDDEN]),
    }
    inputs = ["a", "W", "R", "B"]
    if lengths is not None:
        constants["lengths"] = np.array(lengths, np.int32)
        inputs.append("lengths")
    return over_time(
        (
            [
                node(op, inputs, ["l"], name="layer", hidden_size=HIDDEN, direction=direction, **attributes),
                node("Transpose", ["l"], ["lt"], name="side by side", perm=[0, 2, 1, 3]),
                node("Reshape", ["lt", "joined"], ["b"], name="join"),
            ],
            constants,
        ),
        count * HIDDEN,
    )


def batch_first(op: str, direction: str = "forward") -> bytes:
    """The model of `recurrent`, written with `layout=1`."""
    made = onnx.load_from_string(recurrent(op, direction))
    nodes = []
    for given in made.graph.node:
        if given.name == "layer":
            given.input[0] = "turned"
            given.attribute.append(helper.make_attribute("layout", 1))
            nodes.append(node("Transpose", ["a"], ["turned"], name="turn", perm=[1, 0, 2]))
        if given.name == "side by side":
            continue
        if given.name == "join":
            given.input[0] = "l"
        nodes.append(given)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return bytes(made.SerializeToString())


def last_state() -> bytes:
    """An LSTM of which only the last state is read, between a Conv and a MatMul."""
    return model(
        [
            node("Conv", ["x", "w0", "b0"], ["c0"], name="before", pads=[1, 1]),
            node("Relu", ["c0"], ["r0"], name="relu"),
            node("Transpose", ["r0"], ["a"], name="in", perm=[2, 0, 1]),
            node("LSTM", ["a", "W", "R"], ["", "h"], name="layer", hidden_size=HIDDEN),
            node("Squeeze", ["h", "zero"], ["s"], name="squeeze"),
            node("MatMul", ["s", "w1"], ["y"], name="behind"),
        ],
        {
            "w0": random(WIDTH, 4, 3), "b0": random(WIDTH), "w1": random(HIDDEN, 5), "zero": np.array([0]),
            "W": random(1, 4 * HIDDEN, WIDTH, scale=0.5), "R": random(1, 4 * HIDDEN, HIDDEN, scale=0.5),
        },
        (1, 4, LENGTH),
    )  # fmt: skip


def mixed_tokens() -> bytes:
    """Products with a constant on the left, over time, and with a matrix of its own for every channel."""
    nodes = [
        node("MatMul", ["wl", "a"], ["l"], name="over time"),
        node("Relu", ["l"], ["m"]),
        node("MatMul", ["m", "wr"], ["n"], name="of each"),
        node("Transpose", ["n"], ["b"], name="back", perm=[1, 0, 2]),
    ]
    constants = {"wl": random(LENGTH, LENGTH), "wr": random(WIDTH, WIDTH, WIDTH)}
    return model(
        [
            node("Conv", ["x", "w0", "b0"], ["c0"], name="before", pads=[1, 1]),
            node("Relu", ["c0"], ["r0"], name="relu"),
            node("Transpose", ["r0"], ["t0"], name="in", perm=[1, 2, 0]),
            node("Mul", ["t0", "spread"], ["a"]),
            *nodes,
            node("Transpose", ["b"], ["t"], name="out", perm=[2, 1, 0]),
            node("Conv", ["t", "w1"], ["c1"], name="behind", pads=[1, 1]),
            node("Relu", ["c1"], ["r1"], name="relu behind"),
            node("Conv", ["r1", "w2"], ["y"], name="last"),
        ],
        {
            "w0": random(WIDTH, 4, 3), "b0": random(WIDTH), "spread": random(1, 1, WIDTH),
            "w1": random(WIDTH, WIDTH, 3), "w2": random(5, WIDTH, 1), **constants,
        },
        (1, 4, LENGTH),
    )  # fmt: skip


def grid_sample(**attributes: Any) -> bytes:
    """Sampled where a Conv of the image itself says."""
    side = np.linspace(-0.9, 0.9, SIZE, dtype=np.float32)
    base = np.stack(np.meshgrid(side, side), -1)[None]
    return on_images(
        (
            [
                node("Conv", ["a", "wo"], ["o"], name="offsets"),
                node("Transpose", ["o"], ["ot"], name="turned", perm=[0, 2, 3, 1]),
                node("Tanh", ["ot"], ["oh"], name="bounded"),
                node("Add", ["oh", "base"], ["g"], name="places"),
                node("GridSample", ["a", "g"], ["b"], name="sample", **attributes),
            ],
            {"wo": random(2, WIDTH, 1, 1, scale=0.05), "base": base},
        )
    )


def deform_conv() -> bytes:
    """A convolution at places that another one moves, with a mask."""
    nodes = [
        node("Conv", ["a", "wo"], ["o"], name="offsets"),
        node("Conv", ["a", "wm"], ["m0"], name="weights"),
        node("Sigmoid", ["m0"], ["m"], name="mask"),
        node("DeformConv", ["a", "wd", "o", "bd", "m"], ["b"], name="deformed", pads=[1] * 4, offset_group=2),
    ]
    constants = {
        "wo": random(36, WIDTH, 1, 1, scale=0.05), "wm": random(18, WIDTH, 1, 1), "bd": random(WIDTH),
        "wd": random(WIDTH, WIDTH, 3, 3),
    }  # fmt: skip
    return on_images((nodes, constants), opset=19)


def branch(op: str) -> onnx.GraphProto:
    return helper.make_graph(
        [node(op, ["a"], [f"{op}_y"])], op, [], [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, None)]
    )


def constant_condition() -> bytes:
    choice = node("If", ["yes"], ["b"], name="choice", then_branch=branch("Sigmoid"), else_branch=branch("Tanh"))
    return on_images(([choice], {"yes": np.array(True)}))


def condition_of_shapes() -> bytes:
    """What is chosen follows from the number of channels."""
    nodes = [
        node("Shape", ["a"], ["s"]),
        node("Gather", ["s", "one"], ["d"], axis=0),
        node("Equal", ["d", "one"], ["c"]),
        node("If", ["c"], ["b"], name="choice", then_branch=branch("Exp"), else_branch=branch("Tanh")),
    ]
    return on_images((nodes, {"one": np.array([1])}))


def condition_of_data() -> bytes:
    """What is chosen follows from the sample."""
    nodes = [
        node("ReduceMean", ["a"], ["m"], keepdims=0),
        node("Greater", ["m", "middle"], ["c"]),
        node("If", ["c"], ["b"], name="choice", then_branch=branch("Tanh"), else_branch=branch("Sigmoid")),
    ]
    return on_images((nodes, {"middle": np.float32(0)}))


def sequence() -> bytes:
    nodes = [
        node("SplitToSequence", ["a", "four"], ["s"], axis=1),
        node("SequenceAt", ["s", "last"], ["s1"]),
        node("Sigmoid", ["s1"], ["g"]),
        node("SequenceErase", ["s", "last"], ["rest"]),
        node("SequenceInsert", ["rest", "g"], ["both"]),
        node("ConcatFromSequence", ["both"], ["b"], axis=1),
    ]
    return on_images((nodes, {"four": np.array(4), "last": np.array(-1)}))


def loop() -> bytes:
    """Three turns of a residual product."""
    inside = helper.make_graph(
        [
            node("MatMul", ["s", "k"], ["m"]),
            node("Tanh", ["m"], ["h"]),
            node("Add", ["s", "h"], ["s1"]),
            node("Identity", ["on"], ["on1"]),
        ],
        "turns",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on1", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s1", TensorProto.FLOAT, None),
        ],
    )
    turns = node("Loop", ["three", "", "a"], ["b"], name="loop", body=inside)
    return over_time(([turns], {"three": np.array(3), "k": random(WIDTH, WIDTH)}), WIDTH)


OPERATORS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "lstm": (lambda: recurrent("LSTM"), "LSTM"),
    "lstm of both directions": (lambda: recurrent("LSTM", "bidirectional"), "LSTM"),
    "lstm of shorter sequences": (lambda: recurrent("LSTM", "bidirectional", lengths=[9]), "LSTM"),
    "lstm, last state": (last_state, "LSTM"),
    "gru of torch": (lambda: recurrent("GRU", "bidirectional", linear_before_reset=1), "GRU"),
    "gru of paddle": (lambda: recurrent("GRU", "reverse", linear_before_reset=0), "GRU"),
    "lstm, batch first": (lambda: batch_first("LSTM", "bidirectional"), "LSTM"),
    "gru, batch first": (lambda: batch_first("GRU"), "GRU"),
    "rnn": (lambda: recurrent("RNN", activations=["Relu"]), "RNN"),
    "constants of all kinds": (mixed_tokens, "MatMul"),
    "grid sample": (lambda: grid_sample(mode="bilinear", padding_mode="zeros", align_corners=1), "GridSample"),
    "grid sample, border": (lambda: grid_sample(mode="bilinear", padding_mode="border"), "GridSample"),
    "grid sample, nearest": (lambda: grid_sample(mode="nearest", padding_mode="reflection"), "GridSample"),
    "deform conv": (deform_conv, "DeformConv"),
    "condition": (constant_condition, "Sigmoid"),
    "condition of shapes": (condition_of_shapes, "Tanh"),
    "condition of data": (condition_of_data, "Where"),
    "sequence": (sequence, "Concat"),
    "loop": (loop, "MatMul"),
}
"""Name -> how to make the model, and an operator that the shipped model has between its products."""

SAME: Mapping[str, Callable[[], bytes]] = {
    "lstm, batch first": lambda: recurrent("LSTM", "bidirectional"),
    "gru, batch first": lambda: recurrent("GRU"),
}
"""Name of a model that ONNX Runtime does not execute -> how to make one of the same numbers that it does."""
