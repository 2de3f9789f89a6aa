"""The command line, above all with what users get wrong: exit code 2, one clear message, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

# -- help --------------------------------------------------------------------------------------------


def test_help_names_the_commands_and_where_to_start(bitalloy: Any) -> None:
    text = bitalloy("--help").succeeded().out
    assert {"run", "models", "targets"} <= set(text.split())
    assert "bitalloy run" in text


def test_help_of_run_teaches_by_examples(inside: Any) -> None:
    text = inside("run", "--help").succeeded().out
    assert text.count("bitalloy run") >= 3
    for needed in ("--data", "--latency", "--size", "--eval", "--exclude", "mixed.onnx", "summary.json"):
        assert needed in text


@pytest.mark.parametrize("command", ["models", "targets"])
def test_help_of_other_commands_has_an_example(inside: Any, command: str) -> None:
    text = inside(command, "--help").succeeded().out
    assert "Example" in text and "bitalloy" in text


def test_module_starts_the_command_line(bitalloy: Any) -> None:
    module = bitalloy.starting("import runpy; runpy.run_module('bitalloy', run_name='__main__', alter_sys=True)")
    assert "yolo11n-shapes" in module("models").succeeded().out


def test_models_and_targets_are_listed(inside: Any) -> None:
    listed = inside("models").succeeded().out
    assert "yolo11n-shapes" in listed
    assert "needs the extra [openvino]" in inside("targets").succeeded().out
    listed = json.loads(inside("targets", "--json").succeeded().out)
    assert {t["name"]: t["estimated"] for t in listed} == {
        "ort-cpu": False, "openvino-cpu": False, "ort-cuda": True, "tensorrt": True, "tensorrt-rtx": True,
    }  # fmt: skip


def test_no_command_shows_the_help(inside: Any) -> None:
    command = inside()
    assert "Usage" in command.out + command.err and "Traceback" not in command.err


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latency", "abc"], ["--latency", "'abc'", "0.7x", "12ms"]),
        (["--latency", "0x"], ["--latency", "'0x'"]),
        (["--latency=-1ms"], ["--latency", "'-1ms'"]),
        (["--size", "lots"], ["--size", "'lots'", "8MB"]),
        (["--size", "1e400MB"], ["--size"]),
        (["--max-drop-db", "nan"], ["--max-drop-db", "finite"]),
        (["--max-drop-db", "loud"], ["--max-drop-db", "number"]),
        (["--shape", "x"], ["--shape", "'x'", "images=1x3x640x640"]),
        (["--shape", "images=1x3x0x32"], ["--shape"]),
        (["--shape", "images=1x3x64x64"], ["'images'", "axis 2", "32", "64"]),
        (["--shape", "images=1x3"], ["'images'", "4 dimensions"]),
        (["--shape", "picture=1x3x32x32"], ["picture", "images"]),
        (["--mean", "a,b"], ["--mean", "'a,b'"]),
        (["--mean", "1,2"], ["mean", "3"]),
        (["--std", "0,0,0"], ["std", "above 0"]),
        (["--scale", "nan"], ["--scale", "finite"]),
        (["--scale", "0"], ["--scale", "above 0"]),
        (["--layout", "CHW"], ["--layout", "'CHW'", "NCHW", "NHWC"]),
        (["--layout", "NHWC"], ["No input takes an image"]),
        (["--fit", "squeeze"], ["--fit", "'squeeze'", "letterbox", "stretch", "crop"]),
        (["--samples", "many"], ["--samples", "'many'", "auto"]),
        (["--samples", "0"], ["--samples", "at least 1"]),
        (["--probes", "0"], ["--probes", "1"]),
        (["--calibration-samples", "0"], ["--calibration-samples", "1"]),
        (["--limit", "0"], ["--limit", "1"]),
        (["--seed", "-1"], ["--seed", "0"]),
        (["--ranges", "best"], ["best", "minmax", "percentile", "mse"]),
        (["--target", "ort-gpu"], ["'ort-gpu'", "ort-cpu"]),
        (["--exclude", "Transformer"], ["--exclude 'Transformer'", "matches no"]),
        (["--exclude", "*"], ["--exclude"]),
        (["--eval", "nowhere.json"], ["--eval", "nowhere.json", "not exist"]),
        (["--budget", "5"], ["--budget"]),
        (["--confidence", "1"], ["--confidence", "above 0.5 and below 1"]),
        (["--confidence", "nan"], ["--confidence", "above 0.5 and below 1"]),
    ],
    ids=" ".join,
)
def test_bad_option_is_refused(inside: Any, inputs: Any, options: list[str], words: list[str]) -> None:
    text = inside("run", inputs.classifier, "--data", inputs.images, "--out", "run", *options).refused()
    for word in words:
        assert word in text
    assert inside.files() <= {".bitalloy-run"}


def test_unknown_command_is_refused(inside: Any) -> None:
    assert "runs" in inside("runs").refused()


# -- models ------------------------------------------------------------------------------------------


def broken(inputs: Any, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the classifier with a defect."""
    model = onnx.load(inputs.classifier)
    change(model)
    onnx.save(model, folder / "broken.onnx")
    return folder / "broken.onnx"


