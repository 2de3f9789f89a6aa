"""Train a small MobileSAM on the generated sample `shapes` from scratch on a CPU and write the package's program.

    python reference/train_promptable.py --work /tmp/promptable

Every shape of an image is asked for twice, by its box and by a random point on it; the image is encoded once. The first
mask answers every prompt, of the other three only the best one learns from it, and the predicted IoUs follow the real
ones, as SAM was trained. Training starts on small images. `--work` receives `checkpoint.pt` every few minutes; the same
command goes on from it. At the end, or at once with `--export-only`, the averaged weights are written as
`mobilesam-shapes.pt` in the layout of the published checkpoint, exported by `bitalloy.zoo`, and the *exported program*
is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from bitalloy.zoo.mobilesam import MOBILESAM_SHAPES, SAM_DEVIATION, SAM_MEAN, export_mobilesam
from bitalloy.zoo.networks.mobilesam import build_sam, resize_sam
from program_file import evaluate_promptable
from program_file import export as export_program
from training import Batch, Recipe, main

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "bitalloy" / "samples" / "mobilesam-shapes"
FOCUS = 20.0
"""Weight of the focal loss beside the Dice loss, as in SAM."""


def loss(sam: Any, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
    """Focal and Dice loss of the first mask and of the best other one, and squared errors of the predicted IoUs."""
    side = batch.images.shape[-1]
    resize_sam(sam, side)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (SAM_MEAN, SAM_DEVIATION))
    pixels = ((batch.images - mean) / deviation).contiguous(memory_format=torch.channels_last)
    embeddings = sam.image_encoder(pixels)
    image, instance = (batch.labels >= 0).nonzero(as_tuple=True)  # of every prompt
    masks = (batch.instances[image] == (instance + 1)[:, None, None]).float()
    spots = torch.multinomial(masks.flatten(1), 1)
    points = torch.stack((spots % side, spots // side), -1) + 0.5
    inside = torch.ones(len(points), 1)
    boxed, _ = sam.prompt_encoder(points=None, boxes=batch.boxes[image, instance], masks=None)
    pointed, dense = sam.prompt_encoder(points=(points, inside), boxes=None, masks=None)
    # the decoder repeats one image for all prompts; here every prompt brings its own image
    asked = (embeddings[image] + dense).repeat(2, 1, 1, 1)
    low, quality = sam.mask_decoder.predict_masks(
        torch.zeros(1, *asked.shape[1:]), sam.prompt_encoder.get_dense_pe(), torch.cat((boxed, pointed)), asked
    )
    truth = F.avg_pool2d(masks[:, None], 4).repeat(2, 1, 1, 1)
    each, overlap = differences(low.float(), truth)
    best = each[:, 1:].min(1).values
    misjudged = F.mse_loss(quality.float(), overlap)
    box, point = overlap[:, 0].chunk(2)[0].mean(), overlap[:, 1:].max(1).values.chunk(2)[1].mean()
    parts = {"first": each[:, 0].mean().item(), "best": best.mean().item(), "IoU": misjudged.item()}
    total = each[:, 0].mean() + best.mean() + misjudged
    return total, parts | {"box": box.item(), "point": point.item()}


def differences(low: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (P, 4) and overlaps (P, 4) of mask logits (P, 4, h, w) with the covered part of each cell (P, 1, h, w)."""
    wanted = truth.expand_as(low)
    chance = low.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(low, wanted, reduction="none")
    focal = ((chance - wanted).detach().square() * entropy).mean((2, 3))
    dice = 1 - (2 * (chance * wanted).sum((2, 3)) + 1) / ((chance + wanted).sum((2, 3)) + 1)
    found, there = low.detach() > 0, wanted >= 0.5
    overlap = (found & there).sum((2, 3)) / (found | there).sum((2, 3)).clamp(min=1)
    return FOCUS * focal + dice, overlap


def network() -> nn.Module:
    """The network before the first step."""
    return build_sam(MOBILESAM_SHAPES.architecture, MOBILESAM_SHAPES.size[0])


def finish(state: dict[str, Any], output: Path, work: Path) -> dict[str, Any]:
    """Write the checkpoint and the program, and measure the program."""
    checkpoint = work / f"{MOBILESAM_SHAPES.name}.pt"
    torch.save(state["average"], checkpoint)
    export_program(checkpoint, output, variant=MOBILESAM_SHAPES, by=export_mobilesam, state=state)
    return {"bytes": sum(f.stat().st_size for f in output.iterdir())} | evaluate_promptable(output, work / "val")


RECIPE = Recipe(
    build=network,
    loss=loss,
    stages=((112, 1200), (224, 400)),
    learning_rate=1.5e-3,
    final_rate=1e-5,
    bfloat16=True,
)


if __name__ == "__main__":
    main(__doc__, RECIPE, OUTPUT, finish)
