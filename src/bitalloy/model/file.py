"""Parsing of ONNX files. It imports nothing slow, so that a file that is no model is refused at once."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from bitalloy.core.errors import ModelError


def parse(source: Path) -> tuple[onnx.ModelProto, bytes]:
    """Read an ONNX file as a `ModelProto` without its external data; return that and the bytes of the file.

    Raises:
        ModelError: the file is missing, is no ONNX file, or is truncated.
    """
    if not source.is_file():
        raise ModelError(
            f"No model file at '{source}'. Give the path of an .onnx file or a name from `bitalloy models`."
        )
    data = source.read_bytes()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"'{source}' is not an ONNX file or is truncated ({error}). Export or download it again."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"'{source}' holds no ONNX graph: it is empty, truncated, or another kind of file.")
    return proto, data


def refuse_broken(model: str | Path) -> None:
    """Refuse a path that cannot be an ONNX file; a folder, a `program.json` or a name is not checked.

    Raises:
        ModelError: the file is missing, is no ONNX file, or is truncated.
    """
    path = Path(model)
    if path.suffix not in ("", ".json") and not path.is_dir() and (path.suffix == ".onnx" or path.is_file()):
        parse(path)
