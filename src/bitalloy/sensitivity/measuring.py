"""Exact sensitivities: chosen units, regions or sites are rounded one at a time, or all but one, and executed.

A shard, which survives a stop, is one measurement: one sample with one set of gates. Its key holds what decides it and
nothing else, so other patterns, sample counts and modes find what they share.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.jobs import Contexts, Job, Opening
from bitalloy.core.records import Estimate, Head, Record, Sensitivity, SensitivityTable, part_of
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import data_opening
from bitalloy.model.heads import is_divergence
from bitalloy.model.regions import ancestors
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork, deciding_target
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.correct import CorrectedMatrix, MeasuredDamage, correct_matrix
from bitalloy.sensitivity.exact import Measurement, Switchboard
from bitalloy.sensitivity.matrix import LEAST_ENERGY, damage_interval, draws, relative, silent_heads
from bitalloy.sensitivity.switchboards import shared_switchboard, switchboard_opening
from bitalloy.sensitivity.table import SiteGroup, groups, ranked_alike
from bitalloy.sensitivity.table import sensitivities as table_of
from bitalloy.targets.placement import WHOLE, rounded

ONE, ALL_BUT_ONE = "one-at-a-time", "leave-one-out"
MODES = (ONE, ALL_BUT_ONE)
SAMPLES = 8
EVERYTHING = "(everything)"
"""Id of the row of a leave-one-out table for which nothing is left out; its scope is `all`."""


@dataclass(frozen=True)
class Selection:
    """Glob patterns over the ids of units, regions and sites. Without any, all units are meant."""

    units: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.units or self.regions or self.sites)


class SampleErrors(Record, frozen=True, kw_only=True):
    """Result of one measurement on one sample, per head."""

    error: tuple[float, ...]
    """Squared error ||y_rounded - y||^2 of each head."""
    energy: tuple[float, ...]
    """Energy ||y||^2 of each head."""


def chosen_groups(units: UnitGraph, selection: Selection, mode: str = ONE) -> list[SiteGroup]:
    """List what a selection names, each with the sites that its measurement rounds.

    Raises:
        BitalloyError: a pattern matches nothing that may be rounded.
    """
    patterns = {"unit": selection.units or (() if selection else ("*",)), "region": selection.regions}
    patterns["site"] = selection.sites
    gated = {scheme.name for scheme in units.schemes if scheme.gated}
    found = []
    for scope, globs in patterns.items():
        known = [
            g
            for g in groups(units)
            if g.scope == scope
            and g.scheme in gated
            and (g.part == WHOLE or scope == "site")
            and not (mode == ONE and g.again)
        ]
        for glob in globs:
            if not any(fnmatch.fnmatchcase(group.id, glob) for group in known):
                names = " or ".join(name.upper() for name in sorted(gated))
                raise BitalloyError(
                    f"--{scope}s '{glob}' matches no {scope} that may run in {names}. The model has {len(known)} of "
                    f"them, such as '{known[len(known) // 2].id}'. Patterns are shell globs: '*' stands for any text."
                )
        matching = [g for g in known if any(fnmatch.fnmatchcase(g.id, glob) for glob in globs)]
        found += [replace(g, sites=_rounded(units, g, mode)) for g in matching]
    return found


def _rounded(units: UnitGraph, group: SiteGroup, mode: str) -> frozenset[str]:
    """Return the sites that are rounded in the measurement of a group."""
    if mode == ONE:
        return group.sites
    whole = units.lowest_gated()
    if group.scope == "site":
        return rounded(units, whole) - group.sites
    left_out = {
        u.id for u in units.units if u.id == group.id or (group.scope == "region" and group.id in ancestors(u.region))
    }
    return rounded(units, Plan((unit, scheme) for unit, scheme in whole.items() if unit not in left_out))


def whole_group(units: UnitGraph) -> SiteGroup:
    """Return all that can be rounded as one group."""
    whole = units.lowest_gated()
    return SiteGroup("all", EVERYTHING, "+".join(sorted(set(whole.values()))), WHOLE, rounded(units, whole))


def measure_exact(
    ready: Calibrated,
    selection: Selection | None = None,
    *,
    mode: str = ONE,
    samples: int | None = None,
    work: Workspace | None = None,
) -> SensitivityTable:
    """Measure the sensitivities of units, regions and sites by execution.

    Args:
        ready: the calibrated model.
        selection: units, regions and sites to measure; None for all units.
        mode: `one-at-a-time` rounds one thing alone; `leave-one-out` rounds everything but one thing.
        samples: number of samples, the first of those that serve probing; None for 8.
        work: where results are stored and progress is shown.

    Raises:
        BitalloyError: a pattern matches nothing.
        DataError: all outputs are zero on the samples.
    """
    things = chosen_groups(ready.units, selection or Selection(), mode)
    if mode == ALL_BUT_ONE:
        things.append(whole_group(ready.units))
    used = ready.parts.probe[: samples or SAMPLES]
    count = len(used)
    around = whole_group(ready.units).sites if mode == ALL_BUT_ONE else frozenset[str]()
    damage, energy = measured_damages(ready, [t.sites for t in things], used, around=around, work=work or Workspace())
    weights = draws(count, ready.settings.seed)
    silent_heads([head.name for head in ready.heads], energy)
    share = relative(energy, energy.mean(axis=0))
    rows = [
        Sensitivity(
            id=thing.id, scope=thing.scope, scheme=thing.scheme, part=thing.part, head=head.name, exact=True,
            sqnr_db=damage_interval(damage[:, h, t], share[:, h], weights),
        )
        for t, thing in enumerate(things)
        for h, head in enumerate(ready.heads)
    ]  # fmt: skip
    halves = [damage[start::2].mean(axis=0) for start in (0, 1)] if count >= 4 else []
    return SensitivityTable(
        model_sha256=ready.graph.info.sha256,
        data=part_of(ready.info, count),
        samples=count,
        probes=0,
        seed=ready.settings.seed,
        settled=bool(halves)
        and all(ranked_alike(halves[0][i], halves[1][i]) for i, h in enumerate(ready.heads) if not h.kind),
        rows=tuple(rows),
        method=mode,
    )


def measured_damages(
    ready: Calibrated,
    sets: Sequence[frozenset[str]],
    samples: Sequence[int],
    *,
    around: frozenset[str] = frozenset(),
    work: Workspace,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the damage of sets of sites; shards that are stored are read.

    Args:
        ready: the calibrated model.
        sets: the sites that are rounded in each measurement.
        samples: indices into the data.
        around: sites from which the sets differ little: what they have in common at the start is executed once.
        work: where results are stored and progress is shown.

    Returns:
        (samples, heads, sets): error energy over the mean of ||y||^2, and (samples, heads): ||y||^2.

    Raises:
        DataError: an output is NaN or infinite.
    """
    key = key_of(ExactInputs(network=ready.executed))
    ordered = {sites: tuple(sorted(sites)) for sites in sets}
    names = {sites: hashlib.sha256("\n".join(order).encode()).hexdigest()[:24] for sites, order in ordered.items()}
    switches, data = switchboard_opening(ready, len(samples)), data_opening(ready.data, ready.info)
    board = shared_switchboard(switches, ready, work)
    jobs = []
    for index in samples:
        spec = MeasurementParts(
            switchboard=switches, data=data, heads=ready.heads, sample=index, around=tuple(sorted(around))
        )
        measurement = Opening(kind="measurement", spec=spec)
        for sites, name in names.items():
            measured_sites = MeasuredSites(measurement=measurement, sites=ordered[sites])
            shard = f"{index:06d}-{name}"
            jobs.append(Job(kind="exact", key=key, shard=shard, spec=measured_sites, group=str(index)))
    held = work.executor.contexts.holding((data, ready.data), (switches, board))
    with work.stage("exact", len(jobs)) as progress, held:
        found = [msgspec.json.decode(raw, type=SampleErrors) for raw in work.map(jobs, progress, at_once=board.at_once)]
    by_sample = [dict(zip(names, found[i : i + len(names)], strict=True)) for i in range(0, len(found), len(names))]
    rows = [[row[sites] for sites in sets] for row in by_sample]
    energy = np.array([row[0].energy for row in rows])
    error = np.array([[r.error for r in row] for row in rows]).transpose(0, 2, 1)
    return relative(error, energy.mean(axis=0)[None, :, None]), energy


class ExactInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides exact measurements, beside the sample and the sites that name a shard."""

    network: ExecutedNetwork


class DamageInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the damage of sets of sites."""

    network: ExecutedNetwork
    sets: tuple[tuple[str, ...], ...]
    samples: tuple[int, ...]


class MeasurementParts(Record, frozen=True, kw_only=True):
    """Arguments of `Measurement`."""

    switchboard: Opening
    data: Opening
    heads: tuple[Head, ...]
    sample: int
    around: tuple[str, ...]
    """Sites that are rounded in the execution from which the others branch off; none for the float network."""


class MeasuredSites(Record, frozen=True, kw_only=True):
    """A job of the kind `exact`: one sample with one set of sites rounded."""

    measurement: Opening
    sites: tuple[str, ...]


@dataclass(frozen=True)
class SampleMeasurement:
    """A sample on a switchboard, executed once."""

    sample: int
    board: Switchboard
    measurement: Measurement


def damage_inputs(ready: Calibrated, sets: Sequence[frozenset[str]], samples: Sequence[int]) -> DamageInputs:
    """Collect all that decides the damage of sets of sites."""
    return DamageInputs(
        network=ready.executed, sets=tuple(tuple(sorted(sites)) for sites in sets), samples=tuple(samples)
    )


