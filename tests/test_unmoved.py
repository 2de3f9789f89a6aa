"""The numbers of the pipeline are where they were: hashes of what an analysis and three plans come to.

`tests/unmoved` holds them. Hashes depend on how the processor and ONNX Runtime sum up, so they are compared where both
are those of the file; elsewhere the structure is, and predictions of targets that do not run here within
`TOLERANCE_DB`. The suite compares one small model. For a large move, the numbers of the five embedded samples, and of a
real detector where it is at hand, are written before it with larger settings by `BITALLOY_UNMOVED=write`, and compared
after it by `BITALLOY_UNMOVED=all`. After a change that means to move numbers the small file is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bitalloy.core.errors import BudgetError
from bitalloy.core.plans import Budget
from bitalloy.core.records import Settings
from bitalloy.measure.roofline import estimate_costs
from bitalloy.measure.sizes import float_bytes
from bitalloy.model.weights import to_bytes
from bitalloy.pipeline.analyze import analyze
from bitalloy.pipeline.plan import plan
from bitalloy.pipeline.prepare import prepare
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.runtime.machine import machine_name
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets import TARGETS
from bitalloy.targets.devices import A10

FILES = Path(__file__).parent / "unmoved"
DATA = Path(__file__).parents[2] / "shared/data"
SMALL = Settings(
    targets=("ort-cpu", "tensorrt"),
    calibration_samples=2,
    samples=1,
    probes=2,
    equalize=False,
    bias_correction=False,
)
LARGER = Settings(targets=("ort-cpu", "openvino-cpu", "tensorrt"), calibration_samples=8, samples=2, probes=2)
SAMPLES = ("yolo11n-shapes", "yolo11n-seg-shapes", "segformer-b0-shapes", "mobilesam-shapes", "mobilevlm-shapes")
MODE = os.environ.get("BITALLOY_UNMOVED", "")
TOLERANCE_DB = 2.0
MACHINE = {"processor": machine_name(), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def digest(content: object) -> str:
    """SHA-256 of bytes, or of anything else as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


def found(model: str, data: Path | None, settings: Settings, folder: Path, *, front: bool) -> dict[str, Any]:
    """What an analysis and plans on each target come to."""
    prepared = prepare(model, out=folder, data=data, seed=0)
    analysis = analyze(prepared.model, prepared.data, settings, work=prepared.work)
    ranges = [
        [r.tensor, r.low, r.high, r.method, r.magnitude, r.subnormal, sorted((k, list(v)) for k, v in r.others.items())]
        for r in analysis.calibration.ranges
    ]
    return {"calibration": digest(ranges), **{t.target.name: on_target(t, front=front) for t in analysis.targets}}


def on_target(analysis: Analysis, *, front: bool) -> dict[str, Any]:
    """Units, probe matrix, three plans by estimated cost, and rewritten models on one target."""
    units, matrix = analysis.units, analysis.matrix
    columns = hashlib.sha256()
    for site in sorted(matrix.sites):
        columns.update(site.encode())
        for part in (part for pair in zip(matrix.rows, matrix.own, strict=True) for part in pair):
            columns.update(np.ascontiguousarray(part[:, :, matrix.column[site]]).tobytes())
    columns.update(matrix.energy.tobytes())
    size = float_bytes(analysis.graph)
    budgets = (
        Budget(latency_ratio=0.8),
        Budget(min_sqnr_db=25.0),
        Budget(size_bytes=int(0.6 * size), latency_ratio=0.95),
    )
    return {
        "units": digest([
            [u.id, u.kind, u.region, u.core, u.tail, u.root, [e.id for e in u.inner],
             [[w.id, w.axis, w.elements] for w in u.weights], sorted(u.allowed), u.macs]
            for u in units.units
        ]),
        "edges": digest([
            [e.id, [use.id for use in e.uses], e.producer, e.consumer, e.root, e.rooted, e.elements, e.passed_on,
             e.placement]
            for e in units.edges
        ]),
        "matrix": columns.hexdigest(),
        "plans": [planned(analysis, budget, front=front and i == 0) for i, budget in enumerate(budgets)],
        "lowest": written(analysis, analysis.units.lowest()),
    }  # fmt: skip


def planned(analysis: Analysis, budget: Budget, *, front: bool) -> dict[str, Any]:
    """A plan for a budget, at costs that are estimated for a device that is not here: they are the same everywhere."""
    try:
        result = plan(analysis, budget, table=estimate_costs(analysis.graph, analysis.units, A10), front=front).plan
    except BudgetError:
        return {"refused": True}
    return {
        "schemes": digest(result.chosen.listed),
        "counts": result.chosen.counts(),
        "latency_us": result.predicted_latency_us,
        "bytes": result.predicted_size_bytes,
        "gap": result.optimality_gap,
        "sqnr_db": {h.head: [h.predicted_db.value, h.predicted_db.low, h.predicted_db.high] for h in result.heads},
        "front": digest([
            [p.chosen.listed, p.predicted_latency_us, p.size_bytes, p.damage, p.sqnr_db] for p in result.pareto
        ]),
        "model": written(analysis, result.chosen),
    }  # fmt: skip


def written(ready: Calibrated, chosen: Any) -> str:
    """Hash of the models of a plan."""
    models = ready.artefact(chosen).models.values()
    return digest("".join(digest(to_bytes(model)) for model in models if not isinstance(model, Path)).encode())


def compare(name: str, now: Mapping[str, Any]) -> None:
    """Hold what was found against a file of `tests/unmoved`."""
    path = FILES / f"{name}.json"
    if MODE == "write":
        path.write_text(json.dumps({"machine": MACHINE, **now}, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    now = json.loads(json.dumps(now))
    if before.pop("machine") == MACHINE:
        assert now == before
        return
    for target in (key for key in before if key != "calibration"):
        assert now[target]["edges"] == before[target]["edges"]
        for new, old in zip(now[target]["plans"], before[target]["plans"], strict=True):
            assert new.get("refused") == old.get("refused")
            here = TARGETS[target].device is None  # how weights are rounded there depends on the processor's kernels
            for head, values in {} if here else old.get("sqnr_db", {}).items():
                assert new["sqnr_db"][head][0] == pytest.approx(values[0], abs=TOLERANCE_DB)


def test_the_numbers_of_a_small_model_did_not_move(tmp_path: Path) -> None:
    compare("segformer-b0-shapes-small", found("segformer-b0-shapes", None, SMALL, tmp_path / "run", front=False))


@pytest.mark.skipif(not MODE, reason="takes minutes: set BITALLOY_UNMOVED=all")
@pytest.mark.parametrize("name", SAMPLES)
def test_the_numbers_of_the_samples_did_not_move(name: str, tmp_path: Path) -> None:
    compare(name, found(name, None, LARGER, tmp_path / "run", front=True))


@pytest.mark.skipif(not MODE or not DATA.is_dir(), reason="takes minutes, and needs data beside the repository")
def test_the_numbers_of_a_real_detector_did_not_move(tmp_path: Path) -> None:
    model, images = DATA / "models/yolo11n.onnx", DATA / "coco128-calib/images"
    compare("yolo11n", found(str(model), images, LARGER, tmp_path / "run", front=True))
