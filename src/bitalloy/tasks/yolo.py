"""Outputs of YOLOv8 to YOLO11: recognising them by their shapes, splitting and suppressing boxes.

output (1, 4 + nc [+ m], n) [and prototypes (1, m, h, w)] -> boxes, scores, mask coefficients -> class-wise suppression
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.runtime.ort import OrtSession
from bitalloy.tasks.precision import Detections

__all__ = [
    "class_names",
    "detections",
    "has_masks",
    "looks_like_yolo",
    "mask_parts",
    "select_boxes",
    "split_predictions",
    "suppress",
]

CONFIDENCE = 0.001
IOU = 0.7
MAX_BOXES = 300
"""Largest number of boxes per image. Ultralytics validates with these three values."""
_STRIDES = (4, 8, 16, 32, 64)


def looks_like_yolo(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Return whether the shapes are those of a YOLOv8 to YOLO11 detector, with or without mask coefficients.

    One image input; a first output (batch, 4 + nc, n) with 4 + nc < n, where n is the number of cells of
    consecutive strides (8400 = 80*80 + 40*40 + 20*20 at 640x640), as far as the sizes are fixed.
    """
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or not outputs or len(outputs[0].shape) != 3:
        return False
    sides, (_, rows, cells) = inputs[0].shape[2:], outputs[0].shape
    if inputs[0].shape[1] != 3 or not isinstance(rows, int) or rows < 5:
        return False
    height, width = sides
    if not isinstance(cells, int) or not isinstance(height, int) or not isinstance(width, int):
        return not isinstance(cells, int) or rows < cells
    grids = [-(-height // stride) * -(-width // stride) for stride in _STRIDES]
    sums = {sum(grids[i:j]) for i in range(len(grids)) for j in range(i + 1, len(grids) + 1)}
    return rows < cells and cells in sums


def has_masks(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Return whether a detector also gives mask coefficients, and prototypes (batch, m, h, w) as its second output."""
    if not looks_like_yolo(inputs, outputs) or len(outputs) < 2 or len(outputs[1].shape) != 4:
        return False
    rows, count = outputs[0].shape[1], outputs[1].shape[1]
    return isinstance(rows, int) and isinstance(count, int) and rows > 4 + count


def class_names(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Read the class names by index from the `names` entry that Ultralytics writes: `{0: 'person', 1: 'bicycle'}`."""
    try:
        names = ast.literal_eval(metadata["names"])
        return tuple(str(names[i]) for i in range(len(names)))
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError):
        return None


def split_predictions(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Split the first output of a model into boxes and scores.

    Mask coefficients are left out: as many rows as the prototypes, the second output (1, m, h, w), have channels.

    Returns:
        Boxes (n, 4), as centre x, centre y, width, height in input pixels, and scores (nc, n); float32.

    Raises:
        DataError: the output is not (1, 4 + nc, n).
    """
    first, *others = outputs.values()
    masks = others[0].shape[1] if others and others[0].ndim == 4 else 0
    if first.ndim != 3 or first.shape[0] != 1 or first.shape[1] < 5 + masks:
        raise DataError(
            f"The first output has shape {list(first.shape)}; expected [1, 4 + classes{' + masks' * bool(masks)}, "
            "boxes], as Ultralytics exports it with nms=False."
        )
    rows = first[0].astype(np.float32, copy=False)
    return np.ascontiguousarray(rows[:4].T), rows[4 : len(rows) - masks]


def mask_parts(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mask coefficients (n, m) and prototypes (m, h, w) of a model with masks, float32.

    Raises:
        DataError: the second output is not (1, m, h, w) with m mask rows in the first.
    """
    first, *others = outputs.values()
    if not others or others[0].ndim != 4 or first.ndim != 3 or first.shape[1] < 5 + others[0].shape[1]:
        raise DataError(
            f"The outputs have shapes {[list(o.shape) for o in outputs.values()]}; expected [1, 4 + classes + m, "
            "boxes] and prototypes [1, m, height, width], as Ultralytics exports a -seg model with nms=False."
        )
    prototypes = others[0][0].astype(np.float32, copy=False)
    return first[0, first.shape[1] - len(prototypes) :].T.astype(np.float32, copy=False), prototypes


def suppress(
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    iou: float = IOU,
    limit: int = MAX_BOXES,
) -> Detections:
    """Keep, class by class, the best of boxes that overlap by more than `iou`; see `select_boxes`."""
    index, label = select_boxes(boxes, scores, confidence=confidence, iou=iou, limit=limit)
    return detections(boxes, scores, index, label)


def detections(boxes: np.ndarray, scores: np.ndarray, index: np.ndarray, label: np.ndarray) -> Detections:
    """Return the boxes with indices (k,) and classes (k,) as detections, with corners in input pixels."""
    centre, half = boxes[index, :2], boxes[index, 2:] / 2
    return Detections(np.concatenate([centre - half, centre + half], axis=1), scores[label, index], label)


def select_boxes(
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    iou: float = IOU,
    limit: int = MAX_BOXES,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose, class by class, the best of boxes that overlap by more than `iou`.

    A box counts once for each class whose score is above `confidence`. Boxes that are not finite
    or have no area are dropped.

    Args:
        boxes: centre x, centre y, width, height of each box, (n, 4) float32.
        scores: scores of each class and box, (nc, n) float32.
        confidence: score above which a box is kept.
        iou: greatest overlap with a better box of the same class.
        limit: largest number of boxes kept over all classes.

    Returns:
        Indices into the boxes (k,) and classes (k,), best first.
    """
    with np.errstate(invalid="ignore"):
        used = np.flatnonzero(
            (scores.max(axis=0, initial=0) > confidence)
            & np.isfinite(boxes).all(axis=1)
            & (boxes[:, 2:] > 0).all(axis=1)
        )
    left = np.ascontiguousarray(scores[:, used])
    feeds = {
        "boxes": boxes[used][None],
        "scores": left[None],
        "limit": np.array([limit], np.int64),
        "iou": np.array([iou], np.float32),
        "confidence": np.array([confidence], np.float32),
    }
    _, label, index = _suppression().run(feeds)["kept"].T
    best = np.argsort(-left[label, index], kind="stable")[:limit]
    return used[index[best]], label[best]


@cache
def _suppression() -> OrtSession:
    shapes: dict[str, list[int | str]] = {
        "boxes": [1, "n", 4],
        "scores": [1, "nc", "n"],
        "limit": [1],
        "iou": [1],
        "confidence": [1],
    }
    types = {"limit": TensorProto.INT64}
    node = helper.make_node("NonMaxSuppression", list(shapes), ["kept"], center_point_box=1)
    graph = helper.make_graph(
        [node],
        "suppression",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), s) for n, s in shapes.items()],
        [helper.make_tensor_value_info("kept", TensorProto.INT64, ["k", 3])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    return OrtSession(model.SerializeToString(), threads=1)
