"""Bias correction of the INT8 layers: fitted on some samples, judged on others, kept where it gains.

It is decided before the network is probed, on the all-INT8 model, so that every prediction and every plan rests on
corrected layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import msgspec
import numpy as np

from bitalloy.biases import find_biases, mean_inputs, offsets
from bitalloy.data import Dataset
from bitalloy.graph import Graph
from bitalloy.outcome import Correction
from bitalloy.pipeline.work import Workspace
from bitalloy.records import Head, Offset, Record, UnitGraph
from bitalloy.runtime import Artefact
from bitalloy.store import key_of
from bitalloy.targets import Target
from bitalloy.verify import artefact_sqnr

BIAS = "bias"
FITTED, LEAST = 16, 4
"""Samples that the offsets come from, and the fewest that will do."""
JUDGED = 8
"""Samples on which the SQNR is measured."""
BETTER_DB, WORSE_DB = 0.1, 0.2
"""Mean SQNR that must be gained, and what no head may lose."""


class Part(Protocol):
    """What is asked of a model that is calibrated for a target."""

    @property
    def graph(self) -> Graph: ...

    @property
    def target(self) -> Target: ...

    @property
    def units(self) -> UnitGraph: ...

    @property
    def heads(self) -> tuple[Head, ...]: ...

    @property
    def key(self) -> str: ...

    def corrected(self, offsets: dict[str, Offset]) -> Self: ...

    def artefact(self, lowered: frozenset[str]) -> Artefact: ...

    def executable(self, artefact: Artefact) -> Artefact: ...

    def original(self) -> Artefact: ...


class Debiased(Record, frozen=True, kw_only=True):
    """What was found."""

    correction: Correction
    offsets: tuple[dict[str, Offset], ...] = ()
    """For each target: weight site -> offset; empty where the correction is not kept."""


def debias(parts: Sequence[Part], data: Dataset, count: int, work: Workspace) -> Debiased:
    """Correct the biases of all layers that can run in INT8, and say whether it pays.

    It is kept, on all targets, where on the first one with INT8 the mean SQNR of the heads of the all-INT8 model rises
    by more than `BETTER_DB`, and none falls by more than `WORSE_DB`.

    Args:
        parts: the model on each target.
        data: samples.
        count: how many of them the ranges come from; these are used.
        work: where to keep and show results.
    """
    lead = next((p for p in parts if p.units.quantizable()), None)
    if lead is None:
        return _untried(0, "no unit runs in INT8")
    graph, found = lead.graph, [find_biases(p.graph, p.units) for p in parts]
    places = len(find_biases(graph, lead.units))
    if not places:
        return _untried(0, "no INT8 layer with a bias")
    if graph.large:
        return _untried(places, "not tried on large models")
    judged = range(count - min(JUDGED, count // 2), count)
    fitted = range(min(FITTED, judged.start))
    if len(fitted) < LEAST:
        return _untried(places, f"needs {LEAST} samples beside the {len(judged)} on which it is judged, of {count}")

    def make() -> bytes:
        with work.stage("debias", len(fitted) + len(judged)) as progress:
            union = {b.tensor: b for biases in found for b in biases}
            means = mean_inputs(graph, union.values(), (data.feeds(i) for i in fitted), progress.advance)
            all_ = tuple(offsets(graph, b, p.target, means) for b, p in zip(found, parts, strict=True))
            trials = {"without": lead, "with": lead.corrected(all_[list(parts).index(lead)])}
            models = {name: t.executable(t.artefact(t.units.lowest())) for name, t in trials.items()}
            feeds = (data.feeds(i) for i in judged)
            sqnr = artefact_sqnr(lead.original(), models, lead.heads, feeds, progress=progress.advance)
        without, with_ = (
            {h.name: round(e.value, 3) for h, e in zip(lead.heads, sqnr[name], strict=True) if not h.kind}
            for name in trials
        )
        changes = [with_[h] - without[h] for h in with_]
        gain, worst = float(np.mean(changes)), min(changes)
        correction = Correction(
            name=BIAS,
            places=places,
            kept=gain > BETTER_DB and worst >= -WORSE_DB,
            reason=f"mean SQNR of the all-INT8 model {gain:+.2f} dB, worst head {worst:+.2f} dB",
            without_db=without,
            with_db=with_,
            fitted_samples=len(fitted),
            samples=len(judged),
        )
        return msgspec.json.encode(Debiased(correction=correction, offsets=all_ if correction.kept else ()))

    key = key_of(parts=[p.key for p in parts], fitted=list(fitted), judged=list(judged))
    return msgspec.json.decode(work.cached("debias", key, make), type=Debiased)


def _untried(places: int, reason: str) -> Debiased:
    return Debiased(correction=Correction(name=BIAS, places=places, kept=False, reason=reason))
