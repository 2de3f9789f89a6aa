"""Operators that move, repeat or select elements, against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.core.errors import ModelError

PROPERTY = settings(max_examples=15)
Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


SHAPE = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@PROPERTY
@given(shape=SHAPE, data=st.data())
def test_concat(rig: Any, shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    parts = []
    for seed, size in enumerate(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))):
        sizes = list(shape)
        sizes[axis] = size
        parts.append(normal(*sizes, seed=seed))
    wanted = data.draw(st.sets(st.integers(0, len(parts) - 1), min_size=1).map(sorted))

    def run(torch: Any, *xs: Any) -> Any:
        every = [torch.from_numpy(p.astype(np.float64)) for p in parts]
        for slot, x in zip(wanted, xs, strict=True):
            every[slot] = x
        return torch.cat(every, axis)

    rig.check("Concat", *parts, wanted=wanted, axis=axis, linear=True, torch=run)


@PROPERTY
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), axis=st.integers(-2, 1), data=st.data())
def test_split(rig: Any, sizes: list[int], axis: int, data: st.DataObject) -> None:
    heads = data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1).map(sorted))
    total = sum(sizes)
    x = normal(*((total, 3) if axis in (0, -2) else (3, total)))
    rig.check("Split", x, ints(*sizes), outputs=len(sizes), heads=heads, axis=axis, linear=True,
              torch=lambda torch, x: torch.split(x, sizes, axis)[heads[0]])  # fmt: skip


def test_split_without_sizes(rig: Any) -> None:
    rig.check("Split", normal(6, 2), outputs=3, heads=(0, 1, 2), opset=13, linear=True)
    rig.check("Split", normal(2, 7), outputs=3, heads=(2, 0), opset=18, axis=1, num_outputs=3, linear=True)


@PROPERTY
@given(shape=SHAPE, data=st.data(), wrapped=st.booleans())
def test_slice(rig: Any, shape: tuple[int, ...], data: st.DataObject, *, wrapped: bool) -> None:
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape), unique=True))
    starts, ends, steps = [], [], []
    for axis in axes:
        size = shape[axis]
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        start = data.draw(st.integers(0, size - 1))
        if step > 0:
            end = data.draw(st.sampled_from([start + 1, size, size + 5, (1 << 63) - 1]))
        else:
            end = data.draw(st.sampled_from([start - 1, -size - 1, -(1 << 63)])) if start else -size - 1
        starts.append(start - size if wrapped else start)
        ends.append(end)
        steps.append(step)
    named = [a - len(shape) if wrapped else a for a in axes]
    rig.check("Slice", normal(*shape), ints(*starts), ints(*ends), ints(*named), ints(*steps), linear=True)


@pytest.mark.parametrize(
    ("start", "end", "step"), [(1, 3, 1), (0, 9, 2), (1, 9, 2), (2, 9, 3), (-1, -9, -1), (3, 0, -2)]
)
def test_slice_like_torch(rig: Any, start: int, end: int, step: int) -> None:
    chosen = np.arange(5)[slice(start, None if end < -5 else end, step)].copy()
    rig.check("Slice", normal(2, 5), ints(start), ints(end), ints(1), ints(step), linear=True,
              torch=lambda torch, x: x[:, torch.from_numpy(chosen)])  # fmt: skip
    if step == 1:
        rig.check("Slice", normal(5), ints(start), ints(end), linear=True)


@pytest.mark.parametrize(
    ("start", "end", "step"), [(9, 0, -1), (7, -9, -2), (-9, 2, 1), (-9, 9, 1), (2, 2, 1), (4, 1, 1)]
)
def test_slice_bounds_outside_the_tensor(rig: Any, start: int, end: int, step: int) -> None:
    rig.check("Slice", normal(3, 5), ints(start), ints(end), ints(-1), ints(step), linear=True)


def test_slice_computed_at_run_time_is_refused(rig: Any, micro: Any, tap: Any) -> None:
    helper = pytest.importorskip("onnx").helper
    x = normal(4)
    nodes = [
        helper.make_node("ArgMax", ["x"], ["start"], keepdims=1, axis=0),
        helper.make_node("Slice", ["x", "start", "end"], ["s"], name="cut"),
        helper.make_node("ReduceSum", ["s"], ["y"]),
    ]
    model = micro(nodes, {"x": x}, {"y": np.float32}, {"end": ints(4)})
    with pytest.raises(ModelError, match="data decides how many rows"):
        rig.run(rig.load(model), {"x": x}, [tap("x", x)], {"y": np.ones((1, 1), np.float32)})


@pytest.mark.parametrize("target", [(6, 4), (24,), (2, 3, 2, 2), (0, -1), (1, 24, 1)], ids=str)
def test_reshape(rig: Any, target: tuple[int, ...]) -> None:
    final = tuple((2, 3, 4)[i] if t == 0 else t for i, t in enumerate(target))
    rig.check("Reshape", normal(2, 3, 4), ints(*target), linear=True, torch=lambda _, x: x.reshape(final))


@PROPERTY
@given(shape=SHAPE, data=st.data())
def test_transpose(rig: Any, shape: tuple[int, ...], data: st.DataObject) -> None:
    perm = data.draw(st.permutations(range(len(shape))))
    rig.check("Transpose", normal(*shape), perm=perm, linear=True, torch=lambda _, x: x.permute(perm))


def test_transpose_reverses_by_default(rig: Any) -> None:
    rig.check("Transpose", normal(2, 3, 4), linear=True, torch=lambda _, x: x.permute(2, 1, 0))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_flatten(rig: Any, axis: int) -> None:
    rows = int(np.prod((2, 3, 4)[:axis] if axis else ()))
    rig.check("Flatten", normal(2, 3, 4), axis=axis, linear=True, torch=lambda _, x: x.reshape(rows, -1))


def test_squeeze_and_unsqueeze(rig: Any) -> None:
    rig.check("Squeeze", normal(1, 3, 1, 2), ints(0, -2), linear=True, torch=lambda _, x: x.reshape(3, 2))
    rig.check("Squeeze", normal(1, 3, 1), linear=True, torch=lambda _, x: x.reshape(3))
    rig.check("Unsqueeze", normal(3, 2), ints(0, -1), linear=True, torch=lambda _, x: x.reshape(1, 3, 2, 1))


@pytest.mark.parametrize(
    ("shape", "to"),
    [((3, 1), (3, 4)), ((3, 1), (2, 3, 4)), ((1,), (5,)), ((2, 3), (1, 1)), ((3,), (2, 2, 3)), ((), (2, 2))],
    ids=str,
)
def test_expand(rig: Any, shape: tuple[int, ...], to: tuple[int, ...]) -> None:
    full = np.broadcast_shapes(shape, to)
    rig.check("Expand", normal(*shape), ints(*to), linear=True, torch=lambda _, x: x.expand(full))


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 3), (1, 4, 1)], ids=str)
def test_tile(rig: Any, repeats: tuple[int, ...]) -> None:
    rig.check("Tile", normal(2, 3, 2), ints(*repeats), linear=True, torch=lambda torch, x: torch.tile(x, repeats))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(rig: Any, mode: str) -> None:
    run = (lambda torch, x: torch.nn.functional.pixel_shuffle(x, 2)) if mode == "CRD" else None
    rig.check("DepthToSpace", normal(2, 12, 2, 3), blocksize=2, mode=mode, linear=True, torch=run)
    rig.check("DepthToSpace", normal(1, 9, 2, 2), blocksize=3, mode=mode, linear=True)


def test_space_to_depth(rig: Any) -> None:
    rig.check("SpaceToDepth", normal(2, 3, 4, 6), blocksize=2, linear=True)
    rig.check("SpaceToDepth", normal(1, 1, 6, 3), blocksize=3, linear=True,
              torch=lambda torch, x: torch.nn.functional.pixel_unshuffle(x, 3))  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("k", [None, 0, 1, -1, 5, -5])
@pytest.mark.parametrize("upper", [0, 1])
def test_trilu(rig: Any, shape: tuple[int, ...], k: int | None, upper: int) -> None:
    offset = [] if k is None else [np.array(k, np.int64)]
    rig.check("Trilu", normal(*shape), *offset, upper=upper, linear=True,
              torch=lambda torch, x: (torch.triu if upper else torch.tril)(x, k or 0))  # fmt: skip
