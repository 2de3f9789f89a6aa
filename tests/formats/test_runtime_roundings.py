"""Roundings that kernels make at run time: what is written, what numpy says, and what the kernels really do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from tests.formats.test_formats import Sheet, assert_same_bits

from bitalloy.core.errors import BitalloyError
from bitalloy.formats import ROUNDINGS, find_rounding
from bitalloy.formats.base import Rounding
from bitalloy.runtime.ort import OrtSession

numbers = st.one_of(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), st.just(0.0))


def written(rounding: Rounding, x: np.ndarray, opset: int) -> np.ndarray:
    sheet = Sheet(opset)
    return sheet.run(rounding.write(sheet, sheet.tensor(x.shape), None), x.shape, x=x)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("name", ROUNDINGS)
@settings(max_examples=8)
@given(x=hnp.arrays(np.float32, st.sampled_from([(70,), (3, 32), (2, 5, 50)]), elements=numbers))
def test_what_is_written_is_what_the_reference_says(name: str, opset: int, x: np.ndarray) -> None:
    """Also rows of zeros, and sizes that leave a part of a block."""
    rounding = find_rounding(name)
    assert_same_bits(written(rounding, x, opset), rounding.reference(x, None))


@settings(max_examples=60)
@given(x=hnp.arrays(np.float32, (4, 33), elements=numbers))
def test_a_whole_tensor_is_rounded_as_the_operator_does(x: np.ndarray) -> None:
    """DynamicQuantizeLinear of ONNX Runtime, dequantized."""
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = OrtSession(model.SerializeToString(), optimize=False, threads=1).run({"x": x})["y"]
    assert_same_bits(found, find_rounding("uint8-dynamic").reference(x, None))


@pytest.mark.parametrize("size", [64, 200])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_blocks_are_rounded_as_the_kernel_does(block: int, size: int) -> None:
    """MatMulNBits with accuracy level 4 and weights that are exact in 8 bits: what is left is its rounding of x."""
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((1, 5, size)) * np.exp(generator.standard_normal(size))).astype(np.float32)
    count = -(-size // block)
    q = generator.integers(1, 255, (24, count, block)).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "q", "s"],
        ["y"],
        domain="com.microsoft",
        K=size,
        N=24,
        bits=8,
        block_size=block,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5, 24))],
        [numpy_helper.from_array(q, "q"), numpy_helper.from_array(np.full(24 * count, 0.01, np.float32), "s")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    found = OrtSession(model.SerializeToString()).run({"x": x})["y"].astype(np.float64)
    weight = (q.reshape(24, -1)[:, :size].T.astype(np.float64) - 128) * 0.01
    rounded = find_rounding(f"int8-block{block}").reference(x, None).astype(np.float64) @ weight
    assert np.abs(found - rounded).max() < 2e-5 * np.abs(rounded).max()
    assert np.abs(found - x @ weight).max() > 1e-3 * np.abs(rounded).max()


def test_an_error_is_at_most_half_a_step_of_its_block() -> None:
    x = np.random.default_rng(1).standard_normal((6, 100)).astype(np.float32)
    found = find_rounding("int8-block32").reference(x, None)
    top = np.maximum.reduceat(np.abs(x), np.arange(0, 100, 32), axis=1)
    step = np.repeat(top / 127, 32, axis=1)[:, :100]
    assert (np.abs(found - x) <= step * 0.5001).all()


def test_unknown() -> None:
    with pytest.raises(BitalloyError, match="Unknown format 'int8-block7'"):
        find_rounding("int8-block7")
