"""Softmax, normalisations and reductions against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitalloy.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).uniform(0.5, 2.0, shape).astype(np.float32)


def apart(*shape: int) -> Array:
    count = int(np.prod(shape))
    return (np.random.default_rng(3).permutation(count).reshape(shape) * 0.25 - count / 8).astype(np.float32)


def double(torch: Any, array: Array) -> Any:
    return torch.from_numpy(array.astype(np.float64))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1, 2, 3, 2)], ids=str)
def test_softmax_on_every_axis(rig: Any, op: str, shape: tuple[int, ...]) -> None:
    name = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}[op]
    for axis in [None, *range(-len(shape), len(shape))]:
        given = {} if axis is None else {"axis": axis}

        def run(torch: Any, x: Any, axis: int | None = axis) -> Any:
            return getattr(torch, name)(x, -1 if axis is None else axis)

        rig.check(op, normal(*shape), torch=run, **given)


def test_saturated_softmax_is_finite(rig: Any) -> None:
    rig.check("Softmax", np.array([[80.0, -80.0, 0.0], [0.0, 0.0, 0.0]], np.float32))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 2)], ids=str)
def test_batch_normalization(rig: Any, shape: tuple[int, ...]) -> None:
    scale, bias, mean, variance = normal(3), normal(3, seed=2), normal(3, seed=3), positive(3)

    def run(torch: Any, x: Any) -> Any:
        terms = (double(torch, a) for a in (mean, variance, scale, bias))
        return torch.nn.functional.batch_norm(x, *terms, training=False, eps=1e-2)

    rig.check("BatchNormalization", normal(*shape), scale, bias, mean, variance, epsilon=1e-2, linear=True, torch=run)


def test_batch_normalization_that_is_not_in_inference_form_is_refused(rig: Any) -> None:
    inputs = [normal(2, 3, 4), normal(3), normal(3), normal(3), positive(3)]
    with pytest.raises(UnsupportedOpError, match="inference"):
        rig.check("BatchNormalization", *inputs, live=(4,), linear=True)
    with pytest.raises(UnsupportedOpError, match="computed input 2"):
        rig.check("BatchNormalization", *inputs, wanted=(0, 2), linear=True)


@pytest.mark.parametrize("axis", [None, -1, -2, 1, 0])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_normalization(rig: Any, axis: int | None, *, biased: bool) -> None:
    shape = (2, 3, 4)
    inner = shape[-1 if axis is None else axis :]
    scale, bias = normal(*inner), normal(*inner, seed=2)

    def run(torch: Any, x: Any) -> Any:
        b = double(torch, bias) if biased else None
        return torch.nn.functional.layer_norm(x, inner, double(torch, scale), b, 1e-3)

    given = {"epsilon": 1e-3, **({} if axis is None else {"axis": axis})}
    rig.check("LayerNormalization", normal(*shape), scale, *([bias] if biased else []), torch=run, **given)


def test_layer_normalization_of_a_constant_row_is_finite(rig: Any) -> None:
    rig.check("LayerNormalization", np.zeros((2, 4), np.float32), normal(4), epsilon=1.0, reference=True)


@pytest.mark.parametrize("slot", [1, 2])
def test_layer_normalization_with_a_measured_scale_is_refused(rig: Any, slot: int) -> None:
    with pytest.raises(UnsupportedOpError, match=f"computed input {slot}"):
        rig.check("LayerNormalization", normal(2, 4), normal(4), normal(4), wanted=(0, slot))


def test_layer_normalization_whose_statistics_are_read_is_refused(rig: Any) -> None:
    rig.check("LayerNormalization", normal(2, 4), normal(4), normal(4), outputs=3, heads=(0,))
    with pytest.raises(UnsupportedOpError, match="first output"):
        rig.check("LayerNormalization", normal(2, 4), normal(4), normal(4), outputs=3, heads=(1,))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4, 2), (2, 3, 2, 2, 2)], ids=str)
def test_instance_normalization(rig: Any, shape: tuple[int, ...]) -> None:
    scale, bias = normal(3), normal(3, seed=2)

    def run(torch: Any, x: Any) -> Any:
        terms = {"weight": double(torch, scale), "bias": double(torch, bias)}
        return torch.nn.functional.instance_norm(x, eps=1e-2, **terms)

    rig.check("InstanceNormalization", normal(*shape), scale, bias, epsilon=1e-2, torch=run)
    with pytest.raises(UnsupportedOpError, match="run time"):
        rig.check("InstanceNormalization", normal(*shape), scale, bias, live=(1,))


REDUCTIONS: dict[str, Any] = {
    "ReduceL2": lambda torch, x, axes, keep: torch.sqrt((x * x).sum(axes, keepdim=keep)),
    "ReduceMax": lambda _, x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda _, x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda _, x, axes, keep: x.amin(axes, keepdim=keep),
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
