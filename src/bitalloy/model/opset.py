"""Raise the version of the ONNX operators of a graph, so that it can store formats of later versions.

Case 1. The operator has the same inputs and attributes in both versions, perhaps with further optional ones: it stays.
Case 2. A reduction whose axes are an attribute in the old version and an input in the new one: they become a constant.
Case 3. Split into equal parts: the new version asks for their number.
Case 4. Anything else is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from bitalloy.core.errors import ModelError
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute
from bitalloy.model.write import namer

CHANGED = frozenset({"DFT", "GridSample", "GroupNormalization", "RoiAlign"})
"""Operators that mean something else from some version on, though they take the same inputs and attributes: other names
of modes, other defaults, or parameters of another shape."""


def raised_graph(graph: Graph, least: int) -> Graph:
    """Return a graph with at least a version of the ONNX operators; the graph itself where it has that already.

    Raises:
        ModelError: for the reasons that `raise_opset` gives.
    """
    if int(graph.model.opset_imports[""]) >= least:
        return graph
    model = graph.clone()
    raise_opset(model, least)
    return replace(graph, model=model)


def raise_opset(model: ir.Model, least: int) -> None:
    """Bring a model, in place, to at least a version of the ONNX operators.

    Args:
        model: a model in normal form.
        least: least version; a model of a later version stays as it is.

    Raises:
        ModelError: an operator changed in between in a way that is not known here.
    """
    before = int(model.opset_imports[""])
    if before >= least:
        return
    fresh = namer(model)
    for node in list(model.graph):
        if node.domain:
            continue
        old, new = (onnx.defs.get_schema(node.op_type, version, "") for version in (before, least))
        if old.since_version == new.since_version:
            continue
        if node.op_type.startswith("Reduce") and "axes" in node.attributes and "axes" not in new.attributes:
            axes = np.array(attribute(node, "axes", ()), np.int64)
            del node.attributes["axes"]
            name = fresh(f"{node.name}/axes")
            value = ir.Value(name=name, const_value=ir.tensor(axes, name=name), shape=ir.Shape(axes.shape))
            value.type = ir.TensorType(ir.DataType.INT64)
            model.graph.register_initializer(value)
            node.resize_inputs(2)
            node.replace_input_with(1, value)
        elif node.op_type == "Split" and len([v for v in node.inputs if v is not None]) == 1:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        elif not _extends(old, new, node):
            raise ModelError(
                f"'{node.name}' ({node.op_type}) means something else in opset {least}, which the plan's formats need, "
                f"than in the model's {before}. Export the model with opset {least} or later."
            )
    model.opset_imports[""] = least
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for([helper.make_opsetid("", least)]))


def _extends(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema, node: ir.Node) -> bool:
    """Whether a newer form of an operator takes all that the older one takes, and means the same where it does."""
    if old.name in CHANGED or not set(node.attributes) <= set(new.attributes) or len(node.outputs) > new.max_output:
        return False
    required = {name for name, a in new.attributes.items() if a.required}
    if not required <= set(old.attributes):
        return False
    before, after = ([i.name.removeprefix("input_") for i in schema.inputs] for schema in (old, new))
    return after[: len(before)] == before and new.min_input <= len(before)
