"""FP16 in a graph: nodes that run in it, and what a runtime without FP16 kernels must do to give the same numbers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.metadata import BORDER, TAG
from bitalloy.model.read import constant, consumers, is_float, name_of
from bitalloy.model.write import Fresh, add_initializer, insert_behind, namer


def halve(model: ir.Model, names: Collection[str], fresh: Fresh) -> None:
    """Let nodes run in FP16; everything else, inputs and outputs of the model included, stays as it is.

    Case 1. A float tensor from elsewhere: one Cast, shared by all these nodes.
    Case 2. A constant: a half initializer, shared likewise; `ops.full_slots` stay float32.
    Case 3. A tensor that such a node makes: FP16, with one Cast back for all readers outside.
    Case 4. The same where it is an output of the model: the Cast back takes its name.

    Args:
        model: to be changed.
        names: of the nodes, whose operators are all among `ops.LOWERABLE`.
        fresh: for the new tensors.
    """
    graph = model.graph
    nodes = [n for n in graph if n.name in names]
    inside = set(nodes)
    lowered: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for slot, value in enumerate(node.inputs):
            if value is None or not is_float(value) or slot in ops.full_slots(node.op_type):
                continue
            producer = value.producer()
            if producer in inside:
                continue
            if value not in lowered:
                array = constant(value)
                if array is not None:
                    lowered[value] = add_initializer(graph, fresh(f"{value.name}/half"), array.astype(np.float16))
                else:
                    lowered[value] = cast(graph, value, ir.DataType.FLOAT16, fresh(f"{value.name}/half"))
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
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            if not outside and not value.is_graph_output():
                continue
            back = cast(graph, value, ir.DataType.FLOAT, fresh(f"{value.name}/single"))
            for use in outside:
                use.node.replace_input_with(use.slot, back)
            if value.is_graph_output():
                graph.outputs[list(graph.outputs).index(value)] = back
                value.name, back.name = fresh(f"{value.name}/half"), value.name


def specified(model: ir.Model) -> ir.Model:
    """A copy that computes in float32 and rounds what FP16 nodes make to FP16, one by one.

    ONNX Runtime has no FP16 kernels on most CPUs. It computes in float32 there and drops the roundings between
    neighbours, so that a model runs more exactly than its graph says. In the copy each rounding is a pair of Cast
    nodes of its own. Weights in FP16 are widened as they are used, which changes no number: no copy of them is kept.
    """
    copy = model.clone()
    graph = copy.graph
    fresh = namer(copy)
    wide: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Cast":
            continue
        for slot, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT16:
                continue
            if value not in wide:
                wide[value] = cast(graph, value, ir.DataType.FLOAT, fresh(f"{value.name}/wide"))
            node.replace_input_with(slot, wide[value])
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT16:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            uses = consumers(value)
            rounded = cast(graph, value, ir.DataType.FLOAT16, fresh(f"{value.name}/rounded"))
            for use in uses:
                use.node.replace_input_with(use.slot, rounded)
    return copy


def computed(model: ir.Model) -> frozenset[str]:
    """Names of the nodes that run in FP16."""
    made = ((n, v) for n in model.graph for v in n.outputs if not is_border(n))
    return frozenset(name_of(n) for n, v in made if v.dtype == ir.DataType.FLOAT16)


def is_border(node: ir.Node) -> bool:
    """Whether a node is a Cast between FP32 and FP16 that `halve` put there."""
    return node.op_type == "Cast" and node.metadata_props.get(TAG) == BORDER


def cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """A tensor in another floating-point type, by a Cast behind what makes it."""
    node = ir.node("Cast", [value], {"to": int(to)}, name=f"{name}/Cast")
    node.metadata_props[TAG] = BORDER
    result = node.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(to), value.shape
    insert_behind(graph, value.producer(), [node])
    return result
