from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.arrays import stored_headers
from bitalloy.data.datasets import (
    ArrayDataset,
    FeedFolder,
    ImageFolder,
    Subset,
    choose_samples,
    list_files,
    open_dataset,
)
from bitalloy.data.images import (
    IMAGE_SUFFIXES,
    ImageOptions,
    ImageSpec,
    image_feed,
    infer_image_spec,
    letterbox,
    open_image,
)

RGB = TensorSpec(name="images", dtype="FLOAT", shape=(1, 3, 8, 8))
IDS = TensorSpec(name="ids", dtype="INT64", shape=(1, "length"))
GREY = [
    [95, 130, 194, 217, 207, 235, 15],
    [163, 33, 215, 217, 130, 248, 189],
    [16, 69, 184, 232, 205, 78, 169],
    [61, 125, 10, 29, 240, 66, 19],
    [182, 39, 59, 4, 59, 81, 222],
]
GREY_BY_OPENCV = [[110, 203, 186, 135], [36, 190, 208, 135], [114, 39, 106, 125]]
"""`cv2.resize(GREY, (4, 3), interpolation=cv2.INTER_LINEAR)`, OpenCV 5.0.0."""
PLAIN = ImageSpec(input="images", height=8, width=8)


def spec(*shape: int | str, name: str = "x", dtype: str = "FLOAT") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, seed)).save(path)
    return path


# -- fitting ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    image=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    canvas=st.tuples(st.integers(8, 200), st.integers(8, 200)),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_letterbox_geometry_and_round_trip(
    image: tuple[int, int], canvas: tuple[int, int], corners: list[float]
) -> None:
    width, height = image
    out, geometry = letterbox(Image.new("RGB", image, (200, 10, 30)), *canvas)
    # The formulas of Ultralytics' LetterBox (auto=False, center=True), written out once more.
    r = min(canvas[0] / height, canvas[1] / width)
    unpadded = (max(1, round(width * r)), max(1, round(height * r)))
    dw, dh = (canvas[1] - unpadded[0]) / 2, (canvas[0] - unpadded[1]) / 2
    top, bottom = round(dh - 0.1), round(dh + 0.1)
    left, right = round(dw - 0.1), round(dw + 0.1)
    assert out.shape == (top + unpadded[1] + bottom, left + unpadded[0] + right, 3) == (*canvas, 3)
    assert (geometry.ratio_x, geometry.ratio_y, geometry.left, geometry.top) == (r, r, left, top)

    inside = np.zeros(canvas, bool)
    inside[top : canvas[0] - bottom, left : canvas[1] - right] = True
    assert (out[inside] == (200, 10, 30)).all()
    assert (out[~inside] == 114).all()

    box = np.array([corners]) * [width, height, width, height]
    np.testing.assert_allclose(geometry.to_image(geometry.to_canvas(box)), box, atol=1e-9 * max(image))
    x, y = geometry.to_canvas(np.array([[0.0, 0, width, height]]))[0, 2:]
    assert abs(x - (left + unpadded[0])) <= 1 and abs(y - (top + unpadded[1])) <= 1


def test_letterbox_of_a_coco_image() -> None:
    canvas, geometry = letterbox(Image.fromarray(noise(426, 640)), 640, 640)
    assert (geometry.ratio_x, geometry.left, geometry.top) == (1.0, 0, 107)
    np.testing.assert_array_equal(canvas[107:533], noise(426, 640))


def test_shrinking_equals_opencv() -> None:
    grey = np.array(GREY, np.uint8)
    canvas, geometry = letterbox(Image.fromarray(grey), 3, 4)
    assert (geometry.left, geometry.top) == (0, 0)
    assert np.abs(canvas.astype(int) - GREY_BY_OPENCV).max() <= 1  # OpenCV rounds its weights to 1/2048


@pytest.mark.parametrize(("height", "width"), [(5, 7), (3, 11), (20, 6)])
def test_resize_equals_the_definition(height: int, width: int) -> None:
    source = noise(24, 24)
    canvas, g = letterbox(Image.fromarray(source), height, width)
    side = min(height, width)
    expected = np.zeros((side, side, 3))
    for y in range(side):
        for x in range(side):
            v, u = (min(max((i + 0.5) * 24 / side - 0.5, 0), 23) for i in (y, x))
            for dy, wy in ((0, 1 - v % 1), (1, v % 1)):
                for dx, wx in ((0, 1 - u % 1), (1, u % 1)):
                    pixel = source[min(int(v) + dy, 23), min(int(u) + dx, 23)]
                    expected[y, x] += wy * wx * pixel
    np.testing.assert_allclose(canvas[g.top : g.top + side, g.left : g.left + side], expected, atol=0.501)


