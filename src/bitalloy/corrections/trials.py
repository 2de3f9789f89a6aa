"""Trying a correction: the model with all in its lowest scheme is executed with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitalloy.core.outcome import Correction
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import Dataset
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.rewrite.calibrated import Calibrated

JUDGING_SAMPLES = 8
"""Samples on which the SQNR with and without a correction is measured."""
BETTER_DB = 0.1
"""Mean SQNR over the heads that a correction must gain to be kept."""


def compare_sqnr(
    without: Calibrated, with_: Calibrated, data: Dataset, samples: Sequence[int], stage: str, work: Workspace
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the SQNR in dB of the model without and with a correction, by head; heads of divergences are left out.

    Args:
        without: the model without the correction.
        with_: the model with the correction.
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


def sqnr_gains(without: Mapping[str, float], with_: Mapping[str, float]) -> tuple[float, float]:
    """Return what a correction gains over the heads in dB: the mean, and the least."""
    changes = [with_[h] - without[h] for h in with_]
    return float(np.mean(changes)), min(changes)


def untried_correction(name: str, places: int, reason: str) -> Correction:
    """Report a correction that was not measured."""
    return Correction(name=name, places=places, kept=False, reason=reason)
