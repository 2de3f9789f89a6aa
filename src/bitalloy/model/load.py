"""Loading of ONNX files: read, refuse what is unsafe or unsupported, fix shapes, bring to normal form.

The file itself is never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.core.records import ModelInfo, TensorSpec
from bitalloy.model.bind import bind, fed_inputs, part_contradicted
from bitalloy.model.bounds import refuse_declared, refuse_inference, refuse_inputs
from bitalloy.model.decide import has_undecided
from bitalloy.model.dequantizer import GivenRoundings
from bitalloy.model.external import all_tensors, external_files, raw_bytes, refuse_reading
from bitalloy.model.file import declared_spec, parse
from bitalloy.model.normalize import normalize, tidy
from bitalloy.model.read import Consumer, attribute, constant, consumers, is_float, name_of, static_shape
from bitalloy.model.selected import selected_values
from bitalloy.model.shown import float_origins, told_origins
from bitalloy.model.standard import DEFAULT_DOMAINS, OLDEST, OPSETS, Standard, agrees, opset_of_model, standardized
from bitalloy.model.weights import LARGE_BYTES, hold, is_large, is_mapped, release, to_bytes

__all__ = [
    "Consumer",
    "Graph",
    "attribute",
    "constant",
    "consumers",
    "is_float",
    "load_graph",
    "load_open",
    "name_of",
    "static_shape",
]

CHUNK = 1 << 22
_SHOWN = 80
"""Characters of a text of the file that a message repeats."""


@dataclass(frozen=True)
class Graph:
    """A model in normal form. Read it; never change it: `clone` gives a copy to rewrite."""

    info: ModelInfo
    model: ir.Model
    source: Path
    metadata: Mapping[str, str] = field(default_factory=dict)
    unfit: str = ""
    """Why the file as it is cannot stand for the float model; empty where it can."""
    branched: bool = False
    """Whether the file has branches, loops or sequences, which became plain nodes."""
    changes: tuple[str, ...] = ()
    """What was converted when the file was read, in sentences, see `model.standard`."""
    quantization: GivenRoundings = field(default_factory=GivenRoundings)
    """What the file rounds, where it is quantized: then this is the float model behind it."""
    shown: tuple[str, ...] = ()
    """Outputs, last in order, that the file does not have: what is compared in place of some of its own, see
    `model.shown`."""
    rewritten: str = ""
    """Identifies the weights where `rewrite.equalize` changed them; empty for the weights of the file."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """Inputs of one element that are taken to have this value always, because it decides what is executed."""
    declared: tuple[TensorSpec, ...] = ()
    """The inputs as the file declares them: sizes that it leaves open are names, or `?`."""
    base: ir.Model | None = None
    """The model before `rewrite.equalize` changed its weights; None where it did not."""
    factors: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...] = ()
    """Arguments of each call of `rewrite.equalize.scale` on the file's graph: tensors and powers of two per channel."""

    @property
    def identity(self) -> str:
        """Identifier of the graph: the hash of the file, and of the weights where they were rewritten."""
        return self.info.sha256 + self.rewritten

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Nodes in topological order."""
        return tuple(self.model.graph)

    @cached_property
    def node(self) -> Mapping[str, ir.Node]:
        """Node by name."""
        return {name_of(n): n for n in self.model.graph}

    @cached_property
    def value(self) -> Mapping[str, ir.Value]:
        """Tensor by name: inputs, initializers and node outputs."""
        found = {v.name: v for v in self.model.graph.inputs if v.name}
        found.update(self.model.graph.initializers)
        found.update({v.name: v for n in self.model.graph for v in n.outputs if v.name})
        return found

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph inputs, in order."""
        return tuple(str(v.name) for v in self.model.graph.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph outputs, in order."""
        return tuple(str(v.name) for v in self.model.graph.outputs)

    def clone(self) -> ir.Model:
        """Make a deep copy that may be rewritten; the tensors' memory is shared."""
        return self.model.clone()

    @cached_property
    def selected(self) -> frozenset[str]:
        """Names of the tensors behind a selection, see `model.selected`."""
        return frozenset(str(v.name) for v in selected_values(self.model.graph))

    @cached_property
    def large(self) -> bool:
        """Whether the weights are so large that all sessions share them, because copies would not fit into memory."""
        return is_large(self.model)

    @property
    def is_open(self) -> bool:
        """Whether the file leaves sizes of its inputs open."""
        bound = {i.name: i.shape for i in self.info.inputs}
        return any(i.shape != bound[i.name] for i in self.declared)

    @cached_property
    def open_model(self) -> ir.Model:
        """The model with the sizes open that its file leaves open, its weights as they are there. Clone it to rewrite.

        Raises:
            ModelError: what is compared has another name there.
        """
        model = load_open(self.source, self.fixed)
        made = {v.name: v for n in model.graph for v in n.outputs}
        if missing := [name for name in self.shown if name not in made]:
            raise ModelError(f"'{missing[0]}' is made otherwise where sizes are open.")
        model.graph.outputs.extend(made[name] for name in self.shown)
        return model

    def to_bytes(self) -> bytes:
        """Return the normal form as a serialized `ModelProto`.

        Raises:
            ModelError: the model does not fit into the 2 GB of one message.
        """
        return to_bytes(self.model)


def load_graph(
    path: str | Path,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    part: bool = False,
    fixed: Mapping[str, int] | None = None,
) -> Graph:
    """Read and normalise an ONNX file.

    Args:
        path: an .onnx file; external data must lie in its folder or below. Of a large model the weights there are
            mapped, not read: the file must stay as it is while the model is in use.
        shapes: input name -> static shape, for inputs with symbolic dimensions. A leading symbolic
            dimension (the batch) is bound to 1 without being asked. A size may be 0, as of an empty cache.
        part: whether it is one graph of a program; its outputs are those of the file, also where all are integers.
        fixed: inputs of one element that always have this value, which decides what is executed. They stay inputs. The
            value is part of the `sha256` of the model.

    Raises:
        ModelError: the file is missing, not ONNX, fails the checker, has unsafe or missing external
            data, unbound dimensions, control flow, unknown operators, NaN or infinite weights, or is
            quantized already.
    """
    source = Path(path)
    try:
        graph = _load(source, shapes or {}, fixed or {})
    except UnicodeDecodeError as error:  # names are decoded where they are first read
        raise ModelError(
            f"'{source}' is damaged: a name is not text ({error}). Export or download it again."
        ) from error
    return graph if part else _shown(graph)


def _shown(graph: Graph) -> Graph:
    """Let a model give the floats behind outputs that cannot be compared, too."""
    lost, names = float_origins(graph.model)
    if not lost:
        return graph
    counted = not graph.selected.isdisjoint(lost)
    note = told_origins(graph.source.name, lost, names, counted=counted)
    shown = tuple(name for name in names if name not in graph.output_names)
    graph.model.graph.outputs.extend(graph.value[name] for name in shown)
    return replace(graph, shown=shown, changes=(*graph.changes, note))


def load_open(path: str | Path, fixed: Mapping[str, int] | None = None) -> ir.Model:
    """Read an ONNX file and leave its sizes open. Nodes have the names that they have after `load_graph`.

    Args:
        path: as for `load_graph`.
        fixed: as for `load_graph`.

    Raises:
        ModelError: for the reasons that `load_graph` gives, except unbound dimensions.
    """
    source = Path(path)
    proto, _, size = _read(source)
    proto = _standard(proto, source, size, fixed or {}).proto
    _refuse(proto, source)
    del proto.graph.value_info[:]
    parsed = _parsed(proto, source)
    if size >= LARGE_BYTES:
        hold(parsed, source.parent)
    del proto
    shapes = {value.name: value.shape for value in parsed.graph.outputs}
    model = tidy(parsed)
    for value in model.graph.outputs:
        value.shape = shapes[value.name] or value.shape  # inference forgets the names of open sizes
    if size >= LARGE_BYTES:
        release(model)
    return model


def _load(source: Path, shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, int]) -> Graph:
    given, digest, size = _read(source)
    parted = part_contradicted(given, shapes)
    declared = tuple(map(declared_spec, fed_inputs(given)))
    branched = has_undecided(given)
    if branched:
        _refuse_types(given)
        bind(given, shapes)  # what is chosen may follow from shapes
    standard = _standard(given, source, size, fixed)
    proto, changes, runs = standard.proto, standard.changes, True
    _refuse(proto, source)
    bind(proto, shapes)
    refuse_inputs(proto)
    if changes and not has_undecided(proto):  # a loop that is left might never end, and is refused below
        bind(given, shapes)
        refuse_declared(given)
        told, runs = agrees(given, standard, source.name, fixed)
        changes = (*changes, told)
    changes += tuple(
        f"Inputs of '{source.name}' have a dimension '{name}' in common, but not its size: each has its own here."
        for name in parted
    )
    for output in proto.graph.output:
        output.type.tensor_type.shape.SetInParent()  # some exporters leave it out, and only the checker minds
    _check(proto, source)
    _forget_shapes(proto)
    parsed = _parsed(proto, source)
    if size >= LARGE_BYTES:
        hold(parsed, source.parent)
    inputs = tuple(_spec(v) for v in fed_inputs(proto))
    metadata = {p.key: p.value for p in proto.metadata_props}
    unfit = "it is quantized" if standard.given else _unfit(given, source, runs=runs)
    roundings = standard.given
    del given, proto, standard
    model = normalize(parsed)
    if size >= LARGE_BYTES:
        release(model)
    _refuse_negative(model)
    refuse_inference(model)
    info = ModelInfo(
        name=source.stem,
        sha256=hashlib.sha256(f"{digest} {sorted(fixed.items())}".encode()).hexdigest() if fixed else digest,
        size_bytes=size,
        opset=int(model.opset_imports[""]),
        nodes=len(model.graph),
        parameters=sum(int(np.prod(static_shape(v))) for v in model.graph.initializers.values() if is_float(v)),
        inputs=inputs,
        outputs=tuple(
            TensorSpec(name=str(v.name), dtype=v.dtype.name if v.dtype else "UNDEFINED", shape=_known(v))
            for v in model.graph.outputs
        ),
    )
    return Graph(info, model, source, metadata, unfit, branched, changes, roundings, fixed=fixed, declared=declared)


