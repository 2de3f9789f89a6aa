"""Programs: graphs wired together, and the file `program.json` that describes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import msgspec

from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import ModelError
from bitalloy.core.files import write
from bitalloy.core.paths import path_inside
from bitalloy.core.records import TensorSpec
from bitalloy.model import load as graphs
from bitalloy.model.file import PROGRAM_FILE
from bitalloy.model.load import Graph

NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True, order=True)
class Wire:
    """A connection: output `output` of graph `source` is input `input` of graph `target`."""

    source: str
    output: str
    target: str
    input: str

    def __str__(self) -> str:
        return f"{self.source}:{self.output} -> {self.target}:{self.input}"

    @staticmethod
    def parse(text: str) -> Wire:
        """Read `source:output -> target:input`.

        >>> Wire.parse("encoder:embeddings -> decoder:image_embeddings")
        Wire(source='encoder', output='embeddings', target='decoder', input='image_embeddings')

        Raises:
            ModelError: the text has another form.
        """
        ends = [end.strip().partition(":") for end in text.split("->")]
        if len(ends) != 2 or not all(name and tensor for name, _, tensor in ends):
            raise ModelError(f"A wire reads 'graph:output -> graph:input', got '{text}'.")
        (source, _, output), (target, _, entry) = ends
        return Wire(source, output, target, entry)


@dataclass(frozen=True)
class GraphProgram:
    """Named graphs and the wires between them.

    Raises:
        ModelError: a wire names what does not exist, joins tensors of different type or shape, meets another at the
            same input, or closes a cycle; or the graphs have different opsets.
    """

    graphs: Mapping[str, Graph]
    wires: tuple[Wire, ...]
    file: Path | None = field(default=None, compare=False)
    """The `program.json` from which the program was loaded; None for one that was made in memory."""

    def __post_init__(self) -> None:
        if not self.graphs:
            raise ModelError("A program needs at least one graph.")
        _check_names(self.graphs, self.wires)
        for wire in self.wires:
            source, target = self.graphs[wire.source].info.outputs, self.graphs[wire.target].info.inputs
            given, wanted = _spec(source, wire.output, wire, "output"), _spec(target, wire.input, wire, "input")
            if (given.dtype, given.shape) != (wanted.dtype, wanted.shape):
                raise ModelError(
                    f"Wire '{wire}' joins {given.dtype} {list(given.shape)} to {wanted.dtype} {list(wanted.shape)}. "
                    "Types and shapes must be equal; open sizes can be given when the program is loaded."
                )
        opsets = {name: g.info.opset for name, g in self.graphs.items()}
        if len(set(opsets.values())) > 1:
            raise ModelError(f"The graphs of a program need the same opset, got {opsets}. Export them again.")

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names of the graphs, each behind those that it reads from."""
        return _order(self.graphs, self.wires)

    @cached_property
    def names(self) -> Mapping[tuple[str, str], str]:
        """(graph, tensor) -> name in the joined graph, for inputs and outputs without a wire.

        The plain name where only one of them has it, else `graph/name`.
        """
        inputs = {name: g.input_names for name, g in self.graphs.items()}
        return free_names(inputs, {name: g.output_names for name, g in self.graphs.items()}, self.wires)


def free_names(
    inputs: Mapping[str, Sequence[str]], outputs: Mapping[str, Sequence[str]], wires: Sequence[Wire]
) -> dict[tuple[str, str], str]:
    """Return (graph, tensor) -> name in the joined graph, for inputs and outputs without a wire."""
    fed, read = {(w.target, w.input) for w in wires}, {(w.source, w.output) for w in wires}
    free = [(name, t) for name, tensors in inputs.items() for t in tensors if (name, t) not in fed]
    free += [(name, t) for name, tensors in outputs.items() for t in tensors if (name, t) not in read]
    count = Counter(tensor for _, tensor in free)
    plain = {t for _, t in free if count[t] == 1 and t.partition("/")[0] not in inputs}
    return {(name, t): t if t in plain else f"{name}/{t}" for name, t in free}


