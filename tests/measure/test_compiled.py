"""What an engine says of a plan, against kernels made by hand; and in runs, where the compiler is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tests.small_programs import HEADS, WIDTH

import bitalloy
from bitalloy.core.audited import Compilation, CompiledGraph
from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.core.schemes import Plan
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.measure.compiled import compare_engine, compile_plan
from bitalloy.measure.tracing import TracedModel
from bitalloy.measure.workload import optimization_profiles, workload_of
from bitalloy.model.heads import find_heads
from bitalloy.rewrite.calibrated import plan_artefact
from bitalloy.runtime import rtx_builder, tensorrt_rtx
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.engine_text import EngineKernel, EngineTensor
from bitalloy.runtime.tensorrt_rtx import compile_engine, has_compiler, nearest_capability
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.recipe import Recipe

compiler = pytest.mark.skipif(not has_compiler(), reason="TensorRT for RTX is not installed: make compile")
SCHEMES = target("tensorrt-rtx", "sm89").schemes


def unit(name: str, kind: str) -> Unit:
    allowed = tuple(scheme.name for scheme in SCHEMES)
    return Unit(
        id=name, kind=kind, region="", core=(name,), tail=(), root=name, inner=(), weights=(), allowed=allowed, macs=0
    )


def kernel(kind: str, nodes: str, reads: str, writes: str = "float", *, inside: bool = False) -> EngineKernel:
    types = [EngineTensor(t.rstrip("."), t.endswith(".")) for t in reads.split()]
    return EngineKernel(kind, "k", tuple(nodes.split()), tuple(types), (EngineTensor(writes),), inside)


UNITS = [("a", "Conv"), ("b", "MatMul"), ("c", "MatMul"), ("d", "Softmax"), ("e", "Gemm"), ("f", "Conv"), ("g", "Conv")]
NODES = {i: (name, kind) for i, (name, kind) in enumerate(UNITS)} | {7: ("q", "QuantizeLinear")}
KERNELS = [
    kernel("function", "border~7 u0~0", "float float.", "int8"),  # fills channels of a with zeros
    kernel("corrltn", "u0~0 border~7", "int8 int8 float float"),
    kernel("function", "u0~0 u3~3 border~7", "float. half float", "int8"),
    kernel("runtime_fusion", "u1~1", "float half int4 half", "half"),
    kernel("fully_connected", "u1~1", "half half float.", "half", inside=True),
    kernel("fully_connected", "u2~2", "half half float. float.", "half"),
    kernel("runtime_fusion", "u4~4", "float half half", "half"),
    kernel("fully_connected", "u4~4", "half half float.", "half", inside=True),
    kernel("corrltn", "u5~5", "float float"),
]
PLAN = Plan({"a": "int8", "b": "w4", "c": "w4", "d": "fp16", "e": "fp16", "f": "fp8"})


def compared() -> Compilation:
    units = UnitGraph(
        target="tensorrt-rtx", model_sha256="", units=tuple(unit(*u) for u in UNITS), edges=(), schemes=SCHEMES
    )
    traced = TracedModel(Artefact({}), tuple(name for name, _ in UNITS), {}, NODES)
    found = compare_engine(units, PLAN, KERNELS, traced)
    graphs = (CompiledGraph(graph="model", seconds=1.25), CompiledGraph(graph="other", failed="refused"))
    return Compilation(compiler="C", version="1", capability=89, units=found, graphs=graphs)


def test_types_are_those_of_the_operands_of_a_units_own_kernel() -> None:
    """Behind a kernel that fills channels (a), beside INT4 (b), widened (c, f), fused (d), fused behind a float (e)."""
    found = {u.unit: u for u in compared().units}
    assert {name: u.compiled for name, u in found.items()} == {
        "a": "int8", "b": "w4", "c": "fp16", "d": "fp16", "e": "fp16", "f": "fp32", "g": "",
    }  # fmt: skip
    assert [u.unit for u in compared().differences()] == ["c", "f", "g"]
    assert "widened in every run" in found["c"].cause and "reads FP8" in found["f"].cause
    assert "does not name" in found["g"].cause and not found["d"].cause and not found["d"].weighted


def test_weighted_units_are_counted() -> None:
    told = compared().counts
    assert (told.planned, told.found, told.agree, told.differ) == (6, 5, 3, 2)
    assert told.seconds == 1.25 and told.capability == 89 and not told.built
    assert "of 6 convolutions and products 5" in compared().sentence()


def test_the_nearest_capability_is_one_that_the_compiler_knows() -> None:
    assert [nearest_capability(c) for c in (70, 75, 87, 89, 90, 100, 120, 121, 130)] == [
        75, 75, 86, 89, 89, 89, 120, 121, 121,
    ]  # fmt: skip


@pytest.mark.skipif(has_compiler(), reason="the compiler is here")
def test_absence_is_a_message_with_the_install_line(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'bitalloy\[tensorrt-rtx\]'"):
        compile_engine(tmp_path / "model.onnx", 89)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "its process ended with -6"),
        ("raise SystemExit('out of luck')", "out of luck"),
        ("import time; time.sleep(60)", "within 0.5 s"),
    ],
)
def test_a_crash_of_the_compiler_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    """A module of the builder's name that crashes, exits or hangs stands for the compiler."""
    (tmp_path / "crashing.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rtx_builder, "__name__", "crashing")
    monkeypatch.setattr(tensorrt_rtx, "compiler_version", lambda: "1")
    with pytest.raises(ModelError, match=words):
        compile_engine(tmp_path / "model.onnx", 89, limit_s=0.5 if "sleep" in program else 30)


def test_runs_for_others_are_not_compiled(inside: Any, inputs: Any) -> None:
    inside.run(inputs.classifier, "--data", inputs.images, "--effort", "quick").succeeded()
    assert "planned for ort-cpu" in inside("audit", "run", "--compile").refused()
    assert "belongs to --compile" in inside("audit", "run", "--device", "l4").refused()


@compiler
@pytest.mark.parametrize("name", ["promptable", "language"])
def test_programs_with_open_sizes_are_compiled(promptable: Path, language: Path, name: str) -> None:
    """A decoder with points, and one with a cache that may be empty: every graph is built, and none is refused."""
    shapes: dict[str, tuple[int, ...]] = {}
    if name == "language":
        shapes = {"embedding:before": (1, 2), "embedding:after": (1, 4)}
        shapes |= {"decoder:attention_mask": (1, 10), "decoder:position_ids": (1, 10)}
        shapes |= {f"decoder:past.{i}.{k}": (1, HEADS, 0, WIDTH // HEADS) for i in range(2) for k in ("key", "value")}
    graph = bitalloy.load({"promptable": promptable, "language": language}[name], shapes=shapes)
    device = target("tensorrt-rtx", "sm89")
    units = split(graph, device, find_heads(graph))
    plan = Plan.of("fp16", *(u for u in units.able("fp16") if "Unsqueeze" not in u and "Where" not in u))
    models = plan_artefact(graph, Recipe(units, device, {}), plan).models
    profiles = optimization_profiles(graph, models, workload_of(graph, None))
    found = compile_plan({n: m for n, m in models.items() if isinstance(m, ir.Model)}, units, plan, 89, profiles)
    assert [g.failed for g in found.graphs] == [""] * len(models)
    assert not found.differences() and found.counts.agree > 5
    assert not any("not self-consistent" in message for g in found.graphs for message in g.messages)
    assert isinstance(models["decoder"], ir.Model)
    (alone,) = compile_plan({"decoder": models["decoder"]}, units, plan, 89).graphs
    assert "optimization profile" in alone.failed


@compiler
def test_a_run_for_nvidia_is_compiled(inside: Any, inputs: Any) -> None:
    done = inside.run(
        inputs.classifier, "--data", inputs.images, "--target", "tensorrt-rtx", "--device", "sm89", "--effort", "quick"
    ).succeeded()
    assert "for SM89" in done.out and "read the planned types" in done.out
    folder = inside.folder / "run"
    plan = json.loads((folder / "plan.json").read_text())
    told = json.loads((folder / "summary.json").read_text())["compiled"]
    stored = json.loads((folder / "compiled.json").read_text())
    again = json.loads(inside("audit", "run", "--compile", "--json").succeeded().out)
    for found in (stored, again):
        assert {u["unit"]: u["planned"] for u in found["units"]} == {c["unit"]: c["scheme"] for c in plan["choices"]}
        weighted = [u for u in found["units"] if u["kind"] in ("Conv", "Gemm", "MatMul")]
        assert weighted and not [u for u in weighted if u["compiled"] != u["planned"]]
        assert told["planned"] == told["found"] == told["agree"] == len(weighted) and told["differ"] == 0
        assert found["capability"] == told["capability"] == 89 and found["graphs"][0]["size_bytes"] > 1000
    assert "What the compiler made of it" in (folder / "report.html").read_text()
    other = json.loads(inside("audit", "run", "--compile", "--device", "h100", "--json").succeeded().out)
    assert other["capability"] == 89 and "SM90" in other["note"]
