"""Files of strangers: sizes that fill memory, paths that lead elsewhere, names that are code for other programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tests.conftest import Command, Process, save_feeds, two_inputs

import bitalloy
from bitalloy.core.checked import CheckedRun
from bitalloy.core.errors import BitalloyError, DataError, ModelError
from bitalloy.core.limits import limited
from bitalloy.core.paths import path_inside
from bitalloy.core.status import LimitStatus, Verdict
from bitalloy.data.arrays import read_arrays
from bitalloy.data.images import ImageSpec, image_feed, open_image
from bitalloy.model.load import load_graph
from bitalloy.report.ci import check_markdown, failure_annotations, junit_xml
from bitalloy.tasks.ade import LabelledFile, read_label
from bitalloy.tasks.coco import read_coco

BIG = [100_000, 100_000]
"""Sizes of 40 GB of floats."""


# -- memory ------------------------------------------------------------------------------------------


def grown(kind: str) -> onnx.ModelProto:
    """A small file whose operator makes 40 GB of floats."""

    def ints(name: str, *values: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    floats = helper.make_tensor("f", TensorProto.FLOAT, [1, 1], [1.0])
    made = {
        "ConstantOfShape": helper.make_node("ConstantOfShape", ["s"], ["big"], name="grows"),
        "Expand": helper.make_node("Expand", ["x", "s"], ["big"], name="grows"),
        "Tile": helper.make_node("Tile", ["x", "s"], ["big"], name="grows"),
        "Pad": helper.make_node("Pad", ["x", "p"], ["big"], name="grows"),
        "Resize": helper.make_node("Resize", ["x", "", "", "s"], ["big"], name="grows", mode="nearest"),
        "Range": helper.make_node("Range", ["zero", "end", "one"], ["big"], name="grows"),
        "constant Expand": helper.make_node("Expand", ["f", "s"], ["big"], name="grows"),
    }[kind]
    nodes = [
        made,
        helper.make_node("ReduceMax", ["big"], ["least"], keepdims=0),
        helper.make_node("Add", ["x", "least"], ["y"]),
    ]
    scalars = {"zero": 0.0, "end": 1e10, "one": 1.0}
    initial = [ints("s", *BIG), ints("p", 0, 0, *(b - 1 for b in BIG)), floats]
    initial += [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in scalars.items()]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "grown",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [t for t in initial if t.name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("kind", ["ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "Range", "constant Expand"])
def test_tensors_beyond_memory_are_refused_before_they_are_made(kind: str, tmp_path: Path) -> None:
    onnx.save(grown(kind), tmp_path / "grown.onnx")
    with (
        limited(8_000_000_000),
        pytest.raises(ModelError, match=r"'big' of node 'grows' .*takes 40\.0GB; the limit is 8"),
    ):
        load_graph(tmp_path / "grown.onnx")


def test_a_size_that_is_computed_is_known_before_it_is_used(tmp_path: Path) -> None:
    """Inference does not follow the exponential, so that the size is known once that part is evaluated."""
    proto = grown("ConstantOfShape")
    for tensor in proto.graph.initializer:
        if tensor.name == "s":
            tensor.CopyFrom(helper.make_tensor("logarithms", TensorProto.FLOAT, [2], [11.5, 11.5]))
    proto.graph.node.insert(0, helper.make_node("Exp", ["logarithms"], ["sizes"]))
    proto.graph.node.insert(1, helper.make_node("Cast", ["sizes"], ["s"], to=TensorProto.INT64))
    onnx.save(proto, tmp_path / "grown.onnx")
    with (
        limited(8_000_000_000),
        pytest.raises(ModelError, match=r"'big' of node 'grows' .*takes 39\.\dGB; the limit is 8"),
    ):
        load_graph(tmp_path / "grown.onnx")


def test_inputs_beyond_memory_are_refused(tmp_path: Path) -> None:
    proto = two_inputs()
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(proto, tmp_path / "two.onnx")
    with limited(8_000_000_000), pytest.raises(ModelError, match=r"the limit is 8\.0GB"):
        load_graph(tmp_path / "two.onnx", shapes={"left": (10**9, 16), "right": (10**9, 16)})


def test_tensors_that_are_held_together_are_added_up(tmp_path: Path) -> None:
    """Four tensors of 4 kB: two are held while the second is made of the first, and three behind a branch."""
    names = ["x", "a", "b", "c"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1000]) for name in names]
    chain = [helper.make_node("Relu", [before], [name]) for before, name in pairwise(names)]
    branch = [*chain[:2], helper.make_node("Add", ["a", "b"], ["c"])]
    for nodes, needed in ((chain, 12_000), (branch, 16_000)):
        graph = helper.make_graph(nodes, "held", values[:1], values[-1:])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "held.onnx")
        with limited(needed):
            load_graph(tmp_path / "held.onnx")
        with limited(needed - 1), pytest.raises(ModelError, match="tensors must be held at node"):
            load_graph(tmp_path / "held.onnx")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(3 << 30)  # takes no space
    with pytest.raises(ModelError, match="an ONNX file ends at 2 GB"):
        load_graph(tmp_path / "large.onnx")


def spec(fit: Any) -> ImageSpec:
    return ImageSpec(input="x", height=64, width=64, fit=fit)


def test_images_are_refused_by_the_sizes_that_they_declare(tmp_path: Path) -> None:
    Image.new("L", (4000, 4000)).save(tmp_path / "flat.png")
    Image.new("RGB", (1, 100_000)).save(tmp_path / "line.png")
    label = LabelledFile("flat", tmp_path / "flat.png", tmp_path / "flat.png")
    with limited(16 * 16_000_000):
        assert open_image(tmp_path / "flat.png", 1).size == (4000, 4000)
        line = open_image(tmp_path / "line.png")
        for fit in ("letterbox", "stretch"):
            assert image_feed(line, spec(fit))[0].shape == (1, 3, 64, 64)
        with pytest.raises(DataError, match=r"line\.png', 1 x 100000 pixels, is brought to 64 x 6400000 .* 1\.2GB"):
            image_feed(line, spec("crop"))
    with limited(16 * 16_000_000 - 16):
        for read in (
            lambda: open_image(tmp_path / "flat.png"),
            lambda: read_label(label, (4000, 4000), 2, reduce_zero_label=False),
        ):
            with pytest.raises(DataError, match=r"flat\.png' declares 4000 x 4000 pixels.*limit is 16\.0MB, a 16th"):
                read()


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_image_of_absurd_size_is_refused_with_the_limit_of_its_reader(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"absurd.{kind}"
    Image.new("RGB", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    at, order = (16, "big") if kind == "png" else (18, "little")
    for place in (at, at + 4):
        data[place : place + 4] = (60_000).to_bytes(4, order)  # type: ignore[arg-type]
    if kind == "png":
        import zlib

        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"declares (more than 178956970 pixels|60000 x 60000 pixels)"):
        open_image(path)


def test_a_file_of_another_kind_with_the_suffix_of_an_image_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(DataError, match="cannot identify image file"):
        open_image(tmp_path / "a.png")


def test_arrays_are_refused_by_the_sizes_that_they_declare(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 1000)))
    with limited(1_000_000), pytest.raises(DataError, match=r"a\.npz' holds 8000128 bytes when it is unpacked"):
        read_arrays(tmp_path / "a.npz", ["x"])


# -- paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/hostname", "a/../../evil", "", "x\0y", "n" * 5000, "link", "deep/link"]
)
def test_a_path_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "evil").touch()
    for link in (folder / "link", folder / "deep" / "link"):
        link.symlink_to(tmp_path / "evil")
    with pytest.raises(DataError, match=r"'f' lists the image '.*', which (leads outside|no file can be called)"):
        path_inside(folder, name, "'f' lists the image", DataError)


def test_links_inside_a_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").touch()
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "named").symlink_to("real")
    assert path_inside(tmp_path / "named", "b", "", DataError).samefile(tmp_path / "real" / "a")


def _external(folder: Path) -> Callable[[], object]:
    onnx.save(two_inputs(), folder / "two.onnx", save_as_external_data=True, location="w", size_threshold=64)
    (folder / "w").rename(folder.parent / "evil.png")
    proto = onnx.load(folder / "two.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../evil.png" if entry.key == "location" else entry.value
    (folder / "two.onnx").write_bytes(proto.SerializeToString())
    return lambda: load_graph(folder / "two.onnx")


def _labels(folder: Path) -> Callable[[], object]:
    Image.new("RGB", (8, 8)).save(folder.parent / "evil.png")
    content = {"images": [{"id": 1, "file_name": "../evil.png"}], "categories": [{"id": 1, "name": "a"}]}
    (folder / "instances.json").write_text(json.dumps({**content, "annotations": []}))
    return lambda: read_coco(folder / "instances.json")


def _program(folder: Path) -> Callable[[], object]:
    onnx.save(two_inputs(), folder.parent / "evil.png")
    (folder / "program.json").write_text(json.dumps({"graphs": {"a": "../evil.png"}, "wires": []}))
    return lambda: bitalloy.load(folder)


@pytest.mark.parametrize("made", [_external, _labels, _program])
def test_files_name_nothing_outside_of_their_folder(
    made: Callable[[Path], Callable[[], object]], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    use = made(tmp_path / "folder")
    assert (tmp_path / "evil.png").is_file()
    with pytest.raises(BitalloyError, match=r"'\.\./evil\.png', which leads outside of '.*'. Refused"):
        use()


# -- names -------------------------------------------------------------------------------------------

EVIL = "=cmd|' /C calc'!A0</script><script>alert(1)</script><img src=x onerror=alert(2)>\n::error::owned\x1b[2J[/x]"
"""A name that is a formula, HTML, a workflow command of GitHub, an instruction to a terminal, and markup."""


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """A run on a model whose nodes, outputs and regions have that name."""
    folder = tmp_path_factory.mktemp("evil")
    proto = two_inputs()
    renamed = {proto.graph.output[0].name: f"={EVIL}"}
    proto.graph.output[0].name = f"={EVIL}"
    for number, node in enumerate(proto.graph.node):
        node.name = f"{EVIL}{number}"
        node.output[:] = [renamed.get(name, name) for name in node.output]
        node.metadata_props.add(key="bitalloy.region", value=f"+{EVIL}")
    onnx.save(proto, folder / "two.onnx")
    save_feeds(folder / "feeds", count=8, left=(1, 16), right=(1, 16))
    words = ("two.onnx", "--data", "feeds", "--samples", "1", "--probes", "1", "--effort", "quick", "--latency", "2x")
    return folder, Process(folder).run(*words)


def test_cells_that_begin_a_formula_are_texts(evil_run: tuple[Path, Command]) -> None:
    folder, done = evil_run
    done.succeeded()
    rows = list(csv.reader((folder / "run" / "sensitivity.csv").read_text().splitlines()))
    names = {cell for row in rows[1:] for cell in (*row[:4], row[-1])}
    assert any("cmd|" in name for name in names)
    assert not [name for name in names if name[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")]
    assert all(len(row) == len(rows[0]) and float(row[4]) > -300 for row in rows[1:])


def test_the_report_holds_names_as_texts(evil_run: tuple[Path, Command]) -> None:
    page = (evil_run[0] / "run" / "report.html").read_text()
    assert "cmd|" in page and "onerror" in page
    assert "<script>alert" not in page and "<img src=x" not in page


def test_no_line_of_the_console_is_a_command(evil_run: tuple[Path, Command]) -> None:
    folder, done = evil_run
    line = Process(folder)
    shown = [done, line("plan", "run"), line("audit", "run")]
    shown += [line("sensitivity", "two.onnx", "--data", "feeds", "--samples", "1", "--probes", "1", "--out", "run")]
    text = "\n".join(one.succeeded().out + one.err for one in shown)
    assert "cmd|" in text and "\x1b[2J" not in text
    assert not [one for one in text.splitlines() if one.strip().startswith("::")]


def test_the_summary_of_a_step_holds_names_as_texts() -> None:
    limit = LimitStatus(kind="max_drop", name=EVIL, asked=1.0, got=2.0, verdict=Verdict.MISSED)
    checked = CheckedRun(run=EVIL, baseline=EVIL, verdict=Verdict.MISSED, limits=(limit,), passed=False, reason=EVIL)
    page = check_markdown(checked)
    assert "<" not in page and "\x1b" not in page and len(page.splitlines()) == 5
    assert page.splitlines()[-1].replace("\\|", "").count("|") == 4
    assert [note.count("\n") for note in failure_annotations(checked)] == [0]
    assert ElementTree.fromstring(junit_xml(checked)).attrib["failures"] == "1"