def load_program(path: str | Path, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> GraphProgram:
    """Read the graphs and wires of a program.

    Args:
        path: folder with a `program.json`, or that file.
        shapes: `graph:input` -> shape, for inputs with open sizes; an input that a wire leads to needs none.

    Raises:
        ModelError: the file is missing or malformed, a graph lies outside of the folder or cannot be loaded, or the
            wires do not fit.
    """
    file = Path(path) / PROGRAM_FILE if Path(path).is_dir() else Path(path)
    files, wires = read_wiring(file)
    given = dict(shapes or {})
    loaded: dict[str, Graph] = {}
    for name in _order(files, wires):
        sizes: dict[str, tuple[int, ...]] = {}
        for wire in (w for w in wires if w.target == name):
            brought = _spec(loaded[wire.source].info.outputs, wire.output, wire, "output")
            sizes[wire.input] = tuple(int(d) for d in brought.shape)
        own = _own_shapes(name, given)
        for key, entry in own.items():
            if sizes.setdefault(entry, given[key]) != given[key]:
                raise ModelError(f"'{key}' was given as {list(given[key])}, but its wire brings {list(sizes[entry])}.")
        try:
            loaded[name] = graphs.load_graph(files[name], shapes=sizes, part=True)
        except ModelError as error:
            raise ModelError(f"Graph '{name}' of '{file}': {error}") from error
        given = {key: size for key, size in given.items() if key not in own}
    if given:
        raise ModelError(f"No graph of '{file}' has the inputs {sorted(given)} for which shapes were given.")
    return GraphProgram({name: loaded[name] for name in files}, wires, file)


def _spec(specs: Sequence[TensorSpec], name: str, wire: Wire, kind: str) -> TensorSpec:
    for spec in specs:
        if spec.name == name:
            return spec
    owner = wire.source if kind == "output" else wire.target
    raise ModelError(f"Wire '{wire}': graph '{owner}' has no {kind} '{name}'; it has {[s.name for s in specs]}.")


def _check_names(names: Mapping[str, object], wires: Sequence[Wire]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ModelError(f"A graph's name has letters, digits, '_', '.' and '-' only, got '{name}'.")
    for wire in wires:
        for end in (wire.source, wire.target):
            if end not in names:
                raise ModelError(f"Wire '{wire}' names the graph '{end}'; the program has {list(names)}.")
    entries = Counter((w.target, w.input) for w in wires)
    for (name, entry), count in entries.items():
        if count > 1:
            raise ModelError(f"{count} wires lead to the input '{entry}' of graph '{name}'; one at most can.")
    _order(names, wires)


def _order(names: Mapping[str, object], wires: Sequence[Wire]) -> tuple[str, ...]:
    try:
        return tuple(TopologicalSorter({n: [w.source for w in wires if w.target == n] for n in names}).static_order())
    except CycleError as error:
        raise ModelError(f"The wires close a cycle: {' -> '.join(error.args[1])}. Data must flow one way.") from error


class _File(msgspec.Struct, forbid_unknown_fields=True):
    graphs: dict[str, str]
    wires: list[str] = []


def read_wiring(file: Path) -> tuple[dict[str, Path], tuple[Wire, ...]]:
    """Read a `program.json`: graph name -> path inside the program's folder, and the wires.

    Raises:
        ModelError: the file is missing or malformed, names a file outside of its folder, or its wires close a cycle.
    """
    try:
        content = from_json(file.read_bytes(), _File)
    except OSError as error:
        raise ModelError(f"No program at '{file}' ({error.strerror}). Give a folder with a {PROGRAM_FILE}.") from error
    except msgspec.MsgspecError as error:
        raise ModelError(
            f"'{file}' is not a program: {error}. Expected "
            '{"graphs": {"name": "file.onnx"}, "wires": ["graph:output -> graph:input"]}.'
        ) from error
    folder = file.parent.resolve()
    files = {}
    for name, location in content.graphs.items():
        files[name] = path_inside(folder, location, f"Graph '{name}' of '{file}' is in the file", ModelError)
    wires = tuple(Wire.parse(text) for text in content.wires)
    _check_names(files, wires)
    return files, wires


def write_wiring(folder: Path, files: Mapping[str, str], wires: Sequence[Wire | str]) -> Path:
    """Write `program.json`, as a whole or not at all; `files` are relative to the folder. Returns its path."""
    content = _File(graphs=dict(files), wires=[str(w) for w in wires])
    return write(folder / PROGRAM_FILE, to_json(content, pretty=True) + b"\n")


def _own_shapes(name: str, given: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Keys of `given` that speak of this graph -> its input."""
    found = {}
    for key in given:
        owner, colon, entry = key.partition(":")
        if colon and owner == name:
            found[key] = entry
    return found
