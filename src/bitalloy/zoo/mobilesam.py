"""MobileSAM for promptable segmentation: TinyViT image encoder, and prompt encoder with mask decoder, from kornia.

Two graphs, because one image is encoded once and then asked many prompts. The published `mobile_sam.pt` is a plain
state dict with the tensor names of the official package, which are also kornia's.

A reduced variant, for the embedded sample, has the same modules with fewer channels and blocks.

Images are resized so that the long side is 1024 (224 in the reduced variant), normalised on the 0-255 scale by mean
(123.675, 116.28, 103.53) and deviation (58.395, 57.12, 57.375), and padded with zeros at the right and the bottom.
Masks are resized bilinearly to that side, cropped to the resized image, resized to the original and cut at 0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy.core.errors import ModelError
from bitalloy.model import relevance
from bitalloy.model.graphs.wiring import write_wiring
from bitalloy.zoo import checkpoints, downloads
from bitalloy.zoo.base import RANDOM_WEIGHTS, Exported, Family, Options, ProtectionAdvice, Published, Remote, Variant
from bitalloy.zoo.exporting import ExportFacts, Signature, export_graph, random_image

_EXTRA = "mobilesam"
SAM_SIDE = 1024
"""Side of the padded square image in pixels."""
SAM_MEAN, SAM_DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SAM_IMAGE = {"fit": "stretch", "mean": [v / 255 for v in SAM_MEAN], "std": [v / 255 for v in SAM_DEVIATION]}
"""Preparation of images; that the longest side is fitted and the rest is zero belongs to the task."""
OBJECT, BACKGROUND, TOP_LEFT, BOTTOM_RIGHT, PADDING = 1.0, 0.0, 2.0, 3.0, -1.0
"""Labels that say what a prompt point means."""
MOBILESAM_REGIONS = (
    (r"image_encoder/patch_embed", "image encoder/stem"),
    (r"image_encoder/layers/layers\.(\d)/blocks\.(\d+)", r"image encoder/stage \1/block \2"),
    (r"image_encoder/layers/layers\.(\d)", r"image encoder/stage \1"),
    (r"image_encoder", "image encoder"),
    (r"prompt_encoder", "prompt encoder"),
    (r"mask_decoder/transformer/layers\.(\d)", r"mask decoder/two-way layer \1"),
    (r"mask_decoder/output_upscaling", "mask decoder/upscaling"),
    (r"mask_decoder/output_hypernetworks_mlps\.(\d)", r"mask decoder/mask \1"),
    (r"mask_decoder/iou_prediction_head", "mask decoder/IoU head"),
    (r"mask_decoder", "mask decoder"),
)
MOBILESAM_PROTECTION = (
    ProtectionAdvice(
        pattern="*/mask_decoder/*",
        reason="Activations of the decoder's attention have extreme outliers and two modes; it takes 5 % of the time.",
        source="https://arxiv.org/abs/2405.03144, https://arxiv.org/abs/2503.06515",
    ),
    ProtectionAdvice(
        pattern="*/prompt_encoder/*",
        reason="Coordinates are encoded by sines of large phases.",
        source="https://arxiv.org/abs/2304.02643, appendix A",
    ),
)
MOBILESAM_WIRES = ("encoder:image_embeddings -> decoder:image_embeddings",)


def prompts(
    size: tuple[int, int],
    *,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    box: tuple[float, float, float, float] | None = None,
    side: int = SAM_SIDE,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the decoder's inputs for points, a box, or both.

    Args:
        size: height and width of the original image in pixels.
        points: (N, 2) x, y in pixels of the original image.
        labels: (N,) 1 for a point on the object, 0 for one on the background.
        box: x1, y1, x2, y2 in pixels of the original image.
        side: side of the padded image in pixels.

    Returns:
        `point_coords` (1, M, 2) and `point_labels` (1, M). A prompt without a box ends with a padding point.
    """
    coords = np.zeros((0, 2)) if points is None else np.asarray(points, np.float64).reshape(-1, 2)
    kinds = list(np.full(len(coords), OBJECT) if labels is None else np.asarray(labels, np.float64))
    if box is not None:
        coords = np.concatenate((coords, np.reshape(box, (2, 2))))
        kinds += [TOP_LEFT, BOTTOM_RIGHT]
    coords = coords * (side / max(size))
    if box is None:
        coords, kinds = np.concatenate((coords, np.zeros((1, 2)))), [*kinds, PADDING]
    return coords[None].astype(np.float32), np.array([kinds], np.float32)