def open_measurement(spec: MeasurementParts, contexts: Contexts) -> SampleMeasurement:
    """Execute a sample, so that measurements of sets of sites can branch off from it."""
    board, data = contexts.open(spec.switchboard), contexts.open(spec.data)
    around = board.gates(spec.around) if spec.around else None
    return SampleMeasurement(spec.sample, board, Measurement(board, spec.heads, data.feeds(spec.sample), around))


def measure_sites(spec: MeasuredSites, contexts: Contexts) -> bytes:
    """Measure what rounding the sites does to the sample, and return it as `SampleErrors` in JSON.

    Raises:
        DataError: an output is NaN or infinite.
    """
    opened: SampleMeasurement = contexts.open(spec.measurement)
    error = opened.measurement.error(opened.board.gates(spec.sites))
    if not np.isfinite(error).all():
        raise DataError(f"The rounded model's output is NaN or infinite on sample {opened.sample}.")
    return to_json(SampleErrors(error=tuple(error.tolist()), energy=tuple(opened.measurement.energy.tolist())))


def confirm(
    analysis: Analysis, worst: int, *, flagged: bool = True, samples: int = SAMPLES, work: Workspace | None = None
) -> Analysis:
    """Measure units exactly, the worst, the flagged and those that gradients do not see; correct table and matrix.

    The rows of the table that were measured carry the measured number and `exact`; their flag goes. The matrix is
    fitted to what was measured (`sensitivity.correct`), so that plans made from the result, and the other rows of the
    table, rest on it too. Of several targets the first with INT8 is measured, and the others are corrected alike.

    Args:
        analysis: the analysis whose predictions are checked.
        worst: number of units with the lowest SQNR on any head.
        flagged: whether everything flagged is measured too; where much is, that takes minutes.
        samples: largest number of samples, the first of the matrix.
        work: where results are stored and progress is shown.
    """
    work, parts = work or Workspace(), list(analysis.targets)
    lead = deciding_target(parts)
    if lead is None:
        return analysis
    confirmed, correction = _confirmed(parts[lead], worst, flagged=flagged, samples=samples, work=work)
    if correction is None:
        return analysis
    for index, part in enumerate(parts):
        if index != lead:
            matrix = correction.carried_over(part.matrix)
            table = table_of(matrix, part.units, part.table.data, correction.secant, seed=part.settings.seed)
            parts[index] = replace(part, matrix=matrix, secant=correction.secant, table=table)
        else:
            parts[index] = confirmed
    return replace(parts[0], others=tuple(replace(p, others=()) for p in parts[1:]))


