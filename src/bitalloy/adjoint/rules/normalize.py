"""Softmax, normalisations and reductions: operators that mix the elements of an axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Rule, unsupported
from bitalloy.adjoint.rules.elementwise import single
from bitalloy.adjoint.rules.shape import data, dense, integers
from bitalloy.graph import attribute, constant, static_shape

Cots = Sequence[Cotangent | None]


def _softmax(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Gradient y * g - y * sum(y * g)."""
    y = node.outputs[0]
    axis = int(attribute(node, "axis", -1)) % len(static_shape(y))  # type: ignore[call-overload]
    scaled = ctx.dense(ctx.scaled(single(cots), y))
    total = ctx.r.op("ReduceSum", scaled, ctx.r.const([axis + 1]), keepdims=1)
    return [Cotangent(ctx.r.op("Sub", scaled, ctx.r.op("Mul", total, ctx.residual(y))))]


def _log_softmax(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Gradient g - exp(y) * sum(g)."""
    y = node.outputs[0]
    axis = int(attribute(node, "axis", -1)) % len(static_shape(y))  # type: ignore[call-overload]
    grad = dense(ctx, cots)
    total = ctx.r.op("ReduceSum", grad, ctx.r.const([axis + 1]), keepdims=1)
    return [Cotangent(ctx.r.op("Sub", grad, ctx.r.op("Mul", total, ctx.residual(ctx.p.like("Exp", y)))))]


def _batch_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    scale, variance = constant(node.inputs[1]), constant(node.inputs[4])
    if scale is None or variance is None or attribute(node, "training_mode", 0):
        raise unsupported(node, "is not in inference form with constant statistics")
    factor = scale / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    lined = factor.astype(np.float32).reshape(-1, *[1] * (len(static_shape(data(node))) - 2))
    return [ctx.scaled(single(cots), ctx.p.const(lined)), None, None, None, None]


def _standardized(
    ctx: Context, x: ir.Value, grad: ir.Value, axes: Sequence[int], epsilon: float, *, center: bool = True
) -> ir.Value:
    """Gradient of (x - mean) / sqrt(var + eps) over `axes`: s * (g - mean(g) - z * mean(g * z)), z the result."""
    p, shape = ctx.p, static_shape(x)
    count = float(np.prod([shape[a] for a in axes]))
    small = [1 if i in axes else d for i, d in enumerate(shape)]

    def mean(value: ir.Value) -> ir.Value:
        total = p.op("ReduceSum", value, p.const(list(axes)), keepdims=1, shape=small)
        return p.like("Mul", total, p.const(1 / count))

    centred = p.like("Sub", x, mean(x)) if center else x
    variance = p.like("Add", mean(p.mul(centred, centred)), p.const(epsilon))
    inverse = p.like("Reciprocal", p.like("Sqrt", variance))
    z = ctx.residual(p.mul(centred, inverse))
    inverse = ctx.residual(inverse)
    shifted = ctx.r.const([a + 1 for a in axes])
    weight = ctx.r.const(1 / count)

    def reverse_mean(value: ir.Value) -> ir.Value:
        return ctx.r.op("Mul", ctx.r.op("ReduceSum", value, shifted, keepdims=1), weight)

    result = ctx.r.op("Sub", grad, ctx.r.op("Mul", z, reverse_mean(ctx.r.op("Mul", grad, z))))
    if center:
        result = ctx.r.op("Sub", result, reverse_mean(grad))
    return ctx.r.op("Mul", result, inverse)


def _layer_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x = data(node)
    rank = len(static_shape(x))
    axis = int(attribute(node, "axis", -1)) % rank  # type: ignore[call-overload]
    grad = ctx.dense(ctx.scaled(single(cots), data(node, 1)))
    epsilon = float(attribute(node, "epsilon", 1e-5))  # type: ignore[arg-type]
    return [Cotangent(_standardized(ctx, x, grad, range(axis, rank), epsilon)), None, None]


def _instance_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x, scale = data(node), constant(node.inputs[1])
    if scale is None:
        raise unsupported(node, "computes its scale at run time")
    rank = len(static_shape(x))
    lined = ctx.p.const(scale.reshape(-1, *[1] * (rank - 2)))
    grad = ctx.dense(ctx.scaled(single(cots), lined))
    epsilon = float(attribute(node, "epsilon", 1e-5))  # type: ignore[arg-type]
    return [Cotangent(_standardized(ctx, x, grad, range(2, rank), epsilon)), None, None]


def _axes(node: ir.Node) -> list[int]:
    """Reduced axes, from the attribute (older opsets) or the second input; none given means all."""
    rank = len(static_shape(data(node)))
    given = attribute(node, "axes", None)
    found: Sequence[int] | None = given if given is not None else integers(node, 1)  # type: ignore[assignment]
    if not found:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in found)


def _kept(ctx: Context, node: ir.Node, cots: Cots, axes: Sequence[int]) -> tuple[ir.Value, list[int]]:
    """The gradient (P, *kept) with reduced axes of size 1, and `kept`."""
    shape = static_shape(data(node))
    kept = [1 if i in axes else d for i, d in enumerate(shape)]
    return ctx.reshape(dense(ctx, cots), kept), kept


def _spread(ctx: Context, node: ir.Node, grad: ir.Value, factor: float) -> Cotangent:
    """Broadcast a gradient (P, *kept) over the input's shape, times a number."""
    scaled = grad if factor == 1.0 else ctx.r.op("Mul", grad, ctx.r.const(factor))
    return Cotangent(ctx.r.op("Expand", scaled, ctx.r.const([1, *static_shape(data(node))])))


def _reduce_sum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    grad, _ = _kept(ctx, node, cots, _axes(node))
    return [_spread(ctx, node, grad, 1.0), None]


def _reduce_mean(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    axes = _axes(node)
    grad, _ = _kept(ctx, node, cots, axes)
    count = np.prod([static_shape(data(node))[a] for a in axes]) if axes else 1
    return [_spread(ctx, node, grad, 1.0 / float(count)), None]


def _global_average_pool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return [_spread(ctx, node, dense(ctx, cots), 1.0 / float(np.prod(static_shape(data(node))[2:])))]


def _reduce_scaled(ctx: Context, node: ir.Node, cots: Cots, slope: ir.Value) -> Cots:
    """Reduction whose derivative is a primal value of the input's shape."""
    grad, _ = _kept(ctx, node, cots, _axes(node))
    return [Cotangent(ctx.r.op("Mul", grad, ctx.residual(slope))), None]


def _reduce_l2(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """d||x|| = x / ||x||."""
    x, norm = _with_kept(ctx, node)
    positive = ctx.p.like("Max", norm, ctx.p.const(float(np.finfo(np.float32).tiny)))  # 0 at x = 0, as in torch
    return _reduce_scaled(ctx, node, cots, ctx.p.like("Div", x, positive))


def _reduce_extremum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """ReduceMax, ReduceMin: the elements that attain the result share the gradient."""
    x, best = _with_kept(ctx, node)
    p = ctx.p
    hits = p.op("Cast", p.op("Equal", x, best), to=int(ir.DataType.FLOAT), shape=static_shape(x))
    if axes := _axes(node):
        count = p.op("ReduceSum", hits, p.const(axes), keepdims=1, shape=static_shape(best))
        hits = p.like("Div", hits, count)
    return _reduce_scaled(ctx, node, cots, hits)


def _global_max_pool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x, best, p = data(node), node.outputs[0], ctx.p
    hits = p.op("Cast", p.op("Equal", x, best), to=int(ir.DataType.FLOAT), shape=static_shape(x))
    axes = p.const(list(range(2, len(static_shape(x)))))
    share = p.like("Div", hits, p.op("ReduceSum", hits, axes, keepdims=1, shape=static_shape(best)))
    return [Cotangent(ctx.r.op("Mul", dense(ctx, cots), ctx.residual(share)))]


def _with_kept(ctx: Context, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x, axes = data(node), _axes(node)
    kept = [1 if i in axes else d for i, d in enumerate(static_shape(x))]
    return x, ctx.p.op("Reshape", node.outputs[0], ctx.p.const(kept), shape=kept)


def _reduce_sum_square(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x = data(node)
    return _reduce_scaled(ctx, node, cots, ctx.p.like("Mul", x, ctx.p.const(2.0)))


RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "ReduceL2": _reduce_l2,
    "ReduceMax": _reduce_extremum,
    "ReduceMean": _reduce_mean,
    "ReduceMin": _reduce_extremum,
    "ReduceSum": _reduce_sum,
    "ReduceSumSquare": _reduce_sum_square,
    "Softmax": _softmax,
}
