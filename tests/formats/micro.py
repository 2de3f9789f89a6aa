"""Small models, one per numbered case of a target, and a readable text form of a rewritten model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from bitalloy.graph import Graph, load

Node = tuple[str, Sequence[str], str, Mapping[str, object]]
"""Operator, inputs, output, attributes. The node is named after its output."""


def build(
    path: Path,
    nodes: Sequence[Node],
    inputs: Mapping[str, Sequence[int]],
    output: tuple[str, Sequence[int]],
    weights: Mapping[str, Sequence[int] | np.ndarray],
) -> Graph:
    """A model in normal form; weights given by shape are drawn from a fixed seed."""
    rng = np.random.default_rng(4)
    arrays = {
        name: given if isinstance(given, np.ndarray) else rng.standard_normal(given) * 0.3
        for name, given in weights.items()
    }
    graph = helper.make_graph(
        [helper.make_node(op, list(read), [made], name=made, **kept) for op, read, made, kept in nodes],
        "micro",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, list(output[1]))],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return load(path)


def text_of(model: ir.Model) -> str:
    """One line per node, `output:type = operator(inputs)`; constants by type and shape, without scales.

    Types: f32, f16, i8, u8, i32. A pair of QuantizeLinear and DequantizeLinear shows as `Q` and `DQ`.
    """
    short = {"FLOAT": "f32", "FLOAT16": "f16", "INT8": "i8", "UINT8": "u8", "INT32": "i32", "INT64": "i64"}

    def kind(value: ir.Value) -> str:
        return short.get(value.dtype.name, value.dtype.name) if value.dtype is not None else ""

    def show(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value.is_initializer() and value.shape is not None:
            return f"const {kind(value)}[{','.join(str(d) for d in value.shape)}]"
        return str(value.name)

    lines = [f"input {v.name}:{kind(v)}" for v in model.graph.inputs]
    for node in model.graph:
        op = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}.get(node.op_type, node.op_type)
        given = node.inputs[:1] if op in ("Q", "DQ") else node.inputs
        per = " per channel" if "axis" in node.attributes and op == "DQ" else ""
        made = node.outputs[0]
        type_ = kind(node.inputs[2]) if op == "Q" else "f32" if op == "DQ" else kind(made)  # type: ignore[arg-type]
        lines.append(f"{made.name}:{type_} = {op}({', '.join(show(v) for v in given)}){per}")
    lines += [f"output {v.name}:{kind(v)}" for v in model.graph.outputs]
    return "\n".join(lines) + "\n"
