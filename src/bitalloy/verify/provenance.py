"""Where a shipped model comes from, as metadata of its own file.

Nothing in it depends on the clock: the same model, data, plan and measured accuracy give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from bitalloy.core.outcome import MetricComparison
from bitalloy.core.planned import Planned
from bitalloy.core.schemes import Plan
from bitalloy.core.store import versions
from bitalloy.model.heads import is_divergence
from bitalloy.model.metadata import PROVENANCE
from bitalloy.runtime.artefact import Artefact
from bitalloy.sensitivity.analysis import Analysis

DIGITS = 4
"""Decimals of values in the metadata."""


def provenance_of(analysis: Analysis, planned: Planned, metrics: Mapping[str, MetricComparison]) -> dict[str, str]:
    """Return what the file of a plan's model says about itself, by key.

    Args:
        analysis: what is known about the model.
        planned: the plan, with what was measured of it.
        metrics: task metrics of the float and the mixed model; empty where none were measured.
    """
    calibration = analysis.calibration.data
    heads = {
        head.head: {
            "predicted": round(head.predicted_db.value, DIGITS),
            "measured": None if head.measured_db is None else round(head.measured_db.value, DIGITS),
        }
        for head in planned.plan.heads
        if not is_divergence(head.head)
    }
    values = {
        name: {"float": round(one.reference.value, DIGITS), "mixed": round(one.mixed.value, DIGITS)}
        for name, one in metrics.items()
    }
    facts = {
        "version": versions()["bitalloy"],
        "target": analysis.target.name,
        "model_sha256": analysis.graph.info.sha256,
        "plan_sha256": plan_hash(planned.plan.chosen),
        "data_sha256": calibration.sha256,
        "data": f"{calibration.name}: {calibration.count} samples, seed {calibration.seed}",
        "sqnr_db": json.dumps(heads),
        **({"metrics": json.dumps(values)} if values else {}),
    }
    return {PROVENANCE + name: value for name, value in facts.items()}


def plan_hash(plan: Plan) -> str:
    """Return the SHA-256 of a plan: of its units and their schemes as JSON, by name.

    >>> plan_hash(Plan({"b": "int8", "a": "fp16"})) == plan_hash(Plan({"a": "fp16", "b": "int8"}))
    True
    """
    return hashlib.sha256(json.dumps(sorted(plan.listed)).encode()).hexdigest()


def stamped(artefact: Artefact, facts: Mapping[str, str], *, most: float | None) -> Artefact:
    """Return a model whose files say where they come from, or as it is where that exceeds a limit that it keeps.

    Args:
        artefact: the model, in memory.
        facts: what is said, by key.
        most: largest size of the files in bytes; None without a limit.
    """
    models: dict[str, ir.Model] = {}
    for name, model in artefact.models.items():
        assert isinstance(model, ir.Model), "a model that is shipped is in memory"
        models[name] = model.clone()
        before = [key for key in models[name].metadata_props if key.startswith(PROVENANCE)]
        for key in before:  # of a model that was made here before
            del models[name].metadata_props[key]
        models[name].metadata_props.update(facts)
    found = replace(artefact, models=models)
    return artefact if most is not None and found.size_bytes > most >= artefact.size_bytes else found
