"""From a model and samples to a model that is ready to be rounded: units on each target, and calibrated ranges."""

from __future__ import annotations

import fnmatch
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import msgspec
import onnx_ir as ir

from bitalloy.apply import Mixed
from bitalloy.apply import apply as rewrite
from bitalloy.calibrate import Statistics, collect
from bitalloy.data import Dataset
from bitalloy.errors import BitalloyError, DataError, ModelError
from bitalloy.graph import Graph
from bitalloy.halving import specified
from bitalloy.heads import find_heads
from bitalloy.outcome import Correction
from bitalloy.pipeline.debiasing import debias
from bitalloy.pipeline.scaling import scaled
from bitalloy.pipeline.work import Workspace
from bitalloy.program import Joined, divide, reopen
from bitalloy.records import Calibration, DataInfo, Head, Offset, Precision, Settings, TensorRange, UnitGraph
from bitalloy.regions import ancestors, path_of, region_id
from bitalloy.runtime import AS_WRITTEN, ONLY, Artefact, available_cores
from bitalloy.sensitivity import Scheme, Switchboard
from bitalloy.store import key_of
from bitalloy.targets import Target, target
from bitalloy.targets.base import split
from bitalloy.targets.half import judge, tensors

CALIBRATION_SHARD = 16
COMPARED, ALIKE = ("minmax", "percentile", "entropy", "mse"), 0.1
"""Range methods among which a tensor's is chosen, and how much of its width a range must differ by to be compared."""
VERIFY_SAMPLES = 16
RANGE_RATIO = 16.0
"""A Concat whose operands' ranges differ by more than this stays in float."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model that is ready to be rounded, on the first target of its settings."""

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
    given: Graph
    """The model as loaded: the reference of all measurements. `graph` computes the same, perhaps with other weights."""
    key: str
    """Of model, data and settings."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know, e.g. that the data is the embedded sample."""
    corrections: tuple[Correction, ...] = ()
    """What scaling between layers and bias correction did."""
    offsets: Mapping[str, Offset] = field(default_factory=dict)
    """Weight site -> what is added to a bias where the weight is rounded; empty without bias correction."""
    others: tuple[Calibrated, ...] = ()
    """The same on the other targets of the settings."""

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Tensor -> (low, high)."""
        return {r.tensor: (r.low, r.high) for r in self.calibration.ranges}

    def scheme(self, method: str = "") -> Scheme:
        """How the target rounds the model, with ranges by another method where that gives something else."""
        ranges = {r.tensor: r.others.get(method, (r.low, r.high)) for r in self.calibration.ranges}
        return Scheme(self.units, self.target, ranges, self.offsets)

    def on(self, methods: Mapping[str, str]) -> Calibrated:
        """The same, with the ranges of some tensors by another method."""
        ranges = []
        for r in self.calibration.ranges:
            if r.tensor in methods:
                low, high = r.others[methods[r.tensor]]
                r = msgspec.structs.replace(r, low=low, high=high, method=methods[r.tensor])
            ranges.append(r)
        return replace(self, calibration=msgspec.structs.replace(self.calibration, ranges=tuple(ranges)))

    @property
    def execution(self) -> dict[str, object]:
        """What decides how models are executed here, beside the machine."""
        return {"threads": available_cores(), "runtime": self.target.runtime.version(), "versions": versions()}

    def corrected(self, offsets: Mapping[str, Offset]) -> Self:
        """The same with biases moved."""
        return replace(self, offsets=offsets, key=key_of(analysis=self.key, offsets=offsets) if offsets else self.key)

    def variant(self, lowered: frozenset[str]) -> Mixed:
        """The model in which the given units run in INT8, and those with `HALF` behind in FP16."""
        return rewrite(self.graph, self.units, lowered, self.ranges, self.target, self.offsets)

    def artefact(self, lowered: frozenset[str]) -> Artefact:
        """The same as it is shipped: of a program, a model for every graph, with the sizes that its file leaves open.

        A graph whose rounded nodes are not found again with open sizes keeps those of the samples.
        """
        model = self.variant(lowered).model
        if not isinstance(self.graph, Joined):
            return Artefact({ONLY: model}, runtime=self.target.runtime)
        parts = divide(model, self.graph.program)
        for name, opened in self.graph.opened.items():
            try:
                parts[name] = reopen(parts[name], opened.clone(), self.graph.program.graphs[name].model)
            except ModelError:
                continue
        return Artefact(parts, self.graph.program, self.target.runtime)

    def executable(self, artefact: Artefact) -> Artefact:
        """The same for ONNX Runtime on this machine, with the numbers that the graph says: see `specified`."""
        if not self.target.half:
            return artefact
        models = {name: specified(m) if isinstance(m, ir.Model) else m for name, m in artefact.models.items()}
        return Artefact(models, artefact.program, AS_WRITTEN)

    def original(self) -> Artefact:
        """The float model as it was given, or in normal form where the runtime refuses that."""
        if not isinstance(self.graph, Joined):
            return Artefact({ONLY: _given(self.given)}, runtime=self.target.runtime)
        program = self.graph.program
        return Artefact({name: _given(p) for name, p in program.graphs.items()}, program, self.target.runtime)


def _given(graph: Graph) -> Path | ir.Model:
    return graph.source if graph.runnable else graph.model


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
    if len(set(settings.targets)) != len(settings.targets) or not settings.targets:
        raise BitalloyError(f"Targets are {', '.join(settings.targets) or 'none'}; expected one or more, each once.")
    devices = [target(name) for name in settings.targets]
    for device in devices:
        device.runtime.version()  # where it is not installed, that is said before any work
    given, corrections = model, tuple[Correction, ...]()
    if settings.equalize:

        def trial(graph: Graph, few: Settings) -> Calibrated:
            return calibrate(graph, data, few, work=work)

        model, corrections = scaled(model, data, settings, trial, work, versions=versions())
    heads = find_heads(model)
    excluded = _excluded(model, settings.exclude)
    units = [split(model, device, heads, exclude=excluded) for device in devices]
    for device, found in zip(devices, units, strict=True):
        if not found.lowest():
            left = " after --exclude" if excluded else ""
            what = "INT8 or FP16" if device.half else "INT8"
            raise BitalloyError(
                f"No unit of the model can run in {what} on {device.name}{left}: there is nothing to plan."
            )
    info = data.info
    # the rest decides plans, not what is measured, or has keys of its own
    decisive = msgspec.structs.replace(settings, protect=True, equalize=True, bias_correction=True)
    key = key_of(
        model=model.identity,
        data=info,
        settings=decisive,
        versions=versions(),
        shapes=model.info.inputs,
        heads=heads,
    )
    calibration = _calibrate(model, units, data, info, settings, key, work)
    ranges = {r.tensor: r for r in calibration.ranges}
    parts = [
        Calibrated(
            graph=model,
            target=device,
            units=judge(model, _restrict(found, calibration), ranges),
            heads=heads,
            settings=settings,
            data=data,
            info=info,
            excluded=excluded,
            calibration=calibration,
            given=given,
            corrections=corrections,
            key=key_of(analysis=key, target=device.name) if index else key,
            notes=notes,
        )
        for index, (device, found) in enumerate(zip(devices, units, strict=True))
    ]
    if settings.bias_correction:
        debiased = debias(parts, data, calibration.data.count, work)
        corrections = (*corrections, debiased.correction)
        offsets = debiased.offsets or ({},) * len(parts)
        parts = [replace(p.corrected(o), corrections=corrections) for p, o in zip(parts, offsets, strict=True)]
    return replace(parts[0], others=tuple(parts[1:]))


def units_of(model: Graph, settings: Settings) -> tuple[UnitGraph, ...]:
    """The units of a model on each target, without samples; calibration may keep more of them in float."""
    excluded, heads = _excluded(model, settings.exclude), find_heads(model)
    return tuple(split(model, target(name), heads, exclude=excluded) for name in settings.targets)


def switchboard(ready: Calibrated, at_once: int, work: Workspace) -> Switchboard:
    """The model with a gate at every site, for so many samples at the same time; one for all stages of a run.

    Of a large model every stage makes its own, so that its memory is free afterwards.
    """
    at_once = min(at_once, available_cores())
    key = key_of(
        model=ready.graph.identity,
        shapes=ready.graph.info.inputs,
        target=ready.target.name,
        units=ready.units,
        ranges=ready.calibration.ranges,
        offsets=ready.offsets,
        at_once=at_once,
    )
    board: Switchboard | None = work.shared.get(key)
    if board is None:
        board = Switchboard(ready.graph, ready.scheme(), at_once=at_once)
        if not ready.graph.large:
            work.shared[key] = board
    return board


def unseen(probed: int, total: int) -> list[int]:
    """Samples that the probe matrix has not seen, as far as there are enough; from the end of the data otherwise."""
    found = list(range(probed, total))[:VERIFY_SAMPLES]
    return found if len(found) >= min(VERIFY_SAMPLES, 4) else list(range(total))[-VERIFY_SAMPLES:]


def part_of(info: DataInfo, count: int) -> DataInfo:
    """The same data, of which `count` samples were used."""
    return msgspec.structs.replace(info, count=count)


def versions() -> dict[str, str]:
    """Versions of everything that decides a number."""
    return {
        name: importlib.metadata.version(name)
        for name in ("bitalloy", "numpy", "onnx", "onnx-ir", "onnxruntime", "scipy")
    }


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
    model: Graph,
    targets: Sequence[UnitGraph],
    data: Dataset,
    info: DataInfo,
    settings: Settings,
    key: str,
    work: Workspace,
) -> Calibration:
    wanted: set[str] = set()
    for units in targets:
        wanted |= {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
        wanted |= tensors(model, units)
    order = [t for t in model.value if t in wanted]
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
        automatic = settings.range_method == "auto"
        first, *others = (COMPARED if not model.large else COMPARED[:1]) if automatic else (settings.range_method,)
        found, more = statistics.ranges(first), {method: statistics.ranges(method) for method in others}
        largest, subnormal = dict(zip(order, statistics.magnitude, strict=True)), statistics.fp16_subnormal
        record = Calibration(
            model_sha256=model.info.sha256,
            data=part_of(info, count),
            method=settings.range_method,
            ranges=tuple(
                TensorRange(
                    tensor=t,
                    low=float(found[t][0]),
                    high=float(found[t][1]),
                    method=first,
                    magnitude=float(largest[t]),
                    subnormal=round(subnormal[t], 6),
                    others=_distinct(found[t], {method: ranges[t] for method, ranges in more.items()}),
                )
                for t in order
            ),
            abs_max_fp16_margin=float(statistics.fp16_margin),
        )
        return msgspec.json.encode(record)

    return msgspec.json.decode(work.cached("calibration", key, make), type=Calibration)


def _distinct(first: tuple[float, float], others: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The ranges that differ from the first and from each other."""
    taken, found = [first], {}
    for method, (low, high) in others.items():
        least = ALIKE * (high - low)
        if all(abs(low - a) + abs(high - b) > least for a, b in taken):
            taken.append((low, high))
            found[method] = (low, high)
    return found


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
        if unit.kind == "Concat" and Precision.INT8 in unit.allowed and sizes and max(sizes) > RANGE_RATIO * min(sizes):
            reason = f"operands' ranges differ by a factor of {max(sizes) / min(sizes):.0f}, too much for one scale"
            unit = unit.without(Precision.INT8, reason)
        changed.append(unit)
    return msgspec.structs.replace(units, units=tuple(changed))
