"""Train SegFormer-B0 on the generated sample `shapes` from scratch on a CPU and write an ONNX file.

    python reference/train_semantic.py --work /tmp/semantic

The result is not packaged: it does not reach its goal yet, see README.md. Nine classes: background, then those of the
sample. Training starts on small images. `--work` receives `checkpoint.pt` every few minutes; the same command goes on
from it. At the end, or at once with `--export-only`, the averaged weights are written as a folder like those of the
hub, exported by `bitalloy.zoo`, and the *exported file* is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from bitalloy.samples import shapes
from bitalloy.zoo import find
from bitalloy.zoo.networks.segformer import Segmenter
from bitalloy.zoo.segformer import DEVIATION, HEADS, MEAN
from sample_file import evaluate, export
from training import Batch, Recipe, main

CLASSES = 1 + len(shapes.CLASSES)
IMAGE_SIZE = 256
OUTPUT = Path("segformer-b0-shapes.onnx")


def build() -> nn.Module:
    """The network as the zoo exports it."""
    return Segmenter(network())


def network() -> SegformerForSemanticSegmentation:
    """The network of transformers at the sizes of B0, without dropout: no image comes twice."""
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in find("segformer-b0")[1].architecture.items()}
    off = dict.fromkeys(("classifier_dropout_prob", "drop_path_rate", "hidden_dropout_prob"), 0.0)
    config = SegformerConfig(num_labels=CLASSES, num_attention_heads=HEADS, **sizes, **off)
    return SegformerForSemanticSegmentation(config)


def loss(model: nn.Module, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy per pixel, and the soft Dice loss of the classes, which weighs small and large classes the same."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (MEAN, DEVIATION))
    pixels = ((batch.images - mean) / deviation).contiguous(memory_format=torch.channels_last)
    logits = F.interpolate(model(pixels).float(), scale_factor=4, mode="bilinear", align_corners=False)
    table = torch.cat((torch.zeros(len(batch.labels), 1, dtype=torch.int64), batch.labels + 1), 1)
    wanted = table.gather(1, batch.instances.flatten(1).long()).view(batch.instances.shape)
    entropy = F.cross_entropy(logits, wanted)
    chances, truth = logits.softmax(1), F.one_hot(wanted, CLASSES).permute(0, 3, 1, 2)
    shared, both = (chances * truth).sum((0, 2, 3)), (chances + truth).sum((0, 2, 3))
    dice = 1 - (2 * shared[both > 1] / both[both > 1]).mean()
    hit = (logits.detach().argmax(1) == wanted).float().mean()
    return entropy + dice, {"entropy": entropy.item(), "dice": dice.item(), "right": hit.item()}


def finish(state: dict[str, Any], output: Path, work: Path) -> dict[str, Any]:
    """Write the averaged weights as the hub keeps them, export and measure them."""
    model = network()
    Segmenter(model).load_state_dict(state["average"])
    folder = work / output.stem
    model.save_pretrained(folder)
    names = ("background", *shapes.CLASSES)
    export(folder, output, variant="segformer-b0", size=IMAGE_SIZE, names=names, state=state)
    return evaluate(output, work / "val", labels="")


RECIPE = Recipe(
    build=build,
    loss=loss,
    stages=((128, 1600), (192, 200), (256, 200)),
    learning_rate=1e-3,
    final_rate=1e-5,
    bfloat16=True,
)


if __name__ == "__main__":
    main(__doc__, RECIPE, OUTPUT, finish)
