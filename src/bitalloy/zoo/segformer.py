"""SegFormer (NVIDIA) for semantic segmentation, from transformers.

Published weights keep the tensor names of 2021; transformers renames them while loading. They come from a local folder,
a hub repository, or a file of the state dict.

Two protocols are in use, and their mIoU differs:

1. square: the image is stretched to 512 x 512 (640 x 640 for B5), as the published preprocessor configuration says.
2. official: the image keeps its aspect ratio (`bitalloy.tasks.semantic.official_size`); the graph needs `open_size`.

In both, pixels are RGB / 255, normalised by mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225), and logits
are resized bilinearly to the image before the argmax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitalloy.core.errors import ModelError
from bitalloy.data.images import IMAGENET_MEAN, IMAGENET_STD
from bitalloy.model import relevance
from bitalloy.zoo import checkpoints, downloads
from bitalloy.zoo.base import RANDOM_WEIGHTS, Exported, Family, Options, ProtectionAdvice, Published, Remote, Variant
from bitalloy.zoo.exporting import ExportFacts, Signature, export_graph, random_image

_EXTRA = "segformer"
ADE_CLASSES = 150
ATTENTION_HEADS = (1, 2, 5, 8)
"""Number of attention heads of the four stages."""
_TOTAL_STRIDE = 32
"""Total stride of the encoder in pixels."""
SEGFORMER_REGIONS = (
    (r"segformer/stages\.(\d)/patch_embeddings", r"encoder/stage \1/patch embedding"),
    (r"segformer/stages\.(\d)/blocks\.(\d+)/attention", r"encoder/stage \1/block \2/attention"),
    (r"segformer/stages\.(\d)/blocks\.(\d+)/mlp", r"encoder/stage \1/block \2/MLP"),
    (r"segformer/stages\.(\d)/blocks\.(\d+)", r"encoder/stage \1/block \2"),
    (r"segformer/stages\.(\d)", r"encoder/stage \1"),
    (r"segformer", "encoder"),
    (r"decode_head/linear_projections\.(\d)", r"decoder/projection of stage \1"),
    (r"decode_head/linear_fuse", "decoder/fusion"),
    (r"decode_head", "decoder"),
)
SEGFORMER_PROTECTION = (
    ProtectionAdvice(
        pattern="*/attention/Softmax",
        reason="Attention weights of many pixels lie far below one of 256 steps.",
        source="https://arxiv.org/abs/2509.10334",
    ),
    ProtectionAdvice(
        pattern="*/LayerNormalization",
        reason="Normalisation divides by a deviation that rounding of outlier channels changes.",
        source="https://github.com/open-mmlab/mmdeploy/issues/337",
    ),
)


def export_segformer(variant: Variant, checkpoint: str | Path | None, options: Options, folder: Path) -> Exported:
    """Write `<variant>.onnx`: `pixel_values` (1, 3, H, W), normalised RGB -> `logits` (1, classes, H/4, W/4).

    Raises:
        ModelError: the size is no multiple of 32, or the checkpoint is not of this variant.
    """
    import torch

    from bitalloy.zoo.networks.segformer import Segmenter

    height, width = size = options.size or variant.size
    if any(s % _TOTAL_STRIDE or s < _TOTAL_STRIDE for s in size):
        raise ModelError(f"SegFormer takes images whose sides are multiples of 32, but the size is {height}x{width}.")
    sizes = [size, (height, width + _TOTAL_STRIDE)] if options.open_size else [size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = Segmenter(_network(variant, checkpoint))
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        images = [((random_image(s) - mean) / deviation,) for s in sizes]
    axes = {"pixel_values": {2: "height", 3: "width"}, "logits": {2: "rows", 3: "columns"}}
    signature = Signature(inputs=("pixel_values",), outputs=("logits",), open_axes=axes if options.open_size else {})
    path = folder / f"{variant.name}.onnx"
    facts = ExportFacts(
        family="segformer",
        variant=variant.name,
        regions=SEGFORMER_REGIONS,
        protect=SEGFORMER_PROTECTION,
        shapes={"pixel_values": (1, 3, *size)} if options.open_size else {},
        image={"fit": "stretch", "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    )
    note = export_graph(network, images, path, signature, facts)
    protocol = (
        "Height and width are open: made for the official protocol, which keeps the aspect ratio."
        if options.open_size
        else f"Images are stretched to {height}x{width}; the official protocol keeps their aspect ratio (--open-size)."
    )
    return Exported(
        graphs={variant.name: path},
        protect=SEGFORMER_PROTECTION,
        notes=(note, protocol, f"Weights: {variant.remote.licence}."),
    )


def _network(variant: Variant, checkpoint: str | Path | None) -> Any:
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in variant.architecture.items()}
    if checkpoint == RANDOM_WEIGHTS:
        return SegformerForSemanticSegmentation(
            SegformerConfig(num_labels=ADE_CLASSES, num_attention_heads=ATTENTION_HEADS, **sizes)
        )
    source = downloads.locate(checkpoint, variant.remote, extra=_EXTRA)
    state = checkpoints.read(source, extra=_EXTRA)
    if (source / "config.json").is_file():
        config = SegformerConfig.from_pretrained(source)
        other = [f"{k} is {getattr(config, k)} in place of {v}" for k, v in sizes.items() if _list_of(config, k) != v]
        if other:
            raise ModelError(f"'{source}' is no checkpoint of {variant.name}: {'; '.join(other)}. Check the size.")
    else:
        labels = len(state.get("decode_head.classifier.bias", ())) or ADE_CLASSES
        config = SegformerConfig(num_labels=labels, num_attention_heads=ATTENTION_HEADS, **sizes)
    network, found = SegformerForSemanticSegmentation.from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    checkpoints.refuse(
        sorted(found["missing_keys"]),
        sorted(found["unexpected_keys"]),
        [f"{k} is {list(a)} in place of {list(b)}" for k, a, b in sorted(found["mismatched_keys"])],
        source=source,
        name=variant.name,
    )
    return network


def _list_of(config: Any, name: str) -> object:
    """A field of a configuration, tuples as lists."""
    value = getattr(config, name)
    return list(value) if isinstance(value, tuple) else value


def _variant(
    size: str,
    measured: tuple[float, float],
    published: tuple[float, float, float],
    depths: tuple[int, ...],
    decoder: int,
) -> Variant:
    side = 640 if size == "b5" else 512
    widths = (32, 64, 160, 256) if size == "b0" else (64, 128, 320, 512)
    return Variant(
        name=f"segformer-{size}",
        parameters_m=measured[0],
        flops_b=measured[1],
        size=(side, side),
        architecture={"hidden_sizes": widths, "depths": depths, "decoder_hidden_size": decoder},
        published=Published(
            parameters_m=published[0],
            flops_b=published[1],
            flops_per_mac=1,
            accuracy={"ADE20K mIoU, single scale": published[2]},
            source="https://arxiv.org/abs/2105.15203, table 1",
        ),
        remote=Remote(
            file="config.json, model.safetensors or pytorch_model.bin",
            hub=f"nvidia/segformer-{size}-finetuned-ade-{side}-{side}",
            licence="NVIDIA Source Code License, research and evaluation only",
        ),
    )


SEGFORMER_VARIANTS = (
    _variant("b0", (3.753, 16.776), (3.8, 8.4, 37.4), (2, 2, 2, 2), 256),
    _variant("b1", (13.716, 31.756), (13.7, 15.9, 42.2), (2, 2, 2, 2), 256),
    _variant("b2", (27.462, 124.676), (27.5, 62.4, 46.5), (3, 4, 6, 3), 768),
    _variant("b3", (47.338, 157.926), (47.3, 79.0, 49.4), (3, 4, 18, 3), 768),
    _variant("b4", (64.108, 191.135), (64.1, 95.7, 50.3), (3, 8, 27, 3), 768),
    _variant("b5", (84.709, 366.282), (84.7, 183.3, 51.0), (3, 6, 40, 3), 768),
)
SEGFORMER = Family(
    name="segformer",
    task="semantic segmentation",
    extra=_EXTRA,
    packages={"torch": (2, 6), "transformers": (5, 0)},
    open_size=True,
    variants={v.name: v for v in SEGFORMER_VARIANTS},
    export=export_segformer,
    relevance=relevance.segformer,
)
