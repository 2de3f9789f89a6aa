"""Results of a run in MLflow: parameters, metrics and artefacts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from bitalloy.core.errors import BitalloyError, MissingExtraError
from bitalloy.core.outcome import Summary, Triple

LOGGED_FILES = ("mixed.onnx", "mixed.onnx.data", "report.html", "summary.json", "plan.json", "calibration.json")
"""Files of a run directory that are logged; of a program also its folder `mixed`."""
PARAMETERS = ("model", "model_sha256", "target", "device", "threads", "units", "samples", "probes", "seed")
"""Fields of the summary that are logged as parameters."""
MOST_TEXT = 500
"""Longest value of a parameter that every version of MLflow takes."""
_UNSAFE = re.compile(r"[^\w\-. /]")


def require_mlflow() -> None:
    """Tell before any work whether MLflow is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("mlflow") is None:
        raise MissingExtraError("mlflow", "mlflow", "--mlflow")


def log_run(summary: Summary, folder: Path) -> str:
    """Log a finished run to MLflow: into the run that is active there, or into a new one.

    Where the tracking server is, and the experiment, MLflow reads from its own variables, such as
    `MLFLOW_TRACKING_URI`.

    Args:
        summary: the result.
        folder: its run directory.

    Returns:
        Id of the run in MLflow.

    Raises:
        MissingExtraError: MLflow is not installed.
        BitalloyError: MLflow refuses; the results in the run directory are not touched.
    """
    require_mlflow()
    import mlflow

    try:
        active = mlflow.active_run()
        if active is not None:
            return _log(mlflow, active, summary, folder)
        with mlflow.start_run(run_name=f"{summary.model} {summary.target}") as run:
            return _log(mlflow, run, summary, folder)
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise BitalloyError(
            f"MLflow does not take the run: {error} All results are in '{folder}'; see MLFLOW_TRACKING_URI."
        ) from error


def _log(mlflow: Any, run: Any, summary: Summary, folder: Path) -> str:
    mlflow.log_params(tracked_parameters(summary))
    mlflow.log_metrics(tracked_metrics(summary))
    mlflow.set_tags({"bitalloy.status": str(summary.status.verdict), "bitalloy.headline": summary.headline})
    for name in LOGGED_FILES:
        if (folder / name).is_file():
            mlflow.log_artifact(str(folder / name))
    if (folder / "mixed").is_dir():
        mlflow.log_artifacts(str(folder / "mixed"), artifact_path="mixed")
    return str(run.info.run_id)


def tracked_parameters(summary: Summary) -> dict[str, str]:
    """Return what was asked for, and of what: fields of the summary, limits as `budget.NAME`, and versions."""
    found = {name: str(getattr(summary, name)) for name in PARAMETERS}
    budget = msgspec.to_builtins(summary.budget)
    found |= {f"budget.{name}": str(value) for name, value in budget.items() if value not in (None, {}, [], ())}
    found |= {f"version.{name}": version for name, version in summary.versions.items()}
    return {_name(name): value[:MOST_TEXT] for name, value in found.items()}


def tracked_metrics(summary: Summary) -> dict[str, float]:
    """Return what was measured, by names such as `latency_ms.mixed`, `sqnr_db.boxes` and `AP50-95.mixed`."""
    return {_name(name): float(value) for name, value in _measured(summary) if value is not None}


def _measured(summary: Summary) -> Iterator[tuple[str, float | None]]:
    yield "latency_ratio", summary.latency_ratio
    yield "predicted_latency_ratio", summary.predicted_latency_ratio
    for title, triple in (("latency_ms", summary.latency_ms), ("size_bytes", summary.size_bytes)):
        yield from _columns(title, triple)
    for head, pair in summary.sqnr_db.items():
        yield f"sqnr_db.{head}", pair.mixed.measured
        yield f"sqnr_db.{head}.predicted", pair.mixed.predicted
    for name, one in summary.metrics.items():
        yield f"{name}.float", one.reference.value
        yield f"{name}.mixed", one.mixed.value
        yield f"{name}.drop", one.lost
    for scheme, count in summary.schemes.items():
        yield f"units.{scheme}", count


def _columns(title: str, triple: Triple) -> Iterator[tuple[str, float | None]]:
    yield f"{title}.float", triple.reference
    yield f"{title}.lowest", triple.lowest
    yield f"{title}.mixed", triple.mixed


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return _UNSAFE.sub("_", text).strip("/ .") or "_"
