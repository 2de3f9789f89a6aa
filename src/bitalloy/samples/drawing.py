"""How a scene of `shapes` is drawn, from one random generator and in this order.

1. A background: gradient, stripes, checks or smooth noise in muted colours, crossed by a few thin lines.
2. One to eight shapes, painted back to front. A shape is refused if it would leave too little of an earlier
   shape in sight (`MIN_VISIBLE`, `MIN_PIXELS`), so every label can be seen.
3. Light (a linear change of brightness across the image) and sensor noise.

Coordinates are in pixels, x to the right and y down.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["CLASSES", "COLORS", "MIN_PIXELS", "MIN_VISIBLE", "Drawing", "draw"]

CLASSES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "cross", "hexagon", "crescent")
"""Names of the classes, by label."""
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
"""Names of the colours, by number."""
MIN_VISIBLE = 0.35
"""Smallest part of a shape's area inside the image that later shapes leave in sight."""
MIN_PIXELS = 24
"""Smallest visible area of an instance, in pixels."""
MAX_SHAPES = 8
SIDE_RANGE = (0.08, 0.55)
"""Diameter of the circle around a shape, as a part of the image side (log-uniform)."""

_RGB = (
    (214, 40, 38),
    (240, 132, 24),
    (236, 212, 40),
    (52, 166, 60),
    (40, 196, 204),
    (42, 76, 208),
    (128, 54, 168),
    (238, 122, 178),
)
"""RGB values by colour number, before tint and light."""

Pixels = npt.NDArray[np.uint8]
Corners = npt.NDArray[np.float64]
"""Corners inside the unit circle, (k, 2), in drawing order."""


class Drawing(NamedTuple):
    """A finished image and the shapes painted on it, back to front."""

    image: Pixels
    """RGB image, (size, size, 3)."""
    labels: list[int]
    colors: list[int]
    instance_map: Pixels
    """Map of instances, (size, size): 0 is background, i + 1 is the i-th shape."""


def draw(rng: np.random.Generator, size: int) -> Drawing:
    """Draw a square image with a side of `size` pixels."""
    canvas = Image.fromarray(_background(rng, size))
    _draw_lines(rng, canvas)
    image = np.array(canvas)
    labels, colors, ids = _paint_shapes(rng, image)
    return Drawing(_light_and_noise(rng, image), labels, colors, ids)


def _background(rng: np.random.Generator, size: int) -> Pixels:
    """(size, size, 3): two muted colours mixed by one of four patterns."""
    grey = rng.uniform(50, 205, 2)
    first, second = np.clip(grey[:, None] + rng.uniform(-32, 32, (2, 3)), 0, 255).astype(np.float32)
    kind, angle = int(rng.integers(4)), rng.uniform(0, math.tau)
    waves, phase = rng.uniform(2, 12), rng.uniform(0, math.tau)
    strength = float(rng.uniform(0.3, 1.0))
    cells = int(rng.integers(3, 24))
    knots = rng.integers(0, 256, (cells, cells), np.uint8)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    across, along = cos * axis[None] + sin * axis[:, None], cos * axis[:, None] - sin * axis[None]
    if kind == 0:
        mix = across * 0.35 + 0.5
    elif kind == 1:
        mix = np.sin(across * np.float32(waves * math.pi) + np.float32(phase)) * 0.5 + 0.5
    elif kind == 2:
        mix = (np.floor(across * np.float32(waves)) + np.floor(along * np.float32(waves))) % 2
    else:
        smooth = Image.fromarray(knots).resize((size, size), Image.Resampling.BICUBIC)
        mix = np.asarray(smooth, np.float32) / 255
    ramp = np.linspace(0, strength, 256, dtype=np.float32)[:, None] * (second - first) + first
    levels = (np.clip(mix, 0, 1) * np.float32(255)).astype(np.uint8)
    return np.take(ramp.astype(np.uint8), levels, axis=0)


def _draw_lines(rng: np.random.Generator, image: Image.Image) -> None:
    """Up to four thin lines that belong to no class."""
    pen = ImageDraw.Draw(image)
    count, ends = int(rng.integers(5)), rng.uniform(0, image.width, (4, 4))
    colors, widths = rng.integers(40, 216, (4, 3)), rng.integers(1, 4, 4)
    for i in range(count):
        color = (int(colors[i, 0]), int(colors[i, 1]), int(colors[i, 2]))
        pen.line(ends[i].tolist(), fill=color, width=int(widths[i]))


