"""Questions about the families: which parts of a model are compared, as data.

They are those for which the families were chosen: mask branches against box heads, transformers against convolutions,
prompts, encoders against decoders, and the parts of a vision-language model.
"""

from __future__ import annotations

from dataclasses import dataclass

CONVOLUTIONAL, TRANSFORMER = "yolo11", "segformer"
"""Families whose kinds of operators are compared."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A part of a model by its regions, and the outputs on which it counts."""

    name: str
    regions: tuple[str, ...]
    """Globs over regions of units."""
    heads: tuple[str, ...] = ("*",)
    """Globs over heads."""


@dataclass(frozen=True, kw_only=True)
class SidesQuestion:
    """Whether one part of a model is more sensitive than another."""

    text: str
    first: Side
    second: Side


@dataclass(frozen=True, kw_only=True)
class MetricQuestion:
    """Whether a version of a model loses on a metric, or more of it than of another metric."""

    text: str
    family: str
    version: str
    """`all lowest` or `mixed`."""
    metric: str
    beside: str = ""
    """The other metric; empty to compare with no loss."""


MASKS = Side(
    name="mask branches",
    regions=("head/mask coefficients*", "head/prototypes*", "*/cv4*", "*/proto*"),
    heads=("coefficients", "output1"),
)
BOXES = Side(name="box heads", regions=("head/boxes*", "*/cv2.[0-9]*"), heads=("boxes",))
ENCODER = Side(name="encoder", regions=("image encoder*",))
DECODER = Side(name="decoder", regions=("mask decoder*", "prompt encoder*"))
LANGUAGE_PARTS = (
    Side(name="vision tower", regions=("vision tower*",)),
    Side(name="projector", regions=("projector*",)),
    Side(name="attention", regions=("LM/*attention*",)),
    Side(name="MLP", regions=("LM/*MLP*",)),
    Side(name="head", regions=("LM/head*", "LM/norm*")),
)
"""Parts of MobileVLM, each against the others."""

SIDES = (
    SidesQuestion(
        text="Are the mask branches of YOLO11-seg more sensitive than its box heads?",
        first=MASKS,
        second=BOXES,
    ),
    SidesQuestion(
        text="Is the image encoder of MobileSAM more sensitive than its prompt encoder and mask decoder?",
        first=ENCODER,
        second=DECODER,
    ),
)
METRICS = (
    MetricQuestion(
        text="Does YOLO11-seg lose more mask AP than box AP with all in the lowest format?",
        family="yolo11",
        version="all lowest",
        metric="mask AP50-95",
        beside="box AP50-95",
    ),
    *(
        MetricQuestion(
            text=f"Do {prompts} prompts of MobileSAM lose IoU {told}?",
            family="mobilesam",
            version=version,
            metric=f"mIoU, {prompts} prompts",
        )
        for version, told in (("all lowest", "with all in the lowest format"), ("mixed", "under the mixed plan"))
        for prompts in ("point", "box")
    ),
    MetricQuestion(
        text="Do point prompts of MobileSAM lose more than box prompts with all in the lowest format?",
        family="mobilesam",
        version="all lowest",
        metric="mIoU, point prompts",
        beside="mIoU, box prompts",
    ),
)
