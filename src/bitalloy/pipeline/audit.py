"""Audits of what the runtime executes for a plan, inside a run or later for a run directory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.core.audited import Audit
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, RunDirectoryError
from bitalloy.core.planned import Planned
from bitalloy.core.plans import PlanReport
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.measure.audit import audit_kernels, reconcile
from bitalloy.measure.tracing import TracedModel, profile, rewritten_graphs, trace
from bitalloy.pipeline.ship import apply
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.steps import once
from bitalloy.search.planning import read_record
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets import target


class AuditInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides an audit."""

    network: ExecutedNetwork
    plan: tuple[tuple[str, str], ...]
    """Pairs of unit and scheme."""


def audit_plan(analysis: Analysis, planned: Planned, *, work: Workspace | None = None) -> Audit:
    """Profile the mixed model of a plan on its target, and compare what ran with what was planned."""
    work = work or Workspace()
    plan = planned.plan.chosen

    def make() -> bytes:
        with work.stage("audit", None), work.scratch() as folder:
            traced = trace(apply(analysis, planned), (u.id for u in analysis.units.units)).placed(folder / "mixed")
            return to_json(_look(traced, analysis.units, plan, analysis.data.feeds(0), folder))

    inputs = AuditInputs(network=analysis.executed, plan=tuple(plan.listed))
    return msgspec.json.decode(work.cached("audit", inputs, make), type=Audit)


def audit_run(path: str | Path, *, here: bool = False) -> Audit:
    """Profile the `mixed.onnx` of a run directory on random inputs; for a program, read what its run found.

    Args:
        path: the run directory.
        here: audit the model on this CPU where the target's device is absent, which says nothing about that target.

    Raises:
        RunDirectoryError: the directory does not hold a finished run.
        MissingExtraError: the runtime of its target is not installed.
        BitalloyError: the device of its target is not here.
    """
    run = Path(path)
    plan, units = read_record(run / "plan.json", PlanReport), read_record(run / "units.json", UnitGraph)
    device, note = target(plan.target), ""
    runtime = device.runtime
    if device.native is not None and here:
        note = f"Executed by {runtime.name} on this CPU. This says nothing about {device.name}."
    elif device.native is not None and (reason := device.missing()):
        raise BitalloyError(
            f"'{run}' is planned for {device.name}, which cannot run here: {reason}. Copy the folder to a machine with "
            f"an NVIDIA GPU for which `bitalloy doctor` finds {device.name}, and give `bitalloy audit` there. What "
            "this CPU makes of the model is told with --here; it says nothing about the target."
        )
    elif device.native is not None:
        runtime = device.native
    if (run / "mixed").is_dir():
        if not (run / "audit.json").is_file():
            raise RunDirectoryError(
                f"'{run}' holds a program of several graphs, which are audited in their run alone, and has no "
                f"audit.json: {device.name} did not run on that machine."
            )
        return read_record(run / "audit.json", Audit)
    model = run / "mixed.onnx"
    runtime.version()  # where it is not installed, that is said first
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
        found = _look(traced, units, plan.chosen, feeds, Path(name))
    return msgspec.structs.replace(found, note=note)


def _look(traced: TracedModel, units: UnitGraph, plan: Plan, feeds: Mapping[str, np.ndarray], folder: Path) -> Audit:
    """Profile a model and read the graphs that ran."""
    runtime = traced.artefact.runtime
    kernels, graphs = reconcile(traced, profile(traced, once(feeds), folder), rewritten_graphs(traced, folder))
    return audit_kernels(units, plan, kernels, runtime.name, runtime.version(), graphs=graphs)
