"""What two models show on single samples: pictures side by side, answers, and the precision of each class."""

from __future__ import annotations

from bitalloy.core.records import Estimate, Record


class ExampleText(Record, frozen=True, kw_only=True):
    """What a language model was asked about an image, and what both models answered."""

    asked: str
    reference: str
    mixed: str


class Example(Record, frozen=True, kw_only=True):
    """One sample, as the float and the mixed model see it."""

    name: str
    """Name of the image's file."""
    agreement: float
    """How far the models agree on it, in 0..1, see `Examples.measure`."""
    reference: bytes
    """Picture of what the float model shows, as a JPEG file."""
    mixed: bytes
    """The same of the mixed model; empty where the picture is the image alone, and the texts say all."""
    texts: tuple[ExampleText, ...] = ()


class ClassPrecision(Record, frozen=True, kw_only=True):
    """Box AP50-95 of one class."""

    name: str
    labels: int
    """Number of labelled objects that count."""
    reference: float
    """AP of the float model, in 0..1."""
    mixed: float
    drop: Estimate
    """AP of the float model minus that of the mixed one, with a paired 95 % interval over images."""


class Examples(Record, frozen=True, kw_only=True):
    """What a task shows of the float and the mixed model on the evaluated samples."""

    task: str
    measure: str
    """What the agreement on one sample is, in words."""
    samples: int
    """Number of samples that were evaluated."""
    same: int
    """Number of samples on which both models agree in full."""
    worst: tuple[Example, ...]
    """The samples with the lowest agreement, lowest first."""
    classes: tuple[ClassPrecision, ...] = ()
    """Precision of each class with labels, the largest drop first; empty for tasks without."""
