"""Instance segmentation: masks drawn from coefficients and prototypes, and their AP beside pycocotools' own."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.images import Geometry, ImageSpec, letterbox, open_image
from bitalloy.data.masks import decode, encode
from bitalloy.tasks.base import Interface, TaskResult
from bitalloy.tasks.instance import INSTANCE, draw_masks, find_instances
from bitalloy.tasks.yolo import mask_parts

Masks = Sequence[np.ndarray]


def spec(side: int) -> ImageSpec:
    return ImageSpec(input="images", height=side, width=side)


def interface(side: int, classes: int, count: int, prototype: int) -> Interface:
    cells = sum((side // stride) ** 2 for stride in (8, 16, 32))
    return Interface(
        inputs=(TensorSpec(name="images", dtype="FLOAT", shape=(1, 3, side, side)),),
        outputs=(
            TensorSpec(name="output0", dtype="FLOAT", shape=(1, 4 + classes + count, cells)),
            TensorSpec(name="output1", dtype="FLOAT", shape=(1, count, prototype, prototype)),
        ),
    )


class Labels:
    """A segmentation file as pycocotools reads it: the oracle, which shares no code with the package."""

    def __init__(self, path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(path))
        self.folder = path.parent / "images"
        self.ids = sorted(self.coco.getImgIds())
        self.categories = sorted(self.coco.getCatIds())

    def objects(self, image: int) -> list[dict[str, Any]]:
        return [a for a in self.coco.loadAnns(self.coco.getAnnIds(imgIds=image)) if not a["iscrowd"]]

    def pixels(self, image: int) -> np.ndarray:
        return np.asarray(open_image(self.folder / self.coco.imgs[image]["file_name"]))


class Oracle:
    """A YOLO model with masks that knows the labels; one prototype for every object, in {-1, 1} or between.

    Args:
        labels: what it knows.
        images: ids in the order in which they will come.
        side: of the canvas.
        prototype: side of the prototypes.
        change: what is done to the canvas masks (k, side, side) before they become prototypes.
        scores: of the objects, as a function of their number.
    """

    def __init__(
        self,
        labels: Labels,
        images: Sequence[int],
        side: int,
        prototype: int,
        change: Callable[[np.ndarray], np.ndarray] = lambda masks: masks,
        scores: Callable[[int], np.ndarray] = lambda k: np.linspace(0.9, 0.6, k),
    ) -> None:
        self.answers = [self._answer(labels, i, side, prototype, change, scores) for i in images]
        self.seen = 0

    @staticmethod
    def _answer(
        labels: Labels,
        image: int,
        side: int,
        prototype: int,
        change: Callable[[np.ndarray], np.ndarray],
        scores: Callable[[int], np.ndarray],
    ) -> dict[str, np.ndarray]:
        objects = labels.objects(image)
        k, classes = len(objects), len(labels.categories)
        first = np.zeros((1, 4 + classes + 40, 8 * 40), np.float32)
        maps = np.zeros((40, side, side), np.float32)
        maps -= 1
        for column, (found, score) in enumerate(zip(objects, scores(k), strict=True)):
            mask = np.asarray(labels.coco.annToMask(found), np.uint8) * 255
            canvas, place = letterbox(_image(mask), side, side, 0)
            maps[column] = canvas / 127.5 - 1
            x, y, w, h = found["bbox"]
            box = [(x + w / 2) * place.ratio_x + place.left, (y + h / 2) * place.ratio_y + place.top]
            first[0, :4, column] = [*box, w * place.ratio_x, h * place.ratio_y]
            first[0, 4 + labels.categories.index(found["category_id"]), column] = score
            first[0, 4 + classes + column, column] = 2.0
        maps = change(maps)
        step = side // prototype
        small = maps.reshape(40, prototype, step, prototype, step).mean(axis=(2, 4))
        return {"output0": first, "output1": small[None]}

    def __call__(self, _: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen += 1
        return self.answers[self.seen - 1]


def _image(mask: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(mask)


def shrunk(maps: np.ndarray) -> np.ndarray:
    """Masks that have lost their left part."""
    return np.minimum(maps, np.roll(maps, 6, axis=2))


def independent(labels: Labels, images: Sequence[int], found: Sequence[tuple[Any, Masks]], kind: str) -> np.ndarray:
    """The twelve numbers of an untouched COCOeval on detections (boxes, scores, classes) with masks."""
    results = []
    for image, (one, masks) in zip(images, found, strict=True):
        rows = zip(one.boxes.tolist(), one.scores.tolist(), one.classes.tolist(), masks, strict=True)
        for (x1, y1, x2, y2), score, label, mask in rows:
            row = {"image_id": image, "category_id": labels.categories[label], "score": score}
            packed = encode(mask)
            row |= {"segmentation": packed} if kind == "segm" else {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(labels.coco, labels.coco.loadRes(results), kind)
        run.params.imgIds = list(images)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.asarray(run.stats)


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# -- drawing -----------------------------------------------------------------------------------------


def slow_masks(
    coefficients: np.ndarray,
    prototypes: np.ndarray,
    boxes: np.ndarray,
    place: Geometry,
    side: int,
    size: tuple[int, int],
) -> list[np.ndarray]:
    """Pixel by pixel: where does its centre lie on the prototypes, and what is the logit there?"""
    count, height, width = prototypes.shape
    drawn = []
    for weights, (x1, y1, x2, y2) in zip(coefficients, boxes, strict=True):
        mask = np.zeros((size[1], size[0]), bool)
        for row in range(size[1]):
            for column in range(size[0]):
                if not (x1 <= column + 0.5 < x2 and y1 <= row + 0.5 < y2):
                    continue
                y = ((row + 0.5) * place.ratio_y + place.top) / side * height - 0.5
                x = ((column + 0.5) * place.ratio_x + place.left) / side * width - 0.5
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                top, left = min(int(y), height - 2), min(int(x), width - 2)
                down, right = y - top, x - left
                total = 0.0
                for k in range(count):
                    p = prototypes[k]
                    total += weights[k] * (
                        (p[top, left] * (1 - right) + p[top, left + 1] * right) * (1 - down)
                        + (p[top + 1, left] * (1 - right) + p[top + 1, left + 1] * right) * down
                    )
                mask[row, column] = total > 0
        drawn.append(mask)
    return drawn


@pytest.mark.parametrize("size", [(40, 40), (50, 23), (17, 30)])
def test_masks_equal_a_pixel_by_pixel_definition(size: tuple[int, int], rng: np.random.Generator) -> None:
    _, place = letterbox(_image(np.zeros((size[1], size[0]), np.uint8)), 64, 64)
    coefficients, prototypes = rng.standard_normal((3, 5)), rng.standard_normal((5, 16, 16)).astype(np.float32)
    boxes = np.array([[0.0, 0.0, *size], [3.3, 4.6, size[0] - 2.2, size[1] - 3.5], [5.0, 5.0, 5.2, 9.0]])
    found = list(draw_masks(coefficients, prototypes, boxes, place, (64, 64), size))
    expected = slow_masks(coefficients, prototypes, boxes, place, 64, size)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (size[1], size[0])
        assert np.count_nonzero(ours != theirs) <= 1  # a logit of 0 up to rounding
    assert found[0].any() and not found[2].any()


def test_masks_are_those_of_torch_on_a_canvas_without_padding(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    coefficients = rng.standard_normal((4, 8)).astype(np.float32)
    prototypes = rng.standard_normal((8, 20, 20)).astype(np.float32)
    boxes = np.array([[0.0, 0, 80, 80], [10.2, 3.9, 55.5, 70.1], [30, 30, 31, 31], [-0.0, 40, 80, 80]])
    place = Geometry(ratio_x=1.0, ratio_y=1.0, left=0, top=0)
    found = draw_masks(coefficients, prototypes, boxes, place, (80, 80), (80, 80))
    logits = torch.tensor(coefficients) @ torch.tensor(prototypes).reshape(8, -1)
    large = torch.nn.functional.interpolate(logits.reshape(1, 4, 20, 20), (80, 80), mode="bilinear")[0].numpy()
    at = np.arange(80) + 0.5
    for ours, theirs, (x1, y1, x2, y2) in zip(found, large, boxes, strict=True):
        inside = ((at >= y1) & (at < y2))[:, None] & ((at >= x1) & (at < x2))
        np.testing.assert_array_equal(ours, (theirs > 0) & inside)


def test_not_a_number_draws_nothing() -> None:
    coefficients = np.array([[np.nan, 1.0], [np.inf, -np.inf]])
    place = Geometry(ratio_x=1.0, ratio_y=1.0, left=0, top=0)
    masks = draw_masks(coefficients, np.ones((2, 4, 4)), np.array([[0.0, 0, 8, 8]] * 2), place, (8, 8), (8, 8))
    assert not any(mask.any() for mask in masks)


def test_coefficients_follow_their_box_through_suppression(rng: np.random.Generator) -> None:
    first = np.zeros((1, 4 + 2 + 3, 6), np.float32)
    first[0, :4] = [[10, 11, 40, 40, 10, 20], [10, 10, 40, 40, 40, 20], [8, 8, 9, 0, 9, 9], [8, 8, 9, 9, 9, 9]]
    first[0, 4:6] = [[0.5, 0.9, 0.0, 0.9, 0.3, 0.0], [0.0, 0.0, 0.8, 0.9, 0.0, 0.0]]
    first[0, 6:] = rng.standard_normal((3, 6))
    outputs = {"output0": first, "output1": np.ones((1, 3, 16, 16), np.float32)}
    place = Geometry(ratio_x=1.0, ratio_y=1.0, left=0, top=0)
    found, masks = find_instances(outputs, spec(64), place, (64, 64))
    kept = [1, 2, 4]  # 0 is covered by the better 1, 3 has no area, 5 no score
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.3])
    for column, mask in zip(kept, masks, strict=True):
        assert decode(mask).any() == (first[0, 6:, column].sum() > 0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 9, 20)], r"\[\[1, 9, 20\]\]"),
        ([(1, 9, 20), (1, 5)], r"prototypes \[1, m, height, width\]"),
        ([(1, 8, 20), (1, 4, 5, 5)], r"\[1, 4 \+ classes \+ m, boxes\]"),
    ],
)
def test_outputs_without_masks_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mask_parts({f"output{i}": np.zeros(shape) for i, shape in enumerate(shapes)})


def test_models_with_masks_are_known() -> None:
    assert INSTANCE.matches(interface(320, 8, 32, 80))
    plain = interface(320, 8, 32, 80)
    assert not INSTANCE.matches(Interface(inputs=plain.inputs, outputs=plain.outputs[:1]))
    few = TensorSpec(name="output0", dtype="FLOAT", shape=(1, 36, 2100))
    assert not INSTANCE.matches(Interface(inputs=plain.inputs, outputs=(few, plain.outputs[1])))


# -- average precision ------------------------------------------------------------------------------


def by_name(result: TaskResult, model: str = "float") -> dict[str, float]:
    return {metric.name: metric.values[model].value for metric in result.metrics}


def test_perfect_masks_reach_one_and_worse_ones_are_seen(shapes: Path) -> None:
    path = shapes / "instances.json"
    labels = Labels(path)
    data = INSTANCE.open(path, interface(160, 8, 40, 160))
    models = {
        "float": Oracle(labels, labels.ids, 160, 160),
        "int8": Oracle(labels, labels.ids, 160, 160, shrunk),
        "mixed": Oracle(labels, labels.ids, 160, 40),
    }
    told: list[int] = []
    result = INSTANCE.evaluate(models, data, progress=told.append)
    assert sum(told) == 18 and [m.name for m in result.metrics][2:4] == ["mask AP50-95", "mask AP50"]
    assert by_name(result) == pytest.approx(
        {"box AP50-95": 1, "box AP50": 1, "mask AP50-95": 1, "mask AP50": 1, "box agreement": 1, "mask agreement": 1},
        abs=1e-6,
    )
    float_is_right = by_name(result, "int8")
    assert float_is_right["mask agreement"] == pytest.approx(float_is_right["mask AP50-95"])
    assert float_is_right["box agreement"] == pytest.approx(1)
    assert by_name(result, "int8")["box AP50-95"] == pytest.approx(1)
    assert 0.2 < by_name(result, "int8")["mask AP50-95"] < 0.9
    assert 0.7 < by_name(result, "mixed")["mask AP50-95"] < 1
    mask = result.metrics[2]
    assert mask.drops["int8"].value == pytest.approx(1 - mask.values["int8"].value)
    assert mask.drops["int8"].low > 0 and result.metrics[0].drops["int8"].value == pytest.approx(0)
    assert result.confidence_shift["int8"].value == pytest.approx(0)
    assert mask.values["float"].n == 6


def test_mask_ap_is_that_of_pycocotools(shapes: Path) -> None:
    labels = Labels(shapes / "instances.json")
    data = INSTANCE.open(shapes / "instances.json", interface(160, 8, 40, 160))
    rng = np.random.default_rng(1)

    def noisy(maps: np.ndarray) -> np.ndarray:
        return maps + rng.normal(0, 1.5, maps.shape)

    def uneven(k: int) -> np.ndarray:
        return np.random.default_rng(k).permutation(k) / 20 + 0.1

    oracle = Oracle(labels, labels.ids, 160, 40, noisy, uneven)
    result = INSTANCE.evaluate({"float": oracle}, data)
    found = []
    for image, outputs in zip(labels.ids, oracle.answers, strict=True):
        pixels = labels.pixels(image)
        _, place = letterbox(_image(pixels), 160, 160)
        one, masks = find_instances(outputs, spec(160), place, (pixels.shape[1], pixels.shape[0]))
        found.append((one, [decode(mask) for mask in masks]))
    for kind, name in (("segm", "mask"), ("bbox", "box")):
        stats = independent(labels, labels.ids, found, kind)
        assert by_name(result)[f"{name} AP50-95"] == pytest.approx(stats[0], abs=1e-9)
        assert by_name(result)[f"{name} AP50"] == pytest.approx(stats[1], abs=1e-9)
    assert 0.2 < by_name(result)["mask AP50-95"] < 0.95


def test_real_labels_through_the_post_processing(real: Path) -> None:
    path = real / "coco-val-94/instances.json"
    labels = Labels(path)
    data = INSTANCE.open(path, interface(640, 80, 40, 160))
    oracle = Oracle(labels, [entry.id for entry in data.entries(data.choose(8, 2))], 640, 160)
    result = INSTANCE.evaluate({"float": oracle}, data, limit=8, seed=2)
    assert by_name(result)["box AP50-95"] > 0.97
    assert by_name(result)["mask AP50-95"] > 0.8 and by_name(result)["mask AP50"] > 0.95


# -- labels that do not fit -------------------------------------------------------------------------


def changed(shapes: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((shapes / "instances.json").read_text())
    change(content)
    (folder / "images").symlink_to(shapes / "images")
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_labels_without_masks_give_box_ap_only(shapes: Path, tmp_path: Path) -> None:
    path = changed(shapes, tmp_path, lambda c: [a.pop("segmentation") for a in c["annotations"]])
    labels = Labels(shapes / "instances.json")
    result = INSTANCE.evaluate(
        {"float": Oracle(labels, labels.ids, 160, 160)}, INSTANCE.open(path, interface(160, 8, 40, 160))
    )
    assert [m.name for m in result.metrics] == ["box AP50-95", "box AP50"]
    assert "No mask AP: 'instances.json' has no masks." in result.notes


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "Annotation 3 of .* has no usable mask: .*null"),
        ([[1, 2, 3]], "Annotation 3 .*three corners"),
        ({"size": [10, 10], "counts": [100]}, "Annotation 3 .*10x10 pixels"),
    ],
)
def test_broken_masks_are_named(shapes: Path, tmp_path: Path, segmentation: Any, message: str) -> None:
    path = changed(shapes, tmp_path, lambda c: c["annotations"][2].update(segmentation=segmentation))
    labels = Labels(shapes / "instances.json")
    data = INSTANCE.open(path, interface(160, 8, 40, 160))
    with pytest.raises(DataError, match=message):
        INSTANCE.evaluate({"float": Oracle(labels, labels.ids, 160, 160)}, data)
