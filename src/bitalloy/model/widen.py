"""Models that compute in half precision or double, as models of float32 with the same inputs and outputs.

Case 1. Constants of these types become float32, those that nodes hold as well.
Case 2. A Cast to such a type becomes one to float32; so does a type that an operator is asked to make.
Case 3. An input of such a type stays as it is, and is cast behind; an output is cast in front.

A weight that is stored in half precision and read by a Cast alone is left to the normal form, which widens it, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

WIDENED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
"""Types of floating-point numbers that are analysed as float32."""
_ASKED = frozenset({"to", "dtype", "output_dtype", "stash_type"})
"""Attributes that name a type."""


def widened(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model in float32; None where it computes in nothing else.

    Args:
        proto: the model with its weights; not changed.
    """
    if not computes_narrow(proto.graph):
        return None
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    for tensor in _constants(graph):
        if tensor.data_type in WIDENED:
            tensor.CopyFrom(numpy_helper.from_array(_float32(tensor), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _ASKED and attribute.i in WIDENED:
                attribute.i = TensorProto.FLOAT
    del graph.value_info[:]
    weights = {t.name for t in graph.initializer}
    for value in graph.input:
        if value.name in weights and value.type.tensor_type.elem_type in WIDENED:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    renamed, before = {}, []
    for value in graph.input:
        if value.name not in weights and value.type.tensor_type.elem_type in WIDENED:
            renamed[value.name] = inner = _free(f"{value.name}/float", graph)
            before.append(helper.make_node("Cast", [value.name], [inner], f"{inner}/Cast", to=TensorProto.FLOAT))
    after = []
    for value in graph.output:
        kind = value.type.tensor_type.elem_type
        if kind in WIDENED:
            inner = _free(f"{value.name}/float", graph)
            after.append(helper.make_node("Cast", [inner], [value.name], f"{inner}/Cast", to=kind))
            renamed[value.name] = inner
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    nodes = [*before, *(onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node), *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return made


def computes_narrow(graph: onnx.GraphProto) -> bool:
    """Tell whether a graph computes anything in the types of `WIDENED`."""
    if any(v.type.tensor_type.elem_type in WIDENED for v in (*graph.input, *graph.output)):
        return True
    stored = {t.name for t in graph.initializer if t.data_type in WIDENED}
    for node in graph.node:
        asked = any(a.name in _ASKED - {"stash_type"} and a.i in WIDENED for a in node.attribute)
        held = any(a.HasField("t") and a.t.data_type in WIDENED for a in node.attribute)
        if asked or held or (node.op_type != "Cast" and stored.intersection(node.input)):
            return True
    return False


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from (a.t for a in node.attribute if a.HasField("t"))


def _float32(tensor: onnx.TensorProto) -> np.ndarray:
    with np.errstate(over="ignore"):  # what leaves float32 is refused as infinite
        return np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)


def _free(name: str, graph: onnx.GraphProto) -> str:
    taken = {n for node in graph.node for n in (*node.input, *node.output)}
    while name in taken:
        name += "'"
    return name
