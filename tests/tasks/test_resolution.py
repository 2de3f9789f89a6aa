"""What data resolve, on made-up answers whose noise is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitalloy.core.outcome import Resolution
from bitalloy.tasks.base import Seen, Task, TaskResult
from bitalloy.tasks.bootstrap import compare_models, ratio_of_sums, resampled_weights
from bitalloy.tasks.detection import DETECTION, DetectionData, disturb_detections
from bitalloy.tasks.resolution import resolution_of, tell_resolution, with_limit

NOISE = 0.05


def measure(judged: Mapping[str, Sequence[Seen]], _: Any, samples: Sequence[int], **options: int) -> TaskResult:
    n = len(samples)
    weights = resampled_weights(n, options.get("resamples", 1000), options["seed"])
    scores = {k: ratio_of_sums(np.array([one["score"] for one in v]), np.ones(n), weights) for k, v in judged.items()}
    return TaskResult(
        task="plain",
        metrics=(
            compare_models("score", scores, n, witness="same"),
            compare_models("same", scores, n, agreement=True),
        ),
    )


PLAIN: Task[Any] = Task(
    name="plain",
    labels="numbers",
    matches=lambda model: True,
    open=lambda path, model: Path(),
    observe=lambda models, data, sample: {},
    measure=measure,
    disturb=lambda seen, rng: {"score": seen["score"] + rng.normal(0, NOISE)},
    disturbance="noise",
)


@pytest.mark.parametrize("images", [50, 400])
def test_the_half_width_is_that_of_the_noise(images: int) -> None:
    """The mean of n independent differences has a 95 % interval of 1.96 deviations / sqrt(n) to both sides."""
    seen = [{"score": np.array(v)} for v in np.random.default_rng(1).random(images)]
    data: Any = SimpleNamespace(labelled=True)
    (found,) = resolution_of(PLAIN, seen, data, range(images), seed=0)
    data.labelled = False
    assert resolution_of(PLAIN, seen, data, range(images), seed=0) == ()
    assert found.resolved == pytest.approx(1.96 * NOISE / np.sqrt(images), rel=0.15)
    assert (found.metric, found.images, found.limit) == ("score", images, None)


def test_few_images_on_which_nothing_changes_resolve_no_small_drop() -> None:
    """What the disturbance leaves alone on 10 images may change on others; on 1000 it hardly does."""
    still = replace(PLAIN, disturb=lambda seen, rng: seen)
    data: Any = SimpleNamespace(labelled=True)
    for images, least, most in ((1, 1.0, 5.0), (10, 0.03, 0.05), (1000, 0.0, 1e-5)):
        seen = [{"score": np.array(0.5)}] * images
        (found,) = resolution_of(still, seen, data, range(images), seed=0)
        assert least <= found.resolved <= most


def test_a_limit_needs_as_many_images_as_make_the_interval_as_narrow() -> None:
    one = Resolution(metric="AP", images=94, resolved=0.013, disturbance="noise")
    near, far, none = (with_limit([one], limits)[0] for limits in ({"AP": 0.02}, {"AP": 0.003}, {"mIoU": 0.1}))
    assert (near.needed, far.needed, none.needed) == (40, 1766, None)
    assert "within reach" in tell_resolution(near) and "about 1,800" in tell_resolution(far)
    assert "noise" in tell_resolution(none)
    assert with_limit([one], {"AP": 0.0})[0].needed is None


def test_detections_are_disturbed_without_bias_and_nothing_else_changes() -> None:
    boxes = np.tile([10.0, 20, 110, 220], (4000, 1))
    seen = {"boxes": boxes, "scores": np.full(4000, 0.5), "classes": np.arange(4000), "of": np.array(9)}
    moved = disturb_detections(seen, np.random.default_rng(0))
    logits = np.log(moved["scores"] / (1 - moved["scores"]))
    assert logits.mean() == pytest.approx(0, abs=0.02) and logits.std() == pytest.approx(0.2, rel=0.05)
    assert (moved["boxes"] - boxes).std(axis=0) == pytest.approx([1, 2, 1, 2], rel=0.1)
    assert moved["classes"] is seen["classes"] and moved["of"] is seen["of"]


def test_real_labels_resolve_more_with_more_images(shapes: Path) -> None:
    from bitalloy.data.images import ImageSpec
    from bitalloy.tasks.coco import read_coco

    labels = read_coco(shapes / "instances.json")
    data = DetectionData(labels, ImageSpec(input="images", height=160, width=160))
    seen, rng = [], np.random.default_rng(0)
    for entry in labels.images:
        boxes = [b for b in labels.boxes if b.image_id == entry.id]
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (b.bbox for b in boxes)], float).reshape(-1, 4)
        ids = [c.id for c in labels.categories]
        found = np.array([ids.index(b.category_id) for b in boxes], int)
        seen.append(
            {"boxes": corners, "scores": 0.5 + 0.4 * rng.random(len(boxes)), "classes": found, "of": np.array(len(ids))}
        )
    resolved = {r.metric: r for r in resolution_of(DETECTION, seen, data, range(6), seed=0)}
    assert set(resolved) == {"AP50-95", "AP50"} and resolved["AP50-95"].images == 6
    assert 0 < resolved["AP50-95"].resolved < 0.5
