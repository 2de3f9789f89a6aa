"""Records of the result of a run: what `summary.json` is made of."""

from __future__ import annotations

import msgspec

from bitalloy.core.plans import Budget, SingleFormat
from bitalloy.core.records import DataInfo, Estimate, GivenRounding, Latency, MetricValue, RangeChoice, Record
from bitalloy.core.schemes import BASELINE
from bitalloy.core.status import Status

REFERENCE, LOWEST, MIXED, ONE_SCHEME = "float", "int8", "mixed", "single"
"""Names of the columns of `summary.json`: the float model, the one with all that it can in its lowest scheme, the mixed
one, and the best of those with all that they can in one scheme. They are stable, whatever the schemes of the target.
The last one is absent where units have no choice between schemes, and where it is one of the others. Beside them stands
`rewritten`: the float model after the graph rewrites that every plan has, without any rounding. It is absent where the
target does not run here, and for large models."""


class MetricComparison(Record, frozen=True, kw_only=True):
    """One task metric on the three models, on the same samples."""

    reference: MetricValue = msgspec.field(name=REFERENCE)
    lowest: MetricValue = msgspec.field(name=LOWEST)
    """The metric of the model with all that it can in its lowest scheme."""
    mixed: MetricValue
    single: MetricValue | None = None
    drop_lowest: Estimate | None = msgspec.field(name=f"drop_{LOWEST}", default=None)
    """float - lowest, with a paired 95 % bootstrap interval; None where the metric has no values of single samples, so
    that its error is unknown."""
    drop_mixed: Estimate | None = None
    drop_single: Estimate | None = None
    against_float: bool = False
    """Whether it compares with the float model, and not with labels."""
    agreement: bool = False
    """Whether it is a part in 0..1 of what float says that a model says too."""
    higher_is_better: bool = True
    """Whether a lower value than that of float is a loss."""

    @property
    def lost(self) -> float:
        """How much worse the mixed model is than float, as measured."""
        sign = 1.0 if self.higher_is_better else -1.0
        return sign * (self.reference.value - self.mixed.value)


class Comparison(Record, frozen=True, kw_only=True):
    """A prediction beside its measurement."""

    predicted: float | None
    """The prediction before any plan was verified."""
    measured: float
    corrected: float | None = None
    """What samples that no part of the run has seen should give, by all that is known, see `verify.summary.expected`;
    None where nothing is predicted."""


class HeadComparison(Record, frozen=True, kw_only=True):
    """SQNR in dB of one head, or its KL divergence in nats."""

    lowest: Comparison = msgspec.field(name=LOWEST)
    mixed: Comparison
    single: Comparison | None = None
    rewritten: Comparison | None = None


class Triple(Record, frozen=True, kw_only=True):
    """A number for the float model, the one with all that it can in its lowest scheme, and the mixed one."""

    reference: float = msgspec.field(name=REFERENCE)
    lowest: float = msgspec.field(name=LOWEST)
    mixed: float
    single: float | None = None
    rewritten: float | None = None


class LatencySpread(Record, frozen=True, kw_only=True):
    """Distribution of latency for the three models, in one interleaved measurement."""

    reference: Latency = msgspec.field(name=REFERENCE)
    lowest: Latency = msgspec.field(name=LOWEST)
    mixed: Latency
    single: Latency | None = None
    rewritten: Latency | None = None


class PeakMemory(Record, frozen=True, kw_only=True):
    """Peak resident memory in MB, each of a process that opens one model and makes each step of its workload once.

    None where it could not be measured.
    """

    reference: float | None = msgspec.field(name=REFERENCE)
    lowest: float | None = msgspec.field(name=LOWEST)
    mixed: float | None
    single: float | None = None
    process: float | None
    """Of the process before it opens a model, with numpy and the runtime imported: it is part of the others."""


class GivenModel(Record, frozen=True, kw_only=True):
    """A quantized file beside the float model that it rounds: how much its roundings lose, and where."""

    tensors: int
    """Number of tensors that it rounds."""
    weights: int
    """Number of weights that it stores as integers."""
    predicted_db: dict[str, float]
    """Head -> predicted SQNR of all its roundings together."""
    measured_db: dict[str, Estimate] | None
    """Head -> measured SQNR of the file, on the samples of the verification; None where it cannot run here."""
    written_db: dict[str, Estimate] | None
    """The same of the file executed node by node, without ONNX Runtime's optimizations; None for other runtimes."""
    latency_ratio: Estimate | None
    """Its measured latency over that of the float model; None where it cannot run here."""
    worst: tuple[GivenRounding, ...]
    """Its roundings, worst first."""


