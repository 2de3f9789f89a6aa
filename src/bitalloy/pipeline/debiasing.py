"""Bias correction of the plan that would be shipped: fitted on some samples, judged on others, kept where it gains."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from bitalloy.biases import corrections, find_biases
from bitalloy.outcome import Correction
from bitalloy.pipeline.analyze import Analysis
from bitalloy.pipeline.records import Measured, Planned
from bitalloy.pipeline.rounds import judged, shortfall
from bitalloy.pipeline.work import Workspace
from bitalloy.records import Estimate, Record
from bitalloy.store import key_of
from bitalloy.verify import artefact_sqnr

BIAS = "bias"
FITTED, LEAST = 16, 4
"""Samples that the offsets come from, and the fewest that will do."""
BETTER_DB, WORSE_DB = 0.1, 0.2
"""Mean SQNR that must be gained, and what no head may lose."""


class Debiased(Record, frozen=True, kw_only=True):
    """What was found."""

    correction: Correction
    offsets: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    """Node -> (channels,) added to its bias, where the correction is kept."""
    sqnr: tuple[Estimate, ...] = ()
    """Per head, of the corrected model, where it was measured."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The offsets as `bitalloy.apply` takes them."""
        return {node: np.array(values) for node, values in self.offsets.items()}

    @property
    def identity(self) -> list[str]:
        """What decides the shipped model beside analysis and plan."""
        return [f"biases {hashlib.sha256(msgspec.json.encode(self.offsets)).hexdigest()}"] if self.offsets else []

    def without(self, reason: str) -> Debiased:
        """The same, not kept."""
        correction = msgspec.structs.replace(self.correction, kept=False, reason=reason)
        return Debiased(correction=correction, sqnr=self.sqnr)


def debias(
    analysis: Analysis, planned: Planned, measured: Measured, samples: Sequence[int], work: Workspace
) -> Debiased:
    """Correct the biases of a plan's INT8 layers, and say whether it pays.

    It is kept where the mean SQNR of the heads rises by more than `BETTER_DB`, none falls by more than `WORSE_DB`, and
    no floor is missed that was kept.

    Args:
        analysis: of the model.
        planned: the plan.
        measured: its measurement on `samples`.
        samples: on which the corrected model is measured; the offsets come from others.
        work: where to keep and show results.
    """
    lowered = planned.plan.lowered()
    biases = find_biases(analysis.graph, analysis.units, lowered)
    fitted = [i for i in range(len(analysis.data)) if i not in samples][:FITTED]
    if not biases:
        return _untried(0, "no INT8 layer with a bias")
    if analysis.graph.large:
        return _untried(len(biases), "not tried on large models")
    if len(fitted) < LEAST:
        return _untried(len(biases), f"needs {LEAST} samples beside the {len(samples)} of the verification")

    def make() -> bytes:
        with work.stage("debias", len(fitted)) as progress:
            feeds = (analysis.data.feeds(i) for i in fitted)
            offsets = corrections(analysis.graph, biases, analysis.ranges, analysis.target, feeds, progress.advance)
        model = analysis.executable(analysis.artefact(lowered, offsets))
        with work.stage("debias", len(samples)) as progress:
            found = artefact_sqnr(
                analysis.original(),
                {"corrected": model},
                analysis.heads,
                (analysis.data.feeds(i) for i in samples),
                seed=analysis.settings.seed,
                progress=progress.advance,
            )["corrected"]
        correction = _judge(planned, measured, found, len(biases), len(fitted), len(samples))
        kept = {node: tuple(values.tolist()) for node, values in offsets.items()} if correction.kept else {}
        return msgspec.json.encode(Debiased(correction=correction, offsets=kept, sqnr=found))

    key = key_of(
        analysis=analysis.key,
        mixed=sorted(lowered),
        samples=list(samples),
        floors=planned.plan.budget,
        **analysis.execution,
    )
    return msgspec.json.decode(work.cached("debias", key, make), type=Debiased)


def _judge(
    planned: Planned, measured: Measured, found: tuple[Estimate, ...], places: int, fitted: int, samples: int
) -> Correction:
    before = judged(planned, measured)
    after = judged(planned, msgspec.structs.replace(measured, sqnr_mixed=found))
    changes = [after[h] - before[h] for h in after]
    gain, worst, budget = float(np.mean(changes)), min(changes), planned.plan.budget
    missed = sum(shortfall(budget, after).values()) > sum(shortfall(budget, before).values())
    return Correction(
        name=BIAS,
        places=places,
        kept=gain > BETTER_DB and worst >= -WORSE_DB and not missed,
        reason=f"mean SQNR of the mixed model {gain:+.2f} dB, worst head {worst:+.2f} dB",
        model="mixed",
        without_db={h: round(v, 3) for h, v in before.items()},
        with_db={h: round(v, 3) for h, v in after.items()},
        fitted_samples=fitted,
        samples=samples,
    )


def _untried(places: int, reason: str) -> Debiased:
    return Debiased(correction=Correction(name=BIAS, places=places, kept=False, reason=reason))
