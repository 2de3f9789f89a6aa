"""Operators that read between pixels, against finite differences in ONNX Runtime and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitalloy.core.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def places(sizes: tuple[int, ...], out: tuple[int, ...], *, align: bool, spread: float) -> Array:
    """Random places, not near a pixel's centre or edge, where interpolation has corners; x first."""
    rng = np.random.default_rng(3)
    found = []
    for size in reversed(sizes):
        reach = int(spread * size) + 2
        cells = rng.integers(-reach, size + reach, (2, *out))
        pixels = cells + rng.choice([0.2, 0.35, 0.65, 0.8], cells.shape)
        found.append(2 * pixels / (size - 1) - 1 if align else (2 * pixels + 1) / size - 1)
    return np.stack(found, -1).astype(np.float32)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_grid_sample(rig: Any, mode: str, padding: str, align: int) -> None:
    """Bicubic with padding differs between ONNX Runtime and torch; what runs counts."""

    def run(torch: Any, x: Any, grid: Any) -> Any:
        return torch.nn.functional.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=bool(align))

    grid = places((4, 5), (3, 2), align=bool(align), spread=0.0 if mode == "bicubic" else 1.0)
    same = mode != "bicubic" and not (mode == "bilinear" and padding != "zeros")
    rig.check(
        "GridSample", normal(2, 3, 4, 5), grid, wanted=[0, 1], mode=mode, padding_mode=padding, align_corners=align,
        torch=run if same else None, tolerance=2e-3,
    )  # fmt: skip


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_grid_sample_of_volumes(rig: Any, mode: str, padding: str) -> None:
    grid = places((4, 5, 3), (2, 3, 2), align=False, spread=0.5)
    rig.check(
        "GridSample", normal(2, 2, 4, 5, 3), grid, wanted=[0, 1], opset=20, mode=mode, padding_mode=padding,
        tolerance=2e-3,
    )  # fmt: skip


def test_grid_sample_at_constant_places(rig: Any) -> None:
    rig.check("GridSample", normal(2, 3, 4, 5), places((4, 5), (3, 2), align=False, spread=0.2), linear=True)


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 1, 3, 4, 2), (2, 1, 1, 3)], ids=str)
def test_affine_grid(rig: Any, size: tuple[int, ...], align: int) -> None:
    rows = len(size) - 2
    theta = normal(2, rows, rows + 1)
    rig.check("AffineGrid", theta, np.array(size), align_corners=align, opset=20, linear=True)


REGIONS = np.array([[0.5, 1, 12, 9], [-3, -2, 5, 6], [4, 4, 4.4, 4.3], [2, 1, 30, 20]], np.float32)


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize(
    ("opset", "mode"), [(14, None), (16, None), (16, "output_half_pixel"), (20, "half_pixel")], ids=str
)
def test_roi_align(rig: Any, opset: int, mode: str | None, ratio: int) -> None:
    attributes = {} if mode is None else {"coordinate_transformation_mode": mode}
    for live in ((), (1, 2)) if ratio else ((), (2,)):
        rig.check(
            "RoiAlign", normal(2, 2, 7, 9), REGIONS, np.array([0, 1, 1, 0]), live=live, opset=opset, linear=True,
            output_height=3, output_width=2, sampling_ratio=ratio, spatial_scale=0.5, **attributes,
        )  # fmt: skip


def test_what_roi_align_chooses_at_run_time_is_refused(rig: Any) -> None:
    for attributes in ({"mode": "max", "sampling_ratio": 2}, {}):
        with pytest.raises(UnsupportedOpError, match=r"largest sample|computed regions"):
            rig.check("RoiAlign", normal(2, 2, 7, 9), REGIONS, np.array([0, 1, 1, 0]), live=[1], **attributes)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("groups", "apart", "attributes"),
    [
        (1, 1, {"pads": [1, 1, 1, 1]}),
        (2, 2, {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
        (4, 1, {}),
    ],
    ids=["plain", "strided", "depthwise"],
)
def test_deform_conv(rig: Any, groups: int, apart: int, attributes: dict[str, Any], *, masked: bool) -> None:
    """The places are some way off the centres of pixels, where interpolation has corners."""
    usual = {"pads": [0] * 4, "strides": [1] * 2, "dilations": [1] * 2}
    pads, strides, dilations = ({**usual, **attributes}[k] for k in usual)
    out = [(s + pads[i] + pads[i + 2] - dilations[i] * 2 - 1) // strides[i] + 1 for i, s in enumerate((6, 7))]
    rng = np.random.default_rng(4)
    moves = rng.integers(-2, 2, (2, apart * 18, *out)) + rng.choice([0.2, 0.35, 0.65, 0.8], (2, apart * 18, *out))
    mask = rng.uniform(0.1, 1.0, (2, apart * 9, *out)).astype(np.float32) if masked else None
    inputs = normal(2, 4, 6, 7), normal(8, 4 // groups, 3, 3), moves.astype(np.float32), normal(8), mask
    rig.check(
        "DeformConv", *inputs[: 5 if masked else 4], wanted=[0, 2, 4] if masked else [0, 2], opset=19,
        group=groups, offset_group=apart, tolerance=2e-3, **attributes,
    )  # fmt: skip


def test_computed_weights_of_deform_conv_are_refused(rig: Any) -> None:
    inputs = normal(1, 2, 5, 5), normal(2, 2, 3, 3), normal(1, 18, 3, 3)
    with pytest.raises(UnsupportedOpError, match="weights or its bias at run time"):
        rig.check("DeformConv", *inputs, wanted=[1], opset=19)