class StepLatency(Record, frozen=True, kw_only=True):
    """What one step of a workload takes."""

    name: str
    times: int
    """How often it is made."""
    latency_ms: LatencySpread
    """Of one time."""


class Remeasured(Record, frozen=True, kw_only=True):
    """What units of a plan do by themselves, executed on the samples of the verification."""

    units: tuple[str, ...]
    """One, or a pair of units that was rounded together."""
    change_db: dict[str, float]
    """Head -> measured over predicted damage in dB, above 0 where they do more than the probe matrix said."""


class Repair(Record, frozen=True, kw_only=True):
    """Why a measured plan differs from its prediction, and what was corrected."""

    gap_db: dict[str, float]
    """Head -> measured minus predicted SQNR of the plan, below 0 where it is worse than predicted."""
    remeasured: tuple[Remeasured, ...]
    """Largest change first. The probe matrix was fitted to all of them, and to the plan as a whole."""
    left_db: dict[str, float]
    """Head -> the gap after the correction."""


class Round(Record, frozen=True, kw_only=True):
    """One round of search, measurement and correction."""

    latency_ratio_limit: float | None
    min_sqnr_db: float | None
    predicted_ratio: float
    measured_ratio: float
    sqnr_db: tuple[float, ...]
    """Measured, of each head but divergences."""
    schemes: dict[str, int]
    """Scheme -> number of units in it, `BASELINE` left out."""
    predicted_db: tuple[float, ...] = ()
    """SQNR of the same heads as predicted before the plan was measured."""
    head_sqnr_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Floors on single heads."""
    source: str = "search"
    """Where the plan comes from: `search`; `front`, a neighbour that measured better; `metric`, the fastest plan of the
    front that keeps the task metric; or `single`, the best plan of one scheme."""
    repair: Repair | None = None
    """What was corrected after the measurement; None where prediction and measurement agree."""
    shipped: bool = False
    """Whether this plan is the result."""


class Resolution(Record, frozen=True, kw_only=True):
    """The smallest drop of a metric that the labelled images tell from noise."""

    metric: str
    images: int
    resolved: float
    """Half-width of the 95 % interval of a drop, in the metric's own unit."""
    disturbance: str
    """What was done to the float model's answers to find that."""
    limit: float | None = None
    """Limit on the drop; None where it is not limited."""
    needed: int | None = None
    """Number of such images that resolve a drop as large as the limit; None without a limit above 0."""


class DropEstimate(Record, frozen=True, kw_only=True):
    """The drop of a limited metric, from labels and from agreement with float together, see `verify.estimate`."""

    drop: Estimate
    """The estimate, with the middle 95 % of its distribution."""
    limit: float
    probability: float
    """Probability that the drop is at most the limit."""
    confidence: float
    """Probability that was asked for."""
    plans: int
    """Number of plans that were evaluated, all of which tell how drop and agreement belong together."""
    images: int
    """Number of images on which this plan was evaluated."""


class Evaluation(Record, frozen=True, kw_only=True):
    """One plan on the task, in the search for the fastest that keeps its limits."""

    schemes: dict[str, int]
    """Scheme -> number of units in it, `BASELINE` left out."""
    predicted_ratio: float
    """Latency over float."""
    drops: dict[str, float]
    """Metric that is limited -> how much worse the plan is than float, on the images that were evaluated."""
    kept: bool
    """Whether all limits hold with the confidence that was asked for."""
    images: int = 0
    """Number of images that it took to decide; 0 in summaries of older versions."""
    agreements: dict[str, float] = msgspec.field(default_factory=dict)
    """Metric of agreement with float -> its value."""
    estimates: dict[str, Estimate] = msgspec.field(default_factory=dict)
    """Metric that is limited -> its drop by all that was evaluated, with the middle 95 % of its distribution."""
    probability: float | None = None
    """Probability that the limit that it keeps least surely holds."""


