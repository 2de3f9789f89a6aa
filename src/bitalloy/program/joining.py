"""One graph out of many, and many out of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from bitalloy.errors import ModelError
from bitalloy.graph import Graph, load_open
from bitalloy.halving import Fresh, cast, is_border
from bitalloy.program.wiring import Program
from bitalloy.records import ModelInfo, TensorSpec
from bitalloy.values import BORDER, TAG, consumers, is_float, name_of, namer, static_shape

ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Operators that no float graph has: a rewriting put them there."""
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
HEADS, PROTECT = "bitalloy.heads", "bitalloy.protect"
"""Metadata keys of an exported graph: outputs that count (JSON, empty for all), and what stays in float by default."""


@dataclass(frozen=True)
class Joined(Graph):
    """The graphs of a program as one; `divide` takes it apart again."""

    program: Program = field(kw_only=True)

    @cached_property
    def opened(self) -> Mapping[str, ir.Model]:
        """The graphs whose files leave sizes open, with these sizes open. Clone them to rewrite them."""
        found = {name: load_open(part.source) for name, part in self.program.graphs.items()}
        return {
            name: model
            for name, model in found.items()
            if any(v.shape is None or not v.shape.is_static() for v in model.graph.inputs)
        }


def join(program: Program, *, inner: bool = False) -> Joined:
    """One graph that computes what the wired graphs compute.

    Names of nodes and tensors get their graph's name in front (`encoder/...`), those of free inputs and outputs
    only where they would clash. Weights are shared with the parts.

    Args:
        program: not changed.
        inner: whether outputs that a wire carries on are outputs of the whole too, as `graph/name`, and so
            heads whose damage is told apart. Otherwise only final outputs are; of graphs whose metadata says which
            outputs count, only these (logits, but not the cache).
    """
    values: dict[tuple[str, str], ir.Value] = {}
    nodes: list[ir.Node] = []
    inputs: dict[tuple[str, str], ir.Value] = {}
    weights: list[ir.Value] = []
    read = {(w.source, w.output) for w in program.wires}
    for name in program.order:
        part = program.graphs[name].clone().graph
        ends = {str(v.name): v for v in part.outputs}
        starts = {str(v.name): v for v in part.inputs}
        inside = [v for node in part for v in node.outputs]
        own = [*part.initializers.values()]
        part.outputs.clear()
        part.inputs.clear()
        part.initializers.clear()
        taken = list(part)
        part.remove(taken)
        for value in (*inside, *own):
            if value.name:
                _rename(value, f"{name}/{value.name}")
        for node in taken:
            node.name = f"{name}/{node.name}"
        fed = {w.input: values[w.source, w.output] for w in program.wires if w.target == name}
        for tensor, value in starts.items():
            if tensor in fed:
                ir.convenience.replace_all_uses_with(value, fed[tensor])
            else:
                value.name = program.names[name, tensor]
                inputs[name, tensor] = value
        for tensor, value in ends.items():
            values[name, tensor] = fed.get(tensor, value) if value.producer() is None else value
            if (name, tensor) not in read:
                value.name = program.names[name, tensor]
        nodes += taken
        weights += own
    first = program.graphs[program.order[0]].model
    sequence = [(name, t) for name, g in program.graphs.items() for t in g.output_names]
    counted = _counted(program, sequence, read)
    joined = ir.Graph(
        [inputs[name, t] for name, g in program.graphs.items() for t in g.input_names if (name, t) in inputs],
        [values[key] for key in sequence if inner or (key not in read and key in counted)],
        nodes=nodes,
        initializers=weights,
        opset_imports=dict(first.graph.opset_imports),
        name="program",
    )
    model = ir.Model(joined, ir_version=max(g.model.ir_version for g in program.graphs.values()))
    folder = program.graphs[program.order[0]].source.parent
    return Joined(_info(program, model), model, folder, _metadata(program), program=program)


