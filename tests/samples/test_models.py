"""The packaged models are small, open with the core alone, and see what the sample shows."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from bitalloy import zoo
from bitalloy.model import load as graph
from bitalloy.runtime.ort import OrtSession
from bitalloy.samples.drawing import CLASSES
from bitalloy.samples.shapes import scene, write_coco
from bitalloy.tasks import find_task
from bitalloy.tasks.base import Interface

LARGEST = {"yolo11n-shapes": 6_000_000, "yolo11n-seg-shapes": 6_500_000, "segformer-b0-shapes": 8_000_000}
"""Bytes of each file."""
ALL = 40_000_000
"""Bytes of all files together."""
SEGMENTER = "yolo11n-seg-shapes"
SEMANTIC = "segformer-b0-shapes"


def test_files_are_small_and_each_has_a_name() -> None:
    files = {f.name: f for f in Path(str(resources.files("bitalloy.samples"))).glob("*.onnx")}
    assert set(files) == set(zoo.NAMES.values())
    assert sum(f.stat().st_size for f in files.values()) < ALL
    for name, limit in LARGEST.items():
        assert files[zoo.NAMES[name]].stat().st_size < limit


@pytest.mark.parametrize("name", zoo.NAMES)
def test_files_say_where_they_come_from(name: str) -> None:
    model = graph.load_graph(zoo.resolve(name).path)
    assert model.metadata["trained_by"].startswith("python reference/train_")
    assert all(c in model.metadata["names"] for c in CLASSES)
    assert zoo.resolve(name).sample


def test_masks_of_single_objects_cover_them() -> None:
    """Straight from the outputs: the best anchor of each object gives a mask that is close to the drawn one."""
    session = OrtSession(zoo.resolve(SEGMENTER).path)
    overlaps = []
    for index in range(8):
        drawn = scene(index, seed=5)
        found, prototypes = session.run({"images": drawn.image.transpose(2, 0, 1)[None] / np.float32(255)}).values()
        x, y = found[0, :2]
        for label, mask, box in zip(drawn.labels, drawn.masks(), drawn.boxes(), strict=True):
            inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
            anchor = found[0, :, np.argmax(np.where(inside, found[0, 4 + label], -1))]
            logits = np.tensordot(anchor[-32:], prototypes[0], 1).repeat(4, 0).repeat(4, 1)
            (left, top), (right, bottom) = (
                np.rint(anchor[:2] + side * anchor[2:4] / 2).astype(int) for side in (-1, 1)
            )
            inner = np.zeros_like(mask)
            inner[max(top, 0) : bottom, max(left, 0) : right] = True
            predicted = (logits > 0) & inner
            overlaps.append(np.count_nonzero(predicted & mask) / np.count_nonzero(predicted | mask))
    assert np.median(overlaps) > 0.8


def test_masks_are_measured_as_instances(tmp_path: Path) -> None:
    model = graph.load_graph(zoo.resolve(SEGMENTER).path)
    folder = write_coco(tmp_path / "val", count=16)
    interface = Interface(inputs=model.info.inputs, outputs=model.info.outputs, metadata=model.metadata)
    task = find_task(interface)
    assert task is not None and task.name == "instance"
    session = OrtSession(zoo.resolve(SEGMENTER).path)
    result = task.evaluate({"float": session.run}, task.open(folder / "instances.json", interface))
    found = {m.name: m.values["float"].value for m in result.metrics}
    assert found["box AP50-95"] > 0.5 and found["mask AP50-95"] > 0.4


def test_maps_of_classes_are_measured(tmp_path: Path) -> None:
    model = graph.load_graph(zoo.resolve(SEMANTIC).path)
    folder = write_coco(tmp_path / "val", count=32, size=256)
    interface = Interface(inputs=model.info.inputs, outputs=model.info.outputs, metadata=model.metadata)
    task = find_task(interface)
    assert task is not None and task.name == "semantic"
    session = OrtSession(zoo.resolve(SEMANTIC).path)
    result = task.evaluate({"float": session.run}, task.open(folder, interface))
    found = {m.name: m.values["float"].value for m in result.metrics}
    assert found["mIoU"] > 0.6 and found["pixel accuracy"] > 0.95
