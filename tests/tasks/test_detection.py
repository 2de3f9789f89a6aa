from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bitalloy.core.errors import DataError
from bitalloy.core.records import MetricValue, TensorSpec
from bitalloy.data.images import ImageSpec, infer_image_spec, letterbox, open_image
from bitalloy.runtime.ort import OrtSession
from bitalloy.tasks.base import Interface
from bitalloy.tasks.bootstrap import resampled_weights
from bitalloy.tasks.coco import read_coco
from bitalloy.tasks.detection import (
    DETECTION,
    DetectionData,
    DetectionResult,
    confidence_shift,
    evaluate_detection,
    paired_difference,
)
from bitalloy.tasks.precision import (
    Detections,
    Matches,
    average_precision,
    match_boxes,
    match_shown,
)
from bitalloy.tasks.yolo import class_names, looks_like_yolo, split_predictions, suppress

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 4, "name": "bird"}]
IDS = [3, 4, 7]
SPEC = ImageSpec(input="images", height=64, width=64)


# -- oracles ----------------------------------------------------------------------------------------


def overlap(a: np.ndarray, others: np.ndarray) -> np.ndarray:
    width = np.minimum(a[2], others[:, 2]) - np.maximum(a[0], others[:, 0])
    height = np.minimum(a[3], others[:, 3]) - np.maximum(a[1], others[:, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    sizes = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return np.asarray(shared / ((a[2] - a[0]) * (a[3] - a[1]) + sizes - shared))


def brute_force(
    boxes: np.ndarray, scores: np.ndarray, confidence: float, iou: float, limit: int
) -> list[tuple[int, int, float]]:
    """(class, box, score) of what remains, best first: the definition of class-wise suppression."""
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    kept = []
    for label, row in enumerate(scores):
        left = np.flatnonzero(row > confidence)
        left = left[np.argsort(-row[left], kind="stable")]
        while len(left):
            kept.append((label, int(left[0]), float(row[left[0]])))
            left = left[1:][overlap(corners[left[0]], corners[left[1:]]) <= iou]
    return sorted(kept, key=lambda k: -k[2])[:limit]


def pycocotools_stats(content: dict[str, Any], results: list[dict[str, Any]]) -> np.ndarray:
    """The twelve numbers of an untouched COCOeval."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(content))
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.asarray(run.stats)


# -- made-up data -----------------------------------------------------------------------------------


def make_content(images: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image in range(images):
        content["images"].append({"id": 10 * (image + 1), "file_name": f"{image}.png", "width": 100, "height": 80})
        for _ in range(rng.integers(0, 6)):
            x, y = rng.integers(0, 50, 2).tolist()
            w, h = rng.integers(8, 30, 2).tolist()
            row = {"id": len(content["annotations"]) + 1, "image_id": 10 * (image + 1), "bbox": [x, y, w, h]}
            row |= {"category_id": int(rng.choice(IDS)), "area": w * h, "iscrowd": int(rng.random() < 0.15)}
            content["annotations"].append(row)
    return content


def make_detections(content: dict[str, Any], seed: int, *, ties: bool = True) -> list[Detections]:
    """Shaken labels, some with a wrong class, beside false alarms; without ties scores differ within an image."""
    rng = np.random.default_rng(seed)
    found = []
    for image in content["images"]:
        rows = []
        for label in content["annotations"]:
            if label["image_id"] != image["id"]:
                continue
            x, y, w, h = label["bbox"]
            for _ in range(rng.integers(0, 4)):
                right = rng.random() < 0.85
                rows.append([x, y, x + w, y + h, IDS.index(label["category_id"]) if right else rng.integers(3)])
        rows += [[5.0, 5, 30, 30, rng.integers(3)] for _ in range(rng.integers(0, 4))]
        table = np.array(rows, dtype=float).reshape(-1, 5)
        table[:, :4] += rng.normal(0, 2.5, table[:, :4].shape)
        scores = np.round(rng.random(len(table)), 1) if ties else rng.permutation(len(table)) / 30
        order = np.argsort(-scores, kind="stable")
        found.append(Detections(table[order, :4], scores[order], table[order, 4].astype(int)))
    return found


def results_of(content: dict[str, Any], found: list[Detections]) -> list[dict[str, Any]]:
    return [
        {"image_id": image["id"], "category_id": IDS[c], "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "score": s}
        for image, one in zip(content["images"], found, strict=True)
        for b, s, c in zip(one.boxes.tolist(), one.scores.tolist(), one.classes.tolist(), strict=True)
    ]


def save(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        Image.new("RGB", (image.get("width", 100), image.get("height", 80))).save(
            folder / "images" / image["file_name"]
        )
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def matched(folder: Path, content: dict[str, Any], found: list[Detections]) -> Matches:
    labels = read_coco(save(folder, content))
    return match_boxes(labels, labels.images, found, labels.category_ids(3, None))


# -- shapes and names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "outputs", "expected"),
    [
        ((1, 3, 640, 640), [(1, 84, 8400)], True),
        ((1, 3, 640, 640), [(1, 116, 8400), (1, 32, 160, 160)], True),
        ((1, 3, 320, 320), [(1, 12, 2100)], True),
        ((1, 3, 600, 610), [(1, 12, 75 * 77 + 38 * 39 + 19 * 20)], True),
        (("n", 3, "h", "w"), [("n", 84, "boxes")], True),
        ((1, 3, 224, 224), [(1, 197, 768)], False),  # tokens of a ViT
        ((1, 3, 640, 640), [(1, 8400, 84)], False),
        ((1, 3, 640, 640), [(1, 300, 6)], False),
        ((1, 3, 640, 640), [(1, 1000)], False),
        ((1, 3, 640, 640), [(1, 4, 8400)], False),
        ((1, 3, 640, 640), [], False),
        ((1, 4, 640, 640), [(1, 84, 8400)], False),
        ((1, 128), [(1, 84, 8400)], False),
    ],
)
def test_yolo_is_known_by_its_shapes(
    image: tuple[int | str, ...], outputs: list[tuple[int | str, ...]], expected: bool
) -> None:
    inputs = [TensorSpec(name="x", dtype="FLOAT", shape=image)]
    results = [TensorSpec(name=f"y{i}", dtype="FLOAT", shape=shape) for i, shape in enumerate(outputs)]
    assert looks_like_yolo(inputs, results) is expected
    assert not looks_like_yolo(inputs * 2, results)


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"names": "{0: 'cat', 1: \"dog's\"}"}, ("cat", "dog's")),
        ({"names": "['cat', 'dog']"}, ("cat", "dog")),
        ({}, None),
        ({"names": "{1: 'cat'}"}, None),
        ({"names": "__import__('os')"}, None),
        ({"names": "{"}, None),
        ({"names": "3"}, None),
    ],
)
def test_class_names(metadata: dict[str, str], names: tuple[str, ...] | None) -> None:
    assert class_names(metadata) == names


# -- decoding and suppression -----------------------------------------------------------------------


def test_decode_splits_boxes_scores_and_masks() -> None:
    output = np.arange(9 * 5, dtype=np.float16).reshape(1, 9, 5)
    boxes, scores = split_predictions({"output0": output})
    assert boxes.dtype == scores.dtype == np.float32
    np.testing.assert_array_equal(boxes, output[0, :4].T)
    np.testing.assert_array_equal(scores, output[0, 4:])
    _, scores = split_predictions({"output0": output, "output1": np.zeros((1, 3, 2, 2))})
    np.testing.assert_array_equal(scores, output[0, 4:6])


@pytest.mark.parametrize("shape", [(1, 4, 10), (2, 84, 10), (84, 10), (1, 84, 5, 2)])
def test_decode_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected \[1, 4 \+ classes, boxes\]"):
        split_predictions({"y": np.zeros(shape)})


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 40),
    classes=st.integers(1, 4),
    confidence=st.sampled_from([0.001, 0.3]),
    iou=st.sampled_from([0.3, 0.7]),
    limit=st.sampled_from([5, 300]),
)
def test_suppression_equals_brute_force(
    seed: int, count: int, classes: int, confidence: float, iou: float, limit: int
) -> None:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 30, (count, 2)), rng.uniform(5, 20, (count, 2))], axis=1)
    boxes = boxes.astype(np.float32)
    scores = (rng.random((classes, count)) ** 2).astype(np.float32)
    found = suppress(boxes, scores, confidence=confidence, iou=iou, limit=limit)
    expected = brute_force(boxes, scores, confidence, iou, limit)
    assert [(int(c), float(s)) for c, s in zip(found.classes, found.scores, strict=True)] == [
        (c, s) for c, _, s in expected
    ]
    centres = boxes[[b for _, b, _ in expected]].reshape(-1, 4)
    corners = np.concatenate([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], axis=1)
    np.testing.assert_allclose(found.boxes, corners, atol=1e-5)


def test_one_box_counts_once_for_each_class() -> None:
    found = suppress(np.array([[5, 5, 4, 4]], np.float32), np.array([[0.3], [0.0], [0.9]], np.float32))
    assert found.classes.tolist() == [2, 0]
    np.testing.assert_allclose(found.boxes, [[3, 3, 7, 7]] * 2)


def test_broken_boxes_are_dropped() -> None:
    boxes = np.array([[np.nan, 1, 1, 1], [np.inf, 1, 1, 1], [1, 1, 0, 1], [1, 1, -3, -3], [5, 5, 2, 2]], np.float32)
    scores = np.full((1, 5), 0.5, np.float32)
    assert suppress(boxes, scores).boxes.tolist() == [[4, 4, 6, 6]]
    assert len(suppress(boxes, np.full((1, 5), np.nan, np.float32)).scores) == 0


# -- average precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_value_is_that_of_pycocotools(tmp_path: Path, seed: int) -> None:
    content = make_content(12, seed)
    found = make_detections(content, seed)
    matches = matched(tmp_path, content, found)
    stats = pycocotools_stats(content, results_of(content, found))
    assert (matches.ap, matches.ap50) == (stats[0], stats[1])
    again = average_precision(matches, np.ones((1, 12), int))[0]
    assert abs(again.mean() - matches.ap) < 1e-9 and abs(again[0] - matches.ap50) < 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_weights_equal_repeated_images(tmp_path: Path, seed: int) -> None:
    content = make_content(8, seed)
    found = make_detections(content, seed, ties=False)
    matches = matched(tmp_path, content, found)
    weights = np.random.default_rng(seed).integers(0, 4, 8)
    repeated: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    detections = []
    for position in np.repeat(np.arange(8), weights):
        new = len(repeated["images"]) + 1
        repeated["images"].append({"id": new})
        detections.append(found[position])
        for label in content["annotations"]:
            if label["image_id"] == content["images"][position]["id"]:
                copied = label | {"image_id": new, "id": len(repeated["annotations"]) + 1}
                repeated["annotations"].append(copied)
    stats = pycocotools_stats(repeated, results_of(repeated, detections))
    precision = average_precision(matches, weights[None])[0]
    assert abs(precision.mean() - stats[0]) < 1e-9
    assert abs(precision[0] - stats[1]) < 1e-9


def test_label_with_id_zero_counts(tmp_path: Path) -> None:
    content = make_content(1, 0) | {
        "annotations": [{"id": 0, "image_id": 10, "category_id": 3, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}]
    }
    found = [Detections(np.array([[1.0, 2, 31, 42]]), np.array([0.9]), np.array([0]))]
    assert matched(tmp_path, content, found).ap == pytest.approx(1)


def test_nothing_found_is_zero_and_no_labels_is_an_error(tmp_path: Path) -> None:
    content = make_content(3, 1)
    nothing = [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))] * 3
    matches = matched(tmp_path, content, nothing)
    assert matches.ap == 0 and average_precision(matches, np.ones((2, 3), int)).max() == 0
    with pytest.raises(DataError, match="3 evaluated images have no labels"):
        matched(tmp_path, content | {"annotations": []}, nothing)


def test_resample_without_labels_is_not_a_number(tmp_path: Path) -> None:
    content = make_content(2, 0)
    content["annotations"] = [a for a in make_content(2, 3)["annotations"] if a["image_id"] == 10][:1]
    content["annotations"][0]["iscrowd"] = 0
    matches = matched(tmp_path, content, make_detections(content, 0))
    result = average_precision(matches, np.array([[0, 2], [1, 1]]))
    assert np.isnan(result[0]).all() and np.isfinite(result[1]).all()


def test_resampled_weights_draw_as_many_images() -> None:
    weights = resampled_weights(9, 50, seed=1)
    assert weights.shape == (50, 9) and (weights.sum(axis=1) == 9).all() and weights.min() >= 0
    np.testing.assert_array_equal(weights, resampled_weights(9, 50, seed=1))
    assert (weights != resampled_weights(9, 50, seed=2)).any()


# -- evaluation from image to value -----------------------------------------------------------------


class Oracle:
    """A detector that knows the labels: answers in the order of the images, in canvas pixels."""

    def __init__(self, content: dict[str, Any], wrong: Callable[[np.ndarray], np.ndarray] = lambda rows: rows) -> None:
        self._answers = []
        for image in sorted(content["images"], key=lambda i: i["id"]):
            ratio = 64 / max(image["width"], image["height"])
            left = round((64 - round(image["width"] * ratio)) / 2 - 0.1)
            top = round((64 - round(image["height"] * ratio)) / 2 - 0.1)
            rows = np.zeros((7, 40), np.float32)
            labels = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            for column, label in enumerate(labels):
                x, y, w, h = label["bbox"]
                rows[:4, column] = [(x + w / 2) * ratio + left, (y + h / 2) * ratio + top, w * ratio, h * ratio]
                rows[4 + IDS.index(label["category_id"]), column] = 0.9
            self._answers.append(wrong(rows))
        self._seen = 0

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert feeds["images"].shape == (1, 3, 64, 64)
        self._seen += 1
        return {"output0": self._answers[self._seen - 1][None]}


def separate_content(images: int = 6) -> dict[str, Any]:
    """Labels that do not touch each other, on images of several shapes."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image in range(images):
        width, height = [(100, 80), (80, 100), (333, 200)][image % 3]
        content["images"].append({"id": images - image, "file_name": f"{image}.png", "width": width, "height": height})
        for column in range(image % 3 + 1):
            box = [column * 25 + 2, 5 * column + 3, 20, 30]
            row = {"id": len(content["annotations"]), "image_id": images - image, "bbox": box, "area": 600}
            content["annotations"].append(row | {"category_id": IDS[(image + column) % 3], "iscrowd": 0})
    return content


def lower_scores(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:4], rows[4:] * np.float32(0.5)])


