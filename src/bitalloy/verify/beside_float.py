"""One plan beside the float model and the one in its lowest schemes: latency, and outputs on unseen samples.

What a plan gains is not all due to its schemes: the float model with the graph rewrites that every plan has (Softmax
over the last axis, folded constants) is measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import LatencySpread, PeakMemory, StepLatency
from bitalloy.core.planned import Measured, Planned
from bitalloy.core.plans import CostTable
from bitalloy.core.records import Estimate, Latency, Workload
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Progress, Workspace
from bitalloy.measure import bench
from bitalloy.measure.memory import plan_memory
from bitalloy.measure.prices import latency_us
from bitalloy.measure.sqnr import FLOAT32, artefact_sqnr, output_sqnr
from bitalloy.measure.workload import priced, workload_of
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import Artefact, reopeners
from bitalloy.runtime.base import Session
from bitalloy.runtime.steps import Step, total
from bitalloy.sensitivity.analysis import Analysis

OUTCOME_SITTINGS, REPEATS = 5, 8
"""Times that sessions are made anew, and timed rounds with each of them."""


class VerificationInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides what is measured of a plan."""

    network: ExecutedNetwork
    plan: tuple[tuple[str, str], ...]
    """Pairs of unit and scheme."""
    samples: tuple[int, ...]
    seed: int
    workload: Workload | None
    single: tuple[tuple[str, str], ...] | None
    """A plan of one scheme that is measured beside it, likewise; None without one."""
    rewritten: bool
    """Whether the float model after the graph rewrites of the plan is measured beside it."""
    cost: CostTable | None
    """The table from which latencies are taken; None where they are measured."""
    again: bool
    """Whether the plan is measured anew after it was chosen by a measurement."""


def measure_plan(
    analysis: Analysis,
    planned: Planned,
    mixed: Artefact,
    samples: Sequence[int],
    work: Workspace,
    *,
    single: Plan | None = None,
    again: bool = False,
) -> Measured:
    """Execute a plan on the target's runtime; where the target is not here, its latency is that of the cost table.

    Args:
        analysis: what is known about the model.
        planned: the plan.
        mixed: the model of the plan.
        samples: indices of the samples on which outputs are compared.
        work: where to keep and show results.
        single: a plan of one scheme to be measured beside it.
        again: whether to measure anew what was measured before: a plan that was chosen for its times among several
            owes a part of them to luck.
    """
    if single in (planned.plan.chosen, analysis.units.lowest()):
        single = None
    rewritten = not (planned.cost.estimated or analysis.graph.large)

    def make() -> bytes:
        timed = 0 if planned.cost.estimated else OUTCOME_SITTINGS * REPEATS
        with work.scratch() as folder, work.stage("verify", timed + len(samples)) as progress:
            plans = {"lowest": analysis.units.lowest(), "mixed": planned.plan.chosen}
            plans |= {"single": single} if single is not None else {}
            plans |= {"rewritten": Plan()} if rewritten else {}
            models = _different(analysis, plans, mixed, folder)
            if planned.cost.estimated:
                found = _estimated(analysis, planned.cost, plans, models, samples, progress)
            else:
                found = _timed(analysis, plans, models, samples, progress)
        ratio, sqnr = found.ratio, found.sqnr
        return to_json(
            Measured(
                latency=_spread(found.latency),
                ratio_lowest=ratio["lowest"],
                ratio_mixed=ratio["mixed"],
                sqnr_lowest=sqnr.get("lowest", sqnr["mixed"]),
                sqnr_mixed=sqnr["mixed"],
                float32=sqnr[FLOAT32],
                steps=found.steps,
                ratio_single=ratio.get("single"),
                sqnr_single=sqnr.get("single"),
                ratio_rewritten=ratio.get("rewritten"),
                sqnr_rewritten=sqnr.get("rewritten", sqnr["mixed"]) if rewritten else None,
                sittings_ms=found.sittings_ms,
            )
        )

    inputs = VerificationInputs(
        network=analysis.executed,
        plan=tuple(planned.plan.chosen.listed),
        samples=tuple(samples),
        seed=analysis.settings.seed,
        workload=workload_of(analysis.graph, analysis.settings.workload),
        single=None if single is None else tuple(single.listed),
        rewritten=rewritten,
        cost=planned.cost if planned.cost.estimated else None,
        again=again,
    )
    return msgspec.json.decode(work.cached("verify", inputs, make), type=Measured)


def peak_memory(analysis: Analysis, plan: Plan, work: Workspace, *, single: Plan | None = None) -> PeakMemory:
    """Measure the peak resident memory of running the float model, the lowest one and that of a plan.

    Args:
        analysis: what is known about the model.
        plan: the plan.
        work: where to keep and show results.
        single: a plan of one scheme to be measured beside it.
    """
    plans = {"float": None, "lowest": analysis.units.lowest(), "mixed": plan}
    found = plan_memory(analysis, plans | ({"single": single} if single is not None else {}), work)
    return PeakMemory(
        reference=found["float"].peak_mb,
        lowest=found["lowest"].peak_mb,
        mixed=found["mixed"].peak_mb,
        single=found["single"].peak_mb if single is not None else None,
        process=found["float"].process_mb,
    )


