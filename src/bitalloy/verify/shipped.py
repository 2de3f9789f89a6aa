"""The plan that is shipped, with all that was measured on the way to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitalloy.core.outcome import (
    DropEstimate,
    Evaluation,
    GivenModel,
    KernelEffect,
    PeakMemory,
    Resolution,
    Round,
    Steadiness,
    Triple,
    VerifiedSize,
)
from bitalloy.core.planned import Measured, Metrics, Planned
from bitalloy.core.plans import SingleFormat
from bitalloy.core.schemes import Plan


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan:
    """The plan that is shipped, with all that was measured on the way to it."""

    planned: Planned
    measured: Measured
    sizes: Mapping[str, Triple]
    """Graph -> its size in bytes in the three models."""
    metrics: Metrics
    rounds: tuple[Round, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    resolution: tuple[Resolution, ...] = ()
    """What the labelled images resolve."""
    drop_estimates: Mapping[str, DropEstimate] = field(default_factory=dict)
    """Metric that is limited -> its drop by all that was evaluated."""
    single: Plan | None = None
    """The best plan of one scheme, measured beside it; None where it is one of the others, or there is none."""
    singles: tuple[SingleFormat, ...] = ()
    """Predictions of all plans of one scheme."""
    memory: PeakMemory | None = None
    """None where the target cannot run here."""
    kernel_effects: tuple[KernelEffect, ...] | None = None
    """What optimization changes; None where that was not examined."""
    given: GivenModel | None = None
    """The file itself, where it is quantized."""
    bound: Mapping[str, str] = field(default_factory=dict)
    """Graph whose file leaves sizes open, and which has those of the samples -> why."""
    sizes_tried: tuple[VerifiedSize, ...] = ()
    """Other sizes at which the plan was verified."""
    steadiness: Steadiness | None = None
    """Whether the machine stayed as it was; None where latency is estimated."""
