"""The generated sample is deterministic, its labels are exact, and COCO tools read what it writes."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bitalloy.core.errors import DataError, RunDirectoryError
from bitalloy.samples import drawing, shapes, words
from bitalloy.samples.drawing import CLASSES
from bitalloy.samples.shapes import Scene, scene, write_coco


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(i) for i in range(60)]


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("shapes") / "val", count=12, size=160)


def same(a: Scene, b: Scene) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("image", "labels", "colors", "instance_map")
    )


def extent(ids: npt.NDArray[np.uint8], number: int) -> list[float]:
    """Box of one id, pixel by pixel: an oracle that shares no code with the sample."""
    xs, ys = [], []
    for y, row in enumerate(ids.tolist()):
        for x, value in enumerate(row):
            if value == number:
                xs.append(x)
                ys.append(y)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def test_arrays_have_the_documented_shapes_and_types(scenes: list[Scene]) -> None:
    for s in scenes:
        n = len(s.labels)
        assert 0 <= n <= drawing.MAX_SHAPES
        assert s.image.shape == (320, 320, 3) and s.image.dtype == np.uint8
        assert s.instance_map.shape == (320, 320) and s.instance_map.dtype == np.uint8
        assert s.labels.shape == s.colors.shape == s.areas().shape == (n,)
        assert s.boxes().shape == (n, 4) and s.boxes().dtype == np.float32
        assert s.masks().shape == (n, 320, 320) and s.masks().dtype == bool
        assert s.semantic().shape == (320, 320) and s.semantic().dtype == np.uint8


def test_every_class_colour_and_many_counts_occur(scenes: list[Scene]) -> None:
    labels, colors = np.concatenate([s.labels for s in scenes]), np.concatenate([s.colors for s in scenes])
    assert np.bincount(labels, minlength=len(CLASSES)).min() > 5
    assert np.bincount(colors, minlength=len(shapes.COLORS)).min() > 5
    assert len({len(s.labels) for s in scenes}) >= 6


def test_the_same_arguments_give_the_same_scene_in_any_order() -> None:
    forward = [scene(i, size=96) for i in range(6)]
    np.random.seed(1)  # noqa: NPY002 - global state must not matter
    backward = [scene(i, size=96) for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))


def test_the_same_arguments_give_the_same_scene_in_another_process() -> None:
    code = "import hashlib; from bitalloy.samples.shapes import scene; "
    code += "print(hashlib.sha256(scene(3, seed=5, size=96).image.tobytes()).hexdigest())"
    digests = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_splits_seeds_and_indices_are_disjoint() -> None:
    keys = [(split, seed, index) for split in shapes.SPLITS for seed in range(3) for index in range(8)]
    images = {scene(i, seed=seed, size=64, split=split).image.tobytes() for split, seed, i in keys}
    assert len(images) == len(keys)


def test_boxes_are_the_extents_of_the_visible_pixels(scenes: list[Scene]) -> None:
    for s in scenes[:12]:
        want = [extent(s.instance_map, i + 1) for i in range(len(s.labels))]
        np.testing.assert_array_equal(s.boxes(), np.array(want, np.float32).reshape(-1, 4))


def test_masks_areas_and_semantic_map_agree(scenes: list[Scene]) -> None:
    for s in scenes:
        masks = s.masks()
        assert masks.sum(0).max(initial=0) <= 1
        np.testing.assert_array_equal(masks.sum((1, 2)), s.areas())
        semantic = np.zeros((320, 320), np.uint8)
        for mask, label in zip(masks, s.labels, strict=True):
            semantic[mask] = label + 1
        np.testing.assert_array_equal(s.semantic(), semantic)


def test_shapes_overlap_but_none_is_left_with_almost_nothing_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    full: list[int] = []  # area of each candidate before anything is painted over it
    stamp = drawing._stamp

    def recorded(*args: object) -> npt.NDArray[np.bool_]:
        mask = stamp(*args)  # type: ignore[arg-type]
        full.append(int(mask.sum()))
        return mask

    monkeypatch.setattr(drawing, "_stamp", recorded)
    covered, refused = 0, 0
    for index in range(80):
        full.clear()
        s = scene(index)
        refused += len(full) - len(s.labels)
        assert s.areas().min(initial=1000) >= drawing.MIN_PIXELS
        if len(full) == len(s.labels):  # nothing refused: candidate i is instance i
            assert (s.areas() >= drawing.MIN_VISIBLE * np.array(full)).all()
            covered += int((s.areas() < np.array(full)).sum())
    assert covered > 10
    assert refused > 0


def test_sides_cover_the_documented_range(scenes: list[Scene]) -> None:
    boxes = np.concatenate([s.boxes() for s in scenes])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1) / 320
    assert sides.max() <= drawing.SIDE_RANGE[1] + 0.01
    assert np.quantile(sides, 0.05) < 0.12 and np.quantile(sides, 0.95) > 0.4


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        (0, {"split": "training"}, "Unknown split 'training'"),
        (-1, {}, "index -1"),
        (0, {"seed": -2}, "seed -2"),
        (0, {"size": 16}, "at least 32 pixels, got 16"),
    ],
)
def test_bad_arguments_are_explained(index: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scene(index, **options)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
def test_coco_file_holds_the_scenes(coco_folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(coco_folder / "instances.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert coco.getCatIds() == list(range(1, 9))
    for index, entry in enumerate(coco.loadImgs(coco.getImgIds())):
        want = scene(index, size=160)
        assert entry["file_name"] == f"{index:06d}.png"
        with Image.open(coco_folder / "images" / entry["file_name"]) as image:
            np.testing.assert_array_equal(np.asarray(image), want.image)
        found = coco.loadAnns(coco.getAnnIds(imgIds=entry["id"]))
        assert [a["category_id"] - 1 for a in found] == want.labels.tolist()
        for annotation, mask, area, box in zip(found, want.masks(), want.areas(), want.boxes(), strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == area and annotation["iscrowd"] == 0
            packed = coco_mask.frPyObjects(annotation["segmentation"], 160, 160)
            assert int(coco_mask.area(packed)) == area
            np.testing.assert_array_equal(coco_mask.toBbox(packed), annotation["bbox"])
            np.testing.assert_array_equal(annotation["bbox"], [*box[:2], *(box[2:] - box[:2])])


def test_points_lie_inside_what_is_visible(scenes: list[Scene], coco_folder: Path) -> None:
    for s in scenes:
        assert s.points().shape == (len(s.labels), 2)
        for number, (x, y) in enumerate(s.points().tolist(), start=1):
            assert s.instance_map[int(y), int(x)] == number
    content = json.loads((coco_folder / "instances.json").read_text())
    found = [a["point"] for a in content["annotations"] if a["image_id"] == 4]
    np.testing.assert_array_equal(found, scene(3, size=160).points())


def test_semantic_maps_are_written_as_ade20k_does(coco_folder: Path) -> None:
    assert len(list((coco_folder / "annotations").iterdir())) == 12
    for index in range(12):
        with Image.open(coco_folder / "annotations" / f"{index:06d}.png") as image:
            assert image.mode == "L"
            values = np.asarray(image)
        want = scene(index, size=160)
        for label, mask in zip(want.labels, want.masks(), strict=True):
            assert (values[mask] == label + 2).all()
        assert (values[want.instance_map == 0] == 1).all() and values.min() == 1


def test_captions_count_what_is_there(scenes: list[Scene], coco_folder: Path) -> None:
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
    for s in scenes:
        text = s.caption()
        assert text[0].isupper() and text.endswith(".")
        counts: dict[tuple[str, str], int] = {}
        for part in text[:-1].lower().replace(" and ", ", ").split(", "):
            number, color, name = part.split()
            name = name if name in CLASSES else name.removesuffix("es") if name.endswith("sses") else name[:-1]
            counts[color, name] = numbers[number]
            assert (part.split()[2] == name) == (numbers[number] == 1)
        want: dict[tuple[str, str], int] = {}
        for color, label in zip(s.colors, s.labels, strict=True):
            pair = (shapes.COLORS[color], CLASSES[label])
            want[pair] = want.get(pair, 0) + 1
        assert counts == want
    assert words.caption([], []) == "An empty background."
    assert words.caption([5, 3, 5], [2, 0, 2]) == "Two yellow crosses and one red star."
    content = json.loads((coco_folder / "captions.json").read_text())
    assert [a["caption"] for a in content["annotations"]] == [scene(i, size=160).caption() for i in range(12)]


def test_questions_have_the_right_answers(scenes: list[Scene], coco_folder: Path) -> None:
    answers: list[str] = []
    for s in scenes:
        names = [CLASSES[label] for label in s.labels]
        for row in s.questions():
            text, answer = row["question"], row["answer"]
            answers.append(answer)
            if text.startswith("Is there a "):
                asked = text.removeprefix("Is there a ").removesuffix(" in the image?")
                assert asked in CLASSES and answer == ("yes" if asked in names else "no")
            elif text.startswith("How many"):
                assert answer == str(len(names))
            else:
                asked = text.removeprefix("Which colour is the ").removesuffix("?")
                assert names.count(asked) == 1 and len(set(row["choices"])) == 4
                right = shapes.COLORS[s.colors[names.index(asked)]]
                assert row["choices"]["ABCD".index(answer)] == right
    assert answers.count("yes") == answers.count("no") == len(scenes)
    assert all(answers.count(letter) > 3 for letter in "ABCD")
    lines = (coco_folder / "questions.jsonl").read_text().splitlines()
    want = [{"image": f"{i:06d}.png", **q} for i in range(12) for q in scene(i, size=160).questions()]
    assert [json.loads(line) for line in lines] == want


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ground_truth_as_detections_has_perfect_ap(coco_folder: Path, kind: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(coco_folder / "instances.json"))
        keys = ("image_id", "category_id", "bbox" if kind == "bbox" else "segmentation")
        results = [{key: a[key] for key in keys} | {"score": 0.9} for a in coco.dataset["annotations"]]
        if kind == "segm":
            for result in results:
                result["segmentation"] = coco_mask.frPyObjects(result["segmentation"], 160, 160)
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0, abs=1e-9)


def test_a_complete_folder_is_reused_and_a_foreign_one_refused(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "a" / "val", count=2, size=48)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert write_coco(folder, count=2, size=48) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert [p.name for p in folder.parent.iterdir()] == ["val"]  # no temporary folder is left
    with pytest.raises(DataError, match="holds other data"):
        write_coco(folder, count=3, size=48)
    with pytest.raises(DataError, match="no shapes data set"):
        write_coco(tmp_path, count=2, size=48)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", broken)
    with pytest.raises(KeyboardInterrupt):
        write_coco(tmp_path / "val", count=1, size=48)
    assert list(tmp_path.iterdir()) == []


DETECTOR = Path(shapes.__file__).with_name("yolo11n-shapes.onnx")


def test_shipped_detector_says_what_it_is() -> None:
    assert DETECTOR.stat().st_size < 6_000_000
    model = onnx.load(DETECTOR)
    meta = {p.key: p.value for p in model.metadata_props}
    assert list(json.loads(meta["names"]).values()) == list(CLASSES)
    assert meta["task"] == "detect" and meta["imgsz"] == "[320, 320]" and meta["license"] == "Apache-2.0"
    assert f"version {shapes.VERSION}," in meta["dataset"]
    assert model.graph.node[-1].op_type == "Concat"


def test_shipped_detector_finds_the_shapes(scenes: list[Scene]) -> None:
    session = ort.InferenceSession(DETECTOR, providers=["CPUExecutionProvider"])
    found, total = 0, 0
    for s in scenes[:20]:
        feed = (s.image.transpose(2, 0, 1)[None] / 255).astype(np.float32)
        output = session.run(None, {"images": feed})[0][0]
        assert output.shape == (4 + len(CLASSES), 2100)
        centers, sizes = output[:2].T, output[2:4].T
        low, high = centers - sizes / 2, centers + sizes / 2
        for label, box in zip(s.labels, s.boxes(), strict=True):
            shared = np.clip(np.minimum(high, box[2:]) - np.maximum(low, box[:2]), 0, None).prod(1)
            iou = shared / (sizes.prod(1) + (box[2:] - box[:2]).prod() - shared)
            found += bool(((iou > 0.6) & (output[4 + label] > 0.3)).any())
            total += 1
    assert found >= 0.8 * total


def test_a_disk_that_takes_no_more_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(RunDirectoryError, match=r"cannot be written.*Free space"):
            write_coco(tmp_path / "run" / "sample", count=4, size=320)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "run").iterdir()) == []
