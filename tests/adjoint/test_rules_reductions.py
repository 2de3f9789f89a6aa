"""Reductions and sums along an axis, against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apart(*shape: int) -> Array:
    count = int(np.prod(shape))
    return (np.random.default_rng(3).permutation(count).reshape(shape) * 0.25 - count / 8 + 0.1).astype(np.float32)


def product(torch: Any, x: Any, axes: tuple[int, ...], *, keep: bool) -> Any:
    for axis in sorted((a % 3 for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCTIONS: dict[str, Any] = {
    "ReduceL1": lambda _, x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda torch, x, axes, keep: torch.sqrt((x * x).sum(axes, keepdim=keep)),
    "ReduceMax": lambda _, x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda _, x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda _, x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceLogSumExp": lambda torch, x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceSum": lambda _, x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceSumSquare": lambda _, x, axes, keep: (x * x).sum(axes, keepdim=keep),
}


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("axes", [None, (0,), (1,), (-1,), (0, 2), (-2, -1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("opset", [13, 18])
def test_reductions(rig: Any, op: str, axes: tuple[int, ...] | None, opset: int) -> None:
    x = apart(2, 3, 4)
    by_input = opset == 18 or op == "ReduceSum"
    inputs = [] if axes is None or not by_input else [np.array(axes, np.int64)]
    given: dict[str, Any] = {} if axes is None or by_input else {"axes": axes}
    for keep in (True, False):
        rig.check(op, x, *inputs, keepdims=int(keep), opset=opset, **given,
                  torch=lambda torch, x, keep=keep: REDUCTIONS[op](torch, x, axes or (0, 1, 2), keep))  # fmt: skip


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_over_nothing(rig: Any, op: str) -> None:
    none = np.zeros(0, np.int64)
    rig.check(op, apart(2, 3), none, noop_with_empty_axes=1, opset=18)
    rig.check(op, apart(2, 3), noop_with_empty_axes=1, opset=18)
    rig.check(op, apart(2, 3), none, opset=18)


def test_reduce_l2_at_zero_is_finite(rig: Any, micro: Any, tap: Any) -> None:
    helper = pytest.importorskip("onnx").helper
    x = np.zeros((2, 3), np.float32)
    model = micro([helper.make_node("ReduceL2", ["x"], ["y"], axes=[1])], {"x": x}, {"y": np.float32})
    a = rig.run(rig.load(model), {"x": x}, [tap("x", np.ones_like(x), name="0")], {"y": np.ones((1, 2, 1), np.float32)})
    np.testing.assert_array_equal(a["y"]["0"], [0.0])


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_reduced_extrema_share_ties(rig: Any, micro: Any, tap: Any, op: str) -> None:
    helper = pytest.importorskip("onnx").helper
    x = np.array([1.0, 1.0], np.float32)
    model = micro([helper.make_node(op, ["x"], ["y"], keepdims=0)], {"x": x}, {"y": np.float32})
    taps = [tap("x", np.eye(2)[i], name=str(i)) for i in range(2)]
    a = rig.run(rig.load(model), {"x": x}, taps, {"y": np.ones((1,), np.float32)})
    assert a["y"]["0"] == a["y"]["1"] == [0.5]


@pytest.mark.parametrize(("op", "low"), [("ReduceProd", -1.0), ("ReduceLogSum", 0.5)])
@pytest.mark.parametrize("axes", [None, (0,), (-1,), (0, 2)], ids=str)
@pytest.mark.parametrize("opset", [13, 18])
def test_reductions_of_small_numbers(rig: Any, op: str, low: float, axes: tuple[int, ...] | None, opset: int) -> None:
    x = np.random.default_rng(4).uniform(low, 1.5, (2, 3, 2)).astype(np.float32)
    inputs = [] if axes is None or opset == 13 else [np.array(axes, np.int64)]
    given: dict[str, Any] = {} if axes is None or opset == 18 else {"axes": axes}

    def run(torch: Any, x: Any, *, keep: bool) -> Any:
        over = axes or (0, 1, 2)
        return product(torch, x, over, keep=keep) if op == "ReduceProd" else x.sum(over, keepdim=keep).log()

    for keep in (True, False):
        rig.check(op, x, *inputs, keepdims=int(keep), opset=opset, **given,
                  torch=lambda torch, x, keep=keep: run(torch, x, keep=keep))  # fmt: skip


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_product_with_zeros(rig: Any, zeros: int) -> None:
    x = np.array([[1.5, -2.0, 0.5, 3.0]], np.float32)
    x[0, :zeros] = 0
    rig.check("ReduceProd", x, axes=[1], torch=lambda _, x: x.prod(1, keepdim=True))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_cum_sum(rig: Any, axis: int, reverse: int, exclusive: int) -> None:
    def run(torch: Any, x: Any) -> Any:
        y = torch.flip(torch.cumsum(torch.flip(x, [axis]), axis), [axis]) if reverse else torch.cumsum(x, axis)
        return y - x if exclusive else y

    rig.check("CumSum", normal(3, 4), np.array(axis, np.int64), reverse=reverse, exclusive=exclusive, linear=True,
              torch=run)  # fmt: skip
