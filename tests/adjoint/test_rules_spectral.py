"""Fourier transforms and Col2Im, against differences in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitalloy.core.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("length", [None, 4, 9])
@pytest.mark.parametrize(
    ("parts", "attributes"), [(1, {"onesided": 1}), (1, {}), (2, {}), (2, {"inverse": 1})], ids=str
)
def test_dft(rig: Any, parts: int, attributes: dict[str, int], length: int | None, axis: int) -> None:
    x = normal(2, 6, 5, parts)
    size = None if length is None else np.array(length)
    rig.check("DFT", x, size, axis=axis, linear=True, **attributes)
    rig.check("DFT", x, size, np.array(axis), opset=20, linear=True, **attributes)


def test_long_transforms_are_refused(rig: Any) -> None:
    with pytest.raises(UnsupportedOpError, match="longer than 2048"):
        rig.check("DFT", normal(1, 2050, 1), opset=17, axis=1, linear=True)


@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("window", [False, True])
def test_stft(rig: Any, onesided: int, window: bool) -> None:
    given = np.hanning(8).astype(np.float32) if window else None
    rig.check("STFT", normal(2, 29, 1), np.array(3), given, np.array(8), onesided=onesided, linear=True)


@pytest.mark.parametrize(
    ("image", "block", "attributes"),
    [
        ((5, 5), (1, 5), {}),
        ((5, 5), (3, 3), {"strides": [2, 2]}),
        ((5, 6), (2, 3), {"pads": [0, 1, 1, 2]}),
        ((6, 6), (2, 2), {"dilations": [1, 3]}),
        ((4, 3, 5), (2, 1, 3), {"pads": [1, 0, 1, 0, 1, 1]}),
    ],
    ids=str,
)
def test_col2im(rig: Any, image: tuple[int, ...], block: tuple[int, ...], attributes: dict[str, list[int]]) -> None:
    rank = len(image)
    pads, strides = attributes.get("pads", [0] * 2 * rank), attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    counts = [
        (image[i] + pads[i] + pads[rank + i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in range(rank)
    ]
    x = normal(2, 3 * int(np.prod(block)), int(np.prod(counts)))
    rig.check("Col2Im", x, np.array(image), np.array(block), opset=18, linear=True, **attributes)