def _different(analysis: Analysis, plans: Mapping[str, Plan], mixed: Artefact, folder: Path) -> dict[str, Artefact]:
    """Return the models as they run here; what is large lies in files of a folder.

    The one in its lowest schemes is left out where the plan is just that.
    """
    models = {"float": analysis.original(), "mixed": analysis.executable(mixed).placed(folder / "mixed")}
    for name, plan in plans.items():
        if name not in models and plan != plans["mixed"]:
            models[name] = analysis.executable(analysis.artefact(plan)).placed(folder / name)
    return models


def _spread(latency: Mapping[str, Latency]) -> LatencySpread:
    return LatencySpread(
        reference=latency["float"],
        lowest=latency["lowest"],
        mixed=latency["mixed"],
        single=latency.get("single"),
        rewritten=latency.get("rewritten"),
    )


@dataclass(frozen=True)
class _Outcome:
    """What was found of the models: latencies, ratios and the SQNR of the heads, by model."""

    latency: Mapping[str, Latency]
    ratio: Mapping[str, Estimate]
    sqnr: Mapping[str, tuple[Estimate, ...]]
    steps: tuple[StepLatency, ...] = ()
    """What each step takes by itself, where there are several."""
    sittings_ms: tuple[float, ...] = ()
    """Median time of the float model in each sitting; empty where latency is estimated."""


def _estimated(
    analysis: Analysis,
    cost: CostTable,
    plans: Mapping[str, Plan],
    models: Mapping[str, Artefact],
    samples: Sequence[int],
    progress: Progress,
) -> _Outcome:
    """Take latencies from the cost table, and execute the models for their outputs alone."""
    sqnr = artefact_sqnr(
        models["float"],
        {name: model for name, model in models.items() if name != "float"},
        analysis.heads,
        (analysis.data.feeds(i) for i in samples),
        seed=analysis.settings.seed,
        progress=progress.advance,
    )
    us = {name: latency_us(cost, analysis.units, plan) for name, plan in {"float": Plan(), **plans}.items()}
    ratio = {name: round(value / us["float"], 4) for name, value in us.items()}
    return _Outcome(
        {n: Latency(median_ms=v / 1e3, p10_ms=v / 1e3, p90_ms=v / 1e3, count=0) for n, v in us.items()},
        {n: Estimate(value=r, low=r, high=r) for n, r in ratio.items()},
        sqnr,
    )


def _timed(
    analysis: Analysis,
    plans: Mapping[str, Plan],
    models: Mapping[str, Artefact],
    samples: Sequence[int],
    progress: Progress,
) -> _Outcome:
    """Time the models in turns, and compare their outputs in the same sessions.

    What is one file is timed once: a plan without any lowered unit has the times of the float model, unless timing
    tells that its graph rewrites make it faster.
    """
    sqnr: dict[str, tuple[Estimate, ...]] = {}

    def compare(sessions: Mapping[str, Session]) -> None:
        sqnr.update(
            output_sqnr(
                sessions["float"],
                {name: session for name, session in sessions.items() if name != "float"},
                analysis.heads,
                (analysis.data.feeds(i) for i in samples),
                seed=analysis.settings.seed,
                progress=progress.advance,
            )
        )

    together = not (models["mixed"].large or analysis.graph.large)
    openers = reopeners(list(models.values())) if together else [m.session for m in models.values()]
    steps = priced(analysis)
    found = bench.time_sittings(
        dict(zip(models, openers, strict=True)),
        steps,
        repeats=REPEATS,
        sittings=OUTCOME_SITTINGS,
        together=together,
        progress=progress.advance,
        then=compare,
    )
    whole = {name: total(found[name], steps) for name in ("float", "mixed")}
    own = bool(plans["mixed"]) or bench.paired_ratio(whole["mixed"], whole["float"]).high < 1
    mixed = found["mixed" if own else "float"]
    parts: dict[str, np.ndarray] = {"float": found["float"], "mixed": mixed}
    parts |= {name: found.get(name, found["mixed"]) for name in plans if name != "mixed"}
    times = {name: total(part, steps) for name, part in parts.items()}
    return _Outcome(
        {name: bench.latency_of(series) for name, series in times.items()},
        {name: bench.paired_ratio(series, times["float"]) for name, series in times.items()},
        sqnr,
        tuple(_step(step, i, parts) for i, step in enumerate(steps)) if len(steps) > 1 else (),
        tuple(round(float(ms), 4) for ms in np.median(times["float"], axis=1)),
    )


def _step(step: Step, index: int, parts: Mapping[str, np.ndarray]) -> StepLatency:
    latency = {name: bench.latency_of(series[..., index]) for name, series in parts.items()}
    return StepLatency(name=step.name, times=step.times, latency_ms=_spread(latency))
