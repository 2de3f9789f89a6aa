"""Train YOLO11n-seg on the generated sample `shapes` from the packaged detector and write the package's ONNX file.

    python reference/train_instance.py --work /tmp/instance

What the two networks share starts from `yolo11n-shapes.onnx`; prototypes and mask coefficients start at random. First
they learn alone, then everything does, the detector at a low rate and with fixed statistics. `--work` receives
`checkpoint.pt` every few minutes; the same command goes on from it. At the end, or at once with `--export-only`, the
averaged weights are written as `yolo11n-seg-shapes.pt`, exported by `bitalloy.zoo`, and the *exported file* is
measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from onnx import numpy_helper
from torch import Tensor, nn

from bitalloy.samples import shapes
from bitalloy.zoo import SAMPLE, resolve
from bitalloy.zoo.networks.yolo11 import STRIDES, SegmentHead, Yolo11
from bitalloy.zoo.networks.yolo11_blocks import Conv
from detection_loss import Assignment, detection_loss
from sample_file import evaluate, export
from training import Batch, Recipe, collate, main

IMAGE_SIZE = 320
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "bitalloy" / "samples" / "yolo11n-seg-shapes.onnx"
NEW = ("model.23.proto.", "model.23.cv4.")
"""Parameters that the detector does not have."""
LOW_RATE = 0.1
"""Of the detector's parameters, beside the new ones."""
ALONE = 0.6
"""Part of the training in which the new parameters learn alone."""
MASK_GAIN = 7.5
STATISTICS_IMAGES = 64
"""Scenes from which the folded normalisation is recovered."""


def build() -> nn.Module:
    """YOLO11n-seg with the weights of the packaged detector."""
    model = Yolo11(len(shapes.CLASSES), masks=True)
    unfold(model, packaged_weights())
    return model


def packaged_weights() -> dict[str, Tensor]:
    """Parameter name -> weights of the packaged detector, whose normalisation is folded."""
    proto = onnx.load(resolve(SAMPLE).path)
    arrays = ((t.name.removesuffix(".float16"), numpy_helper.to_array(t)) for t in proto.graph.initializer)
    return {name: torch.tensor(a).float() for name, a in arrays if name.endswith((".weight", ".bias"))}


@torch.no_grad()
def unfold(model: Yolo11, folded: dict[str, Tensor]) -> None:
    """Give a network with normalisation the weights of a folded one, in place; its outputs stay the same.

    The statistics of each normalisation become those of its input on generated scenes, its weight and bias what
    undoes them.
    """
    own = dict(model.named_parameters())
    for name, value in folded.items():
        if name in own:
            own[name].copy_(value)
    biases = {c.conv: folded[f"{n}.conv.bias"] for n, c in model.named_modules() if f"{n}.conv.bias" in folded}

    def measure(conv: Conv, inputs: tuple[Tensor]) -> None:
        found = conv.conv(inputs[0])
        variance, mean = torch.var_mean(found, (0, 2, 3))
        norm: Any = conv.bn
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean + biases[conv.conv])

    handles = [
        module.register_forward_pre_hook(measure)
        for module in model.modules()
        if isinstance(module, Conv) and module.conv in biases
    ]
    scenes = [shapes.scene(i, size=IMAGE_SIZE, split="train") for i in range(STATISTICS_IMAGES)]
    model.eval()(collate(scenes).images / 255)
    for handle in handles:
        handle.remove()


def loss(model: nn.Module, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
    """Detection and mask losses."""
    alone = done < ALONE
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dfl." not in name and (not alone or name.startswith(NEW)))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(name.startswith(NEW))
    assert isinstance(model, Yolo11)
    head = model.model[-1]
    assert isinstance(head, SegmentHead)
    pixels = batch.images.to(torch.float32, memory_format=torch.channels_last) / 255
    boxes, scores, coefficients, prototypes = (part.float() for part in model(pixels))
    side = batch.images.shape[-1]
    anchors, strides = head.anchors([(side // s, side // s) for s in STRIDES])
    found = detection_loss((boxes, scores), anchors, strides, batch.labels, batch.boxes)
    masks = mask_loss(coefficients, prototypes, found.goal, batch)
    return found.total + MASK_GAIN * masks, found.parts | {"mask": masks.item()}


def mask_loss(coefficients: Tensor, prototypes: Tensor, goal: Assignment, batch: Batch) -> Tensor:
    """Cross entropy of each chosen anchor's mask with the covered part of each prototype pixel, inside its box.

    Args:
        coefficients: (B, 32, A).
        prototypes: (B, 32, H/4, W/4).
        goal: which instance each anchor predicts.
        batch: what is in the images.
    """
    step = batch.images.shape[-1] // prototypes.shape[-1]
    centres = torch.arange(prototypes.shape[-1]) * step + step / 2
    total, weights = prototypes.sum() * 0, goal.scores.sum().clamp(min=1)
    for i, hit in enumerate(goal.foreground):
        if not hit.any():
            continue
        logits = torch.einsum("ck,chw->khw", coefficients[i][:, hit], prototypes[i])
        ids = torch.arange(1, batch.labels.shape[1] + 1)[:, None, None]
        covered = F.avg_pool2d((batch.instances[i] == ids).float(), step)
        own = goal.index[i][hit]
        x1, y1, x2, y2 = batch.boxes[i][:, :, None].unbind(1)
        across = (centres > x1 - step / 2) & (centres < x2 + step / 2)  # (M, W)
        down = (centres > y1 - step / 2) & (centres < y2 + step / 2)
        inside = (down[:, :, None] & across[:, None]).float()[own]
        entropy = F.binary_cross_entropy_with_logits(logits, covered[own], reduction="none")
        each = (entropy * inside).sum((1, 2)) / inside.sum((1, 2))
        total = total + (each * goal.scores[i].sum(-1)[hit]).sum()
    return total / weights


def finish(state: dict[str, Any], output: Path, work: Path) -> dict[str, Any]:
    """Write the averaged weights under the published names, export and measure them."""
    weights = work / f"{output.stem}.pt"
    torch.save(state["average"], weights)
    export(weights, output, variant="yolo11n-seg", size=IMAGE_SIZE, names=shapes.CLASSES, state=state)
    return evaluate(output, work / "val", labels="instances.json")


RECIPE = Recipe(
    build=build,
    loss=loss,
    stages=((320, 700),),
    learning_rate=2e-3,
    final_rate=2e-5,
    rate_of=lambda name: 1.0 if name.startswith(NEW) else LOW_RATE,
    bfloat16=True,
)


if __name__ == "__main__":
    main(__doc__, RECIPE, OUTPUT, finish)
