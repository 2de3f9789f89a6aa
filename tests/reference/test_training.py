"""The training scripts: where instance segmentation starts, its loss, and that its checkpoints go through the zoo."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bitalloy import zoo
from bitalloy.runtime.ort import OrtSession
from bitalloy.samples import shapes

torch = pytest.importorskip("torch")

REFERENCE = Path(__file__).resolve().parents[2] / "reference"


@pytest.fixture(scope="module")
def instance() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        yield importlib.import_module("train_instance")


@pytest.fixture(scope="module")
def start(instance: ModuleType) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instance, "STATISTICS_IMAGES", 8)  # how many decides the scale of what is learned, no output
        return instance.build().eval()


def test_training_starts_from_the_outputs_of_the_packaged_detector(start: Any) -> None:
    session = OrtSession(zoo.resolve(zoo.SAMPLE).path)
    feed = shapes.scene(3, seed=9).image.transpose(2, 0, 1)[None] / np.float32(255)
    want = next(iter(session.run({"images": feed}).values()))
    with torch.no_grad():
        got = start(torch.from_numpy(feed))[0][:, : want.shape[1]].numpy()
    for part in (np.s_[:, :4], np.s_[:, 4:]):
        assert np.abs(got[part] - want[part]).max() <= 1e-4 * np.abs(want[part]).max()


def test_checkpoints_have_the_published_layout_and_go_through_the_zoo(start: Any, tmp_path: Path) -> None:
    torch.save(start.state_dict(), tmp_path / "weights.pt")
    options = zoo.Options(size=(64, 64))
    exported = zoo.export_model(
        "yolo11n-seg", checkpoint=tmp_path / "weights.pt", folder=tmp_path / "out", options=options
    )
    outputs = OrtSession(exported.graphs["yolo11n-seg"]).run({"images": np.zeros((1, 3, 64, 64), np.float32)})
    assert [o.shape for o in outputs.values()] == [(1, 4 + 8 + 32, 84), (1, 32, 16, 16)]


def test_mask_loss_is_the_entropy_inside_the_box(instance: ModuleType) -> None:
    """One image, one instance of 8 x 8 pixels, one anchor: by hand, its box is four prototype pixels, all covered."""
    instances = torch.zeros(1, 16, 16, dtype=torch.uint8)
    instances[0, 4:12, 4:12] = 1
    batch = importlib.import_module("training").Batch(
        images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        labels=torch.tensor([[2]]),
        colors=torch.tensor([[0]]),
        boxes=torch.tensor([[[4.0, 4.0, 12.0, 12.0]]]),
        instances=instances,
    )
    goal = importlib.import_module("detection_loss").Assignment(
        foreground=torch.tensor([[True, False]]),
        boxes=torch.zeros(1, 2, 4),
        scores=torch.tensor([[[0.0, 3.0], [0.0, 0.0]]]),
        index=torch.zeros(1, 2, dtype=torch.int64),
    )
    prototypes = torch.full((1, 1, 4, 4), -50.0)  # outside the box nothing counts
    prototypes[0, 0, 1:3, 1:3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = instance.mask_loss(torch.ones(1, 1, 2), prototypes, goal, batch)
    want = np.log1p(np.exp(-np.array([1.0, 2.0, 3.0, 4.0]))).mean()
    assert got.item() == pytest.approx(want, rel=1e-5)