class Correction(Record, frozen=True, kw_only=True):
    """A light correction of the model, decided by measurement."""

    name: str
    """`smoothing` or `cross-layer` (scaling between layers), or `bias`."""
    places: int
    """Tensors that are scaled, or layers that may be rounded and have a bias; it is corrected where they do."""
    kept: bool
    """Whether rounded models have it."""
    reason: str
    """Why it is kept or not."""
    without_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Measured SQNR by head of the model with all it can rounded, without divergences; empty where it was not tried."""
    with_db: dict[str, float] = msgspec.field(default_factory=dict)
    fitted_samples: int = 0
    """Samples that decided the factors or offsets."""
    samples: int = 0
    """Samples on which the SQNR was measured."""


class KernelEffect(Record, frozen=True, kw_only=True):
    """A difference between what the mixed model gives as its runtime optimizes it and what its graph says."""

    head: str
    optimized_db: float
    """SQNR of the model as it is shipped and run."""
    written_db: float
    """SQNR of its graph with every node executed by its own kernel: what predictions are about."""
    cause: str
    """What makes the difference, as executions without it prove, or that it is not known."""


class VerifiedSize(Record, frozen=True, kw_only=True):
    """The shipped model beside the float one at another size than that of the analysis."""

    shapes: dict[str, tuple[int, ...]]
    """Input -> shape, of inputs with open sizes."""
    sqnr_db: dict[str, float] = msgspec.field(default_factory=dict)
    """Head -> measured SQNR; divergences are left out."""
    failed: str = ""
    """Why the shipped model does not run at that size, where the float model does; empty where it runs."""


class CompiledCounts(Record, frozen=True, kw_only=True):
    """How far an engine agrees with its plan, counted over convolutions and products of matrices."""

    planned: int
    """Number of them in the plan."""
    found: int
    """Those that the engine's text names."""
    agree: int
    """Those whose kernels read the planned types."""
    differ: int
    """Those whose kernels read others."""
    seconds: float
    """Time that the compiler took for all graphs."""
    capability: int
    """Compute capability that it was compiled for, e.g. 89."""
    built: bool = True
    """Whether every graph has an engine."""


class UsedSamples(Record, frozen=True, kw_only=True):
    """Which samples served what; see `bitalloy.data.parts` for how they are drawn."""

    available: int
    """Number of samples from which they were drawn."""
    calibration: tuple[str, ...]
    """Names of the samples to which ranges, factors and offsets were fitted."""
    probe: tuple[str, ...]
    """Names of those from which errors are predicted."""
    verification: tuple[str, ...]
    """Names of those on which SQNR was measured."""
    disjoint: bool
    """Whether no sample served two of them."""
    told: str
    """The same in a sentence, with numbers."""


class Steadiness(Record, frozen=True, kw_only=True):
    """Whether the machine stayed as it was while a run measured: what the float model took, time after time."""

    priced_ms: float
    """When the prices of units and borders were measured."""
    sittings_ms: tuple[float, ...]
    """In each sitting that measured the shipped plan, in order; its times were not what it was chosen by."""
    drift: float
    """Largest of these times over the smallest, less 1."""
    chosen_ratio: Estimate | None = None
    """Latency over float of the shipped plan when it was chosen among several that were measured; None where it was
    measured once, after it was chosen."""


