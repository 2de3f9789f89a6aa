"""Sizes of models as files."""

from __future__ import annotations

from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY


def float_bytes(graph: Graph) -> int:
    """Return the size of the float model as files."""
    return sum(float_sizes(graph).values())


def float_sizes(graph: Graph) -> dict[str, int]:
    parts = graph.program.graphs if isinstance(graph, Joined) else {ONLY: graph}
    return Artefact({name: part.model for name, part in parts.items()}).sizes
