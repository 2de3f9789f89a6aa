"""What of an output matters: weights that fit it, with a mean of 1."""

from __future__ import annotations

import numpy as np
import pytest

from bitalloy import zoo

RANDOM = np.random.default_rng(0)
OUTPUTS = {
    "yolo11": {"output0": RANDOM.random((1, 116, 21)), "output1": RANDOM.random((1, 32, 8, 8))},
    "segformer": {"logits": RANDOM.standard_normal((1, 150, 8, 8))},
    "mobilesam": {"low_res_masks": RANDOM.standard_normal((1, 4, 8, 8)), "iou_predictions": RANDOM.random((1, 4))},
    "mobilevlm": {"logits": RANDOM.standard_normal((1, 5, 20)), "present.0.key": RANDOM.random((1, 2, 5, 4))},
}


@pytest.mark.parametrize("family", zoo.families(), ids=lambda f: f.name)
def test_weights_fit_their_outputs_and_have_a_mean_of_one(family: zoo.Family) -> None:
    outputs = OUTPUTS[family.name]
    weights = family.relevance(outputs)
    assert weights.keys() <= outputs.keys()
    for name, weight in weights.items():
        full = np.broadcast_to(weight, outputs[name].shape)
        assert (full >= 0).all()
        assert full.mean() == pytest.approx(1)


def test_only_the_last_position_of_a_language_model_counts_and_its_cache_does_not() -> None:
    family, _ = zoo.find("mobilevlm-v2-1.7b")
    weights = family.relevance(OUTPUTS["mobilevlm"])
    assert weights.keys() == {"logits"}
    assert (weights["logits"][:, :-1] == 0).all() and (weights["logits"][:, -1] > 0).all()


def test_pixels_near_the_border_of_a_mask_count_most() -> None:
    family, _ = zoo.find("mobilesam")
    masks = np.array([[[[-8.0, -1.0, 0.1, 9.0]]]])
    weight = family.relevance({"low_res_masks": masks, "iou_predictions": np.ones((1, 1))})["low_res_masks"].ravel()
    assert weight.argmax() == 2 and weight[3] < weight[0] < weight[1] < weight[2]
