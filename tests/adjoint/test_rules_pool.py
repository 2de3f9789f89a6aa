"""Pooling, resizing and padding against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.core.errors import UnsupportedOpError

PROPERTY = settings(max_examples=15)
Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apart(*shape: int) -> Array:
    """Values in random order that stay in order under a finite difference."""
    count = int(np.prod(shape))
    return (np.random.default_rng(3).permutation(count).reshape(shape) * 0.25 - count / 8).astype(np.float32)


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_max_pool(rig: Any, rank: int, data: st.DataObject) -> None:
    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, strides, dilations = each(1, 3), each(1, 3), each(1, 2)
    pads = [min(p, k // 2) for p, k in zip(each(0, 1), kernel, strict=True)]
    size = [(k - 1) * d + 1 + e for k, d, e in zip(kernel, dilations, each(0, 3), strict=True)]
    ceil = data.draw(st.booleans())

    def run(torch: Any, x: Any) -> Any:
        pool = getattr(torch.nn.functional, f"max_pool{rank}d")
        return pool(x, kernel, strides, pads, dilations, ceil)

    rig.check("MaxPool", apart(2, 2, *size), kernel_shape=kernel, strides=strides, dilations=dilations,
              pads=[*pads, *pads], ceil_mode=int(ceil), torch=run)  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"auto_pad": "VALID"},
        {"storage_order": 1, "pads": [0, 1, 1, 0]},
        {"outputs": 2},
    ],
    ids=str,
)
def test_max_pool_forms(rig: Any, attributes: dict[str, Any]) -> None:
    outputs = attributes.pop("outputs", 1)
    rig.check("MaxPool", apart(1, 2, 5, 6), outputs=1, kernel_shape=[2, 3], **attributes)
    if outputs == 2:
        rig.check("MaxPool", apart(1, 2, 5, 6), kernel_shape=[3, 3], pads=[1] * 4, live=())


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_average_pool(rig: Any, rank: int, data: st.DataObject) -> None:
    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, strides = each(1, 3), each(1, 3)
    before, after = ([min(p, k // 2) for p, k in zip(each(0, 1), kernel, strict=True)] for _ in range(2))
    size = [k + e for k, e in zip(kernel, each(0, 3), strict=True)]
    counted, ceil = data.draw(st.booleans()), data.draw(st.booleans())
    opset = data.draw(st.sampled_from([13, 17, 19]))

    def run(torch: Any, x: Any) -> Any:
        pool = getattr(torch.nn.functional, f"avg_pool{rank}d")
        return pool(x, kernel, strides, before, ceil, counted)

    # torch pads both sides alike and never starts a window in the padding
    comparable = before == after and not ceil
    rig.check("AveragePool", normal(2, 2, *size), kernel_shape=kernel, strides=strides, pads=[*before, *after],
              ceil_mode=int(ceil), count_include_pad=int(counted), opset=opset, linear=True,
              torch=run if comparable else None)  # fmt: skip


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("counted", [0, 1])
def test_average_pool_auto_pad(rig: Any, auto_pad: str, counted: int) -> None:
    rig.check("AveragePool", normal(1, 2, 5, 6), kernel_shape=[2, 3], strides=[2, 2], auto_pad=auto_pad,
              count_include_pad=counted, linear=True)  # fmt: skip


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("ceil", [0, 1])
def test_average_pool_dilated(rig: Any, counted: int, ceil: int) -> None:
    rig.check("AveragePool", normal(1, 2, 7, 8), kernel_shape=[2, 3], dilations=[2, 2], strides=[2, 3],
              pads=[1, 1, 0, 1], count_include_pad=counted, ceil_mode=ceil, opset=19, linear=True)  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (1, 2, 2, 3, 2)], ids=str)
def test_global_pools(rig: Any, shape: tuple[int, ...]) -> None:
    axes = tuple(range(2, len(shape)))
    rig.check("GlobalAveragePool", normal(*shape), linear=True, torch=lambda _, x: x.mean(axes, keepdim=True))
    rig.check("GlobalMaxPool", apart(*shape), torch=lambda _, x: x.amax(axes, keepdim=True))


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 3]},
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        {"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [2, 1], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"},
    ],
    ids=str,
)
def test_lp_pool(rig: Any, p: int, attributes: dict[str, Any]) -> None:
    x = apart(1, 2, 5, 6) + np.float32(0.1)

    def run(torch: Any, x: Any) -> Any:
        windows = torch.nn.functional.unfold(x.abs() ** p, (2, 3)).reshape(1, 2, 6, 4, 4)
        return windows.sum(2) ** (1 / p)

    rig.check("LpPool", x, p=p, opset=18, torch=run if len(attributes) == 1 else None, **attributes)
    rig.check("GlobalLpPool", x, p=p, torch=lambda _, x: (x.abs() ** p).sum((2, 3), keepdim=True) ** (1 / p))


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
SIZES = [((4, 5), (8, 10)), ((4, 5), (7, 3)), ((6, 4), (3, 8)), ((3, 4), (3, 9)), ((4, 4), (1, 1))]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *[("nearest", {"nearest_mode": m}) for m in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")],
        ("linear", {}),
        ("cubic", {}),
        ("cubic", {"cubic_coeff_a": -0.5, "exclude_outside": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("coordinates", [*COORDINATES, "half_pixel_symmetric"])
@pytest.mark.parametrize("scaled", [False, True], ids=["sizes", "scales"])
def test_resize(rig: Any, mode: str, options: dict[str, Any], coordinates: str, *, scaled: bool) -> None:
    for size, out in SIZES:
        x, empty = normal(1, 2, *size), np.zeros(0, np.float32)
        scales = np.array([1, 1, *(o / s for o, s in zip(out, size, strict=True))], np.float32)
        target: list[np.ndarray | None] = [None, np.array([1, 2, *out], np.int64)]
        if scaled:
            scales[2:] *= np.float32(1.04)
            target = [scales]
        rig.check("Resize", x, empty, *target, mode=mode, coordinate_transformation_mode=coordinates, linear=True,
                  opset=19 if coordinates == "half_pixel_symmetric" else 13, **options)  # fmt: skip


@pytest.mark.parametrize(("size", "out"), SIZES, ids=str)
def test_resize_like_torch(rig: Any, size: tuple[int, ...], out: tuple[int, ...]) -> None:
    target = [np.zeros(0, np.float32), None, np.array([1, 2, *out], np.int64)]
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("nearest", "nearest", {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}),
        ("linear", "bilinear", {"coordinate_transformation_mode": "pytorch_half_pixel"}),
        ("linear", "bilinear", {"coordinate_transformation_mode": "align_corners"}),
        ("cubic", "bicubic", {"coordinate_transformation_mode": "pytorch_half_pixel", "cubic_coeff_a": -0.75}),
    ]
    for mode, name, options in ways:
        corners = True if options["coordinate_transformation_mode"] == "align_corners" else None

        def run(torch: Any, x: Any, name: str = name, corners: bool | None = corners) -> Any:
            return torch.nn.functional.interpolate(x, out, mode=name, align_corners=corners)

        rig.check("Resize", normal(1, 2, *size), *target, mode=mode, linear=True, opset=17,
                  torch=None if mode != "nearest" and 1 in out else run, **options)  # fmt: skip


def test_resize_whose_scale_does_not_change_the_size(rig: Any) -> None:
    scales = np.array([1, 1, 1.2, 1.9], np.float32)
    rig.check("Resize", normal(1, 2, 4, 1), None, scales, mode="linear", linear=True)
    rig.check("Resize", normal(1, 2, 4, 4), None, np.array([1, 1, 1.2, 1], np.float32), mode="linear", linear=True)


def test_resize_axes_and_other_ranks(rig: Any) -> None:
    sizes = np.array([7, 3], np.int64)
    rig.check("Resize", normal(1, 2, 4, 5), None, None, sizes, mode="linear", axes=[2, 3], opset=18, linear=True)
    rig.check("Resize", normal(1, 2, 4, 5), None, None, sizes, mode="nearest", axes=[3, 2], opset=18, linear=True)
    scales = np.array([1.5, 0.6], np.float32)
    rig.check("Resize", normal(1, 2, 4, 5), None, scales, mode="cubic", axes=[-2, -1], opset=18, linear=True)
    rig.check("Resize", normal(1, 2, 5), None, None, np.array([1, 2, 8], np.int64), mode="linear", linear=True)
    rig.check(
        "Resize", normal(1, 2, 3, 4, 2), None, np.array([1, 1, 2, 1.5, 2], np.float32), mode="linear", linear=True
    )
    rig.check("Resize", normal(4, 3), None, np.array([2, 2], np.float32), mode="nearest", linear=True)
    rig.check("Resize", normal(1, 2, 3, 4), None, np.array([2, 2, 2, 2], np.float32), mode="nearest", linear=True)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("out", [(3, 4), (12, 5), (4, 3)], ids=str)
def test_resize_antialias(rig: Any, mode: str, out: tuple[int, int]) -> None:
    sizes = np.array([1, 2, *out], np.int64)
    rig.check("Resize", normal(1, 2, 9, 8), None, None, sizes, mode=mode, antialias=1, opset=18, linear=True)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("region", [(0.2, 0.1, 0.9, 0.8), (0.0, 0.0, 1.0, 1.0), (-0.3, 0.1, 1.4, 0.5)], ids=str)
def test_resize_crop(rig: Any, mode: str, region: tuple[float, ...]) -> None:
    roi = np.array([0, 0, *region[:2], 1, 1, *region[2:]], np.float32)
    for out in ((6, 5), (4, 7)):
        rig.check("Resize", normal(1, 2, 4, 5), roi, None, np.array([1, 2, *out], np.int64), mode=mode, linear=True,
                  coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=3.0)  # fmt: skip


def test_resize_that_keeps_the_aspect_ratio_is_refused(rig: Any) -> None:
    with pytest.raises(UnsupportedOpError, match="aspect"):
        rig.check("Resize", normal(1, 2, 4, 6), None, None, np.array([9, 9], np.int64), mode="linear", axes=[2, 3],
                  keep_aspect_ratio_policy="not_larger", opset=18, linear=True)  # fmt: skip


PADS = [(0, 0, 1, 2, 0, 0, 2, 1), (0, 1, 0, 0, 0, 2, 0, 1), (0, 0, -1, 0, 0, 0, 0, -2), (0, 0, 1, -1, 0, 0, -1, 2)]


@pytest.mark.parametrize("pads", PADS, ids=str)
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad(rig: Any, mode: str, pads: tuple[int, ...]) -> None:
    ends = np.array(pads, np.int64)

    def run(torch: Any, x: Any) -> Any:
        sides = [p for axis in (3, 2) for p in (pads[axis], pads[axis + 4])]
        if mode == "constant":
            sides += [p for axis in (1, 0) for p in (pads[axis], pads[axis + 4])]
        return torch.nn.functional.pad(x, sides, {"edge": "replicate", "wrap": "circular"}.get(mode, mode))

    comparable = mode == "constant" or (pads[1] == 0 and min(pads) >= 0)
    rig.check("Pad", normal(2, 4, 4, 5), ends, mode=mode, linear=True, opset=19, torch=run if comparable else None)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_pad_by_more_than_the_length_and_of_a_long_axis(rig: Any, mode: str) -> None:
    """Numbers are repeated several times; and a matrix over the long axis would not fit into memory."""
    rig.check("Pad", normal(2, 5, 3), np.array([0, 4, 0, 0, 4, 0]), mode=mode, linear=True, opset=19)
    if mode == "edge":
        rig.check("Pad", normal(2, 5, 3), np.array([0, 9, 0, 0, 7, 0]), mode=mode, linear=True, opset=19)
    rig.check("Pad", normal(1, 60000), np.array([0, 128, 0, 127]), mode=mode, linear=True, opset=19)


def test_pad_axes_and_value(rig: Any) -> None:
    ends, value = np.array([1, 0, 2, 1], np.int64), np.array(3.5, np.float32)
    rig.check("Pad", normal(2, 3, 4), ends, value, np.array([-1, 0], np.int64), opset=18, linear=True)
    rig.check("Pad", normal(2, 3, 4), ends, None, np.array([-1, 1], np.int64), mode="reflect", opset=18, linear=True)
    with pytest.raises(UnsupportedOpError, match="computed input 2"):
        rig.check("Pad", normal(2, 3), ends, value, wanted=(0, 2), linear=True)
