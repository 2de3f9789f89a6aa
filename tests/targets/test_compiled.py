"""Golden graphs of NVIDIA's targets, built by NVIDIA's compiler: accepted, and with the types that were planned.

The compiler is the extra `tensorrt-rtx`, which has an environment of its own: `make compile`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.targets.conftest import CASES, Rewrite

from bitalloy.core.audited import Compilation
from bitalloy.measure.compiled import compile_traced
from bitalloy.measure.tracing import trace
from bitalloy.runtime.tensorrt_rtx import has_compiler

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(not has_compiler(), reason="TensorRT for RTX is not installed: make compile"),
]
WIDENED = {
    ("tensorrt", "case1-transposed-gemm", "/t/ConvTranspose"): "fp32",
    ("tensorrt", "case8-int4", "/g/Gemm"): "fp16",
}
"""What TensorRT 10 is planned for and its relative does otherwise: the reason of cases 3 and 5 of `tensorrt-rtx`."""


def compiled(rewrite: Rewrite, name: str, case: str, folder: Path) -> Compilation:
    made = rewrite(name, case)
    assert made.target.device is not None
    traced = trace(made.artefact, (u.id for u in made.units.units))
    return compile_traced(traced, made.units, made.plan, made.target.device.capability, folder)


@pytest.mark.parametrize(
    ("device", "numbered"), [(name, case) for name in ("tensorrt", "tensorrt-rtx") for case in CASES[name]]
)
def test_golden_graph_is_compiled_as_planned(rewrite: Rewrite, tmp_path: Path, device: str, numbered: str) -> None:
    found = compiled(rewrite, device, numbered, tmp_path)
    assert [g.failed for g in found.graphs] == [""]
    for unit in (u for u in found.units if u.weighted):
        expected = WIDENED.get((device, numbered, unit.unit), unit.planned)
        assert unit.compiled == expected, unit
        assert bool(unit.cause) == (expected != unit.planned)