def _confirmed(
    analysis: Analysis, worst: int, *, flagged: bool, samples: int, work: Workspace
) -> tuple[Analysis, CorrectedMatrix | None]:
    units, matrix = analysis.units, analysis.matrix
    gated = frozenset(scheme.name for scheme in units.schemes if scheme.gated)
    doubtful = _doubtful(analysis, worst, gated, flagged=flagged)
    things = [g for g in groups(units) if _name(g) in doubtful and g.scheme in gated and not g.again]
    if not things:
        return analysis, None
    count = min(samples, matrix.samples)
    sets, used = [t.sites for t in things], analysis.parts.probe[:count]
    inputs = damage_inputs(analysis, sets, used)

    def make() -> bytes:
        found = measured_damages(analysis, sets, used, work=work)
        return to_json([part.tolist() for part in found])

    damage, energy = (np.array(part) for part in msgspec.json.decode(work.cached("confirm", inputs, make)))
    findings, whole = [], np.maximum(matrix.energy.mean(axis=0), LEAST_ENERGY)
    for t, thing in enumerate(things):
        predicted = matrix.damage(matrix.select(thing.sites)) * whole
        part = relative(predicted[:count].mean(axis=0), energy.mean(axis=0))
        # measured over predicted on the same samples, times the prediction on all of them
        ratio = damage[:, :, t].mean(axis=0) / np.maximum(part, 1e-30)
        findings.append(MeasuredDamage(thing.sites, ratio * predicted.mean(axis=0) / whole))
    correction = correct_matrix(matrix, analysis.secant, findings, whole_group(units).sites)
    weights, share = draws(count, analysis.settings.seed), relative(energy, energy.mean(axis=0))
    estimates = {
        (*_name(thing), head.name): damage_interval(damage[:, h, t], share[:, h], weights)
        for t, thing in enumerate(things)
        for h, head in enumerate(analysis.heads)
    }
    fixed, bent = correction.matrix, correction.secant
    table = table_of(fixed, units, analysis.table.data, bent, seed=analysis.settings.seed)
    rows = tuple(_with(r, estimates) for r in table.rows)
    table = msgspec.structs.replace(table, rows=rows)
    return replace(analysis, matrix=fixed, secant=bent, table=table), correction


def _name(row: SiteGroup | Sensitivity) -> tuple[str, str, str, str]:
    """Return what tells a row of a table from others, whatever the head."""
    return row.scope, row.id, row.scheme, row.part


def _doubtful(
    analysis: Analysis, worst: int, gated: frozenset[str], *, flagged: bool
) -> set[tuple[str, str, str, str]]:
    """Name the worst units, those that gradients do not see, and, if asked, all flagged units and sites."""
    table, executed = analysis.table, {site for _, site in analysis.matrix.executed}
    blind = {_name(g) for g in groups(analysis.units) if (g.scope, g.part) == ("unit", WHOLE) and g.sites & executed}
    lowest: dict[tuple[str, str, str, str], float] = {}
    for row in table.rows:
        if (row.scope, row.part) == ("unit", WHOLE) and row.scheme in gated and not is_divergence(row.head):
            lowest[_name(row)] = min(lowest.get(_name(row), np.inf), row.sqnr_db.value)
    marked = {_name(r) for r in table.rows if flagged and r.flagged and r.scope != "region"}
    return marked | blind | set(sorted(lowest, key=lambda n: (lowest[n], n))[:worst])


def _with(row: Sensitivity, estimates: Mapping[tuple[str, str, str, str, str], Estimate]) -> Sensitivity:
    found = estimates.get((*_name(row), row.head))
    return row if found is None else msgspec.structs.replace(row, sqnr_db=found, flagged=False, exact=True)