# -- normalising ------------------------------------------------------------------------------------


def test_feed_is_rgb_scaled_channels_first() -> None:
    pixels = noise(8, 8)
    feed, _ = image_feed(Image.fromarray(pixels), PLAIN)
    assert feed.shape == (1, 3, 8, 8) and feed.dtype == np.float32 and feed.flags.c_contiguous
    np.testing.assert_allclose(feed[0], pixels.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_feed_with_mean_and_std_in_both_layouts() -> None:
    pixels = noise(8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (pixels / 255 - mean) / std
    for layout, order in (("NHWC", (0, 1, 2)), ("NCHW", (2, 0, 1))):
        way = ImageSpec(input="x", height=8, width=8, layout=layout, mean=mean, std=std)  # type: ignore[arg-type]
        np.testing.assert_allclose(image_feed(Image.fromarray(pixels), way)[0][0], expected.transpose(order), atol=1e-6)


def test_feed_in_half_in_bytes_and_grey() -> None:
    image = Image.fromarray(noise(8, 8))
    half = ImageSpec(input="x", height=8, width=8, dtype="float16")
    assert image_feed(image, half)[0].dtype == np.float16
    raw = ImageSpec(input="x", height=8, width=8, dtype="uint8", scale=1.0, layout="NHWC")
    np.testing.assert_array_equal(image_feed(image, raw)[0][0], noise(8, 8))
    grey = ImageSpec(input="x", height=4, width=8, channels=1)
    assert image_feed(image.convert("L"), grey)[0].shape == (1, 1, 4, 8)


def test_stretch_and_crop_map_boxes_back() -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (10, 5, 30, 15))
    for fit in ("stretch", "crop"):
        way = ImageSpec(input="x", height=10, width=10, fit=fit, scale=1.0)
        feed, geometry = image_feed(image, way)
        x1, y1, x2, y2 = geometry.to_canvas(np.array([[10.0, 5, 30, 15]]))[0].round().astype(int)
        inside = feed[0, 0, max(y1, 0) + 1 : y2 - 1, max(x1, 0) + 1 : min(x2, 10) - 1]
        assert inside.size and (inside == 255).all()
        np.testing.assert_allclose(geometry.to_image(geometry.to_canvas(np.ones((1, 4)))), 1)
    assert (x1, x2) == (0, 10) and geometry.left == -5


def test_describe_says_what_is_done() -> None:
    assert PLAIN.describe() == "letterbox 8x8 (height x width) pad 114, RGB, /255, NCHW as 'images'"
    other = ImageSpec(
        input="x", height=4, width=6, channels=1, fit="crop", scale=0.5, mean=(0.1,), std=(2.0,), dtype="float16"
    )
    assert (
        other.describe()
        == "crop 4x6 (height x width), grey, /2, minus mean [0.1], divided by std [2.0], float16, NCHW as 'x'"
    )
    assert "*0.3" in ImageSpec(input="x", height=4, width=6, scale=0.3).describe()


# -- finding the image input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "size"),
    [
        ((1, 3, 64, 32), "NCHW", (64, 32)),
        ((1, 64, 32, 3), "NHWC", (64, 32)),
        (("batch", 1, 28, 28), "NCHW", (28, 28)),
        ((1, 3, 224, 3), "NCHW", (224, 3)),
        ((1, 1, 640, 3), "NHWC", (1, 640)),
    ],
)
def test_image_input_is_found(shape: tuple[int | str, ...], layout: str, size: tuple[int, int]) -> None:
    found = infer_image_spec((IDS, spec(*shape)), task=None)
    assert found is not None
    assert (found.input, found.layout, (found.height, found.width)) == ("x", layout, size)


def test_rgb_comes_before_a_mask() -> None:
    found = infer_image_spec((spec(1, 1, 9, 9, name="mask"), spec(1, 3, 8, 8)), task=None)
    assert found is not None and found.input == "x"


