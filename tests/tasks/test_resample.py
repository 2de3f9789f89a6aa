from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from bitalloy.tasks.resample import centres, resize, sample


def by_runtime(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """ONNX Runtime's own Resize."""
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"
    )
    graph = helper.make_graph(
        [node],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, maps.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [*maps.shape[:2], height, width])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": maps})[0])


@pytest.mark.parametrize("size", [(9, 14), (40, 33), (3, 5), (1, 1), (9, 40)])
def test_resize_is_that_of_onnx_runtime(size: tuple[int, int], rng: np.random.Generator) -> None:
    maps = rng.standard_normal((2, 3, 9, 14), np.float32)
    np.testing.assert_allclose(resize(maps, *size), by_runtime(maps, *size), atol=2e-5)


def test_grid_points_are_interpolated_and_the_border_is_held(rng: np.random.Generator) -> None:
    maps = rng.standard_normal((4, 6)).astype(np.float32)
    found = sample(maps, np.array([1.0, 2.25, -3.0]), np.array([4.0, 9.0, 0.5]))
    np.testing.assert_allclose(found[0, 0], maps[1, 4], rtol=1e-6)
    np.testing.assert_allclose(found[1, 1], 0.75 * maps[2, 5] + 0.25 * maps[3, 5], rtol=1e-5)
    np.testing.assert_allclose(found[2, 2], (maps[0, 0] + maps[0, 1]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(centres(2, 4), [-0.25, 0.25, 0.75, 1.25])
