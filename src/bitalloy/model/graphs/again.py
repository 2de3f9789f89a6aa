"""Plain data from which another process opens a loaded model again."""

from __future__ import annotations

from pathlib import Path

from msgspec import field

from bitalloy.core.errors import ModelError
from bitalloy.core.jobs import Opening, Resident
from bitalloy.core.records import Record
from bitalloy.model import load as graphs
from bitalloy.model.graphs.joining import Joined, join
from bitalloy.model.graphs.wiring import load_program
from bitalloy.model.load import Graph


class GraphFile(Record, frozen=True, kw_only=True):
    """A model in a file, or a program in a folder, with the arguments with which it was loaded."""

    path: str
    """Path of an .onnx file, or of a `program.json`."""
    shapes: dict[str, tuple[int, ...]]
    """Input -> shape; for a program `graph:input` -> shape, for all inputs of all graphs."""
    sha256: str
    """SHA-256 that the opened model must have, as in its `ModelInfo`."""
    program: bool = False
    inner: bool = False
    """Whether outputs that a wire carries on are outputs of the whole too, see `Joined.inner`."""
    fixed: dict[str, int] = field(default_factory=dict)
    """Inputs of one element that always have this value, see `Graph.fixed`."""
    factors: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...] = ()
    """Factors by which channels of the file's weights were scaled, see `Graph.factors`."""


def graph_opening(graph: Graph) -> Opening:
    """Describe how jobs open a model; a model that was made in memory can be used in this process only."""
    spec = GraphFile(
        path=str(graph.source.absolute()),
        shapes=_shapes(graph),
        sha256=graph.info.sha256,
        fixed=dict(graph.fixed),
        factors=graph.factors,
    )
    known = graph.source.is_file()
    if isinstance(graph, Joined):
        file, parts = graph.program.file, graph.program.graphs
        shapes = {f"{name}:{entry}": shape for name, part in parts.items() for entry, shape in _shapes(part).items()}
        spec = GraphFile(
            path=str(file and file.absolute()),
            shapes=shapes,
            sha256=graph.info.sha256,
            program=True,
            inner=graph.inner,
            factors=graph.factors,
        )
        known = file is not None and not any(part.rewritten for part in parts.values())
    if not known or bool(graph.rewritten) != bool(graph.factors):
        return Opening(kind="resident", spec=Resident(what=f"the model '{graph.info.name}'", key=graph.identity))
    return Opening(kind="graph", spec=spec)


def open_file(spec: GraphFile) -> Graph:
    """Load a model again and make sure that it is unchanged; `rewrite.equalize.open_graph` applies its factors.

    Raises:
        ModelError: the file is missing, or has changed.
    """
    path = Path(spec.path)
    if spec.program:
        graph: Graph = join(load_program(path, shapes=spec.shapes), inner=spec.inner)
    else:
        graph = graphs.load_graph(path, shapes=spec.shapes, fixed=spec.fixed)
    if graph.info.sha256 != spec.sha256:
        raise ModelError(
            f"'{path}' has changed since this job was made: the SHA-256 of the model is {graph.info.sha256[:12]}..., "
            f"not {spec.sha256[:12]}.... Put the old file back, or start the run again."
        )
    return graph


def _shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {entry.name: tuple(int(size) for size in entry.shape) for entry in graph.info.inputs}
