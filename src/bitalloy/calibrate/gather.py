"""Ranges of all tensors that may be rounded, from shards of samples where they exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from bitalloy.calibrate.statistics import Statistics
from bitalloy.calibrate.streaming import collect
from bitalloy.core.errors import DataError
from bitalloy.core.records import Calibration, DataInfo, Settings, TensorRange, part_of
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.data.datasets import Dataset
from bitalloy.model.load import Graph
from bitalloy.targets.safety import tensors_to_judge

CALIBRATION_SHARD = 16


COMPARED, ALIKE = ("minmax", "percentile", "entropy", "mse"), 0.1
"""Range methods among which a tensor's is chosen, and how much of its width a range must differ by to be compared."""


def gather(
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
        wanted |= tensors_to_judge(model, units)
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
            half_margin=float(statistics.fp16_margin),
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
