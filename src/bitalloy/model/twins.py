"""Constants that a model holds twice: a table that a Gather looks up, and the same matrix, or its transpose, elsewhere.

Exporters write so the head of a language model that shares its weights with the embedding, and constant folding turns a
Transpose of the embedding into a second constant.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitalloy.core.schemes import BASELINE
from bitalloy.model.metadata import SOURCE, TAG
from bitalloy.model.read import constant, consumers, is_float
from bitalloy.model.write import insert_behind, namer, node_namer


def twins(graph: ir.Graph) -> dict[str, str]:
    """Map each float constant that is a table, or the transpose of one, under another name to the table."""
    matrices = {
        name: value
        for name, value in graph.initializers.items()
        if is_float(value) and value.shape is not None and len(value.shape) == 2 and value.uses()
        if value.meta.get(SOURCE, (name, BASELINE))[1] == BASELINE  # no scales of what is stored
    }
    found: dict[str, str] = {}
    for name, table in matrices.items():
        if name in found or not any(use.node.op_type == "Gather" and use.slot == 0 for use in consumers(table)):
            continue
        for other, value in matrices.items():
            if other != name and other not in found and _same(table, value):
                found[other] = name
    return found


def join_twins(model: ir.Model) -> None:
    """Let readers of a matrix that is a table under another name read the table, or a Transpose of it, in place.

    Runtimes compute the Transpose of a constant when they load a model, so that only the file becomes smaller.
    """
    graph = model.graph
    fresh, fresh_node = namer(model), node_namer(model)
    for name, table in twins(graph).items():
        value, source = graph.initializers[name], graph.initializers[table]
        one, other = constant(value), constant(source)
        assert one is not None and other is not None, "initializers have values"
        if one.shape == other.shape and np.array_equal(one, other):
            ir.convenience.replace_all_uses_with(value, source)
        else:
            node = ir.node("Transpose", [source], {"perm": [1, 0]}, name=fresh_node(f"{name}/Transpose"))
            node.outputs[0].name = fresh(f"{name}/transposed")
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            if unit := consumers(value)[0].node.metadata_props.get(TAG):
                node.metadata_props[TAG] = unit
            ir.convenience.replace_all_uses_with(value, node.outputs[0])
            insert_behind(graph, None, [node])
        graph.initializers.pop(name)


def _same(one: ir.Value, other: ir.Value) -> bool:
    if sorted(one.shape) != sorted(other.shape):  # type: ignore[arg-type, type-var]
        return False
    first, second = constant(one), constant(other)
    assert first is not None and second is not None, "initializers have values"
    if first.flat[0] != second.flat[0] or first.flat[-1] != second.flat[-1]:  # corners that a transpose leaves there
        return False
    return np.array_equal(first, second) or np.array_equal(first.T, second)
