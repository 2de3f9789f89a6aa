"""Meaning of the outputs of a known family: which outputs count, weights of their elements, and logits.

A model's file says which family it is of (`bitalloy.family` in its metadata).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

MASK_COEFFICIENTS = 32
"""Number of prototypes of YOLO's segmentation head, and of coefficients per anchor that combine them to a mask."""
TINY = float(np.finfo(np.float32).tiny)

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """The meaning of one family's outputs."""

    weights: Callable[[Outputs], dict[str, np.ndarray]]
    """Outputs of one sample -> a weight on the squared error of every element that matters, broadcastable to its
    output; the mean of the weights of an output is 1. Outputs that it leaves out are not heads (a cache, for example).
    """
    classes: Mapping[str, int] = field(default_factory=dict)
    """Output of logits -> axis along which their softmax gives probabilities."""


def yolo11(outputs: Outputs) -> dict[str, np.ndarray]:
    """Weigh boxes and mask coefficients by the best score of their anchor, scores and prototypes evenly."""
    if "output0" not in outputs:
        return {}
    found = outputs["output0"]
    classes = found.shape[1] - 4 - (MASK_COEFFICIENTS if "output1" in outputs else 0)
    best = found[:, 4 : 4 + classes].max(axis=1, keepdims=True)
    weights = np.ones(found.shape)
    if best.max() > 0:
        weights *= best / max(float(best.mean()), TINY)
    weights[:, 4 : 4 + classes] = 1.0
    even = {name: np.ones_like(value) for name, value in outputs.items() if name != "output0"}
    return {"output0": weights, **even}


def segformer(outputs: Outputs) -> dict[str, np.ndarray]:
    """Weigh every pixel the same, as the confusion matrix behind mIoU does."""
    return {name: np.ones_like(value) for name, value in outputs.items() if name == "logits"}


def mobilesam(outputs: Outputs) -> dict[str, np.ndarray]:
    """Weigh pixels near a mask's border more, because logits near 0 decide the mask; predicted IoUs evenly."""
    weights = {name: np.ones_like(value) for name, value in outputs.items() if name == "iou_predictions"}
    if "low_res_masks" in outputs:
        masks = outputs["low_res_masks"]
        spread = np.sqrt(np.mean(np.square(masks), axis=(-2, -1), keepdims=True)) + TINY
        near = 1 / (1 + np.square(masks / spread))
        weights["low_res_masks"] = near / near.mean()
    return weights


def mobilevlm(outputs: Outputs) -> dict[str, np.ndarray]:
    """Weigh only logits of the last position, which choose a token; image features evenly. A cache is no head."""
    weights = {name: np.ones_like(value) for name, value in outputs.items() if name == "image_features"}
    if "logits" in outputs:
        last = np.zeros_like(outputs["logits"])
        last[:, -1] = last.shape[1]
        weights["logits"] = last
    return weights


MEANINGS: Mapping[str, Meaning] = {
    "yolo11": Meaning(weights=yolo11),
    "segformer": Meaning(weights=segformer, classes={"logits": 1}),
    "mobilesam": Meaning(weights=mobilesam),
    "mobilevlm": Meaning(weights=mobilevlm, classes={"logits": 2}),
}
"""Name of the family -> meaning of its outputs."""
