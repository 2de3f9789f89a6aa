"""Samples in memory: whatever holds them, the model is fed the same numbers, and what does not fit is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bitalloy
from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.handed import HandedSample, handed_samples, store_feeds

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)
LABELS = np.arange(10)
ONE = (TensorSpec(name="x", dtype="FLOAT", shape=("n", 4)),)
PAIR = (*ONE, TensorSpec(name="ids", dtype="INT64", shape=("n", 2)))
IDS = np.arange(20).reshape(10, 2)


class Tensor:
    """What torch's tensors have of which anything is used."""

    def __init__(self, array: np.ndarray, *, attached: bool = True) -> None:
        self._array, self._attached = array, attached

    def detach(self) -> Tensor:
        return Tensor(self._array, attached=False)

    def cpu(self) -> Tensor:
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self._attached:
            raise RuntimeError("it records gradients")
        return self._array


class Loader:
    """What torch's DataLoader has: a length and batches, and no items."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[Tensor]]:
        for start in range(0, 10, 4):
            yield [Tensor(ROWS[start : start + 4]), Tensor(LABELS[start : start + 4])]


class Items:
    """What a data set has: a length, and items of plain lists with other keys beside the inputs."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"x": ROWS[index].tolist(), "label": int(LABELS[index]), "text": "word"}


def samples(data: object, inputs: tuple[TensorSpec, ...] = ONE, **how: Any) -> list[HandedSample]:
    return list(handed_samples(data, inputs, **{"most": None, **how}))


class IterableDataset:
    """What torch's class of this name has: a way to get items that raises."""

    def __getitem__(self, index: int) -> object:
        raise NotImplementedError


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(ROWS)


KINDS: dict[str, Callable[[], object]] = {
    "array": lambda: ROWS,
    "doubles": lambda: ROWS.astype(np.float64),
    "stack of batches": lambda: ROWS.reshape(10, 1, 4),
    "tensor": lambda: Tensor(ROWS),
    "dict": lambda: {"x": ROWS},
    "list of samples": lambda: list(ROWS),
    "list of batches": lambda: [ROWS[:7], ROWS[7:]],
    "list of dicts": lambda: [{"x": row} for row in ROWS],
    "tuples with labels": lambda: [(row, label) for row, label in zip(ROWS, LABELS, strict=True)],
    "generator": lambda: (row for row in ROWS),
    "iterator": lambda: iter([ROWS]),
    "loader": Loader,
    "data set": Items,
    "iterable data set": Stream,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_samples(kind: str) -> None:
    found = samples(KINDS[kind]())
    assert [list(one.feeds) for one in found] == [["x"]] * 10
    assert {(one.feeds["x"].dtype.name, one.feeds["x"].shape) for one in found} == {("float32", (1, 4))}
    np.testing.assert_array_equal(np.concatenate([one.feeds["x"] for one in found]), ROWS)


@pytest.mark.parametrize(
    "data",
    [
        {"x": ROWS, "ids": IDS},
        [(ROWS, IDS.astype(np.int32), LABELS)],
        [{"ids": i, "x": x, "mask": 0} for x, i in zip(ROWS, IDS, strict=True)],
    ],
    ids=["dict", "tuple", "dicts"],
)
def test_several_inputs_stay_together(data: object) -> None:
    found = samples(data, PAIR)
    np.testing.assert_array_equal(np.concatenate([one.feeds["x"] for one in found]), ROWS)
    np.testing.assert_array_equal(np.concatenate([one.feeds["ids"] for one in found]), IDS)
    assert found[0].feeds["ids"].dtype == np.int64


def test_a_fixed_batch_is_filled_across_items_and_the_rest_dropped() -> None:
    inputs = (TensorSpec(name="x", dtype="FLOAT", shape=(4, 4)),)
    found = samples([ROWS[:3], ROWS[3:]], inputs)
    np.testing.assert_array_equal(np.stack([one.feeds["x"] for one in found]), ROWS[:8].reshape(2, 4, 4))
    whole = samples([ROWS[:4], ROWS[4:8]], inputs)
    np.testing.assert_array_equal(whole[1].feeds["x"], ROWS[4:8])


def test_what_belongs_to_all_samples_is_given_to_each() -> None:
    inputs = (*ONE, TensorSpec(name="table", dtype="FLOAT", shape=(3, 2)))
    table = np.ones((3, 2), np.float32)
    found = samples({"x": ROWS, "table": table}, inputs)
    assert len(found) == 10 and all(one.feeds["table"].shape == (3, 2) for one in found)


def test_labels_follow_their_samples() -> None:
    rows = [(row, int(label)) for row, label in zip(ROWS, LABELS, strict=True)]
    for data in (Loader(), [(ROWS, LABELS)], rows, [(row[None], label) for row, label in rows]):
        found = samples(data, labelled=True)
        assert [one.target.tolist() for one in found] == [[label] for label in LABELS]  # the batch is the first axis
    maps = samples([(row, np.full((2, 2), label)) for row, label in rows], labelled=True)
    assert maps[3].target.tolist() == [[[3, 3], [3, 3]]]
    named = samples([{"x": ROWS, "boxes": [[i] for i in range(10)], "size": LABELS}], labelled=True)
    assert [one.target["boxes"] for one in named] == [[[i]] for i in range(10)]
    batched = samples([(ROWS, LABELS)], (TensorSpec(name="x", dtype="FLOAT", shape=(5, 4)),), labelled=True)
    assert [one.target.tolist() for one in batched] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_several_labels_of_a_batch_follow_their_samples(size: int) -> None:
    """As a DataLoader gives them: (inputs, first labels, second labels), and as many of them as samples at size 2."""
    batches = [(ROWS[i : i + size], LABELS[i : i + size], 100 + LABELS[i : i + size]) for i in range(0, 10, size)]
    found = samples(batches, labelled=True)
    assert [[part.tolist() for part in one.target] for one in found] == [[[n], [100 + n]] for n in LABELS]
    joined = samples(batches, (TensorSpec(name="x", dtype="FLOAT", shape=(5, 4)),), labelled=True)
    assert [part.tolist() for part in joined[1].target] == [[5, 6, 7, 8, 9], [105, 106, 107, 108, 109]]


def test_a_single_sample_is_not_drawn_from() -> None:
    wide = (TensorSpec(name="x", dtype="FLOAT", shape=("n", "t")),)
    long = np.arange(16000, dtype=np.float32)
    (found,) = samples(long, wide)
    np.testing.assert_array_equal(found.feeds["x"], long[None])


def test_a_limit_draws_from_what_has_a_length_and_stops_what_never_ends() -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield from ROWS

    np.testing.assert_array_equal(np.concatenate([s.feeds["x"] for s in samples(endless(), most=3)]), ROWS[:3])
    drawn = {seed: [int(s.feeds["x"][0, 0]) for s in samples(Items(), most=3, seed=seed)] for seed in range(6)}
    assert all(len(some) == 3 and some == sorted(some) for some in drawn.values())
    assert len({tuple(some) for some in drawn.values()}) > 3
    for data in (ROWS, {"x": ROWS}, ROWS[:, None]):  # the same draw as of items, and not the first rows
        assert [int(s.feeds["x"][0, 0]) for s in samples(data, most=3, seed=2)] == drawn[2]
    pairs = samples({"x": ROWS, "label": LABELS, "name": [str(i) for i in LABELS]}, most=3, seed=2, labelled=True)
    assert [4 * int(s.target["label"][0]) for s in pairs] == drawn[2]
    assert [4 * int(s.target["name"][0]) for s in pairs] == drawn[2]
    wide = samples(ROWS, (TensorSpec(name="x", dtype="FLOAT", shape=(2, 4)),), most=3, seed=2)
    assert [one.feeds["x"].shape for one in wide] == [(2, 4)] * 3


def test_files_and_items_are_prepared_by_a_function(tmp_path: Path) -> None:
    inputs = (TensorSpec(name="x", dtype="FLOAT", shape=(1, 3, 2, 2)),)
    for value in (10, 200):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / f"{value}.png")

    def prepare(image: Image.Image) -> np.ndarray:
        assert image.mode == "RGB"
        return np.asarray(image.resize((2, 2)), np.float32).transpose(2, 0, 1)

    found = samples(tmp_path, inputs, preprocess=prepare)
    assert [float(one.feeds["x"].max()) for one in found] == [10, 200]
    assert found[0].feeds["x"].shape == (1, 3, 2, 2)
    doubled = samples(ROWS.astype(np.uint8), preprocess=lambda row: np.float32(2) * row)
    np.testing.assert_array_equal(np.concatenate([one.feeds["x"] for one in doubled]), 2 * ROWS)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (7, "of type int; expected a path, an array"),
        (b"bytes", "of type bytes"),
        (object(), "of type object"),
        (ROWS.astype(np.uint8), "is uint8, expected float32"),
        (ROWS[:, :3], r"shape \[10, 3\], expected"),
        ([{"y": ROWS}], r"the keys \['y'\]; expected the model's inputs \['x'\]"),
        (["a", "b"], "holds <U1, not numbers"),
        ([ROWS, np.full((1, 4), np.nan, np.float32)], "NaN in 4 places"),
    ],
)
def test_what_does_not_fit_is_refused(data: object, told: str) -> None:
    with pytest.raises(DataError, match=told):
        samples(data)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="no labels behind the inputs"):
        samples([ROWS], labelled=True)
    with pytest.raises(DataError, match="do not belong to its 10 samples"):
        samples([(ROWS, LABELS[:9])], labelled=True)


