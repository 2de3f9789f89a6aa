"""Measurement of a model's probe matrix in shards, which are stored and used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import msgspec

from bitalloy.calibrate.gather import COMPARED
from bitalloy.core.encoding import to_json
from bitalloy.core.jobs import Contexts, Job, Opening
from bitalloy.core.records import DataInfo, Head, Record, Secant, TensorSpec
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import data_opening
from bitalloy.model.graphs.again import graph_opening
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork, deciding_target
from bitalloy.sensitivity.columns import views
from bitalloy.sensitivity.exact import FRACTIONS, secant
from bitalloy.sensitivity.matrix import ProbeMatrix, silent_heads
from bitalloy.sensitivity.probe import Prober
from bitalloy.sensitivity.ranges import later_ranges
from bitalloy.sensitivity.switchboards import switchboard
from bitalloy.sensitivity.table import ranking_settled
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import recipe_identity, recipe_opening

MIN_SAMPLES, MAX_SAMPLES = 8, 16


LEAST_PROBES = 2
"""Least number of probes of a head in every sample."""


SECANT_SAMPLES = 8


@dataclass(frozen=True)
class ProbedMatrix:
    """One matrix for all targets and methods of calibration, and the columns in it."""

    matrix: ProbeMatrix
    methods: tuple[str, ...]
    """Range methods of calibration; the first, an empty name, stands for the ranges that a tensor has."""
    views: tuple[tuple[Mapping[str, str], ...], ...]
    """[target][method]: site -> name of its column."""
    later_views: tuple[tuple[Mapping[str, str], ...], ...]
    """[target][method]: site -> name of its column on the ranges of `ranges.later_ranges`."""

    def first(self) -> list[ProbeMatrix]:
        """Return the matrix of each target on the first ranges."""
        return [self.matrix.view(candidates[0]) for candidates in self.views]


def probe_all(parts: Sequence[Calibrated], work: Workspace) -> ProbedMatrix:
    """Probe a model once for all its targets and all methods of calibration that are compared.

    Args:
        parts: the model on each target.
        work: where results are stored and progress is shown.

    Raises:
        DataError: all outputs are zero on the samples.
    """
    ready = parts[0]
    settings, data = ready.settings, ready.data
    samples = ready.parts.probe
    plain = sum(not h.kind for h in ready.heads)
    shared = max(LEAST_PROBES, -(-settings.probes // plain))
    probes = [max(LEAST_PROBES, shared // 2) if h.kind else shared for h in ready.heads]
    methods = ["", *(m for m in COMPARED if any(m in r.others for r in ready.calibration.ranges))]
    schemes = [p.recipe(method) for method in methods for p in parts]
    schemes += [replace(s, ranges=later_ranges(s.units, ready.ranges, s.ranges)) for s in schemes[len(parts) :]]

    recipes, stops = tuple(map(recipe_opening, schemes)), tuple(sorted(ready.excluded))
    inputs = ProbeInputs(
        model=ready.graph.identity,
        shapes=ready.graph.info.inputs,
        heads=ready.heads,
        recipes=tuple(map(recipe_identity, schemes)),
        stops=stops,
        data=ready.info,
        samples=samples,
        until_settled=settings.samples is None,
        probes=tuple(probes),
        seed=settings.seed,
    )

    def make() -> bytes:
        graph, opened = graph_opening(ready.graph), data_opening(data, ready.info)
        spec = ProberParts(graph=graph, heads=ready.heads, recipes=recipes, stops=stops)
        prober, key = Opening(kind="prober", spec=spec), key_of(inputs)
        jobs = [
            Job(
                kind="probe",
                key=key,
                shard=f"{index:06d}",
                spec=ProbedSample(prober=prober, data=opened, sample=index, probes=tuple(probes), seed=settings.seed),
            )
            for index in samples
        ]
        rows: list[ProbeMatrix] = []
        things = [(graph, ready.graph), (opened, data), *zip(recipes, schemes, strict=True)]
        held = work.executor.contexts.holding(*things)
        with work.stage("probe", len(samples)) as progress, held, closing(work.map(jobs, progress)) as results:
            for raw in results:
                rows.append(ProbeMatrix.from_bytes(raw))
                enough = settings.samples is None and len(rows) >= MIN_SAMPLES and len(rows) % 4 == 0
                if enough and ranking_settled(ProbeMatrix.concatenate(rows), ready.units):
                    break
        return ProbeMatrix.concatenate(rows).to_bytes()

    matrix = ProbeMatrix.from_bytes(work.cached("probe", inputs, make))
    silent_heads(matrix.heads, matrix.energy)
    found = views(ready.graph, schemes)
    size, end = len(parts), len(methods) * len(parts)
    return ProbedMatrix(
        matrix,
        tuple(methods),
        tuple(tuple(found[i:end:size]) for i in range(size)),
        tuple((found[i], *found[end + i :: size]) for i in range(size)),
    )


class ProbeInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides a probe matrix."""

    model: str
    """Identity of the network, see `Graph.identity`."""
    shapes: tuple[TensorSpec, ...]
    heads: tuple[Head, ...]
    recipes: tuple[Opening, ...]
    """How each target rounds, with each method of calibration."""
    stops: tuple[str, ...]
    """Nodes through which nothing is measured."""
    data: DataInfo
    samples: tuple[int, ...]
    until_settled: bool
    """Whether sampling stops where the ranking of units has settled."""
    probes: tuple[int, ...]
    """Number of probes of each head."""
    seed: int


class SecantInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides how the outputs bend."""

    network: ExecutedNetwork
    samples: tuple[int, ...]
    matrix: str
    """Digest of the probe matrix."""


class ProberParts(Record, frozen=True, kw_only=True):
    """Arguments of `Prober`."""

    graph: Opening
    heads: tuple[Head, ...]
    recipes: tuple[Opening, ...]
    stops: tuple[str, ...]


class ProbedSample(Record, frozen=True, kw_only=True):
    """A job of the kind `probe`: the rows of the probe matrix that one sample gives."""

    prober: Opening
    data: Opening
    sample: int
    probes: tuple[int, ...]
    """Number of probes of each head."""
    seed: int


def open_prober(spec: ProberParts, contexts: Contexts) -> Prober:
    """Open the sessions of a prober."""
    recipes = [contexts.open(recipe) for recipe in spec.recipes]
    return Prober(contexts.open(spec.graph), spec.heads, recipes, stops=frozenset(spec.stops))


def probe_sample(spec: ProbedSample, contexts: Contexts) -> bytes:
    """Measure the rows of one sample, in the format of `ProbeMatrix.to_bytes`."""
    prober, data = contexts.open(spec.prober), contexts.open(spec.data)
    rows: ProbeMatrix = prober.measure(data.feeds(spec.sample), sample=spec.sample, probes=spec.probes, seed=spec.seed)
    return rows.to_bytes()


def measured_bend(parts: Sequence[Calibrated], matrices: Sequence[ProbeMatrix], work: Workspace) -> Secant:
    """Measure on the first target with gates how the network bends, for all: that depends on the size of an error."""
    at = deciding_target(parts)
    if at is None:
        ones = (1.0,) * len(matrices[0].heads)
        return Secant(heads=matrices[0].heads, fractions=(1.0,), damage=(ones,), linear=ones, samples=0)
    ready, matrix = parts[at], matrices[at]
    samples = ready.parts.probe[: min(SECANT_SAMPLES, matrix.samples)]
    count = len(samples)
    inputs = SecantInputs(network=ready.executed, samples=samples, matrix=matrix.digest)

    def make() -> bytes:
        with work.stage("secant", count * len(FRACTIONS)) as progress:
            board = switchboard(ready, count, work)
            feeds = [ready.data.feeds(i) for i in samples]
            sites = rounded(ready.units, ready.units.lowest_gated())
            return to_json(secant(board, matrix, sites, ready.heads, feeds, progress=progress.advance))

    return msgspec.json.decode(work.cached("secant", inputs, make), type=Secant)
