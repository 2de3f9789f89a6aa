"""Schemes that cannot be had: each message says what came, why not, and what to do instead, before long work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.conftest import Inside

import bitalloy
from bitalloy.pipeline.sensitivity import sensitivity


@pytest.fixture
def arguments(inside: Inside) -> Sequence[str | Path]:
    """`run` of a model with a convolution, products with 100, 96 and 64 rows, and a table that two nodes read."""
    body = """(float[1,4,10,10] x, int64[8] i) => (float[1,10,12] y, float[8,128] z) {
        c = Conv<pads=[1,1,1,1]>(x, k)  f = Reshape(c, shape)  a = MatMul(f, w1)  b = Relu(a)  d = MatMul(b, w2)
        e = Relu(d)  y = MatMul(e, w3)  g = Gather(table, i)  h = Tanh(g)  z = Gemm<transB=1>(h, table) }"""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> small {body}')
    random = np.random.default_rng(0)
    shapes = {"k": (10, 4, 3, 3), "w1": (100, 96), "w2": (96, 64), "w3": (64, 12), "table": (128, 64)}
    constants = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    constants["shape"] = np.array([1, 10, 100])
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for node in model.graph.node:
        node.name = f"/{node.output[0]}"
    onnx.save(model, inside.folder / "small.onnx")
    feeds = {"x": random.standard_normal((8, 1, 4, 10, 10)).astype(np.float32), "i": random.integers(0, 99, (8, 8))}
    np.savez(inside.folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
    return ["run", "small.onnx", "--data", "feeds.npz", "--out", "out"]


OPENVINO = ("--target", "openvino-cpu")
CASES = {
    "no scheme of any target": (("--schemes", "int3"), ["'int3'", "ort-cpu", "Choose among", "w16", "int8-dynamic"]),
    "a scheme of other targets": (
        ("--schemes", "fp16"),
        ["'fp16'", "no scheme of ort-cpu", "--target ort-cuda or tensorrt or tensorrt-rtx for fp16"],
    ),
    "the same by pattern": (("--keep", "fp16:/c"), ["'/c' cannot", "ort-cpu has no FP16", "FP32 or INT8", "--target"]),
    "not asked for": (("--keep", "w4:/a"), ["do not use unless --schemes names it", "--schemes int8-dynamic,int8,w4"]),
    "not for a convolution": (
        ("--keep", "w4:/c"),
        ["'/c' cannot", "products with a constant matrix", "not Conv", "FP32 or INT8", "can run: '/a', '/d', '/g'"],
    ),
    "tables alone": (
        ("--schemes", "w16,int8", "--keep", "w16:/a"),
        ["tables that a Gather looks up alone, and MatMul multiplies", "In W16 can run: '/g'"],
    ),
    "no block divides": (
        (*OPENVINO, "--schemes", "w4,w4-128", "--keep", "w4:/a"),
        ["32 does not divide 100", "nor does any other size", "ort-cpu takes a shorter last block", "'/d'"],
    ),
    "another block divides": (
        (*OPENVINO, "--schemes", "w4,w4-128", "--keep", "w4-128:/d"),
        ["128 does not divide 96", "W8 has blocks of 32, which do", "W4 has blocks of 32"],
    ),
    "a row of a table": (
        (*OPENVINO, "--schemes", "w4-128", "--keep", "w4-128:/g"),
        ["divide the row", "128 does not divide 64", "W4 has blocks of 32"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_message_says_what_can_be_done(inside: Inside, arguments: Sequence[str | Path], case: str) -> None:
    options, parts = CASES[case]
    message = inside(*arguments, *options).refused()
    assert all(part in message for part in parts), message
    assert not (inside.folder / "out" / "summary.json").exists()


def test_a_name_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    for stage in (bitalloy.run, sensitivity):
        with pytest.raises(bitalloy.BitalloyError, match="'int3', which is no scheme of ort-cpu"):
            stage(tmp_path / "nowhere.onnx", out=tmp_path / "out", settings=bitalloy.Settings(schemes=("int3",)))
    assert not (tmp_path / "out").exists()