def test_defaults_follow_the_task() -> None:
    yolo = infer_image_spec((RGB,), task="detection")
    assert yolo == PLAIN
    other = infer_image_spec((RGB,), task="classification")
    assert other is not None and (other.fit, other.mean, other.std) == (
        "stretch",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    raw = infer_image_spec((spec(1, 8, 8, 3, dtype="UINT8"),), task=None)
    assert raw is not None and (raw.dtype, raw.scale, raw.mean) == ("uint8", 1.0, ())
    grey = infer_image_spec((spec(1, 1, 8, 8, dtype="FLOAT16"),), task=None)
    assert grey is not None and (grey.dtype, grey.channels, grey.mean) == ("float16", 1, ())


def test_options_override_the_defaults() -> None:
    found = infer_image_spec((RGB,), task=None, options=ImageOptions(mean=[0.5], fit="crop", size=8))
    assert found is not None
    assert (found.mean, found.std, found.fit, found.scale) == ((0.5, 0.5, 0.5), (), "crop", 1 / 255)
    found = infer_image_spec((RGB,), task=None, options=ImageOptions(scale=1 / 128))
    assert found is not None and (found.scale, found.mean) == (1 / 128, ())
    open_shape = spec("n", "c", "h", "w")
    found = infer_image_spec((open_shape,), task=None, options=ImageOptions(size=(32, 64), layout="NCHW"))
    assert found is not None and (found.channels, found.height, found.width) == (3, 32, 64)


def test_models_without_images_are_none_until_images_are_asked_for() -> None:
    assert infer_image_spec((IDS,), task=None) is None
    assert infer_image_spec((spec(1, 4, 8, 8),), task="anything") is None
    with pytest.raises(DataError, match=r"'ids' INT64 \[1, length\]; expected 4 dimensions with 1 or 3 channels"):
        infer_image_spec((IDS,), task="detection")
    with pytest.raises(DataError, match=r"'x' FLOAT \[1, 4, 8, 8\]"):
        infer_image_spec((spec(1, 4, 8, 8),), task=None, options=ImageOptions(size=8))
    with pytest.raises(DataError, match="No input takes an image"):
        infer_image_spec((RGB,), task=None, options=ImageOptions(layout="NHWC"))


def test_open_sizes_name_the_options() -> None:
    with pytest.raises(DataError, match=r"--size 640 or --shape x=1x3x640x32"):
        infer_image_spec((spec("batch", 3, "height", 32),), task=None)
    with pytest.raises(DataError, match=r"--shape x=1x640x640x3"):
        infer_image_spec((spec("batch", "height", "width", 3),), task=None)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 8, 8), {"size": 16}, "Size 16 does not fit"),
        ((1, 3, "h", "w"), {"size": 0}, "Size 0 does not fit"),
        ((1, 3, 8, 8), {"mean": [1.0, 2.0]}, "expected 3 finite numbers"),
        ((1, 3, 8, 8), {"std": [0.0]}, "std above 0"),
        ((1, 3, 8, 8), {"mean": [math.nan]}, "finite"),
    ],
)
def test_options_that_do_not_fit(shape: tuple[int | str, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        infer_image_spec((spec(*shape),), task=None, options=ImageOptions(**options))  # type: ignore[arg-type]


def test_bytes_cannot_be_normalised() -> None:
    with pytest.raises(DataError, match="takes UINT8 pixels"):
        infer_image_spec((spec(1, 3, 8, 8, dtype="UINT8"),), task=None, options=ImageOptions(mean=[0.5]))


# -- reading images ---------------------------------------------------------------------------------


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    whole = save_image(tmp_path / "whole.jpg", size=(64, 64)).read_bytes()
    for name, content in (("cut.jpg", whole[: len(whole) // 2]), ("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"Cannot read the image .*{name}"):
            open_image(tmp_path / name)
    png = save_image(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    with pytest.raises(DataError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png.*expected 8 bits"):
        open_image(tmp_path / "deep.png")


def test_palette_alpha_and_orientation(tmp_path: Path) -> None:
    Image.fromarray(noise(4, 4)).quantize(8).save(tmp_path / "palette.png", transparency=b"\x00\x80")
    assert open_image(tmp_path / "palette.png").mode == "RGB"
    Image.fromarray(np.dstack([noise(4, 4), np.zeros((4, 4), np.uint8)])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "alpha.png")), noise(4, 4))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(4, 6)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.rot90(noise(4, 6), -1))
    assert open_image(tmp_path / "alpha.png", channels=1).mode == "L"


# -- folders of images ------------------------------------------------------------------------------


def test_folder_is_sorted_recursive_and_leaves_out_hidden_files(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/.hidden/c.png", "._b.png", "c.webp", "d.bmp"):
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    data = open_dataset(tmp_path, (RGB,), image=PLAIN, limit=None, seed=0)
    assert [data.name(i) for i in range(len(data))] == ["a/z.JPG", "b.png", "c.webp", "d.bmp"]
    assert data.info.count == 4 and data.info.name == tmp_path.name
    assert data.info.preprocessing == PLAIN.describe()
    feed = data.feeds(1)
    np.testing.assert_array_equal(feed["images"], image_feed(open_image(tmp_path / "b.png"), PLAIN)[0])


def test_a_folder_that_vanishes_while_it_is_listed_has_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone/a.png", "b.png"):
        save_image(tmp_path / name)
    scandir = os.scandir

    def vanishing(path: str | Path) -> object:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert [file.name for file in list_files(tmp_path, IMAGE_SUFFIXES)] == ["b.png"]


def test_a_single_image(tmp_path: Path) -> None:
    path = save_image(tmp_path / "bus.png")
    data = open_dataset(str(path), (RGB,), image=PLAIN, limit=None, seed=0)
    assert (len(data), data.name(0), data.info.name) == (1, "bus.png", "bus.png")


def test_choice_is_seeded_deterministic_and_nested(tmp_path: Path) -> None:
    for i in range(12):
        save_image(tmp_path / f"{i:02}.png", seed=i)

    def names(limit: int | None, seed: int) -> list[str]:
        data = open_dataset(tmp_path, (RGB,), image=PLAIN, limit=limit, seed=seed)
        assert data.info.count == len(data)
        return [data.name(i) for i in range(len(data))]

    assert names(None, 0) == names(12, 3) == names(99, 1) == [f"{i:02}.png" for i in range(12)]
    few, more = names(4, 7), names(8, 7)
    assert few == names(4, 7) == sorted(few) and len(few) == 4 and set(few) < set(more)
    assert any(names(4, seed) != few for seed in range(5))
    part = open_dataset(tmp_path, (RGB,), image=PLAIN, limit=4, seed=7)
    assert isinstance(part, Subset) and part.info.seed == 7
    np.testing.assert_array_equal(part.feeds(0)["images"], image_feed(open_image(tmp_path / few[0]), PLAIN)[0])


def test_choice_is_pinned() -> None:
    assert choose_samples([f"{i}.jpg" for i in range(20)], limit=5, seed=0) == [6, 10, 11, 17, 19]
    with pytest.raises(DataError, match="limit on samples is 0"):
        choose_samples(["a"], limit=0, seed=0)


def test_fingerprint_follows_names_and_bytes(tmp_path: Path) -> None:
    def sha(limit: int | None = None) -> str:
        return open_dataset(tmp_path / "d", (RGB,), image=PLAIN, limit=limit, seed=0).info.sha256

    save_image(tmp_path / "d/a.png", 1)
    save_image(tmp_path / "d/b.png", 2)
    first = sha()
    assert first == sha() != sha(1)
    (tmp_path / "d/b.png").rename(tmp_path / "d/c.png")
    renamed = sha()
    save_image(tmp_path / "d/c.png", 3)
    assert len({first, renamed, sha()}) == 3


def test_pairs_of_image_and_further_inputs(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", ids=np.array([[1, 2, 3]]))
    data = open_dataset(tmp_path, (RGB, IDS), image=PLAIN, limit=None, seed=0)
    assert isinstance(data, ImageFolder) and len(data) == 1
    assert data.feeds(0)["ids"].tolist() == [[1, 2, 3]] and data.feeds(0)["images"].shape == (1, 3, 8, 8)
    before = data.info.sha256
    np.savez(tmp_path / "a.npz", ids=np.array([[1, 2, 4]]))
    assert ImageFolder(tmp_path, (RGB, IDS), PLAIN).info.sha256 != before
    save_image(tmp_path / "b.png")
    with pytest.raises(
        DataError, match=r"1 images .* no \.npz beside them, the first is 'b\.png'.*\['ids'\].*'b\.npz'"
    ):
        open_dataset(tmp_path, (RGB, IDS), image=PLAIN, limit=None, seed=0)


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "absent", (RGB,), image=PLAIN, limit=None, seed=0)
    with pytest.raises(DataError, match="holds no samples"):
        open_dataset(tmp_path, (RGB,), image=PLAIN, limit=None, seed=0)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="neither an image nor an array"):
        open_dataset(tmp_path / "a.txt", (RGB,), image=PLAIN, limit=None, seed=0)
    with pytest.raises(DataError, match="No images in"):
        ImageFolder(tmp_path, (RGB,), PLAIN)
    with pytest.raises(DataError, match="No arrays in"):
        FeedFolder(tmp_path, (RGB,))
    save_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds images\. No input takes an image"):
        open_dataset(tmp_path, (IDS,), image=None, limit=None, seed=0)


# -- arrays -----------------------------------------------------------------------------------------


def test_folder_of_arrays(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", images=np.full((1, 3, 8, 8), i, np.float32), ids=np.array([[i]]))
    data = open_dataset(tmp_path, (RGB, IDS), image=None, limit=None, seed=0)
    assert isinstance(data, FeedFolder) and [data.name(i) for i in range(3)] == ["0.npz", "1.npz", "2.npz"]
    assert data.feeds(2)["ids"].tolist() == [[2]] and (data.feeds(2)["images"] == 2).all()
    assert data.info.preprocessing == "as stored"


def test_npy_for_models_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 8, 8), np.float32))
    assert open_dataset(tmp_path, (RGB,), image=PLAIN, limit=None, seed=0).feeds(0).keys() == {"images"}
    np.save(tmp_path / "a.npy", np.zeros((5, 3, 8, 8), np.float32))
    assert len(open_dataset(tmp_path / "a.npy", (RGB,), image=None, limit=None, seed=0)) == 5
    with pytest.raises(DataError, match=r"one array, but the model takes \['images', 'ids'\]"):
        open_dataset(tmp_path / "a.npy", (RGB, IDS), image=None, limit=None, seed=0)


@pytest.mark.parametrize(
    ("stack", "model", "samples"),
    [
        ((6, 3, 8, 8), (1, 3, 8, 8), 6),
        ((6, 1, 3, 8, 8), (1, 3, 8, 8), 6),
        ((6, 3, 8, 8), (2, 3, 8, 8), 3),
        ((6, 3, 8, 8), ("batch", 3, 8, 8), 6),
        ((1, 3, 8, 8), (1, 3, 8, 8), 1),
        ((6, 2), (2,), 6),
        ((6,), (), 6),
    ],
)
def test_stack_in_one_file(tmp_path: Path, stack: tuple[int, ...], model: tuple[int | str, ...], samples: int) -> None:
    values = np.random.default_rng(0).random(stack, dtype=np.float32)
    np.savez(tmp_path / "all.npz", x=values)
    data = open_dataset(tmp_path / "all.npz", (spec(*model),), image=None, limit=None, seed=0)
    assert len(data) == samples and data.name(0) == "all.npz[0]"
    joined = np.stack([data.feeds(i)["x"] for i in range(samples)])
    assert joined[0].ndim == len(model)
    np.testing.assert_array_equal(joined.reshape(stack), values)


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((3, 3, 8, 8), np.float32)},  # no multiple of the batch 2
        {"x": np.zeros((8, 8), np.float32)},
        {"x": np.zeros((0, 3, 8, 8), np.float32)},
        {"y": np.zeros((2, 3, 8, 8), np.float32)},
        {"x": np.zeros((2, 3, 8, 8), np.float32), "y": np.zeros(2)},
        {},
    ],
)
def test_stack_that_cannot_be_cut(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "all.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"expected 'x' FLOAT \[2, 3, 8, 8\]"):
        open_dataset(tmp_path / "all.npz", (spec(2, 3, 8, 8),), image=None, limit=None, seed=0)


def test_stacks_of_different_length(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=np.zeros((4, 3, 8, 8), np.float32), ids=np.zeros((3, 5), np.int64))
    with pytest.raises(DataError, match="same number of samples"):
        open_dataset(tmp_path / "all.npz", (RGB, IDS), image=None, limit=None, seed=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": np.zeros((1, 3, 8, 8), np.float32)},
            r"keys .*\['image'\]; expected the model's inputs \['images'\]",
        ),
        ({"images": np.zeros((1, 3, 8, 9), np.float32)}, r"shape \[1, 3, 8, 9\], expected FLOAT \[1, 3, 8, 8\]"),
        ({"images": np.zeros((3, 8, 8), np.float32)}, r"shape \[3, 8, 8\]"),
        ({"images": np.zeros((1, 3, 8, 8))}, r"is float64, expected float32.*astype\('float32'\)"),
        ({"images": np.zeros((1, 3, 8, 8), ">f4")}, "is >f4, expected float32"),
        ({"images": np.full((1, 3, 8, 8), np.nan, np.float32)}, "NaN in 192 places"),
        ({"images": np.array([None])}, "Cannot read the arrays"),
    ],
)
def test_feeds_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message) as raised:
        open_dataset(tmp_path, (RGB,), image=None, limit=None, seed=0).feeds(0)
    assert "s.npz" in str(raised.value)


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 3, 8, 8), np.float32))
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (whole[:200], b"", b"PK\x03\x04 not a zip"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"Cannot read the arrays of .*a\.npz"):
            FeedFolder(tmp_path, (RGB,)).feeds(0)


