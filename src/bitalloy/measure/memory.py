"""Peak resident memory of a model: that of a process which does nothing else than to open it and run it.

The process makes each step of the workload once. What it holds before a model is opened (the interpreter, numpy and the
runtime) is a number of its own, and is not subtracted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.records import Record, Workload
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.measure.workload import priced, workload_of
from bitalloy.model.weights import save
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime import resident
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.steps import Step
from bitalloy.sensitivity.analysis import Analysis

_MB = 1e6


class MemoryInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the peak memory of a model."""

    network: ExecutedNetwork
    plan: tuple[tuple[str, str], ...] | None
    """Pairs of unit and scheme; None for the float model as it was given."""
    workload: Workload | None


class ResidentMemory(Record, frozen=True, kw_only=True):
    """Resident memory in MB of a process that opens one model and makes one step of its workload."""

    peak_mb: float | None
    """None where the system does not tell, or the process failed."""
    process_mb: float | None
    """Its peak before the model was opened, with the runtime imported."""


def plan_memory(
    analysis: Analysis, plans: Mapping[str, Plan | None], work: Workspace | None = None
) -> dict[str, ResidentMemory]:
    """Measure the peak memory of the models of plans; None is the float model as it was given.

    Args:
        analysis: what is known about the model.
        plans: name -> plan.
        work: where to keep and show results.
    """
    work = work or Workspace()
    workload, steps = workload_of(analysis.graph, analysis.settings.workload), priced(analysis)

    def measure(plan: Plan | None) -> ResidentMemory:
        inputs = MemoryInputs(
            network=analysis.executed, plan=None if plan is None else tuple(plan.listed), workload=workload
        )

        def make() -> bytes:
            written = analysis.original() if plan is None else analysis.executable(analysis.artefact(plan))
            with work.scratch() as folder:
                try:
                    return to_json(resident_memory(written, steps, folder))
                except OSError as error:
                    raise RunDirectoryError(
                        f"The copy of a model in '{folder}', whose memory is measured, cannot be written: {error}. "
                        "Free space or give another --out."
                    ) from error

        return msgspec.json.decode(work.cached("memory", inputs, make), type=ResidentMemory)

    found = {}
    with work.stage("memory", len(plans)) as progress:
        for name, plan in plans.items():
            found[name] = measure(plan)
            progress.advance()
    return found


def resident_memory(artefact: Artefact, steps: Sequence[Step], folder: Path) -> ResidentMemory:
    """Measure the peak memory of a process that opens a model and makes each step once.

    Args:
        artefact: the model.
        steps: what is run.
        folder: folder for the files of the model and of what it is fed; they are not removed.
    """
    library, unknown = artefact.runtime.library, ResidentMemory(peak_mb=None, process_mb=None)
    if library not in resident.OPENERS:
        return unknown
    files = {
        name: str(save(model, folder / f"{name}.onnx")[0] if isinstance(model, ir.Model) else model)
        for name, model in artefact.models.items()
    }
    parts = [_parts(artefact, step, folder / f"step-{i}") for i, step in enumerate(steps)]
    asked = folder / "asked.json"
    asked.write_text(json.dumps({"library": library, "graphs": files, "steps": parts}))
    try:
        made = subprocess.run(
            [sys.executable, "-m", resident.__name__, str(asked)], check=True, capture_output=True, text=True
        )
        found = json.loads(made.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return unknown
    peak, before = (None if v is None else round(v / _MB, 2) for v in (found["peak"], found["before"]))
    return ResidentMemory(peak_mb=peak, process_mb=before)


def _parts(artefact: Artefact, step: Step, prefix: Path) -> list[dict[str, Any]]:
    """Say in plain data which graphs a step runs in which order, and what each reads; feeds are put into files."""
    program = artefact.program
    if program is None:
        return [_part(ONLY, step.feeds, {}, prefix)]
    if step.graph is not None:
        return [_part(step.graph, step.feeds, {}, prefix)]
    wires = {(w.target, w.input): (w.source, w.output) for w in program.wires}
    parts = []
    for graph in program.order:
        inputs = program.graphs[graph].input_names
        feeds = {i: step.feeds[program.names[graph, i]] for i in inputs if (graph, i) not in wires}
        wired = {i: wires[graph, i] for i in inputs if (graph, i) in wires}
        parts.append(_part(graph, feeds, wired, prefix.with_name(f"{prefix.name}-{graph}")))
    return parts


def _part(
    graph: str, feeds: Mapping[str, np.ndarray], wires: Mapping[str, tuple[str, str]], prefix: Path
) -> dict[str, Any]:
    path = prefix.with_name(f"{prefix.name}.npz")
    arrays: dict[str, Any] = {str(i): value for i, value in enumerate(feeds.values())}
    np.savez(path, **arrays)
    return {"graph": graph, "feeds": str(path), "names": list(feeds), "wires": wires}
