"""Results in MLflow: the real one where it is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.pipeline.test_check import stored
from tests.report.conftest import make_run

import bitalloy
from bitalloy.core.plans import Budget
from bitalloy.pipeline import tracking
from bitalloy.pipeline.tracking import log_run, tracked_metrics, tracked_parameters


def test_names_are_those_that_mlflow_takes() -> None:
    summary = make_run(blocks=2).summary
    odd = {"a:b\\c%": next(iter(summary.sqnr_db.values()))}
    changed = msgspec.structs.replace(summary, sqnr_db=odd, model="x" * 900, budget=Budget(latency_ratio=0.7))
    found, asked = tracked_metrics(changed), tracked_parameters(changed)
    assert all(re.fullmatch(r"[\w\-. /]+", name) for name in (*found, *asked))
    assert found["sqnr_db.a_b_c_"] == odd["a:b\\c%"].mixed.measured
    assert found["latency_ms.mixed"] == summary.latency_ms.mixed
    assert found["AP50-95.mixed"] == summary.metrics["AP50-95"].mixed.value
    assert asked["budget.latency_ratio"] == "0.7" and "budget.latency_ms" not in asked
    assert len(asked["model"]) == 500


def test_without_mlflow_it_is_said_before_any_work(inside: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    message = inside.run(inputs.classifier, "--data", inputs.images, "--mlflow").refused()
    assert "pip install 'bitalloy[mlflow]'" in message and not inside.files()


def test_a_run_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions keep files for tests alone
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    run = make_run(blocks=2)
    folder = stored(tmp_path, "run", run)
    (folder / "mixed").mkdir()
    (folder / "mixed" / "part.onnx").write_bytes(b"x")
    logged = mlflow.get_run(log_run(run.summary, folder))
    assert logged.data.params["model_sha256"] == run.summary.model_sha256
    assert logged.data.metrics["latency_ratio"] == run.summary.latency_ratio
    assert logged.data.tags["bitalloy.headline"] == run.summary.headline
    names = {file.path for file in mlflow.artifacts.list_artifacts(run_id=logged.info.run_id)}
    assert names == {"summary.json", "plan.json", "mixed"}
    with mlflow.start_run() as own:
        assert log_run(run.summary, folder) == own.info.run_id
    mlflow.set_tracking_uri("file:///proc/nowhere")
    with pytest.raises(bitalloy.BitalloyError, match="MLFLOW_TRACKING_URI"):
        log_run(run.summary, folder)
