"""Train YOLO11n on the generated sample `shapes` from scratch on a CPU and write the package's ONNX file.

    python reference/train_detector.py --work /tmp/detector

Training starts on small images and ends at 320 pixels. `--work` receives `checkpoint.pt` every few minutes; the same
command goes on from it. At the end, or at once with `--export-only`, the averaged weights are written as
`yolo11n-shapes.pt`, exported by `bitalloy.zoo`, and the *exported file* is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitalloy.samples import shapes
from bitalloy.zoo.networks.yolo11 import STRIDES, DetectHead, Yolo11
from detection_loss import detection_loss
from sample_file import evaluate, export
from training import Batch, Recipe, main

IMAGE_SIZE = 320
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "bitalloy" / "samples" / "yolo11n-shapes.onnx"


def build() -> nn.Module:
    """YOLO11n with random weights."""
    model = Yolo11(len(shapes.CLASSES))
    head = model.model[-1]
    assert isinstance(head, DetectHead)
    head.init_bias(IMAGE_SIZE)
    return model


def loss(model: nn.Module, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
    """Box, class and distribution losses."""
    assert isinstance(model, Yolo11)
    head = model.model[-1]
    assert isinstance(head, DetectHead)
    raw = model(batch.images.to(torch.float32, memory_format=torch.channels_last) / 255)
    side = batch.images.shape[-1]
    anchors, strides = head.anchors([(side // s, side // s) for s in STRIDES])
    found = detection_loss(raw, anchors, strides, batch.labels, batch.boxes)
    return found.total, found.parts


def finish(state: dict[str, Any], output: Path, work: Path) -> dict[str, Any]:
    """Write the averaged weights under the published names, export and measure them."""
    weights = work / f"{output.stem}.pt"
    torch.save(state["average"], weights)
    export(weights, output, variant="yolo11n", size=IMAGE_SIZE, names=shapes.CLASSES, state=state)
    return evaluate(output, work / "val", labels="instances.json")


RECIPE = Recipe(
    build=build,
    loss=loss,
    stages=((192, 500), (256, 300), (320, 300)),
    learning_rate=2e-3,
    final_rate=2e-5,
)


if __name__ == "__main__":
    main(__doc__, RECIPE, OUTPUT, finish)
