"""Whether ranges that were chosen tensor by tensor pay: the model with all it can rounded, executed with both kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.records import RangeChoice
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork, deciding_target
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.sensitivity.probing import ProbedMatrix
from bitalloy.sensitivity.ranges import best_candidates, chosen_columns

RANGE_SAMPLES = 8
"""Samples on which the choice of ranges is measured."""


class RangeInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides whether ranges that were chosen tensor by tensor are kept."""

    first: ExecutedNetwork
    """The network on the ranges of the first method."""
    chosen: ExecutedNetwork
    samples: tuple[int, ...]
    seed: int


def choose_ranges(
    parts: Sequence[Calibrated], probed: ProbedMatrix, work: Workspace
) -> tuple[list[Calibrated], list[ProbeMatrix], RangeChoice | None]:
    """Choose the range of every tensor on the target that decides, and keep the choice where it pays there.

    Args:
        parts: the model on each target.
        probed: the probe matrix of the model, with the columns of all methods of calibration.
        work: where to keep and show results.

    Returns:
        The parts on their ranges, the matrix of each, and what the choice brought; None where there was none.
    """
    at = deciding_target(parts)
    if len(probed.methods) == 1 or at is None:
        return list(parts), probed.first(), None
    best = best_candidates(probed.matrix, probed.views[at], parts[at].units)
    chosen = [p.on({t: probed.methods[i] for t, i in best.items() if i}) for p in parts]
    choice = _measured_choice(parts[at], chosen[at], work)
    if not choice.kept:
        return list(parts), probed.first(), choice
    names = [
        chosen_columns(candidates, later, best, part.units)
        for candidates, later, part in zip(probed.views, probed.later_views, parts, strict=True)
    ]
    return chosen, [probed.matrix.view(n) for n in names], choice


def _measured_choice(first: Calibrated, chosen: Calibrated, work: Workspace) -> RangeChoice:
    """Execute the model with all it can rounded on both kinds of ranges."""
    samples = first.parts.verification[:RANGE_SAMPLES]
    plain = [i for i, h in enumerate(first.heads) if not h.kind]

    def make() -> bytes:
        plan = first.units.lowest_gated()
        with work.stage("ranges", len(samples)) as progress:
            parts = {"first": first, "chosen": chosen}
            models = {name: p.executable(p.artefact(plan)) for name, p in parts.items()}
            feeds, seed = (first.data.feeds(i) for i in samples), first.settings.seed
            sqnr = artefact_sqnr(first.original(), models, first.heads, feeds, seed=seed, progress=progress.advance)
        means = {name: sum(sqnr[name][i].value for i in plain) for name in parts}
        record = RangeChoice(
            heads=tuple(h.name for h in first.heads),
            methods=dict(Counter(r.method for r in chosen.calibration.ranges)),
            samples=len(samples),
            first_db=sqnr["first"],
            chosen_db=sqnr["chosen"],
            kept=means["chosen"] > means["first"],
        )
        return to_json(record)

    inputs = RangeInputs(first=first.executed, chosen=chosen.executed, samples=samples, seed=first.settings.seed)
    return msgspec.json.decode(work.cached("ranges", inputs, make), type=RangeChoice)
