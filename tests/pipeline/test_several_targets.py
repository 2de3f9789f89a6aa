"""`run` on several targets: one analysis, a plan and a verified model for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

import bitalloy
from bitalloy.core.errors import BitalloyError
from bitalloy.core.plans import CostTable, PlanReport
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.pipeline.audit import audit_run
from bitalloy.sensitivity.measuring import confirm
from bitalloy.targets import TARGETS

NAMES = ("ort-cpu", "tensorrt", "ort-cuda")
QUICK: dict[str, Any] = {"samples": 4, "probes": 4, "calibration_samples": 4}
FILES = {"mixed.onnx", "plan.json", "units.json", "cost.json", "summary.json", "report.html", "sensitivity.json"}


@pytest.fixture(scope="module")
def result(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("targets") / "run"
    settings = bitalloy.Settings(targets=NAMES, samples=8, probes=32, calibration_samples=8)
    size = bitalloy.Budget(size_bytes=int(0.65 * inputs.classifier.stat().st_size))
    return out, bitalloy.run(inputs.classifier, data=inputs.images, out=out, settings=settings, budget=size)


def read(folder: Path, name: str, kind: type) -> Any:
    return msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=kind)


def test_every_target_has_its_files(result: tuple[Path, Any]) -> None:
    out, verified = result
    assert [v.summary.target for v in (verified, *verified.others)] == list(NAMES)
    for name, folder in zip(NAMES, (out, out / "tensorrt", out / "ort-cuda"), strict=True):
        assert {f.name for f in folder.iterdir()} >= FILES
        plan, units = read(folder, "plan", PlanReport), read(folder, "units", UnitGraph)
        assert plan.target == units.target == name
        assert [c.unit for c in plan.choices] == [u.id for u in units.units]
        onnx.checker.check_model(onnx.load(folder / "mixed.onnx"), full_check=True)


def test_targets_have_the_schemes_that_they_are_said_to_have(result: tuple[Path, Any]) -> None:
    out, _ = result
    plans = {
        n: read(f, "plan", PlanReport) for n, f in zip(NAMES, (out, out / "tensorrt", out / "ort-cuda"), strict=True)
    }
    chosen = {name: plan.chosen for name, plan in plans.items()}
    assert not chosen["ort-cpu"].units_in("fp16") and not chosen["ort-cuda"].units_in("int8")
    assert chosen["tensorrt"] and chosen["ort-cuda"].units_in("fp16")
    stored = onnx.load(out / "ort-cuda" / "mixed.onnx").graph
    assert any(i.data_type == onnx.TensorProto.FLOAT16 for i in stored.initializer)
    assert not {n.op_type for n in stored.node} & {"QuantizeLinear", "DequantizeLinear"}
    halves = {c.unit: c.reason for c in plans["ort-cuda"].choices if c.scheme == "fp16"}
    assert all("safe in FP16: values reach" in reason for reason in halves.values())


def test_errors_are_predicted_and_measured(result: tuple[Path, Any]) -> None:
    _, verified = result
    for one in verified.others:
        for pair in one.summary.sqnr_db.values():
            assert pair.mixed.measured > 10
            assert abs(pair.mixed.measured - pair.mixed.predicted) < 4


@pytest.mark.parametrize("name", [n for n in NAMES if TARGETS[n].missing()])
def test_a_device_that_is_not_here_is_not_audited(result: tuple[Path, Any], name: str) -> None:
    folder = result[0] / name
    assert not (folder / "audit.json").exists()
    with pytest.raises(BitalloyError, match="machine with an NVIDIA GPU") as error:
        audit_run(folder)
    assert name in str(error.value) and TARGETS[name].missing() in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_fp16_on_a_cpu_is_said_to_be_executed_in_fp32(result: tuple[Path, Any], name: str) -> None:
    folder = result[0] if name == "ort-cpu" else result[0] / name
    plan, found = read(folder, "plan", PlanReport), audit_run(folder, here=True)
    assert {u.unit: u.planned for u in found.units} == {c.unit: c.scheme for c in plan.choices}
    assert found.note == (
        "" if name == "ort-cpu" else f"Executed by ONNX Runtime on this CPU. This says nothing about {name}."
    )
    halves = {u.unit: u for u in found.units if u.planned == "fp16" and u.kernels}
    half = plan.chosen.units_in("fp16")
    assert set(halves) <= half and bool(halves) == bool(half)
    cast = [u for u in halves.values() if u.executed == "fp32"]
    assert {u.kind for u in cast} >= {u.kind for u in halves.values() if u.kind in ("Conv", "Gemm")}
    assert all("no FP16 kernel" in u.cause and "Cast to FP32" in u.cause for u in cast)
    assert {u.unit for u in cast} <= {u.unit for u in found.differences()}


def test_estimates_are_called_estimates_everywhere(result: tuple[Path, Any]) -> None:
    out, verified = result
    for name, one in zip(NAMES, (verified, *verified.others), strict=True):
        folder = out if name == "ort-cpu" else out / name
        estimated = name != "ort-cpu"
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["latency_estimated"] == read(folder, "cost", CostTable).estimated == estimated
        assert (summary["latency_spread_ms"]["mixed"]["count"] == 0) == estimated
        page = (folder / "report.html").read_text()
        assert ("estimated from peak rates of NVIDIA A10" in page) == estimated
        assert ("reproduces the measured variants" in page) != estimated
        assert any("does not run on this machine" in note for note in summary["notes"]) == estimated
        if estimated:
            assert "estimated" in summary["headline"] or "NOT faster" in summary["headline"]
            assert "interleaved runs" not in page and "mixed model, measured, " not in page
            assert one.planned.cost.device in page


def test_the_first_report_compares_the_targets(result: tuple[Path, Any]) -> None:
    out, verified = result
    page = (out / "report.html").read_text()
    for other in verified.others:
        assert f'<th scope="col">{other.summary.target}</th>' in page
        assert '<section id="targets">' not in (out / other.summary.target / "report.html").read_text()


def test_the_network_is_analysed_once(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of the float network and its adjoint, counted where they happen."""
    from bitalloy.runtime.ort import OrtSession

    counts: list[int] = []

    def counted(run: Any) -> Any:
        def count(*arguments: Any) -> Any:
            counts.append(1)
            return run(*arguments)

        return count

    for name in ("run", "run_values"):
        monkeypatch.setattr(OrtSession, name, counted(getattr(OrtSession, name)))
    found = []
    for targets in (NAMES[:1], NAMES):
        counts.clear()
        model = bitalloy.load(inputs.classifier)
        data = bitalloy.open_data(model, inputs.images)
        analysis = bitalloy.analyze(model, data, bitalloy.Settings(targets=targets, **QUICK))
        confirm(analysis, 3, flagged=False, samples=2, work=Workspace())
        found.append(len(counts))
        assert [a.target.name for a in analysis.targets] == list(targets)
    assert found[0] == found[1] > 0


def test_targets_are_named_once(inputs: Any) -> None:
    model = bitalloy.load(inputs.classifier)
    data = bitalloy.open_data(model, inputs.images)
    with pytest.raises(BitalloyError, match="one or more, each once"):
        bitalloy.analyze(model, data, bitalloy.Settings(targets=("ort-cpu", "ort-cpu"), **QUICK))
    with pytest.raises(
        BitalloyError, match=r"Unknown target 'ort-gpu'. Available: ort-cpu, openvino-cpu, ort-cuda, tensorrt"
    ):
        bitalloy.analyze(model, data, bitalloy.Settings(targets=("ort-cpu", "ort-gpu"), **QUICK))
