"""Operators that read an image between its pixels, at places that may be computed.

Every result is a weighted sum of the pixels around a place. Which pixels these are, and their weights, is computed in
the primal graph; the reverse graph adds the gradient to these pixels, and weighs it by the slope of the image for the
gradient of the places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.elementwise import between, number, one_minus, scalar, select
from bitalloy.adjoint.rules.linear import geometry
from bitalloy.adjoint.rules.shape import data, dense, integers
from bitalloy.model.read import attribute, constant, static_shape
from bitalloy.runtime.ort import evaluate_node

CUBIC = -0.75
"""Parameter of cubic interpolation in ONNX."""


@dataclass(frozen=True)
class Tap1D:
    """One of the pixels along one axis that a place reads; of every tensor, one element for each place."""

    pixel: ir.Value
    """Its number, int64, always inside the image."""
    weight: ir.Value
    slope: ir.Value | None
    """Derivative of the weight by the place; None where it is zero."""


Padding = Callable[[Builder, ir.Value, int], tuple[ir.Value, ir.Value | None]]
"""Function (builder, whole numbers of pixels, size) -> pixels inside the image, and what to multiply weights by."""


def taps_along(p: Builder, place: ir.Value, size: int, mode: str, padding: Padding) -> list[Tap1D]:
    """Return the pixels that places along one axis read.

    Args:
        p: builder of the primal graph.
        place: coordinates, in pixels.
        size: of the image along this axis.
        mode: `nearest`, `linear` or `cubic`.
        padding: what is read outside of the image.
    """
    if mode == "nearest":
        return [_tap(p, p.like("Round", place), (None, None), size, padding)]
    low = p.like("Floor", place)
    x = p.like("Sub", place, low)
    weights = _linear(p, x) if mode == "linear" else _cubic(p, x)
    first = 0 if mode == "linear" else -1
    return [
        _tap(p, p.like("Add", low, scalar(p, float(first + k))), weight, size, padding)
        for k, weight in enumerate(weights)
    ]


def _tap(
    p: Builder, pixel: ir.Value, weight: tuple[ir.Value | None, ir.Value | None], size: int, padding: Padding
) -> Tap1D:
    inside, factor = padding(p, pixel, size)
    scaled = [w if factor is None or w is None else p.mul(w, factor) for w in weight]
    ones = factor or p.op("Expand", scalar(p, 1.0), p.const(static_shape(pixel)), shape=static_shape(pixel))
    return Tap1D(p.like("Cast", inside, to=int(ir.DataType.INT64)), scaled[0] or ones, scaled[1])


def _linear(p: Builder, x: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    one = p.op("Expand", scalar(p, 1.0), p.const(static_shape(x)), shape=static_shape(x))
    return [(one_minus(p, x), p.like("Neg", one)), (x, one)]


def _cubic(p: Builder, x: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Weights of the pixels at -1, 0, 1 and 2, and their derivatives, for x between 0 and 1."""
    near = np.array([CUBIC + 2, -(CUBIC + 3), 0, 1])
    far = CUBIC * np.array([1, -5, 8, -4])
    back = one_minus(p, x)
    found = []
    for polynomial, distance, sign in (
        (far, p.like("Add", x, scalar(p, 1.0)), 1.0),
        (near, x, 1.0),
        (near, back, -1.0),
        (far, p.like("Add", back, scalar(p, 1.0)), -1.0),
    ):
        slope = np.polyder(polynomial) * sign
        found.append((_polynomial(p, polynomial, distance), _polynomial(p, slope, distance)))
    return found


def _polynomial(p: Builder, numbers: np.ndarray, x: ir.Value) -> ir.Value:
    """Value of a polynomial whose factors are given from the highest power on."""
    total = p.like("Mul", x, scalar(p, float(numbers[0])))
    for factor in numbers[1:-1]:
        total = p.mul(p.like("Add", total, scalar(p, float(factor))), x)
    return p.like("Add", total, scalar(p, float(numbers[-1])))


def zeros_outside(p: Builder, pixel: ir.Value, size: int) -> tuple[ir.Value, ir.Value | None]:
    """Read zeros outside of the image."""
    ends = scalar(p, 0.0), scalar(p, float(size - 1))
    return p.like("Clip", pixel, *ends), between(p, pixel, *ends)


