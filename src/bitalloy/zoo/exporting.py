"""From a torch module to one ONNX file: trace, refuse what only training needs, annotate, write, compare with torch.

The TorchScript-based exporter is used because its node names keep the module path.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.external_data_helper import set_external_data

from bitalloy import ops
from bitalloy.core import files
from bitalloy.core.errors import ModelError
from bitalloy.core.ownership import temporary
from bitalloy.model.metadata import FAMILY, HEADS, IMAGE, PROTECT, REGION, SHAPES, VARIANT
from bitalloy.runtime.ort import OrtSession
from bitalloy.zoo.base import ProtectionAdvice, Regions

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSET = 17
EXPORT_TOLERANCE = 1e-4
"""Largest allowed difference between ONNX Runtime and torch, over the largest magnitude of the output's part."""
LEAST_MAGNITUDE = 1e-3
"""Least magnitude by which a difference is divided, since small results of the runtime's Sigmoid are not exact."""
INLINE_BYTES = 1_500_000_000
"""Bytes of weights above which they go to one file of external data: a protobuf message ends at 2 GB."""
EXTERNAL_DATA_ALIGNMENT = 4096
"""Alignment of tensors in external data in bytes, so that they can be memory-mapped."""


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """Facts about a model that its exported files contain as metadata."""

    family: str
    variant: str
    regions: Regions
    protect: tuple[ProtectionAdvice, ...] = ()
    heads: tuple[str, ...] = ()
    """Names of the outputs that count; empty for all."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Usual shapes of inputs with open dimensions."""
    image: Mapping[str, object] = field(default_factory=dict)
    """How images are prepared: fields of `bitalloy.data.images.ImageOptions`; empty where that infers it right."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Names of a graph's inputs and outputs, and which of their axes are open."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Tensor -> axis -> name of the dimension."""
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Output -> where it is cut on axis 1, for parts of different size (boxes in pixels, scores up to 1)."""


def export_graph(
    module: nn.Module, checks: Sequence[tuple[Tensor, ...]], path: Path, signature: Signature, facts: ExportFacts
) -> str:
    """Write `module` to `path` and run the file on the inputs of `checks`, the first of which is traced.

    Returns:
        A sentence with the largest difference from torch.

    Raises:
        ModelError: the traced graph still holds operators of training, or the file differs from torch.
    """
    import torch

    module.eval()  # the outermost module: the exporter restores its flag recursively
    with torch.no_grad():
        wanted = [_arrays(module(*inputs)) for inputs in checks]
        with temporary(path.parent) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's age, and of sizes that become constants
            traced = folder / path.name
            torch.onnx.export(
                module,
                checks[0],
                str(traced),
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_axes={name: dict(axes) for name, axes in signature.open_axes.items()},
                opset_version=OPSET,
                dynamo=False,
            )
            proto = onnx.load(str(traced), load_external_data=False)
            left = sorted({n.op_type for n in proto.graph.node} & ops.TRAINING_ONLY)
            if left:
                raise ModelError(f"The exported graph of '{facts.variant}' still holds {', '.join(left)}.")
            annotate(proto, facts)
            _write(proto, Path(folder), path)
    worst = 0.0
    session = OrtSession(path)
    for inputs, outputs in zip(checks, wanted, strict=True):
        got = session.run({n: t.numpy() for n, t in zip(signature.inputs, inputs, strict=True)})
        for name, want in zip(signature.outputs, outputs, strict=True):
            worst = max([worst, *_differences(np.asarray(got[name]), want, signature.parts.get(name, ()))])
    if not worst <= EXPORT_TOLERANCE:
        raise ModelError(
            f"'{path.name}' differs from torch by {worst:.1e} of the output's range; allowed is "
            f"{EXPORT_TOLERANCE:.0e}. Try another version of torch."
        )
    return f"{path.name} differs from torch by at most {worst:.1e} of the output's range on random inputs."


def random_image(size: tuple[int, int]) -> Tensor:
    """Draw smooth random fields, (1, 3, H, W) in 0..1; on white noise all scores of a detector are near zero."""
    import torch

    coarse = torch.rand(1, 3, *(max(side // 32, 2) for side in size))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)


def annotate(proto: onnx.ModelProto, facts: ExportFacts) -> None:
    """Add the family's facts to the model and, to every node of a known module, its region in the family's words."""
    texts = {
        FAMILY: facts.family,
        VARIANT: facts.variant,
        HEADS: json.dumps(facts.heads),
        SHAPES: json.dumps(facts.shapes),
        IMAGE: json.dumps(facts.image),
        PROTECT: json.dumps([{"pattern": p.pattern, "reason": p.reason, "source": p.source} for p in facts.protect]),
    }
    _forget(proto.metadata_props, texts)
    for key, text in texts.items():
        proto.metadata_props.add(key=key, value=text)
    for node in proto.graph.node:
        _forget(node.metadata_props, {REGION})
        module = "/".join(p for p in node.name.split("/")[:-1] if p)
        for pattern, words in facts.regions:
            found = re.match(f"(?:{pattern})(?=/|$)", module)
            if found:
                node.metadata_props.add(key=REGION, value=f"{found.expand(words)}{module[found.end() :]}")
                break


def _forget(props: Any, keys: Collection[str]) -> None:
    """Remove the entries that an earlier export wrote."""
    kept = [p for p in props if p.key not in keys]
    del props[:]
    props.extend(kept)


def _write(proto: onnx.ModelProto, source: Path, path: Path) -> None:
    """Write a traced model, whose large weights may lie in many files of `source`, as one file or as two."""
    tensors = list(_tensors(proto))
    data = path.with_name(path.name + ".data")
    if sum(_size(t, source) for t in tensors) <= INLINE_BYTES:
        onnx.load_external_data_for_model(proto, str(source))
        data.unlink(missing_ok=True)
    else:
        with files.replacing(data) as out:
            for tensor in tensors:
                if not tensor.HasField("raw_data") and tensor.data_location != TensorProto.EXTERNAL:
                    continue
                content = _content(tensor, source)
                if len(content) < EXTERNAL_DATA_ALIGNMENT:
                    tensor.raw_data = content
                    tensor.data_location = TensorProto.DEFAULT
                    del tensor.external_data[:]
                    continue
                out.write(b"\0" * (-out.tell() % EXTERNAL_DATA_ALIGNMENT))
                offset = out.tell()
                out.write(content)
                tensor.raw_data = b""  # the field must be there for its place to be taken
                set_external_data(tensor, data.name, offset=offset, length=len(content))
                tensor.ClearField("raw_data")
    files.write(path, proto.SerializeToString())


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from proto.graph.initializer
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _size(tensor: TensorProto, folder: Path) -> int:
    return _file(tensor, folder).stat().st_size if tensor.data_location == TensorProto.EXTERNAL else tensor.ByteSize()


def _content(tensor: TensorProto, folder: Path) -> bytes:
    """The bytes of a tensor; its own file, if it has one, is deleted to keep the peak on disk low."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return bytes(tensor.raw_data)
    file = _file(tensor, folder)
    content = file.read_bytes()
    file.unlink()
    return content


def _file(tensor: TensorProto, folder: Path) -> Path:
    """The file of one external tensor: the exporter writes one each."""
    return folder / str(next(e.value for e in tensor.external_data if e.key == "location"))


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [t.numpy() for t in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]


def _differences(got: np.ndarray, want: np.ndarray, cuts: tuple[int, ...]) -> Iterator[float]:
    """Largest difference of each part over the part's largest magnitude; infinite where shapes differ."""
    if got.shape != want.shape:
        yield np.inf
        return
    for a, b in zip(np.split(got, cuts, axis=1), np.split(want, cuts, axis=1), strict=True):
        if b.size:
            yield float(np.abs(a - b).max() / max(float(np.abs(b).max()), LEAST_MAGNITUDE))
