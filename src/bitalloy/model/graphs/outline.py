"""The inputs and outputs of a program before its sizes are known, read without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from bitalloy.core.errors import ModelError
from bitalloy.core.records import TensorSpec
from bitalloy.model.file import PROGRAM_FILE, declared_spec, parse
from bitalloy.model.graphs.wiring import Wire, free_names, read_wiring
from bitalloy.model.metadata import SHAPES, Size, read_fact


@dataclass(frozen=True)
class Outline:
    """Interfaces of the graphs as their files give them; open sizes are names."""

    folder: Path
    files: Mapping[str, Path]
    wires: tuple[Wire, ...]
    inputs: Mapping[str, tuple[TensorSpec, ...]]
    outputs: Mapping[str, tuple[TensorSpec, ...]]
    metadata: Mapping[str, Mapping[str, str]]

    @cached_property
    def names(self) -> Mapping[tuple[str, str], str]:
        """(graph, tensor) -> name in the joined graph, see `GraphProgram.names`."""
        inputs, outputs = (
            {g: [s.name for s in specs] for g, specs in side.items()} for side in (self.inputs, self.outputs)
        )
        return free_names(inputs, outputs, self.wires)

    @property
    def open_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs without a wire; sizes that the files leave open are names."""
        return tuple(
            TensorSpec(name=self.names[graph, s.name], dtype=s.dtype, shape=s.shape)
            for graph, specs in self.inputs.items()
            for s in specs
            if (graph, s.name) in self.names
        )

    @property
    def free_outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs without a wire, under their names in the joined graph."""
        return tuple(
            TensorSpec(name=self.names[graph, s.name], dtype=s.dtype, shape=s.shape)
            for graph, specs in self.outputs.items()
            for s in specs
            if (graph, s.name) in self.names
        )

    @property
    def facts(self) -> dict[str, str]:
        """Metadata of all graphs together; where several graphs have a key, the value of the first counts."""
        found: dict[str, str] = {}
        for texts in self.metadata.values():
            found = {**texts, **found}
        return found

    def shapes(self, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, tuple[int, ...]]:
        """Return `graph:input` -> shape for `load_program`: shapes of `feeds`, or else the usual ones of the files.

        Only inputs with open sizes are named.
        """
        found = {}
        for graph, specs in self.inputs.items():
            usual = self._usual(graph)
            for spec in specs:
                name = self.names.get((graph, spec.name))
                if name is None or all(isinstance(d, int) for d in spec.shape):
                    continue
                if feeds is not None and name in feeds:
                    found[f"{graph}:{spec.name}"] = tuple(feeds[name].shape)
                elif spec.name in usual:
                    found[f"{graph}:{spec.name}"] = usual[spec.name]
        return found

    def _usual(self, graph: str) -> dict[str, tuple[int, ...]]:
        return usual_shapes(self.metadata[graph])


def usual_shapes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return input -> usual shape, as the exporter noted in a file's metadata; empty where it noted none.

    Raises:
        ModelError: the entry is malformed.
    """
    return read_fact(metadata, SHAPES, dict[str, tuple[Size, ...]], {})


def read_outline(path: str | Path) -> Outline:
    """Read the interfaces of a program.

    Args:
        path: a folder with a `program.json`, or that file.

    Raises:
        ModelError: the file or a graph is missing or malformed.
    """
    file = Path(path) / PROGRAM_FILE if Path(path).is_dir() else Path(path)
    files, wires = read_wiring(file)
    inputs: dict[str, tuple[TensorSpec, ...]] = {}
    outputs: dict[str, tuple[TensorSpec, ...]] = {}
    metadata: dict[str, dict[str, str]] = {}
    for name, location in files.items():
        if not location.is_file():
            raise ModelError(f"Graph '{name}' of '{file}': No model file at '{location}'.")
        proto, _ = parse(location)
        weights = {i.name for i in proto.graph.initializer}
        inputs[name] = tuple(declared_spec(v) for v in proto.graph.input if v.name not in weights)
        outputs[name] = tuple(declared_spec(v) for v in proto.graph.output)
        metadata[name] = {p.key: p.value for p in proto.metadata_props}
    return Outline(file.parent, files, wires, inputs, outputs, metadata)


def read_interface(path: Path) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, ...]]]:
    """Read the inputs of a file, open sizes as names, and their usual shapes.

    Raises:
        ModelError: it is no ONNX file, or what it says of its inputs is malformed.
    """
    return declared_interface(parse(path)[0])


def declared_interface(proto: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], dict[str, tuple[int, ...]]]:
    """Return what `read_interface` does, of a file that is parsed already."""
    weights = {i.name for i in proto.graph.initializer}
    inputs = tuple(declared_spec(v) for v in proto.graph.input if v.name not in weights)
    return inputs, usual_shapes({p.key: p.value for p in proto.metadata_props})


def is_program(path: str | Path) -> bool:
    """Return whether a path is a `program.json` or a folder that holds one."""
    path = Path(path)
    return path.name == PROGRAM_FILE or (path / PROGRAM_FILE).is_file()