def _border(p: Builder, pixel: ir.Value, size: int) -> tuple[ir.Value, ir.Value | None]:
    return p.like("Clip", pixel, scalar(p, 0.0), scalar(p, float(size - 1))), None


def _reflected(align: bool) -> Padding:
    """Turn back at the centres of the outer pixels, or at their edges."""

    def padding(p: Builder, pixel: ir.Value, size: int) -> tuple[ir.Value, ir.Value | None]:
        low, width = (0.0, float(size - 1)) if align else (-0.5, float(size))
        if not width:
            return _border(p, pixel, size)
        away = p.like("Abs", p.like("Sub", pixel, scalar(p, low)))
        turns = p.like("Floor", p.like("Div", away, scalar(p, width)))
        rest = p.like("Sub", away, p.like("Mul", turns, scalar(p, width)))
        half = p.like("Mul", turns, scalar(p, 0.5))
        odd = p.op("Greater", p.like("Sub", half, p.like("Floor", half)), scalar(p, 0.25))
        there = p.like("Add", rest, scalar(p, low))
        back = p.op("Sub", scalar(p, low + width), rest, shape=static_shape(rest))
        return select(p, odd, back, there, pixel), None

    return padding


def sampled(
    ctx: Context, image: ir.Value, axes: Sequence[Sequence[Tap1D]], grad: ir.Value, *, places: bool
) -> tuple[ir.Value, list[ir.Value]]:
    """Carry the gradient of what places read back to the image and to the places.

    Args:
        ctx: the builders.
        image: the image (N, C, *sizes), in the primal graph.
        axes: for each spatial axis, what places (N, places) read along it.
        grad: gradient (P, N, C, places).
        places: whether the gradient of the places is wanted.

    Returns:
        The gradient of the image (P, N, C, product of sizes); that of the places along each axis (P, N, places).
    """
    p, (n, c, *sizes) = ctx.p, static_shape(image)
    count = static_shape(axes[0][0].pixel)[1]
    corners = list(itertools.product(*axes))
    pixels, weights = [], []
    for corner in corners:
        line, weight = corner[0].pixel, corner[0].weight
        for tap, size in zip(corner[1:], sizes[1:], strict=True):
            line = p.like("Add", p.like("Mul", line, p.const(np.array(size, np.int64))), tap.pixel)
            weight = p.mul(weight, tap.weight)
        pixels.append(line)
        weights.append(weight)
    index = _stacked(p, pixels)  # (N, 1, corners, places)
    spread = ctx.r.op("Mul", ctx.r.op("Unsqueeze", grad, ctx.r.const([3])), ctx.residual(_stacked(p, weights)))
    lined = ctx.reshape(spread, (n, c, len(corners) * count))
    flat = p.op("Reshape", index, p.const([n, 1, -1]), shape=(n, 1, len(corners) * count))
    everywhere = ctx.r.op("Expand", ctx.residual(flat), ctx.r.op("Shape", lined))
    empty = ctx.zeros((n, c, int(np.prod(sizes))))
    total = ctx.r.op("ScatterElements", empty, everywhere, lined, axis=3, reduction="add")
    if not places:
        return total, []
    pixel = p.op("Reshape", image, p.const([n, c, -1]), shape=(n, c, int(np.prod(sizes))))
    full = p.op("Expand", flat, p.const([n, c, len(corners) * count]), shape=(n, c, len(corners) * count))
    read = p.op("GatherElements", pixel, full, axis=2, shape=static_shape(full))
    shape = (n, c, len(corners), count)
    read = p.op("Reshape", read, p.const(shape), shape=shape)
    return total, [_by_place(ctx, grad, read, corners, axis) for axis in range(len(axes))]


def _by_place(ctx: Context, grad: ir.Value, read: ir.Value, corners: Sequence[Sequence[Tap1D]], axis: int) -> ir.Value:
    """Gradient (P, N, places) of the places along one axis, from the pixels (N, C, corners, places) that were read."""
    p, (n, c, _, count) = ctx.p, static_shape(read)
    slopes = []
    for corner in corners:
        slope = corner[axis].slope
        if slope is None:
            return ctx.zeros((n, count))
        for other, tap in enumerate(corner):
            slope = slope if other == axis else p.mul(slope, tap.weight)
        slopes.append(slope)
    rises = p.mul(read, _stacked(p, slopes))
    rise = ctx.residual(p.op("ReduceSum", rises, p.const([2]), keepdims=0, shape=(n, c, count)))
    return ctx.r.op("ReduceSum", ctx.r.op("Mul", grad, rise), ctx.r.const([2]), keepdims=0)


