"""Softmax, normalisations and reductions against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitalloy.core.errors import UnsupportedOpError

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


@pytest.mark.parametrize("shape", [(2, 6, 4), (1, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_group_normalization(rig: Any, shape: tuple[int, ...], groups: int) -> None:
    scale, bias = normal(shape[1]), normal(shape[1], seed=2)

    def run(torch: Any, x: Any) -> Any:
        return torch.nn.functional.group_norm(x, groups, double(torch, scale), double(torch, bias), eps=1e-2)

    given = {"num_groups": groups, "opset": 21}
    rig.check("GroupNormalization", normal(*shape), scale, bias, epsilon=1e-2, torch=run, **given)
    with pytest.raises(UnsupportedOpError, match="run time"):
        rig.check("GroupNormalization", normal(*shape), scale, bias, live=(1,), **given)


@pytest.mark.parametrize("axis", [None, -1, 1, 0])
def test_rms_normalization(rig: Any, axis: int | None) -> None:
    shape = (2, 3, 4)
    inner = shape[-1 if axis is None else axis :]
    scale = normal(*inner)

    def run(torch: Any, x: Any) -> Any:
        return torch.nn.functional.rms_norm(x, inner, double(torch, scale), 1e-3)

    given = {"epsilon": 1e-3, **({} if axis is None else {"axis": axis})}
    rig.check("RMSNormalization", normal(*shape), scale, opset=23, torch=run, **given)
    with pytest.raises(UnsupportedOpError, match="computed input 1"):
        rig.check("RMSNormalization", normal(2, 4), normal(4), wanted=(0, 1), opset=23)


@pytest.mark.parametrize("axes", [None, (0, 2, 3), (1,), (-1, -2)], ids=str)
def test_mean_variance_normalization(rig: Any, axes: tuple[int, ...] | None) -> None:
    def run(torch: Any, x: Any) -> Any:
        over = axes or (0, 2, 3)
        return (x - x.mean(over, keepdim=True)) / x.std(over, keepdim=True, correction=0)

    given = {} if axes is None else {"axes": axes}
    rig.check("MeanVarianceNormalization", normal(2, 3, 3, 4), torch=run, **given)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lp_normalization(rig: Any, p: int, axis: int) -> None:
    rig.check("LpNormalization", apart(2, 3, 4) + np.float32(0.1), p=p, axis=axis,
              torch=lambda torch, x: torch.nn.functional.normalize(x, p=float(p), dim=axis))  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (1, 4, 2, 2)], ids=str)
def test_local_response_normalization(rig: Any, size: int, shape: tuple[int, ...]) -> None:
    given = {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}

    def run(torch: Any, x: Any) -> Any:
        return torch.nn.functional.local_response_norm(x, size, 0.5, 0.6, 1.5)

    rig.check("LRN", normal(*shape), torch=run, **given)
