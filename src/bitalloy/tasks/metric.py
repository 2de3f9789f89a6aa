"""Sensitivities in the task's terms: what rounding a unit, region or site does to the metric on labelled data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.jobs import Contexts, Job, Opening
from bitalloy.core.records import Estimate, MetricValue, Record
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.tabular import Listing, Tabular
from bitalloy.core.work import Workspace
from bitalloy.data.images import ImageSpec
from bitalloy.model.graphs.again import graph_opening
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork
from bitalloy.sensitivity.measuring import ALL_BUT_ONE, ONE, Selection, chosen_groups, whole_group
from bitalloy.sensitivity.switchboards import switchboard_opening
from bitalloy.tasks.base import image_hashes
from bitalloy.tasks.bootstrap import bootstrap_estimate
from bitalloy.tasks.coco import read_coco
from bitalloy.tasks.detection import DetectionData, DetectionInputs, evaluate_detection
from bitalloy.tasks.open import image_spec
from bitalloy.tasks.yolo import class_names, looks_like_yolo

METRIC = "AP50-95"


class MetricRow(Record, frozen=True, kw_only=True):
    """Effect of rounding one unit, region or site on a task metric."""

    id: str
    scope: str
    value: MetricValue
    """Metric with the unit, region or site rounded, or with everything rounded but it."""
    drop: Estimate
    """Metric of the float model minus `value`, in 0..1, with a paired 95 % bootstrap interval over images."""


class MetricTable(Tabular, Record, frozen=True, kw_only=True):
    """Sensitivities of a task metric to chosen units, regions or sites."""

    model_sha256: str
    metric: str
    method: str
    """Mode of the measurement: `one-at-a-time` or `leave-one-out`."""
    reference: MetricValue = msgspec.field(name="float")
    rows: tuple[MetricRow, ...]

    def listing(self) -> Listing:
        """Return the rows as a table, with the drop of each and its interval."""
        columns = ("scope", "id", self.metric, "drop", "low", "high")
        rows = [(r.scope, r.id, r.value.value, r.drop.value, r.drop.low, r.drop.high) for r in self.rows]
        return Listing(f"{self.metric} by {self.method}", columns, rows)


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
    image: ImageSpec | None = None,
    work: Workspace | None = None,
) -> MetricTable:
    """Measure box AP with chosen units, regions or sites rounded; each one has a shard of its own.

    Args:
        ready: the calibrated model, a YOLO-style detector.
        labels: COCO annotation file, with its images beside it.
        selection: what to measure; it may not be empty, because each unit, region or site costs a whole evaluation.
        mode: `one-at-a-time` or `leave-one-out`, see `measure_exact`.
        limit: largest number of images that are evaluated; None for all.
        image: how images are prepared; None takes what the model's file says, or else YOLO's own.
        work: where results are stored and progress is shown.

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
    things = chosen_groups(ready.units, selection, mode)
    if mode == ALL_BUT_ONE:
        things.append(whole_group(ready.units))
    image = image or image_spec(model)
    if image is None or not looks_like_yolo(model.info.inputs, model.info.outputs):
        raise DataError(
            f"Box AP needs a detector with output (1, 4 + classes, n); this model's outputs are "
            f"{[list(o.shape) for o in model.info.outputs]}. Leave out --metric to measure SQNR."
        )
    sites = (frozenset[str](), *(t.sites for t in things))
    switches = switchboard_opening(ready)
    data = DetectionData(read_coco(labels), image, class_names(model.metadata))
    jobs = _jobs(ready, data, switches, dict.fromkeys(sites), limit)
    held = work.executor.contexts.holding((graph_opening(model), model), (switches.spec.recipe, ready.recipe()))
    with work.stage("metric", len(jobs)) as progress, held:
        results = [msgspec.json.decode(raw, type=_Result) for raw in work.map(jobs, progress)]
    of = {frozenset(job.spec.sites): result for job, result in zip(jobs, results, strict=True)}
    reference, *others = (of[rounded] for rounded in sites)
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


def _jobs(
    ready: Calibrated,
    data: DetectionData,
    switches: Opening,
    sites: Iterable[frozenset[str]],
    limit: int | None,
) -> list[Job]:
    """One job for each set of sites that is rounded."""
    seed = ready.settings.seed
    labels = _inputs_of(data, limit, seed)
    key = key_of(MetricInputs(network=ready.executed, labels=labels, seed=seed))
    jobs = []
    for rounded in sites:
        spec = MeasuredPrecision(
            switchboard=switches,
            sites=tuple(sorted(rounded)),
            image=data.image,
            labels=str(data.labels.path.absolute()),
            fingerprint=key_of(labels),
            limit=limit,
            seed=seed,
            names=labels.names,
        )
        name = hashlib.sha256("\n".join(spec.sites).encode()).hexdigest()[:24]
        jobs.append(Job(kind="metric", key=key, shard=name, spec=spec))
    return jobs


def _inputs_of(data: DetectionData, limit: int | None, seed: int) -> DetectionInputs:
    samples = data.choose(limit, seed)
    return data.inputs(samples, image_hashes(data, samples))


class MetricInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metric of a detector, beside the sites that name a shard."""

    network: ExecutedNetwork
    labels: DetectionInputs
    seed: int
    """Seed of the bootstrap."""


class MeasuredPrecision(Record, frozen=True, kw_only=True):
    """A job of the kind `metric`: box AP of a detector with some sites rounded."""

    switchboard: Opening
    sites: tuple[str, ...]
    image: ImageSpec
    labels: str
    """Path of the annotation file."""
    fingerprint: str
    """Key that the `DetectionInputs` must have."""
    limit: int | None
    seed: int
    names: tuple[str, ...] | None
    """Names of the classes; None where the model does not tell them."""


def measure_precision(spec: MeasuredPrecision, contexts: Contexts) -> bytes:
    """Measure box AP of a detector; the result is its value and resampled values in JSON.

    Raises:
        DataError: the annotations have changed, or do not fit the model.
    """
    labels = Path(spec.labels)
    data = DetectionData(read_coco(labels), spec.image, spec.names)
    if key_of(_inputs_of(data, spec.limit, spec.seed)) != spec.fingerprint:
        raise DataError(f"'{labels}' has changed since this job was made. Put the old file back, or start again.")
    board = contexts.open(spec.switchboard)
    gates = board.gates(spec.sites)

    def run(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        outputs: Mapping[str, np.ndarray] = board.run(feeds, gates)
        return outputs

    result = evaluate_detection(run, data, limit=spec.limit, seed=spec.seed)
    return to_json(_Result(value=result.ap, resampled=tuple(result.resampled.tolist())))


def _drop(reference: _Result, rounded: _Result) -> Estimate:
    """Return the paired drop, with the draws of images that both results share."""
    drops = np.subtract(reference.resampled, rounded.resampled)
    return bootstrap_estimate(reference.value.value - rounded.value.value, drops)
