from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from bitalloy.data.masks import decode, encode, from_coco, interior_point, overlap, run_lengths


def random_mask(seed: int, height: int, width: int, density: float) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < density


MASKS = st.builds(
    random_mask, st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.0, 0.2, 0.8, 1.0])
)


def coco_says(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Pycocotools' own reading of an annotation."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": 1, "height": height, "width": width}], "annotations": [], "categories": []}
        coco.createIndex()
        return np.asarray(coco.annToMask({"image_id": 1, "segmentation": segmentation}), bool)


@settings(max_examples=60)
@given(mask=MASKS)
def test_packed_and_readable_forms_come_back(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(encode(mask)), mask)
    np.testing.assert_array_equal(decode(from_coco(json.dumps(run_lengths(mask)).encode(), *mask.shape)), mask)
    packed = encode(mask)
    text = json.dumps({"size": list(mask.shape), "counts": packed["counts"].decode()})
    np.testing.assert_array_equal(decode(from_coco(text.encode(), *mask.shape)), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 8, 1, 8, 6, 1, 6]],
        [[1, 1, 4, 1, 4, 4.5], [6, 2, 9.5, 2, 9.5, 7, 6, 7]],
        {"size": [8, 10], "counts": [5, 20, 55]},
    ],
)
def test_segmentations_are_read_as_pycocotools_reads_them(segmentation: Any) -> None:
    found = decode(from_coco(json.dumps(segmentation).encode(), 8, 10))
    assert 0 < found.sum() < 80
    np.testing.assert_array_equal(found, coco_says(segmentation, 8, 10))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("null", "got `null`"),
        ("[]", "three corners"),
        ("[[1, 2, 3, 4]]", "three corners"),
        ("[[1, 2, 3, 4, 5, 6, 7]]", "three corners"),
        ("[1, 2, 3]", "Expected `array`"),
        ('{"size": [8, 9], "counts": [72]}', "are for 9x8 pixels"),
        ('{"size": [8, 10], "counts": [5, 5]}', "cover 10 of 80 pixels"),
        ('{"size": [8, 10], "counts": [90, -10]}', "run lengths is negative"),
        ('{"counts": [80]}', "missing required field `size`"),
    ],
)
def test_broken_segmentations(segmentation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_coco(segmentation.encode(), 8, 10)


@settings(max_examples=60)
@given(mask=MASKS)
def test_interior_point_is_as_deep_as_any(mask: np.ndarray) -> None:
    if not mask.any():
        with pytest.raises(ValueError, match="empty"):
            interior_point(mask)
        return
    around = np.pad(mask, 1)
    outside = np.argwhere(~around)
    depth = {
        (r, c): min(np.hypot(*(np.array([r + 1, c + 1]) - other)) for other in outside)
        for r, c in np.argwhere(mask).tolist()
    }
    x, y = interior_point(mask)
    assert depth[int(y), int(x)] == pytest.approx(max(depth.values()))
    assert (x % 1, y % 1) == (0.5, 0.5)


def test_overlap_counts_pixels() -> None:
    a, b = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    assert overlap(a, b) == 1
    a[:2], b[1:] = True, True
    assert overlap(a, b) == 5 / 20 and overlap(a, a) == 1 and overlap(a, ~a) == 0
