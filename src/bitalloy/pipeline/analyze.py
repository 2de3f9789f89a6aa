"""From a model and samples to everything that is known before a budget is given."""

from __future__ import annotations

import fnmatch
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import onnx_ir as ir

from bitalloy.apply import Mixed
from bitalloy.apply import apply as rewrite
from bitalloy.calibrate import Statistics, collect
from bitalloy.data import Dataset
from bitalloy.errors import BitalloyError, DataError, ModelError
from bitalloy.graph import Graph
from bitalloy.heads import find_heads
from bitalloy.matrix import ProbeMatrix
from bitalloy.pipeline.work import Workspace
from bitalloy.program import Joined, divide, reopen
from bitalloy.records import Calibration, DataInfo, Head, Secant, SensitivityTable, Settings, TensorRange, UnitGraph
from bitalloy.regions import ancestors, path_of, region_id
from bitalloy.runtime import ONLY, Artefact
from bitalloy.sensitivity import Prober, Switchboard, secant, sensitivities, settled
from bitalloy.sensitivity.exact import FRACTIONS
from bitalloy.store import key_of
from bitalloy.targets import Target, target
from bitalloy.targets.base import split

CALIBRATION_SHARD = 16
MIN_SAMPLES, MAX_SAMPLES = 8, 16
LEAST_PROBES = 2
"""Of a head in every sample."""
SECANT_SAMPLES = 8
RANGE_RATIO = 16.0
"""A Concat whose operands' ranges differ by more than this stays in float."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model that is ready to be rounded."""

    graph: Graph
    target: Target
    units: UnitGraph
    heads: tuple[Head, ...]
    settings: Settings
    data: Dataset
    info: DataInfo
    """Of all of `data`."""
    excluded: frozenset[str]
    """Nodes that the user keeps in float."""
    calibration: Calibration
    key: str
    """Of model, data and settings."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know, e.g. that the data is the embedded sample."""

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Tensor -> (low, high)."""
        return {r.tensor: (r.low, r.high) for r in self.calibration.ranges}

    def variant(self, int8: frozenset[str]) -> Mixed:
        """The model in which the given units run in INT8."""
        return rewrite(self.graph, self.units, int8, self.ranges, self.target)

    def artefact(self, int8: frozenset[str]) -> Artefact:
        """The same as it is shipped: of a program, a model for every graph, with the sizes that its file leaves open.

        A graph whose rounded nodes are not found again with open sizes keeps those of the samples.
        """
        model = self.variant(int8).model
        if not isinstance(self.graph, Joined):
            return Artefact({ONLY: model}, runtime=self.target.runtime)
        parts = divide(model, self.graph.program)
        for name, opened in self.graph.opened.items():
            try:
                parts[name] = reopen(parts[name], opened.clone())
            except ModelError:
                continue
        return Artefact(parts, self.graph.program, self.target.runtime)

    def original(self) -> Artefact:
        """The float model as it was given, or in normal form where the runtime refuses that."""
        if not isinstance(self.graph, Joined):
            return Artefact({ONLY: _given(self.graph)}, runtime=self.target.runtime)
        program = self.graph.program
        return Artefact({name: _given(p) for name, p in program.graphs.items()}, program, self.target.runtime)


def _given(graph: Graph) -> Path | ir.Model:
    return graph.source if graph.runnable else graph.model


@dataclass(frozen=True, kw_only=True)
class Analysis(Calibrated):
    """Everything that is known about a model before a budget is given."""

    matrix: ProbeMatrix
    secant: Secant
    table: SensitivityTable


def analyze(
    model: Graph,
    data: Dataset,
    settings: Settings | None = None,
    *,
    notes: tuple[str, ...] = (),
    work: Workspace | None = None,
) -> Analysis:
    """Calibrate and probe: all that serves every plan for a target.

    Args:
        model: in normal form, from `load`.
        data: samples that look like the real ones; no labels needed.
        settings: target, numbers of samples and probes, seed, exclusions.
        notes: what a reader of the results must know.
        work: where to keep and show results.

    Raises:
        ModelError: NaN or infinite values inside the model.
        UnsupportedOpError: an operator without adjoint rule; the message says how to exclude it.
        DataError: the data is empty or does not fit.
    """
    work = work or Workspace()
    ready = calibrate(model, data, settings, notes=notes, work=work)
    matrix = _probe(ready, work)
    bent = _secant(ready, matrix, work)
    table = sensitivities(matrix, ready.units, part_of(ready.info, matrix.samples), bent, seed=ready.settings.seed)
    return Analysis(**{f.name: getattr(ready, f.name) for f in fields(ready)}, matrix=matrix, secant=bent, table=table)


def calibrate(
    model: Graph,
    data: Dataset,
    settings: Settings | None = None,
    *,
    notes: tuple[str, ...] = (),
    work: Workspace | None = None,
) -> Calibrated:
    """Find what can be rounded, and the ranges: all that exact measurement needs. Arguments as for `analyze`.

    Raises:
        ModelError: NaN or infinite values inside the model.
        DataError: the data is empty or does not fit.
    """
    settings, work = settings or Settings(), work or Workspace()
    device = target(settings.target)
    device.runtime.version()  # where it is not installed, that is said before any work
    heads = find_heads(model)
    excluded = _excluded(model, settings.exclude)
    units = split(model, device, heads, exclude=excluded)
    if not units.quantizable():
        left = " after --exclude" if excluded else ""
        raise BitalloyError(f"No unit of the model can run in INT8 on {device.name}{left}: there is nothing to plan.")
    info = data.info
    decisive = msgspec.structs.replace(settings, protect=True)  # decides plans, not what is measured
    key = key_of(
        model=model.info.sha256,
        data=info,
        settings=decisive,
        versions=versions(),
        shapes=model.info.inputs,
        heads=heads,
    )
    calibration = _calibrate(model, units, data, info, settings, key, work)
    return Calibrated(
        graph=model,
        target=device,
        units=_restrict(units, calibration),
        heads=heads,
        settings=settings,
        data=data,
        info=info,
        excluded=excluded,
        calibration=calibration,
        key=key,
        notes=notes,
    )


def _secant(ready: Calibrated, matrix: ProbeMatrix, work: Workspace) -> Secant:
    count = min(SECANT_SAMPLES, matrix.samples)

    def make() -> bytes:
        with work.stage("secant", count * len(FRACTIONS)) as progress:
            board = Switchboard(ready.graph, ready.units, ready.ranges, ready.target, at_once=count)
            feeds = [ready.data.feeds(i) for i in range(count)]
            sites = ready.units.rounded(ready.units.quantizable())
            return msgspec.json.encode(secant(board, matrix, sites, ready.heads, feeds, progress=progress.advance))

    return msgspec.json.decode(work.cached("secant", ready.key, make), type=Secant)


def _excluded(model: Graph, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the nodes that match a pattern by name, region or operator type."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {
            str(n.name)
            for n in model.nodes
            if fnmatch.fnmatchcase(str(n.name), pattern)
            or n.op_type == pattern
            or any(fnmatch.fnmatchcase(r, pattern) for r in _regions(n))
        }
        if not hits:
            raise BitalloyError(f"--exclude '{pattern}' matches no node, region or operator of the model.")
        found |= hits
    return frozenset(found)


def _regions(node: ir.Node) -> tuple[str, ...]:
    """Regions of a node, the root left out."""
    return ancestors(region_id(path_of(node)))[:-1]


def _calibrate(
    model: Graph, units: UnitGraph, data: Dataset, info: DataInfo, settings: Settings, key: str, work: Workspace
) -> Calibration:
    tensors = {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
    order = [t for t in model.value if t in tensors]
    count = min(len(data), settings.calibration_samples)

    def make() -> bytes:
        statistics: Statistics | None = None
        with work.stage("calibrate", count) as progress:
            for start in range(0, count, CALIBRATION_SHARD):
                indices = range(start, min(start + CALIBRATION_SHARD, count))
                raw = work.shard(
                    "calibrate",
                    key,
                    f"{start:06d}",
                    lambda i=indices: collect(  # type: ignore[misc]
                        model.model, order, (data.feeds(n) for n in i), progress=progress.advance
                    ).to_bytes(),
                )
                part = Statistics.from_bytes(raw)
                statistics = part if statistics is None else statistics.merge(part)
        if statistics is None:
            raise DataError("There is no sample to calibrate with.")
        found = statistics.ranges(settings.range_method)
        record = Calibration(
            model_sha256=model.info.sha256,
            data=part_of(info, count),
            method=settings.range_method,
            ranges=tuple(
                TensorRange(tensor=t, low=float(found[t][0]), high=float(found[t][1]), method=settings.range_method)
                for t in order
            ),
            abs_max_fp16_margin=float(statistics.fp16_margin),
        )
        return msgspec.json.encode(record)

    return msgspec.json.decode(work.cached("calibration", key, make), type=Calibration)


def _restrict(units: UnitGraph, calibration: Calibration) -> UnitGraph:
    """Keep in float every Concat that would put tensors of very different range on one scale."""
    ranges = {r.tensor: max(abs(r.low), abs(r.high)) for r in calibration.ranges}
    entering: dict[str, list[float]] = {}
    for edge in units.edges:
        if edge.consumer is not None:
            entering.setdefault(edge.consumer, []).append(ranges.get(edge.root, 0.0))
    changed = []
    for unit in units.units:
        sizes = [s for s in entering.get(unit.id, []) if s > 0]
        if unit.kind == "Concat" and len(unit.allowed) > 1 and sizes and max(sizes) > RANGE_RATIO * min(sizes):
            reason = f"operands' ranges differ by a factor of {max(sizes) / min(sizes):.0f}, too much for one scale"
            unit = msgspec.structs.replace(unit, allowed=unit.allowed[:1], inner=(), weights=(), reason=reason)
        changed.append(unit)
    return msgspec.structs.replace(units, units=tuple(changed))


def _probe(ready: Calibrated, work: Workspace) -> ProbeMatrix:
    settings, data, key = ready.settings, ready.data, ready.key
    most = min(len(data), settings.samples or MAX_SAMPLES)
    plain = sum(not h.kind for h in ready.heads)
    shared = max(LEAST_PROBES, -(-settings.probes // plain))
    probes = [LEAST_PROBES if h.kind else shared for h in ready.heads]

    def make() -> bytes:
        prober: Prober | None = None
        parts: list[ProbeMatrix] = []
        with work.stage("probe", most) as progress:
            for index in range(most):

                def shard(n: int = index) -> bytes:
                    nonlocal prober
                    prober = prober or Prober(
                        ready.graph, ready.units, ready.heads, ready.ranges, ready.target, stops=ready.excluded
                    )
                    return prober.measure(data.feeds(n), sample=n, probes=probes, seed=settings.seed).to_bytes()

                parts.append(ProbeMatrix.from_bytes(work.shard("probe", key, f"{index:06d}", shard)))
                progress.advance(1)
                enough = settings.samples is None and len(parts) >= MIN_SAMPLES and len(parts) % 4 == 0
                if enough and settled(ProbeMatrix.concatenate(parts), ready.units):
                    break
        return ProbeMatrix.concatenate(parts).to_bytes()

    return ProbeMatrix.from_bytes(work.cached("probe", key, make))


def part_of(info: DataInfo, count: int) -> DataInfo:
    """The same data, of which `count` samples were used."""
    return msgspec.structs.replace(info, count=count)


def versions() -> dict[str, str]:
    """Versions of everything that decides a number."""
    return {
        name: importlib.metadata.version(name)
        for name in ("bitalloy", "numpy", "onnx", "onnx-ir", "onnxruntime", "scipy")
    }
