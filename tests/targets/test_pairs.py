"""Kernels that add pairs of products in 16 bits: no two weights that may meet there sum to more than the limit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper
from tests.cnn import int8, with_pair_limit
from tests.definition import orders, pair_sums
from tests.micro import build

from bitalloy.model.heads import find_heads
from bitalloy.rewrite.apply import write_plan
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.recipe import Recipe

LIMITS = st.sampled_from([128, 100, 33])


def weights(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Also with channels of zeros, and with neighbours that are equal, the largest or of opposite sign."""
    elements = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1, 1, width=32), st.floats(-1e4, 1e4, width=32))
    return hnp.arrays(np.float32, shape, elements=elements)


@pytest.mark.parametrize("name", ["ort-cpu", "openvino-cpu"])
@given(convolution=weights(3, 4, 2, 2), product=weights(12, 5), rows=weights(4, 5), limit=LIMITS)
@settings(max_examples=40)
def test_no_two_neighbours_exceed_the_limit(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    convolution: np.ndarray,
    product: np.ndarray,
    rows: np.ndarray,
    limit: int,
) -> None:
    graph = build(
        tmp_path_factory.mktemp("pairs") / "pairs.onnx",
        [
            ("Conv", ["x", "convolution"], "c", {}),
            ("Flatten", ["c"], "f", {}),
            ("MatMul", ["f", "product"], "m", {}),
            ("Gemm", ["m", "rows"], "g", {"transB": 1}),
            ("Neg", ["g"], "y", {}),
        ],
        {"x": [1, 4, 3, 3]},
        ("y", [1, 4]),
        {"convolution": convolution, "product": product, "rows": rows},
    )
    device = with_pair_limit(target(name), limit)
    units = split(graph, device, find_heads(graph))
    assert {"c", "m", "g"} <= units.able("int8")
    ranges = {edge.root: (-1.0, 1.0) for edge in units.edges}
    made = write_plan(graph, Recipe(units, device, ranges), int8(("c", "m", "g"))).to_bytes()
    stored = [numpy_helper.to_array(i) for i in onnx.load_model_from_string(made).graph.initializer]
    found = {w.shape: w for w in stored if w.dtype == np.int8 and w.ndim > 1}
    for weight, axis in ((convolution, 0), (product, 1), (rows, 0)):
        for order in orders(found[weight.shape], axis):
            assert pair_sums(order).max() <= limit
