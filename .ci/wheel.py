"""Checks an installed wheel, in an environment that has nothing else, from a folder outside of the checkout.

It reads the packaged models, and makes a whole run with its report on a network of two layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx

import bitalloy
from bitalloy import zoo
from bitalloy.core.effort import EFFORTS

WIDTH = 64


def tiny() -> onnx.ModelProto:
    """Two Gemm layers with a Relu between them."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8 for _ in range(2)]
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w0"], ["h"], name="first"),
        onnx.helper.make_node("Relu", ["h"], ["r"], name="relu"),
        onnx.helper.make_node("Gemm", ["r", "w1"], ["y"], name="second"),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, WIDTH]) for name in "xy")
    constants = [onnx.numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights)]
    graph = onnx.helper.make_graph(nodes, "tiny", [x], [y], constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def main(checkout: Path) -> None:
    """Fail with an assertion where the wheel lacks something; `checkout` is the folder that it may not read."""
    package = Path(bitalloy.__file__).parent
    assert checkout / "src" not in package.parents, f"{package} is the checkout"
    assert (package / "py.typed").is_file(), "types of the package are not found"
    for name in (*zoo.NAMES, *zoo.PROGRAMS):
        print(f"{name}: {len(bitalloy.load(name).info.outputs)} outputs")
    data = np.random.default_rng(1).standard_normal((64, WIDTH)).astype(np.float32)
    budget = bitalloy.Budget(size_bytes=20_000)
    settings = bitalloy.Settings(samples=4, probes=1, calibration_samples=8)
    options = bitalloy.RunOptions(effort=EFFORTS["quick"])
    verified = bitalloy.run(tiny(), out="run", data=data, budget=budget, settings=settings, options=options)
    assert (Path("run") / "report.html").stat().st_size > 10_000, "the report has no template"
    assert verified.summary.schemes, "nothing is lowered"
    print(verified.summary.headline)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