def _stacked(p: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    """Tensors (N, places) as one, (N, 1, parts, places)."""
    n, count = static_shape(parts[0])
    lined = [p.op("Reshape", part, p.const([n, 1, 1, count]), shape=(n, 1, 1, count)) for part in parts]
    return lined[0] if len(lined) == 1 else p.op("Concat", *lined, axis=2, shape=(n, 1, len(parts), count))


def _grid_sample(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Places are given from -1 to 1, the last axis of the image first."""
    p, image, grid = ctx.p, data(node), data(node, 1)
    n, c, *sizes = static_shape(image)
    out = static_shape(grid)[1:-1]
    count, align = int(np.prod(out)), bool(attribute(node, "align_corners", 0))
    given = str(attribute(node, "mode", "linear"))
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(given, given)
    paddings: dict[object, Padding] = {"border": _border, "reflection": _reflected(align)}
    padding = paddings.get(attribute(node, "padding_mode", "zeros"), zeros_outside)
    axes, scales = [], []
    for axis, size in enumerate(sizes):
        place = p.op("Gather", grid, p.const(np.array(len(sizes) - 1 - axis)), axis=-1, shape=static_shape(grid)[:-1])
        place = p.op("Reshape", place, p.const([n, count]), shape=(n, count))
        scale, shift = ((size - 1) / 2, (size - 1) / 2) if align else (size / 2, (size - 1) / 2)
        place = p.like("Add", p.like("Mul", place, scalar(p, scale)), scalar(p, shift))
        axes.append(taps_along(p, place, size, mode, padding))
        scales.append(scale)
    grad = ctx.reshape(dense(ctx, cots), (n, c, count))
    by_image, by_place = sampled(ctx, image, axes, grad, places=ctx.wants(grid))
    result: list[Cotangent | None] = [Cotangent(ctx.reshape(by_image, static_shape(image))), None]
    if by_place:
        lined = [
            ctx.r.op("Mul", ctx.reshape(g, (n, *out, 1)), ctx.r.const(s)) for g, s in zip(by_place, scales, strict=True)
        ]
        result[1] = Cotangent(ctx.r.op("Concat", *reversed(lined), axis=-1))
    return result


def _deform_conv(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """A convolution of what is read at moved places, times a mask: every group of channels has places of its own."""
    p, image, weight, moves = ctx.p, data(node), data(node, 1), data(node, 2)
    mask = node.inputs[4] if len(node.inputs) > 4 else None
    if any(ctx.wants(v) for v in node.inputs[1:4:2]):
        raise unsupported(node, "computes its weights or its bias at run time")
    n, c, *sizes = static_shape(image)
    outputs, _, *kernel = static_shape(weight)
    out = static_shape(node.outputs[0])[2:]
    groups, apart = (int(attribute(node, name, 1)) for name in ("group", "offset_group"))  # type: ignore[call-overload]
    taps, area = int(np.prod(kernel)), int(np.prod(out))
    rows, each, count = n * apart, c // apart, taps * area
    shape = (rows, taps, len(sizes), area)
    moved = p.op("Reshape", moves, p.const(list(shape)), shape=shape)
    places = []
    for axis, base in enumerate(_unmoved(node, sizes, out, kernel)):
        along = p.op("Gather", moved, p.const(np.array(axis)), axis=2, shape=(rows, taps, area))
        along = p.op("Reshape", along, p.const([rows, count]), shape=(rows, count))
        places.append(p.like("Add", along, p.const(base.reshape(1, count).astype(np.float32))))
    shape = (rows, each, *sizes)
    parts = p.op("Reshape", image, p.const(list(shape)), shape=shape)
    made, depth = outputs // groups, c // groups * taps
    matrix = p.op("Reshape", weight, p.const([groups, made, depth]), shape=(groups, made, depth))
    turned = p.op("Transpose", matrix, perm=[0, 2, 1], shape=(groups, depth, made))
    grad = ctx.reshape(dense(ctx, cots), (n, groups, made, area))
    read = ctx.reshape(ctx.r.op("MatMul", ctx.residual(turned), grad), (rows, each, count))
    result: list[Cotangent | None] = [None] * len(node.inputs)
    weighed = read
    if mask is not None:
        lined = p.op("Reshape", mask, p.const([rows, 1, count]), shape=(rows, 1, count))
        weighed = ctx.r.op("Mul", read, ctx.residual(lined))
    axes = [taps_along(p, place, size, "linear", zeros_outside) for place, size in zip(places, sizes, strict=True)]
    by_image, by_place = sampled(ctx, parts, axes, weighed, places=ctx.wants(moves))
    result[0] = Cotangent(ctx.reshape(by_image, static_shape(image)))
    if by_place:
        split = [ctx.reshape(g, (rows, taps, 1, area)) for g in by_place]
        result[2] = Cotangent(ctx.reshape(ctx.r.op("Concat", *split, axis=3), static_shape(moves)))
    if mask is not None and ctx.wants(mask):
        values = ctx.residual(_read_at(p, parts, places))
        by_mask = ctx.r.op("ReduceSum", ctx.r.op("Mul", read, values), ctx.r.const([2]), keepdims=0)
        result[4] = Cotangent(ctx.reshape(by_mask, static_shape(mask)))
    return result


def _unmoved(node: ir.Node, sizes: Sequence[int], out: Sequence[int], kernel: Sequence[int]) -> list[np.ndarray]:
    """Places (taps, results) that a convolution reads along each axis."""
    strides, dilations, before, _ = geometry(node, sizes, out, kernel)
    window = np.indices(kernel).reshape(len(kernel), -1)
    result = np.indices(out).reshape(len(out), -1)
    return [
        (window[axis] * dilations[axis] - before[axis])[:, None] + (result[axis] * strides[axis])[None]
        for axis in range(len(sizes))
    ]


def _read_at(p: Builder, image: ir.Value, places: Sequence[ir.Value]) -> ir.Value:
    """What an image (N, C, rows, columns) holds at places (N, places) in pixels, as (N, C, places); zeros outside."""
    n, c, *sizes = static_shape(image)
    count = static_shape(places[0])[1]
    # pixels become numbers from -1 to 1 between the edges of the image
    scaled = [
        p.like("Sub", p.like("Mul", place, scalar(p, 2 / size)), scalar(p, 1 - 1 / size))
        for place, size in zip(places, sizes, strict=True)
    ]
    lined = [p.op("Reshape", v, p.const([n, count, 1, 1]), shape=(n, count, 1, 1)) for v in reversed(scaled)]
    grid = p.op("Concat", *lined, axis=3, shape=(n, count, 1, len(sizes)))
    read = p.op("GridSample", image, grid, padding_mode="zeros", shape=(n, c, count, 1))
    return p.op("Reshape", read, p.const([n, c, count]), shape=(n, c, count))


def _affine_grid(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Every place is the product of a matrix and the place without it, which the operator gives for unit matrices."""
    theta, size = data(node), integers(node, 1)
    assert size is not None, "the operator asks for it"
    rows = len(size) - 2
    unit = np.eye(rows, rows + 1, dtype=np.float32)[None]
    shape = np.array([1, *size[1:]], np.int64)
    attributes = {"align_corners": attribute(node, "align_corners", 0)}
    flat = evaluate_node("AffineGrid", [unit, shape], attributes, opset=ctx.opset)[0].reshape(-1, rows)
    places = np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)
    grad = ctx.reshape(dense(ctx, cots), (static_shape(theta)[0], len(flat), rows))
    turned = ctx.r.op("Transpose", grad, perm=[0, 1, 3, 2])
    return [Cotangent(ctx.r.op("MatMul", turned, ctx.r.const(places))), None]


def _roi_align(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Every result is a row of weights times the image times a column of weights, which follow from the region."""
    p, batches = ctx.p, data(node, 2)
    if attribute(node, "mode", "avg") != "avg":
        raise unsupported(node, "takes the largest sample, and the adjoint rule covers mode 'avg'")
    n, c, height, width = static_shape(data(node))
    count, _, rows, columns = static_shape(node.outputs[0])
    by_row = _bins(ctx, node, 1, rows, height)
    by_column = _bins(ctx, node, 0, columns, width)
    lined = p.op("Reshape", by_column, p.const([count, 1, columns, width]), shape=(count, 1, columns, width))
    wide = ctx.r.op("MatMul", dense(ctx, cots), ctx.residual(lined))  # (P, regions, C, rows, width)
    side = ctx.reshape(ctx.r.op("Transpose", wide, perm=[0, 2, 1, 3, 4]), (1, c, count * rows, width))
    tall = p.op("Reshape", by_row, p.const([count * rows, height]), shape=(count * rows, height))
    tall = p.op("Transpose", tall, perm=[1, 0], shape=(height, count * rows))
    own = p.op("Reshape", batches, p.const([1, 1, 1, count, 1]), shape=(1, 1, 1, count, 1))
    own = p.op("Equal", own, p.const(np.arange(n).reshape(n, 1, 1, 1, 1)), shape=(n, 1, 1, count, 1))
    own = p.op("Cast", own, to=int(ir.DataType.FLOAT), shape=(n, 1, 1, count, 1))
    own = p.op("Expand", own, p.const([n, 1, 1, count, rows]), shape=(n, 1, 1, count, rows))
    own = p.op("Reshape", own, p.const([n, 1, 1, count * rows]), shape=(n, 1, 1, count * rows))
    result = ctx.r.op("MatMul", ctx.residual(p.mul(tall, own)), side)
    return [Cotangent(ctx.reshape(result, (n, c, height, width))), None, None]


def _bins(ctx: Context, node: ir.Node, axis: int, count: int, size: int) -> ir.Value:
    """Weights (regions, bins, pixels) along one axis: the mean of samples, each of which lies between two pixels."""
    p, regions, given = ctx.p, data(node, 1), int(attribute(node, "sampling_ratio", 0))  # type: ignore[call-overload]
    scale = number(node, "spatial_scale", 1.0)
    half = ctx.opset >= 16 and attribute(node, "coordinate_transformation_mode", "half_pixel") == "half_pixel"
    shape = (static_shape(regions)[0], 1, 1)
    ends = []
    for column in (axis, axis + 2):
        side = p.op("Gather", regions, p.const(np.array(column)), axis=1, shape=shape[:1])
        side = p.op("Reshape", side, p.const(list(shape)), shape=shape)
        shifted = p.like("Sub", p.like("Mul", side, scalar(p, scale)), scalar(p, 0.5 if half else 0.0))
        ends.append(shifted)
    length = p.like("Sub", ends[1], ends[0])
    length = length if half else p.like("Max", length, scalar(p, 1.0))
    samples: ir.Value = scalar(p, float(given))
    if not given:
        known = constant(regions)
        if known is None:
            raise unsupported(node, "chooses by computed regions how many samples it takes")
        sides = np.maximum((known[:, axis + 2] - known[:, axis]) * scale, 0.0 if half else 1.0) / count
        given = max(1, int(np.ceil(sides).max()))
        samples = p.like("Max", p.like("Ceil", p.like("Div", length, scalar(p, float(count)))), scalar(p, 1.0))
    step = p.like("Div", length, scalar(p, float(count)))
    bins, each = np.arange(count, dtype=np.float32).reshape(1, -1, 1), np.arange(given, dtype=np.float32) + 0.5
    inside = p.op("Div", p.const(each.reshape(1, 1, -1)), samples, shape=(shape[0], 1, given))
    at = p.add(ends[0], p.mul(p.add(p.const(bins), inside), step))  # (regions, bins, samples)
    taken = p.mul(between(p, at, scalar(p, -1.0), scalar(p, float(size))), between(p, inside, None, scalar(p, 1.0)))
    weight = p.op("Div", taken, samples, shape=static_shape(at))
    full = (*static_shape(at), 1)
    clipped = p.like("Clip", at, scalar(p, 0.0), scalar(p, float(size - 1)))
    lined, weights = (p.op("Reshape", v, p.const(list(full)), shape=full) for v in (clipped, weight))
    pixels = p.const(np.arange(size, dtype=np.float32))
    away = p.op("Abs", p.op("Sub", lined, pixels, shape=(*full[:3], size)), shape=(*full[:3], size))
    near = p.like("Max", one_minus(p, away), scalar(p, 0.0))
    return p.op("ReduceSum", p.mul(near, weights), p.const([2]), keepdims=0, shape=(shape[0], count, size))


SAMPLING_RULES: dict[str, Rule] = {
    "AffineGrid": _affine_grid,
    "DeformConv": _deform_conv,
    "GridSample": _grid_sample,
    "RoiAlign": _roi_align,
}