def test_symbolic_dimensions_take_any_size_and_infinity_is_allowed() -> None:
    mask = spec(1, "n", name="mask")
    data = ArrayDataset([{"mask": np.array([[0, -np.inf]], np.float32)}], inputs=(mask,))
    assert data.feeds(0)["mask"].shape == (1, 2)


def test_arrays_in_memory() -> None:
    samples = [{"x": np.full((1, 2), i, np.float32)} for i in range(3)]
    data = ArrayDataset(samples, inputs=(spec(1, 2),), label="mine")
    assert (len(data), data.name(2), data.info.name, data.info.count) == (3, "2", "mine", 3)
    data.feeds(0).clear()
    assert data.feeds(0)["x"].shape == (1, 2)
    part = Subset(data, [2, 0], seed=5)
    assert [part.name(i) for i in range(2)] == ["2", "0"] and (part.feeds(0)["x"] == 2).all()
    assert part.info.seed == 5 and part.info.sha256 != data.info.sha256
    changed = ArrayDataset([*samples[:2], {"x": np.full((1, 2), 9, np.float32)}], label="mine")
    assert changed.info.sha256 != data.info.sha256 == ArrayDataset(samples).info.sha256


def test_arrays_in_memory_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="no samples"):
        ArrayDataset([])
    with pytest.raises(DataError, match="1 samples but 2 names"):
        ArrayDataset([{"x": np.zeros(1)}], names=["a", "b"])
    with pytest.raises(DataError, match="sample 'a' of 'arrays'"):
        ArrayDataset([{"x": np.zeros((1, 2))}], inputs=(spec(1, 2),), names=["a"])


