"""Artefacts, which are shipped and measured: one model, or the graphs of a program, run as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitalloy.model.file import PROGRAM_FILE
from bitalloy.model.graphs.wiring import GraphProgram, write_wiring
from bitalloy.model.weights import is_large, pack, save
from bitalloy.runtime.base import ONLY, Kernel, Reopener, Runtime, Session
from bitalloy.runtime.ort import ORT, available_cores


class Chain:
    """Sessions of a program's graphs that run one after the other, as the wires say.

    Args:
        sessions: name of the graph -> its session.
        program: the program that the graphs belong to.
    """

    def __init__(self, sessions: Mapping[str, Session], program: GraphProgram) -> None:
        self._sessions, self._program = dict(sessions), program
        self._wires = {(w.target, w.input): (w.source, w.output) for w in program.wires}

    @property
    def input_names(self) -> tuple[str, ...]:
        names = self._program.names
        return tuple(names[g, i] for g, s in self._sessions.items() for i in s.input_names if (g, i) in names)

    @property
    def output_names(self) -> tuple[str, ...]:
        names = self._program.names
        return tuple(names[g, o] for g, s in self._sessions.items() for o in s.output_names if (g, o) in names)

    def part(self, name: str) -> Session:
        """Return the session of one graph."""
        return self._sessions[name]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run all graphs once; feeds and results have their names in the joined graph."""
        names = self._program.names
        values: dict[tuple[str, str], np.ndarray] = {}
        for graph in self._program.order:
            session = self._sessions[graph]
            given = {
                i: values[self._wires[graph, i]] if (graph, i) in self._wires else feeds[names[graph, i]]
                for i in session.input_names
            }
            values.update({(graph, name): value for name, value in session.run(given).items()})
        return {names[g, o]: values[g, o] for g, s in self._sessions.items() for o in s.output_names if (g, o) in names}

    def kernels(self) -> tuple[Kernel, ...]:
        """Stop profiling and return the kernels of all graphs."""
        return tuple(replace(kernel, graph=name) for name, part in self._sessions.items() for kernel in part.kernels())

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()


@dataclass(frozen=True)
class Artefact:
    """One version of a model: in memory, or in files."""

    models: Mapping[str, ir.Model | Path]
    """Name of the graph -> model in memory or file; the name is `ONLY` for a model that is one graph."""
    program: GraphProgram | None = None
    runtime: Runtime = ORT
    """Runtime that executes the artefact: that of the target for which it was made."""
    shown: tuple[str, ...] = ()
    """Outputs that are compared and not shipped, see `Graph.shown`."""
    bound: Mapping[str, str] = field(default_factory=dict)
    """Graph whose file leaves sizes open, and which has those of the samples -> why."""

    @property
    def large(self) -> bool:
        """Whether a graph in memory is so large that it is run from a file, because a session copies its model."""
        return any(is_large(m) for m in self.models.values() if isinstance(m, ir.Model))

    @property
    def sizes(self) -> dict[str, int]:
        """Name of the graph -> bytes of its file and external data."""
        return {name: _size(model) for name, model in self.models.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def session(self, *, profile: Path | None = None, streams: int = 1) -> Session:
        """Load into the runtime; a program gives a `Chain`. In ONNX Runtime a large model runs faster from a file.

        Args:
            profile: path prefix of a profile; `kernels` of the session then tells what was executed.
            streams: threads that may run it at the same time, see `Opener`.
        """
        if self.program is None:
            return self.runtime.open(self.models[ONLY], profile=profile, streams=streams)
        parts = {
            name: self.runtime.open(
                m, profile=None if profile is None else profile.with_name(f"{profile.name}-{name}"), streams=streams
            )
            for name, m in self.models.items()
        }
        return Chain(parts, self.program)

    def reopener(self) -> Reopener:
        """Return a function that opens sessions; a runtime that compiles models does so once for all of them."""
        if self.program is not None or self.runtime.keep is None:
            return self.session
        return self.runtime.keep(self.models[ONLY])

    def placed(self, folder: Path) -> Artefact:
        """Return the artefact with its large graphs in files in a folder, which is made where it is absent."""
        models: dict[str, ir.Model | Path] = {}
        for name, model in self.models.items():
            if isinstance(model, ir.Model) and is_large(model):
                folder.mkdir(parents=True, exist_ok=True)
                models[name], *_ = save(model, folder / f"{name}.onnx")
            else:
                models[name] = model
        return replace(self, models=models)

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """Write a model to an .onnx file, or a program to a folder with `program.json`; 2 GB and more in two files.

        Each file is written as a whole or not at all, `program.json` last.

        Returns:
            The files written.

        Raises:
            OSError: the folder cannot be written.
        """
        path = Path(path)
        models = {name: model for name, model in self.models.items() if isinstance(model, ir.Model)}
        assert len(models) == len(self.models), "what lies in files already is not written again"
        if self.program is None:
            return save(self._without_shown(models[ONLY]), path)
        path.mkdir(parents=True, exist_ok=True)
        (path / PROGRAM_FILE).unlink(missing_ok=True)
        files = [f for name, model in models.items() for f in save(model, path / f"{name}.onnx")]
        return (*files, write_wiring(path, {name: f"{name}.onnx" for name in self.models}, self.program.wires))

    def _without_shown(self, model: ir.Model) -> ir.Model:
        if not self.shown:
            return model
        model = model.clone()
        kept = [v for v in model.graph.outputs if v.name not in self.shown]
        model.graph.outputs.clear()
        model.graph.outputs.extend(kept)
        RemoveUnusedNodesPass()(model)
        return model


def reopeners(artefacts: Sequence[Artefact]) -> list[Reopener]:
    """Call `Artefact.reopener` of all artefacts side by side, since compiling a model keeps one core busy."""
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(Artefact.reopener, artefacts))


def _size(model: ir.Model | Path) -> int:
    if isinstance(model, Path):
        beside = model.with_name(model.name + ".data")
        return model.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    packed = pack(model)
    return len(packed.data) + sum(w.nbytes for w in packed.weights.values())
