"""Additions to an `onnx_ir` graph: fresh names, stored constants, and nodes at their place in the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.model.weights import pack

Fresh = Callable[[str], str]
"""Function from a name to one that no tensor, or no node, of a model has."""


def namer(model: ir.Model) -> Fresh:
    """Return a function that turns a name into one that no tensor of the model has and that it never gave before."""
    made = (v for n in model.graph for v in n.outputs)
    return _unlike({str(v.name) for v in (*model.graph.inputs, *made)} | set(model.graph.initializers))


def node_namer(model: ir.Model) -> Fresh:
    """Return a function that turns a name into one that no node of the model has and that it never gave before."""
    return _unlike({str(n.name) for n in model.graph})


def _unlike(taken: set[str]) -> Fresh:
    def fresh(name: str) -> str:
        while name in taken:
            name += "'"
        taken.add(name)
        return name

    return fresh


def add_initializer(graph: ir.Graph, name: str, content: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Store a constant in a graph, under a name that no other tensor of the graph may have."""
    tensor = ir.tensor(content, name=name) if isinstance(content, (np.ndarray, np.generic)) else content
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def insert_behind(graph: ir.Graph, producer: ir.Node | None, nodes: Sequence[ir.Node]) -> None:
    """Put nodes behind the one that makes what they read, or first where that is an input or a constant."""
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def drop_unread(graph: ir.Graph) -> None:
    """Remove the stored constants that no node reads and that are no outputs."""
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        graph.initializers.pop(name)


def check_model(model: ir.Model) -> None:
    """Check a rewritten model with the ONNX checker.

    Raises:
        ModelError: the checker refuses the model.
    """
    try:
        onnx.checker.check_model(pack(model).data)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"The rewritten model fails the ONNX checker: {error}") from error
