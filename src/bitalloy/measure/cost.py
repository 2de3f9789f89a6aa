"""What each precision costs on the real runtime: units from profiles, borders from whole-model variants.

A few variants of the model (float, all INT8, and random halves) are profiled and timed side by side. Kernel times
are mapped to units by the names that the variants carry; what a profile spends on rounding and layout changes
between precisions is fitted to the number and size of the borders; and the kernels of each precision are scaled so
that the table reproduces the wall time of the float and the all-INT8 model.
"""

from __future__ import annotations

import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
from scipy.optimize import nnls

from bitalloy.core.plans import CostTable, UnitCost
from bitalloy.core.records import UnitGraph
from bitalloy.core.store import key_of
from bitalloy.core.work import Workspace
from bitalloy.measure import bench
from bitalloy.measure.roofline import estimate
from bitalloy.measure.tracing import Traced, profile, trace
from bitalloy.runtime.artefact import Artefact, reopeners
from bitalloy.runtime.base import Reopener
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.analysis import Analysis

MIXTURES, LARGE_MIXTURES = 6, 2
"""Random variants beside the pure ones; of a large model each lies on the disk while it is measured."""
SWITCH = (0.05, 0.15, 0.4)
"""From long stretches of one precision to a border nearly everywhere, so that borders get a price of their own."""


@dataclass(frozen=True)
class Profile:
    """Kernel times of one variant in microseconds per run."""

    units: Mapping[int, float]
    borders: float
    """Rounding nodes at borders, layout changes and anything else that belongs to no unit."""

    @property
    def total(self) -> float:
        """Sum of all kernels."""
        return sum(self.units.values()) + self.borders


def measure(
    units: UnitGraph,
    variant: Callable[[frozenset[str]], Artefact],
    feeds: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    repeats: int = 15,
    progress: Callable[[int], None] | None = None,
) -> CostTable:
    """Measure the cost table of a target that runs on this machine.

    Args:
        units: the model's units.
        variant: makes the model in which the given units run in INT8.
        feeds: one sample.
        seed: of the random mixtures.
        repeats: timed rounds.
        progress: called once per variant profiled and once per round.
    """
    quantizable = units.quantizable()
    generator = np.random.default_rng([seed, 23])
    plans = [frozenset[str](), quantizable]
    with tempfile.TemporaryDirectory(prefix="bitalloy-cost-") as name:
        folder = Path(name)
        names = [u.id for u in units.units]
        first = trace(variant(plans[0]), names)
        large = first.artefact.large
        count = LARGE_MIXTURES if large else MIXTURES
        plans += [_mixture(units, generator, SWITCH[i % len(SWITCH)]) for i in range(count)]
        models = [first.placed(folder / "0")]
        models += [trace(variant(p), names).placed(folder / str(i)) for i, p in enumerate(plans[1:], 1)]
        del first
        profiles = []
        artefacts = [m.artefact for m in models]
        openers = [a.session for a in artefacts] if large else reopeners(artefacts)
        for model, opener in zip(models, openers, strict=True):
            profiles.append(_profile(model, opener, units, feeds, folder))
            if progress is not None:
                progress(1)
        times = bench.sittings(
            {str(i): opener for i, opener in enumerate(openers)},
            feeds,
            repeats=repeats,
            together=not large,
            progress=progress,
        )
    rounds = np.stack([times[str(i)] for i in range(len(plans))]) * 1e3
    # what disturbs a round disturbs all models in it
    wall = np.median(rounds / rounds[0], axis=1) * np.median(rounds[0])

    kernel = _unit_times(units, plans, profiles)
    counts = np.array([units.borders(plan) for plan in plans])
    inside = np.array(
        [
            [sum(kernel[u.id][low] for u in units.units if (u.id in plan) == low) for low in (False, True)]
            for plan in plans
        ]
    )
    # wall time = kernels of float units * a + of INT8 units * b + price of borders; the two pure variants weigh most
    design = np.concatenate([inside, counts], axis=1)
    weight = np.where(np.arange(len(plans)) < 2, 10.0, 1.0) / wall
    (high, low, per_element, each), _ = nnls(design * weight[:, None], wall * weight)
    predicted = design @ np.array([high, low, per_element, each])
    rows = []
    for unit in units.units:
        free = unit.id in quantizable
        rows.append(
            UnitCost(
                unit=unit.id,
                fp32_us=round(float(kernel[unit.id][0] * high), 3),
                int8_us=round(float(kernel[unit.id][1] * low), 3) if free else None,
                fp32_bytes=4 * sum(w.elements for w in unit.weights),
                int8_bytes=sum(w.elements for w in unit.weights),
            )
        )
    return CostTable(
        target=units.target,
        device=device(),
        threads=available_cores(),
        units=tuple(rows),
        border_us_per_element=float(per_element),
        border_us=float(each),
        fixed_us=0.0,
        float_us=float(wall[0]),
        int8_us=float(wall[1]),
        residual_percent=round(float(np.mean(np.abs(predicted / wall - 1))) * 100, 2),
        left_out_percent=tuple(round(100 * e, 2) for e in _left_out(design, weight, wall)),
    )


