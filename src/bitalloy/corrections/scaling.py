"""Whether scaling channels between layers pays: each rule is tried with all rounded, and kept where it gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import Correction
from bitalloy.core.records import DataInfo, Record, SampleParts, Settings, TensorSpec
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.corrections.trials import BETTER_DB, JUDGING_SAMPLES, compare_sqnr, sqnr_gains, untried_correction
from bitalloy.data.datasets import Dataset
from bitalloy.model.load import Graph
from bitalloy.rewrite.calibrated import Calibrated, Environment, deciding_target
from bitalloy.rewrite.equalize import CROSS_LAYER, SMOOTHING, ScalingPlace, exponents, find_places, scale

FACTOR_SAMPLES = 8
"""Samples that decide factors and ranges; those behind them judge whether a rule is kept."""


class ScalingInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the trials of scaling between layers."""

    model: str
    """Identity of the network, see `Graph.identity`."""
    shapes: tuple[TensorSpec, ...]
    data: DataInfo
    settings: Settings
    """Settings of the trials."""
    fitted: tuple[int, ...]
    """Samples that decide factors and ranges."""
    judged: tuple[int, ...]
    environments: tuple[Environment, ...]
    """What executes the trials on each target."""


class ScalingTrial(Record, frozen=True, kw_only=True):
    """What the trials of scaling between layers found."""

    corrections: tuple[Correction, ...]
    factors: dict[str, tuple[int, ...]]
    """Tensor -> power of two per channel, of the rules that are kept."""


def scale_channels(
    model: Graph,
    drawn: tuple[Dataset, SampleParts],
    settings: Settings,
    calibrated: Callable[[Graph, Settings], Calibrated],
    work: Workspace,
    environments: Sequence[Environment],
) -> tuple[Graph, tuple[Correction, ...]]:
    """Scale channels by the rules that pay, and report what each rule did.

    Args:
        model: the model as loaded.
        drawn: samples, and those of them that serve calibration.
        settings: the settings of the analysis.
        calibrated: makes a model ready to be rounded, as it is given.
        work: where to keep and show results.
        environments: what executes the trials on each target.
    """
    places = find_places(model)
    if not places:
        reason = "large models share their weights" if model.large else "no place where the rule applies"
        return model, tuple(untried_correction(rule, 0, reason) for rule in (SMOOTHING, CROSS_LAYER))
    data, samples = drawn[0], drawn[1].calibration
    fitted = samples[:FACTOR_SAMPLES]
    judged = samples[len(fitted) : len(fitted) + JUDGING_SAMPLES] or fitted
    few = msgspec.structs.replace(
        settings,
        calibration_samples=len(fitted),
        equalize=False,
        protect=True,
        bias_correction=False,
        weight_rounding="nearest",
    )
    inputs = ScalingInputs(
        model=model.identity,
        shapes=model.info.inputs,
        data=data.info,
        settings=few,
        fitted=fitted,
        judged=judged,
        environments=tuple(environments),
    )

    def make() -> bytes:
        return to_json(_try(model, places, data, fitted, judged, lambda g: calibrated(g, few), work))

    found = msgspec.json.decode(work.cached("equalize", inputs, make), type=ScalingTrial)
    factors = {p: found.factors[p.tensor] for p in places if p.tensor in found.factors}
    return scale(model, factors) if factors else model, found.corrections


def _try(
    model: Graph,
    places: Sequence[ScalingPlace],
    data: Dataset,
    fitted: Sequence[int],
    judged: Sequence[int],
    calibrated: Callable[[Graph], Calibrated],
    work: Workspace,
) -> ScalingTrial:
    with work.stage("equalize", None):
        all_factors = exponents(model, places, (data.feeds(i) for i in fitted))
    kept: dict[ScalingPlace, tuple[int, ...]] = {}
    corrections = []
    base: Calibrated | None = None
    for rule in (SMOOTHING, CROSS_LAYER):
        factors = {p: powers for p, powers in all_factors.items() if p.rule == rule}
        if not factors:
            even = any(p.rule == rule for p in places)
            reason = "channels differ too little to be scaled" if even else "no place where the rule applies"
            corrections.append(untried_correction(rule, 0, reason))
            continue
        base = base or _tried(calibrated(model))
        if base is None:
            corrections.append(untried_correction(rule, len(factors), "no unit is rounded"))
            continue
        changed = _tried(calibrated(scale(model, {**kept, **factors})))
        assert changed is not None, "scaling leaves operators as they are"
        without, with_ = compare_sqnr(base, changed, data, judged, "equalize", work)
        gain, _ = sqnr_gains(without, with_)
        corrections.append(
            Correction(
                name=rule,
                places=len(factors),
                kept=gain > BETTER_DB,
                reason=f"mean SQNR of the model with all it can rounded {gain:+.2f} dB",
                without_db=without,
                with_db=with_,
                fitted_samples=len(fitted),
                samples=len(judged),
            )
        )
        if gain > BETTER_DB:
            kept, base = {**kept, **factors}, changed
    return ScalingTrial(corrections=tuple(corrections), factors={p.tensor: powers for p, powers in kept.items()})


def _tried(trial: Calibrated) -> Calibrated | None:
    """Return the trial on the target that decides."""
    parts = (trial, *trial.others)
    at = deciding_target(parts)
    return None if at is None else parts[at]
