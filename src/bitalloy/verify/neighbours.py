"""The plans beside the chosen one, measured: a front that is not only predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.plans import ParetoPoint, PlanReport
from bitalloy.core.records import Estimate, Record, Workload
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.measure import bench
from bitalloy.measure.sqnr import output_sqnr
from bitalloy.measure.workload import priced, workload_of
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import reopeners
from bitalloy.runtime.base import Session
from bitalloy.runtime.steps import total
from bitalloy.sensitivity.analysis import Analysis

NEIGHBOURS, SHOWN_NEIGHBOURS = 6, 2
"""Plans beside the chosen one, as many faster as slower ones where the front has them: those that may take its place,
and those that are only shown."""
NEIGHBOUR_ROUNDS = 5
"""Rounds of each sitting in which all neighbours are timed."""


class NeighbourInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides what is measured of neighbouring plans."""

    network: ExecutedNetwork
    plans: tuple[tuple[tuple[str, str], ...], ...]
    """Plans as pairs of unit and scheme."""
    samples: tuple[int, ...]
    seed: int
    workload: Workload | None


class MeasuredNeighbours(Record, frozen=True, kw_only=True):
    """Plans measured side by side, in the order in which they were given."""

    ratio: tuple[float, ...]
    """Latency of each plan over that of float in the same rounds."""
    milliseconds: tuple[float, ...]
    sqnr: tuple[tuple[Estimate, ...], ...]
    """Measured SQNR, for each plan and head."""


def front_neighbours(plan: PlanReport, count: int = NEIGHBOURS) -> tuple[ParetoPoint, ...]:
    """List the chosen plan of a front and its neighbours by latency, fastest first; the float model is none."""
    points = [p for p in sorted(plan.pareto, key=lambda p: p.predicted_latency_us) if p.chosen]
    chosen = next((i for i, p in enumerate(points) if p.chosen == plan.chosen), None)
    if chosen is None:
        return ()
    start = min(max(chosen - count // 2, 0), max(len(points) - count - 1, 0))
    return tuple(points[start : start + count + 1])


def measure_neighbours(
    analysis: Analysis, points: Sequence[ParetoPoint], samples: Sequence[int], work: Workspace
) -> MeasuredNeighbours:
    """Measure the latency and output SQNR of plans and the float model, interleaved.

    Args:
        analysis: what is known about the model.
        points: the plans.
        samples: indices of the samples for the SQNR.
        work: where to keep and show results.
    """
    plans = [p.chosen for p in points]

    def make() -> bytes:
        artefacts = {str(i): analysis.executable(analysis.artefact(plan)) for i, plan in enumerate(plans)}
        openers = reopeners([analysis.original(), *artefacts.values()])
        sqnr: dict[str, tuple[Estimate, ...]] = {}
        with work.stage("neighbours", bench.SITTINGS * NEIGHBOUR_ROUNDS + len(samples)) as progress:

            def compare(sessions: Mapping[str, Session]) -> None:
                sqnr.update(
                    output_sqnr(
                        sessions["float"],
                        {name: sessions[name] for name in artefacts},
                        analysis.heads,
                        (analysis.data.feeds(i) for i in samples),
                        seed=analysis.settings.seed,
                        progress=progress.advance,
                    )
                )

            steps = priced(analysis)
            parts = bench.time_sittings(
                dict(zip(("float", *artefacts), openers, strict=True)),
                steps,
                repeats=NEIGHBOUR_ROUNDS,
                progress=progress.advance,
                then=compare,
            )
        times = {name: total(part, steps) for name, part in parts.items()}
        return to_json(
            MeasuredNeighbours(
                ratio=tuple(bench.paired_ratio(times[name], times["float"]).value for name in artefacts),
                milliseconds=tuple(round(float(np.median(times[name])), 4) for name in artefacts),
                sqnr=tuple(sqnr[name] for name in artefacts),
            )
        )

    inputs = NeighbourInputs(
        network=analysis.executed,
        plans=tuple(tuple(p.listed) for p in plans),
        samples=tuple(samples),
        seed=analysis.settings.seed,
        workload=workload_of(analysis.graph, analysis.settings.workload),
    )
    return msgspec.json.decode(work.cached("neighbours", inputs, make), type=MeasuredNeighbours)


def with_measured_front(plan: PlanReport, points: Sequence[ParetoPoint], found: MeasuredNeighbours) -> PlanReport:
    """Add to a plan what was measured on its front."""
    measured = {
        p.chosen: (ratio, tuple(e.value for e in sqnr))
        for p, ratio, sqnr in zip(points, found.ratio, found.sqnr, strict=True)
    }
    front = tuple(
        msgspec.structs.replace(p, measured_ratio=known[0], measured_db=known[1])
        if (known := measured.get(p.chosen))
        else p
        for p in plan.pareto
    )
    return msgspec.structs.replace(plan, pareto=front)