def _left_out(design: np.ndarray, weight: np.ndarray, wall: np.ndarray) -> list[float]:
    """Error of each mixture over its time, as a fit without it predicts it; the two pure variants stay in all fits."""
    found = []
    for index in range(2, len(wall)):
        others = np.arange(len(wall)) != index
        prices, _ = nnls(design[others] * weight[others, None], wall[others] * weight[others])
        found.append(float(design[index] @ prices / wall[index] - 1))
    return found


def corrected(table: CostTable, units: UnitGraph, int8: frozenset[str], measured_ratio: float) -> CostTable:
    """The table that reproduces a measured plan: the price of borders, which is the least certain, is scaled.

    Args:
        table: that predicted the plan.
        units: of the model.
        int8: the plan.
        measured_ratio: its measured latency over that of the float model.
    """
    elements, count = units.borders(int8)
    borders = elements * table.border_us_per_element + count * table.border_us
    inside = table.latency_us(units, int8) - borders
    missing = measured_ratio * table.all_float_us - inside
    if missing <= 0 or count == 0:
        return table
    if borders <= 0:
        return msgspec.structs.replace(table, border_us=missing / count)
    scale = missing / borders
    return msgspec.structs.replace(
        table, border_us=table.border_us * scale, border_us_per_element=table.border_us_per_element * scale
    )


def _mixture(units: UnitGraph, generator: np.random.Generator, switch: float) -> frozenset[str]:
    """Random runs of neighbouring units that change precision with probability `switch`."""
    chosen: set[str] = set()
    state = bool(generator.integers(2))
    for unit in units.units:
        if generator.random() < switch:
            state = not state
        if state and unit.id in units.quantizable():
            chosen.add(unit.id)
    return frozenset(chosen)


def _profile(
    model: Traced, opener: Reopener, units: UnitGraph, feeds: Mapping[str, np.ndarray], folder: Path
) -> Profile:
    index = {u.id: i for i, u in enumerate(units.units)}
    times: dict[int, float] = defaultdict(float)
    borders = 0.0
    for timed in profile(model, feeds, folder, opener):
        if timed.unit is None:
            borders += timed.us
        else:
            times[index[timed.unit]] += timed.us
    return Profile(times, borders)


def _unit_times(
    units: UnitGraph, plans: list[frozenset[str]], profiles: list[Profile]
) -> dict[str, tuple[float, float]]:
    """(float, INT8) kernel time of each unit: the median over the variants in which it has that precision."""
    found = {}
    for index, unit in enumerate(units.units):
        seen: tuple[list[float], list[float]] = ([], [])
        for plan, one in zip(plans, profiles, strict=True):
            seen[unit.id in plan].append(one.units.get(index, 0.0))
        found[unit.id] = (float(np.median(seen[0])), float(np.median(seen[1])) if seen[1] else 0.0)
    return found


@cache
def device() -> str:
    """The processor of this machine, by its own name."""
    from cpuinfo import get_cpu_info  # asks other programs, which takes about a second

    found = str(get_cpu_info().get("brand_raw", "")).strip()
    return found or platform.processor() or platform.machine()


def measure_cost(analysis: Analysis, *, work: Workspace | None = None) -> CostTable:
    """Measure what each unit and border costs on this machine; estimate it where the target cannot run here.

    A stored table of the same units, machine and runtime is used again, whatever else the analysis was made of.
    """
    work = work or Workspace()
    if analysis.target.device is not None:
        return estimate(analysis.graph, analysis.units, analysis.target.device)

    def make() -> bytes:
        with work.stage("cost", None) as progress:
            table = measure(
                analysis.units,
                analysis.artefact,
                analysis.data.feeds(0),
                seed=analysis.settings.seed,
                progress=progress.advance,
            )
        return msgspec.json.encode(table)

    units = [(u.id, u.core, u.tail, u.allowed) for u in analysis.units.units]
    key = key_of(
        model=analysis.graph.info.sha256,
        shapes=analysis.graph.info.inputs,
        target=analysis.target.name,
        units=units,
        device=device(),
        **analysis.execution,
    )
    return msgspec.json.decode(work.cached("cost", key, make), type=CostTable)
