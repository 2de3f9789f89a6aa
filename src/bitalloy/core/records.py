"""Frozen records that cross the borders between stages.

Every record is a `msgspec.Struct`: typed, immutable, with unknown fields refused on decoding, so a
file written by another version fails loudly instead of being half understood. Units are in the field names.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any, get_type_hints

import msgspec

from bitalloy.core.errors import BitalloyError
from bitalloy.core.tabular import Listing, Tabular


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: immutable, keyword-only, strict on decoding."""


class Given(Record, frozen=True, kw_only=True):
    """Base of the records that users fill in: numbers of numpy become Python's, lists tuples.

    Raises:
        BitalloyError: a field is of another type than it is declared with.
    """

    def __post_init__(self) -> None:
        """Bring every field to its type, so that equal settings are stored and found as equal."""
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            if value is msgspec.UNSET:
                continue
            try:
                known = msgspec.convert(_plain(value), kind)
            except msgspec.ValidationError as error:
                record, declared = type(self).__name__, type(self).__annotations__[name]
                raise BitalloyError(f"{record}({name}={value!r}): {name} is of type {declared}. {error}.") from error
            msgspec.structs.force_setattr(self, name, known)


@cache
def _types(record: type[Record]) -> dict[str, Any]:
    return get_type_hints(record)


