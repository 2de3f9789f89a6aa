"""Joining of the graphs of a program to one graph; `bitalloy.rewrite.divide` takes it apart again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from bitalloy.core.records import ModelInfo, TensorSpec
from bitalloy.model.graphs.wiring import GraphProgram
from bitalloy.model.load import Graph, load_open
from bitalloy.model.metadata import HEADS, PROTECT, read_fact
from bitalloy.model.read import static_shape


@dataclass(frozen=True)
class Joined(Graph):
    """The graphs of a program as one; `divide` takes it apart again."""

    program: GraphProgram = field(kw_only=True)
    inner: bool = field(default=False, kw_only=True)
    """Whether outputs that a wire carries on are outputs of the whole too."""

    @cached_property
    def opened(self) -> Mapping[str, ir.Model]:
        """The graphs whose files leave sizes open, with these sizes open. Clone them to rewrite them."""
        found = {name: load_open(part.source) for name, part in self.program.graphs.items()}
        return {
            name: model
            for name, model in found.items()
            if any(v.shape is None or not v.shape.is_static() for v in model.graph.inputs)
        }


def join(program: GraphProgram, *, inner: bool = False) -> Joined:
    """Build one graph that computes what the wired graphs compute.

    Names of nodes and tensors get their graph's name in front (`encoder/...`), those of free inputs and outputs
    only where they would clash. Weights are shared with the parts.

    Args:
        program: the wired graphs; they are not changed.
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
                rename(value, f"{name}/{value.name}")
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
    return Joined(_info(program, model), model, folder, _metadata(program), program=program, inner=inner)


def _counted(
    program: GraphProgram, outputs: Sequence[tuple[str, str]], read: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Outputs that count; all, where the metadata would leave no final one."""
    named = {name: read_fact(g.metadata, HEADS, list[str], []) for name, g in program.graphs.items()}
    found = {(name, t) for name, t in outputs if not named[name] or t in named[name]}
    return found if found - set(read) else set(outputs)


def _metadata(program: GraphProgram) -> Mapping[str, str]:
    """What all graphs say: heads under their names in the whole, protected parts of all, else the first that speaks."""
    found: dict[str, str] = {}
    for part in program.graphs.values():
        found = {**part.metadata, **found}
    heads = [
        program.names[name, t]
        for name, part in program.graphs.items()
        for t in read_fact(part.metadata, HEADS, list[str], [])
        if (name, t) in program.names
    ]
    kept = [p for part in program.graphs.values() for p in read_fact(part.metadata, PROTECT, list[dict[str, str]], [])]
    protect = list({json.dumps(p, sort_keys=True): p for p in kept}.values())
    return {**found, HEADS: json.dumps(heads), PROTECT: json.dumps(protect)}


def rename(value: ir.Value, name: str) -> None:
    """Rename a tensor that no graph holds; a constant shares its memory, but not its name, with other models."""
    tensor, value.const_value = value.const_value, None
    value.name = name
    if tensor is not None:
        value.const_value = ir.Tensor(
            tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )


def _info(program: GraphProgram, model: ir.Model) -> ModelInfo:
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
