"""Tensors that may hold -infinity: scores that a mask takes out before a Softmax.

Exporters write a mask as `Where(mask, scores, -inf)`, or add one that is -infinity, which may be an input or the Log of
zeros. Such numbers do no harm where only operators read them that end infinity (Softmax, Max, ReduceMax, Exp), perhaps
behind ones that move or combine them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, consumers

CARRIES = ops.TAKES_INFINITY | ops.MOVERS | ops.RESHAPERS | ops.IDENTITIES | {"Concat", "Sub"}
"""Operators that hand on infinite numbers."""


def masked_tensors(graph: Graph) -> frozenset[str]:
    """Return the names of the tensors that a mask may make infinite, and that nothing reads which that harms."""
    reached = set(graph.model.graph.inputs)
    for value in graph.model.graph.initializers.values():
        array = constant(value)
        if array is not None and array.dtype == np.float32 and np.isinf(array).any():
            reached.add(value)
    for node in graph.nodes:
        if node.op_type == "Log" or (node.op_type in CARRIES and any(v in reached for v in node.inputs)):
            reached.update(node.outputs)
    harmless = set[ir.Value]()
    for node in reversed(graph.nodes):
        for value in node.outputs:
            ends = (
                c.node.op_type in ops.ENDS_INFINITY | ops.BOOLEAN
                or (c.node.op_type in CARRIES and harmless.issuperset(c.node.outputs))
                for c in consumers(value)
            )
            if value in reached and not value.is_graph_output() and all(ends):
                harmless.add(value)
    return frozenset(str(v.name) for v in harmless)
