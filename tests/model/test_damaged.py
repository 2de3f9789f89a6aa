"""Model files that are damaged or strange: a message that says what is wrong, or the right result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.conftest import Network, two_inputs

from bitalloy.core.errors import DataError, ModelError, RunDirectoryError
from bitalloy.core.schemes import Plan
from bitalloy.core.store import RunDirectory
from bitalloy.data.datasets import open_dataset
from bitalloy.model.file import refuse_broken
from bitalloy.model.graphs.outline import read_interface
from bitalloy.model.heads import find_heads, is_divergence
from bitalloy.model.load import load_graph
from bitalloy.model.metadata import HEADS, IMAGE, PROTECT, REGION, SCOPES, SHAPES
from bitalloy.model.regions import MOST_LEVELS, ancestors, path_of, region_id
from bitalloy.model.weights import to_bytes
from bitalloy.pipeline.prepare import load
from bitalloy.rewrite.apply import write_plan
from bitalloy.search.protection import read_advice
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel, draws, estimate_sqnr, silent_heads
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe
from bitalloy.tasks.open import image_facts


def saved(model: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def lengthen(tensor: onnx.TensorProto) -> None:
    tensor.raw_data += bytes(64)


def shorten(tensor: onnx.TensorProto) -> None:
    tensor.raw_data = tensor.raw_data[:-4]


def listed(tensor: onnx.TensorProto) -> None:
    array = numpy_helper.to_array(tensor)
    tensor.ClearField("raw_data")
    tensor.float_data.extend([*array.reshape(-1), 0.0])


def negative(tensor: onnx.TensorProto) -> None:
    tensor.dims[:] = [-1]


@pytest.mark.parametrize("change", [lengthen, shorten, listed, negative])
@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_a_constant_that_does_not_fit_its_sizes(
    change: Callable[[onnx.TensorProto], None], place: str, tmp_path: Path
) -> None:
    model = two_inputs()
    tensor = model.graph.initializer[0]
    if place == "attribute":
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        del model.graph.initializer[0]
        tensor = model.graph.node[0].attribute[0].t
    change(tensor)
    with pytest.raises(ModelError, match=r"constant0.*(bytes|hold)"):
        load_graph(saved(model, tmp_path))


def test_a_window_that_is_larger_than_what_it_reads(tmp_path: Path) -> None:
    """Inference of shapes goes on below nothing; ONNX Runtime would refuse it at the first run."""
    net = Network()
    x = net.op("Relu", net.op("Conv", "x", net.weight(4, 3, 5, 5)))
    with pytest.raises(
        ModelError, match=r"'/conv0/Conv' \(Conv\) makes 'conv0' of the shape \[1, 4, -1, 0\].*negative"
    ):
        load_graph(saved(net.model({"x": (1, 3, 3, 4)}, {x: (1, 4, "a", "b")}), tmp_path))


def external(folder: Path, **changes: str | None) -> Path:
    """A model with weights in `w`, one after the other; entries of the first are changed, or left out."""
    path = folder / "m.onnx"
    onnx.save(two_inputs(), path, save_as_external_data=True, location="w", size_threshold=64)
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    entries = {e.key: e.value for e in tensor.external_data} | changes
    del tensor.external_data[:]
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return saved(model, folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"location": "a\0b"}, "no file can be called"),
        ({"location": "n" * 5000}, "no file can be called"),
        ({"location": ""}, "outside"),
        ({"location": ".."}, "outside"),
        ({"location": "."}, "missing"),
        ({"offset": "9" * 400}, "cannot be read"),
        ({"offset": "-4"}, "cannot be read"),
        ({"length": "²"}, "cannot be read"),
        ({"length": "4"}, "ask for 8192"),
    ],
)
def test_external_data_that_cannot_be(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words) as error:
        load_graph(external(tmp_path, **changes))
    assert len(str(error.value)) < 5000


def test_external_data_without_a_length_ends_with_its_tensor(tmp_path: Path) -> None:
    """The length is optional: the file goes on behind the tensor with others."""
    loaded = load_graph(external(tmp_path, length=None))
    weight = loaded.model.graph.initializers["constant0"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), numpy_helper.to_array(two_inputs().graph.initializer[0]))


@pytest.mark.parametrize("suffix", [".json", ".textproto", ".onnxtxt", ".txtpb", ".ort", ".xml", ""])
def test_the_name_of_a_file_chooses_no_parser(suffix: str, tmp_path: Path) -> None:
    """Binary ONNX is read under any name; text is refused as what it is."""
    path = saved(two_inputs(), tmp_path, f"m{suffix}")
    assert load(path).info.sha256 == load_graph(saved(two_inputs(), tmp_path)).info.sha256
    if suffix in (".json", ".textproto", ".onnxtxt"):
        onnx.save(two_inputs(), path)
        for read in (load, refuse_broken, read_interface):
            with pytest.raises(ModelError, match="not an ONNX file"):
                read(path)


@pytest.mark.parametrize("text", ["", "{", "null", "5", "[1]", "[[]]", '{"x":["a"]}', "NaN", "[" * 20000, '"\\ud800"'])
@pytest.mark.parametrize("key", [HEADS, SHAPES, IMAGE, PROTECT])
def test_malformed_metadata(key: str, text: str, tmp_path: Path) -> None:
    model = two_inputs()
    model.metadata_props.add(key=key, value=text)
    graph = load_graph(saved(model, tmp_path))
    reads: dict[str, Callable[[], object]] = {
        HEADS: lambda: find_heads(graph),
        SHAPES: lambda: load(graph.source),
        IMAGE: lambda: image_facts(graph.metadata),
        PROTECT: lambda: read_advice(graph),
    }
    with pytest.raises(ModelError, match=f"'{key}' is malformed"):
        reads[key]()


@pytest.mark.parametrize(
    "facts",
    [{"scale": 0}, {"std": [0.0]}, {"size": [0, 0]}, {"size": [1, 2, 3]}, {"mean": 5}, {"fit": "x"}, {"nonsense": 1}],
)
def test_malformed_facts_about_images(facts: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=f"'{IMAGE}' is malformed"):
        image_facts({IMAGE: json.dumps(facts)})


def test_sound_facts_about_images() -> None:
    facts = {"size": [64, 32], "scale": 0.5, "mean": [1, 2.5], "std": [1.0], "fit": "crop", "layout": "NHWC"}
    assert image_facts({IMAGE: json.dumps(facts)}) == {**facts, "size": (64, 32), "mean": (1, 2.5), "std": (1.0,)}
    assert image_facts({IMAGE: '{"size": 64}'}) == {"size": 64}
    assert image_facts({}) == {}


def test_names_of_heads_are_told_apart(tmp_path: Path) -> None:
    """Two detectors in one model, and outputs whose names are those of parts or of divergences."""
    net = Network(3)
    outputs: dict[str, tuple[int, ...]] = {}
    for _ in range(2):
        parts = [
            net.op("Reshape", net.conv("x", 3, rows, kernel=1), net.constant(np.array([1, rows, 64])))
            for rows in (4, 3)
        ]
        outputs[net.op("Concat", *parts, axis=1)] = (1, 7, 64)
    first, second = outputs
    probabilities = net.op("Softmax", net.conv("x", 3, 2), axis=1)
    outputs[probabilities] = (1, 2, 8, 8)
    model = net.model({"x": (1, 3, 8, 8)}, outputs)
    for name in ("scores", f"{probabilities} KL"):
        model.graph.node.append(helper.make_node("Relu", [first], [name]))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 7, 64]))
    heads = find_heads(load_graph(saved(model, tmp_path)))
    names = [h.name for h in heads]
    assert len(set(names)) == len(names)
    assert {"boxes", f"{first}/scores", "detections", f"{second}/boxes", "scores", f"{probabilities} KL"} <= set(names)
    assert [h.output for h in heads if h.name == "scores"] == ["scores"]
    assert [is_divergence(h.name) for h in heads] == [bool(h.kind) for h in heads]


def test_outputs_that_no_node_makes(tmp_path: Path) -> None:
    """A stored constant and an input that are outputs as they are: no heads, and there when the model runs."""
    model = two_inputs()
    weight = model.graph.initializer[0]
    model.graph.output.append(helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, weight.dims))
    graph = load_graph(saved(model, tmp_path))
    heads = find_heads(graph)
    assert [h.output for h in heads] == [two_inputs().graph.output[0].name]
    units = split(graph, ORT_CPU, heads)
    ranges = {e.root: (-4.0, 4.0) for e in units.edges} | {e.tensor: (-4.0, 4.0) for u in units.units for e in u.inner}
    board = Switchboard(graph, Recipe(units, ORT_CPU, ranges, {}))
    feeds = {n: np.ones((1, 16), np.float32) for n in ("left", "right")}
    wanted = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    for gates in (board.gates(()), board.gates(board.sites)):
        walk = board.walk(feeds, board.gates(()))
        for found in (board.run(feeds, gates), walk.run(gates)):
            np.testing.assert_array_equal(found[weight.name], wanted[1])
    np.testing.assert_allclose(board.run(feeds, board.gates(()))[heads[0].output], wanted[0], rtol=1e-5)
    del model.graph.output[0]
    with pytest.raises(ModelError, match="no float output to compare"):
        find_heads(load_graph(saved(model, tmp_path)))


@pytest.mark.parametrize("attributes", [{}, {"onesided": 1}, {"onesided": 0}])
def test_the_spectrum_has_the_sizes_that_the_runtime_gives_it(attributes: dict[str, int], tmp_path: Path) -> None:
    net = Network()
    window = net.constant(np.hanning(64).astype(np.float32))
    spectrum = net.op("STFT", "x", net.constant(np.array(32)), window, net.constant(np.array(64)), **attributes)
    model = net.model({"x": (1, 512)}, {net.op("Relu", spectrum): (1, 15, "n", 2)})
    (output,) = load_graph(saved(model, tmp_path)).info.outputs
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.zeros((1, 512), np.float32)})
    assert output.shape == wanted.shape


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 8), (8,)])
def test_a_bias_of_fewer_numbers_is_rounded_as_a_vector(shape: tuple[int, ...], tmp_path: Path) -> None:
    net = Network()
    bias = net.constant(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    x = net.op("Gemm", "x", net.weight(8, 16), bias, transB=1)
    model = net.model({"x": (1, 16)}, {net.gemm(net.op("Relu", x), 8, 4): (1, 4)})
    graph = load_graph(saved(model, tmp_path))
    units = split(graph, ORT_CPU, find_heads(graph))
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)}
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    assert units.lowest()
    for plan, tolerance in ((Plan(), 1e-6), (units.lowest(), 0.15)):
        ranges = {e.root: (-6.0, 6.0) for e in units.edges}
        written = write_plan(graph, Recipe(units, ORT_CPU, ranges, {}), plan).model
        (found,) = ort.InferenceSession(to_bytes(written)).run(None, feeds)
        np.testing.assert_allclose(found, wanted, atol=tolerance)


@pytest.mark.parametrize("key", [REGION, SCOPES, "name"])
def test_regions_end_at_some_depth(key: str) -> None:
    levels = [f"l{i}" for i in range(3000)]
    node = onnx.NodeProto(op_type="Relu", name="/".join(levels) if key == "name" else "n")
    text = "/".join(levels) if key == REGION else repr([".".join(levels[: i + 1]) for i in range(200)] + ["n"])
    graph = two_inputs()
    graph.graph.node[0].name = node.name
    if key != "name":
        graph.graph.node[0].metadata_props.add(key=key, value=text)
    path = path_of(onnx_ir_node(graph))
    assert path == tuple(levels[:MOST_LEVELS])
    assert len(ancestors(region_id(path))) == MOST_LEVELS + 1


@pytest.mark.parametrize("text", ["[" * 5000, "{[]: 1}", "'a'", "(", "\0", "9" * 5000])
def test_scopes_that_are_none_are_left_out(text: str) -> None:
    graph = two_inputs()
    graph.graph.node[0].metadata_props.add(key=SCOPES, value=text)
    graph.graph.node[0].name = "/a/b"
    assert path_of(onnx_ir_node(graph)) == ("a",)


def onnx_ir_node(model: onnx.ModelProto):
    import onnx_ir as ir

    return next(iter(ir.serde.deserialize_model(model).graph))


def matrix(energy: np.ndarray) -> ProbeMatrix:
    """One site that does the same damage to two heads, on samples of given energy (samples, heads)."""
    rows = np.ones((len(energy), 1, 1), np.float32)
    return ProbeMatrix(("y", "z"), ("s",), (rows, rows), (rows, rows), energy)


def test_a_silent_head_has_numbers_and_is_named() -> None:
    found = matrix(np.array([[100.0, 0.0], [100.0, 0.0], [100.0, 0.0]]))
    assert silent_heads(found.heads, found.energy) == ("z",)
    y, z = estimate_sqnr(found, np.ones(1), draws(3, 0))
    assert y.value == pytest.approx(20.0) and z.value == -60.0
    assert np.isfinite([y.low, y.high, z.low, z.high]).all()
    assert np.isfinite(decibel(found.site_damage())).all()


def test_a_head_that_is_silent_on_some_samples_has_an_interval() -> None:
    """A bootstrap may draw the silent samples alone."""
    found = matrix(np.array([[100.0, 0.0], [100.0, 300.0]]))
    assert silent_heads(found.heads, found.energy) == ()
    _, z = estimate_sqnr(found, np.ones(1), draws(2, 0))
    assert z.value == pytest.approx(10 * np.log10(150), abs=1e-3) and np.isfinite([z.low, z.high]).all()


def test_a_model_that_is_silent_altogether_is_refused() -> None:
    with pytest.raises(DataError, match=r"y, z.*zero on every sample"):
        silent_heads(("y", "z", "z KL"), np.array([[0.0, 0.0, 2.0]]))


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"m\xff.onnx")))  # noqa: PTH118
    path.write_bytes(two_inputs().SerializeToString())
    images = tmp_path / "images"
    images.mkdir()
    path.rename(images / path.with_suffix(".npz").name)
    with pytest.raises(DataError, match=r"udcff.* not UTF-8"):
        open_dataset(images, (), image=None, limit=None, seed=0)
    with pytest.raises(RunDirectoryError, match="not UTF-8"):
        RunDirectory(path.with_suffix(".run"))
    (images / path.with_suffix(".npz").name).rename(path)
    with pytest.raises(ModelError, match=r"udcff.* not UTF-8"):
        load_graph(path)
