"""Sensitivities in the task's own terms: what rounding one thing does to the metric on labelled data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.records import Estimate, MetricValue, Record
from bitalloy.core.store import key_of
from bitalloy.core.work import Workspace
from bitalloy.data.images import ImageSpec
from bitalloy.rewrite.calibrated import Calibrated, versions
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.sensitivity.measuring import ALL_BUT_ONE, ONE, Selection, chosen, everything
from bitalloy.tasks.coco import read_coco
from bitalloy.tasks.detection import DetectionData, DetectionResult, evaluate_detection
from bitalloy.tasks.open import image_spec
from bitalloy.tasks.yolo import class_names, looks_like_yolo

METRIC = "AP50-95"


class MetricRow(Record, frozen=True, kw_only=True):
    """What rounding one thing does to a task metric."""

    id: str
    scope: str
    value: MetricValue
    """With the thing rounded (or everything but the thing)."""
    drop: Estimate
    """float - `value`, in 0..1, with a paired 95 % bootstrap interval over images."""


class MetricTable(Record, frozen=True, kw_only=True):
    """Task-metric sensitivities of chosen things."""

    model_sha256: str
    metric: str
    method: str
    """`one-at-a-time` or `leave-one-out`."""
    reference: MetricValue = msgspec.field(name="float")
    rows: tuple[MetricRow, ...]


class _Result(Record, frozen=True, kw_only=True):
    value: MetricValue
    resampled: tuple[float, ...]


def measure_metric(
    ready: Calibrated,
    labels: Path,
    selection: Selection,
    *,
    mode: str = ONE,
    limit: int | None = None,
    work: Workspace | None = None,
) -> MetricTable:
    """Box AP with chosen units, regions or sites rounded; a shard per thing.

    Args:
        ready: the calibrated model, a YOLO-style detector.
        labels: COCO annotation file, with its images beside it.
        selection: what to measure; it may not be empty, because every thing costs a whole evaluation.
        mode: as for `measure_exact`.
        limit: evaluate at most so many images.
        work: where to keep and show results.

    Raises:
        BitalloyError: the selection is empty, or a pattern matches nothing.
        DataError: labels do not fit the images or the model, or the model is no detector.
    """
    work, model = work or Workspace(), ready.graph
    if not selection:
        raise BitalloyError(
            "The task metric runs the whole evaluation for each thing. Choose with --units, --regions or --sites, "
            "for example those that the table of `bitalloy sensitivity` puts first."
        )
    things = chosen(ready.units, selection, mode)
    if mode == ALL_BUT_ONE:
        things.append(everything(ready.units))
    spec = image_spec(model)
    if spec is None or not looks_like_yolo(model.info.inputs, model.info.outputs):
        raise DataError(
            f"Box AP needs a detector with output (1, 4 + classes, n); this model's outputs are "
            f"{[list(o.shape) for o in model.info.outputs]}. Leave out --metric to measure SQNR."
        )
    key = key_of(
        model=model.identity,
        shapes=model.info.inputs,
        target=ready.target.name,
        ranges=ready.calibration.ranges,
        offsets=ready.offsets,
        labels=hashlib.sha256(labels.read_bytes()).hexdigest(),
        limit=limit,
        seed=ready.settings.seed,
        versions=versions(),
    )
    board: Switchboard | None = None
    found: list[_Result] = []
    with work.stage("metric", None) as progress:
        for sites in (frozenset[str](), *(t.sites for t in things)):

            def shard(sites: frozenset[str] = sites, spec: ImageSpec = spec) -> bytes:
                nonlocal board
                board = board or Switchboard(model, ready.recipe())
                gates = board.gates(sites)

                def run(feeds: Mapping[str, np.ndarray], board: Switchboard = board) -> dict[str, np.ndarray]:
                    progress.advance(1)
                    return board.run(feeds, gates)

                data = DetectionData(read_coco(labels), spec, class_names(model.metadata))
                return _encode(evaluate_detection(run, data, limit=limit, seed=ready.settings.seed))

            name = hashlib.sha256("\n".join(sorted(sites)).encode()).hexdigest()[:24]
            found.append(msgspec.json.decode(work.shard("metric", key, name, shard), type=_Result))
    reference, *others = found
    return MetricTable(
        model_sha256=model.info.sha256,
        metric=METRIC,
        method=mode,
        reference=reference.value,
        rows=tuple(
            MetricRow(id=t.id, scope=t.scope, value=r.value, drop=_drop(reference, r))
            for t, r in zip(things, others, strict=True)
        ),
    )


def _encode(result: DetectionResult) -> bytes:
    return msgspec.json.encode(_Result(value=result.ap, resampled=tuple(result.resampled.tolist())))


def _drop(reference: _Result, rounded: _Result) -> Estimate:
    """Basic (reflected) bootstrap interval, as for the metric itself."""
    value = reference.value.value - rounded.value.value
    low, high = np.nanpercentile(np.subtract(reference.resampled, rounded.resampled), (2.5, 97.5))
    return Estimate(value=value, low=2 * value - float(high), high=2 * value - float(low))
