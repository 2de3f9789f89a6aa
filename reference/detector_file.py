"""Write a trained detector as a compact ONNX file, and measure such a file.

Convolution weights are stored as float16 and cast to float32 inside the graph: any runtime opens the file
directly and computes in float32, and the file has half the size. What is measured is the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import onnxslim
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bitalloy.samples import shapes
from yolo11 import Yolo11, fuse

__all__ = ["detections", "evaluate", "export", "store_weights_as_float16"]

IMAGE_SIZE = 320
CONFIDENCE, OVERLAP, MOST = 0.001, 0.7, 300
Floats = npt.NDArray[np.float32]


def export(model: Yolo11, path: Path, *, command: str, images: int, seed: int) -> None:
    """Fold the norms (in `model` itself), trace with opset 17, simplify, halve the weights, write `path`."""
    fuse(model.eval())
    image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter is wanted, and a fixed image size as well
        model(image)  # the anchors are now constants of the trace
        traced = Path(folder) / "traced.onnx"
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["output0"]}
        torch.onnx.export(model, (image,), traced, opset_version=17, dynamo=False, **names)
        proto = onnxslim.slim(str(traced))
    store_weights_as_float16(proto)
    meta = {
        "task": "detect",
        "names": json.dumps(dict(enumerate(shapes.CLASSES))),
        "imgsz": json.dumps([IMAGE_SIZE, IMAGE_SIZE]),
        "stride": "32",
        "description": "YOLO11n trained from scratch on generated scenes: a sample, not a benchmark",
        "dataset": f"bitalloy.samples.shapes version {shapes.VERSION}, split train, seed {seed}",
        "training_images": str(images),
        "trained_by": command,
        "license": "Apache-2.0",
    }
    helper.set_model_props(proto, meta)
    proto.graph.name = "yolo11n-shapes"
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def store_weights_as_float16(proto: onnx.ModelProto) -> None:
    """Replace each float32 convolution weight by a float16 initializer and a Cast to its name, in place."""
    weights = {node.input[1] for node in proto.graph.node if node.op_type == "Conv"}
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.name in weights and tensor.data_type == TensorProto.FLOAT:
            name = tensor.name
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.float16"))
            cast = helper.make_node("Cast", [tensor.name], [name], name=f"{name}/Cast", to=TensorProto.FLOAT)
            casts.append(cast)
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    known = [info for info in proto.graph.value_info if info.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(known)


def evaluate(path: Path, folder: Path, *, count: int) -> dict[str, Any]:
    """COCO box AP of an ONNX file on the first `count` scenes of the split `val`, written to `folder`."""
    folder = shapes.write_coco(folder, count=count, size=IMAGE_SIZE, split="val")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "instances.json"))
        for entry in truth.loadImgs(truth.getImgIds()):
            pixels = np.asarray(Image.open(folder / "images" / entry["file_name"]), np.float32)
            (output,) = session.run(None, {"images": pixels.transpose(2, 0, 1)[None] / np.float32(255)})
            for x1, y1, x2, y2, score, label in detections(output[0]).tolist():
                found = {"image_id": entry["id"], "category_id": int(label) + 1, "score": score}
                results.append(found | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox") if results else None
        if evaluation is not None:
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
    stats = evaluation.stats.tolist() if evaluation is not None else [0.0] * 6
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    return {"val_images": count} | {name: round(value, 4) for name, value in zip(names, stats, strict=False)}


def detections(output: Floats) -> Floats:
    """(4 + classes, anchors) -> (k, 6) x1, y1, x2, y2, score, label, best first.

    An anchor counts once for every class whose score is above `CONFIDENCE`; each class is suppressed alone.
    """
    center, size = output[:2].T, output[2:4].T
    boxes = np.concatenate((center - size / 2, center + size / 2), 1)
    kept = []
    for label, scores in enumerate(output[4:]):
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > CONFIDENCE]
        chosen = order[_suppress(boxes[order])]
        kept.append(np.column_stack((boxes[chosen], scores[chosen], np.full(len(chosen), label))))
    rows = np.concatenate(kept).astype(np.float32)
    return rows[np.argsort(-rows[:, 4], kind="stable")][:MOST]


def _suppress(boxes: Floats) -> list[int]:
    """Indices that survive greedy suppression; boxes come best first."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left = np.arange(len(boxes))
    kept: list[int] = []
    while left.size and len(kept) < MOST:
        first, rest = left[0], left[1:]
        kept.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[rest, :2])
        high = np.minimum(boxes[first, 2:], boxes[rest, 2:])
        shared = np.clip(high - low, 0, None).prod(1)
        left = rest[shared <= OVERLAP * (area[first] + area[rest] - shared)]
    return kept
