"""What each scheme costs on the real runtime: units from profiles, borders from whole-model variants.

A few variants of the model (each scheme wherever it can be, and random mixtures) are profiled and timed side by side.
Kernel times are mapped to units by the names that the variants carry; what a profile spends on rounding and layout
changes between schemes is fitted to the number and size of the borders; and the kernels of each scheme are scaled so
that the table reproduces the wall time of the variants that have one scheme alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from bitalloy.core.effort import EFFORTS, USUAL_EFFORT, Effort
from bitalloy.core.encoding import to_json
from bitalloy.core.ownership import temporary
from bitalloy.core.plans import CostTable, UnitCost
from bitalloy.core.records import TensorSpec, Workload
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.store import StageInputs
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.formats import weight_bits
from bitalloy.measure import bench
from bitalloy.measure.fit import fit_prices
from bitalloy.measure.roofline import estimate_costs
from bitalloy.measure.sizes import shared_weights, with_sizes
from bitalloy.measure.tracing import TracedModel, profile, trace
from bitalloy.measure.workload import priced, workload_of
from bitalloy.rewrite.calibrated import Environment
from bitalloy.runtime.artefact import Artefact, reopeners
from bitalloy.runtime.base import Reopener
from bitalloy.runtime.machine import machine_name
from bitalloy.runtime.ort import available_cores
from bitalloy.runtime.steps import Step, total
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets.devices import Device

COST_ROUNDS = 5
"""Timed rounds in each sitting."""
LARGE_MIXTURES = 2
"""Largest number of random variants of a large model, each of which lies on the disk while it is measured."""
SWITCH = (0.05, 0.15, 0.4)
"""Chances to change the scheme between two units: from long stretches of one scheme to a border nearly everywhere, so
that borders get a price of their own."""


class Models(Protocol):
    """What makes the models that are timed."""

    def artefact(self, plan: Plan) -> Artefact:
        """Make the model of a plan."""
        ...

    def original(self) -> Artefact:
        """Return the float model as it was given."""
        ...


def measure(
    units: UnitGraph,
    models: Models,
    steps: Sequence[Step],
    *,
    seed: int = 0,
    repeats: int = COST_ROUNDS,
    mixtures: int = EFFORTS[USUAL_EFFORT].mixtures,
    progress: Callable[[int], None] | None = None,
) -> CostTable:
    """Measure the cost table of a target that runs on this machine.

    Args:
        units: the model's units.
        models: makes the models; the float model as given takes turns with those of plans, unless they are large.
        steps: what the table prices, each step as often as it is made.
        seed: the seed of the random mixtures.
        repeats: timed rounds in each sitting.
        mixtures: number of random variants beside those of one scheme.
        progress: called once per variant profiled and once per round.
    """
    schemes = _pure(units)
    pure = [Plan.of(name, *units.able(name)) for name in schemes]
    generator = np.random.default_rng([seed, 23])
    plans = [*pure, *(_mixture(units, generator, SWITCH[i % len(SWITCH)]) for i in range(mixtures))]
    large = len(pure) + LARGE_MIXTURES
    plans, profiles, rounds, together = _execute(
        units, plans, models, steps, large=large, repeats=repeats, progress=progress
    )
    every = _wall(rounds, together=together)
    wall = every[: len(plans)]
    kernel = _unit_times(units, plans, profiles)
    fit = fit_prices(units, schemes, plans, kernel, wall)
    scale = dict(zip(fit.schemes, fit.scales, strict=True))
    rows = []
    for unit in units.units:
        elements = sum(w.elements for w in unit.weights)
        known = [BASELINE, *unit.choices]
        rows.append(
            UnitCost(
                unit=unit.id,
                us={name: round(float(kernel[unit.id][name] * scale[name]), 3) for name in known},
                bytes={name: stored_bytes(units.scheme(name), elements) for name in known},
            )
        )
    return CostTable(
        target=units.target,
        device=machine_name(),
        threads=available_cores(),
        units=tuple(rows),
        borders=fit.borders,
        fixed_us=0.0,
        pure_us={name: float(us) for name, us in zip(schemes, wall, strict=False)},
        residual_percent=fit.residual_percent,
        left_out_percent=fit.left_out_percent,
        given_us=float(every[len(plans)]) if together else None,
    )


def _pure(units: UnitGraph) -> list[str]:
    """Names of the schemes in which a variant has all that it can."""
    return [s.name for s in units.schemes if s.name == BASELINE or units.able(s.name)]


def stored_bytes(scheme: Scheme, elements: int) -> int:
    """Return the size of weights in a scheme, scales of channels left out."""
    return math.ceil(elements * weight_bits(scheme) / 8)


def _execute(
    units: UnitGraph,
    plans: list[Plan],
    models: Models,
    steps: Sequence[Step],
    *,
    large: int,
    repeats: int,
    progress: Callable[[int], None] | None,
) -> tuple[list[Plan], list[Mapping[int, float]], np.ndarray, bool]:
    """Profile and time plans side by side, of a large model the first `large` ones.

    Returns:
        The plans; of each, number of a unit -> microseconds of its kernels; (plans, sittings, rounds): times in
        microseconds, with the float model as given behind the plans where all of them took turns; and whether they
        did, in every round.
    """
    with temporary() as folder:
        names = [u.id for u in units.units]
        first = trace(models.artefact(plans[0]), names)
        alone = first.artefact.large
        plans = plans[:large] if alone else plans
        traced = [first.placed(folder / "0")]
        traced += [trace(models.artefact(p), names).placed(folder / str(i)) for i, p in enumerate(plans[1:], 1)]
        del first
        profiles: list[Mapping[int, float]] = []
        artefacts = [m.artefact for m in traced]
        openers = [a.session for a in artefacts] if alone else reopeners(artefacts)
        for model, opener in zip(traced, openers, strict=True):
            profiles.append(_profile(model, opener, units, steps, folder))
            if progress is not None:
                progress(1)
        timed = {str(i): opener for i, opener in enumerate(openers)}
        timed |= {} if alone else {"given": models.original().reopener()}
        times = bench.time_sittings(
            timed,
            steps,
            repeats=repeats,
            together=not alone,
            progress=progress,
        )
    return plans, profiles, np.stack([total(times[name], steps) for name in timed]) * 1e3, not alone


def _wall(rounds: np.ndarray, *, together: bool) -> np.ndarray:
    """Return the time of each plan from (plans, sittings, rounds).

    What disturbs a round disturbs all models that take turns in it. Where a sitting has one model alone, it disturbs
    that one, perhaps in all its rounds: then the quietest sitting counts.
    """
    if not together:
        return np.asarray(np.median(rounds, axis=2).min(axis=1))
    flat = rounds.reshape(len(rounds), -1)
    return np.asarray(np.median(flat / flat[0], axis=1) * np.median(flat[0]))


def _mixture(units: UnitGraph, generator: np.random.Generator, switch: float) -> Plan:
    """Draw random runs of neighbouring units that change their scheme with probability `switch`."""
    schemes = [scheme.name for scheme in units.schemes]
    state = int(generator.integers(len(schemes)))
    chosen = {}
    for unit in units.units:
        if generator.random() < switch:
            step = int(generator.integers(1, len(schemes))) if len(schemes) > 2 else 1
            state = (state + step) % len(schemes)
        if schemes[state] in unit.allowed:
            chosen[unit.id] = schemes[state]
    return Plan(chosen)


def _profile(
    model: TracedModel, opener: Reopener, units: UnitGraph, steps: Sequence[Step], folder: Path
) -> Mapping[int, float]:
    """Sum up the time of the kernels of each unit; what only passes between units is fitted, not read."""
    index = {u.id: i for i, u in enumerate(units.units)}
    times: dict[int, float] = defaultdict(float)
    for step in steps:
        for timed in profile(model, step, folder, opener):
            if timed.unit is not None:
                times[index[timed.unit]] += step.times * timed.us
    return times


def _unit_times(
    units: UnitGraph, plans: Sequence[Plan], profiles: Sequence[Mapping[int, float]]
) -> dict[str, dict[str, float]]:
    """Map unit -> scheme -> kernel time: the median over the variants in which the unit has that scheme."""
    found = {}
    for index, unit in enumerate(units.units):
        seen: dict[str, list[float]] = defaultdict(list)
        for plan, one in zip(plans, profiles, strict=True):
            seen[plan.scheme_of(unit.id)].append(one.get(index, 0.0))
        found[unit.id] = {scheme: float(np.median(times)) for scheme, times in seen.items()}
    return found


class CostInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides a cost table; times do not depend on the values of weights and samples."""

    model: str
    """SHA-256 of the model's file."""
    shapes: tuple[TensorSpec, ...]
    target: str
    device: Device | None
    """The device for which cost is estimated; None where it is measured."""
    units: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]
    """Id, core and tail of each unit, and the schemes that it may take."""
    edges: tuple[str, ...]
    """Ids of the edges between units."""
    schemes: tuple[Scheme, ...]
    """What they mean."""
    workload: Workload | None
    """What is priced; None for one inference."""
    mixtures: int
    """Number of random variants beside those of one scheme."""
    seed: int
    """Seed of the random mixtures."""
    environment: Environment


