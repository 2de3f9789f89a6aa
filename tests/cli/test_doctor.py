"""What `bitalloy doctor` says about this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import bitalloy
from bitalloy.cli.doctor import CORE, NOT_SHOWN, extras
from bitalloy.runtime import tensorrt_rtx


def test_doctor_tells_the_facts_of_this_machine(inside: Any) -> None:
    found = json.loads(inside("doctor", "--json").succeeded().out)
    assert found["threads"] == len(os.sched_getaffinity(0))
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    ort = next(t for t in found["targets"] if t["name"] == "ort-cpu")
    assert ort["version"] == onnxruntime.__version__ and not ort["problem"]


def test_what_is_missing_comes_with_its_install_line(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    installed = importlib.metadata.distribution

    def without_extras(name: str) -> importlib.metadata.Distribution:
        if name not in CORE:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr("importlib.metadata.distribution", without_extras)
    out = inside("doctor").succeeded().out
    assert "pip install 'bitalloy[openvino]'" in re.search(r"openvino-cpu: (.*)", out)[1]  # type: ignore[index]
    assert "lacks kornia, torch; pip install 'bitalloy[mobilesam]'" in out
    assert "installed" not in out.partition("extra ")[2]


def test_devices_that_are_not_here_have_a_reason(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(tensorrt_rtx, "PACKAGE", "absent")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    found = {t["name"]: t for t in json.loads(inside("doctor", "--json").succeeded().out)["targets"]}
    assert [name for name, t in found.items() if t["estimated"]] == ["ort-cuda", "tensorrt", "tensorrt-rtx"]
    assert "pip install 'bitalloy[tensorrt]'" in found["tensorrt"]["problem"]
    assert "pip install onnxruntime-gpu" in found["ort-cuda"]["problem"]
    assert "pip install 'bitalloy[tensorrt-rtx]'" in found["tensorrt-rtx"]["problem"]


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    expected = {
        name: {re.split("[><=]", p)[0].replace("_", "-") for p in packages} for name, packages in declared.items()
    }
    assert {name: set(packages) for name, packages in extras().items()} == {
        name: packages for name, packages in expected.items() if name not in NOT_SHOWN
    }


def test_doctor_tells_what_labels_resolve(inside: Any, inputs: Any) -> None:
    asked = ("doctor", inputs.detector, "--eval", inputs.labels, "--max-drop", "AP50-95=1e-5")
    found = json.loads(inside(*asked, "--json").succeeded().out)
    assert [(one["metric"], one["limit"]) for one in found] == [("AP50-95", 1e-5), ("AP50", None)]
    first = found[0]
    assert first["needed"] == pytest.approx(first["images"] * (first["resolved"] / 1e-5) ** 2, abs=1)
    assert first["needed"] > 100
    assert f"{first['images']} images resolve drops of AP50-95" in inside(*asked).succeeded().out
    assert bitalloy.resolve_drops(inputs.detector, inputs.labels)[0].resolved == first["resolved"]
    fewer = json.loads(inside(*asked, "--limit", "3", "--json").succeeded().out)
    assert fewer[0]["images"] == 3


def test_doctor_refuses_half_a_question(inside: Any, inputs: Any) -> None:
    assert "belong together" in inside("doctor", inputs.detector).refused()
    assert "belong together" in inside("doctor", "--eval", inputs.labels).refused()
    asked = ("doctor", inputs.detector, "--eval", inputs.labels)
    assert "'mIoU'" in inside(*asked, "--max-drop", "mIoU=0.1").refused()
