"""That OpenVINO runs what `openvino_cpu` promises: read from its execution graph, in real executions."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bitalloy
from bitalloy.core.errors import ModelError
from bitalloy.core.schemes import Plan
from bitalloy.measure.audit import audit_kernels
from bitalloy.measure.tracing import profile, trace
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.model.weights import to_bytes
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.calibrated import original_artefact
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.machine import this_machine
from bitalloy.runtime.openvino import OPENVINO, OpenVinoSession
from bitalloy.runtime.ort import ORT, OrtSession
from bitalloy.runtime.steps import once
from bitalloy.targets.base import split
from bitalloy.targets.openvino_cpu import OPENVINO_CPU
from bitalloy.targets.recipe import Recipe

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'bitalloy[openvino]'")

KERNELS = {
    "case1-conv": {"/c/Conv": ("Convolution", "int8"), "/d/Conv": ("Convolution", "int8")},
    "case2-products": {"/m/MatMul": ("FullyConnected", "int8"), "/y/MatMul": ("FullyConnected", "int8")},
    "case2-gemm": {"/g/Gemm": ("FullyConnected", "int8"), "/y/Gemm": ("FullyConnected", "int8")},
    "case2-matrices": {"/m/MatMul": ("FullyConnected", "int8"), "/y/MatMul": ("MatMul", "fp32")},
    "case3-concat": {"/a/Conv": ("Convolution", "int8"), "/k/Concat": ("Convolution", "int8")},
    "case4-concat-rows": {"/a/MatMul": ("FullyConnected", "int8"), "/y/MatMul": ("FullyConnected", "fp32")},
    "case5-followers": {"/c/Conv": ("Convolution", "int8"), "/y/Conv": ("Convolution", "int8")},
    "case6-activations": {"/m/MatMul": ("FullyConnected", "int8"), "/y/MatMul": ("MatMul", "fp32")},
    "case7-stored-products": {"/m/MatMul": ("FullyConnected", "u4"), "/g/Gemm": ("FullyConnected", "int8")},
    "case11-tables": {"/a/Gather": ("Gather", "fp32"), "/b/Gather": ("Gather", "int8")},
    "case8-transposed": {"/t/ConvTranspose": ("Deconvolution", "int8"), "/y/ConvTranspose": ("Deconvolution", "fp32")},
    "case8-float": {"/t/ConvTranspose": ("Deconvolution", "fp32"), "/y/Conv": ("Convolution", "int8")},
}
"""case -> unit -> (kernel that does its work, what it reads)."""


def test_a_file_whose_branch_hides_a_rank(tmp_path: Path) -> None:
    """The float model of such a file is its normal form, as OpenVINO does not take it; its rate has no axes."""

    def branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(
            list(nodes),
            "branch",
            [],
            [helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)],
        )

    weight = np.random.default_rng(0).standard_normal((4, 3, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Equal", ["rate", "fast"], ["c"]),
        helper.make_node(
            "If", ["c"], ["b"],
            then_branch=branch(helper.make_node("Squeeze", ["x", "last"], ["t"])),
            else_branch=branch(helper.make_node("Identity", ["x"], ["e"])),
        ),
        helper.make_node("Conv", ["b", "w"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 1]),
            helper.make_tensor_value_info("rate", onnx.TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.array([3]), "last"),
            numpy_helper.from_array(np.array(16000), "fast"),
        ],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(ModelError, match="rank"):
        OPENVINO.open(path)
    net = load_graph(path, fixed={"rate": 16000})
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 1)).astype(np.float32), "rate": np.array(16000)}
    found = original_artefact(net, net, OPENVINO_CPU).session().run(feeds)["y"]
    np.testing.assert_allclose(found, ORT.open(path).run(feeds)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", KERNELS)
def test_transformations_keep_the_numbers_of_the_graph(rewrite, case: str) -> None:
    """What OpenVINO makes of a rounded model differs from its graph by far less than rounding does."""
    made = rewrite("openvino-cpu", case)
    written = OrtSession(made.model, optimize=False).run(made.feeds)["y"]
    exact = OrtSession(made.graph.model).run(made.feeds)["y"]
    found = made.artefact.session().run(made.feeds)["y"]
    assert np.square(found - written).sum() < 0.05 * np.square(written - exact).sum()


@pytest.mark.parametrize("case", KERNELS)
def test_units_run_in_the_promised_kernels(rewrite, case: str, tmp_path) -> None:
    made = rewrite("openvino-cpu", case)
    traced = trace(made.artefact, [u.id for u in made.units.units])
    kernels = profile(traced, once(made.feeds), tmp_path)
    for unit, (kind, precision) in KERNELS[case].items():
        found = {(t.kernel.op.split()[0], t.kernel.precision) for t in kernels if t.unit == unit}
        assert (kind, precision) in found


def test_activation_and_rounding_run_inside_the_kernel(rewrite, tmp_path) -> None:
    """Depthwise Conv with SiLU, then the rounding for the next Conv: one kernel; nothing else between the two."""
    made = rewrite("openvino-cpu", "case1-conv")
    ops = [t.kernel.op.split()[0] for t in profile(trace(made.artefact, []), once(made.feeds), tmp_path)]
    first, second = (i for i, op in enumerate(ops) if op == "Convolution")
    assert second == first + 1 or ops[first + 1 : second] == ["Reshape"]  # of a constant


@pytest.mark.parametrize(
    "case",
    [
        "case1-conv",
        "case2-products",
        "case2-matrices",
        "case3-concat",
        "case4-concat-rows",
        "case7-stored-products",
        "case8-transposed",
    ],
)
def test_numbers_are_those_of_the_rewritten_graph(rewrite, case: str) -> None:
    """ONNX Runtime without fusion is the oracle: it executes every operator of the file by itself.

    Sums are added up in another order, so a value next to a boundary may round to the other side: one step of one
    tensor. Most of the difference to float must be explained.
    """
    made = rewrite("openvino-cpu", case)
    plain = OrtSession(to_bytes(made.model), optimize=False).run(made.feeds)["y"]
    exact = ORT.open(made.graph.model).run(made.feeds)["y"]
    found = made.artefact.session().run(made.feeds)["y"]
    assert np.square(plain - exact).sum() > 0
    assert np.square(found - plain).sum() <= 0.05 * np.square(plain - exact).sum()


def test_blocks_divide_the_reduction_and_kernels_go_by_the_plan(rewrite, tmp_path: Path) -> None:
    """Others would be refused by the importer. Of weights alone in fewer bits the audit knows by the plan."""
    made = rewrite("openvino-cpu", "case7-stored-products")
    last = next(u for u in made.units.units if u.id == "/y/MatMul")
    assert last.allowed == ("fp32", "int8") and "32 does not divide 16" in last.why
    with pytest.raises(ModelError, match="OpenVINO cannot load"):
        units = msgspec.structs.replace(made.units, units=tuple(
            msgspec.structs.replace(u, allowed=(*u.allowed, "w8")) if u is last else u for u in made.units.units
        ))  # fmt: skip
        recipe = Recipe(units, made.target, made.ranges)
        OpenVinoSession(write_plan(made.graph, recipe, Plan.of("w8", "/y/MatMul")).model)
    traced = trace(made.artefact, [u.id for u in made.units.units])
    found = audit_kernels(made.units, made.plan, profile(traced, once(made.feeds), tmp_path), "OpenVINO", "")
    executed = {u.unit: (u.executed, u.cause) for u in found.units}
    assert executed == {"/m/MatMul": ("w4", ""), "/g/Gemm": ("w8", ""), "/y/MatMul": ("fp32", "")}


@pytest.mark.parametrize(
    ("scheme", "block", "stored"), [("w8-channel", 128, "i8"), ("w4-16", 16, "u4"), ("w4-64", 64, "u4")]
)
def test_weights_alone_in_fewer_bits(tmp_path: Path, scheme: str, block: int, stored: str) -> None:
    """The kernel keeps the integers, and multiplies what numpy makes of them; what it reads is not rounded."""
    random = np.random.default_rng(5)
    weight = (random.standard_normal((128, 24)) * random.uniform(0.2, 2.0, (128, 24))).astype(np.float32)
    feeds = {"x": random.standard_normal((3, 128)).astype(np.float32)}
    text = '<ir_version: 9, opset_import: ["" : 20]> tiny (float[3,128] x) => (float[3,24] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.node[0].name = "/y/MatMul"
    onnx.save(model, tmp_path / "net.onnx")
    graph = load_graph(tmp_path / "net.onnx")
    units = split(graph, OPENVINO_CPU, find_heads(graph), schemes=(scheme,))
    session = OpenVinoSession(write_plan(graph, Recipe(units, OPENVINO_CPU, {}), Plan.of(scheme, "/y/MatMul")).model)

    parts = weight.astype(np.float64).reshape(-1, block, 24)
    low, high = np.minimum(parts.min(axis=1, keepdims=True), 0), np.maximum(parts.max(axis=1, keepdims=True), 0)
    step = np.maximum(-low, high) / 127 if stored == "i8" else (high - low) / 15
    zero = 0 if stored == "i8" else np.rint(-low / step)
    levels = np.rint(parts / step) if stored == "i8" else np.clip(np.rint(parts / step) + zero, 0, 15) - zero
    wanted = feeds["x"] @ (levels * step).reshape(128, 24)
    assert np.abs(session.run(feeds)["y"] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    nodes = session._compiled.get_runtime_model().get_ordered_ops()
    facts = [node.get_rt_info() for node in nodes]
    kinds = [(f["layerType"].astype(str), f["runtimePrecision"].astype(str)) for f in facts if "runtimePrecision" in f]
    assert ("FullyConnected", stored) in kinds


def test_a_concat_over_rows_would_be_refused(rewrite, tmp_path: Path) -> None:
    """Why case 4 stays in float. Where a version of OpenVINO does better, the case may go."""
    made = rewrite("openvino-cpu", "case4-concat-rows")
    proto = onnx.load_model_from_string(to_bytes(made.model))
    scales = {"s": np.float32(0.05), "z": np.uint8(128), "ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8)}
    scales["wq"] = np.arange(-64, 64, dtype=np.int8).reshape(16, 8)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in scales.items())
    product = next(n for n in proto.graph.node if n.output[0] == "y")
    product.input[:] = ["rounded", "weights"]
    more = [
        helper.make_node("QuantizeLinear", ["k", "s", "z"], ["integers"], "q"),
        helper.make_node("DequantizeLinear", ["integers", "s", "z"], ["rounded"], "dq"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["weights"], "wdq", axis=1),
    ]
    nodes = [*(n for n in proto.graph.node if n.output[0] != "y"), *more, product]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.checker.check_model(proto)
    OrtSession(proto.SerializeToString()).run(made.feeds)
    with pytest.raises(ModelError, match="OpenVINO cannot load"):
        OpenVinoSession(proto.SerializeToString())


def test_session_keeps_the_contract(rewrite) -> None:
    made = rewrite("openvino-cpu", "case1-conv")
    session = OPENVINO.open(made.graph.model)
    assert (session.input_names, session.output_names) == (("x",), ("y",))
    first = session.run(made.feeds)["y"]
    kept = first.copy()
    session.run({"x": -made.feeds["x"]})
    assert np.array_equal(first, kept)  # results are the caller's, not the runtime's memory
    exact = ORT.open(made.graph.model).run(made.feeds)["y"]
    assert np.abs(first - exact).max() <= 1e-5 * np.abs(exact).max()  # float32 stays float32
    with pytest.raises(ModelError, match="OpenVINO failed"):
        session.run({"x": np.zeros((1, 8, 15), np.float32)})
    session.close()
    with pytest.raises(ModelError, match="OpenVINO cannot load"):
        OpenVinoSession(b"nothing")


@pytest.mark.parametrize("runtime", [ORT, OPENVINO], ids=lambda r: r.name)
def test_runs_side_by_side_give_the_same_bits(runtime, inputs) -> None:
    rng = np.random.default_rng(0)
    session = runtime.open(inputs.detector)
    spec = bitalloy.load(inputs.detector).info.inputs[0]
    feeds = [{spec.name: rng.random([int(d) for d in spec.shape]).astype(np.float32)} for _ in range(6)]
    expected = [session.run(f) for f in feeds]
    both = runtime.open(inputs.detector, streams=2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(both.run, feeds))
    for one, other in zip(expected, found, strict=True):
        assert list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_kept_model_is_the_same_model(inputs, tmp_path) -> None:
    """Sessions of what OpenVINO compiled once: same bits, same kernels in the same precisions."""
    artefact = Artefact({ONLY: inputs.detector}, runtime=OPENVINO)
    spec = bitalloy.load(inputs.detector).info.inputs[0]
    feeds = {spec.name: np.random.default_rng(0).random([int(d) for d in spec.shape]).astype(np.float32)}
    opened, reopener = artefact.session(profile=tmp_path), artefact.reopener()
    first, second = reopener(profile=tmp_path), reopener()
    expected = opened.run(feeds)
    for session in (first, second, first):
        found = session.run(feeds)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    # the runtime numbers what it adds anew for every model
    facts = [
        [(re.sub(r"_\d+", "", " ".join((k.name, *k.layers))), k.op, k.precision) for k in session.kernels()]
        for session in (opened, first)
    ]
    assert facts[0] == facts[1] and len(facts[0]) > 5


def test_ranges_at_run_time_give_no_integer_kernel(tmp_path: Path) -> None:
    """Why the target does not offer them (case 9): ort-cpu writes such a product, and OpenVINO computes it in float."""
    text = """<ir_version: 9, opset_import: ["" : 20]> t (float[4,64] x, int8[64,32] w, int8[32] wz, float[32] ws)
        => (float[4,32] y) { q, s, z = DynamicQuantizeLinear(x)  m = MatMulInteger(q, w, z, wz)
        f = Cast<to=1>(m)  k = Mul(s, ws)  y = Mul(f, k) }"""
    model = onnx.parser.parse_model(" ".join(text.split()))
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "w": random.integers(-127, 128, (64, 32)).astype(np.int8),
        "wz": np.zeros(32, np.int8),
        "ws": np.full(32, 0.01, np.float32),
    }
    for value in [v for v in model.graph.input if v.name in arrays]:
        model.graph.initializer.append(numpy_helper.from_array(arrays[value.name], value.name))
        model.graph.input.remove(value)
    x = random.standard_normal((4, 64)).astype(np.float32)
    session = OpenVinoSession(model.SerializeToString(), profile=tmp_path / "profile")
    session.run({"x": x})
    (product,) = (k for k in session.kernels() if k.op.startswith(("FullyConnected", "MatMul")))
    assert product.precision == "fp32"


@pytest.mark.skipif(
    any(f.startswith(("avx512_bf16", "amx_bf16")) for f in this_machine().features), reason="native bfloat16"
)
def test_casts_to_bfloat16_are_dropped_without_native_kernels() -> None:
    """Why the target does not offer it (case 10): what is between two Casts has the numbers of float32."""
    text = """<ir_version: 10, opset_import: ["" : 22]> t (float[4,64] x) => (float[4,64] y) {
        b = Cast<to=16>(x)  e = Mul(b, b)  y = Cast<to=1>(e) }"""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    session = OpenVinoSession(onnx.parser.parse_model(" ".join(text.split())).SerializeToString())
    np.testing.assert_allclose(session.run({"x": x})["y"], x * x, rtol=1e-6)


def test_missing_runtime_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, inside, inputs) -> None:
    """Before any work is done."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = inside.run(inputs.classifier, "--data", inputs.images, "--target", "openvino-cpu").refused()
    assert "pip install 'bitalloy[openvino]'" in message
    assert "calibrate" not in inside.files()


def test_whole_run_on_openvino(inside, inputs) -> None:
    """All measurements are OpenVINO's, the same command again measures nothing, another --samples only analyses."""
    command = (inputs.detector, "--data", inputs.scenes, "--eval", inputs.labels, "--target", "openvino-cpu")
    inside.run(*command, *inside.REACHABLE).succeeded()
    summary = inside.summary()
    assert summary["target"] == "openvino-cpu" and summary["versions"]["OpenVINO"] == OPENVINO.version()
    assert summary["int8_units"] > 0 and summary["sqnr_db"] and summary["metrics"]
    for head, pair in summary["sqnr_db"].items():
        assert abs(pair["mixed"]["predicted"] - pair["mixed"]["measured"]) < 6, head
    inside.run(*command, *inside.REACHABLE).succeeded()
    assert inside.summary()["seconds"]["verify"] == inside.summary()["seconds"]["cost"] == 0
    inside.run(*command, *inside.REACHABLE, "--samples", "4").succeeded()
    assert inside.summary()["seconds"]["cost"] == 0 < inside.summary()["seconds"]["probe"]
