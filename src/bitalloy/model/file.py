"""Parsing of ONNX files. It imports nothing slow, so that a file that is no model is refused at once.

Whatever a file is called, it is read as binary ONNX: `onnx.load` would let the end of its name choose among parsers of
text, which are not made for files of strangers.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from bitalloy.core.errors import ModelError
from bitalloy.core.files import is_text
from bitalloy.core.records import TensorSpec

PROGRAM_FILE = "program.json"
"""Name of the file that describes a program of several graphs."""
MOST_FILE_BYTES = (1 << 31) - 1
"""Largest size of a protobuf message."""
NAMELESS = frozenset({"?", "-1", "None"})
"""Names that exporters give to every open dimension: they do not say that two dimensions have one size."""


def parse(source: Path) -> tuple[onnx.ModelProto, bytes]:
    """Read an ONNX file as a `ModelProto` without its external data; return that and the bytes of the file.

    An open dimension of an input or output that the file writes as -1, or by a name of `NAMELESS`, has no name.

    Raises:
        ModelError: the file is missing, is no ONNX file, or is truncated.
    """
    if not is_file(source):
        raise ModelError(
            f"No model file at '{source}'. Give the path of an .onnx file or a name from `bitalloy models`."
        )
    if not is_text(source):
        raise ModelError(f"The name of the file {str(source)!a} is not UTF-8 text. Rename it.")
    try:
        if (size := source.stat().st_size) > MOST_FILE_BYTES:
            raise ModelError(
                f"'{source}' has {size} bytes, and an ONNX file ends at 2 GB. Export it with its weights beside it."
            )
        data = source.read_bytes()
    except OSError as error:
        raise ModelError(f"'{source}' cannot be read: {error.strerror}. Give a file that can.") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"'{source}' is not an ONNX file or is truncated ({error}). Export or download it again."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"'{source}' holds no ONNX graph: it is empty, truncated, or another kind of file.")
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0 or dim.dim_param in NAMELESS:
                dim.Clear()
    return proto, data


def is_file(path: Path) -> bool:
    """Return whether a path is a file; no path that the system refuses is one, such as a name that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def refuse_broken(model: str | Path) -> None:
    """Refuse a path that cannot be an ONNX file; a folder, a `program.json` or a name is not checked.

    Raises:
        ModelError: the file is missing, is no ONNX file, or is truncated.
    """
    path = Path(model)
    if path.name != PROGRAM_FILE and (path.suffix == ".onnx" or is_file(path)) and not path.is_dir():
        parse(path)


def declared_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """Describe an input or output as a file declares it; open sizes are names, or `?` without one.

    Raises:
        ModelError: its type is unknown.
    """
    kind = value.type.tensor_type
    if kind.elem_type not in onnx.TensorProto.DataType.values():
        raise ModelError(f"'{value.name}' has the unknown data type {kind.elem_type}. The file is damaged or too new.")
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.TensorProto.DataType.Name(kind.elem_type), shape=shape)
