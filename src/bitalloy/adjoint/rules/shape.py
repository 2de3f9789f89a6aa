"""Operators that move, repeat or select elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.elementwise import single
from bitalloy.model.read import attribute, constant, static_shape


def dense(ctx: Context, cots: Cots) -> ir.Value:
    """Return the gradient (P, *shape) of a node's first output."""
    return ctx.dense(single(cots))


def data(node: ir.Node, slot: int = 0) -> ir.Value:
    """Return the input `slot` of a node, which must have it."""
    value = node.inputs[slot]
    assert value is not None
    return value


def integers(node: ir.Node, slot: int) -> tuple[int, ...] | None:
    """Return a constant integer input as a tuple, or None where the node does not have it."""
    if slot >= len(node.inputs) or node.inputs[slot] is None:
        return None
    array = constant(node.inputs[slot])
    if array is None:
        raise unsupported(node, f"computes its input {slot} at run time")
    return tuple(int(x) for x in array.reshape(-1))


def scatter_add(ctx: Context, grad: ir.Value, shape: tuple[int, ...], axis: int, index: np.ndarray) -> ir.Value:
    """Return zeros (P, *shape) with `grad` (P, ..., len(index), ...) added at `index` along `axis`."""
    lined = index.reshape(-1, *[1] * (len(shape) - axis - 1)).astype(np.int64)
    expanded = ctx.r.op("Expand", ctx.r.const(lined), ctx.r.op("Shape", grad))
    return ctx.r.op("ScatterElements", ctx.zeros(shape), expanded, grad, axis=axis + 1, reduction="add")


def _reshape(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return [Cotangent(ctx.reshape(dense(ctx, cots), static_shape(data(node))))]


def _transpose(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    rank = len(static_shape(data(node)))
    perm: Sequence[int] = attribute(node, "perm", tuple(reversed(range(rank))))  # type: ignore[assignment]
    inverse = [0, *(int(i) + 1 for i in np.argsort(perm))]
    return [Cotangent(ctx.r.op("Transpose", dense(ctx, cots), perm=inverse))]


def _concat(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    shapes = [static_shape(data(node, s)) for s in range(len(node.inputs))]
    axis = int(attribute(node, "axis", 0)) % len(shapes[0])  # type: ignore[call-overload]
    grad = dense(ctx, cots)
    sizes = ctx.r.const([s[axis] for s in shapes])
    parts = ctx.r.op_multi("Split", grad, sizes, outputs=len(shapes), axis=axis + 1)
    return [Cotangent(part) for part in parts]


def _split(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    shape = static_shape(data(node))
    axis = int(attribute(node, "axis", 0)) % len(shape)  # type: ignore[call-overload]
    parts = []
    for value, cot in zip(node.outputs, cots, strict=True):
        size = list(static_shape(value))
        parts.append(ctx.zeros(size) if cot is None else ctx.dense(cot))
    return [Cotangent(ctx.r.op("Concat", *parts, axis=axis + 1))]


def _slice(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: one axis, step 1: a window. Case 2: anything else: scatter along each axis in turn."""
    shape = static_shape(data(node))
    starts, ends = integers(node, 1) or (), integers(node, 2) or ()
    axes = [a % len(shape) for a in integers(node, 3) or range(len(starts))]
    steps = integers(node, 4) or (1,) * len(starts)
    index = {a: np.arange(shape[a])[slice_of(s, e, t)] for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}
    index = {a: i for a, i in index.items() if not np.array_equal(i, np.arange(shape[a]))}
    cot = single(cots)
    if not index:
        return [cot]
    if len(index) == 1:
        ((axis, chosen),) = index.items()
        if chosen.size and np.array_equal(chosen, np.arange(chosen[0], chosen[0] + chosen.size)):
            return [Cotangent(cot.base, cot.diagonal, (axis, int(chosen[0]), int(chosen[-1]) + 1))]
    grad, current = ctx.dense(cot), list(static_shape(node.outputs[0]))
    for axis, chosen in index.items():
        current[axis] = shape[axis]
        grad = scatter_add(ctx, grad, tuple(current), axis, chosen)
    return [Cotangent(grad)]


def slice_of(start: int, end: int, step: int) -> slice:
    """Convert an ONNX slice to Python's: with a negative step, an end before the first element becomes `None`."""
    return slice(start, None if step < 0 and end < -(1 << 30) else end, step)


def _expand(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    shape, to = static_shape(node.outputs[0]), static_shape(data(node))
    return [Cotangent(ctx.unbroadcast(dense(ctx, cots), shape, to)), None]


def _tile(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    shape, repeats = static_shape(data(node)), integers(node, 1) or ()
    split = [n for r, s in zip(repeats, shape, strict=True) for n in (r, s)]
    grad = ctx.reshape(dense(ctx, cots), split)
    axes = [1 + 2 * i for i in range(len(shape))]
    return [Cotangent(ctx.r.op("ReduceSum", grad, ctx.r.const(axes), keepdims=0)), None]


def _depth_to_space(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    n, c, h, w = static_shape(data(node))
    b = int(attribute(node, "blocksize", 1))  # type: ignore[call-overload]
    grad = ctx.reshape(dense(ctx, cots), (n, c // (b * b), h, b, w, b))
    # output axes (P, n, C, h, b1, w, b2); the input holds (b1, b2, C) in DCR mode, (C, b1, b2) in CRD mode
    perm = [0, 1, 4, 6, 2, 3, 5] if attribute(node, "mode", "DCR") == "DCR" else [0, 1, 2, 4, 6, 3, 5]
    return [Cotangent(ctx.reshape(ctx.r.op("Transpose", grad, perm=perm), (n, c, h, w)))]


def _space_to_depth(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    n, c, h, w = static_shape(data(node))
    b = int(attribute(node, "blocksize", 1))  # type: ignore[call-overload]
    grad = ctx.reshape(dense(ctx, cots), (n, b, b, c, h // b, w // b))
    return [Cotangent(ctx.reshape(ctx.r.op("Transpose", grad, perm=[0, 1, 4, 5, 2, 6, 3]), (n, c, h, w)))]


def _trilu(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The same half of the gradient."""
    (k,) = integers(node, 1) or (0,)
    upper = int(attribute(node, "upper", 1))  # type: ignore[call-overload]
    return [Cotangent(ctx.r.op("Trilu", dense(ctx, cots), ctx.r.const(np.array(k, np.int64)), upper=upper)), None]


SHAPE_RULES: dict[str, Rule] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _reshape,
}
