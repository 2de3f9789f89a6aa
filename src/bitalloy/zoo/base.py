"""Records that describe a model family; every file of the zoo fills them in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

__all__ = ["Export", "Exported", "Family", "Options", "ProtectionAdvice", "Published", "Regions", "Remote", "Variant"]

RANDOM_WEIGHTS = "random"
"""Checkpoint name for seeded random weights: for tests, scaling and full-size checks, never for accuracy."""

Regions = tuple[tuple[str, str], ...]
"""Pairs (regular expression over the start of a module path, region in the family's words); the first match counts.

`("model\\.23/cv2\\.(\\d)", "head/boxes/\\1")` turns `model.23/cv2.0/cv2.0.1` into `head/boxes/0/cv2.0.1`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectionAdvice:
    """Nodes that a family advises to keep in float by default; a measurement may overrule the advice."""

    pattern: str
    """Glob over node names, as in `--exclude`."""
    reason: str
    source: str
    """Source of the advice, such as a paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Figures that the authors of a model publish; our own figures stand in `Variant`."""

    parameters_m: float | None = None
    flops_b: float | None = None
    flops_per_mac: int = 2
    """2 where a multiply-add counts as two operations, 1 where the authors count it as one."""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Metric -> value, e.g. `{"COCO mAP50-95": 39.5}`."""
    cpu_ms: float | None = None
    gpu_ms: float | None = None
    setup: str = ""
    """Hardware and software on which the published speeds were measured."""
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """Location of published weights."""

    file: str
    """Name of the file, or the files that a local folder must hold."""
    url: str | None = None
    hub: str | None = None
    """Repository on the Hugging Face hub."""
    revision: str | None = None
    sha256: str | None = None
    """Checksum of the file at `url`, or a prefix of it; None where the authors publish none."""
    licence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One size of a family."""

    name: str
    parameters_m: float | None
    """Number of parameters of the exported graphs, in millions, counted by us."""
    flops_b: float | None
    """Operations in 10^9 per `work`, counted by us: two per multiply-add of convolutions and matrix products."""
    work: str = "image"
    """The work that `flops_b` counts, such as one image."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""
    published: Published
    remote: Remote
    architecture: Mapping[str, int | float | str | tuple[int, ...]] = field(default_factory=dict)
    """Numbers from which the family builds the network."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of an export that the user may choose."""

    size: tuple[int, int] | None = None
    """Height and width of the image; None takes the variant's."""
    open_size: bool = False
    """Whether height and width stay open, for protocols that keep the aspect ratio of each image."""
    seed: int = 0
    """Seed of random weights, and of the inputs on which an export is compared with torch."""
    trust_checkpoint: bool = False
    """Whether a checkpoint with pickled objects may be opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The files of one model and what the family knows about them."""

    graphs: Mapping[str, Path]
    """Graph name -> .onnx file. Several graphs come with a `program.json` beside them."""
    wires: tuple[str, ...] = ()
    """Wires between the graphs, e.g. `"encoder:image_embeddings -> decoder:image_embeddings"`."""
    protect: tuple[ProtectionAdvice, ...] = ()
    notes: tuple[str, ...] = ()


Export = Callable[[Variant, str | Path | None, Options, Path], Exported]
"""Function (variant, checkpoint, options, folder) -> files; a checkpoint of None downloads the published one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Everything the project knows about one family of models."""

    name: str
    task: str
    extra: str
    """Extra of the package that exporting needs: `pip install 'bitalloy[EXTRA]'`."""
    packages: Mapping[str, tuple[int, int]]
    """Package of the extra -> lowest version (major, minor) that serves."""
    open_size: bool = False
    """Whether the family's graphs can be exported with open height and width."""
    adopts_onnx: bool = False
    """Whether an ONNX file of the user's serves as a checkpoint."""
    variants: Mapping[str, Variant]
    export: Export
    relevance: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    """Outputs of one sample -> a weight for every element that matters, broadcastable to its output; the mean of
    the weights of an output is 1. Outputs that it leaves out are not heads (a cache, for example)."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages of the extra that are not installed or too old, such as `transformers>=5.0`."""
        return tuple(f"{p}>={low[0]}.{low[1]}" for p, low in self.packages.items() if _version(p) < low)

    @property
    def installed(self) -> dict[str, str]:
        """Versions of the packages of the extra; empty for one that is not installed."""
        return {package: _full_version(package) for package in self.packages}


def _version(package: str) -> tuple[int, ...]:
    """(major, minor) of an installed package; empty, which is below every version, where there is none."""
    return tuple(int(n) for n in re.findall(r"\d+", _full_version(package))[:2])


def _full_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
