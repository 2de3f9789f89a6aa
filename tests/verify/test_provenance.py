"""What a shipped file says about where it comes from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from tests.conftest import classifier

import bitalloy
from bitalloy.core.schemes import Plan
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.verify.provenance import plan_hash, stamped


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, inputs: Any) -> Any:
    folder = inputs.command_line(tmp_path_factory.mktemp("provenance"))
    words = ("--data", inputs.scenes, "--eval", inputs.labels, "--size", "0.6x", "--effort", "quick")
    folder.run(inputs.detector, *words).succeeded()
    return folder


def test_a_shipped_file_tells_where_it_comes_from(run: Any, inputs: Any) -> None:
    model = onnx.load(run.folder / "run" / "mixed.onnx")
    facts = {p.key.removeprefix("bitalloy.provenance."): p.value for p in model.metadata_props}
    summary = run.summary()
    assert (facts["version"], facts["target"]) == (bitalloy.__version__, "ort-cpu")
    assert facts["model_sha256"] == hashlib.sha256(inputs.detector.read_bytes()).hexdigest()
    assert facts["data_sha256"] == summary["calibration"]["sha256"]
    plan = json.loads((run.folder / "run" / "plan.json").read_text())
    listed = sorted([c["unit"], c["scheme"]] for c in plan["choices"] if c["scheme"] != "fp32")
    assert facts["plan_sha256"] == hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    told = json.loads(facts["sqnr_db"])
    assert set(told) == set(summary["sqnr_db"])
    for head, pair in told.items():
        assert pair["measured"] == pytest.approx(summary["sqnr_db"][head]["mixed"]["measured"], abs=1e-3)
        assert pair["predicted"] == pytest.approx(summary["sqnr_db"][head]["mixed"]["predicted"], abs=1e-3)
    metrics = json.loads(facts["metrics"])
    assert metrics["AP50-95"]["float"] == pytest.approx(summary["metrics"]["AP50-95"]["float"]["value"], abs=1e-4)


def test_another_plan_has_another_hash() -> None:
    assert plan_hash(Plan({"a": "int8"})) != plan_hash(Plan({"a": "fp16"})) != plan_hash(Plan({"b": "fp16"}))


def test_no_limit_on_the_size_is_broken_by_it() -> None:
    artefact = Artefact({ONLY: ir.from_proto(classifier())})
    facts = {"bitalloy.provenance.version": "1"}
    found = stamped(artefact, facts, most=None)
    assert found.models[ONLY].metadata_props == facts and not artefact.models[ONLY].metadata_props  # type: ignore[union-attr]
    assert stamped(artefact, facts, most=artefact.size_bytes) is artefact
    assert stamped(artefact, facts, most=found.size_bytes).size_bytes == found.size_bytes
    again = stamped(found, {"bitalloy.provenance.target": "x"}, most=None)
    assert again.models[ONLY].metadata_props == {"bitalloy.provenance.target": "x"}  # type: ignore[union-attr]
