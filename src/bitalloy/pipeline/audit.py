"""Audits of what runs for a plan, or a compiler makes of it: inside a run, or later for its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.core.audited import Audit, Compilation
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, RunDirectoryError
from bitalloy.core.ownership import temporary
from bitalloy.core.planned import Planned
from bitalloy.core.plans import PlanReport
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.summaries import read_summary
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.measure.audit import audit_kernels, reconcile
from bitalloy.measure.compiled import compile_plan
from bitalloy.measure.tracing import TracedModel, profile, rewritten_graphs, trace
from bitalloy.measure.workload import optimization_profiles, workload_of
from bitalloy.model.external import open_unread
from bitalloy.pipeline.ship import Verified, apply
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.steps import once
from bitalloy.runtime.tensorrt_rtx import compiler_version, has_compiler
from bitalloy.search.planning import read_record
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.targets import TARGETS, target
from bitalloy.targets.devices import find_device


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


class CompileInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides a compilation."""

    network: ExecutedNetwork
    plan: tuple[tuple[str, str], ...]
    """Pairs of unit and scheme."""
    capability: int
    compiler: str
    """Version of the compiler."""
    profiles: dict[str, dict[str, tuple[tuple[int, ...], ...]]]


def compiled_verified(verified: Verified, work: Workspace) -> Verified:
    """Add the shapes of open inputs that an engine needs, and what the compiler makes of the plan where it is here.

    Targets that the compiler does not serve are left as they are.
    """
    analysis, device = verified.analysis, verified.analysis.target.device
    if device is None or not analysis.target.compiled:
        return verified
    workload, sizes = workload_of(analysis.graph, analysis.settings.workload), analysis.settings.sizes
    profiles = optimization_profiles(analysis.graph, verified.mixed.models, workload, sizes)
    summary = msgspec.structs.replace(verified.summary, profiles=profiles)
    if not has_compiler():
        return replace(verified, summary=summary)
    plan = verified.planned.plan.chosen

    def make() -> bytes:
        with work.stage("compile", None), work.scratch() as folder:
            models = {path.stem: ir.load(path) for path in _saved(verified.mixed, folder)}
            return to_json(compile_plan(models, analysis.units, plan, device.capability, profiles))

    inputs = CompileInputs(
        network=analysis.executed,
        plan=tuple(plan.listed),
        capability=device.capability,
        compiler=compiler_version(),
        profiles=profiles,
    )
    found = msgspec.json.decode(work.cached("compiled", inputs, make), type=Compilation)
    return replace(verified, summary=msgspec.structs.replace(summary, compiled=found.counts), compilation=found)


def _saved(artefact: Artefact, folder: Path) -> list[Path]:
    """Write an artefact as it is shipped; the files of its graphs are returned."""
    files = artefact.save(folder / "mixed" if artefact.program is not None else folder / f"{ONLY}.onnx")
    return [path for path in files if path.suffix == ".onnx"]


def compile_run(path: str | Path, device: str = "") -> Compilation:
    """Compile the mixed model of a run directory, and compare the engines with its plan.

    Args:
        path: the run directory.
        device: device or compute capability to compile for; without it that of the run.

    Raises:
        RunDirectoryError: the directory does not hold a finished run.
        BitalloyError: its target is not NVIDIA's, or the compiler is not installed.
    """
    run = Path(path)
    plan, units = read_record(run / "plan.json", PlanReport), read_record(run / "units.json", UnitGraph)
    found = target(plan.target)
    if not found.compiled:
        able = ", ".join(t.name for t in TARGETS.values() if t.compiled)
        raise BitalloyError(
            f"'{run}' is planned for {found.name}, which TensorRT for RTX does not compile for. Compile runs for "
            f"{able}; without --compile the model is run and its kernels are told."
        )
    compiler_version()  # where it is not installed, that is said first
    try:
        summary = read_summary((run / "summary.json").read_bytes())
        paths = sorted((run / "mixed").glob("*.onnx")) if (run / "mixed").is_dir() else [run / "mixed.onnx"]
        models = {ONLY if len(paths) == 1 and p.parent == run else p.stem: open_unread(p) for p in paths}
    except BitalloyError:
        raise
    except Exception as error:  # a missing or damaged file, by many types
        raise RunDirectoryError(f"'{run}' cannot be read: {error}. Give the same `bitalloy run` again.") from error
    if device:
        capability = find_device(device).capability
    else:
        planned_for = (d for d in found.devices if summary.device.startswith(f"{d.name} ("))
        capability = next((d.capability for d in planned_for), found.device.capability)  # type: ignore[union-attr]
    return compile_plan(models, units, plan.chosen, capability, summary.profiles)


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
    if device.device is not None and here:
        note = f"Executed by {runtime.name} on this CPU. This says nothing about {device.name}."
    elif device.device is not None and not here and device.native is None:
        raise BitalloyError(
            f"'{run}' is planned for {device.name}, whose engines are not run here. What its compiler makes of the "
            "plan is told with --compile; what this CPU makes of the model with --here, which says nothing about the "
            "target."
        )
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
        loaded = open_unread(model)
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
    with temporary() as folder:
        traced = trace(Artefact({ONLY: loaded}, runtime=runtime), (u.id for u in units.units)).placed(folder)
        found = _look(traced, units, plan.chosen, feeds, folder)
    return msgspec.structs.replace(found, note=note)


def _look(traced: TracedModel, units: UnitGraph, plan: Plan, feeds: Mapping[str, np.ndarray], folder: Path) -> Audit:
    """Profile a model and read the graphs that ran."""
    runtime = traced.artefact.runtime
    kernels, graphs = reconcile(traced, profile(traced, once(feeds), folder), rewritten_graphs(traced, folder))
    return audit_kernels(units, plan, kernels, runtime.name, runtime.version(), graphs=graphs)
