"""The samples of calibration, probing and verification: drawn at random, apart where there are enough."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitalloy.core.errors import DataError
from bitalloy.core.jobs import Contexts
from bitalloy.core.records import DataInfo, SampleParts, TensorSpec
from bitalloy.data.datasets import ArrayDataset, Dataset, Subset, data_opening, open_dataset
from bitalloy.data.images import file_hash
from bitalloy.data.parts import APART, WantedSamples, doubtful, draw_parts

USUAL = WantedSamples(calibration=64, probe=16, verification=16)


def numbered(count: int) -> ArrayDataset:
    """Samples that hold their own number."""
    return ArrayDataset([{"x": np.full((1, 1), i, np.float32)} for i in range(count)])


def drawn(data: Dataset, wanted: WantedSamples = USUAL, **more: Any) -> tuple[list[list[int]], SampleParts]:
    """The numbers of the samples of each part."""
    subset, parts = draw_parts(data, wanted, **{"seed": 0, **more})
    found = [[int(subset.feeds(i)["x"][0, 0]) for i in p] for p in (parts.calibration, parts.probe, parts.verification)]
    return found, parts


def test_enough_samples_are_drawn_apart_by_the_seed() -> None:
    found, parts = drawn(numbered(1000))
    assert [len(part) for part in found] == [64, 16, 16] and parts.disjoint
    every = [number for part in found for number in part]
    assert len(set(every)) == 96 and parts.available == 1000
    assert drawn(numbered(1000))[0] == found != drawn(numbered(1000), seed=1)[0]
    assert every != sorted(every)
    for part in found:  # a uniform draw: means within four standard errors
        assert abs(np.mean(part) - 499.5) < 4 * 288.7 / np.sqrt(len(part))


def test_a_larger_part_keeps_what_a_smaller_one_had() -> None:
    few = WantedSamples(calibration=8, probe=4, verification=4)
    assert set(drawn(numbered(200), few)[0][0]) < set(drawn(numbered(200))[0][0])


def test_folders_of_classes_are_drawn_across_classes(tmp_path: Path) -> None:
    for number in range(200):
        folder = tmp_path / f"class{number // 10:02d}"
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{number:03d}.npz", x=np.full((1, 1), number, np.float32))
    spec = TensorSpec(name="x", dtype="FLOAT", shape=(1, 1))
    data = open_dataset(tmp_path, (spec,), image=None, limit=None, seed=0)
    (calibration, probe, _), _ = drawn(data)
    assert len({n // 10 for n in calibration}) >= 16 and len({n // 10 for n in probe}) >= 8


@given(
    count=st.integers(1, 120), calibration=st.integers(1, 80), probe=st.integers(1, 20), verification=st.integers(1, 20)
)
def test_parts_are_never_empty_and_overlap_only_where_they_must(
    count: int, calibration: int, probe: int, verification: int
) -> None:
    wanted = WantedSamples(calibration=calibration, probe=probe, verification=verification)
    found, parts = drawn(numbered(count), wanted)
    sizes = [len(part) for part in found]
    assert all(1 <= size <= most for size, most in zip(sizes, (calibration, probe, verification), strict=True))
    enough = count >= calibration + probe + verification
    if enough:
        assert sizes == [calibration, probe, verification]
    if enough or count >= APART:
        assert parts.disjoint
    if count > 1:
        assert not {*found[0]} & {*found[1], *found[2]}, "predictions and measurements are on unseen samples"
    assert all(len(set(part)) == len(part) for part in found)


@pytest.mark.parametrize(
    ("count", "start", "end"),
    [
        (96, "Of 96 samples, drawn at random: 64 for calibration, 16 for probing, 16", "no sample serves two of them."),
        (40, "Of 40 samples, drawn at random: 24 for calibration, 8 for probing, 8", "no sample serves two of them."),
        (
            12,
            "Of 12 samples, drawn at random: 8 for calibration, 4 for probing, 4",
            "probing and verification share 4.",
        ),
        (1, "Of 1 sample, drawn at random: 1 for calibration, 1 for probing, 1", "calibration and probing share 1; "),
    ],
)
def test_the_parts_are_told(count: int, start: str, end: str) -> None:
    told = drawn(numbered(count))[1].describe()
    assert told.startswith(f"{start} for verification; {end}") and told.endswith(".")


def test_samples_of_one_source_serve_one_part() -> None:
    class Talks(ArrayDataset):
        def source(self, index: int) -> str:
            return f"image {index // 4}"

    talks = Talks([{"x": np.full((1, 1), i, np.float32)} for i in range(160)])
    found, parts = drawn(talks)
    images = [{n // 4 for n in part} for part in found]
    assert parts.disjoint and not (images[0] & images[1] or images[0] & images[2] or images[1] & images[2])
    assert [len(i) for i in images] == [24, 8, 8] and [len(p) for p in found] == [64, 16, 16]


def test_evaluated_images_are_drawn_last(tmp_path: Path) -> None:
    for number in range(40):
        np.savez(tmp_path / f"{number:03d}.npz", x=np.full((1, 1), number, np.float32))
    spec = TensorSpec(name="x", dtype="FLOAT", shape=(1, 1))
    data = open_dataset(tmp_path, (spec,), image=None, limit=None, seed=0)
    evaluated = frozenset(file_hash(tmp_path / f"{number:03d}.npz") for number in range(10))
    wanted = WantedSamples(calibration=20, probe=5, verification=5)
    found, parts = drawn(data, wanted, avoid=evaluated)
    assert parts.disjoint and min(n for part in found for n in part) == 10
    found, _ = drawn(data, wanted, avoid=frozenset(file_hash(f) for f in tmp_path.iterdir()))
    assert [len(part) for part in found] == [20, 5, 5]  # nothing else is there


def test_a_hash_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "image"
    seen = set()
    for content in (b"one", b"two", b"one"):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        seen.add(file_hash(path))
    assert len(seen) == 2
    with pytest.raises(DataError, match="Cannot read"):
        file_hash(tmp_path / "absent")


def test_drawn_samples_are_opened_again_elsewhere(tmp_path: Path) -> None:
    for number in range(40):
        np.savez(tmp_path / f"{number:03d}.npz", x=np.full((1, 1), number, np.float32))
    spec = TensorSpec(name="x", dtype="FLOAT", shape=(1, 1))
    subset, _ = draw_parts(open_dataset(tmp_path, (spec,), image=None, limit=None, seed=0), USUAL, seed=3)
    opening = data_opening(subset, subset.info)
    again = Contexts().open(opening)
    assert isinstance(again, Subset) and again.info == subset.info and again.info.count == 40
    assert [again.name(i) for i in range(5)] == [subset.name(i) for i in range(5)]
    first = tmp_path / subset.name(0)
    shutil.copy(tmp_path / subset.name(1), first)
    with pytest.raises(DataError, match="have changed"):
        Contexts().open(opening)


def test_a_data_set_of_the_users_own_kind_is_drawn_from() -> None:
    class Own:
        info = DataInfo(name="own", count=50, seed=0, sha256="abc", preprocessing="none")

        def __len__(self) -> int:
            return 50

        def name(self, index: int) -> str:
            return str(index)

        def feeds(self, index: int) -> dict[str, np.ndarray]:
            return {"x": np.full((1, 1), index, np.float32)}

    found, parts = drawn(Own())
    assert parts.disjoint and [len(part) for part in found] == [30, 10, 10]
    subset, _ = draw_parts(Own(), USUAL, seed=0)
    other = Own()
    other.info = DataInfo(name="own", count=50, seed=0, sha256="other", preprocessing="none")
    assert subset.info != draw_parts(other, USUAL, seed=0)[0].info


def test_samples_that_tell_nothing_are_named() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    mask = np.ones((1, 100), np.int64)

    def told(*images: np.ndarray) -> tuple[str, ...]:
        return doubtful(ArrayDataset([{"x": one, "mask": mask} for one in images]))

    assert told(image, 2 * image) == told(image) == ()
    assert [note.startswith("The first 3 samples are equal") for note in told(image, image, image)] == [True]
    (black,) = told(0 * image)
    assert "'x' are 0" in black
    assert len(told(0 * image, 0 * image)) == 2
    assert told(0 * image, image) == ()
