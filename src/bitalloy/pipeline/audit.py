"""What the runtime ran for a plan: inside a run, or again for a run directory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.audit import audit as compare
from bitalloy.errors import RunDirectoryError
from bitalloy.outcome import Audit
from bitalloy.pipeline.analyze import Analysis
from bitalloy.pipeline.deliver import apply
from bitalloy.pipeline.planning import read_record
from bitalloy.pipeline.records import Planned
from bitalloy.pipeline.work import Workspace
from bitalloy.plans import Plan
from bitalloy.records import UnitGraph
from bitalloy.runtime import ONLY, Artefact
from bitalloy.store import key_of
from bitalloy.targets import target
from bitalloy.tracing import profile, trace


def audit(analysis: Analysis, planned: Planned, *, work: Workspace | None = None) -> Audit:
    """Profile the mixed model of a plan on its target, and compare what ran with what was planned."""
    work = work or Workspace()
    runtime, int8 = analysis.target.runtime, planned.plan.int8_units()

    def make() -> bytes:
        with work.stage("audit", None), work.scratch() as folder:
            traced = trace(apply(analysis, planned), (u.id for u in analysis.units.units)).placed(folder / "mixed")
            kernels = profile(traced, analysis.data.feeds(0), folder)
        return msgspec.json.encode(compare(analysis.units, int8, kernels, runtime.name, runtime.version()))

    key = key_of(analysis=analysis.key, mixed=sorted(int8), **analysis.execution)
    return msgspec.json.decode(work.cached("audit", key, make), type=Audit)


def audit_run(path: str | Path) -> Audit:
    """Profile the `mixed.onnx` of a run directory here and now, on random inputs; of a program, what its run found.

    Raises:
        RunDirectoryError: the directory does not hold a finished run.
        MissingExtraError: the runtime of its target is not installed.
    """
    run = Path(path)
    plan, units = read_record(run / "plan.json", Plan), read_record(run / "units.json", UnitGraph)
    if (run / "mixed").is_dir():
        return read_record(run / "audit.json", Audit)
    model, runtime = run / "mixed.onnx", target(plan.target).runtime
    version = runtime.version()
    try:
        loaded = ir.load(model)
    except Exception as error:  # a missing or damaged file, by many types
        raise RunDirectoryError(f"'{model}' cannot be read: {error}. Give the same `bitalloy run` again.") from error
    generator = np.random.default_rng(0)
    feeds = {}
    for value in loaded.graph.inputs:
        assert value.shape is not None and value.dtype is not None, "inputs of a mixed model are typed and static"
        shape = tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
        kind = value.dtype.numpy()
        random = generator.random(shape) if np.issubdtype(kind, np.floating) else np.zeros(shape)
        feeds[str(value.name)] = random.astype(kind)
    with tempfile.TemporaryDirectory(prefix="bitalloy-audit-") as name:
        traced = trace(Artefact({ONLY: loaded}, runtime=runtime), (u.id for u in units.units)).placed(Path(name))
        kernels = profile(traced, feeds, Path(name))
    return compare(units, plan.int8_units(), kernels, runtime.name, version)
