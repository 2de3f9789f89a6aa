"""Models that a program hands over in memory, written as files once: ONNX in bytes or objects, and torch modules."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from bitalloy.core import files
from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.core.ownership import temporary
from bitalloy.core.plain import one_line
from bitalloy.data.images import file_hash
from bitalloy.model.file import parse
from bitalloy.model.weights import save

ACCEPTED_MODELS = (
    "a path or a name from `bitalloy models`, the bytes of an ONNX file, an onnx.ModelProto, an onnx_ir.Model, or a "
    "torch module with example_inputs"
)
"""What counts as a model, in words."""


def write_handed(model: object, folder: Path, *, example_inputs: object = None) -> Path:
    """Write a model into a folder that its content names, or find it there.

    Args:
        model: see `ACCEPTED_MODELS`, but for paths and names.
        folder: where that folder is made.
        example_inputs: of a torch module a tensor, a tuple of its arguments, or a dict by their names, with which it is
            traced. Sizes of the exported model are theirs.

    Raises:
        ModelError: it is none of these, or no ONNX model.
        MissingExtraError: a torch module is given, and a package to export it is not installed.
    """
    with temporary(folder) as scratch:
        made = scratch / "model"
        made.mkdir()
        path = made / f"{_name_of(model)}.onnx"
        _write(model, path, example_inputs)
        parse(path)
        key = "-".join(file_hash(file)[:24] for file in sorted(made.iterdir()))
        place = folder / f"model-{key}"
        if not (place / path.name).is_file():
            made.rename(place)
    return place / path.name


def _write(model: object, path: Path, example_inputs: object) -> None:
    if _is_torch(model):
        _export(model, path, example_inputs)
    elif isinstance(model, (bytes, bytearray, memoryview)):
        files.write(path, bytes(model))
    elif isinstance(model, onnx.ModelProto):
        try:
            data = model.SerializeToString(deterministic=True)
        except ValueError:  # protobuf's limit
            save(ir.serde.deserialize_model(model), path)
        else:
            files.write(path, data)
    elif isinstance(model, ir.Model):
        save(model, path)
    else:
        raise ModelError(f"The model is of type {type(model).__name__}; expected {ACCEPTED_MODELS}.")


def _is_torch(model: object) -> bool:
    """Whether a model is a torch module, which is told without importing torch."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "torch.nn.modules.module.Module" for kind in type(model).mro()
    )


def _export(module: Any, path: Path, example_inputs: object) -> None:
    """Export a torch module with the exporter that traces Python's own operations (dynamo)."""
    if example_inputs is None:
        raise ModelError(
            f"The torch module {type(module).__name__} needs example_inputs to be exported: a tensor, a tuple of its "
            "arguments, or a dict by their names."
        )
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("onnxscript", "torch", "Exporting a torch module")
    import torch

    given: dict[str, Any] = {"args": (example_inputs,)}
    if isinstance(example_inputs, Mapping):
        given = {"args": (), "kwargs": dict(example_inputs)}
    elif isinstance(example_inputs, Sequence):
        given = {"args": tuple(example_inputs)}
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts
            program = torch.onnx.export(module, dynamo=True, verbose=False, **given)
            assert program is not None, "with dynamo the program is returned"
            program.save(str(path), external_data=False)
    except Exception as error:  # the exporter raises dozens of types, each with the whole of its report
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        told = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ModelError(
            f"torch cannot export {type(module).__name__} with these example_inputs: {one_line(told[0])} If the module "
            "runs on them, export it to ONNX by hand and give the file."
        ) from error
    finally:
        module.train(training)


def _name_of(model: object) -> str:
    """A name for the file: that of the graph or class, without what file names cannot have."""
    name = "model"
    if isinstance(model, onnx.ModelProto):
        name = model.graph.name
    elif isinstance(model, ir.Model):
        name = model.graph.name or ""
    elif _is_torch(model):
        name = type(model).__name__.lower()
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._")[:60] or "model"