# -- real data --------------------------------------------------------------------------------------


def test_real_photographs(coco_calibration: Path) -> None:
    inputs = (spec(1, 3, 640, 640, name="images"),)
    way = infer_image_spec(inputs, task="detection")
    data = open_dataset(coco_calibration, inputs, image=way, limit=3, seed=0)
    assert len(data) == 3
    for i in range(3):
        feed = data.feeds(i)["images"]
        assert feed.shape == (1, 3, 640, 640) and 0 <= feed.min() < feed.max() <= 1


@pytest.fixture
def coco_calibration() -> Path:
    folder = Path(__file__).parents[3] / "shared/data/coco128-calib"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_a_folder_of_several_shapes_is_refused_when_it_is_opened(tmp_path: Path, suffix: str) -> None:
    """From the headers alone; where the model leaves the size open, the folder is fine as long as none is bound."""
    for name, side in (("a", 4), ("b", 5)):
        array = np.zeros((1, 3, 4, side), np.float32)
        np.savez(tmp_path / name, x=array) if suffix == ".npz" else np.save(tmp_path / name, array)
    fixed = TensorSpec(name="x", dtype="FLOAT", shape=(1, 3, 4, 4))
    with pytest.raises(DataError, match=rf"'x' of '.*b\{suffix}' has shape \[1, 3, 4, 5\], expected .*in one shape"):
        FeedFolder(tmp_path, (fixed,))
    opened = TensorSpec(name="x", dtype="FLOAT", shape=(1, 3, 4, "w"))
    assert [FeedFolder(tmp_path, (opened,)).feeds(i)["x"].shape[-1] for i in range(2)] == [4, 5]


def test_headers_of_all_versions_are_read(tmp_path: Path) -> None:
    for version in ((1, 0), (2, 0), (3, 0)):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros((2, 7), np.float32), version=version)
        assert stored_headers(tmp_path / "a.npz", ["x"]) == {"x": ((2, 7), np.dtype(np.float32))}
