"""The tasks side by side: each model finds its own."""

from __future__ import annotations

import numpy as np
import pytest

from bitalloy.core.records import TensorSpec
from bitalloy.data.masks import encode, packed, unpacked
from bitalloy.tasks import TASKS, find_task
from bitalloy.tasks.base import Interface, pack_seen, unpack_seen

IMAGE = ("images", (1, 3, 640, 640))


def interface(inputs: list[tuple[str, tuple[int | str, ...]]], outputs: list[tuple[int | str, ...]]) -> Interface:
    return Interface(
        inputs=tuple(TensorSpec(name=name, dtype="FLOAT", shape=shape) for name, shape in inputs),
        outputs=tuple(TensorSpec(name=f"y{i}", dtype="FLOAT", shape=shape) for i, shape in enumerate(outputs)),
    )


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ([IMAGE], [(1, 84, 8400)], "detection"),
        ([IMAGE], [(1, 116, 8400), (1, 32, 160, 160)], "instance"),
        ([IMAGE], [(1, 150, 160, 160)], "semantic"),
        ([("x", ("n", 3, "h", "w"))], [("n", 150, "h4", "w4")], "semantic"),
        (
            [("image", (1, 3, 1024, 1024)), ("point_coords", (1, "p", 2)), ("point_labels", (1, "p"))],
            [(1, 4, 256, 256), (1, 4)],
            "promptable",
        ),
        ([("pixel_values", (1, 3, 336, 336)), ("input_ids", (1, "s"))], [(1, "t", 32000)], "language"),
        ([IMAGE], [(1, 1000)], None),
        ([("input_ids", (1, "s"))], [(1, "s", 32000)], None),
        ([IMAGE], [], None),
        ([], [(1, 84, 8400)], None),
    ],
)
def test_a_model_finds_its_task(
    inputs: list[tuple[str, tuple[int | str, ...]]], outputs: list[tuple[int | str, ...]], expected: str | None
) -> None:
    task = find_task(interface(inputs, outputs))
    assert (task.name if task else None) == expected


def test_what_is_observed_survives_storage() -> None:
    rng = np.random.default_rng(0)
    seen: list[dict[str, np.ndarray]] = [
        {"boxes": rng.random((k, 4)).astype(np.float32), "scores": rng.random(k), "of": np.array(80)} for k in (3, 0, 1)
    ]
    found = unpack_seen(pack_seen(seen))
    assert len(found) == 3
    for one, other in zip(seen, found, strict=True):
        assert list(one) == list(other)
        assert all(np.array_equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
    masks = [encode(rng.random((7, 9)) > p) for p in (0.5, 2.0, 0.1)]
    assert unpacked(packed(masks), (9, 7)) == masks and unpacked(packed([]), (9, 7)) == []


def test_names_are_unique() -> None:
    assert sorted(task.name for task in TASKS) == ["detection", "instance", "language", "promptable", "semantic"]
