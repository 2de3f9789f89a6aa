"""Ranges of a quantized file, by the tensors that a target would round."""

from __future__ import annotations

from bitalloy import ops
from bitalloy.model.load import Graph
from bitalloy.model.read import moved_from


def given_ranges(graph: Graph) -> dict[str, tuple[float, float]]:
    """Ranges that a quantized file has, by tensor: also of what a rounded tensor is moved from (`ops.MOVERS`)."""
    tensors = graph.quantization.tensors
    found = {name: grid.limits for name, grid in tensors.items()}
    for name, grid in tensors.items():
        if name in graph.value:
            for source in moved_from(graph.value[name], ops.MOVERS):
                found.setdefault(str(source.name), grid.limits)
    return found
