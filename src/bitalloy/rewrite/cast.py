"""Nodes that compute in another floating-point format, and how a runtime without its kernels gives the same numbers."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.metadata import BORDER, SOURCE, TAG
from bitalloy.model.read import constant, consumers, is_float, name_of
from bitalloy.model.write import Fresh, add_initializer, insert_behind, namer

LOWER_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types that nodes compute in where a plan says so."""


def lower(model: ir.Model, names: Collection[str], kind: ir.DataType, fresh: Fresh) -> None:
    """Let nodes compute in a format; everything else, inputs and outputs of the model included, stays as it is.

    Case 1. A float tensor from elsewhere: one Cast, shared by all these nodes.
    Case 2. A constant: an initializer in the format, shared likewise; `ops.full_slots` stay float32. A constant that is
            stored in a third format: its scales become numbers of this one, and so does what DequantizeLinear makes.
    Case 3. A tensor that such a node makes: in the format, with one Cast back for all readers outside.
    Case 4. The same where it is an output of the model: the Cast back takes its name.

    Args:
        model: the model that is changed.
        names: the names of the nodes, whose operators all compute in the format.
        kind: the format, as a type of ONNX.
        fresh: makes names for the new tensors.
    """
    graph = model.graph
    nodes = [n for n in graph if n.name in names]
    inside = set(nodes)
    lowered: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for slot, value in enumerate(node.inputs):
            if (reader := stored_reader(value)) is not None:
                _read_in(graph, reader, kind, fresh)
                continue
            if value is None or not is_float(value) or slot in ops.full_slots(node.op_type):
                continue
            producer = value.producer()
            if producer in inside:
                continue
            if value not in lowered:
                array = constant(value)
                if array is not None:
                    lowered[value] = add_initializer(graph, fresh(f"{value.name}/half"), array.astype(kind.numpy()))
                    lowered[value].meta[SOURCE] = (str(value.name), kind.name)
                else:
                    lowered[value] = cast(graph, value, kind, fresh(f"{value.name}/half"))
            node.replace_input_with(slot, lowered[value])
    for node in nodes:
        for value in list(node.outputs):
            if not is_float(value):
                continue
            outside = [
                use
                for use in consumers(value)
                if use.node not in inside or use.slot in ops.full_slots(use.node.op_type)
            ]
            value.type = ir.TensorType(kind)
            if not outside and not value.is_graph_output():
                continue
            back = cast(graph, value, ir.DataType.FLOAT, fresh(f"{value.name}/single"))
            for use in outside:
                use.node.replace_input_with(use.slot, back)
            if value.is_graph_output():
                graph.outputs[list(graph.outputs).index(value)] = back
                value.name, back.name = fresh(f"{value.name}/half"), value.name


def stored_reader(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that reads a stored constant; None for any other tensor."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in ops.ROUNDING and constant(node.inputs[0]) is not None else None


def _read_in(graph: ir.Graph, reader: ir.Node, kind: ir.DataType, fresh: Fresh) -> None:
    """Let a DequantizeLinear make numbers of a format, which its scales tell; they are such numbers already."""
    scale = constant(reader.inputs[1])
    assert scale is not None, "a stored constant has constant scales"
    if scale.dtype != kind.numpy():
        reader.replace_input_with(1, add_initializer(graph, fresh(f"{reader.name}/scale"), scale.astype(kind.numpy())))
    reader.outputs[0].type = ir.TensorType(kind)


def as_specified(model: ir.Model) -> ir.Model:
    """Copy a model so that it computes in float32 and rounds what nodes of another format make to that format.

    ONNX Runtime has no such kernels on most CPUs. It computes in float32 there and drops the roundings between
    neighbours, so that a model runs more exactly than its graph says. In the copy each rounding is a pair of Cast
    nodes of its own. Weights in such a format are widened as they are used, which changes no number: none is copied.
    """
    copy = model.clone()
    graph = copy.graph
    fresh = namer(copy)
    wide: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Cast":
            continue
        for slot, value in enumerate(node.inputs):
            if value is None or value.dtype not in LOWER_TYPES:
                continue
            if value not in wide:
                wide[value] = cast(graph, value, ir.DataType.FLOAT, fresh(f"{value.name}/wide"))
            node.replace_input_with(slot, wide[value])
        for value in node.outputs:
            kind = value.dtype
            if kind not in LOWER_TYPES:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            uses = consumers(value)
            rounded = cast(graph, value, kind, fresh(f"{value.name}/rounded"))
            for use in uses:
                use.node.replace_input_with(use.slot, rounded)
    return copy


def computing_nodes(model: ir.Model) -> dict[ir.DataType, frozenset[str]]:
    """Map each type other than float32 that nodes compute in to the names of these nodes."""
    found: dict[ir.DataType, set[str]] = {}
    for node in model.graph:
        for value in () if is_border(node) or node.op_type in ops.ROUNDING else node.outputs:
            if value.dtype in LOWER_TYPES:
                found.setdefault(value.dtype, set()).add(name_of(node))
    return {kind: frozenset(names) for kind, names in found.items()}


def is_border(node: ir.Node) -> bool:
    """Tell whether a node is a Cast between floating-point formats that `lower` put there."""
    return node.op_type == "Cast" and node.metadata_props.get(TAG) == BORDER


def cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """Convert a tensor to another floating-point type, by a Cast behind what makes it."""
    node = ir.node("Cast", [value], {"to": int(to)}, name=f"{name}/Cast")
    node.metadata_props[TAG] = BORDER
    result = node.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(to), value.shape
    insert_behind(graph, value.producer(), [node])
    return result