def test_stored_feeds_are_named_by_their_content(tmp_path: Path) -> None:
    named = {"a/b: c": np.array([[1]], np.float32), "file": np.array([2])}
    place = store_feeds([named, named], tmp_path)
    assert store_feeds(iter([named, named]), tmp_path) == place
    assert store_feeds([named], tmp_path) != place
    assert sorted(p.name for p in place.iterdir()) == ["000000.npz", "000001.npz"]
    with np.load(place / "000001.npz") as found:
        assert {name: found[name].tolist() for name in found.files} == {"a/b: c": [[1]], "file": [2]}
    with pytest.raises(DataError, match="no samples"):
        store_feeds([], tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("scratch-")]


def test_open_data_takes_a_generator_and_leaves_nothing_behind(inputs: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = bitalloy.load(inputs.two_inputs)
    wanted = [np.load(file) for file in sorted(inputs.feeds.iterdir())[:3]]
    data = bitalloy.open_data(model, ({"left": one["left"], "right": one["right"]} for one in wanted))
    for index, one in enumerate(wanted):
        for name, value in data.feeds(index).items():
            np.testing.assert_array_equal(value, one[name])
    assert len(data) == 3 and data.info.count == 3
    assert len(list(tmp_path.iterdir())) == 1
    del data
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["INT32", "STRING"])
def test_integers_are_narrowed_only_where_they_stay_what_they_are(kind: str) -> None:
    inputs = (TensorSpec(name="ids", dtype=kind, shape=("n", 2)),)
    if kind == "INT32":
        assert samples(IDS, inputs)[9].feeds["ids"].dtype == np.int32
    with pytest.raises(DataError, match=f"is int64, expected {kind.lower()}"):
        samples(IDS + 2**40, inputs)
