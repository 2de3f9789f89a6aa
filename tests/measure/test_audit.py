"""What `bitalloy audit` finds, against a hand-made profile and in real runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.measure.audit import audit_kernels
from bitalloy.measure.tracing import TimedKernel
from bitalloy.runtime.base import Kernel
from bitalloy.targets.ort_cpu import ORT_CPU


def unit(name: str) -> Unit:
    both = (BASELINE, "int8")
    return Unit(
        id=name, kind="Conv", region="", core=(name,), tail=(), root=name, inner=(), weights=(), allowed=both, macs=0
    )


def graph_of(names: str) -> UnitGraph:
    units = tuple(map(unit, names))
    return UnitGraph(target="ort-cpu", model_sha256="", units=units, edges=(), schemes=ORT_CPU.schemes)


def test_differences_are_found_and_explained() -> None:
    """Four units, one for each case; times counted by hand."""
    kernels = [
        TimedKernel(Kernel("1", (), "QuantizeLinear", "fp32", ()), ("a",), 50.0),
        TimedKernel(Kernel("2", (), "QLinearConv", "int8", ()), ("a",), 20.0),
        TimedKernel(Kernel("3", (), "Conv", "fp32", ()), ("b",), 20.0),
        TimedKernel(Kernel("4", (), "Concat", "int8", ()), ("c",), 10.0),
    ]
    units = graph_of("abcd")
    found = audit_kernels(units, Plan.of("int8", *"ab"), kernels, "R", "1")
    assert [u.executed for u in found.units] == ["int8", "fp32", "int8", ""]
    assert [u.unit for u in found.differences()] == ["b", "c"]
    assert ["no integer kernel" in u.cause or "made no" in u.cause for u in found.units] == [False, True, False, False]
    assert found.share_of_time == {"fp32": 0.7, "int8": 0.3}
    assert [u.us for u in found.units] == [70.0, 20.0, 10.0, 0.0]


def test_units_inside_kernels_of_others_have_their_precision_where_it_is_certain() -> None:
    """Units b to d run behind the sums of an integer kernel or in a float one; rounding does not decide."""
    kernels = [
        TimedKernel(Kernel("1", (), "QLinearConv", "int8", ()), ("a", "b", "c"), 20.0),
        TimedKernel(Kernel("2", (), "QuantizeLinear", "fp32", ()), ("b",), 1.0),
        TimedKernel(Kernel("3", (), "FusedConv", "fp32", ()), ("e", "d", "f"), 20.0),
    ]
    units = graph_of("abcdef")
    found = {u.unit: u for u in audit_kernels(units, Plan.of("int8", *"abd"), kernels, "R", "1").units}
    assert {name: u.executed for name, u in found.items()} == {
        "a": "int8", "b": "int8", "c": "", "d": "fp32", "e": "fp32", "f": "fp32",
    }  # fmt: skip
    assert found["c"].cause == "runs inside QLinearConv of 'a'"
    assert "no integer kernel" in found["d"].cause and "it runs inside FusedConv of 'e'" in found["d"].cause
    assert not found["e"].cause


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_a_run_is_audited(inside: Any, inputs: Any, target: str) -> None:
    if target == "openvino-cpu":
        pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'bitalloy[openvino]'")
    inside.run(inputs.classifier, "--data", inputs.images, "--target", target, "--max-drop-db", 5).succeeded()
    stored = json.loads((inside.folder / "run" / "audit.json").read_text())
    plan = json.loads((inside.folder / "run" / "plan.json").read_text())
    again = json.loads(inside("audit", "run", "--json").succeeded().out)
    for found in (stored, again):
        assert {u["unit"]: u["planned"] for u in found["units"]} == {c["unit"]: c["scheme"] for c in plan["choices"]}
        convolutions = [u for u in found["units"] if u["kind"] == "Conv"]
        assert convolutions and all(u["executed"] == u["planned"] for u in convolutions)
        assert sum(found["share_of_time"].values()) == pytest.approx(1, abs=1e-3)
        graphs = [{k["op"] for k in found["kernels"]}] if target == "ort-cpu" else []
        assert [{n["op"] for n in g["nodes"]} for g in found["graphs"]] == graphs
    assert "What the runtime ran" in (inside.folder / "run" / "report.html").read_text()
    text = inside("audit", "run").succeeded().out
    assert "ran as planned" in text and ("nodes of 'model' became" in text) == (target == "ort-cpu")


def test_a_folder_without_a_run_is_refused(inside: Any) -> None:
    assert "finished `bitalloy run`" in inside("audit", "nothing").refused()
