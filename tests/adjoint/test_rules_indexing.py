"""Operators that read or write elements at given positions, against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.core.errors import ModelError

PROPERTY = settings(max_examples=15)
Array = np.ndarray[Any, Any]
LIVE = pytest.mark.parametrize("live", [(), (1,)], ids=["constant", "computed"])


def normal(*shape: int, seed: int = 1) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def double(torch: Any, array: Array) -> Any:
    return torch.from_numpy(array.astype(np.float64))


INDEX: list[Any] = [2, -1, [1], [0, 2], [2, 2, 0], [-1, 0], [[1]], [[0, 1], [1, 1]], [[[2]], [[0]]]]


@pytest.mark.parametrize("index", INDEX, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("live", [(), (1,)], ids=["constant", "computed"])
def test_gather(rig: Any, index: Any, axis: int, live: tuple[int, ...]) -> None:
    positions = np.array(index, np.int64)

    def run(torch: Any, x: Any) -> Any:
        return x[(slice(None),) * (axis % 3) + (torch.from_numpy(np.asarray(positions % 3)),)]

    rig.check("Gather", normal(3, 3, 3), positions, live=live, axis=axis, linear=True, torch=run)


def test_gather_with_short_indices(rig: Any) -> None:
    for live in ((), (1,)):
        rig.check("Gather", normal(4, 2), np.array([1, 3, -1], np.int32), live=live, linear=True)


@PROPERTY
@given(data=st.data())
@LIVE
def test_gather_elements(rig: Any, live: tuple[int, ...], data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    taken = [data.draw(st.integers(1, 5 if i == axis % len(shape) else s)) for i, s in enumerate(shape)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    index = rng.integers(-shape[axis], shape[axis], taken)

    def run(torch: Any, x: Any) -> Any:
        return torch.gather(x, axis, torch.from_numpy(index % shape[axis]))

    rig.check("GatherElements", normal(*shape), index, live=live, axis=axis, linear=True, torch=run)


@PROPERTY
@given(data=st.data())
@LIVE
def test_gather_nd(rig: Any, live: tuple[int, ...], data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    batch = data.draw(st.integers(0, len(shape) - 1))
    depth = data.draw(st.integers(1, len(shape) - batch))
    inner = data.draw(st.lists(st.integers(1, 3), max_size=2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    places = [*shape[:batch], *inner]
    index = np.stack([rng.integers(-s, s, places) for s in shape[batch : batch + depth]], axis=-1)

    def run(torch: Any, x: Any) -> Any:
        lead = np.ix_(*(range(s) for s in shape[:batch])) if batch else ()
        lead = tuple(np.broadcast_to(a.reshape(*a.shape, *[1] * len(inner)), places) for a in lead)
        return x[tuple(torch.from_numpy(np.array(a)) for a in (*lead, *np.moveaxis(index, -1, 0)))]

    rig.check("GatherND", normal(*shape), index, live=live, batch_dims=batch, linear=True, torch=run)


@PROPERTY
@given(data=st.data(), reduction=st.sampled_from([None, "none", "add"]))
@LIVE
def test_scatter_elements(rig: Any, live: tuple[int, ...], data: st.DataObject, reduction: str | None) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    taken = [data.draw(st.integers(1, s)) for s in shape]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # every line writes each place once
    order = np.argsort(
        rng.random([s if i == axis % len(shape) else t for i, (s, t) in enumerate(zip(shape, taken, strict=True))]),
        axis,
    )
    index = np.take(order, np.arange(taken[axis]), axis).astype(np.int64)
    index -= shape[axis] * rng.integers(0, 2, taken)

    def run(torch: Any, x: Any, updates: Any) -> Any:
        at = torch.from_numpy(index % shape[axis])
        return (torch.scatter_add if reduction == "add" else torch.scatter)(x, axis, at, updates)

    given = {} if reduction is None else {"reduction": reduction}
    rig.check("ScatterElements", normal(*shape), index, normal(*taken, seed=2), wanted=(0, 2), live=live, axis=axis,
              linear=True, opset=18, torch=run, **given)  # fmt: skip


@PROPERTY
@given(data=st.data(), reduction=st.sampled_from([None, "none", "add"]))
@LIVE
def test_scatter_nd(rig: Any, live: tuple[int, ...], data: st.DataObject, reduction: str | None) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    depth = data.draw(st.integers(1, len(shape)))
    every = np.stack(np.unravel_index(np.arange(int(np.prod(shape[:depth]))), shape[:depth]), axis=-1)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    index = rng.permutation(every)[: data.draw(st.integers(1, len(every)))].astype(np.int64)
    index -= np.array(shape[:depth]) * rng.integers(0, 2, index.shape)
    if data.draw(st.booleans()):
        index = index[None]

    def run(torch: Any, x: Any, updates: Any) -> Any:
        at = tuple(torch.from_numpy(np.array(a)) for a in np.moveaxis(index, -1, 0))
        return x.index_put(at, updates, accumulate=reduction == "add")

    given = {} if reduction is None else {"reduction": reduction}
    updates = normal(*index.shape[:-1], *shape[depth:], seed=2)
    rig.check("ScatterND", normal(*shape), index, updates, wanted=(0, 2), live=live, linear=True, opset=18,
              torch=run, **given)  # fmt: skip


def test_adding_twice_at_one_place(rig: Any) -> None:
    x, updates = normal(4, 3), normal(3, 3, seed=2)
    index = np.array([[1], [3], [1]])
    rig.check("ScatterND", x, index, updates, wanted=(0, 2), reduction="add", opset=18, linear=True)
    wide = np.repeat(index, 3, axis=1)
    rig.check("ScatterElements", x, wide, updates, wanted=(0, 2), reduction="add", opset=18, linear=True)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("k", [1, 3])
def test_top_k(rig: Any, axis: int | None, largest: int, k: int) -> None:
    x = (np.random.default_rng(3).permutation(36).reshape(3, 4, 3) * 0.25).astype(np.float32)
    given = {} if axis is None else {"axis": axis}

    def run(torch: Any, x: Any) -> Any:
        return torch.topk(x, k, -1 if axis is None else axis, largest=bool(largest)).values

    # in float32 alone: the second output holds integers
    rig.check("TopK", x, np.array([k]), outputs=2, largest=largest, torch=run, integers=(1,), **given)


@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
@pytest.mark.parametrize("reduction", ["mul", "max", "min"])
@LIVE
def test_scatter_with_other_reductions(rig: Any, op: str, reduction: str, live: tuple[int, ...]) -> None:
    """Numbers far apart, so that the largest stays the largest."""
    values = np.random.default_rng(2).permutation(22).astype(np.float32) * 0.5 - 5.2
    x, updates = values[:12].reshape(4, 3), values[12:18]
    index, given = (
        (np.array([[0, 2, 1], [3, 2, 0]]), updates.reshape(2, 3))
        if op == "ScatterElements"
        else (np.array([[1, 2], [0, 0], [1, 2], [3, 1], [-1, 0], [2, 2]]), updates)
    )
    rig.check(op, x, index, given, wanted=[0, 2], live=live, opset=18, reduction=reduction)


def test_multiplication_by_zero(rig: Any) -> None:
    """What is multiplied by zero has no gradient; that of the zero itself is told as none."""
    updates = np.array([0.0, 2.0, 3.0], np.float32)
    rig.check("ScatterND", normal(4), np.array([[1], [2], [2]]), updates, opset=18, reduction="mul", linear=True)


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_compress(rig: Any, axis: int | None) -> None:
    kept = np.array([False, True, True]) if axis is not None else np.arange(9) % 2 == 0
    rig.check("Compress", normal(3, 3), kept, linear=True, **({} if axis is None else {"axis": axis}))


def test_compress_of_computed_positions_is_refused(rig: Any) -> None:
    with pytest.raises(ModelError, match="data decides how many rows"):
        rig.check("Compress", normal(3, 3), np.array([False, True, True]), live=[1], axis=0, linear=True)


@pytest.mark.parametrize("time", [0, 1])
@LIVE
def test_reverse_sequence(rig: Any, time: int, live: tuple[int, ...]) -> None:
    lengths = np.array([1, 4, 2, 3])
    rig.check("ReverseSequence", normal(4, 4, 2), lengths, live=live, time_axis=time, batch_axis=1 - time, linear=True)


@LIVE
def test_max_unpool(rig: Any, live: tuple[int, ...]) -> None:
    index = np.array([[[[0, 3], [9, 14]], [[17, 18], [28, 27]]]])
    rig.check(
        "MaxUnpool", normal(1, 2, 2, 2), index, live=live, linear=True, kernel_shape=[2, 2], strides=[2, 2]
    )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_hot(rig: Any, axis: int) -> None:
    rig.check(
        "OneHot", np.array([[1, 0], [3, -1]]), np.array(4), np.array([0.3, 1.2], np.float32), wanted=[2], axis=axis,
        linear=True,
    )  # fmt: skip
