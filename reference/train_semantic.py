"""Train SegFormer-B0 further on the generated sample `shapes` on a CPU and write the package's ONNX file.

    python reference/train_semantic.py --work /tmp/semantic

Nine classes: background, then those of the sample. Training goes on from the packaged file, and starts from random
weights where there is none. `--work` receives `checkpoint.pt` every few minutes; the same command goes on from it. At
the end, or at once with `--export-only`, the averaged weights are written as a folder like those of the hub, exported
by `bitalloy.zoo`, and the *exported file* is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from bitalloy.data.images import IMAGENET_MEAN, IMAGENET_STD
from bitalloy.samples import shapes
from bitalloy.zoo import find
from bitalloy.zoo.networks.segformer import Segmenter
from bitalloy.zoo.segformer import ATTENTION_HEADS
from sample_file import evaluate, export
from training import Batch, Recipe, collate, main

CLASSES = 1 + len(shapes.CLASSES)
IMAGE_SIZE = 256
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "bitalloy" / "samples" / "segformer-b0-shapes.onnx"
STATISTICS_IMAGES = 64
"""Scenes from which the folded normalisation is recovered."""


def build() -> nn.Module:
    """The network as the zoo exports it, with the weights of the packaged file."""
    model = Segmenter(network())
    if OUTPUT.exists():
        restore(model, OUTPUT)
    return model


def history() -> list[str]:
    """How the packaged file was trained."""
    if not OUTPUT.exists():
        return []
    metadata = {p.key: p.value for p in onnx.load(OUTPUT).metadata_props}
    return [metadata["trained_by"].removeprefix("python reference/train_semantic.py ")]


@torch.no_grad()
def restore(model: nn.Module, path: Path) -> None:
    """Give a network the weights of its exported file, in place; its outputs stay the same.

    Matrices stand transposed in the file, under the names of their nodes. The one normalisation by statistics is folded
    into the convolution before it: its statistics become those of that convolution on generated scenes, its weight and
    bias what undoes them.
    """
    proto = onnx.load(path)
    arrays = {t.name.removesuffix(".float16"): torch.tensor(numpy_helper.to_array(t)) for t in proto.graph.initializer}
    own = dict(model.named_parameters())
    found = {name: value for name, value in arrays.items() if name in own}
    for node in proto.graph.node:
        name = node.name.rpartition("/")[0].removeprefix("/").replace("/", ".")
        if node.op_type == "MatMul" and node.input[1] in arrays:
            found[f"{name}.weight"] = arrays[node.input[1]].T
        elif name == "decode_head.linear_fuse":
            found["decode_head.linear_fuse.weight"], folded = (arrays[i] for i in node.input[1:])
    for name in own.keys() - {"decode_head.batch_norm.weight", "decode_head.batch_norm.bias"}:
        own[name].copy_(found[name])
    head: Any = model.decode_head
    norm = head.batch_norm

    def measure(_: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean + folded)

    handle = norm.register_forward_pre_hook(measure)
    scenes = [shapes.scene(i, size=IMAGE_SIZE, split="train") for i in range(STATISTICS_IMAGES)]
    model.eval()(normalised(collate(scenes).images))
    handle.remove()


def normalised(images: Tensor) -> Tensor:
    """Pixels as the network takes them."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


def network() -> SegformerForSemanticSegmentation:
    """The network of transformers at the sizes of B0, without dropout: no image comes twice."""
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in find("segformer-b0")[1].architecture.items()}
    off = dict.fromkeys(("classifier_dropout_prob", "drop_path_rate", "hidden_dropout_prob"), 0.0)
    config = SegformerConfig(num_labels=CLASSES, num_attention_heads=ATTENTION_HEADS, **sizes, **off)
    return SegformerForSemanticSegmentation(config)


def loss(model: nn.Module, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy per pixel, and the soft Dice loss of the classes, which weighs small and large classes the same."""
    logits = F.interpolate(
        model(normalised(batch.images)).float(), scale_factor=4, mode="bilinear", align_corners=False
    )
    table = torch.cat((torch.zeros(len(batch.labels), 1, dtype=torch.int64), batch.labels + 1), 1)
    wanted = table.gather(1, batch.instances.flatten(1).long()).view(batch.instances.shape)
    entropy = F.cross_entropy(logits, wanted)
    chances, truth = logits.softmax(1), F.one_hot(wanted, CLASSES).permute(0, 3, 1, 2)
    shared, both = (chances * truth).sum((0, 2, 3)), (chances + truth).sum((0, 2, 3))
    dice = 1 - (2 * shared[both > 1] / both[both > 1]).mean()
    hit = (logits.detach().argmax(1) == wanted).float().mean()
    return entropy + dice, {"entropy": entropy.item(), "dice": dice.item(), "right": hit.item()}


def orthogonal(name: str) -> bool:
    """The matrices of the encoder's blocks and of the projections."""
    return name.endswith(("_proj.weight", "fc1.weight", "fc2.weight", ".proj.weight")) and "embeddings" not in name


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
    stages=((192, 1500), (256, 150)),
    learning_rate=1e-3,
    final_rate=1e-5,
    orthogonal=orthogonal,
    history=history,
    bfloat16=True,
)


if __name__ == "__main__":
    main(__doc__, RECIPE, OUTPUT, finish)
