"""Golden graphs of NVIDIA's targets, built by NVIDIA's compiler: accepted, and with the types that were planned.

The compiler is the extra `tensorrt-rtx`, which has an environment of its own: `make compile`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from tests.targets.conftest import CASES, Rewrite

from bitalloy.core.audited import Compilation
from bitalloy.core.errors import ModelError
from bitalloy.measure.compiled import compile_plan
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.tensorrt_rtx import CAPABILITIES, compile_engine, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="TensorRT for RTX is not installed: make compile")
WIDENED = {
    ("tensorrt", "case1-transposed-gemm", "/t/ConvTranspose"): "fp32",
    ("tensorrt", "case8-int4", "/g/Gemm"): "fp16",
}
"""What TensorRT 10 is planned for and its relative does otherwise: the reason of cases 3 and 5 of `tensorrt-rtx`."""


def compiled(rewrite: Rewrite, name: str, case: str, capability: int | None = None) -> Compilation:
    made = rewrite(name, case)
    assert made.target.device is not None
    return compile_plan({ONLY: made.model}, made.units, made.plan, capability or made.target.device.capability)


@pytest.mark.parametrize(
    ("device", "numbered"), [(name, case) for name in ("tensorrt", "tensorrt-rtx") for case in CASES[name]]
)
def test_golden_graph_is_compiled_as_planned(rewrite: Rewrite, device: str, numbered: str) -> None:
    found = compiled(rewrite, device, numbered)
    assert [g.failed for g in found.graphs] == [""]
    for unit in (u for u in found.units if u.weighted):
        expected = WIDENED.get((device, numbered, unit.unit), unit.planned)
        assert unit.compiled == expected, unit
        assert bool(unit.cause) == (expected != unit.planned)


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c not in (75, 86)])
@pytest.mark.parametrize("numbered", ["case1-conv", "case1-products"])
def test_integers_are_read_on_every_gpu_that_is_offered_them(rewrite: Rewrite, numbered: str, capability: int) -> None:
    found = compiled(rewrite, "tensorrt-rtx", numbered, capability)
    assert found.capability == capability and found.counts.agree == found.counts.planned
    assert {u.compiled for u in found.units if u.weighted} == {"int8"}


@pytest.mark.parametrize(
    ("device", "numbered", "capability", "words"),
    [
        ("tensorrt", "case5-matmul-bias-gelu", 75, "check_turing_op_compatibility"),
        ("tensorrt-rtx", "case7-ada", 86, "fp8_e4m3"),
        ("tensorrt-rtx", "case5-one-block", 75, "int4"),
    ],
)
def test_what_a_gpu_is_not_offered_the_compiler_refuses(
    rewrite: Rewrite, device: str, numbered: str, capability: int, words: str
) -> None:
    (graph,) = compiled(rewrite, device, numbered, capability).graphs
    assert words in graph.failed and f"SM{capability}" in graph.failed


def test_integer_biases_are_refused_and_floats_taken(rewrite: Rewrite, tmp_path: Path) -> None:
    """Case 2 of `tensorrt-rtx`: the form that other quantizers write, which the same graph with floats is not."""
    model = rewrite("tensorrt", "case1-conv").model
    ir.save(model, tmp_path / "floats.onnx")
    assert compile_engine(tmp_path / "floats.onnx", 89).kernels
    made = onnx.load(tmp_path / "floats.onnx")
    conv = next(n for n in made.graph.node if n.op_type == "Conv" and len(n.input) == 3)
    made.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.int32), "whole"))
    made.graph.initializer.append(numpy_helper.from_array(np.full(4, 1e-3, np.float32), "steps"))
    made.graph.node.insert(0, helper.make_node("DequantizeLinear", ["whole", "steps"], ["bias"], axis=0))
    conv.input[2] = "bias"
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, tmp_path / "integers.onnx")
    with pytest.raises(ModelError, match="Int32"):
        compile_engine(tmp_path / "integers.onnx", 89)


def test_integers_are_widened_on_the_oldest_gpus(rewrite: Rewrite) -> None:
    found = compiled(rewrite, "tensorrt-rtx", "case1-conv", 75)
    assert found.counts.differ == found.counts.planned == 3 and found.counts.found == 3
    assert all("widens" in u.cause for u in found.differences())


def test_sums_are_written_in_half_the_size(rewrite: Rewrite) -> None:
    """Case 6 of `tensorrt-rtx`: the same graph with scales in float32, as `tensorrt` has it, writes float32."""
    both = {name: compiled(rewrite, name, "case1-conv", 89).graphs[0] for name in ("tensorrt", "tensorrt-rtx")}
    assert both["tensorrt"].widening == 2 and both["tensorrt-rtx"].widening == 0
    sums = compiled(rewrite, "tensorrt-rtx", "case6-sums", 89)
    assert sums.graphs[0].widening == 0 and sums.counts.agree == 3
    assert sums.graphs[0].requantizing == 3  # of x, of what leaves the first convolution, and of the pooled sums
