"""Models that bitalloy knows by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bitalloy.errors import ModelError

SAMPLE = "yolo11n-shapes"
NAMES = {SAMPLE: "yolo11n-shapes.onnx"}
"""Name -> file among the packaged samples."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from."""

    name: str
    path: Path
    sample: bool
    """Whether it belongs to the embedded sample, whose data then serves by default."""


def resolve(model: str | Path) -> Source:
    """The file behind a name of the zoo or a path.

    Raises:
        ModelError: neither a known name nor a file.
    """
    text = str(model)
    if text in NAMES:
        path = Path(str(resources.files("bitalloy.samples").joinpath(NAMES[text])))
        return Source(name=text, path=path, sample=True)
    path = Path(model)
    if not path.is_file() and path.suffix != ".onnx":
        near = difflib.get_close_matches(text, NAMES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ModelError(f"'{text}' is neither a file nor a known model ({', '.join(NAMES)}).{hint}")
    return Source(name=path.stem, path=path, sample=False)