def _paint_shapes(rng: np.random.Generator, image: Pixels) -> tuple[list[int], list[int], Pixels]:
    """Paint shapes into the image (in place); returns labels, colours and the map of instance ids."""
    size = len(image)
    ids = np.zeros((size, size), np.uint8)
    labels: list[int] = []
    colors: list[int] = []
    paint = np.zeros((MAX_SHAPES + 1, 3), np.uint8)
    visible = np.zeros(MAX_SHAPES + 1, np.int64)
    needed: list[float] = [0.0]  # by id: visible area that must remain
    for _ in range(int(rng.integers(1, MAX_SHAPES + 1))):
        label, color = int(rng.integers(len(CLASSES))), int(rng.integers(len(COLORS)))
        radius = math.exp(rng.uniform(math.log(SIDE_RANGE[0]), math.log(SIDE_RANGE[1]))) * size / 2
        x, y = rng.uniform(0.7 * radius, size - 0.7 * radius, 2).tolist()
        angle, tint = rng.uniform(0, math.tau), rng.uniform(-22, 22, 3)
        left, top = max(int(x - radius) - 1, 0), max(int(y - radius) - 1, 0)
        right, bottom = min(int(x + radius) + 2, size), min(int(y + radius) + 2, size)
        mask = _stamp(label, (right - left, bottom - top), (x - left, y - top), radius, angle)
        window = ids[top:bottom, left:right]
        area = int(np.count_nonzero(mask))
        after = visible - np.bincount(window[mask], minlength=MAX_SHAPES + 1)
        if area < MIN_PIXELS or any(after[i] < needed[i] for i in range(1, len(needed))):
            continue
        labels.append(label)
        colors.append(color)
        window[mask] = len(labels)
        paint[len(labels)] = np.clip(np.add(_RGB[color], tint), 0, 255)
        visible = after
        visible[len(labels)] = area
        needed.append(max(MIN_VISIBLE * area, MIN_PIXELS))
    painted = ids > 0
    image[painted] = np.take(paint, ids[painted], axis=0)
    return labels, colors, ids


def _stamp(
    label: int, extent: tuple[int, int], center: tuple[float, float], radius: float, angle: float
) -> npt.NDArray[np.bool_]:
    """(height, width) mask of one shape; `extent` is (width, height)."""
    stamp = Image.new("L", extent)
    pen = ImageDraw.Draw(stamp)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) * radius
    for outline, fill in _OUTLINES[label]:
        pen.polygon((outline @ turn + center).ravel().tolist(), fill=fill)
    return np.asarray(stamp, bool)


def _light_and_noise(rng: np.random.Generator, image: Pixels) -> Pixels:
    size = len(image)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    level, slope_x, slope_y = rng.uniform([0.8, -0.18, -0.18], [1.15, 0.18, 0.18]).astype(np.float32)
    light = level + slope_x * axis[None] + slope_y * axis[:, None]
    noise = rng.standard_normal((size, size), np.float32) * np.float32(rng.uniform(1, 12))
    out: npt.NDArray[np.float32] = image * light[..., None]
    # one grey noise field, shifted for each channel: a third of the random numbers, still not grey
    for channel, shift in enumerate((0, 37, 101)):
        out[..., channel] += np.roll(noise, shift, (0, 1))
    return np.clip(out, 0, 255).astype(np.uint8)


def _circle(radius: float = 1.0, x: float = 0.0, corners: int = 48) -> Corners:
    turn = np.arange(corners) * (math.tau / corners)
    return np.stack([np.cos(turn) * radius + x, np.sin(turn) * radius], 1)


def _star() -> Corners:
    points = _circle(corners=10)
    points[1::2] *= 0.45
    return points


def _cross() -> Corners:
    far, near = 0.95, 0.31
    arm = np.array([[far, -near], [far, near], [near, near]])
    quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, i) for i in range(4)])


_OUTLINES: tuple[tuple[tuple[Corners, int], ...], ...] = (
    ((_circle(), 255),),
    ((_circle(corners=4), 255),),
    ((_circle(corners=3), 255),),
    ((_star(), 255),),
    ((_circle(), 255), (_circle(0.55), 0)),
    ((_cross(), 255),),
    ((_circle(corners=6), 255),),
    ((_circle(), 255), (_circle(0.8, x=0.45), 0)),
)
"""Outlines of each label in the unit circle, painted one after the other, with 255 inside or 0 for a hole."""
