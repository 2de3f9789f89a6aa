"""Large models: weights stay in the user's file, and nothing but their integers is copied.

Most tests lower the size from which a model counts as large; two use files that really are (sparse ones, so that they
take no room on the disk).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitalloy.adjoint.engine import build
from bitalloy.adjoint.rules import RULES
from bitalloy.calibrate.streaming import collect
from bitalloy.core.errors import ModelError
from bitalloy.core.schemes import Plan
from bitalloy.model import weights
from bitalloy.model.graphs.joining import join
from bitalloy.model.graphs.wiring import GraphProgram, Wire
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.read import constant
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.divide import divide
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.columns import columns
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
Array = np.ndarray[Any, Any]
node = helper.make_node
SIZE = 160
"""Side of a weight: 102400 bytes, more than what stays inside a message."""


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def network() -> onnx.ModelProto:
    """MatMul, Gemm both ways round, a product of activations, a convolution."""
    constants = {f"w{i}": normal(SIZE, SIZE, seed=i, scale=SIZE**-0.5) for i in range(4)}
    constants |= {
        "b": normal(SIZE, seed=7),
        "k": normal(96, 32, 3, 3, seed=8, scale=0.06),
        "square": np.array([1, 32, 2, 10]),
    }
    nodes = [
        node("MatMul", ["x", "w0"], ["a"], name="a/MatMul"),
        node("Gemm", ["a", "w1", "b"], ["g"], name="g/Gemm"),
        node("Sigmoid", ["g"], ["s"], name="g/Sigmoid"),
        node("Mul", ["g", "s"], ["m"], name="g/Mul"),
        node("Gemm", ["m", "w2"], ["h"], name="h/Gemm", transB=1),
        node("Add", ["h", "a"], ["r"], name="r/Add"),
        node("MatMul", ["r", "w3"], ["y"], name="y/MatMul"),
        node("Reshape", ["r", "square"], ["q"], name="k/Reshape"),
        node("Conv", ["q", "k"], ["z"], name="k/Conv", pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, SIZE])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * r) for n, r in (("y", 2), ("z", 4))],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save_model(network(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Graph:
    return load_graph(stored(tmp_path))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Graph) -> Graph:
    """The same network, treated as one whose weights must not be copied."""
    from bitalloy.model import load as graph

    monkeypatch.setattr(weights, "LARGE_BYTES", 1)
    monkeypatch.setattr(graph, "LARGE_BYTES", 1)
    return load_graph(tmp_path / "model.onnx")


def inputs(count: int = 2) -> list[dict[str, Array]]:
    return [{"x": normal(4, SIZE, seed=50 + i)} for i in range(count)]


def ranges_of(graph: Graph) -> dict[str, tuple[float, float]]:
    units = split(graph, ORT_CPU, find_heads(graph), schemes=["int8"])
    tensors = {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
    return collect(graph.model, [t for t in graph.value if t in tensors], inputs()).ranges("minmax")


def reference(path: Path, feeds: dict[str, Array]) -> list[Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, feeds)]


# --- one copy of the weights -------------------------------------------------------------------------------------


def test_weights_are_views_of_the_file(large: Graph, small: Graph) -> None:
    assert large.large
    for name in ("w0", "w1", "w2", "w3", "k"):
        array = constant(large.value[name])
        assert array is not None and not array.flags.writeable
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
        np.testing.assert_array_equal(array, constant(small.value[name]))
    assert large.info == small.info


def test_identity_covers_the_weights(large: Graph) -> None:
    path = large.source
    content = path.read_bytes() + (path.parent / "model.onnx.data").read_bytes()
    assert large.info.sha256 == hashlib.sha256(content).hexdigest()
    assert large.info.size_bytes == len(content)


def test_sessions_borrow_them(large: Graph) -> None:
    packed = weights.pack(large.model)
    assert set(packed.weights) == {"w0", "w1", "w2", "w3", "k"}
    assert len(packed.data) < 16_000
    for name, array in packed.weights.items():
        assert np.shares_memory(array, constant(large.value[name]))
    session = OrtSession(large.model)
    assert session.input_names == ("x",)
    feeds = inputs(1)[0]
    for expected, found in zip(reference(large.source, feeds), session.run(feeds).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    by_value = session.run_values({"x": ort.OrtValue.ortvalue_from_numpy(feeds["x"])}, ["y"])["y"].numpy()
    np.testing.assert_array_equal(by_value, session.run(feeds)["y"])


def test_the_reverse_pass_borrows_them_too(large: Graph) -> None:
    """No transposed copy of a matrix, whichever way round it is stored."""
    heads, units = find_heads(large), split(large, ORT_CPU, find_heads(large), schemes=["int8"])
    taps = [c.tap(c.site) for c in columns(large, Recipe(units, ORT_CPU, ranges_of(large)))]
    adjoint = build(large, {h.name: h.tensor for h in heads}, taps, RULES)
    own = [constant(large.value[name]) for name in ("w0", "w1", "w2", "w3", "k")]
    floats = [w for m in (adjoint.primal, *(h.model for h in adjoint.heads)) for w in m.weights.values()]
    floats = [w for w in floats if w.dtype == np.float32 and w.ndim == 2]
    assert len(floats) >= 8  # forward and back
    assert all(any(np.shares_memory(w, o) for o in own) for w in floats)
    assert max(len(m.data) for m in (adjoint.primal, *(h.model for h in adjoint.heads))) < 300_000


def test_same_measurement_as_with_copies(large: Graph, small: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for graph, limit in ((large, 1), (small, 1 << 40)):
        monkeypatch.setattr(weights, "LARGE_BYTES", limit)
        assert Graph(graph.info, graph.model, graph.source).large == (limit == 1)
        units = split(graph, ORT_CPU, find_heads(graph), schemes=["int8"])
        prober = Prober(graph, find_heads(graph), [Recipe(units, ORT_CPU, ranges_of(graph))])
        board = Switchboard(graph, Recipe(units, ORT_CPU, ranges_of(graph)))
        gates = board.gates(rounded(units, units.lowest()))
        found.append((prober.measure(inputs(1)[0], sample=0, probes=3, seed=0), board.run(inputs(1)[0], gates)))
    (rows, outputs), (expected, wanted) = found
    assert rows.sites == expected.sites
    assert any("w0" in s for s in rows.sites)
    for a, b in zip(rows.rows, expected.rows, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    for name, value in wanted.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-3, atol=0.02 * np.abs(value).max())


def test_rounded_weights_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity times a weight is the weight: what the switchboard adds must be its rounding error to the bit."""
    w = normal(SIZE, SIZE, seed=3)
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["h"], name="MatMul"), node("Neg", ["h"], ["y"], name="Neg")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIZE, SIZE])],
        [numpy_helper.from_array(w, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    model = load_graph(tmp_path / "m.onnx")
    units = split(model, ORT_CPU, find_heads(model), schemes=["int8"])
    (site,) = (s for u in units.units for s in u.weights)
    recipe = Recipe(units, ORT_CPU, {"x": (0.0, 1.0), "h": (-5.0, 5.0)})
    delta = recipe.weight("int8", model.node["MatMul"], site).rounded - w
    assert np.abs(delta).max() > 0
    found = []
    for limit in (1, 1 << 40):
        monkeypatch.setattr(weights, "LARGE_BYTES", limit)
        fresh = Graph(model.info, model.model, model.source)
        board = Switchboard(fresh, recipe)
        found.append(board.run({"x": np.eye(SIZE, dtype=np.float32)}, board.gates([f"{site.id} in int8"]))["y"])
    for y in found:
        np.testing.assert_array_equal(-y, w + delta)


def test_calibration_sees_the_same(large: Graph, small: Graph) -> None:
    tensors = ["x", "a", "g", "s", "m", "h", "r"]
    shared, copied = collect(large.model, tensors, inputs()), collect(small.to_bytes(), tensors, inputs())
    assert shared.tensors == copied.tensors
    np.testing.assert_allclose(shared.low, copied.low, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shared.high, copied.high, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="'x' has NaN or infinite values in sample 0"):
        collect(large.model, tensors, [{"x": np.full((4, SIZE), np.inf, np.float32)}])


def test_half_precision_weights_are_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitalloy.model import load as graph

    w = normal(SIZE, 2 * SIZE).astype(np.float16)
    body = helper.make_graph(
        [node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT), node("MatMul", ["x", "wide"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2 * SIZE])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    monkeypatch.setattr(weights, "LARGE_BYTES", 1)
    monkeypatch.setattr(graph, "LARGE_BYTES", 1)
    net = load_graph(tmp_path / "m.onnx")
    np.testing.assert_array_equal(constant(net.nodes[-1].inputs[1]), w.astype(np.float32))
    assert [n.op_type for n in net.nodes] == ["MatMul"]


def test_programs_share_them(large: Graph) -> None:
    program = GraphProgram({"first": large, "second": large}, (Wire("first", "y", "second", "x"),))
    whole = join(program)
    parts = divide(whole.model, program)
    for graph, name in ((whole.model, "second/w0"), (parts["first"], "w0")):
        array = constant(graph.graph.initializers[name])
        assert np.shares_memory(array, constant(large.value["w0"]))
    feeds = inputs(1)[0]
    y = OrtSession(large.model).run(feeds)["y"]
    expected = OrtSession(large.model).run({"x": y})["y"]
    np.testing.assert_array_equal(OrtSession(whole.model).run(feeds)["y"], expected)


# --- files -------------------------------------------------------------------------------------------------------


def test_saved_with_its_weights_beside_it(large: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MESSAGE_BYTES", 100_000)
    units = split(large, ORT_CPU, find_heads(large), schemes=["int8"])
    mixed = write_plan(large, Recipe(units, ORT_CPU, ranges_of(large)), Plan.of("int8", "a/MatMul"))
    with pytest.raises(ModelError, match=r"does not fit one ONNX message of 2 GB. Write it with `save`"):
        mixed.to_bytes()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mixed.onnx").write_bytes(b"an older model")
    files = mixed.save(folder / "mixed.onnx")
    assert (
        sorted(f.name for f in folder.iterdir()) == ["mixed.onnx", "mixed.onnx.data"] == sorted(f.name for f in files)
    )
    onnx.checker.check_model(str(files[0]), full_check=True)
    feeds = inputs(1)[0]
    monkeypatch.setattr(weights, "MESSAGE_BYTES", 1 << 31)
    (tmp_path / "whole.onnx").write_bytes(mixed.to_bytes())
    for expected, found in zip(reference(tmp_path / "whole.onnx", feeds), reference(files[0], feeds), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert "INT8" in {TensorProto.DataType.Name(t.data_type) for t in onnx.load(files[0]).graph.initializer}
    mixed.save(files[0])
    assert [f.name for f in folder.iterdir()] == ["mixed.onnx"]


def test_saving_over_the_file_that_is_mapped(large: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MESSAGE_BYTES", 100_000)
    feeds = inputs(1)[0]
    before = reference(large.source, feeds)
    weights.save(large.model, large.source)
    assert [n.op_type for n in load_graph(large.source).nodes] == [n.op_type for n in large.nodes]
    for a, b in zip(before, reference(large.source, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_left_where_saving_fails(large: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MESSAGE_BYTES", 100_000)
    target = tmp_path / "out"
    target.mkdir()
    (target / "mixed.onnx").mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError, match=r"mixed\.onnx"):
        weights.save(large.model, target / "mixed.onnx")
    assert [f.name for f in target.iterdir()] == ["mixed.onnx"]


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "1000000000"), ("length", "8"), ("offset", str(5 * SIZE * SIZE * 4))]
)
def test_a_file_that_does_not_hold_a_weight(large: Graph, key: str, value: str) -> None:
    model = onnx.load(large.source, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "w2")
    next(e for e in tensor.external_data if e.key == key).value = value
    large.source.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"Weight 'w2' has 102400 bytes, but 'model.onnx.data' of \d+ bytes does not"):
        load_graph(large.source)


def test_an_empty_file_of_weights(large: Graph) -> None:
    (large.source.parent / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ModelError, match=r"'model.onnx.data' of 0 bytes does not|external data .* cannot be read"):
        load_graph(large.source)


def test_weights_at_odd_places(large: Graph) -> None:
    """ONNX asks for no alignment."""
    data = large.source.parent / "model.onnx.data"
    data.write_bytes(b"\0" + data.read_bytes())
    model = onnx.load(large.source, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + 1)
    large.source.write_bytes(model.SerializeToString())
    again = load_graph(large.source)
    for tensor in network().graph.initializer:
        if tensor.name in ("w0", "k"):
            np.testing.assert_array_equal(constant(again.value[tensor.name]), numpy_helper.to_array(tensor))


def test_external_data_outside_of_the_folder(large: Graph, tmp_path: Path) -> None:
    model = onnx.load(large.source, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "../model.onnx.data"
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="leads outside of"):
        load_graph(inside / "model.onnx")


def test_a_damaged_large_model(large: Graph) -> None:
    model = onnx.load(large.source, load_external_data=False)
    model.graph.node[0].input[0] = "nowhere"
    large.source.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="is not valid ONNX"):
        load_graph(large.source)


# --- models that really are large --------------------------------------------------------------------------------


def sparse(folder: Path, side: int, count: int) -> Path:
    """A chain of `count` square MatMuls by a weight that is zero but for a shifted diagonal in the first rows.

    All of them lie at the same place of one file: it is read in no time, and every copy in memory would be whole.
    """
    data = folder / "weights.bin"
    with data.open("wb") as file:
        file.truncate(side * side * 4)
    array = np.memmap(data, np.float32, "r+", shape=(side, side))
    array[np.arange(8), (np.arange(8) + 1) % 8] = np.arange(1, 9)
    array.flush()
    tensors = []
    for i in range(count):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[side, side])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data.name), ("offset", 0), ("length", side * side * 4)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"MatMul{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [2, side]) for i in (0, count)]
    graph = helper.make_graph([*nodes, node("Neg", [f"x{count}"], ["y"])], "g", ends[:1], [], tensors)
    graph.output.add(name="y").type.tensor_type.elem_type = TensorProto.FLOAT
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def report(code: str, path: Path) -> Any:
    """Run code in a process of its own; it prints JSON last."""
    code = textwrap.dedent(code).replace("PATH", repr(str(path)))
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PRELUDE = """
import json
from pathlib import Path
import numpy as np
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
"""
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@on_linux
def test_more_than_one_message_holds(tmp_path: Path) -> None:
    side, count = 13400, 3
    path = sparse(tmp_path, side, count)
    code = """
    from bitalloy.core.errors import ModelError
    from bitalloy.model.load import load_graph as load
    from bitalloy.runtime.ort import OrtSession
    graph = load(PATH)
    x = np.zeros((2, 13400), np.float32)
    x[0, 0], x[1, 5] = 1, 2
    y = OrtSession(graph.model).run({"x0": x})["y"]
    try:
        graph.to_bytes()
    except ModelError as error:
        said = str(error)
    print(json.dumps({"parameters": graph.info.parameters, "said": said,
        "anonymous": anonymous(), "where": y.nonzero()[1].tolist(), "what": y[y != 0].tolist()}))
    """
    found = report(code, path)
    assert found["parameters"] == count * side * side > 2**29
    assert "2.2 GB of weights does not fit one ONNX message" in found["said"]
    # a unit at position p moves to p + 1 in each of the three steps, and is multiplied by p + 1
    assert found["where"] == [3, 0] and found["what"] == [-1.0 * 2 * 3, -2.0 * 6 * 7 * 8]
    assert found["anonymous"] < 400e6


@on_linux
def test_a_probe_keeps_one_copy_and_the_integers(tmp_path: Path) -> None:
    """Forward and reverse sessions at once, on 164 MB of weights."""
    side, count = 1600, 16
    path = sparse(tmp_path, side, count)
    code = """
    from bitalloy.model import load as graphs, weights
    from bitalloy.model.heads import find_heads
    from bitalloy.model.load import load_graph as load
    from bitalloy.sensitivity.probe import Prober
    from bitalloy.targets.ort_cpu import ORT_CPU
    from bitalloy.targets.recipe import Recipe
    from bitalloy.targets.base import split
    from bitalloy.targets.ort_cpu import ORT_CPU
    from bitalloy.targets.recipe import Recipe
    graphs.LARGE_BYTES = weights.LARGE_BYTES = 1 << 20
    graph = load(PATH)
    units = split(graph, ORT_CPU, find_heads(graph), schemes=["int8"])
    ranges = {str(v): (-4.0, 4.0) for v in graph.value}
    before = anonymous()
    prober = Prober(graph, find_heads(graph), [Recipe(units, ORT_CPU, ranges)])
    rows = prober.measure({"x0": np.eye(2, 1600, dtype=np.float32)}, sample=0, probes=2, seed=0)
    print(json.dumps({"grown": anonymous() - before, "large": graph.large, "sites": len(rows.sites)}))
    """
    found = report(code, path)
    weight = count * side * side * 4
    assert found["large"] and found["sites"] >= 2 * count
    # int8 copies take a quarter; the errors of one or two weights live while they are used
    assert found["grown"] < 0.25 * weight + 80e6


# --- an empty cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [0, 3])
def test_an_empty_operand_is_dropped(tmp_path: Path, past: int) -> None:
    nodes = [
        node("Concat", ["past", "k"], ["present"], name="Concat", axis=2),
        node("Concat", ["past", "past", "k", "k"], ["both"], name="Concat2", axis=2),
        node("Concat", ["past", "past"], ["nothing"], name="Concat3", axis=2),
        node("Concat", ["nothing", "present"], ["again"], name="Concat4", axis=2),
        node("Transpose", ["again"], ["t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["both", "t"], ["y"]),
    ]
    shapes: dict[str, list[Any]] = {"past": [1, 2, "p", 4], "k": [1, 2, "s", 4]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in ("y", "present")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    net = load_graph(path, shapes={"past": (1, 2, past, 4), "k": (1, 2, 5, 4)})
    assert net.info.inputs[0].shape == (1, 2, past, 4)
    feeds = {"past": normal(1, 2, past, 4), "k": normal(1, 2, 5, 4)}
    found = OrtSession(net.model).run(feeds)
    for name, value in zip(("y", "present"), reference(path, feeds), strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    if past == 0:
        assert sorted(n.op_type for n in net.nodes if n.op_type in ("Concat", "Identity")) == ["Concat", "Identity"]


# --- the reference decoder ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("reference_llama", ROOT / "reference" / "llama.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def decoder_feeds(llama: ModuleType, tokens: int, past: int = 0) -> dict[str, Array]:
    feeds = {n: normal(*s, seed=i) for i, (n, s) in enumerate(llama.shapes(llama.SIZES["tiny"], tokens, past).items())}
    feeds["attention_mask"] = np.ones((1, past + tokens), np.int64)
    feeds["position_ids"] = np.arange(past, past + tokens)[None]
    return feeds


@pytest.fixture(scope="module")
def decoder(llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("llama") / "decoder.onnx"
    with pytest.warns(DeprecationWarning):
        llama.export(llama.random_decoder(llama.SIZES["tiny"]), path)
    yield path


def test_a_cache_changes_nothing(llama: ModuleType, decoder: Path) -> None:
    """Seven tokens at once, or four, two and one behind a growing cache."""
    session = ort.InferenceSession(decoder, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    whole = decoder_feeds(llama, 7)
    expected = dict(zip(names, session.run(None, whole), strict=True))
    cache = {n: v for n, v in whole.items() if n.startswith("past")}
    parts, start = [], 0
    for count in (4, 2, 1):
        feeds = {
            "inputs_embeds": whole["inputs_embeds"][:, start : start + count],
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.arange(start, start + count)[None],
            **cache,
        }
        found = dict(zip(names, session.run(None, feeds), strict=True))
        parts.append(found["logits"])
        cache = {n: found[n.replace("past", "present")] for n in cache}
        start += count
    np.testing.assert_allclose(np.concatenate(parts, 1), expected["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache["past.1.key"], expected["present.1.key"], rtol=1e-4, atol=1e-5)


def test_equals_the_transformers_library(llama: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    size = llama.SIZES["tiny"]
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        rms_norm_eps=size.epsilon,
        tie_word_embeddings=False,
    )
    original = transformers.LlamaForCausalLM(config).eval()
    model = llama.Decoder(size).eval()
    model.load_state_dict(llama.checkpoint_keys(original.state_dict()))
    feeds = {n: torch.from_numpy(v) for n, v in decoder_feeds(llama, 9).items()}
    with torch.no_grad():
        expected = original(inputs_embeds=feeds["inputs_embeds"]).logits
        found = model(*feeds.values())[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_is_analysed_with_an_empty_cache(llama: ModuleType, decoder: Path) -> None:
    """Prediction beside exact measurement, for one unit alone."""
    net = load_graph(decoder, shapes=llama.shapes(llama.SIZES["tiny"], 6))
    feeds = decoder_feeds(llama, 6)
    exact = dict(zip(net.output_names, reference(decoder, feeds), strict=True))
    np.testing.assert_allclose(OrtSession(net.model).run(feeds)["logits"], exact["logits"], rtol=1e-4, atol=1e-5)
    heads = find_heads(net)[:1]
    units = split(net, ORT_CPU, heads, schemes=["int8"])
    tensors = {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
    ranges = collect(net.model, [t for t in net.value if t in tensors], [feeds]).ranges("minmax")
    matrix = Prober(net, heads, [Recipe(units, ORT_CPU, ranges)]).measure(feeds, sample=0, probes=64, seed=0)
    board = Switchboard(net, Recipe(units, ORT_CPU, ranges))
    unit = "/layers.0/mlp/down_proj/MatMul"
    site = next(f"{w.id} in int8" for u in units.units if u.id == unit for w in u.weights)
    found = board.run(feeds, board.gates([site]))["logits"]
    measured = float(np.square(found - exact["logits"]).sum())
    predicted = float(np.square(matrix.rows[0][0, :, matrix.sites.index(site)]).mean())
    assert measured > 0
    assert 0.6 < predicted / measured < 1.6
