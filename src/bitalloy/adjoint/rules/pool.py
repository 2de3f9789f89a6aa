"""Pooling, resizing and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.elementwise import scalar, select, single
from bitalloy.adjoint.rules.linear import geometry
from bitalloy.adjoint.rules.shape import data, dense, integers
from bitalloy.model.read import attribute, constant, static_shape
from bitalloy.runtime.ort import evaluate_node

_GATHERED = 3
"""Times that reflecting or wrapping by less than the length repeats a number at most."""
_WHOLE = 1 << 24
"""Largest whole number up to which float32 holds all of them."""
_LARGEST = 1 << 26
"""Numbers of a matrix that is made for one axis."""


@dataclass(frozen=True)
class Window:
    """How a pool slides over space."""

    size: Sequence[int]
    """Spatial size of the input."""
    out: Sequence[int]
    """Spatial size of the output."""
    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    before: Sequence[int]
    """Padding in front of the input, per axis."""

    @classmethod
    def of(cls, node: ir.Node, kernel: Sequence[int]) -> Window:
        """Return the window of a node, with `auto_pad` resolved."""
        size, out = static_shape(data(node))[2:], static_shape(node.outputs[0])[2:]
        strides, dilations, before, _ = geometry(node, size, out, kernel)
        return cls(size, out, kernel, strides, dilations, before)

    @property
    def ends(self) -> list[int]:
        """Where the last window ends, counted from the padding's start."""
        along = zip(self.out, self.strides, self.kernel, self.dilations, strict=True)
        return [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in along]

    @property
    def after(self) -> list[int]:
        """Padding behind the input that the last window reaches."""
        return [max(0, e - n - b) for e, n, b in zip(self.ends, self.size, self.before, strict=True)]


def _max_pool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The gradient goes to the position that MaxPool itself reports as the largest."""
    x, out = data(node), static_shape(node.outputs[0])
    shape = static_shape(x)
    attributes = {k: attribute(node, k, None) for k in node.attributes if k != "storage_order"}
    _, indices = ctx.p.op_multi("MaxPool", x, outputs=2, shape=out, **attributes)  # type: ignore[arg-type]
    indices.shape, indices.type = ir.Shape(out), ir.TensorType(ir.DataType.INT64)
    flat = ctx.p.flat(indices)
    grad = ctx.reshape(dense(ctx, cots), (int(np.prod(out)),))
    index = ctx.r.op("Expand", ctx.residual(flat), ctx.r.op("Shape", grad))
    empty = ctx.zeros((int(np.prod(shape)),))
    summed = ctx.r.op("ScatterElements", empty, index, grad, axis=1, reduction="add")
    return [Cotangent(ctx.reshape(summed, shape))]


def _average_pool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Divide by what each window is divided by, then spread with a ConvTranspose of ones, channel by channel."""
    attributes = {k: attribute(node, k, None) for k in node.attributes}
    window = Window.of(node, [int(k) for k in attributes["kernel_shape"]])  # type: ignore[attr-defined]
    # the pool itself, applied to ones, tells by how much it divides the elements that a window has inside
    ones, taps = (np.ones((1, 1, *sides), np.float32) for sides in (window.size, window.kernel))
    shape = {"strides": window.strides, "dilations": window.dilations, "pads": [*window.before, *window.after]}
    inside = evaluate_node("Conv", [ones, taps], shape)[0]
    mean = evaluate_node("AveragePool", [ones], attributes, opset=ctx.opset)[0]
    factor = np.divide(mean, inside, out=np.zeros_like(mean), where=inside > 0)
    divided = ctx.r.op("Mul", dense(ctx, cots), ctx.r.const(factor))
    return [Cotangent(ctx.reshape(_spread(ctx, divided, window), static_shape(data(node))))]


def _spread(ctx: Context, grad: ir.Value, window: Window) -> ir.Value:
    """Every element of the gradient (P, ..., *out) added to all places (P * ..., 1, *size) of its window."""
    padding = zip(window.size, window.before, window.after, window.ends, strict=True)
    rest = [n + b + a - e for n, b, a, e in padding]
    lined = ctx.r.op("Reshape", grad, ctx.r.const([-1, 1, *window.out]))
    ones = ctx.r.const(np.ones((1, 1, *window.kernel), np.float32))
    return ctx.r.op("ConvTranspose", lined, ones, output_padding=rest, strides=window.strides,
                    dilations=window.dilations, pads=[*window.before, *window.after])  # fmt: skip


