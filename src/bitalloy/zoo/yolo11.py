"""YOLO11 detection and instance segmentation (Ultralytics).

The network is our own (`networks.yolo11`), with the parameter names of the published checkpoints; the ultralytics
package, whose licence is AGPL-3.0, is not needed. Weights come from

1. a published `.pt`, which pickles whole modules and therefore needs `--trust-checkpoint`;
2. a state dict, `.pt` or `.safetensors`, before or after folding the batch normalisation;
3. an ONNX file that the user exported with ultralytics: it is checked, annotated and copied, without torch.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from bitalloy.core import files
from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model import relevance
from bitalloy.zoo import checkpoints, downloads
from bitalloy.zoo.base import RANDOM_WEIGHTS, Exported, Family, Options, ProtectionAdvice, Published, Remote, Variant
from bitalloy.zoo.exporting import ExportFacts, Signature, annotate, export_graph, random_image

_EXTRA = "yolo"
COCO_CLASSES = 80
_TOTAL_STRIDE = 32
"""Total stride of the backbone in pixels."""
STEM_CHANNELS = {"n": 16, "s": 32, "m": 64, "l": 64, "x": 96}
"""Size of the network -> output channels of `model.0`, by which a file of another size is recognised."""
BLOCKS = {"n": 88, "s": 88, "m": 113, "l": 174, "x": 174}
"""Convolutions of the detection network after batch normalisation is folded; the segmentation head has 12 more."""

YOLO11_REGIONS = (
    *(
        (rf"model\.23/cv{branch}\.{level}", f"head/{words}/P{level + 3}")
        for branch, words in ((2, "boxes"), (3, "scores"), (4, "mask coefficients"))
        for level in range(3)
    ),
    (r"model\.23/proto", "head/prototypes"),
    (r"model\.23", "head/decode"),
    (r"model\.([01])", r"backbone/stem/model.\1"),
    (r"model\.([2-9]|10)", r"backbone/model.\1"),
    (r"model\.(1[1-9]|2[0-2])", r"neck/model.\1"),
)
YOLO11_PROTECTION = (
    ProtectionAdvice(
        pattern="*/model.23/dfl/*",
        reason="The mean of 16 bins multiplies what the rounding of the softmax leaves out, in pixels.",
        source="https://github.com/ultralytics/ultralytics/pull/25306",
    ),
    ProtectionAdvice(
        pattern="*/model.23/[A-Z]*",
        reason="Decoding joins boxes up to the image size with scores up to 1: 256 steps for both would erase the "
        "scores.",
        source="https://github.com/microsoft/onnxruntime/issues/14233",
    ),
    ProtectionAdvice(
        pattern="*/model.23/cv[234].[012]/cv[234].[012].2/Conv",
        reason="The head's output convolutions have no activation behind them and decide boxes and scores directly.",
        source="https://github.com/ultralytics/ultralytics/pull/26171",
    ),
)

YOLO11_IMAGE = {"fit": "letterbox", "scale": 1 / 255}
"""Preparation of images."""


def export_yolo11(variant: Variant, checkpoint: str | Path | None, options: Options, folder: Path) -> Exported:
    """Write YOLO11 as `<variant>.onnx`: `images` (1, 3, H, W) RGB in 0..1 -> `output0`, and `output1` with masks.

    Raises:
        ModelError: the size is no multiple of 32, or the checkpoint is not of this variant.
    """
    height, width = size = options.size or variant.size
    if any(s % _TOTAL_STRIDE or s < _TOTAL_STRIDE for s in size):
        raise ModelError(f"YOLO11 takes images whose sides are multiples of 32, but the size is {height}x{width}.")
    masks = variant.architecture["task"] == "segment"
    path = folder / f"{variant.name}.onnx"
    facts = ExportFacts(
        family="yolo11", variant=variant.name, regions=YOLO11_REGIONS, protect=YOLO11_PROTECTION, image=YOLO11_IMAGE
    )
    if checkpoint is None and not options.trust_checkpoint:
        raise ModelError(
            f"The published {variant.remote.file} holds pickled Python objects. Add --trust-checkpoint to download it "
            "and open it in a process of its own, or give a state dict or an ONNX file with --checkpoint."
        )
    if checkpoint != RANDOM_WEIGHTS:
        checkpoint = downloads.locate(checkpoint, variant.remote, extra=_EXTRA)
    if Path(checkpoint).suffix == ".onnx":
        note = _adopt(Path(checkpoint), path, variant, options, facts)
    else:
        note = _convert(checkpoint, path, variant, options, facts, size)
    outputs = "output0 (1, 4 + classes + 32, anchors) and output1" if masks else "output0 (1, 4 + classes, anchors)"
    notes = (
        note,
        f"{outputs}: centre x, y, width, height in pixels, then scores.",
        f"Weights: {variant.remote.licence}.",
    )
    return Exported(graphs={variant.name: path}, protect=YOLO11_PROTECTION, notes=notes)


def _convert(
    checkpoint: str | Path, path: Path, variant: Variant, options: Options, facts: ExportFacts, size: tuple[int, int]
) -> str:
    import torch

    from bitalloy.zoo.networks.yolo11 import Yolo11, fuse

    scale, masks = str(variant.architecture["scale"]), variant.architecture["task"] == "segment"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if str(checkpoint) == RANDOM_WEIGHTS:
            network = fuse(Yolo11(COCO_CLASSES, scale=scale, masks=masks).eval())
            classes = COCO_CLASSES
        else:
            source = Path(checkpoint)
            state = checkpoints.read(source, trust=options.trust_checkpoint, extra=_EXTRA)
            classes = len(state.get("model.23.cv3.0.2.bias", ())) or COCO_CLASSES
            network = Yolo11(classes, scale=scale, masks=masks).eval()
            folded = "model.0.conv.bias" in state
            network = fuse(network) if folded else network
            checkpoints.load_weights(network, state, source=source, name=variant.name)
            network = network if folded else fuse(network)
        image = random_image(size)
    cuts = (4, 4 + classes) if masks else (4,)
    outputs = ("output0", "output1") if masks else ("output0",)
    return export_graph(
        network, [(image,)], path, Signature(inputs=("images",), outputs=outputs, parts={"output0": cuts}), facts
    )


def _adopt(source: Path, path: Path, variant: Variant, options: Options, facts: ExportFacts) -> str:
    """Check that a user's ONNX file is the variant and copy it with the family's annotations."""
    shapes = {"images": (1, 3, *options.size)} if options.size else None
    model = graph.load_graph(source, shapes=shapes)
    scale, masks = str(variant.architecture["scale"]), variant.architecture["task"] == "segment"
    convolutions = [n for n in model.nodes if n.op_type == "Conv"]
    stem = next((graph.static_shape(n.outputs[0])[1] for n in convolutions), 0)
    expected = BLOCKS[scale] + (12 if masks else 0)
    outputs = model.info.outputs
    if len(outputs) != 1 + masks or stem != STEM_CHANNELS[scale] or len(convolutions) != expected:
        raise ModelError(
            f"'{source}' is no {variant.name}: it has {len(outputs)} outputs, {len(convolutions)} convolutions and "
            f"{stem} channels after the first; expected are {1 + masks}, {expected} and {STEM_CHANNELS[scale]}. "
            "Export without NMS, or give the name of its size."
        )
    proto = onnx.load(str(source))
    annotate(proto, facts)
    files.write(path, proto.SerializeToString())
    return f"{path.name} is a copy of '{source.name}' with the family's regions; its weights are unchanged."


def _variant(
    name: str,
    measured: tuple[float, float],
    published: tuple[float, float],
    accuracy: dict[str, float],
    ms: tuple[float, float],
) -> Variant:
    """A variant from its figures: (parameters in millions, FLOPs in 10^9), accuracy, and (CPU, GPU) milliseconds."""
    task = "segment" if name.endswith("-seg") else "detect"
    return Variant(
        name=name,
        parameters_m=measured[0],
        flops_b=measured[1],
        size=(640, 640),
        architecture={"scale": name[6], "task": task},
        published=Published(
            parameters_m=published[0],
            flops_b=published[1],
            accuracy=accuracy,
            cpu_ms=ms[0],
            gpu_ms=ms[1],
            setup="CPU: ONNX; GPU: T4, TensorRT 10",
            source="https://docs.ultralytics.com/models/yolo11/"
            if task == "detect"
            else "https://docs.ultralytics.com/tasks/segment/",
        ),
        remote=Remote(
            file=f"{name}.pt",
            url=f"https://github.com/ultralytics/assets/releases/download/v8.4.0/{name}.pt",
            licence="AGPL-3.0 (Ultralytics)",
        ),
    )


def _detect(
    scale: str, measured: tuple[float, float], published: tuple[float, float], ap: float, ms: tuple[float, float]
) -> Variant:
    return _variant(f"yolo11{scale}", measured, published, {"COCO mAP50-95": ap}, ms)


def _segment(
    scale: str,
    measured: tuple[float, float],
    published: tuple[float, float],
    ap: tuple[float, float],
    ms: tuple[float, float],
) -> Variant:
    accuracy = {"COCO box mAP50-95": ap[0], "COCO mask mAP50-95": ap[1]}
    return _variant(f"yolo11{scale}-seg", measured, published, accuracy, ms)


YOLO11_VARIANTS = (
    _detect("n", (2.616, 6.543), (2.6, 6.5), 39.5, (56.1, 1.5)),
    _detect("s", (9.444, 21.590), (9.4, 21.5), 47.0, (90.0, 2.5)),
    _detect("m", (20.092, 68.104), (20.1, 68.0), 51.5, (183.2, 4.7)),
    _detect("l", (25.341, 87.156), (25.3, 86.9), 53.4, (238.6, 6.2)),
    _detect("x", (56.919, 195.272), (56.9, 194.9), 54.7, (462.8, 11.3)),
    _segment("n", (2.869, 9.801), (2.9, 9.7), (38.9, 32.0), (65.9, 1.8)),
    _segment("s", (10.098, 33.073), (10.1, 33.0), (46.6, 37.8), (117.6, 4.9)),
    _segment("m", (22.397, 113.349), (22.4, 113.2), (51.5, 41.5), (281.6, 6.3)),
    _segment("l", (27.646, 132.400), (27.6, 132.2), (53.4, 42.9), (344.2, 7.8)),
    _segment("x", (62.095, 296.732), (62.1, 296.4), (54.7, 43.8), (664.5, 15.8)),
)
YOLO11 = Family(
    name="yolo11",
    task="object detection, instance segmentation",
    extra=_EXTRA,
    packages={"torch": (2, 6)},
    adopts_onnx=True,
    variants={v.name: v for v in YOLO11_VARIANTS},
    export=export_yolo11,
    relevance=relevance.yolo11,
)
