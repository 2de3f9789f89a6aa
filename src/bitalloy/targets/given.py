"""Ranges of a quantized file, by the tensors that a target would round."""

from __future__ import annotations

from bitalloy import ops
from bitalloy.model.load import Graph


def given_ranges(graph: Graph) -> dict[str, tuple[float, float]]:
    """Ranges that a quantized file has, by tensor: also of what a rounded tensor is moved from (`ops.MOVERS`)."""
    tensors = graph.quantization.tensors
    found = {name: grid.limits for name, grid in tensors.items()}
    for name, grid in tensors.items():
        value = graph.value.get(name)
        while value is not None and (node := value.producer()) is not None and node.op_type in ops.MOVERS:
            value = node.inputs[0]
            if value is not None:
                found.setdefault(str(value.name), grid.limits)
    return found
