"""Tensors behind a selection: how many numbers they hold, or which, is decided by numbers that the model computes.

Case 1. An operator that counts what the model computes: NonMaxSuppression, NonZero, Unique, Compress by its condition.
Case 2. A size that is computed and does not follow from shapes: the target of a Reshape, the k of a TopK, one end of a
        Slice. A Slice of which both ends are computed is taken to move a window of one size.
Case 3. All that reads such a tensor, also where it has a fixed size again, as rows that are padded to 100: one row more
        or less moves all others, and no difference of numbers tells how far apart two such lists are.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.read import constant, is_static, read_values

SELECTED = "how many rows it has depends on the data, so that nothing behind the selection is compared"
"""Why nodes behind a selection stay in float."""


def selects(node: ir.Node) -> bool:
    """Return whether a node whose sizes do not follow from those of its inputs has sizes that depend on numbers."""
    if _computed(node, ops.counted_by(node.op_type)):
        return True
    ends = _computed(node, ops.sized_by(node.op_type))
    return bool(ends) and (node.op_type != "Slice" or len(ends) == 1)


def _computed(node: ir.Node, slots: Iterable[int]) -> list[ir.Value]:
    """Return the operands in some slots that are not constant."""
    there = (node.inputs[slot] for slot in slots if slot < len(node.inputs))
    return [value for value in there if value is not None and constant(value) is None]


def selected_values(nodes: Iterable[ir.Node]) -> frozenset[ir.Value]:
    """Find the tensors behind a selection.

    Args:
        nodes: of a graph, in topological order, after shape inference: what has no static shape there and is made by a
            node that `selects` begins a selection.
    """
    found: set[ir.Value] = set()
    for node in nodes:
        begun = selects(node) and not all(is_static(v) for v in node.outputs if v.name)
        if begun or not found.isdisjoint(read_values(node)):
            found.update(node.outputs)
    return frozenset(found)