def test_unknown_model_name_gets_a_suggestion(bitalloy: Any) -> None:
    text = bitalloy.run("yolo11n-shape").refused()
    assert "'yolo11n-shape'" in text and "Did you mean 'yolo11n-shapes'?" in text
    assert bitalloy.files() == set()


def test_missing_model_file(inside: Any) -> None:
    assert "No model file at 'nowhere.onnx'" in inside.run("nowhere.onnx").refused()


def test_folder_as_model(inside: Any, inputs: Any) -> None:
    assert "neither a file nor a known model" in inside.run(inputs.folder).refused()


@pytest.mark.parametrize(
    "content", [b"", b"not a model\n" * 100, bytes(range(256)) * 8, b"PK\x03\x04" + b"\0" * 60], ids=range(4)
)
def test_file_that_is_not_onnx(inside: Any, here: Path, content: bytes) -> None:
    path = here / "model.onnx"
    path.write_bytes(content)
    assert re.search("not an ONNX file|no ONNX graph", inside.run(path).refused())
    assert not (here / "run").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_model(bitalloy: Any, inputs: Any, share: float) -> None:
    data = inputs.classifier.read_bytes()
    path = bitalloy.folder / "model.onnx"
    path.write_bytes(data[: int(share * len(data))])
    assert re.search("truncated|not valid ONNX|no ONNX graph", bitalloy.run(path, "--data", inputs.images).refused())
    assert bitalloy.files() == set()


