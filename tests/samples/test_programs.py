"""The packaged programs are small, open with the core alone, and see what the sample shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitalloy import zoo
from bitalloy.program import load_program
from bitalloy.runtime import OrtSession
from bitalloy.samples.shapes import scene, write_coco
from bitalloy.targets.base import macs
from bitalloy.tasks import promptable
from bitalloy.tasks.base import Interface
from bitalloy.zoo import mobilesam

PROMPTED = "mobilesam-shapes"
LARGEST = {PROMPTED: 8_000_000}
"""Bytes of all files of a program."""
SHAPES = {"decoder:point_coords": (1, 2, 2), "decoder:point_labels": (1, 2)}
MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
"""Of the published preparation of images, on 0..255."""


def sessions() -> tuple[OrtSession, OrtSession]:
    folder = zoo.resolve(PROMPTED).path
    return OrtSession(folder / "encoder.onnx"), OrtSession(folder / "decoder.onnx")


@pytest.mark.parametrize("name", zoo.PROGRAMS)
def test_folders_are_small_and_say_where_they_come_from(name: str) -> None:
    source = zoo.resolve(name)
    assert source.sample
    assert sum(f.stat().st_size for f in source.path.iterdir()) < LARGEST[name]
    for part in load_program(source.path, shapes=SHAPES).graphs.values():
        assert part.metadata["trained_by"].startswith("python reference/train_")
        assert part.metadata["bitalloy.variant"] == name


def test_operations_are_those_that_the_zoo_states() -> None:
    graphs = load_program(zoo.resolve(PROMPTED).path, shapes=SHAPES).graphs.values()
    assert 2 * sum(macs(n) for g in graphs for n in g.nodes) / 1e9 == pytest.approx(mobilesam.SHAPES.flops_b, rel=1e-3)


def test_a_program_opens_without_torch_and_the_network_library() -> None:
    code = (
        "import sys; from bitalloy import zoo; from bitalloy.program import load_program; "
        f"load_program(zoo.resolve({PROMPTED!r}).path, shapes={SHAPES!r}); "
        "assert not {'torch', 'kornia'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["box", "point"])
def test_masks_cover_what_the_prompt_means(kind: str) -> None:
    """Straight from the outputs, on new scenes: no code of the task is used."""
    encoder, decoder = sessions()
    overlaps = []
    for index in range(12):
        drawn = scene(index, seed=7, size=224)
        image = ((drawn.image - MEAN) / DEVIATION).transpose(2, 0, 1)[None].astype(np.float32)
        embeddings = encoder.run({"image": image})["image_embeddings"]
        for mask, box, point in zip(drawn.masks(), drawn.boxes(), drawn.points(), strict=True):
            coords, labels = (box.reshape(2, 2), [2, 3]) if kind == "box" else ([point, [0, 0]], [1, -1])
            feeds = {
                "image_embeddings": embeddings,
                "point_coords": np.array([coords], np.float32),
                "point_labels": np.array([labels], np.float32),
            }
            low, quality = decoder.run(feeds).values()
            best = 0 if kind == "box" else 1 + int(quality[0, 1:].argmax())
            found = low[0, best].repeat(4, 0).repeat(4, 1) > 0
            overlaps.append(np.count_nonzero(found & mask) / np.count_nonzero(found | mask))
    assert np.mean(overlaps) > 0.55  # cells of 4 x 4 pixels blunt small shapes


def test_the_task_measures_them(tmp_path: Path) -> None:
    graphs = load_program(zoo.resolve(PROMPTED).path, shapes=SHAPES).graphs
    encoder, decoder = graphs["encoder"].info, graphs["decoder"].info
    interface = Interface(inputs=(*encoder.inputs, *decoder.inputs[1:]), outputs=decoder.outputs)
    data = promptable.open_prompts(write_coco(tmp_path / "val", count=16, size=224) / "instances.json", interface)
    encode, decode = (session.run for session in sessions())
    result = promptable.evaluate_prompts({"float": promptable.join(encode, decode)}, data)
    found = {m.name: m.values["float"].value for m in result.metrics}
    assert found["mIoU, box prompts"] > 0.65 and found["mIoU, point prompts"] > 0.6
