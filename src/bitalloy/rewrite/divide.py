"""One model for each graph of a program, out of a joined model that was rewritten since."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.graphs.joining import rename
from bitalloy.model.graphs.wiring import GraphProgram
from bitalloy.model.metadata import BORDER, TAG
from bitalloy.model.read import consumers, is_float, name_of
from bitalloy.model.write import Fresh, namer
from bitalloy.rewrite.cast import LOWER_TYPES, cast, is_border


def divide(model: ir.Model, program: GraphProgram) -> dict[str, ir.Model]:
    """Take a joined model that was rewritten apart into one model per graph.

    1. A node goes to the graph that its name starts with.
    2. Rounding goes to the graph that reads its result; so tensors on wires stay float32, and a consumer in INT8 or
       FP16 rounds what the wire brings itself.
    3. Rounding that a producer's own unit asks for goes to its graph as well, so that the producer can run in
       INT8 too. Rounding twice on the same scale changes nothing.
    4. What is made in FP16 leaves its graph through a Cast back: wires, outputs and caches stay float32.

    Inputs and outputs are those of the program's graphs: names, types, shapes and order.

    Args:
        model: from `join`, perhaps rewritten by `bitalloy.rewrite.apply`; not changed.
        program: which was joined.

    Raises:
        ModelError: the model was not made from this program.
    """
    return {name: _part(model.clone(), program, name) for name in program.graphs}


def _part(model: ir.Model, program: GraphProgram, name: str) -> ir.Model:
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
    """Find the value as its own unit rounds it, where it does; of one in a lower type the float32 behind its Cast."""
    for use in consumers(value):
        if use.node.op_type == "QuantizeLinear" and use.node.metadata_props.get(TAG, BORDER) != BORDER:
            for after in consumers(use.node.outputs[0]):
                return after.node.outputs[0]
        if not is_float(value) and is_border(use.node):
            return use.node.outputs[0]
    if value.dtype not in LOWER_TYPES:
        return value
    return cast(graph, value, ir.DataType.FLOAT, fresh(f"{value.name}/single"))


def _arrive(
    graph: ir.Graph,
    start: ir.Value,
    value: ir.Value,
    owners: Collection[str | None],
    program: GraphProgram,
    fresh: Fresh,
) -> None:
    """Let those nodes that belong to `owners` read `start` in place of `value`, in the type in which they read that."""
    lower: ir.Value | None = None
    for use in consumers(value):
        if value.dtype in LOWER_TYPES and is_border(use.node):
            _arrive(graph, start, use.node.outputs[0], owners, program, fresh)
        elif _owner(use.node, program) in owners:
            if value.dtype in LOWER_TYPES and lower is None:
                lower = cast(graph, start, value.dtype, fresh(f"{start.name}/half"))
            use.node.replace_input_with(use.slot, start if lower is None else lower)


def _unrounded(value: ir.Value) -> ir.Value:
    """Find what was rounded, where the value is the result of rounding."""
    node = value.producer()
    while node is not None and _rounds(node) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _rounds(node: ir.Node) -> bool:
    return node.op_type in ops.ROUNDING or is_border(node)


def _owner(node: ir.Node, program: GraphProgram) -> str | None:
    """Find the graph that a node belongs to; None for rounding, which belongs to whoever reads it."""
    if _rounds(node):
        return None
    owner = name_of(node).partition("/")[0]
    if owner not in program.graphs:
        raise ModelError(f"Node '{node.name}' belongs to no graph of the program: the model was not made from it.")
    return owner


def _behind(ends: Sequence[ir.Value], program: GraphProgram, name: str) -> set[ir.Node]:
    """List the nodes that the outputs of one graph need, up to its inputs."""
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
            rename(value, short)
        taken.add(str(value.name))
    for node in nodes:
        node.name = name_of(node).removeprefix(prefix)
