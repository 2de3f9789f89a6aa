"""Semantic segmentation: folders, label maps, protocols and mIoU, each beside a slow definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.images import open_image
from bitalloy.tasks.ade import LabelledFile, find_pairs, read_label
from bitalloy.tasks.base import Interface, TaskResult
from bitalloy.tasks.bootstrap import RESAMPLES, bootstrap_estimate, resampled_weights
from bitalloy.tasks.semantic import (
    SEMANTIC,
    SemanticData,
    best_classes,
    confusion,
    mean_iou,
    official_size,
    open_semantic,
    prepare_feed,
)


def interface(side: int | None = 64, classes: int = 9) -> Interface:
    sides = (side, side) if side else ("height", "width")
    small = (side // 4, side // 4) if side else ("h", "w")
    return Interface(
        inputs=(TensorSpec(name="pixel_values", dtype="FLOAT", shape=(1, 3, *sides)),),
        outputs=(TensorSpec(name="logits", dtype="FLOAT", shape=(1, classes, *small)),),
    )


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# -- folders ----------------------------------------------------------------------------------------


def ade_tree(root: Path, sizes: list[tuple[int, int]], rng: np.random.Generator) -> Path:
    """The layout of ADEChallengeData2016, with training beside validation."""
    for split in ("training", "validation"):
        for number, (width, height) in enumerate(sizes, start=1):
            name = f"ADE_{split[:-3]}_{number:08d}"
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            write(root / "images" / split / f"{name}.jpg", image)
            write(root / "annotations" / split / f"{name}.png", rng.integers(0, 10, (height, width), dtype=np.uint8))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n")
    return root


def test_layouts(tmp_path: Path, rng: np.random.Generator) -> None:
    root = ade_tree(tmp_path / "ade", [(20, 10)] * 3, rng)
    assert [pair.name for pair in find_pairs(root)] == [f"ADE_validat_{n:08d}" for n in (1, 2, 3)]
    assert find_pairs(root)[0].label == root / "annotations/validation/ADE_validat_00000001.png"
    (root / "images/validation").rename(root / "images/val")
    (root / "annotations/validation").rename(root / "annotations/val")
    assert [pair.name for pair in find_pairs(root)][:4] == [
        *(f"training/ADE_train_{n:08d}" for n in (1, 2, 3)),
        "val/ADE_validat_00000001",
    ]
    flat = tmp_path / "flat"
    for name in ("b", "a"):
        write(flat / f"{name}.jpg", np.zeros((4, 4, 3), np.uint8))
        write(flat / f"{name}.png", np.zeros((4, 4), np.uint8))
    assert [(p.name, p.label.name) for p in find_pairs(flat)] == [("a", "a.png"), ("b", "b.png")]


def test_images_without_label_maps_give_agreement(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for file in (shapes / "images").iterdir():
        (tmp_path / "images" / file.name).with_suffix(".jpg").write_bytes(b"")
        Image.open(file).convert("RGB").save((tmp_path / "images" / file.name).with_suffix(".jpg"))
    data, labelled = SEMANTIC.open(tmp_path / "images", interface(160)), SEMANTIC.open(shapes, interface(160))
    moved = Oracle(labelled, change=lambda label: np.roll(label, 3, axis=0))
    result = SEMANTIC.evaluate({"float": Oracle(labelled), "int8": moved}, data)
    (agreement,) = result.metrics
    same = [np.mean(a == b) for a, b in zip(moved.predictions, Oracle(labelled).predictions, strict=True)]
    assert agreement.name == "pixel agreement" and agreement.agreement
    assert agreement.values["int8"].value == pytest.approx(np.mean(same)) and np.mean(same) < 0.99


def test_missing_files(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="is no folder"):
        find_pairs(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No images in"):
        find_pairs(tmp_path / "empty")
    root = ade_tree(tmp_path / "ade", [(8, 8)] * 3, rng)
    (root / "annotations/validation/ADE_validat_00000002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images .* no label map, the first is 'ADE_validat_00000002'"):
        find_pairs(root)


# -- label maps -------------------------------------------------------------------------------------


def labelled(folder: Path, pixels: np.ndarray | Image.Image) -> LabelledFile:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(folder / "map.png")
    return LabelledFile("map", folder / "map.jpg", folder / "map.png")


def test_zero_labels_are_reduced(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [9, 255, 5]], np.uint8)
    file = labelled(tmp_path, values)
    reduced = read_label(file, (3, 2), 9, reduce_zero_label=True)
    assert reduced.tolist() == [[255, 0, 1], [8, 255, 4]]
    kept = read_label(file, (3, 2), 10, reduce_zero_label=False)
    assert kept.tolist() == values.tolist()


def test_palette_files_hold_class_numbers(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[1, 2], [3, 0]], np.uint8), "L").convert("P")
    image.putpalette([7, 8, 9] * 256)
    assert read_label(labelled(tmp_path, image), (2, 2), 3, reduce_zero_label=True).tolist() == [[0, 1], [2, 255]]


@pytest.mark.parametrize(
    ("pixels", "reduce", "message"),
    [
        (np.full((2, 3), 10, np.uint8), True, r"label 10 on 6 pixels; .* 9 classes takes 1 to 9, 0 or 255"),
        (np.full((2, 3), 9, np.uint8), False, r"label 9 on 6 pixels; .* takes 0 to 8, 255 .*set reduce_zero_label"),
        (np.full((2, 3), 300, np.uint16), True, "label 300 on 6 pixels"),
        (np.zeros((2, 3, 3), np.uint8), True, "mode RGB, expected one class number"),
        (np.zeros((3, 2), np.uint8), True, "is 2x3, but its image is 3x2"),
    ],
)
def test_broken_label_maps(tmp_path: Path, pixels: np.ndarray, reduce: bool, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read_label(labelled(tmp_path, pixels), (3, 2), 9, reduce_zero_label=reduce)
    assert "map.png" in str(raised.value)


def test_unreadable_label_map(tmp_path: Path) -> None:
    (tmp_path / "map.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Cannot read the image .*map\.png"):
        read_label(LabelledFile("map", tmp_path, tmp_path / "map.png"), (3, 2), 9, reduce_zero_label=True)


# -- mIoU -------------------------------------------------------------------------------------------


def slow_scores(labels: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> tuple[float, float]:
    """MIoU and pixel accuracy, pixel by pixel over the set."""
    shared, union = [0] * classes, [0] * classes
    right = total = 0
    for label, predicted in zip(labels, predictions, strict=True):
        for a, b in zip(label.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if a == 255:
                continue
            total += 1
            right += a == b
            for c in range(classes):
                shared[c] += a == c and b == c
                union[c] += a == c or b == c
    each = [s / u for s, u in zip(shared, union, strict=True) if u]
    return sum(each) / len(each), right / total


def test_confusion_and_miou_equal_slow_loops(rng: np.random.Generator) -> None:
    labels = [rng.choice([0, 1, 2, 5, 255], (13, 7)).astype(np.uint8) for _ in range(3)]
    predictions = [rng.choice([0, 1, 3, 5], (13, 7)) for _ in range(3)]  # 2 is never found, 3 never labelled, 4 neither
    total = np.sum([confusion(a, b, 6) for a, b in zip(labels, predictions, strict=True)], axis=0)
    for row in range(6):
        for column in range(6):
            assert total[row, column] == sum(
                int(((a == row) & (b == column)).sum()) for a, b in zip(labels, predictions, strict=True)
            )
    counts = np.stack([total.diagonal(), total.sum(axis=1), total.sum(axis=0)])
    expected = slow_scores(labels, predictions, 6)
    assert mean_iou(counts) == pytest.approx(expected[0])
    assert np.isnan(mean_iou(np.zeros((3, 6))))


def test_logits_are_enlarged_before_the_best_class_is_taken(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    logits = rng.standard_normal((7, 16, 12)).astype(np.float32)
    enlarge = torch.nn.functional.interpolate
    direct = enlarge(torch.tensor(logits)[None], (150, 91), mode="bilinear")[0].argmax(0).numpy()
    twice = enlarge(torch.tensor(logits)[None], (64, 96), mode="bilinear")
    twice = enlarge(twice, (150, 91), mode="bilinear")[0].argmax(0).numpy()
    assert (best_classes(logits, [(150, 91)]) != direct).mean() < 1e-3
    assert (best_classes(logits, [(64, 96), (150, 91)]) != twice).mean() < 1e-3
    assert (direct != twice).mean() > 1e-3  # the protocols do differ


def test_of_equal_classes_the_first_is_taken_and_what_is_no_number_never_wins() -> None:
    logits = np.array([[[np.nan, 1, -5]], [[-3, 1, np.nan]], [[-7, 1, -5]], [[np.nan, 0, -9]]])
    assert best_classes(logits, [(1, 3)]).tolist() == [[1, 0, 0]]
    assert best_classes(np.full((3, 2, 2), np.nan), [(2, 2)]).tolist() == [[0, 0], [0, 0]]


# -- protocols --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((683, 512), (704, 512)),
        ((512, 683), (512, 704)),
        ((640, 480), (704, 512)),
        ((1000, 100), (2048, 224)),
        ((512, 512), (512, 512)),
        ((2000, 500), (2048, 512)),
        ((4000, 500), (2048, 256)),
        ((256, 256), (512, 512)),
        ((300, 200), (768, 512)),
    ],
)
def test_official_canvas(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert official_size(*size) == expected


def test_squash_stretches_and_normalises(tmp_path: Path, rng: np.random.Generator) -> None:
    root = ade_tree(tmp_path, [(90, 40)], rng)
    data = open_semantic(root, interface(64))
    image = open_image(data.files[0].image)
    feed, sizes = prepare_feed(image, data)
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(feed[0], expected.transpose(2, 0, 1), atol=1e-5)
    assert sizes == [(40, 90)]


def test_official_keeps_the_ratio(tmp_path: Path, rng: np.random.Generator) -> None:
    root = ade_tree(tmp_path, [(683, 512)], rng)
    data = open_semantic(root, interface(None), protocol="official")
    image = Image.fromarray(np.tile(np.arange(683) % 256, (512, 1)).astype(np.uint8)).convert("RGB")
    feed, sizes = prepare_feed(image, data)
    assert feed.shape == (1, 3, 512, 704) and sizes == [(512, 704), (512, 683)]
    pixels = feed[0] * np.reshape([0.229, 0.224, 0.225], (3, 1, 1)) + np.reshape([0.485, 0.456, 0.406], (3, 1, 1))
    at = (np.arange(704) + 0.5) * 683 / 704 - 0.5
    expected = np.interp(at, np.arange(683), np.arange(683) % 256)
    np.testing.assert_allclose(pixels[1, 100] * 255, np.rint(expected), atol=1.01)
    with pytest.raises(DataError, match=r"must have open height and width.*squash"):
        open_semantic(root, interface(64), protocol="official")


def test_models_and_options_that_do_not_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    root = ade_tree(tmp_path, [(20, 20)], rng)
    assert open_semantic(root, interface(None)).image.height == 512
    with pytest.raises(DataError, match="300 classes; label maps hold at most 255"):
        open_semantic(root, interface(64, 300))
    assert SEMANTIC.matches(interface()) and not SEMANTIC.matches(interface(64, 1))
    other = open_semantic(root, interface(), reduce_zero_label=False)
    assert other.inputs([0], ["image"]) != open_semantic(root, interface()).inputs([0], ["image"])


# -- evaluation -------------------------------------------------------------------------------------


class Oracle:
    """A model that knows the label maps of the images that will come; unlabelled pixels get class 0."""

    def __init__(
        self, data: SemanticData, side: int | None = None, change: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.predictions, self.logits = [], []
        for file in data.files:
            label = np.asarray(Image.open(file.label)).astype(int) - int(data.reduce_zero_label)
            label[(label < 0) | (label >= data.classes)] = 0
            label = change(label) if change else label
            self.predictions.append(label)
            one_hot = np.zeros((data.classes, *label.shape), np.float32)
            np.put_along_axis(one_hot, label[None], 1.0, axis=0)
            if side:
                maps = [Image.fromarray(c).resize((side, side), Image.Resampling.BILINEAR) for c in one_hot]
                one_hot = np.stack([np.asarray(m) for m in maps])
            self.logits.append(one_hot)
        self.seen = 0

    def __call__(self, _: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen += 1
        return {"logits": self.logits[self.seen - 1][None]}


def by_name(result: TaskResult, model: str = "float") -> dict[str, float]:
    return {metric.name: metric.values[model].value for metric in result.metrics}


def test_perfect_and_worse_models(shapes: Path) -> None:
    data = SEMANTIC.open(shapes, interface(160))
    assert data.classes == 9 and len(data.files) == 6
    truth = [np.asarray(Image.open(file.label)).astype(int) - 1 for file in data.files]

    def moved(label: np.ndarray) -> np.ndarray:
        return np.roll(label, 5, axis=1)

    told: list[int] = []
    models = {"float": Oracle(data), "int8": Oracle(data, change=moved), "mixed": Oracle(data, 40)}
    result = SEMANTIC.evaluate(models, data, seed=7, progress=told.append)
    assert by_name(result) == {"mIoU": 1, "pixel accuracy": 1, "pixel agreement": 1} and sum(told) == 18
    miou, accuracy = slow_scores(truth, models["int8"].predictions, 9)
    assert by_name(result, "int8") == pytest.approx(
        {"mIoU": miou, "pixel accuracy": accuracy, "pixel agreement": accuracy}
    )
    assert 0.3 < miou < 0.95 and 0.8 < by_name(result, "mixed")["mIoU"] < 1
    drop = result.metrics[0].drops["int8"]
    assert drop.value == pytest.approx(1 - miou) and 0 < drop.low < drop.value
    assert result.notes[0] == "Protocol: squash."


def test_interval_is_that_of_repeated_images(shapes: Path) -> None:
    data = SEMANTIC.open(shapes, interface(160))
    wrong = Oracle(data, change=lambda label: np.roll(label, 9, axis=0))
    result = SEMANTIC.evaluate({"float": wrong}, data, seed=2).metrics[0].values["float"]
    pairs = [
        (np.asarray(Image.open(file.label)).astype(int) - 1, predicted)
        for file, predicted in zip(data.files, wrong.predictions, strict=True)
    ]
    values = []
    for row in resampled_weights(6, RESAMPLES, 2):
        drawn = [confusion(*pairs[i], 9) for i in np.repeat(np.arange(6), row)]
        total = np.sum(drawn, axis=0)
        union = total.sum(0) + total.sum(1) - total.diagonal()
        values.append((total.diagonal()[union > 0] / union[union > 0]).mean())
    spread = bootstrap_estimate(result.value, np.array(values))
    assert (result.low, result.high) == pytest.approx((max(spread.low, 0), min(spread.high, 1)))


def test_limit_and_wrong_outputs(shapes: Path) -> None:
    data = SEMANTIC.open(shapes, interface(160))
    assert SEMANTIC.evaluate({"float": Oracle(data)}, data, limit=2).metrics[0].values["float"].n == 2
    with pytest.raises(DataError, match=r"\[1, 5, 4, 4\]; expected \[1, 9, height, width\]"):
        SEMANTIC.evaluate({"float": lambda _: {"logits": np.zeros((1, 5, 4, 4))}}, data)


def test_nothing_labelled(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", np.zeros((8, 8, 3), np.uint8))
    write(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    data = SEMANTIC.open(tmp_path, interface(64))
    with pytest.raises(DataError, match="1 evaluated label maps have no labelled pixel"):
        SEMANTIC.evaluate({"float": Oracle(data)}, data)


@pytest.mark.parametrize("protocol", ["squash", "official"])
def test_real_ade20k(real: Path, protocol: str) -> None:
    """Ground truth at a quarter of 512 pixels, as SegFormer's outputs are, keeps most of its mIoU."""
    data = open_semantic(real / "ade20k-val-3", interface(None, 150), protocol=protocol)  # type: ignore[arg-type]
    assert len(data.files) == 3
    result = SEMANTIC.evaluate({"small": Oracle(data, 128)}, data)
    assert by_name(result, "small")["mIoU"] > 0.75 and by_name(result, "small")["pixel accuracy"] > 0.97
    assert result.notes[0] == f"Protocol: {protocol}."
