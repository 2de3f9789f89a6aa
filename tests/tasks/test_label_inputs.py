"""What decides a task's metrics decides the keys of its results: labels, bytes of images, preparation of images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import bitalloy
from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.core.store import key_of
from bitalloy.data.images import ImageSpec, file_hash
from bitalloy.pipeline import run as pipeline
from bitalloy.pipeline.prepare import RunOptions, prepare
from bitalloy.tasks import find_task
from bitalloy.tasks.base import Interface, TaskData
from bitalloy.tasks.observing import open_labelled


class Letters:
    """A tokenizer with an id for each letter."""

    bos, eos = 1, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) + 3 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(i - 3) for i in ids)


def known(outputs: tuple[tuple[int, ...], ...], fit: Any, **more: tuple[int | str, ...]) -> Interface:
    made = tuple(TensorSpec(name=f"out{i}", dtype="FLOAT", shape=shape) for i, shape in enumerate(outputs))
    inputs = [TensorSpec(name="images", dtype="FLOAT", shape=(1, 3, 64, 64))]
    inputs += [TensorSpec(name=n, dtype="INT64" if n == "input_ids" else "FLOAT", shape=s) for n, s in more.items()]
    image = ImageSpec(input="images", height=64, width=64, fit=fit, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Interface(inputs=tuple(inputs), outputs=made, image=image, tokenizer=Letters())


PROMPTS: dict[str, tuple[int | str, ...]] = {"point_coords": (1, "points", 2), "point_labels": (1, "points")}
KINDS: dict[str, tuple[str, Interface]] = {
    "detection": ("instances.json", known(((1, 12, 84),), "letterbox")),
    "instance": ("instances.json", known(((1, 44, 84), (1, 32, 16, 16)), "letterbox")),
    "semantic": ("", known(((1, 9, 16, 16),), "stretch")),
    "promptable": ("instances.json", known(((1, 4, 16, 16), (1, 4)), "stretch", **PROMPTS)),
    "questions": ("questions.jsonl", known(((1, 9, 300),), "stretch", input_ids=(1, "ids"))),
    "captions": ("captions.json", known(((1, 9, 300),), "stretch", input_ids=(1, "ids"))),
}


def opened(folder: Path, kind: str, **image: Any) -> TaskData:
    file, interface = KINDS[kind]
    assert interface.image is not None
    interface = replace(interface, image=msgspec.structs.replace(interface.image, **image))
    task = find_task(interface)
    assert task is not None and (task.name == kind or task.name == "language")
    data: TaskData = task.open(folder / file, interface)
    return data


def key(data: TaskData, samples: tuple[int, ...] = (0, 1)) -> str:
    return key_of(data.inputs(samples, [file_hash(file) for file in data.images(samples)]))


def repaint(folder: Path, index: int) -> None:
    """Change one pixel of an image; its name and size stay."""
    path = folder / "images" / f"{index:06d}.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path, compress_level=1)


@pytest.fixture
def labelled(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "labelled"))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_images_count(labelled: Path, kind: str) -> None:
    before = key(opened(labelled, kind))
    assert key(opened(labelled, kind)) == before
    repaint(labelled, 5)
    assert key(opened(labelled, kind)) == before  # not one of those that are evaluated
    repaint(labelled, 1)
    assert key(opened(labelled, kind)) != before


@pytest.mark.parametrize("kind", KINDS)
def test_preparation_of_images_counts(labelled: Path, kind: str) -> None:
    before = key(opened(labelled, kind))
    changes: list[dict[str, Any]] = [
        {"scale": 1.0}, {"scale": 1 / 255 + 1e-9}, {"mean": (0.1, 0.0, 0.0)}, {"std": (2.0, 1.0, 1.0)},
        {"layout": "NHWC"}, {"height": 32}, {"input": "other"},
    ]  # fmt: skip
    keys = [key(opened(labelled, kind, **change)) for change in changes]
    assert len({before, *keys}) == len(changes) + 1


@pytest.mark.parametrize("kind", ["semantic", "promptable", "questions", "captions"])
def test_a_fit_that_the_task_does_not_know_is_refused(labelled: Path, kind: str) -> None:
    with pytest.raises(DataError, match="fitted by 'crop'"):
        opened(labelled, kind, fit="crop")


def test_label_maps_count(labelled: Path) -> None:
    before = key(opened(labelled, "semantic"))
    path = labelled / "annotations" / "000001.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] = 1 + pixels[0, 0] % 8
    Image.fromarray(pixels).save(path)
    assert key(opened(labelled, "semantic")) != before


def test_two_files_of_one_kind_are_refused(inputs: Any, labelled: Path) -> None:
    model = bitalloy.load(inputs.detector)
    with pytest.raises(DataError, match="same metrics of task 'detection'"):
        open_labelled(model, [inputs.labels, labelled / "instances.json"])


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """A run that stops where it verifies, and tells with what."""
    part = SimpleNamespace(targets=[SimpleNamespace(target=SimpleNamespace(device=None))])
    monkeypatch.setattr(pipeline, "analyze", lambda *_, **__: part)
    monkeypatch.setattr(pipeline, "confirm", lambda *_, **__: part)
    monkeypatch.setattr(pipeline, "measure_cost", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "plan", lambda *_, **__: None)

    def until_verification(prepared: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def verify(*_: Any, **given: Any) -> None:
            seen.update(given)
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, "verify", verify)
        with pytest.raises(KeyboardInterrupt):
            pipeline.deliver(prepared, budget=bitalloy.Budget(min_sqnr_db=10))
        return seen

    yield until_verification


def test_images_are_evaluated_as_the_user_prepares_them(inputs: Any, tmp_path: Path, stopped: Any) -> None:
    options = RunOptions(image={"scale": 1.0, "mean": (0.5,), "fit": "stretch"})
    prepared = prepare(
        inputs.detector, out=tmp_path, data=inputs.labels.parent / "images", evaluate=inputs.labels, options=options
    )
    image = stopped(prepared)["image"]
    assert (image.scale, image.mean, image.fit) == (1.0, (0.5, 0.5, 0.5), "stretch")
    _, (data,) = open_labelled(prepared.model, [inputs.labels], image)
    feeds, _, _ = data.opened(0)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(feeds["images"], prepared.data.feeds(0)["images"])
    assert feeds["images"].max() > 100


def test_without_options_the_task_prepares_images(inputs: Any, tmp_path: Path, stopped: Any) -> None:
    prepared = prepare(inputs.detector, out=tmp_path, data=inputs.scenes, evaluate=inputs.labels)
    assert stopped(prepared)["image"] is None


def test_labels_that_do_not_fit_are_refused_before_the_analysis(inputs: Any, tmp_path: Path, stopped: Any) -> None:
    prepared = prepare(inputs.detector, out=tmp_path, data=inputs.scenes, evaluate=[inputs.labels, inputs.labels])
    with pytest.raises(DataError, match="same metrics"):
        pipeline.deliver(prepared, budget=bitalloy.Budget(min_sqnr_db=10))