def _lp_pool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Result (sum |x|^p)^(1/p) over a window, or over all of space: g * y^(1-p), spread, times |x|^(p-1) * sign(x)."""
    x, y, p = data(node), node.outputs[0], ctx.p
    power, space = int(attribute(node, "p", 2)), static_shape(x)[2:]  # type: ignore[call-overload]
    window = Window.of(node, [int(k) for k in attribute(node, "kernel_shape", space)])  # type: ignore[attr-defined]
    positive = p.op("Greater", y, scalar(p, 0.0))
    outer = select(p, positive, p.like("Pow", y, scalar(p, 1.0 - power)), scalar(p, 0.0), y)
    inner = p.mul(p.like("Pow", p.like("Abs", x), scalar(p, power - 1.0)), p.like("Sign", x))
    spread = _spread(ctx, ctx.dense(ctx.scaled(single(cots), outer)), window)
    return [Cotangent(ctx.r.op("Mul", ctx.reshape(spread, static_shape(x)), ctx.residual(inner)))]


def _separable(ctx: Context, node: ir.Node, cots: Cots, matrices: dict[int, np.ndarray]) -> Cots:
    """Apply the transposed matrix (out, in) of each axis."""
    grad = dense(ctx, cots)
    shape = list(static_shape(node.outputs[0]))
    for axis, matrix in matrices.items():
        rows = int(np.prod(shape[:axis], initial=1))
        columns = int(np.prod(shape[axis + 1 :], initial=1))
        if columns == 1:
            grad = ctx.r.op("MatMul", ctx.reshape(grad, (rows, shape[axis])), ctx.r.const(matrix))
        else:
            grad = ctx.r.op("MatMul", ctx.r.const(matrix.T.copy()), ctx.reshape(grad, (rows, shape[axis], columns)))
        shape[axis] = matrix.shape[1]
    return [Cotangent(ctx.reshape(grad, static_shape(data(node))))]


def _resize(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: nearest, whole factors: sums over blocks. Case 2: any other mode: the matrix of each axis."""
    x, y = static_shape(data(node)), static_shape(node.outputs[0])
    matrices = _resize_matrices(ctx, node, x, y)
    blocks = {a: np.kron(np.eye(x[a], dtype=np.float32), np.ones((y[a] // x[a], 1), np.float32)) for a in matrices}
    if (
        len(x) == 4
        and matrices
        and min(matrices) >= 2
        and all(np.array_equal(m, blocks[a]) for a, m in matrices.items())
    ):
        factors = [y[a] // x[a] for a in (2, 3)]
        merged = ctx.r.op("Reshape", dense(ctx, cots), ctx.r.const([-1, *y[1:]]))
        mean = ctx.r.op("AveragePool", merged, kernel_shape=factors, strides=factors)
        return [Cotangent(ctx.reshape(ctx.r.op("Mul", mean, ctx.r.const(float(np.prod(factors)))), x))]
    return _separable(ctx, node, cots, matrices)


def _resize_matrices(ctx: Context, node: ir.Node, x: Sequence[int], y: Sequence[int]) -> dict[int, np.ndarray]:
    """Axis -> its (out, in) matrix: Resize itself, applied to the rows of an identity, for the axes it changes.

    Scales, where given, are passed on because they enter the coordinates; an extrapolated value does not
    vary with the input and counts as zero.
    """
    if x == y:
        return {}  # ONNX Runtime copies, whatever the scales and the region say
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise unsupported(node, "has no adjoint rule for keep_aspect_ratio_policy")
    slots = [*node.inputs[1:], None, None, None][:3]
    roi, scales, _ = (None if v is None or 0 in static_shape(v) else _known(node, v) for v in slots)
    rank, empty = len(x), np.zeros(0, np.float32)
    axes = [a % rank for a in attribute(node, "axes", None) or range(rank)]  # type: ignore[attr-defined]
    crop = attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    kept = {k: attribute(node, k, None) for k in node.attributes if k not in ("axes", "extrapolation_value")}
    matrices = {}
    for place, axis in enumerate(axes):
        if x[axis] == y[axis] and (scales is None or scales[place] == 1) and not crop:
            continue
        if x[axis] * max(x[axis], y[axis]) > _LARGEST:
            raise unsupported(node, f"has no adjoint rule for an axis of {x[axis]} to {y[axis]} numbers")
        # a second axis of length 1 is doubled, which keeps the runtime from copying where the size stays
        inputs = [np.eye(x[axis], dtype=np.float32).reshape(x[axis], 1, 1, x[axis]), empty, empty, empty]
        if crop and roi is not None:
            inputs[1] = np.array([0, 0, 0, roi[place], 1, 1, 1, roi[place + len(axes)]], np.float32)
        if scales is not None:
            inputs[2] = np.array([1, 1, 2, scales[place]], np.float32)
        else:
            inputs[3] = np.array([x[axis], 1, 2, y[axis]], np.int64)
        rows = evaluate_node("Resize", inputs, kept, opset=ctx.opset)[0][:, 0, 0]
        matrices[axis] = np.ascontiguousarray(rows.T)
    return matrices


def _known(node: ir.Node, value: ir.Value) -> np.ndarray:
    array = constant(value)
    if array is None:
        raise unsupported(node, f"computes '{value.name}' at run time")
    return array


def _pad(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: constant: crop. Case 2: reflect, edge, wrap: every number gets the sum over the places that repeat it."""
    shape = static_shape(data(node))
    rank = len(shape)
    axes = integers(node, 3) or tuple(range(rank))
    pads = integers(node, 1) or ()
    around = {a % rank: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    mode = str(attribute(node, "mode", "constant"))
    if mode == "constant":
        before, after = [0] * (rank + 1), [0] * (rank + 1)
        for axis, (first, last) in around.items():
            before[axis + 1], after[axis + 1] = -first, -last
        grad = ctx.r.op("Pad", dense(ctx, cots), ctx.r.const(before + after))
        return [Cotangent(grad)]
    grad, sizes = dense(ctx, cots), list(static_shape(node.outputs[0]))
    for axis, (first, last) in around.items():
        if first or last:
            if shape[axis] > _WHOLE:
                raise unsupported(node, f"has no adjoint rule for an axis of {shape[axis]} numbers")
            inputs = [np.arange(shape[axis], dtype=np.float32)[None], np.array([0, first, 0, last])]
            source = evaluate_node("Pad", inputs, {"mode": mode}, opset=ctx.opset)[0][0].astype(np.int64)
            grad = _summed_back(ctx, grad, sizes, axis, (source, shape[axis]))
            sizes[axis] = shape[axis]
    return [Cotangent(ctx.reshape(grad, shape))]


def _summed_back(
    ctx: Context, grad: ir.Value, sizes: Sequence[int], axis: int, taken: tuple[np.ndarray, int]
) -> ir.Value:
    """Adjoint of taking numbers along an axis: each gets the sum of the gradient at all places that took it.

    The first few places of each number are gathered, of all numbers at once. Where one was taken more often, as at an
    edge, a matrix sums its further places; it has a row for such numbers alone.

    Args:
        ctx: where nodes are written.
        grad: gradient of the taken tensor.
        sizes: shape of the taken tensor.
        axis: axis along which was taken.
        taken: index of what was taken, for every place, and the length of the axis that it was taken from.
    """
    source, length = taken
    rows, columns = (int(np.prod(part, initial=1)) for part in (sizes[:axis], sizes[axis + 1 :]))
    ended = ctx.r.op("Pad", ctx.reshape(grad, (rows, sizes[axis], columns)), ctx.r.const([0, 0, 0, 0, 0, 0, 1, 0]))
    order = np.argsort(source, kind="stable")
    numbers, starts = np.unique(source[order], return_index=True)
    turn = np.arange(len(source)) - starts[np.searchsorted(numbers, source[order])]
    parts = []
    for k in range(min(int(turn.max()) + 1, _GATHERED)):
        places = np.full(length, len(source))  # behind the last place there is a zero
        places[source[order][turn == k]] = order[turn == k]
        parts.append(ctx.r.op("Gather", ended, ctx.r.const(places), axis=2))
    rest = order[turn >= _GATHERED]
    if len(rest):
        often = np.unique(source[rest])
        matrix = (source[rest][None] == often[:, None]).astype(np.float32)
        sums = ctx.r.op("MatMul", ctx.r.const(matrix), ctx.r.op("Gather", ended, ctx.r.const(rest), axis=2))
        places = np.full(length, len(often))
        places[often] = np.arange(len(often))
        padded = ctx.r.op("Pad", sums, ctx.r.const([0, 0, 0, 0, 0, 0, 1, 0]))
        parts.append(ctx.r.op("Gather", padded, ctx.r.const(places), axis=2))
    return parts[0] if len(parts) == 1 else ctx.r.op("Sum", *parts)


POOL_RULES: dict[str, Rule] = {
    "AveragePool": _average_pool,
    "GlobalLpPool": _lp_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Resize": _resize,
}