def export_mobilesam(variant: Variant, checkpoint: str | Path | None, options: Options, folder: Path) -> Exported:
    """Export MobileSAM: write `encoder.onnx`, `decoder.onnx` and `program.json`.

    Raises:
        ModelError: the size is not the variant's, or the checkpoint is not of this variant.
    """
    import torch

    from bitalloy.zoo.networks.mobilesam import Encoder, PromptedDecoder, build_sam

    side = variant.size[0]
    numbers: dict[str, Any] = dict(variant.architecture)
    if options.size not in (None, variant.size):
        raise ModelError(f"MobileSAM is made for images padded to {side}x{side}; leave --image-size out.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        sam = build_sam(numbers, side).eval()
        if checkpoint != RANDOM_WEIGHTS:
            source = downloads.locate(checkpoint, variant.remote, extra=_EXTRA)
            state = checkpoints.read(source, trust=options.trust_checkpoint, extra=_EXTRA)
            checkpoints.load_weights(sam, state, source=source, name=variant.name)
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (SAM_MEAN, SAM_DEVIATION))
        image = (255 * random_image(variant.size) - mean) / deviation
        encoder, decoder = Encoder(sam).eval(), PromptedDecoder(sam).eval()
        embeddings = torch.randn(1, numbers["width"], side // 16, side // 16)  # the encoder ends with a norm
        box, points = (100, 200, 600, 700), np.array([[300, 400], [800, 50]])  # of an image of 1024 x 1024
        given = [
            prompts((SAM_SIDE, SAM_SIDE), box=box, side=side),
            prompts((SAM_SIDE, SAM_SIDE), points=points, labels=np.array([1, 0]), side=side),
            prompts((SAM_SIDE, SAM_SIDE), points=points[:1], box=box, side=side),
        ]
    asked = [(embeddings, torch.from_numpy(coords), torch.from_numpy(labels)) for coords, labels in given]
    graphs = {name: folder / f"{name}.onnx" for name in ("encoder", "decoder")}
    first = Signature(inputs=("image",), outputs=("image_embeddings",))
    second = Signature(
        inputs=("image_embeddings", "point_coords", "point_labels"),
        outputs=("low_res_masks", "iou_predictions"),
        open_axes={"point_coords": {1: "points"}, "point_labels": {1: "points"}},
    )
    shapes = {"point_coords": (1, 2, 2), "point_labels": (1, 2)}
    facts = ExportFacts(
        family="mobilesam",
        variant=variant.name,
        regions=MOBILESAM_REGIONS,
        protect=MOBILESAM_PROTECTION,
        image=SAM_IMAGE,
    )
    prompted = replace(facts, shapes=shapes)
    notes = (
        export_graph(encoder, [(image,)], graphs["encoder"], first, facts),
        export_graph(decoder, asked, graphs["decoder"], second, prompted),
        variant.note,
        f"Weights: {variant.remote.licence}.",
    )
    write_wiring(folder, {name: path.name for name, path in graphs.items()}, MOBILESAM_WIRES)
    return Exported(graphs=graphs, wires=MOBILESAM_WIRES, protect=MOBILESAM_PROTECTION, notes=notes)


MOBILESAM_VARIANTS = (
    Variant(
        name="mobilesam",
        parameters_m=9.804,
        flops_b=81.159,
        work="image and one box",
        size=(SAM_SIDE, SAM_SIDE),
        architecture={
            "encoder_widths": (64, 128, 160, 320), "encoder_depths": (2, 2, 6, 2), "encoder_heads": (2, 4, 5, 10),
            "encoder_windows": (7, 7, 14, 7), "classes": 1000, "width": 256, "heads": 8, "mlp": 2048,
        },
        published=Published(
            parameters_m=9.66,
            accuracy={"mIoU with SAM ViT-H, two points": 0.73},
            gpu_ms=12.0,
            setup="one GPU: 8 ms encoder, 4 ms decoder",
            source="https://github.com/ChaoningZhang/MobileSAM",
        ),
        remote=Remote(
            file="mobile_sam.pt",
            url="https://github.com/ChaoningZhang/MobileSAM/raw/a509aac54fdd7af59f843135f2f7cee307283c88/weights/mobile_sam.pt",
            licence="Apache-2.0",
        ),
        note="The published 9.66 M parameters are not reproducible: the official package has 10,130,092, of which "
        "321,640 belong to a classification head that is never used and is not exported.",
    ),
)  # fmt: skip
MOBILESAM_SHAPES = Variant(
    name="mobilesam-shapes",
    parameters_m=2.219,
    flops_b=0.896,
    work="image and one box",
    size=(224, 224),
    architecture={
        "encoder_widths": (32, 64, 96, 128), "encoder_depths": (2, 2, 4, 2), "encoder_heads": (1, 2, 3, 4),
        "encoder_windows": (7, 7, 14, 7), "classes": 1, "width": 128, "heads": 4, "mlp": 1024,
    },
    published=Published(source="reference/README.md"),
    remote=Remote(file="mobilesam-shapes.pt, from reference/train_promptable.py", licence="Apache-2.0"),
    note="A reduced MobileSAM for the embedded sample.",
)  # fmt: skip
"""The reduced variant of the embedded sample, trained by `reference/train_promptable.py`."""
MOBILESAM = Family(
    name="mobilesam",
    task="promptable segmentation",
    extra=_EXTRA,
    packages={"torch": (2, 6), "kornia": (0, 9)},
    variants={v.name: v for v in MOBILESAM_VARIANTS},
    export=export_mobilesam,
    relevance=relevance.mobilesam,
)