def _plain(value: object) -> object:
    if callable(numbers := getattr(value, "tolist", None)):  # of numpy, which need not be imported for this
        return _plain(numbers())
    match value:
        case dict():
            return {_plain(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return value


class TensorSpec(Record, frozen=True, kw_only=True):
    """A graph input or output; symbolic dimensions are strings."""

    name: str
    dtype: str
    """ONNX name, e.g. `FLOAT`."""
    shape: tuple[int | str, ...]


class ModelInfo(Record, frozen=True, kw_only=True):
    """What identifies a model and what it looks like from outside."""

    name: str
    sha256: str
    """Hash of the file's bytes, followed by its external data files in order of their names."""
    size_bytes: int
    opset: int
    nodes: int
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class DataInfo(Record, frozen=True, kw_only=True):
    """Which samples a number rests on."""

    name: str
    count: int
    seed: int
    sha256: str
    """Over the sample identifiers and file contents, in order."""
    preprocessing: str
    """How inputs were prepared, in words, e.g. `letterbox 640x640 pad 114, RGB, /255`."""


class Head(Record, frozen=True, kw_only=True):
    """One part of the outputs with a meaning of its own, e.g. boxes or class scores.

    `tensor` carries it inside the graph: the output itself, or one operand of the `Concat` that makes it.
    """

    name: str
    output: str
    tensor: str
    axis: int | None = None
    start: int = 0
    stop: int | None = None
    """`output[start:stop]` along `axis`; the whole output where `axis` is None."""
    scores: tuple[int, int] | None = None
    """Where the class scores lie along `axis`, if the head is boxes that are weighted by relevance."""
    family: str = ""
    """The family whose relevance weighs the errors (`bitalloy.model.relevance`); empty where all count alike."""
    kind: str = ""
    """`categorical` or `bernoulli` where errors are KL divergences of predictions, empty for squared errors."""
    given: str = ""
    """What the output holds: `logits`, `probabilities` or their `logarithms`; empty where it is no distribution. A head
    of squared errors with `probabilities` is their logits, which `tensor` carries."""
    classes: int | None = None
    """Axis of the output along which the probabilities of a categorical distribution add up to one."""


class Histogram(Record, frozen=True, kw_only=True):
    """How the values of a tensor are distributed; of a large tensor those of a part of its places."""

    low: float
    """Left end of the first bin; its multiples of `width` include 0, and the outer bins are not empty."""
    width: float
    counts: tuple[int, ...]
    """Number of values per bin."""


class TensorRange(Record, frozen=True, kw_only=True):
    """Calibrated range of one activation tensor."""

    tensor: str
    low: float
    high: float
    method: str
    magnitude: float
    """Largest absolute value that was seen, whatever the method cuts off."""
    subnormal: float
    """Share of the non-zero values below 6.1e-5, which FP16 stores with fewer than 11 bits."""
    infinite: bool = False
    """Whether a mask made some of its numbers infinite; all other fields are of the finite ones."""
    others: dict[str, tuple[float, float]] = {}
    """Low and high by other methods that are compared with this one; those that hardly differ are left out."""
    histogram: Histogram | None = None
    """The finite values; None where none was kept."""


class Calibration(Record, frozen=True, kw_only=True):
    """Ranges of all tensors that may be rounded."""

    model_sha256: str
    data: DataInfo
    method: str
    ranges: tuple[TensorRange, ...]
    half_margin: float
    """65504 divided by the largest magnitude seen in any tensor: below 1 half precision overflows."""


class Estimate(Record, frozen=True, kw_only=True):
    """A number with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float

    @property
    def negated(self) -> Estimate:
        """The number with the other sign, and its interval."""
        return Estimate(value=-self.value, low=-self.high, high=-self.low)


class RangeChoice(Record, frozen=True, kw_only=True):
    """What came of choosing a range per tensor: the model with all it can rounded, executed with and without it."""

    heads: tuple[str, ...]
    methods: dict[str, int]
    """Number of tensors by chosen method."""
    samples: int
    first_db: tuple[Estimate, ...]
    """SQNR of every head where all tensors are calibrated by the first method."""
    chosen_db: tuple[Estimate, ...]
    kept: bool
    """Whether the choice does better in the mean of the heads; the first method's ranges are taken otherwise."""


class Sensitivity(Record, frozen=True, kw_only=True):
    """What rounding one thing alone does to one head."""

    id: str
    scope: str
    """`site`, `unit` or `region`."""
    scheme: str
    """The scheme in which it is rounded."""
    part: str
    """What of it is rounded: `all`, `weights` or `activations`."""
    head: str
    sqnr_db: Estimate
    """10 log10(||y||^2 / ||J e||^2), higher is better. Of heads named `... KL`: 10 log10(1 nat / divergence)."""
    flagged: bool = False
    """True where the error left the linear regime in the local check, so the number may be off."""
    exact: bool = False
    """True where the number was measured by execution, as a whole or site by site; False where gradients predict it."""


class GivenRounding(Record, frozen=True, kw_only=True):
    """What one rounding of a quantized file does alone."""

    tensor: str
    node: str
    """The node that makes the tensor; empty for an input of the model."""
    head: str
    """The head that suffers most."""
    sqnr_db: float
    """Predicted by the probe matrix, or measured."""
    executed: bool = False
    """Whether it was measured: so are the worst, and those behind the place where a head is taken, such as one that
    puts boxes and scores on one scale."""
    share: float
    """Its part of the predicted damage of all roundings, on that head."""


class SensitivityTable(Tabular, Record, frozen=True, kw_only=True):
    """Sensitivities of one probe matrix, or of one series of exact measurements."""

    model_sha256: str
    data: DataInfo
    samples: int
    probes: int
    seed: int
    settled: bool
    """Whether the ranking of units was stable when sampling stopped."""
    rows: tuple[Sensitivity, ...]
    method: str = "probe"
    """`probe`, `one-at-a-time` or `leave-one-out`; with the last, SQNR is of all that is rounded without `id`."""
    given: tuple[GivenRounding, ...] = ()
    """What each rounding of a quantized file does alone, worst first; of `bitalloy sensitivity` by the probe matrix."""

    def listing(self) -> Listing:
        """Return the rows as a table: SQNR in dB of each site, unit and region on each head, with its interval."""
        columns = ("scope", "id", "scheme", "part", "head", "sqnr_db", "low", "high", "flagged", "exact")
        rows = [
            (
                r.scope,
                r.id,
                r.scheme,
                r.part,
                r.head,
                r.sqnr_db.value,
                r.sqnr_db.low,
                r.sqnr_db.high,
                r.flagged,
                r.exact,
            )
            for r in self.rows
        ]
        return Listing(f"sensitivities by {self.method}", columns, rows)


class Secant(Record, frozen=True, kw_only=True):
    """How the outputs really move on the way from the float network to the one with all it can rounded.

    The probe matrix is a tangent; where errors are large the network bends. Measured with all errors scaled alike.
    """

    heads: tuple[str, ...]
    fractions: tuple[float, ...]
    """Parts of every rounding error that were applied, e.g. (0.5, 1.0)."""
    damage: tuple[tuple[float, ...], ...]
    """Measured relative error energy, [fraction][head]."""
    linear: tuple[float, ...]
    """Relative error energy of that network that the probe matrix predicts on the same samples, per head."""
    samples: int


class Latency(Record, frozen=True, kw_only=True):
    """Distribution of single-inference wall time in one interleaved measurement."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int
    interval_ms: Estimate | None = None
    """The median with its 95 % interval over sittings with new sessions; None where there were not several."""


class MetricValue(Record, frozen=True, kw_only=True):
    """A task metric on one model."""

    value: float
    low: float
    high: float
    n: int
    """Number of samples; 0 for a metric without values of single samples, of which no interval is known."""


class Workload(Given, frozen=True, kw_only=True):
    """What an answer of a language model is made of; None where what is usual is meant."""

    prompt: int | None = None
    """Positions of the prompt, those of an image included."""
    new: int | None = None
    """Tokens of the answer, each a run of the decoder."""


class Settings(Given, frozen=True, kw_only=True):
    """What an analysis depends on beside model and data."""

    targets: tuple[str, ...] = ("ort-cpu",)
    """Names from `bitalloy targets`. One analysis serves all; the first is the one that `Analysis` stands for."""
    device: str = ""
    """Id of the device, see `bitalloy targets`, for which targets are estimated that do not run here; empty for the one
    that each has by itself."""
    calibration_samples: int = 64
    range_method: str = "auto"
    """`minmax`, `extended`, `moving`, `percentile`, `entropy`, `mse`, or `auto`: of these, but for `minmax` and
    `moving`, the one that disturbs the outputs least, for every tensor on its own; `extended` where nothing is probed
    or few values were seen."""
    samples: int | None = None
    """Samples of the probe matrix; None stops when the ranking has settled, between 8 and 16."""
    probes: int = 8
    """Reverse passes per sample, shared out evenly among the heads, at least two for each; half as many more, at least
    two, for every head that is also measured as a KL divergence."""
    seed: int = 0
    sizes: tuple[dict[str, tuple[int, ...]], ...] = ()
    """Further shapes of inputs with open sizes, each input -> shape, at which ranges are taken too and the shipped
    model is verified; inputs that one does not name keep the sizes of the samples."""
    exclude: tuple[str, ...] = ()
    """Glob patterns over node names and regions that stay in float."""
    schemes: tuple[str, ...] = ()
    """Schemes that plans may use beside the baseline; empty for the usual ones of each target."""
    workload: Workload | None = None
    """What a latency of a language model pays for; None for the sample's prompt and 64 new tokens."""
    protect: bool = True
    """Whether what the model's family keeps in float stays so, unless measurement overrules it."""
    equalize: bool = True
    """Whether channels are scaled between layers where measurement says that it pays (`bitalloy.rewrite.equalize`)."""
    bias_correction: bool = True
    """Whether the mean error of rounded layers is taken out of their biases where measurement says that it pays."""
    weight_rounding: str = "auto"
    """How weights that are stored in blocks are rounded (`bitalloy.corrections.rounding`): `nearest`, `search`, `gptq`,
    `weighted`, or `auto`: the better one of the last two where the model with all it can in blocks gains by it."""


class SampleParts(Record, frozen=True, kw_only=True):
    """Samples that were drawn, by what they serve, as indices into them; see `bitalloy.data.parts`."""

    available: int
    """Number of samples from which they were drawn."""
    calibration: tuple[int, ...]
    """Those to which ranges, factors and offsets are fitted."""
    probe: tuple[int, ...]
    """Those from which errors are predicted: the probe matrix, and exact measurements of units."""
    verification: tuple[int, ...]
    """Those on which whole models are executed: choices between plans and the numbers of the shipped one."""

    @property
    def disjoint(self) -> bool:
        """Whether no sample serves two parts."""
        every = (*self.calibration, *self.probe, *self.verification)
        return len(set(every)) == len(every)

    def describe(self) -> str:
        """Say in a sentence how many samples serve what, and which parts share some."""
        parts = {"calibration": self.calibration, "probing": self.probe, "verification": self.verification}
        counts = ", ".join(f"{len(part)} for {name}" for name, part in parts.items())
        shared = [
            f"{one} and {other} share {both}"
            for (one, first), (other, second) in combinations(parts.items(), 2)
            if (both := len({*first} & {*second}))
        ]
        told = "; ".join(shared) if shared else "no sample serves two of them"
        samples = f"{self.available} sample{'s' if self.available != 1 else ''}"
        return f"Of {samples}, drawn at random: {counts}; {told}."


def part_of(info: DataInfo, count: int) -> DataInfo:
    """Describe the same data when only `count` of its samples were used."""
    return msgspec.structs.replace(info, count=count)