def _standard(proto: onnx.ModelProto, source: Path, size: int, fixed: Mapping[str, int]) -> Standard:
    """Bring a file to standard operators; weights of a large one lie outside the message, so it stays as it is."""
    if size >= LARGE_BYTES:
        return Standard(proto)
    try:
        return standardized(proto, source.name, fixed)
    except ModelError:
        raise
    except Exception as error:  # the onnx package raises ValueError, TypeError, RuntimeError and its own types
        raise ModelError(
            f"'{source}' cannot be brought to standard operators: {str(error)[:_SHOWN]}. Export it again with opset 17."
        ) from error


def _refuse_negative(model: ir.Model) -> None:
    """Refuse a model whose shapes end below nothing, such as that of a window which is larger than what it reads."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
                raise ModelError(
                    f"Node '{node.name}' ({node.op_type}) makes '{value.name}' of the shape {list(value.shape)}: no "
                    "size may be negative. Give larger inputs with --shape, or export the model again."
                )


def _unfit(proto: onnx.ModelProto, source: Path, *, runs: bool) -> str:
    """Say what keeps ONNX Runtime from taking a valid file as it is, or from running it as fast as it could."""
    if not runs:
        return "ONNX Runtime does not execute it"
    names = [n.name for n in proto.graph.node if n.name]
    if len(set(names)) < len(names):
        return "two of its nodes have one name, which ONNX Runtime refuses"
    if source.suffix != ".onnx":
        return "its name does not end with .onnx, and runtimes choose a parser by that"
    given = {v.name for v in proto.graph.input}
    count = sum(t.name in given for t in proto.graph.initializer)
    if count:
        return f"{count} of its weights are graph inputs as well, so that ONNX Runtime prepares nothing in advance"
    return ""


def _read(source: Path) -> tuple[onnx.ModelProto, str, int]:
    """The model, the SHA-256 and the size of its bytes and those of its external data.

    External data is read into the model, except for the big weights of a large one.
    """
    proto, data = parse(source)
    digest, size = hashlib.sha256(data), len(data)
    for file in external_files(proto, source):
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
    mappable = len(proto.graph.initializer) if size >= LARGE_BYTES else 0
    refuse_reading(proto, source, mappable)
    try:
        for index, tensor in enumerate(all_tensors(proto.graph)):
            if tensor.data_location == onnx.TensorProto.EXTERNAL and not (index < mappable and is_mapped(tensor)):
                open_ended = not any(e.key == "length" for e in tensor.external_data)
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(source.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
                wanted = raw_bytes(tensor)
                if open_ended and wanted is not None and 0 <= wanted < len(tensor.raw_data):
                    tensor.raw_data = tensor.raw_data[:wanted]
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                _refuse_content(tensor, source)
    except ModelError:
        raise
    except Exception as error:  # the onnx package raises ValueError, its own checker error, or OSError
        raise ModelError(f"The external data of '{source}' cannot be read: {error}") from error
    return proto, digest.hexdigest(), size


def _refuse_content(tensor: onnx.TensorProto, source: Path) -> None:
    """Refuse a constant that holds more or fewer numbers than its sizes say."""
    wanted = raw_bytes(tensor)
    try:
        if any(size < 0 for size in tensor.dims):
            raise ValueError("a size is negative")
        if wanted is None or not tensor.HasField("raw_data"):
            onnx.numpy_helper.to_array(tensor)
            return
    except Exception as error:  # the onnx package raises what numpy raises
        raise ModelError(
            f"The constant '{tensor.name}' of '{source}' does not hold what its type and sizes {list(tensor.dims)} "
            f"say: {error}. The file is damaged; export it again."
        ) from error
    if len(tensor.raw_data) != wanted:
        raise ModelError(
            f"The constant '{tensor.name}' of '{source}' has {len(tensor.raw_data)} bytes, but its sizes "
            f"{list(tensor.dims)} ask for {wanted}. The file is damaged; export it again."
        )


def _refuse(proto: onnx.ModelProto, source: Path) -> None:
    for item in [*proto.opset_import, *proto.graph.node]:
        item.domain = "" if item.domain in DEFAULT_DOMAINS else item.domain
    opset = opset_of_model(proto)
    if opset is None:
        others = sorted({item.domain for item in proto.opset_import})
        raise ModelError(
            f"'{source}' has no operators of the ONNX standard, only of {others}: trees, linear classifiers and the "
            "like have no layers that run in low precision. Give a neural network."
        )
    if opset not in OPSETS:
        raise ModelError(
            f"'{source}' uses opset {opset}; supported are {OLDEST} to {OPSETS[-1]}, and later ones whose operators "
            "mean the same. Export it again with opset 17."
        )
    if proto.graph.sparse_initializer:
        raise ModelError(f"'{source}' has sparse weights, which are not supported. Export it with dense weights.")
    for node in proto.graph.node:
        label = f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
        if node.domain:
            raise ModelError(
                f"Operator domain '{node.domain}' is not supported: {label}. Export with standard ONNX operators."
            )
        if node.op_type in ops.QUANTIZED:
            raise ModelError(f"The model is quantized already: {label}. Give the float model.")
        if node.op_type in ops.RANDOM:
            raise ModelError(f"The model draws random numbers: {label}. Export it in evaluation mode.")
        if any(a.name == "training_mode" and a.i for a in node.attribute):
            raise ModelError(f"The model is in training mode: {label}. Export it in evaluation mode.")
    _refuse_types(proto)


def _refuse_types(proto: onnx.ModelProto) -> None:
    for value in [*fed_inputs(proto), *proto.graph.output]:
        if value.type.WhichOneof("value") not in (None, "tensor_type"):
            raise ModelError(f"'{value.name}' is not a tensor; sequences, maps and optionals are not supported.")
        kind = value.type.tensor_type.elem_type
        if kind not in onnx.TensorProto.DataType.values():
            raise ModelError(f"'{value.name}' has the unknown data type {kind}. The file is damaged or too new.")
    for value in fed_inputs(proto):
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            raise ModelError(
                f"The input '{value.name}' is text, which nothing here reads; expected numbers. Export the model "
                "without what takes text apart, so that its inputs are numbers, such as those of tokens."
            )


def _check(proto: onnx.ModelProto, source: Path) -> None:
    """Run the ONNX checker; what is not in the message (see `_read`) is an input to it."""
    outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        inputs = {i.name for i in proto.graph.input}
        light = onnx.ModelProto()
        light.CopyFrom(proto)
        del light.graph.initializer[:]
        light.graph.initializer.extend(inside)
        light.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside if t.name not in inputs
        )
        proto = light
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"'{source}' is not valid ONNX: {str(error).strip()}") from error


def _forget_shapes(proto: onnx.ModelProto) -> None:
    """Drop the shapes that the exporter wrote: they may be symbolic or stale. Inference finds them again."""
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")


def _parsed(proto: onnx.ModelProto, source: Path) -> ir.Model:
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir wraps whatever it stumbles over in its own error type
        raise ModelError(f"'{source}' cannot be read: {error}") from error


def _known(value: ir.Value) -> tuple[int | str, ...]:
    """Sizes of an output; those that the data decides are `?`."""
    return tuple(d if isinstance(d, int) else "?" for d in value.shape or ())


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=onnx.TensorProto.DataType.Name(kind.elem_type),
        shape=tuple(d.dim_value for d in kind.shape.dim),
    )
