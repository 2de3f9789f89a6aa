"""Trying a correction: the model with all in its lowest scheme is executed with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitalloy.core.outcome import Correction
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import Dataset
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.rewrite.calibrated import Calibrated


def compare(
    without: Calibrated, with_: Calibrated, data: Dataset, samples: Sequence[int], stage: str, work: Workspace
) -> tuple[dict[str, float], dict[str, float]]:
    """SQNR in dB of both models by head, divergences left out.

    Args:
        without: the correction.
        with_: it.
        data: samples.
        samples: indices of those to measure on.
        stage: under whose name that is shown.
        work: where to show it.
    """
    models = {name: t.executable(t.artefact(t.units.lowest())) for name, t in (("without", without), ("with", with_))}
    feeds = (data.feeds(i) for i in samples)
    with work.stage(stage, len(samples)) as progress:
        found = artefact_sqnr(without.original(), models, without.heads, feeds, progress=progress.advance)
    first, second = (
        {h.name: round(e.value, 3) for h, e in zip(without.heads, found[name], strict=True) if not h.kind}
        for name in models
    )
    return first, second


def gains(without: Mapping[str, float], with_: Mapping[str, float]) -> tuple[float, float]:
    """DB that are gained over the heads: mean, and least."""
    changes = [with_[h] - without[h] for h in with_]
    return float(np.mean(changes)), min(changes)


def untried(name: str, places: int, reason: str) -> Correction:
    """A correction that was not measured."""
    return Correction(name=name, places=places, kept=False, reason=reason)
