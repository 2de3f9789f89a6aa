"""Calibrate the ranges of all tensors that may be rounded; stored shards of samples are used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from bitalloy.calibrate.statistics import Statistics
from bitalloy.calibrate.streaming import collect
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import DataError
from bitalloy.core.jobs import Contexts, Job, Opening
from bitalloy.core.records import Calibration, DataInfo, Record, TensorRange, TensorSpec, part_of
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import Dataset, data_opening
from bitalloy.model.graphs.again import graph_opening
from bitalloy.model.load import Graph
from bitalloy.model.masked import masked_tensors
from bitalloy.targets.given import given_ranges
from bitalloy.targets.safety import tensors_to_judge

CALIBRATION_SHARD = 16
GIVEN = "given"
"""Method of a range that a quantized file has."""
LEAST_TO_CUT = 16
"""Calibration samples from which ranges may be cut: the rare sample that loses by it is hardly among fewer."""
COMPARED, ALIKE = ("extended", "percentile", "entropy", "mse"), 0.1
"""Range methods compared for each tensor, and the part of its width by which a range must differ to be compared."""


def gather(
    model: Graph,
    targets: Sequence[UnitGraph],
    data: Dataset,
    samples: Sequence[int],
    method: str,
    work: Workspace,
    *,
    others: Sequence[tuple[Graph, Dataset]] = (),
) -> Calibration:
    """Calibrate all tensors that a target may round, or judges.

    Args:
        model: the model.
        targets: its units on each target.
        data: samples.
        samples: indices of those to calibrate on.
        method: range method, see `Settings.range_method`.
        work: where results are stored and progress is shown.
        others: the same model at other sizes, each with the same samples at these.
    """
    wanted: set[str] = set()
    for units in targets:
        wanted |= {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
        wanted |= tensors_to_judge(model, units)
    order = [t for t in model.value if t in wanted]
    info, count = data.info, len(samples)
    inputs = CalibrationInputs(
        model=model.identity,
        shapes=model.info.inputs,
        tensors=tuple(order),
        data=info,
        samples=tuple(samples),
        method=method,
        sizes=tuple((other.info.inputs, more.info) for other, more in others),
    )

    def make() -> bytes:
        statistics: Statistics | None = None
        masked = tuple(sorted(masked_tensors(model)))
        jobs, key, resident = [], key_of(inputs), list[tuple[Opening, object]]()
        for number, (sized, fed) in enumerate([(model, data), *others]):
            graph, opened = graph_opening(sized), data_opening(fed, fed.info)
            resident += [(graph, sized), (opened, fed)]
            for start in range(0, count, CALIBRATION_SHARD):
                some = tuple(samples[start : start + CALIBRATION_SHARD])
                spec = CalibrationShard(graph=graph, data=opened, tensors=tuple(order), masked=masked, samples=some)
                shard = f"{start:06d}" + (f"-{number}" if number else "")
                jobs.append(Job(kind="calibrate", key=key, shard=shard, spec=spec, steps=len(some)))
        held = work.executor.contexts.holding(*resident)
        with work.stage("calibrate", count * (1 + len(others))) as progress, held:
            for raw in work.map(jobs, progress):
                part = Statistics.from_bytes(raw)
                statistics = part if statistics is None else statistics.merge(part)
        if statistics is None:
            raise DataError("There is no sample to calibrate with.")
        return to_json(_chosen_ranges(statistics, model, order, inputs))

    return msgspec.json.decode(work.cached("calibration", inputs, make), type=Calibration)


def _chosen_ranges(
    statistics: Statistics, model: Graph, order: Sequence[str], inputs: CalibrationInputs
) -> Calibration:
    """Take the ranges of each tensor from statistics of all samples.

    Nothing is cut where so few values were seen that a range is extended: the rare samples that would lose by a cut are
    not among those that weigh it.
    """
    automatic = inputs.method == "auto"
    enough = statistics.samples >= LEAST_TO_CUT and not model.large
    first, *others = (COMPARED if enough else COMPARED[:1]) if automatic else (inputs.method,)
    found, more = statistics.ranges(first), {other: statistics.ranges(other) for other in others}
    sparse = dict(zip(order, statistics.margins.max(axis=1) > 0, strict=True))
    largest, subnormal = dict(zip(order, statistics.magnitude, strict=True)), statistics.half_subnormal
    infinite = dict(zip(order, statistics.infinite, strict=True))
    given = given_ranges(model) if automatic else {}
    return Calibration(
        model_sha256=model.info.sha256,
        data=part_of(inputs.data, len(inputs.samples)),
        method=inputs.method,
        ranges=tuple(
            TensorRange(
                tensor=t,
                low=float(given.get(t, found[t])[0]),
                high=float(given.get(t, found[t])[1]),
                method=GIVEN if t in given else first if sparse[t] or first != COMPARED[0] else "minmax",
                magnitude=float(largest[t]),
                subnormal=round(subnormal[t], 6),
                infinite=bool(infinite[t]),
                others={}
                if sparse[t] or t in given
                else _distinct(found[t], {m: ranges[t] for m, ranges in more.items()}),
                histogram=histogram,
            )
            for t, histogram in zip(order, statistics.histograms(), strict=True)
        ),
        half_margin=float(statistics.half_margin),
    )


class CalibrationInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the ranges of tensors."""

    model: str
    """Identity of the network, see `Graph.identity`."""
    shapes: tuple[TensorSpec, ...]
    tensors: tuple[str, ...]
    data: DataInfo
    samples: tuple[int, ...]
    method: str
    sizes: tuple[tuple[tuple[TensorSpec, ...], DataInfo], ...] = ()
    """Inputs and data of the same model at other sizes."""


class CalibrationShard(Record, frozen=True, kw_only=True):
    """A job of the kind `calibrate`: what some samples say about the values of tensors."""

    graph: Opening
    data: Opening
    tensors: tuple[str, ...]
    masked: tuple[str, ...]
    """Tensors that may hold infinite numbers."""
    samples: tuple[int, ...]


def collect_shard(spec: CalibrationShard, contexts: Contexts) -> bytes:
    """Return the statistics of the samples, as `Statistics.to_bytes` gives them."""
    graph, data = contexts.open(spec.graph), contexts.open(spec.data)
    feeds = (data.feeds(i) for i in spec.samples)
    return collect(graph.model, spec.tensors, feeds, masked=spec.masked).to_bytes()


def _distinct(first: tuple[float, float], others: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The ranges that differ from the first and from each other."""
    taken, found = [first], {}
    for method, (low, high) in others.items():
        least = ALIKE * (high - low)
        if all(abs(low - a) + abs(high - b) > least for a, b in taken):
            taken.append((low, high))
            found[method] = (low, high)
    return found
