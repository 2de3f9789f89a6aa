"""Promptable segmentation: coordinates, masks and agreement, with models that answer from the prompt alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.images import ImageSpec
from bitalloy.data.masks import decode
from bitalloy.samples.shapes import scene
from bitalloy.tasks.base import Interface, TaskResult
from bitalloy.tasks.promptable import PROMPTABLE, Prompt, PromptData, feeds_of, join_promptable, prepare_image, to_mask


def interface(side: int = 256) -> Interface:
    shapes: dict[str, tuple[int | str, ...]] = {
        "image": (1, 3, side, side),
        "point_coords": (1, "points", 2),
        "point_labels": (1, "points"),
    }
    return Interface(
        inputs=tuple(TensorSpec(name=name, dtype="FLOAT", shape=shape) for name, shape in shapes.items()),
        outputs=(
            TensorSpec(name="low_res_masks", dtype="FLOAT", shape=(1, 4, side // 4, side // 4)),
            TensorSpec(name="iou_predictions", dtype="FLOAT", shape=(1, 4)),
        ),
    )


class Oracle:
    """A SAM that knows the masks on the canvas of each image, and finds the one that a prompt means.

    For a box it is the object whose box is nearest, and the first mask is the good one; for a point the object with
    the point in it, and the third is, with the best predicted IoU. The other masks are wrong.
    """

    def __init__(
        self,
        data: PromptData,
        side: int,
        low: int,
        change: Callable[[np.ndarray], np.ndarray] = lambda mask: mask,
    ) -> None:
        self.side, self.low, self.change = side, low, change
        self.known: dict[bytes, list[np.ndarray]] = {}
        assert data.labels is not None
        objects = data.labels.objects()
        for entry in data.labels.images:
            image = data.labels.open_image(entry)
            feed, (height, width) = prepare_image(image, data.image)
            canvases = []
            for box in objects[entry.id]:
                mask = decode(data.labels.mask(box, image.size))
                canvas = np.zeros((side, side), bool)
                canvas[:height, :width] = np.asarray(
                    Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
                )
                canvases.append(canvas)
            self.known[feed.tobytes()] = canvases

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        points, labels = feeds["point_coords"][0], feeds["point_labels"][0].tolist()
        canvases = [c for c in self.known[feeds["image"].tobytes()] if c.any()]
        if labels == [2, 3]:
            chosen = min(canvases, key=lambda c: float(np.abs(extent(c) - points.ravel()).sum()))
        else:
            assert labels == [1, -1] and points[1].tolist() == [0, 0]
            x, y = points[0]
            near = [np.hypot(*(np.argwhere(c) + 0.5 - (y, x)).T).min() for c in canvases]
            chosen = canvases[int(np.argmin(near))]
        step = self.side // self.low
        shown = self.change(chosen).astype(np.float32).reshape(self.low, step, self.low, step).mean((1, 3)) * 2 - 1
        masks = np.stack([shown if labels == [2, 3] else -shown, -shown, -shown, shown])[None]
        return {"low_res_masks": masks, "iou_predictions": np.array([[0.99, 0.2, 0.1, 0.8]], np.float32)}


def extent(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def by_name(result: TaskResult, model: str = "float") -> dict[str, float]:
    return {metric.name: metric.values[model].value for metric in result.metrics}


# -- preparing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "covered"), [((100, 50), (32, 64)), ((30, 41), (64, 47)), ((64, 64), (64, 64))])
def test_images_are_fitted_as_sam_does(
    size: tuple[int, int], covered: tuple[int, int], rng: np.random.Generator
) -> None:
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    spec = ImageSpec(input="image", height=64, width=64, fit="stretch", mean=mean, std=std)
    feed, found = prepare_image(image, spec)
    assert found == covered and feed.shape == (1, 3, 64, 64)
    pixels = np.asarray(image.resize(covered[::-1], Image.Resampling.BILINEAR)).astype(float)
    expected = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(feed[0, :, : covered[0], : covered[1]], expected.transpose(2, 0, 1), atol=1e-5)
    assert not feed[0, :, covered[0] :].any() and not feed[0, :, :, covered[1] :].any()


def test_prompts_move_with_the_image_and_padding_stays() -> None:
    feeds = feeds_of(Prompt.box(10, 20, 50, 40), (100, 50), (512, 1024))
    np.testing.assert_allclose(feeds["point_coords"], [[[102.4, 204.8], [512, 409.6]]], rtol=1e-6)
    assert feeds["point_labels"].tolist() == [[2, 3]]
    feeds = feeds_of(Prompt.point(50, 25), (100, 50), (512, 1024))
    assert feeds["point_coords"].tolist() == [[[512, 256], [0, 0]]] and feeds["point_labels"].tolist() == [[1, -1]]
    assert {v.dtype for v in feeds.values()} == {np.dtype("float32")}


def test_masks_go_over_the_canvas_to_the_image(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    low = rng.standard_normal((1, 4, 32, 32)).astype(np.float32)
    scores = np.array([[0.9, 0.1, 0.7, 0.3]], np.float32)
    enlarge = torch.nn.functional.interpolate
    large = enlarge(torch.tensor(low), (128, 128), mode="bilinear")[:, :, :77, :128]
    expected = (enlarge(large, (60, 100), mode="bilinear")[0] > 0).numpy()
    outputs = {"low_res_masks": low, "iou_predictions": scores}
    for kind, channel in (("box", 0), ("point", 2)):
        found = to_mask(outputs, kind, 128, (77, 128), (100, 60))
        assert found.shape == (60, 100) and (found != expected[channel]).mean() < 1e-3
    single = {"masks": low[:, :1], "iou": scores[:, :1]}
    assert (to_mask(single, "point", 128, (77, 128), (100, 60)) != expected[0]).mean() < 1e-3
    with pytest.raises(DataError, match=r"\[\[1, 4, 32, 32\]\]; expected masks \[1, c, height, width\]"):
        to_mask({"low_res_masks": low}, "box", 128, (77, 128), (100, 60))
    broken = {"low_res_masks": np.full_like(low, np.nan), "iou_predictions": np.full_like(scores, np.nan)}
    assert not to_mask(broken, "point", 128, (77, 128), (100, 60)).any()


def test_join_encodes_an_image_once() -> None:
    encoded: list[float] = []

    def encode(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert set(feeds) == {"image"}
        encoded.append(float(feeds["image"][0]))
        return {"image_embeddings": feeds["image"] * 2}

    def decode_prompt(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert set(feeds) == {"image_embeddings", "point_coords", "point_labels"}
        return {"sum": feeds["image_embeddings"] + feeds["point_coords"].sum()}

    run = join_promptable(encode, decode_prompt)
    first, second = np.array([1.0]), np.array([5.0])
    results = [
        float(run({"image": image, "point_coords": np.array([p]), "point_labels": np.array([1.0])})["sum"][0])
        for image, p in ((first, 1.0), (first, 2.0), (second, 1.0), (second, 2.0), (first, 3.0))
    ]
    assert results == [3, 4, 11, 12, 5] and encoded == [1, 5, 1]


# -- evaluation -------------------------------------------------------------------------------------


def test_perfect_and_worse_models(shapes: Path) -> None:
    data = PROMPTABLE.open(shapes / "instances.json", interface(160))

    def moved(mask: np.ndarray) -> np.ndarray:
        return np.roll(mask, 3, axis=1)

    models = {
        "float": Oracle(data, 160, 160),
        "int8": Oracle(data, 160, 160, moved),
        "mixed": Oracle(data, 160, 40),
    }
    told: list[int] = []
    result = PROMPTABLE.evaluate(models, data, progress=told.append)
    assert sum(told) == 18
    names = [f"{what}, {kind} prompts" for what in ("mIoU", "agreement") for kind in ("box", "point")]
    assert by_name(result) == dict.fromkeys(names, 1.0)
    ious = []
    for index in range(6):
        for mask in scene(index, size=160, seed=3).masks():
            shifted = np.roll(mask, 3, axis=1)
            ious.append((mask & shifted).sum() / (mask | shifted).sum())
    assert by_name(result, "int8") == pytest.approx(dict.fromkeys(names, np.mean(ious)))
    assert 0.8 < by_name(result, "mixed")["mIoU, box prompts"] < 1
    drop = result.metrics[0].drops["int8"]
    assert drop.value == pytest.approx(1 - np.mean(ious)) and drop.low > 0
    assert result.notes[0] == f"{len(ious)} objects on 6 images."
    assert PROMPTABLE.evaluate({"float": Oracle(data, 160, 160)}, data, limit=2).metrics[0].values["float"].n == 2


def test_real_coco(real: Path) -> None:
    data = PROMPTABLE.open(real / "coco-val-94/instances.json", interface(1024))
    chosen = _only(data, 5)
    result = PROMPTABLE.evaluate({"float": Oracle(chosen, 1024, 256)}, chosen)
    found = by_name(result)
    assert found["mIoU, box prompts"] > 0.85 and found["agreement, box prompts"] == 1


def _only(data: PromptData, count: int) -> PromptData:
    """The first images with at most six objects."""
    assert data.labels is not None
    objects = data.labels.objects()
    kept = tuple(i for i in data.labels.images if 0 < len(objects[i.id]) <= 6)[:count]
    labels = replace(data.labels, images=kept, boxes=tuple(b for i in kept for b in objects[i.id]))
    return PromptData(tuple(labels.folder / i.file_name for i in kept), labels, data.image)


def test_agreement_needs_no_labels(shapes: Path, tmp_path: Path) -> None:
    data = PROMPTABLE.open(shapes / "images", interface(160))
    asked: list[list[float]] = []

    def half(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Everything right of the prompt's first point."""
        asked.append(feeds["point_coords"][0].ravel().tolist())
        masks = np.where(np.arange(160) > feeds["point_coords"][0, 0, 0], 1.0, -1.0)
        return {"masks": np.broadcast_to(masks, (1, 1, 160, 160)).astype(np.float32), "iou": np.ones((1, 1))}

    def nothing_found(_: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"masks": -np.ones((1, 1, 160, 160), np.float32), "iou": np.ones((1, 1))}

    result = PROMPTABLE.evaluate({"float": half, "same": half, "int8": nothing_found}, data)
    assert [m.name for m in result.metrics] == ["agreement, box prompts", "agreement, point prompts"]
    assert set(by_name(result, "same").values()) == {1.0} and set(by_name(result, "int8").values()) == {0.0}
    assert result.notes[0] == "54 cells of a grid on 6 images."
    third = 160 / 3
    boxes = {tuple(np.round(row, 2)) for row in asked[::4]}
    assert boxes == {
        tuple(np.round([x * third, y * third, (x + 1) * third, (y + 1) * third], 2)) for x in range(3) for y in range(3)
    }
    assert [round(third / 2, 2)] * 2 + [0, 0] in [np.round(row, 2).tolist() for row in asked]
    labelled = PROMPTABLE.open(shapes / "instances.json", interface(160))
    assert data.inputs([0], ["image"]) != labelled.inputs([0], ["image"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No images in"):
        PROMPTABLE.open(tmp_path / "empty", interface(160))


# -- labels that do not fit -------------------------------------------------------------------------


def opened(shapes: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> PromptData:
    content = json.loads((shapes / "instances.json").read_text())
    change(content)
    (folder / "images").symlink_to(shapes / "images")
    (folder / "instances.json").write_text(json.dumps(content))
    return PROMPTABLE.open(folder / "instances.json", interface(160))


def silent(_: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"masks": np.zeros((1, 1, 4, 4), np.float32), "iou": np.zeros((1, 1), np.float32)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "bbox",
            [150, 10, 20, 20],
            r"box \[150.*of annotation 2 of .* on '000000.png' \(160x160\).* outside the image",
        ),
        ("bbox", [-5, 10, 20, 20], "outside the image"),
        ("bbox", [10, 10, 0, 20], "no area"),
        ("point", [160.0, 3.0], r"point \[160.0, 3.0\] of annotation 2 .* outside the image"),
        ("point", [3.0, -0.5], "outside the image"),
        ("segmentation", [[1, 2]], "Annotation 2 .* no usable mask"),
    ],
)
def test_prompts_outside_the_image(shapes: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    data = opened(shapes, tmp_path, lambda c: c["annotations"][1].update({key: value}))
    with pytest.raises(DataError, match=message):
        PROMPTABLE.evaluate({"float": silent}, data)


def test_a_box_may_reach_over_the_border_by_rounding(shapes: Path, tmp_path: Path) -> None:
    data = opened(shapes, tmp_path, lambda c: c["annotations"][1].update(bbox=[-0.4, 10, 20, 150.3]))
    PROMPTABLE.evaluate({"float": silent}, data, limit=6)


def test_crowds_empty_masks_and_empty_images_are_left_out(shapes: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        rows = content["annotations"]
        content["annotations"] = rows = [r for r in rows if r["image_id"] <= 3]
        rows[0]["iscrowd"] = 1
        rows[1]["segmentation"] = {"size": [160, 160], "counts": [160 * 160]}

    data = opened(shapes, tmp_path, change)
    result = PROMPTABLE.evaluate({"float": silent}, data)
    assert data.labels is not None
    left = len(data.labels.boxes) - 2
    assert result.notes[:2] == (
        f"{left} objects on 3 images.",
        "3 images without a labelled object were left out.",
    )
    assert result.metrics[0].values["float"].n == 3


def test_no_objects_and_no_masks(shapes: Path, tmp_path: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        for row in content["annotations"]:
            row["iscrowd"] = 1

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="6 evaluated images have no labelled object"):
        PROMPTABLE.evaluate({"float": silent}, opened(shapes, tmp_path / "a", crowd))
    with pytest.raises(DataError, match="has no masks to compare with"):
        opened(shapes, tmp_path / "b", lambda c: [a.pop("segmentation") for a in c["annotations"]])


def test_models_are_known() -> None:
    assert PROMPTABLE.matches(interface())
    assert not PROMPTABLE.matches(Interface(inputs=interface().inputs[:2], outputs=interface().outputs))
