"""Recurrent operators whose tensors have the batch first (`layout=1`), which ONNX Runtime does not execute.

They are the same operators with the time first, between Transposes: of the sequence (batch, time, inputs), of first and
last states (batch, directions, hidden), and of all states (batch, time, directions, hidden).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import helper

from bitalloy import ops

_SEQUENCE, _FIRST_HIDDEN, _FIRST_CELL = 0, 5, 6
"""Inputs that have a batch; the last one of an LSTM alone."""
_STATES = 0
"""Output with the states at all times; the others are last states."""


def has_batch_first(proto: onnx.ModelProto) -> bool:
    """Return whether a recurrent operator of a file has the batch first."""
    return any(_is_batch_first(node) for node in proto.graph.node)


def time_first(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the time first in all recurrent operators."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    nodes = [part for node in proto.graph.node for part in (_turned(node, taken) if _is_batch_first(node) else [node])]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def _is_batch_first(node: onnx.NodeProto) -> bool:
    return node.op_type in ops.RECURRENT and any(a.name == "layout" and a.i for a in node.attribute)


def _turned(node: onnx.NodeProto, taken: Collection[str]) -> Iterator[onnx.NodeProto]:
    """Yield the Transposes of what a node reads, the node, and the Transposes of what it makes."""
    turned = onnx.NodeProto()
    turned.CopyFrom(node)
    kept = [a for a in node.attribute if a.name != "layout"]
    del turned.attribute[:]
    turned.attribute.extend(kept)
    label = node.name or next(name for name in node.output if name)

    def fresh(name: str) -> str:
        while name in taken:
            name += "'"
        return name

    for slot in (_SEQUENCE, _FIRST_HIDDEN, _FIRST_CELL):
        if slot < len(node.input) and node.input[slot]:
            turned.input[slot] = fresh(f"{label}/{node.input[slot]}/time_first")
            yield helper.make_node(
                "Transpose", [node.input[slot]], [turned.input[slot]], f"{label}/time_first_{slot}", perm=[1, 0, 2]
            )
    back = []
    for slot, name in enumerate(node.output):
        if name:
            turned.output[slot] = fresh(f"{name}/time_first")
            perm = [2, 0, 1, 3] if slot == _STATES else [1, 0, 2]
            back.append(
                helper.make_node("Transpose", [turned.output[slot]], [name], f"{label}/batch_first_{slot}", perm=perm)
            )
    yield turned
    yield from back
