"""Reductions, and sums along an axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule
from bitalloy.adjoint.rules.elementwise import mask, scalar, select
from bitalloy.adjoint.rules.shape import data, dense, integers
from bitalloy.model.read import attribute, static_shape


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
    hits = mask(p, p.op("Equal", x, best), x)
    if axes := _axes(node):
        count = p.op("ReduceSum", hits, p.const(axes), keepdims=1, shape=static_shape(best))
        hits = p.like("Div", hits, count)
    return _reduce_scaled(ctx, node, cots, hits)


def _global_max_pool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x, best, p = data(node), node.outputs[0], ctx.p
    hits = mask(p, p.op("Equal", x, best), x)
    axes = p.const(list(range(2, len(static_shape(x)))))
    share = p.like("Div", hits, p.op("ReduceSum", hits, axes, keepdims=1, shape=static_shape(best)))
    return [Cotangent(ctx.r.op("Mul", dense(ctx, cots), ctx.residual(share)))]


def _with_kept(ctx: Context, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x, axes = data(node), _axes(node)
    kept = [1 if i in axes else d for i, d in enumerate(static_shape(x))]
    return x, ctx.p.op("Reshape", node.outputs[0], ctx.p.const(kept), shape=kept)


def _reduce_sum_square(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x = data(node)
    return _reduce_scaled(ctx, node, cots, ctx.p.like("Mul", x, scalar(ctx.p, 2.0)))


def _reduce_l1(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return _reduce_scaled(ctx, node, cots, ctx.p.like("Sign", data(node)))


def _reduce_log_sum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Derivative 1 / sum(x) = exp(-y)."""
    grad, _ = _kept(ctx, node, cots, _axes(node))
    _, y = _with_kept(ctx, node)
    slope = ctx.residual(ctx.p.like("Exp", ctx.p.like("Neg", y)))
    return [_spread(ctx, node, ctx.r.op("Mul", grad, slope), 1.0), None]


def _reduce_log_sum_exp(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """exp(x - y): the softmax."""
    x, y = _with_kept(ctx, node)
    return _reduce_scaled(ctx, node, cots, ctx.p.like("Exp", ctx.p.like("Sub", x, y)))


def _reduce_prod(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The product of the other elements: without its zeros, and 0 where another zero remains."""
    x, y = _with_kept(ctx, node)
    p, axes, shape, kept = ctx.p, _axes(node), static_shape(data(node)), static_shape(y)
    is_zero = p.op("Equal", x, scalar(p, 0.0))
    zeros = mask(p, is_zero, x)
    filled = p.like("Add", x, zeros)
    same = {k: attribute(node, k, None) for k in node.attributes if k != "keepdims"}
    product = p.op("ReduceProd", filled, *node.inputs[1:], keepdims=1, shape=kept, **same)  # type: ignore[arg-type]
    count = p.op("ReduceSum", zeros, p.const(axes), keepdims=1, shape=kept) if axes else zeros
    others = p.op("Sub", count, zeros, shape=shape)  # zeros among the other elements
    slope = p.op("Div", product, filled, shape=shape)
    return _reduce_scaled(
        ctx, node, cots, select(p, p.op("Equal", others, scalar(p, 0.0)), slope, scalar(p, 0.0), slope)
    )


def _cum_sum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The sum of the gradients of all later elements: the same operator from the other end."""
    (axis,) = integers(node, 1) or (0,)
    turned = 1 - int(attribute(node, "reverse", 0))  # type: ignore[call-overload]
    exclusive = int(attribute(node, "exclusive", 0))  # type: ignore[call-overload]
    place = ctx.r.const(np.array(axis % len(static_shape(data(node))) + 1, np.int64))
    return [Cotangent(ctx.r.op("CumSum", dense(ctx, cots), place, reverse=turned, exclusive=exclusive)), None]


REDUCTION_RULES: dict[str, Rule] = {
    "CumSum": _cum_sum,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "ReduceL1": _reduce_l1,
    "ReduceL2": _reduce_l2,
    "ReduceLogSum": _reduce_log_sum,
    "ReduceLogSumExp": _reduce_log_sum_exp,
    "ReduceMax": _reduce_extremum,
    "ReduceMean": _reduce_mean,
    "ReduceMin": _reduce_extremum,
    "ReduceProd": _reduce_prod,
    "ReduceSum": _reduce_sum,
    "ReduceSumSquare": _reduce_sum_square,
}