def external(inputs: Any, folder: Path, location: str = "weights.bin") -> Path:
    """The classifier with its weights in a file beside it, which is then said to be at `location`."""
    path = folder / "model.onnx"
    onnx.save(onnx.load(inputs.classifier), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read(inside: Any, inputs: Any) -> None:
    path = external(inputs, inside.folder)
    inside.run(path, "--data", inputs.images, *inside.REACHABLE).succeeded()


def test_missing_external_data(bitalloy: Any, inputs: Any) -> None:
    path = external(inputs, bitalloy.folder)
    (bitalloy.folder / "weights.bin").unlink()
    text = bitalloy.run(path, "--data", inputs.images).refused()
    assert "'weights.bin'" in text and "missing" in text


def test_external_data_that_is_too_short(inside: Any, inputs: Any) -> None:
    path = external(inputs, inside.folder)
    with (inside.folder / "weights.bin").open("r+b") as file:
        file.truncate(1000)
    assert "external data" in inside.run(path, "--data", inputs.images).refused()


@pytest.mark.parametrize("location", ["../weights.bin", "{absolute}", "link.bin"])
def test_external_data_outside_the_folder(inputs: Any, inside: Any, here: Path, location: str) -> None:
    folder = here / "model"
    folder.mkdir()
    path = external(inputs, folder, location.format(absolute=here / "weights.bin"))
    shutil.move(folder / "weights.bin", here / "weights.bin")
    (folder / "link.bin").symlink_to(here / "weights.bin")
    assert "outside" in inside.run(path, "--data", inputs.images).refused()


def open_shape(model: onnx.ModelProto) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_param, dims[2].dim_param, dims[3].dim_param = "batch", "height", "width"


def test_symbolic_shape_without_sizes(bitalloy: Any, inputs: Any) -> None:
    path = broken(inputs, bitalloy.folder, open_shape)
    text = bitalloy.run(path, "--data", inputs.images).refused()
    assert "--shape images=batchx3xheightxwidth" in text


def test_symbolic_shape_with_sizes(inside: Any, inputs: Any) -> None:
    path = broken(inputs, inside.folder, open_shape)
    options = ("--shape", "images=1x3x24x40", "--data", inputs.images)
    inside.run(path, *options, *inside.REACHABLE).succeeded()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(inputs: Any, inside: Any, here: Path, value: float) -> None:
    def change(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        array = numpy_helper.to_array(weight).copy()
        array.flat[3] = value
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    text = inside.run(broken(inputs, here, change), "--data", inputs.images).refused()
    assert "NaN or infinite" in text and "constant0" in text


def ends_with(kind: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    """Give a model another operator at its end."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        old = graph.output[0].name
        graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        graph.node.append(helper.make_node("Mul", [old, "factor"], ["scaled"], name="scale"))
        graph.node.append(helper.make_node(kind, ["scaled"], ["last"], name="last"))
        graph.output[0].name = "last"

    return change


@pytest.mark.parametrize(("kind", "factor"), [("Sqrt", 1.0), ("Exp", 1e4)], ids=["nan", "infinite"])
def test_outputs_that_are_not_finite(inside: Any, inputs: Any, kind: str, factor: float) -> None:
    path = broken(inputs, inside.folder, ends_with(kind, factor))
    text = inside.run(path, "--data", inputs.images).refused()
    assert "NaN or infinite" in text and "sample" in text
    assert inside.results() == set()


def test_what_lies_before_a_use_without_adjoint_is_executed(inside: Any, inputs: Any) -> None:
    """It is said by name in the summary, and every unit before it is measured."""
    path = broken(inputs, inside.folder, ends_with("Det", 1.0))
    model = onnx.load(path)
    model.graph.node[-1].op_type = "Einsum"
    del model.graph.node[-1].input[1:], model.graph.node[-1].attribute[:]
    model.graph.node[-1].attribute.append(helper.make_attribute("equation", "...->..."))
    onnx.save(model, path)
    inside.run(path, "--data", inputs.images).succeeded()
    assert any("No gradient passes one node: Einsum" in note for note in inside.summary()["notes"])
    rows = json.loads((inside.folder / "run" / "sensitivity.json").read_text())["rows"]
    lowered = [r for r in rows if (r["scope"], r["part"]) == ("unit", "all")]
    assert lowered and all(r["exact"] for r in lowered)


def test_model_with_nothing_to_quantize(inside: Any) -> None:
    node = helper.make_node("Exp", ["x"], ["y"])
    specs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "exp", specs[:1], specs[1:]), ir_version=8)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 17))
    onnx.save(model, inside.folder / "exp.onnx")
    np.save(inside.folder / "x.npy", np.ones((8, 4), np.float32))
    text = inside.run("exp.onnx", "--data", "x.npy").refused()
    assert "INT8" in text
    assert inside.results() == set()


# -- data --------------------------------------------------------------------------------------------


def test_missing_and_empty_data(inputs: Any, inside: Any, here: Path) -> None:
    assert "does not exist" in inside.run(inputs.classifier, "--data", here / "nowhere").refused()
    empty = here / "empty"
    empty.mkdir()
    assert "holds no samples" in inside.run(inputs.classifier, "--data", empty).refused()
    (empty / "readme.txt").write_text("no images here")
    assert "holds no samples" in inside.run(inputs.classifier, "--data", empty).refused()


def test_unreadable_image(bitalloy: Any, inputs: Any) -> None:
    folder = shutil.copytree(inputs.images, bitalloy.folder / "images")
    victim = folder / "005.png"
    victim.write_bytes(victim.read_bytes()[:200])
    text = bitalloy.run(inputs.classifier, "--data", folder).refused()
    assert "005.png" in text and "Cannot read" in text
    assert bitalloy.results() == set()


def test_image_of_sixteen_bits(inputs: Any, inside: Any, here: Path) -> None:
    folder = here / "images"
    folder.mkdir()
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(folder / "deep.png")
    assert "8 bits" in inside.run(inputs.classifier, "--data", folder).refused()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((1, 1, 32, 32), np.float32), ["[1, 1, 32, 32]", "[1, 3, 32, 32]"]),
        (np.zeros((1, 3, 32, 32), np.float64), ["float64", "float32"]),
        (np.full((1, 3, 32, 32), np.nan, np.float32), ["NaN"]),
    ],
    ids=["channels", "type", "nan"],
)
def test_feeds_that_do_not_fit(inputs: Any, inside: Any, here: Path, array: np.ndarray, words: list[str]) -> None:
    np.savez(here / "0.npz", images=array)
    text = inside.run(inputs.classifier, "--data", here).refused()
    for word in ["0.npz", *words]:
        assert word in text


def test_images_for_a_model_with_four_channels(inside: Any, inputs: Any) -> None:
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 1, 1])
    model = helper.make_model(
        helper.make_graph([node], "pool", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, inside.folder / "pool.onnx")
    assert "1 or 3 channels" in inside.run("pool.onnx", "--data", inputs.images).refused()


def test_images_for_a_model_without_image_input(inside: Any, inputs: Any) -> None:
    text = inside.run(inputs.two_inputs, "--data", inputs.images).refused()
    assert ".npz" in text and "'left'" in text
    assert "--data with .npz" in inside.run(inputs.two_inputs).refused()


# -- labels ------------------------------------------------------------------------------------------


def relabelled(inputs: Any, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The labels of the scenes with a defect, beside the same images."""
    shutil.copytree(inputs.labels.parent / "images", folder / "images")
    content = json.loads(inputs.labels.read_text())
    change(content)
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"][2].update(width=640), ["000002.png", "other images"]),
        (lambda c: c["images"][2].update(file_name="nowhere.png"), ["nowhere.png"]),
        (lambda c: c["categories"].append({"id": 99, "name": "more"}), ["categories"]),
        (lambda c: c.pop("images"), ["images"]),
        (lambda c: c["images"].clear(), ["image"]),
    ],
    ids=["size", "file", "classes", "key", "empty"],
)
def test_labels_that_do_not_match(
    inside: Any, inputs: Any, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    labels = relabelled(inputs, inside.folder, change)
    options = ("--data", inputs.scenes, "--eval", labels, *inside.REACHABLE)
    text = inside.run(inputs.detector, *options).refused()
    for word in words:
        assert word in text
    assert inside.results() == set()


def test_labels_that_are_no_labels(inside: Any, inputs: Any) -> None:
    (inside.folder / "labels.json").write_text("{")
    options = ("--data", inputs.scenes, "--eval", "labels.json", *inside.REACHABLE)
    assert "labels.json" in inside.run(inputs.detector, *options).refused()


def test_labels_for_a_model_that_is_no_detector(inside: Any, inputs: Any) -> None:
    options = ("--data", inputs.images, "--eval", inputs.labels, *inside.REACHABLE)
    assert "detector" in inside.run(inputs.classifier, *options).refused()
    assert inside.results() == set()


# -- budgets -----------------------------------------------------------------------------------------


def test_impossible_size_names_the_smallest_that_is_in_reach(inside: Any, inputs: Any) -> None:
    """And that one is accepted when it is asked for."""
    data = ("--data", inputs.images)
    text = inside.run(inputs.classifier, *data, "--size", "1KB").refused(4)
    assert inside.results() == set()
    found = re.search(r"smallest size is ([\d.]+) ?([kKM]?B)", text)
    assert found
    inside.run(inputs.classifier, *data, "--size", f"{found[1]}{found[2]}").succeeded()


def test_impossible_latency_names_the_lowest_that_is_in_reach(inside: Any, inputs: Any) -> None:
    data = ("--data", inputs.images)
    text = inside.run(inputs.classifier, *data, "--latency", "0.01x").refused(4)
    assert inside.results() == set()
    found = re.search(r"lowest latency in reach is ([\d.]+x)", text)
    assert found
    inside.run(inputs.classifier, *data, "--latency", found[1]).succeeded()


def test_impossible_budget_leaves_earlier_results_alone(inside: Any, inputs: Any) -> None:
    data = ("--data", inputs.images)
    inside.run(inputs.classifier, *data, *inside.REACHABLE).succeeded()
    before = inside.contents()
    inside.run(inputs.classifier, *data, "--size", "1KB").refused(4)
    assert inside.contents() == before


# -- run directory -----------------------------------------------------------------------------------


def test_run_directory_below_proc(bitalloy: Any, inputs: Any) -> None:
    text = bitalloy.run(inputs.classifier, "--data", inputs.images, out="/proc/bitalloy").refused()
    assert "/proc/bitalloy" in text and "cannot be written" in text


def test_file_in_place_of_the_run_directory(inside: Any, inputs: Any) -> None:
    path = inside.folder / "run"
    path.write_text("mine")
    assert "cannot be written" in inside.run(inputs.classifier, "--data", inputs.images).refused()
    assert path.read_text() == "mine"


def test_folder_of_the_user_in_place_of_the_run_directory(inside: Any, inputs: Any) -> None:
    mine = inside.folder / "run" / "mixed.onnx"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "not a run directory" in inside.run(inputs.classifier, "--data", inputs.images).refused()
    assert inside.files() == {"mixed.onnx"} and mine.read_text() == "mine"
