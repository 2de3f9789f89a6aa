"""Constant parts of a model: nodes whose inputs are all known are evaluated when the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.read import attribute, constant, consumers, read_values, static_shape
from bitalloy.model.weights import LENT_BYTES

MAX_FOLDED_ELEMENTS = 1 << 24


def fold_constants(model: ir.Model) -> bool:
    """Evaluate, in ONNX Runtime, every node whose inputs are all known; True where anything changed."""
    graph = model.graph
    stored = frozenset(graph.initializers.values())
    known: set[ir.Value] = set(stored)
    folded: list[ir.Node] = []
    for node in graph:
        # what grows to a size that is not inferred yet waits until the constants that say it are there to be inferred
        waits = ops.sized_by(node.op_type) and not _sized(node) and not stored.issuperset(read_values(node))
        if (_asks_shape(node) or all(v in known for v in read_values(node))) and _small(node) and not waits:
            folded.append(node)
            known.update(node.outputs)
    if not folded:
        return False
    inside = set(folded)
    wanted = [
        v for n in folded for v in n.outputs if v in graph.outputs or any(c.node not in inside for c in consumers(v))
    ]
    arrays = _evaluate(model, folded)
    for value in wanted:
        if value in graph.outputs:
            raise ModelError(
                f"Output '{value.name}' does not depend on any input: there is nothing to analyse in it. "
                "Export the model without this output."
            )
        name, array = str(value.name), arrays[str(value.name)]
        new = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        new.shape, new.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        ir.convenience.replace_all_uses_with(value, new)
        value.name = f"{name}/folded"
        graph.register_initializer(new)
    for node in reversed(folded):
        graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    return True


def _asks_shape(node: ir.Node) -> bool:
    """Whether a node only reads the shape of a tensor whose shape is known."""
    if node.op_type not in ops.SHAPE_READERS:
        return False
    shape = first_input(node).shape
    return shape is not None and shape.is_static()


def _sized(node: ir.Node) -> bool:
    return all(v.shape is not None and v.shape.is_static() for v in node.outputs)


def _small(node: ir.Node) -> bool:
    sizes = [int(np.prod(v.shape.numpy())) for v in node.outputs if v.shape is not None and v.shape.is_static()]
    return node.op_type == "Cast" or all(s <= MAX_FOLDED_ELEMENTS for s in sizes)


def _evaluate(model: ir.Model, nodes: list[ir.Node]) -> Mapping[str, np.ndarray]:
    """Results of a closed set of nodes by tensor name; Shape and Size need no data, only static shapes."""
    known: dict[str, np.ndarray] = {}
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.graph.name = "constants"
    for node in nodes:
        if _asks_shape(node):
            shape = np.array(static_shape(first_input(node)), np.int64)
            start, end = attribute(node, "start", 0), attribute(node, "end", None)
            asked = shape[start:end] if node.op_type == "Shape" else np.prod(shape, dtype=np.int64)
            known[str(node.outputs[0].name)] = np.asarray(asked, np.int64)
            continue
        proto.graph.node.append(ir.serde.serialize_node(node))
        known.update({str(v.name): a for v in read_values(node) if (a := constant(v)) is not None})
        proto.graph.output.extend(onnx.ValueInfoProto(name=v.name) for v in node.outputs if v.name)
    if not proto.graph.node:
        return known
    used = {str(v.name) for node in nodes for v in read_values(node)}
    fed = {name: array for name, array in known.items() if name in used and array.nbytes >= LENT_BYTES}
    proto.graph.initializer.extend(
        ir.serde.serialize_tensor(ir.tensor(array, name=name))
        for name, array in known.items()
        if name in used and name not in fed
    )
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in fed.items()
    )
    names = [o.name for o in proto.graph.output]
    try:
        results = session(proto).run(names, fed)
    except Exception as error:  # ORT raises a dozen unrelated types from its C++ border
        raise ModelError(f"The constant part of the model cannot be evaluated: {error}") from error
    return {**known, **dict(zip(names, (np.asarray(r) for r in results), strict=True))}


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    """Open a model in ONNX Runtime without its warnings."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def first_input(node: ir.Node) -> ir.Value:
    """Return the first input of a node, which must have it."""
    value = node.inputs[0] if node.inputs else None
    if value is None:
        raise ModelError(f"Node '{node.name}' ({node.op_type}) has no first input. The file is damaged.")
    return value