def _counted(
    program: Program, outputs: Sequence[tuple[str, str]], read: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Outputs that count; all, where the metadata would leave no final one."""
    named = {name: json.loads(g.metadata.get(HEADS, "[]")) for name, g in program.graphs.items()}
    found = {(name, t) for name, t in outputs if not named[name] or t in named[name]}
    return found if found - set(read) else set(outputs)


def _metadata(program: Program) -> Mapping[str, str]:
    """What all graphs say: heads under their names in the whole, protected parts of all, else the first that speaks."""
    found: dict[str, str] = {}
    for part in program.graphs.values():
        found = {**part.metadata, **found}
    heads = [
        program.names[name, t]
        for name, part in program.graphs.items()
        for t in json.loads(part.metadata.get(HEADS, "[]"))
        if (name, t) in program.names
    ]
    kept = [p for part in program.graphs.values() for p in json.loads(part.metadata.get(PROTECT, "[]"))]
    protect = list({json.dumps(p, sort_keys=True): p for p in kept}.values())
    return {**found, HEADS: json.dumps(heads), PROTECT: json.dumps(protect)}


def divide(model: ir.Model, program: Program) -> dict[str, ir.Model]:
    """One model per graph out of a joined model that was rewritten since.

    1. A node goes to the graph that its name starts with.
    2. Rounding goes to the graph that reads its result; so tensors on wires stay float32, and a consumer in INT8 or
       FP16 rounds what the wire brings itself.
    3. Rounding that a producer's own unit asks for goes to its graph as well, so that the producer can run in
       INT8 too. Rounding twice on the same scale changes nothing.
    4. What is made in FP16 leaves its graph through a Cast back: wires, outputs and caches stay float32.

    Inputs and outputs are those of the program's graphs: names, types, shapes and order.

    Args:
        model: from `join`, perhaps rewritten by `bitalloy.apply`; not changed.
        program: which was joined.

    Raises:
        ModelError: the model was not made from this program.
    """
    return {name: _part(model.clone(), program, name) for name in program.graphs}


def _part(model: ir.Model, program: Program, name: str) -> ir.Model:
    original = program.graphs[name].model.graph
    values = {str(v.name): v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
    values.update({str(v.name): v for v in model.graph.outputs})

    def joined(owner: str, tensor: str) -> ir.Value:
        found = values.get(program.names.get((owner, tensor), f"{owner}/{tensor}"))
        if found is None:
            raise ModelError(f"The model has no tensor '{owner}/{tensor}': it was not made from this program.")
        return found

    fresh = namer(model)
    plain = [joined(name, str(v.name)) for v in original.outputs]
    ends = [_leaving(model.graph, value, fresh) for value in plain]
    for value, end in zip(plain, ends, strict=True):
        if end is not value:  # the name belongs to what leaves
            value.name = fresh(f"{value.name}/{'float' if is_float(value) else 'half'}")
    wires = {w.input: w for w in program.wires if w.target == name}
    starts: list[ir.Value] = []
    for value in original.inputs:
        wire = wires.get(str(value.name))
        if wire is None:
            starts.append(joined(name, str(value.name)))
            continue
        start = ir.Value(name=value.name, shape=value.shape, type=value.type)
        _arrive(model.graph, start, _unrounded(joined(wire.source, wire.output)), (None, name), program, fresh)
        starts.append(start)
    kept = _behind(ends, program, name)
    nodes = [n for n in model.graph if n in kept]
    weights = [v for v in model.graph.initializers.values() if any(c.node in kept for c in consumers(v))]
    model.graph.inputs.clear()
    model.graph.outputs.clear()
    model.graph.initializers.clear()
    model.graph.remove(list(model.graph))
    for value, source in zip((*starts, *ends), (*original.inputs, *original.outputs), strict=True):
        value.name, value.shape, value.type = source.name, source.shape, source.type
    _strip(nodes, weights, {str(v.name) for v in (*starts, *ends)}, f"{name}/")
    part = ir.Graph(
        starts, ends, nodes=nodes, initializers=weights, opset_imports=dict(model.graph.opset_imports), name=name
    )
    return ir.Model(part, ir_version=model.ir_version)


def _leaving(graph: ir.Graph, value: ir.Value, fresh: Fresh) -> ir.Value:
    """The value as its own unit rounds it, where it does; of one in FP16 the float32 that it is cast back to."""
    for use in consumers(value):
        if use.node.op_type == "QuantizeLinear" and use.node.metadata_props.get(TAG, BORDER) != BORDER:
            for after in consumers(use.node.outputs[0]):
                return after.node.outputs[0]
        if not is_float(value) and is_border(use.node):
            return use.node.outputs[0]
    return value if value.dtype != HALF else cast(graph, value, SINGLE, fresh(f"{value.name}/single"))


def _arrive(
    graph: ir.Graph,
    start: ir.Value,
    value: ir.Value,
    owners: Collection[str | None],
    program: Program,
    fresh: Fresh,
) -> None:
    """Let those nodes that belong to `owners` read `start` in place of `value`, in the type in which they read that."""
    half: ir.Value | None = None
    for use in consumers(value):
        if value.dtype == HALF and is_border(use.node):
            _arrive(graph, start, use.node.outputs[0], owners, program, fresh)
        elif _owner(use.node, program) in owners:
            if value.dtype == HALF and half is None:
                half = cast(graph, start, HALF, fresh(f"{start.name}/half"))
            use.node.replace_input_with(use.slot, start if half is None else half)


def _unrounded(value: ir.Value) -> ir.Value:
    """What was rounded, where the value is the result of rounding."""
    node = value.producer()
    while node is not None and _rounds(node) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _rounds(node: ir.Node) -> bool:
    return node.op_type in ROUNDING or is_border(node)


def _owner(node: ir.Node, program: Program) -> str | None:
    """Graph that a node belongs to; None for rounding, which belongs to whoever reads it."""
    if _rounds(node):
        return None
    owner = name_of(node).partition("/")[0]
    if owner not in program.graphs:
        raise ModelError(f"Node '{node.name}' belongs to no graph of the program: the model was not made from it.")
    return owner


def _behind(ends: Sequence[ir.Value], program: Program, name: str) -> set[ir.Node]:
    """Nodes that the outputs of one graph need, up to its inputs."""
    found: set[ir.Node] = set()
    left = [v.producer() for v in ends]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        if _owner(node, program) not in (None, name):
            raise ModelError(f"Graph '{name}' reads '{node.name}' beside its wires: the model was not made by `join`.")
        found.add(node)
        left += [v.producer() for v in node.inputs if v is not None]
    return found


def _strip(nodes: Sequence[ir.Node], weights: Sequence[ir.Value], taken: set[str], prefix: str) -> None:
    """Give nodes and tensors the names that they have in their own graph."""
    for value in (*weights, *(v for n in nodes for v in n.outputs)):
        short = str(value.name).removeprefix(prefix)
        if value.name and value.name not in taken and short not in taken:
            _rename(value, short)
        taken.add(str(value.name))
    for node in nodes:
        node.name = name_of(node).removeprefix(prefix)


def _rename(value: ir.Value, name: str) -> None:
    """Rename a tensor that no graph holds; a constant shares its memory, but not its name, with other models."""
    tensor, value.const_value = value.const_value, None
    value.name = name
    if tensor is not None:
        value.const_value = ir.Tensor(
            tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )


def _info(program: Program, model: ir.Model) -> ModelInfo:
    digest = hashlib.sha256()
    for name, part in program.graphs.items():
        digest.update(f"{name}\0{part.info.sha256}\0".encode())
    for wire in sorted(program.wires):
        digest.update(f"{wire}\0".encode())
    parts = [g.info for g in program.graphs.values()]
    inputs, outputs = (
        tuple(TensorSpec(name=str(v.name), dtype=v.dtype.name, shape=static_shape(v)) for v in values if v.dtype)
        for values in (model.graph.inputs, model.graph.outputs)
    )
    return ModelInfo(
        name="+".join(program.graphs),
        sha256=digest.hexdigest(),
        size_bytes=sum(p.size_bytes for p in parts),
        opset=parts[0].opset,
        nodes=len(model.graph),
        parameters=sum(p.parameters for p in parts),
        inputs=inputs,
        outputs=outputs,
    )
