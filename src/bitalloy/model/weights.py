"""Large weights, which are mapped from the user's file, lent to the runtime and written back, but never copied.

A protobuf message ends at 2 GB, and a session copies (and repacks) every weight that its model contains. So the big
weights of a large model never enter a message: `pack` turns them into inputs of the graph, and the session feeds
the arrays themselves at every run. However many sessions there are, one mapping of the file serves all of them.

Small models keep their weights inside, where the runtime may repack and fold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from bitalloy.core import files
from bitalloy.core.errors import ModelError

LARGE_BYTES = 1 << 29
"""Least bytes of weights with which a model is large: its weights are shared and not copied."""
LENT_BYTES = 1 << 16
"""Least bytes of a weight of a large model that stays outside of protobuf messages."""
MESSAGE_BYTES = (1 << 31) - (1 << 20)
"""Largest number of bytes of one protobuf message, with some room."""
LENT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8})
PAGE = 4096


@dataclass(frozen=True)
class Packed:
    """A model ready for a session: a serialized `ModelProto`, and arrays for those of its inputs that are weights."""

    data: bytes
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)


def weight_bytes(model: ir.Model) -> int:
    """Return the number of bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def is_large(model: ir.Model) -> bool:
    """Return whether the weights of a model are so large that they are shared and not copied."""
    return weight_bytes(model) >= LARGE_BYTES


def pack(model: ir.Model) -> Packed:
    """Serialize a model; big weights of a large model become inputs of their own names, behind the model's own."""
    if not is_large(model):
        return Packed(bytes(ir.serde.serialize_model(model).SerializeToString()))
    model = model.clone()
    lent = {}
    for name, value, tensor in _big(model):
        lent[name] = tensor.numpy()
        model.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            model.graph.inputs.append(value)
    return Packed(bytes(ir.serde.serialize_model(model).SerializeToString()), lent)


def to_bytes(model: ir.Model) -> bytes:
    """Serialize a whole model, weights included, as one `ModelProto`.

    Raises:
        ModelError: the model does not fit into one message.
    """
    if (size := weight_bytes(model)) > MESSAGE_BYTES:
        raise ModelError(
            f"A model with {size / 1e9:.1f} GB of weights does not fit one ONNX message of 2 GB. Write it with `save`, "
            "which puts its weights into a second file."
        )
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def save(model: ir.Model, path: str | Path) -> tuple[Path, ...]:
    """Write a model, whole or not at all; from 2 GB on its weights go to `<name>.data` beside it.

    Args:
        model: the model; it is not changed.
        path: path of the .onnx file, in an existing folder. What lies there is replaced: first the old model goes, then
            its weights, so that a model never stands beside the weights of another.

    Returns:
        The files written.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".data")
    if weight_bytes(model) <= MESSAGE_BYTES:
        files.write(path, to_bytes(model))
        beside.unlink(missing_ok=True)
        return (path,)
    model = model.clone()
    arrays: list[np.ndarray] = []
    offset = 0
    for name, value, tensor in _big(model):
        array = np.ascontiguousarray(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            beside.name, offset, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
        )
        arrays.append(array)
        offset += array.nbytes + -array.nbytes % PAGE
    path.unlink(missing_ok=True)
    with files.replacing(beside) as file:
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)
            file.write(bytes(-array.nbytes % PAGE))
    files.write(path, bytes(ir.serde.serialize_model(model).SerializeToString()))
    return path, beside


def hold(model: ir.Model, folder: Path) -> None:
    """Give the big weights of a model just read one array each, in place: a view of the mapped file, or a copy.

    Args:
        model: a model whose external tensors name files in `folder`.
        folder: folder of the model's file; the caller has checked that the names stay inside it.

    Raises:
        ModelError: a file is shorter than the weights that it should hold.
    """
    mapped: dict[str, np.ndarray] = {}
    for name, value, tensor in _big(model):
        if not isinstance(tensor, ir.ExternalTensor):
            array = np.array(tensor.numpy())
        else:
            location = str(tensor.location)
            if location not in mapped:
                empty = not (folder / location).stat().st_size
                mapped[location] = np.zeros(0, np.uint8) if empty else np.memmap(folder / location, np.uint8, "r")
            array = _view(mapped[location], tensor)
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, shape=ir.Shape(array.shape), name=name)


def release(model: ir.Model) -> None:
    """Copy all weights that `hold` left in the message, in place, so that the message can be freed."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is not None
            and not isinstance(tensor, ir.Tensor)
            and tensor.dtype.is_integer() | tensor.dtype.is_floating_point()
        ):
            value.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)


def _view(file: np.ndarray, tensor: ir.ExternalTensor) -> np.ndarray:
    shape, dtype = tensor.shape.numpy(), tensor.dtype.numpy()
    size, offset = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, tensor.offset or 0
    part = file[offset : offset + size]
    if offset < 0 or len(part) != size or tensor.length not in (None, size):
        raise ModelError(
            f"Weight '{tensor.name}' has {size} bytes, but '{tensor.location}' of {len(file)} bytes does not hold "
            f"them at {offset} (length {tensor.length}). Copy or export the file again."
        )
    if part.ctypes.data % dtype.itemsize:
        part = part.copy()
    return part.view(dtype).reshape(shape)


def is_mapped(tensor: onnx.TensorProto) -> bool:
    """Return whether `hold` will map this tensor's external data instead of reading it."""
    if tensor.data_type not in LENT_TYPES:
        return False
    item = ir.DataType(tensor.data_type).numpy().itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * item >= LENT_BYTES


def _big(model: ir.Model) -> list[tuple[str, ir.Value, ir.TensorProtocol]]:
    """Name, value and tensor of the weights that are not put into messages."""
    return [
        (name, value, value.const_value)
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype in LENT_TYPES
        and value.const_value.nbytes >= LENT_BYTES
        and not value.is_graph_output()
    ]