def shifted(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:1] + 1.5, rows[1:]])


def evaluate(folder: Path, content: dict[str, Any], oracle: Oracle, **options: Any) -> DetectionResult:
    return evaluate_detection(oracle, DetectionData(read_coco(save(folder, content)), SPEC), resamples=200, **options)


def test_perfect_detector_reaches_one(tmp_path: Path) -> None:
    content = separate_content()
    result = evaluate(tmp_path, content, Oracle(content))
    assert result.ap.value == pytest.approx(1) and result.ap50.value == pytest.approx(1) and result.ap.n == 6
    assert result.ap.low == pytest.approx(1) and result.ap.high == 1
    assert result.images == tuple(f"{5 - i}.png" for i in range(6))
    for entry, found in zip(sorted(content["images"], key=lambda i: i["id"]), result.detections, strict=True):
        truth = [a["bbox"] for a in content["annotations"] if a["image_id"] == entry["id"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in truth]
        np.testing.assert_allclose(sorted(found.boxes.tolist()), sorted(corners), atol=1e-4)


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    content = separate_content(3)

    def huge(rows: np.ndarray) -> np.ndarray:
        rows[2:4] *= 100
        return rows

    for size, found in zip(
        [(333, 200), (80, 100), (100, 80)], evaluate(tmp_path, content, Oracle(content, huge)).detections, strict=True
    ):
        assert found.boxes.min() >= 0 and (found.boxes[:, 2:] <= size).all()


def test_limit_chooses_images_and_a_worse_model_is_seen(tmp_path: Path) -> None:
    content = separate_content(9)
    few = evaluate(tmp_path, content, Oracle(content), limit=4, seed=1)
    assert few.ap.n == 4 and len(set(few.images)) == 4
    good, bad = (evaluate(tmp_path, content, Oracle(content, f)) for f in (lambda rows: rows, shifted))
    assert bad.ap.value < 0.9 and bad.ap.low < bad.ap.value
    difference = paired_difference(good, bad)
    assert difference.value == pytest.approx(good.ap.value - bad.ap.value)
    assert 0 < difference.low <= difference.value <= difference.high
    same = paired_difference(bad, evaluate(tmp_path, content, Oracle(content, shifted)))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(DataError, match="rest on 9 and 4 images"):
        paired_difference(good, few)
    with pytest.raises(DataError, match="rest on"):
        confidence_shift(good, few)


def test_confidence_shift(tmp_path: Path) -> None:
    content = separate_content()
    full, half = (evaluate(tmp_path, content, Oracle(content, f)) for f in (lambda rows: rows, lower_scores))
    shift = confidence_shift(full, half)
    assert [shift.mean_a, shift.mean_b] == pytest.approx([0.9, 0.45])
    assert shift.shift.value == shift.shift.low == shift.shift.high == pytest.approx(-0.45)
    assert (shift.matched, shift.lost) == (12, 0)

    def forgetful(rows: np.ndarray) -> np.ndarray:
        rows[:, 0] = 0
        return rows

    partly = confidence_shift(full, evaluate(tmp_path, content, Oracle(content, forgetful)))
    assert (partly.matched, partly.lost, partly.shift.value) == (6, 6, 0)
    with pytest.raises(DataError, match=r"No detection above 0\.25"):
        confidence_shift(full, evaluate(tmp_path, content, Oracle(content, np.zeros_like)))


def test_counterparts_need_class_and_overlap_and_are_used_once() -> None:
    def result(boxes: list[list[float]], scores: list[float], classes: list[int]) -> DetectionResult:
        found = Detections(np.array(boxes), np.array(scores), np.array(classes))
        value = MetricValue(value=0.0, low=0.0, high=0.0, n=1)
        return DetectionResult(
            ap=value,
            ap50=value,
            images=("a",),
            detections=(found,),
            weights=np.ones((9, 1), int),
            resampled=np.zeros(9),
            resampled50=np.zeros(9),
        )

    box, near, far = [0.0, 0, 10, 10], [0.0, 0, 10, 9], [20.0, 20, 30, 30]
    a = result([box, box, far, box], [0.9, 0.8, 0.7, 0.1], [0, 0, 0, 0])
    b = result([near, far, box], [0.6, 0.5, 0.4], [0, 1, 2])
    shift = confidence_shift(a, b)
    assert (shift.matched, shift.lost) == (1, 2)
    assert [shift.mean_a, shift.mean_b] == pytest.approx([0.9, 0.6])


def test_several_models_side_by_side(tmp_path: Path) -> None:
    content = separate_content(9)
    data = DetectionData(read_coco(save(tmp_path, content)), SPEC)
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "float": lambda rows: rows,
        "int8": shifted,
        "mixed": lower_scores,
    }
    order: list[str] = []

    def named(name: str, run: Oracle) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        def call(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            order.append(name)
            return run(feeds)

        return call

    models = {name: named(name, Oracle(content, wrong)) for name, wrong in kinds.items()}
    told: list[int] = []
    result = DETECTION.evaluate(models, data, seed=4, progress=told.append)
    assert order == ["float", "int8", "mixed"] * 9 and sum(told) == 27
    alone = {name: evaluate_detection(Oracle(content, f), data, seed=4) for name, f in kinds.items()}
    first, second, agreement = result.metrics
    assert (first.name, second.name, agreement.name) == ("AP50-95", "AP50", "agreement")
    assert first.witness == second.witness == "agreement" and agreement.agreement
    assert agreement.drops["int8"].value == pytest.approx(first.drops["int8"].value)  # float finds every label
    assert result.box_overlap["mixed"].value == pytest.approx(1) and result.box_overlap["int8"].value < 0.95
    for name, one in alone.items():
        assert first.values[name] == one.ap and second.values[name] == one.ap50
    assert first.drops == {name: paired_difference(alone["float"], alone[name]) for name in ("int8", "mixed")}
    assert first.drops["int8"].value > 0.05 and second.drops["mixed"].value == 0
    assert result.confidence_shift["mixed"].value == pytest.approx(-0.45)
    assert result.notes == ("Intervals rest on 9 images only and are rough.",)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_is_the_ap_against_what_the_first_model_shows(tmp_path: Path, seed: int) -> None:
    content = make_content(7, seed)
    first, other = (make_detections(content, s, ties=False) for s in (seed, seed + 100))
    truth = {**content, "categories": [{"id": i, "name": str(i)} for i in IDS], "annotations": []}
    shown = [row for row in results_of(content, first) if row["score"] >= 0.25]
    for number, row in enumerate(shown, start=1):
        area = row["bbox"][2] * row["bbox"][3]
        truth["annotations"].append({**row, "id": number, "area": area, "iscrowd": 0})
    expected = pycocotools_stats(truth, results_of(content, other))
    found = match_shown(first, other, [(100, 80)] * 7)
    assert (found.ap, found.ap50) == pytest.approx((expected[0], expected[1]), abs=1e-12)
    assert match_shown(first, first, [(100, 80)] * 7).ap == pytest.approx(1)
    resampled = average_precision(found, np.ones((1, 7), int)).mean()
    assert resampled == pytest.approx(found.ap)


def test_images_without_labels_give_agreement(tmp_path: Path) -> None:
    content = separate_content(9)
    folder = save(tmp_path, content).parent / "images"
    data = DETECTION.open(folder, detector(64, 3))
    assert data.choose(None, 0) == list(range(9))
    result = DETECTION.evaluate({"float": Oracle(content), "int8": Oracle(content, shifted)}, data)
    (agreement,) = result.metrics
    labelled = DETECTION.evaluate(
        {"float": Oracle(content), "int8": Oracle(content, shifted)},
        DetectionData(read_coco(folder.parent / "instances.json"), SPEC),
    )
    assert agreement.values == labelled.metrics[2].values and 0 < agreement.values["int8"].value < 0.95
    nothing = DETECTION.evaluate({"float": Oracle(content, np.zeros_like), "int8": Oracle(content)}, data)
    assert nothing.metrics == () and "shows nothing" in nothing.notes[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No images"):
        DETECTION.open(tmp_path / "empty", detector(64, 3))


def detector(side: int, classes: int) -> Interface:
    cells = sum((side // stride) ** 2 for stride in (8, 16, 32))
    return Interface(
        inputs=(TensorSpec(name="images", dtype="FLOAT", shape=(1, 3, side, side)),),
        outputs=(TensorSpec(name="output0", dtype="FLOAT", shape=(1, 4 + classes, cells)),),
    )


def test_collapsed_model_is_measured(tmp_path: Path) -> None:
    content = separate_content()
    data = DetectionData(read_coco(save(tmp_path, content)), SPEC)
    broken = Oracle(content, lambda rows: np.full_like(rows, np.nan))
    result = DETECTION.evaluate({"float": Oracle(content), "int8": broken}, data)
    assert result.metrics[0].values["int8"].value == 0 and result.confidence_shift == {}
    with pytest.raises(DataError, match="No model"):
        DETECTION.evaluate({}, data)


# -- labels that do not fit -------------------------------------------------------------------------


def test_categories_follow_names_then_order(tmp_path: Path) -> None:
    labels = read_coco(save(tmp_path, make_content(1, 0)))
    assert [c.id for c in labels.categories] == IDS
    assert labels.category_ids(3, None).tolist() == IDS
    assert labels.category_ids(3, ["x", "y", "z"]).tolist() == IDS
    assert labels.category_ids(3, ["dog", "cat", "bird"]).tolist() == [7, 3, 4]
    assert labels.category_ids(5, ["a", "dog", "b", "cat", "bird"]).tolist() == [-1, 7, -1, 3, 4]
    with pytest.raises(DataError, match=r"5 classes and has no class names .* has 3 categories"):
        labels.category_ids(5, None)
    with pytest.raises(DataError, match=r"2 classes and calls its classes \['cat', 'cow'\]"):
        labels.category_ids(2, ["cat", "cow"])


def test_classes_without_category_are_left_out(tmp_path: Path) -> None:
    content = make_content(1, 0) | {
        "annotations": [{"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 30, 40], "iscrowd": False}]
    }
    labels = read_coco(save(tmp_path, content))
    found = Detections(np.array([[1.0, 2, 31, 42]] * 2), np.array([0.9, 0.8]), np.array([0, 1]))
    assert match_boxes(labels, labels.images, [found], np.array([-1, 7])).ap == pytest.approx(1)


def test_category_mismatch_stops_after_the_first_image(tmp_path: Path) -> None:
    content = separate_content()
    oracle = Oracle(content | {"annotations": []}, lambda rows: np.zeros((12, 40), np.float32))
    with pytest.raises(DataError, match="8 classes"):
        evaluate(tmp_path, content, oracle)
    assert oracle._seen == 1


def broken(**changes: Any) -> dict[str, Any]:
    return {**make_content(2, 4), **changes}


BOX = {"id": 1, "image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is no COCO annotation file: .*truncated"),
        ("[]", "is no COCO annotation file"),
        (json.dumps({"images": [], "annotations": []}), "missing required field `categories`"),
        (broken(images=[{"id": 1}]), "missing required field `file_name`"),
        (broken(annotations=[BOX | {"bbox": [1, 2, 3]}]), "is no COCO annotation file: .*bbox"),
        (broken(annotations=[BOX | {"bbox": [float("nan"), 0, 1, 1]}]), "is no COCO annotation file"),
        (broken(annotations=[BOX | {"image_id": 99}]), "a box for image 99 and category 3"),
        (broken(annotations=[BOX | {"category_id": 99}]), "a box for image 10 and category 99"),
        (broken(categories=[]), "2 images and 0 categories"),
        (broken(categories=CATEGORIES * 2), "id twice"),
    ],
)
def test_broken_annotation_files(tmp_path: Path, content: dict[str, Any] | str, message: str) -> None:
    path = save(tmp_path, make_content(2, 4))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as raised:
        read_coco(path)
    assert "instances.json" in str(raised.value)


def test_absent_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read the labels .*absent\.json.*No such file"):
        read_coco(tmp_path / "absent.json")


def test_images_that_are_missing(tmp_path: Path) -> None:
    path = save(tmp_path, make_content(3, 0))
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images .* are missing .*the first is '1\.png'"):
        read_coco(path)


def test_labels_of_other_images(tmp_path: Path) -> None:
    path = save(tmp_path, make_content(3, 0))
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (4, 4)).save(other / "unknown.png")
    with pytest.raises(DataError, match=r"None of the 3 images .* such as '0\.png', lies in .*other"):
        read_coco(path, other)
    content = make_content(3, 0)
    Image.new("RGB", (99, 80)).save(tmp_path / "images/0.png")
    with pytest.raises(DataError, match=r"'0\.png' is 99x80, but .* says 100x80"):
        evaluate_detection(Oracle(content), DetectionData(read_coco(path), SPEC))


def test_images_beside_the_file_or_in_a_named_folder(tmp_path: Path) -> None:
    path = save(tmp_path, make_content(3, 0))
    assert read_coco(path).folder == tmp_path / "images"
    (tmp_path / "images").rename(tmp_path / "val")
    assert read_coco(path, tmp_path / "val").folder == tmp_path / "val"
    for image in (tmp_path / "val").iterdir():
        image.rename(tmp_path / image.name)
    assert read_coco(path).folder == tmp_path


def test_images_in_cocos_own_layout(tmp_path: Path) -> None:
    source = save(tmp_path / "flat", make_content(3, 0))
    (tmp_path / "coco/annotations").mkdir(parents=True)
    path = source.rename(tmp_path / "coco/annotations/instances_val2017.json")
    for folder in ("images/val2017", "val2017"):
        (tmp_path / "coco" / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "flat/images").rename(tmp_path / "coco" / folder)
        assert read_coco(path).folder == tmp_path / "coco" / folder
        (tmp_path / "coco" / folder).rename(tmp_path / "flat/images")
    with pytest.raises(DataError, match=r"None of the 3 images .*coco/images/val2017"):
        read_coco(path)


# -- real data --------------------------------------------------------------------------------------


def test_yolo11n_on_coco_equals_an_independent_evaluation(real: Path) -> None:
    if not (real / "models/yolo11n.onnx").is_file():
        pytest.skip("the model is not here")
    annotations = real / "coco-val-94/instances.json"
    inputs = (TensorSpec(name="images", dtype="FLOAT", shape=(1, 3, 640, 640)),)
    spec = infer_image_spec(inputs, task="detection")
    assert spec is not None
    session = OrtSession(real / "models/yolo11n.onnx")
    raw: list[np.ndarray] = []

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = session.run(feeds)
        raw.append(outputs["output0"][0])
        return outputs

    result = evaluate_detection(run, DetectionData(read_coco(annotations), spec), limit=12, resamples=100)
    session.close()

    content = json.loads(annotations.read_text())
    by_name = {image["file_name"]: image for image in content["images"]}
    ids = sorted(c["id"] for c in content["categories"])
    images = [by_name[name] for name in result.images]
    rows = []
    for image, output in zip(images, raw, strict=True):
        opened = open_image(annotations.parent / "images" / image["file_name"])
        _, place = letterbox(opened, 640, 640)
        for label, box, score in brute_force(output[:4].T, output[4:], 0.001, 0.7, 300):
            x, y, w, h = output[:4, box].astype(float)
            left, right = np.clip((np.array([x - w / 2, x + w / 2]) - place.left) / place.ratio_x, 0, opened.width)
            top, bottom = np.clip((np.array([y - h / 2, y + h / 2]) - place.top) / place.ratio_y, 0, opened.height)
            row = {"image_id": image["id"], "category_id": ids[label], "score": score}
            rows.append(row | {"bbox": [left, top, right - left, bottom - top]})
    chosen = {image["id"] for image in images}
    content["images"] = images
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    stats = pycocotools_stats(content, rows)
    assert result.ap.n == 12 and result.ap.value > 0.3
    assert result.ap.value == pytest.approx(stats[0], abs=1e-4)
    assert result.ap50.value == pytest.approx(stats[1], abs=1e-4)
    assert result.ap.low < result.ap.value
