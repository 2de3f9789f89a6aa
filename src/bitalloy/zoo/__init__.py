"""Models that bitalloy knows by name: the embedded samples, and families that are exported from PyTorch.

A family is one file beside this one and one line in `FAMILIES`; networks that no library provides are in `networks`.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bitalloy.core.errors import BitalloyError, MissingExtraError, ModelError, did_you_mean
from bitalloy.model.file import PROGRAM_FILE
from bitalloy.zoo.base import RANDOM_WEIGHTS, Exported, Family, Options, Variant

__all__ = [
    # lookup
    "FAMILIES",
    "NAMES",
    "PROGRAMS",
    "SAMPLE",
    "Source",
    "families",
    "find",
    "is_variant",
    "resolve",
    # export
    "RANDOM_WEIGHTS",
    "Exported",
    "Family",
    "Options",
    "export_model",
]

SAMPLE = "yolo11n-shapes"
NAMES = {name: f"{name}.onnx" for name in (SAMPLE, "yolo11n-seg-shapes", "segformer-b0-shapes")}
"""Name of an embedded model -> its file among the packaged samples."""
PROGRAMS = {name: name for name in ("mobilesam-shapes", "mobilevlm-shapes")}
"""Name of an embedded program -> its folder among the packaged samples."""
FAMILIES = {
    "yolo11": "bitalloy.zoo.yolo11:YOLO11",
    "segformer": "bitalloy.zoo.segformer:SEGFORMER",
    "mobilesam": "bitalloy.zoo.mobilesam:MOBILESAM",
    "mobilevlm": "bitalloy.zoo.mobilevlm:MOBILEVLM",
}
"""Name of a family -> module and variable that hold its `Family` record."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The file or folder of a model that is ready to be loaded."""

    name: str
    path: Path
    sample: bool
    """Whether it belongs to the embedded sample, whose data then serves by default."""


def resolve(model: str | Path) -> Source:
    """Find the file of a model, or the folder of a program, by a name of the zoo or a path.

    Raises:
        ModelError: it is neither a known name nor a file or program, or the model must be exported first.
    """
    text = str(model)
    packaged = {**NAMES, **PROGRAMS}
    if text in packaged:
        path = Path(str(resources.files("bitalloy.samples").joinpath(packaged[text])))
        return Source(name=text, path=path, sample=True)
    path = Path(model)
    if not path.is_file() and path.suffix != ".onnx" and not (path / PROGRAM_FILE).is_file():
        names = _variant_names()
        if text in names:
            raise ModelError(
                f"'{text}' is not exported yet. Run `bitalloy export {text}`, then give what it writes; "
                f"`bitalloy run {text}` does both."
            )
        known = [*packaged, *names]
        raise ModelError(
            f"'{text}' is neither a file nor a known model ({', '.join(known)}).{did_you_mean(text, known)}"
        )
    return Source(name=path.stem, path=path, sample=False)


def is_variant(name: str) -> bool:
    """Return whether a name belongs to a model family, so that the model must be exported first."""
    return name in _variant_names()


def families() -> tuple[Family, ...]:
    """Return all families, in order. None of their libraries is imported."""
    return tuple(pkgutil.resolve_name(place) for place in FAMILIES.values())


def find(name: str) -> tuple[Family, Variant]:
    """Find the family and variant of a name.

    Raises:
        ModelError: the name is unknown; the message suggests the nearest.
    """
    for family in families():
        if name in family.variants:
            return family, family.variants[name]
    known = _variant_names()
    raise ModelError(f"No model family knows '{name}'. Known are {', '.join(known)}.{did_you_mean(name, known)}")


def export_model(
    name: str, *, checkpoint: str | Path | None = None, folder: Path, options: Options | None = None
) -> Exported:
    """Write a model of the zoo as ONNX and compare the files with torch.

    Args:
        name: name of a variant, e.g. `yolo11n-seg`.
        checkpoint: a file or folder, `"random"` for seeded random weights, or None for the published weights.
        folder: folder for the files.
        options: size of the images, seed, and trust in the checkpoint.

    Raises:
        ModelError: the name is unknown, the checkpoint is unusable, or the export differs from torch.
        MissingExtraError: the family's library is not installed.
        BitalloyError: the folder cannot be written.
    """
    family, variant = find(name)
    options = options or Options()
    if options.open_size and not family.open_size:
        raise ModelError(f"Height and width of '{name}' cannot stay open: its graph is made for one size.")
    is_onnx = Path(str(checkpoint)).suffix == ".onnx"
    if is_onnx and not family.adopts_onnx:
        raise ModelError(f"'{checkpoint}' is an ONNX file already: give it to `bitalloy run`.")
    if not is_onnx and family.missing:
        raise MissingExtraError("', '".join(family.missing), family.extra, f"Exporting '{name}'")
    if checkpoint is not None:
        from bitalloy.zoo.checkpoints import refuse_without_weights

        refuse_without_weights(Path(checkpoint))
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return family.export(variant, checkpoint, options, folder)
    except OSError as error:
        raise BitalloyError(f"'{name}' cannot be written to '{folder}': {error}. Choose another folder.") from error
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _variant_names() -> list[str]:
    return [name for family in families() for name in family.variants]
