"""A graph as a chain of segments that run one by one, so that what did not change is not computed again.

A segment is a run of nodes in graph order. It reads tensors of earlier segments and graph inputs, and hands on the
tensors that others read. Cuts lie where few numbers cross, at about equal distances in work: there branches end, and
whole branches that a change does not reach are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.model.load import Graph
from bitalloy.model.read import elements, is_float, name_of
from bitalloy.targets.base import macs

MOVE_COST = 8
"""Number of multiply-accumulates in the time of writing one element; it only balances the segments."""


def cut(graph: Graph, count: int) -> list[tuple[ir.Node, ...]]:
    """Split the nodes of a graph into at most `count` segments.

    The ideal cuts are at equal shares of the work; each moves to the narrowest place within half a share around.
    """
    nodes = graph.nodes
    reached = np.cumsum([_work(n) for n in nodes])
    width = _widths(graph)
    share = reached[-1] / count
    places = {len(nodes)}
    for number in range(1, count):
        near = np.flatnonzero(np.abs(reached - number * share) < share / 2)
        if len(near):
            places.add(int(near[np.argmin(width[near])]) + 1)
    parts, start = [], 0
    for place in sorted(places):
        parts.append(nodes[start:place])
        start = place
    return parts


def reads(nodes: Sequence[ir.Node]) -> tuple[str, ...]:
    """Return the names of the tensors that the nodes read and do not make, constants left out."""
    made = {v.name for n in nodes for v in n.outputs}
    found = (v for n in nodes for v in n.inputs if v is not None and not v.is_initializer() and v.name not in made)
    return tuple(dict.fromkeys(str(v.name) for v in found))


def extract(graph: Graph, nodes: Sequence[ir.Node]) -> ir.Model:
    """Extract nodes as a model of their own.

    Its inputs are the tensors that they read from elsewhere, its outputs those that other nodes read or that leave
    the graph. Weights share memory with the original.
    """
    values: dict[str, ir.Value] = {}
    weights: list[ir.Value] = []

    def value(original: ir.Value | None) -> ir.Value | None:
        if original is None:
            return None
        name = str(original.name)
        if name not in values:
            values[name] = _copy(original)
            if original.is_initializer():
                weights.append(values[name])
        return values[name]

    copies = []
    for node in nodes:
        read = [value(v) for v in node.inputs]
        made = [_copy(v) for v in node.outputs]
        values.update({str(v.name): v for v in made})
        copies.append(
            ir.Node(node.domain, node.op_type, read, list(node.attributes.values()), outputs=made, name=node.name)
        )
    inside = {name_of(n) for n in nodes}
    outputs = [
        values[str(v.name)]
        for node in nodes
        for v in node.outputs
        if v.is_graph_output() or any(name_of(user) not in inside for user, _ in v.uses())
    ]
    inputs = [values[name] for name in reads(nodes)]
    part = ir.Graph(inputs, outputs, nodes=copies, initializers=weights, opset_imports=dict(graph.model.opset_imports))
    part.name = "segment"
    return ir.Model(part, ir_version=graph.model.ir_version)


def _copy(original: ir.Value) -> ir.Value:
    return ir.Value(name=original.name, type=original.type, shape=original.shape, const_value=original.const_value)


def _work(node: ir.Node) -> int:
    written = sum(elements(v) for v in node.outputs if v.name)
    return macs(node) + MOVE_COST * written


def _widths(graph: Graph) -> np.ndarray:
    """Count the float elements that are alive after each node."""
    order = {name_of(n): i for i, n in enumerate(graph.nodes)}
    change = np.zeros(len(order) + 1)
    for value in graph.value.values():
        uses = [order[name_of(user)] for user, _ in value.uses()]
        if value.is_initializer() or not is_float(value) or not uses:
            continue
        producer = value.producer()
        size = elements(value)
        change[order[name_of(producer)] if producer is not None else 0] += size
        change[max(uses)] -= size
    return np.cumsum(change[:-1])