class Summary(Record, frozen=True, kw_only=True):
    """`summary.json`: the result of a run. Names are stable; new ones may be added."""

    schema: int = 2
    headline: str
    """The result in words; says first if the mixed model is not faster than float."""
    status: Status
    """Whether the mixed model keeps the budget, see `verify.status.status_of`."""
    model: str
    model_sha256: str
    target: str
    device: str
    threads: int
    budget: Budget
    latency_ms: Triple
    latency_ratio: float
    """mixed / float, from pairs of runs in the same rounds, in a sitting that did not choose the plan."""
    predicted_latency_ratio: float
    latency_spread_ms: LatencySpread
    size_bytes: Triple
    sqnr_db: dict[str, HeadComparison]
    sqnr_interval_db: dict[str, Estimate]
    """Measured interval of the mixed model, per head."""
    metrics: dict[str, MetricComparison]
    confidence_shift: dict[str, Estimate]
    """Mean score of matched detections, model minus float; empty without a detection task."""
    units: int
    """Number of units that may run in another scheme than `BASELINE`."""
    schemes: dict[str, int]
    """Scheme -> number of units that the plan puts into it, `BASELINE` left out."""
    samples: int
    probes: int
    settled: bool
    flagged_units: tuple[str, ...]
    half_margin: float = msgspec.field(name="fp16_margin")
    """65504 divided by the largest magnitude seen in any tensor: below 1 half precision overflows."""
    calibration: DataInfo
    analysis: DataInfo
    seconds: dict[str, float]
    """Wall time per stage; 0 where a stored result was used."""
    rounds: tuple[Round, ...]
    """All rounds in order; the shipped plan is the best measured of them."""
    seed: int
    versions: dict[str, str]
    notes: tuple[str, ...]
    graphs: dict[str, Triple] = msgspec.field(default_factory=dict)
    """File size in bytes of each graph of a program; empty for a model of one graph."""
    protected_units: tuple[str, ...] = ()
    """Units that stay in float by advice of the model's family; the reasons are in the plan."""
    kl_nats: dict[str, HeadComparison] = msgspec.field(default_factory=dict)
    """KL(float || quantized) of the heads that give distributions: the sum over a sample where each element is its own
    (sigmoid), the mean over positions where classes exclude each other (softmax)."""
    evaluations: tuple[Evaluation, ...] = ()
    """Plans that were evaluated for limits on the task, in order."""
    resolution: tuple[Resolution, ...] = ()
    """What the labelled images resolve, by metric; empty without labels."""
    drop_estimates: dict[str, DropEstimate] = msgspec.field(default_factory=dict)
    """Metric that is limited -> its drop for the mixed model, by all that was evaluated."""
    box_overlap: dict[str, Estimate] = msgspec.field(default_factory=dict)
    """Mean IoU of the boxes of matched detections, model with float; empty without a detection task."""
    predicted_latency_ratio_interval: Estimate | None = None
    """95 % prediction interval of `predicted_latency_ratio`; of an estimate the range of what the device may do, see
    `measure.roofline.ratio_interval`."""
    latency_ratio_interval: Estimate | None = None
    """95 % interval of the measured `latency_ratio`; None where latency is estimated."""
    lowest_latency_ratio: Estimate | None = msgspec.field(name=f"{LOWEST}_latency_ratio", default=None)
    """The same ratio, with its interval, of the model with all that it can in its lowest scheme."""
    single_latency_ratio: Estimate | None = None
    """The same ratio, with its interval, of the model with all that it can in one scheme."""
    usual_scheme: str = BASELINE
    """Scheme in which people run whole models on the target, which the mixed model must beat."""
    usual_latency_ratio: Estimate | None = None
    """Latency of the mixed model over that of the model with all that it can in `usual_scheme`, with its interval; of
    an estimate, see `measure.roofline.ratio_interval`. None where `usual_scheme` is float, or the only one."""
    rewritten_latency_ratio: Estimate | None = None
    """The same ratio, with its interval, of the float model after the graph rewrites of the mixed one: what is gained
    without any rounding."""
    single_formats: tuple[SingleFormat, ...] = ()
    """Predictions of the plans of one scheme, fastest first; empty where plans have no choice between several."""
    others: tuple[str, ...] = ()
    """The other targets of the run, in the order of its settings, whose results lie in folders of their names."""
    given: GivenModel | None = None
    """The file itself, where it is quantized: then float stands for the model without its roundings."""
    workload: str = "one inference"
    """What one latency pays for."""
    steps: tuple[StepLatency, ...] = ()
    """The steps of a language model's answer: the prompt, and each new token."""
    peak_memory_mb: PeakMemory | None = None
    """Peak resident memory of running each model; None where the target cannot run on this machine."""
    ranges: RangeChoice | None = None
    """What choosing the range of every tensor by predicted damage brought; None where one method was asked for."""
    latency_estimated: bool = False
    """True where the target cannot run on this machine: all latencies follow from peak rates of `device`."""
    kernel_effects: tuple[KernelEffect, ...] | None = None
    """Heads whose SQNR differs by more than 1 dB between the mixed model as optimized and as written, on the samples of
    the verification; None where that was not examined: a device that is not here, or a large model."""
    corrections: tuple[Correction, ...] = ()
    """Light corrections that were tried, in order; those that were switched off are left out."""
    parts: UsedSamples | None = None
    """Which samples served calibration, probing and verification; None in summaries of older versions."""
    sizes: tuple[VerifiedSize, ...] = ()
    """Other sizes at which the shipped model was verified; empty where it leaves none open."""
    steadiness: Steadiness | None = None
    """Whether the machine stayed as it was; None where latency is estimated."""
    compiled: CompiledCounts | None = None
    """What NVIDIA's compiler made of the mixed model; None where it is not installed, or the target is not NVIDIA's."""
    profiles: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = msgspec.field(default_factory=dict)
    """Graph -> input that the shipped model leaves open -> its least, usual and largest shape in the workload; empty
    for targets that need no such optimization profile."""
