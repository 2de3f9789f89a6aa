"""External data of ONNX files: weights that lie in other files beside the model."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.core.limits import refuse_beyond
from bitalloy.core.paths import path_inside
from bitalloy.model.file import parse
from bitalloy.model.weights import is_mapped

WHOLE_BYTES = frozenset(int(t) for t in ir.DataType if t.name not in ("UNDEFINED", "STRING") and t.bitwidth >= 8)
"""Types whose numbers fill whole bytes."""
_SHOWN = 80
"""Characters of a text of the file that a message repeats."""


def open_unread(source: Path) -> ir.Model:
    """Open an ONNX file whose external data is read when it is needed, after a check of where that lies.

    Raises:
        ModelError: the file is missing or damaged, or its external data is missing, or not beside it.
    """
    proto, _ = parse(source)
    external_files(proto, source)
    return ir.load(source)


def external_files(proto: onnx.ModelProto, source: Path) -> list[Path]:
    """List the files in which external data lies.

    Raises:
        ModelError: one is missing, or does not lie beside the model.
    """
    folder = source.parent.resolve()
    files: set[Path] = set()
    for tensor in all_tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {e.key: e.value for e in tensor.external_data}.get("location", "")
        what = f"Weight '{tensor.name[:_SHOWN]}' of '{source}' is in the external file"
        target = path_inside(folder, location, what, ModelError)
        if not target.is_file():
            raise ModelError(f"{what} {location[:_SHOWN]!r}, which is missing. Copy it beside the model.")
        files.add(target)
    return sorted(files)


def refuse_reading(proto: onnx.ModelProto, source: Path, mappable: int) -> None:
    """Refuse external data, but for what is mapped, that is larger than memory."""
    needed = 0
    for index, tensor in enumerate(all_tensors(proto.graph)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not (index < mappable and is_mapped(tensor)):
            needed += max(raw_bytes(tensor) or 0, 0)
    refuse_beyond(needed, f"The external data of '{source}' is read into memory", ModelError)


def raw_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes that a constant should have; None where its type does not tell."""
    if tensor.data_type not in WHOLE_BYTES:
        return None
    return int(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)


def all_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Tensors of a graph and its subgraphs, the graph's own initializers first."""
    tensors = list(graph.initializer)
    for node in graph.node:
        for attr in node.attribute:
            tensors += [attr.t] if attr.HasField("t") else []
            tensors += list(attr.tensors)
            for sub in [attr.g, *attr.graphs] if attr.HasField("g") else attr.graphs:
                tensors += all_tensors(sub)
    return tensors
