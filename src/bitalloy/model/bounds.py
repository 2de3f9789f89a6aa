"""The memory that a model takes at least, from the sizes that its file declares, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.core.limits import refuse_beyond
from bitalloy.model.read import static_shape

_SHOWN = 80
"""Characters of a name that a message repeats."""


def refuse_declared(proto: onnx.ModelProto) -> None:
    """Refuse a file whose inputs, or tensors of inferred shapes, are larger than memory; unknown sizes count as none.

    Raises:
        ModelError: one is larger.
    """
    _refuse_values(proto.graph.input)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # of several types, which whatever reads the shapes next tells better
        return
    _refuse_values([*inferred.graph.value_info, *inferred.graph.output])


def refuse_inputs(proto: onnx.ModelProto) -> None:
    """Refuse a file whose inputs are larger than memory.

    Raises:
        ModelError: one is larger.
    """
    _refuse_values(proto.graph.input)


def _refuse_values(values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type in onnx.TensorProto.DataType.values() and kind.HasField("shape"):
            sizes = [max(dim.dim_value, 0) for dim in kind.shape.dim]
            _refuse(value.name, sizes, ir.DataType(kind.elem_type))


def refuse_tensors(model: ir.Model) -> None:
    """Refuse a model with a tensor that is larger than memory, as far as shapes are known.

    Raises:
        ModelError: it has one.
    """
    for node in model.graph:
        for value in node.outputs:
            if _bytes(value):
                assert value.shape is not None and value.dtype is not None, "its size is known"
                _refuse(f"{value.name}' of node '{node.name}", list(static_shape(value)), value.dtype)


def refuse_inference(model: ir.Model) -> None:
    """Refuse a model that takes more memory than there is to run once, weights left out.

    Every tensor is held from the node that makes it to the last one that reads it, in the order of the file.

    Raises:
        ModelError: it takes more.
    """
    nodes = list(model.graph)
    last: dict[ir.Value, int] = {}
    for at, node in enumerate(nodes):
        for read in node.inputs:
            if read is not None:
                last[read] = at
    kept = {*model.graph.outputs, *model.graph.inputs}
    held: int = sum(map(_bytes, model.graph.inputs))
    most = held
    where = "its inputs"
    for at, node in enumerate(nodes):
        held += sum(map(_bytes, node.outputs))
        if held > most:
            most, where = held, f"node '{str(node.name)[:_SHOWN]}' ({node.op_type})"
        ended = {v for v in (*node.inputs, *node.outputs) if v is not None and v not in kept and last.get(v, at) == at}
        held -= sum(_bytes(v) for v in ended if v.producer() is not None)
    refuse_beyond(most, f"To run the model once, tensors must be held at {where}", ModelError)


def _bytes(value: ir.Value) -> int:
    """Bytes of a tensor; 0 where its shape or type is not known."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return 0
    if value.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        return 0
    return max(math.prod(static_shape(value)) * value.dtype.bitwidth // 8, 0)


def _refuse(name: str, sizes: list[int], kind: ir.DataType) -> None:
    width = 0 if kind in (ir.DataType.UNDEFINED, ir.DataType.STRING) else kind.bitwidth
    refuse_beyond(math.prod(sizes) * width // 8, f"The tensor '{name[:_SHOWN]}' has the sizes {sizes}", ModelError)
