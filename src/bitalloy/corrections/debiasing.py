"""Bias correction of rounded layers: fitted on some samples, judged on others, kept where it gains.

It is decided before the network is probed, on the model with all it can rounded, so that every prediction and every
plan rests on corrected layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import Correction
from bitalloy.core.records import Record
from bitalloy.core.store import StageInputs
from bitalloy.core.units import Offset
from bitalloy.core.work import Workspace
from bitalloy.corrections.trials import BETTER_DB, JUDGING_SAMPLES, compare_sqnr, sqnr_gains, untried_correction
from bitalloy.data.datasets import Dataset
from bitalloy.rewrite.biases import bias_offsets, find_biases, mean_inputs
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork, deciding_target

BIAS = "bias"
OFFSET_SAMPLES, LEAST_OFFSET_SAMPLES = 16, 4
"""Samples that the offsets are fitted on, and the fewest that will do."""
WORSE_DB = 0.2
"""SQNR that no head may lose."""


class BiasInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the trial of bias correction."""

    networks: tuple[ExecutedNetwork, ...]
    """The network on each target."""
    fitted: tuple[int, ...]
    judged: tuple[int, ...]


class BiasTrial(Record, frozen=True, kw_only=True):
    """What the trial of bias correction found."""

    correction: Correction
    offsets: tuple[dict[str, Offset], ...] = ()
    """For each target: id of a weight's site -> offset; empty where the correction is not kept."""


def debias(parts: Sequence[Calibrated], data: Dataset, samples: Sequence[int], work: Workspace) -> BiasTrial:
    """Correct the biases of all layers that can be rounded, and say whether it pays.

    It is kept, on all targets, where on the first one that rounds the mean SQNR of the heads, with all it can rounded,
    rises by more than `BETTER_DB`, and none falls by more than `WORSE_DB`.

    Args:
        parts: the model on each target.
        data: samples.
        samples: indices of those that the ranges come from; these are used.
        work: where to keep and show results.
    """
    at = deciding_target(parts)
    if at is None:
        return _none(0, "no unit is rounded")
    lead, graph, found = parts[at], parts[at].graph, [find_biases(p.graph, p.units) for p in parts]
    places = len(found[at])
    if not places:
        return _none(0, "no rounded layer with a bias")
    if graph.large:
        return _none(places, "not tried on large models")
    count = len(samples)
    start = count - min(JUDGING_SAMPLES, count // 2)
    fitted, judged = samples[: min(OFFSET_SAMPLES, start)], samples[start:]
    if len(fitted) < LEAST_OFFSET_SAMPLES:
        return _none(
            places, f"needs {LEAST_OFFSET_SAMPLES} samples beside the {len(judged)} on which it is judged, of {count}"
        )

    def make() -> bytes:
        with work.stage("debias", len(fitted)) as progress:
            union = {b.tensor: b for biases in found for b in biases}
            means = mean_inputs(graph, union.values(), (data.feeds(i) for i in fitted), progress.advance)
        added = tuple(bias_offsets(graph, b, p.recipe(), means) for b, p in zip(found, parts, strict=True))
        without, with_ = compare_sqnr(lead, lead.corrected(added[at]), data, judged, "debias", work)
        gain, worst = sqnr_gains(without, with_)
        correction = Correction(
            name=BIAS,
            places=places,
            kept=gain > BETTER_DB and worst >= -WORSE_DB,
            reason=f"mean SQNR of the model with all it can rounded {gain:+.2f} dB, worst head {worst:+.2f} dB",
            without_db=without,
            with_db=with_,
            fitted_samples=len(fitted),
            samples=len(judged),
        )
        return to_json(BiasTrial(correction=correction, offsets=added if correction.kept else ()))

    networks = tuple(p.executed for p in parts)
    inputs = BiasInputs(networks=networks, fitted=tuple(fitted), judged=tuple(judged))
    return msgspec.json.decode(work.cached("debias", inputs, make), type=BiasTrial)


def _none(places: int, reason: str) -> BiasTrial:
    return BiasTrial(correction=untried_correction(BIAS, places, reason))