def measure_cost(
    analysis: Analysis, *, effort: Effort = EFFORTS[USUAL_EFFORT], work: Workspace | None = None
) -> CostTable:
    """Measure what each unit and border costs on this machine; estimate it where the target cannot run here.

    A stored table of the same units, machine and runtime is used again, whatever else the analysis was made of.
    """
    work = work or Workspace()
    device = analysis.target.device
    workload = workload_of(analysis.graph, analysis.settings.workload)

    def timed() -> CostTable:
        known = (
            None
            if analysis.graph.large
            else len(_pure(analysis.units)) + effort.mixtures + bench.SITTINGS * COST_ROUNDS
        )
        with work.stage("cost", known) as progress:
            return measure(
                analysis.units,
                analysis,
                priced(analysis),
                seed=analysis.settings.seed,
                mixtures=effort.mixtures,
                progress=progress.advance,
            )

    def make() -> bytes:
        apart = analysis.target.rounds_apart
        table = timed() if device is None else estimate_costs(analysis.graph, analysis.units, device, workload, apart)
        shared = shared_weights(analysis.graph, analysis.recipe())
        return to_json(with_sizes(table, analysis.units, analysis.artefact, shared=shared, seed=analysis.settings.seed))

    inputs = CostInputs(
        model=analysis.graph.info.sha256,
        shapes=analysis.graph.info.inputs,
        target=analysis.target.name,
        device=device,
        units=tuple((u.id, u.core, u.tail, u.allowed) for u in analysis.units.units),
        edges=tuple(e.id for e in analysis.units.edges),
        schemes=analysis.units.schemes,
        workload=workload,
        mixtures=effort.mixtures,
        seed=analysis.settings.seed,
        environment=analysis.environment,
    )
    return msgspec.json.decode(work.cached("cost", inputs, make), type=CostTable)
