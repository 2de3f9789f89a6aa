"""Records of a study: what a file asks for, and the comparative result over models, targets, schemes and budgets."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from bitalloy.core.records import Estimate, MetricValue, Record
from bitalloy.core.tabular import Listing, Tabular

USUAL_SCHEMES = "usual"
"""Name of the set of schemes that a target's plans use by themselves."""


class StudiedModel(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """One `[[model]]` of a study's file; relative paths are taken from the folder of the file."""

    model: str
    """An .onnx file, a folder with a `program.json`, or a name from `bitalloy models`."""
    name: str = ""
    """Name in tables and folders; by default the model's own."""
    checkpoint: str | None = None
    """File or folder of a model that is exported first."""
    trust_checkpoint: bool = False
    """Whether a checkpoint with pickled objects may be opened."""
    data: str | None = None
    """Samples; the embedded ones without it."""
    evaluate: tuple[str, ...] = msgspec.field(name="eval", default=())
    """Files of labels."""
    shape: dict[str, tuple[Annotated[int, msgspec.Meta(ge=1)], ...]] = msgspec.field(default_factory=dict)
    """Input -> shape, for open sizes that neither the file nor the samples tell."""
    where: str = ""
    """Where to get the checkpoint and data, which `--dry-run` repeats for what is missing."""


class StudyFile(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A study's TOML file: every model on every target, with every set of schemes, under every budget."""

    models: tuple[StudiedModel, ...] = msgspec.field(name="model")
    targets: tuple[str, ...] = ()
    """Names from `bitalloy targets`; those that run on this machine without any."""
    device: str = ""
    """Device of targets that are estimated."""
    effort: str = "quick"
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Largest number of labelled samples that are evaluated."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    schemes: dict[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: {USUAL_SCHEMES: ()})
    """Name -> schemes that plans may use beside float; the usual ones of each target where the list is empty."""
    budgets: dict[str, dict[str, Any]] = msgspec.field(name="budget", default_factory=lambda: {"default": {}})
    """Name -> limits, by the names of the fields of `Budget`."""


class Lack(Record, frozen=True, kw_only=True):
    """What a model of a study needs and this machine does not have."""

    model: str
    what: str
    """A sentence: what is missing, and where to put it."""


class MeasuredVariant(Record, frozen=True, kw_only=True):
    """One version of a model in a cell of a study."""

    name: str
    """`published`, `float`, `fp16`, `all lowest`, `best single format`, or `mixed`."""
    metrics: dict[str, MetricValue] = msgspec.field(default_factory=dict)
    drops: dict[str, Estimate] = msgspec.field(default_factory=dict)
    """Metric -> float less this version, with a paired interval."""
    published: dict[str, float] = msgspec.field(default_factory=dict)
    """Figures of the model's authors; of `published` alone."""
    latency_ratio: Estimate | None = None
    """Latency over that of float; None where it is not known."""
    estimated: bool = False
    """Whether the latency is estimated or predicted, not measured."""
    size_bytes: int | None = None
    sqnr_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Head -> SQNR, measured unless `estimated`."""
    note: str = ""
    """What must be known of it, such as why it is empty."""


class StudyCell(Record, frozen=True, kw_only=True):
    """A model on a target with a set of schemes under a budget: one run."""

    model: str
    family: str
    target: str
    schemes: str
    budget: str
    folder: str
    """Run directory, relative to that of the study."""
    failed: str = ""
    """Why there is no result."""
    status: str = ""
    headline: str = ""
    variants: tuple[MeasuredVariant, ...] = ()

    @property
    def id(self) -> str:
        """Name of the cell, unique in the study."""
        return f"{self.model}/{self.target}/{self.schemes}/{self.budget}"


class StudiedPart(Record, frozen=True, kw_only=True):
    """What rows on parts of a model have in common: where they were found."""

    model: str
    target: str
    schemes: str = USUAL_SCHEMES
    """Name of the set of schemes."""

    @property
    def setting(self) -> str:
        """Model, target and set of schemes as people read them; the usual set goes without saying.

        >>> StudiedPart(model="m", target="ort-cpu", schemes="four").setting
        'm on ort-cpu with four'
        """
        return f"{self.model} on {self.target}" + ("" if self.schemes == USUAL_SCHEMES else f" with {self.schemes}")


class PartDamage(StudiedPart, frozen=True, kw_only=True):
    """What a part of a model does when all of it that can is rounded, and nothing else."""

    id: str
    """Name of the row, unique in the study."""
    family: str
    scope: str
    """`region`, `operator`, `kind` (weights or activations), `side` of a question, or `format` of such a side."""
    part: str
    scheme: str
    head: str
    """Head of the model; empty for the mean over all heads."""
    sqnr_db: Estimate
    share: Estimate | None = None
    """Its part of the damage of all roundings; None for sides of questions, which need not add up."""
    units: int
    """Number of units that it rounds."""
    latency_ratio: float | None = None
    """Time of these units in the scheme over that in float, by the cost table; None where it is not known."""


class PartContrast(StudiedPart, frozen=True, kw_only=True):
    """By how many dB one part of a model does more damage than another."""

    question: str
    first: str
    """Row of the one part."""
    second: str
    """Row of the other."""
    value: Estimate
    """From the same bootstrap draws for both; above 0 where the first does more damage."""


class Answer(Record, frozen=True, kw_only=True):
    """A question of the study and what the results say."""

    question: str
    verdict: str
    """`yes`, `no`, `undecided`, or `not studied`."""
    told: str
    """The answer in a sentence, with the numbers."""
    value: Estimate | None = None
    """The difference that decides; above 0 means yes."""
    unit: str = "dB"
    rows: tuple[str, ...] = ()
    """Ids of the rows and cells on which it rests."""


class StudyResult(Tabular, Record, frozen=True, kw_only=True):
    """`study.json`: all cells of a study, the damage by part on one scale, and the questions answered."""

    schema: int = 1
    cells: tuple[StudyCell, ...]
    parts: tuple[PartDamage, ...]
    contrasts: tuple[PartContrast, ...]
    answers: tuple[Answer, ...]
    lacks: tuple[Lack, ...] = ()
    """Models that were left out, and why."""
    seconds: float
    """Wall time of the command that wrote this."""
    seed: int
    asked: str = ""
    """Key of all that the file asks for."""
    versions: dict[str, str]

    def listing(self) -> Listing:
        """Return one line for each version of a model in each cell."""
        rows = [
            (cell.id, one.name, name, *values, *_ends(one.latency_ratio), one.estimated, one.size_bytes, cell.status)
            for cell in self.cells
            for one in cell.variants
            for name, values in _metric_values(one)
        ]
        return Listing("study", VARIANT_COLUMNS, rows)

    def parts_listing(self) -> Listing:
        """Return one line for each part of each model on each head."""
        rows = []
        for p in self.parts:
            named = (p.id, p.model, p.target, p.schemes, p.scope, p.part, p.scheme, p.head, p.units)
            rows.append((*named, *_ends(p.sqnr_db), *_ends(p.share), p.latency_ratio))
        return Listing("parts of the study", PART_COLUMNS, rows)


VARIANT_COLUMNS = (
    *("cell", "version", "metric", "value", "low", "high", "n", "drop", "drop_low", "drop_high"),
    *("latency_ratio", "latency_low", "latency_high", "estimated", "size_bytes", "status"),
)
"""Columns of the table of versions."""
PART_COLUMNS = (
    *("id", "model", "target", "schemes", "scope", "part", "scheme", "head", "units", "sqnr_db", "low_db", "high_db"),
    *("share", "share_low", "share_high", "latency_ratio"),
)
"""Columns of the table of parts."""


def _ends(value: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if value is None else (value.value, value.low, value.high)


def _metric_values(one: MeasuredVariant) -> list[tuple[str, tuple[object, ...]]]:
    """Value, interval, number of samples and drop of each metric of a version; one line of nothing without any."""
    found: list[tuple[str, tuple[object, ...]]] = [
        (name, (v.value, v.low, v.high, v.n, *_ends(one.drops.get(name)))) for name, v in one.metrics.items()
    ]
    found += [(name, (value, None, None, None, *_ends(None))) for name, value in one.published.items()]
    return found or [("", (None, None, None, None, *_ends(None)))]


def answer_verdict(value: Estimate) -> str:
    """Return yes where the whole interval is above 0, no where it is below, and undecided where it holds 0.

    >>> answer_verdict(Estimate(value=2.0, low=0.5, high=3.5))
    'yes'
    """
    if value.low > 0:
        return "yes"
    return "no" if value.high < 0 else "undecided"
