"""Keys of the metadata that bitalloy reads from ONNX files and writes into them: on models, and on their nodes.

The exporters of the model zoo describe a model in its own file, so that it can be analysed without the code that made
it. A rewritten model says which unit each of its nodes belongs to. Values that are not plain text are JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec

from bitalloy.core.encoding import from_json
from bitalloy.core.errors import ModelError

FAMILY = "bitalloy.family"
"""On a model: name of its family, such as `yolo11`."""
VARIANT = "bitalloy.variant"
"""On a model: name of its size within the family."""
HEADS = "bitalloy.heads"
"""On a model: list of the outputs that count; an empty list means all outputs."""
SHAPES = "bitalloy.shapes"
"""On a model: usual shapes of the inputs whose sizes are open."""
IMAGE = "bitalloy.image"
"""On a model: how images are prepared, as arguments of `infer_image_spec`."""
PROTECT = "bitalloy.protect"
"""On a model: nodes that its family advises to keep in float, as name patterns with reasons and sources."""
PROVENANCE = "bitalloy.provenance."
"""On a shipped model: beginning of the keys that say where it comes from, see `verify.provenance`."""
REGION = "bitalloy.region"
"""On a node: path of the region that it belongs to, in the words of the family, such as `neck/model.13/cv1`."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""On a node, written by the exporter of torch: paths of the modules that it comes from, outermost first."""
TAG = "bitalloy.unit"
"""On a node of a rewritten model: id of the unit that it belongs to, or `BORDER`."""
BORDER = "bitalloy.border"
"""Value of `TAG` where a node belongs to no unit: it rounds or casts a tensor on its way between units."""
KERNEL = "bitalloy.kernel"
"""On a node while a model is rewritten: operator of the runtime that is to compute it, and how that rounds."""

SOURCE = "bitalloy.source"
"""In memory, on a stored constant: the constant of the float graph that it stands for, and in which form."""

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""A size of an axis."""
Fact = TypeVar("Fact")


def read_fact(metadata: Mapping[str, str], key: str, kind: type[Fact], absent: Fact) -> Fact:
    """Read an entry of a model's metadata whose value is JSON.

    Args:
        metadata: all entries.
        key: one of the names above.
        kind: type of what it holds.
        absent: returned where there is no such entry.

    Raises:
        ModelError: the entry is malformed.
    """
    if key not in metadata:
        return absent
    try:
        return from_json(metadata[key], kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ModelError(
            f"The model's metadata '{key}' is malformed: {error or type(error).__name__}. Export the model again, or "
            "take the entry out of the file."
        ) from error
