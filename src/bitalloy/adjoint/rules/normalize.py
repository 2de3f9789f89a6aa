"""Softmax and normalisations: operators that bring the elements of some axes to a common measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.elementwise import number, scalar, select, single
from bitalloy.adjoint.rules.shape import data, dense
from bitalloy.model.read import attribute, constant, consumers, static_shape


def _softmax(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Gradient y * g - y * sum(y * g).

    A row that is masked as a whole comes out as NaN. Exporters put Where behind such a softmax, which stops the
    gradient, but not a factor NaN: it is cleared here.
    """
    y = node.outputs[0]
    if any(c.node.op_type in ("Cast", "IsNaN", "Where") for c in consumers(y)):
        y = select(ctx.p, ctx.p.op("IsNaN", y), scalar(ctx.p, 0.0), y, y)
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


def _layer_normalization(ctx: Context, node: ir.Node, cots: Cots, *, center: bool = True) -> Cots:
    """LayerNormalization, and RMSNormalization, which does not subtract the mean."""
    x = data(node)
    rank = len(static_shape(x))
    axis = int(attribute(node, "axis", -1)) % rank  # type: ignore[call-overload]
    grad = ctx.dense(ctx.scaled(single(cots), data(node, 1)))
    return [Cotangent(_standardized(ctx, x, grad, range(axis, rank), _epsilon(node), center=center)), None, None]


def _rms_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return _layer_normalization(ctx, node, cots, center=False)


def _epsilon(node: ir.Node) -> float:
    return float(attribute(node, "epsilon", 1e-5))  # type: ignore[arg-type]


def _scale(ctx: Context, node: ir.Node) -> ir.Value:
    """The scale per channel in the shape (C, 1, ...), which broadcasts to the input's."""
    scale = constant(node.inputs[1])
    if scale is None:
        raise unsupported(node, "computes its scale at run time")
    return ctx.p.const(scale.reshape(-1, *[1] * (len(static_shape(data(node))) - 2)))


def _instance_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x = data(node)
    grad = ctx.dense(ctx.scaled(single(cots), _scale(ctx, node)))
    axes = range(2, len(static_shape(x)))
    return [Cotangent(_standardized(ctx, x, grad, axes, _epsilon(node))), None, None]


def _group_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x = data(node)
    shape, groups = static_shape(x), int(attribute(node, "num_groups", 1))  # type: ignore[call-overload]
    grouped = (shape[0], groups, int(np.prod(shape[1:])) // groups)
    grad = ctx.dense(ctx.scaled(single(cots), _scale(ctx, node)))
    lined = ctx.p.op("Reshape", x, ctx.p.const(list(grouped)), shape=grouped)
    result = _standardized(ctx, lined, ctx.reshape(grad, grouped), [2], _epsilon(node))
    return [Cotangent(ctx.reshape(result, shape)), None, None]


def _mean_variance_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """(x - mean) / (deviation + 1e-9): the square of that number stands in for epsilon."""
    x = data(node)
    axes: Sequence[int] = attribute(node, "axes", (0, 2, 3))  # type: ignore[assignment]
    return [Cotangent(_standardized(ctx, x, dense(ctx, cots), [a % len(static_shape(x)) for a in axes], 1e-18))]


def _lp_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Divided by a norm n: (g - d * sum(g * y)) / n, with the norm's derivative d, which is y or sign(x)."""
    x, y, p = data(node), node.outputs[0], ctx.p
    shape = static_shape(x)
    axis = int(attribute(node, "axis", -1)) % len(shape)  # type: ignore[call-overload]
    small = [1 if i == axis else d for i, d in enumerate(shape)]
    euclidean = attribute(node, "p", 2) == 2
    powers = p.mul(x, x) if euclidean else p.like("Abs", x)
    norm = p.op("ReduceSum", powers, p.const([axis]), keepdims=1, shape=small)
    norm = p.like("Sqrt", norm) if euclidean else norm
    positive = p.op("Greater", norm, scalar(p, 0.0))  # where all elements are 0, so is the result
    inverse = ctx.residual(select(p, positive, p.like("Reciprocal", norm), scalar(p, 0.0), norm))
    scaled = ctx.dense(ctx.scaled(single(cots), y))
    total = ctx.r.op("ReduceSum", scaled, ctx.r.const([axis + 1]), keepdims=1)
    slope = ctx.residual(y if euclidean else p.like("Sign", x))
    rest = ctx.r.op("Sub", dense(ctx, cots), ctx.r.op("Mul", slope, total))
    return [Cotangent(ctx.r.op("Mul", rest, inverse))]


def _local_response_normalization(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The result is x * s^-beta, s = bias + alpha / size * sum(x^2) over a window of channels.

    The window of channel i reaches from i - (size - 1) // 2 to i + size // 2.
    """
    x, y, p = data(node), node.outputs[0], ctx.p
    n, c, *space = static_shape(x)
    size = int(attribute(node, "size", 1))  # type: ignore[call-overload]
    alpha, beta, bias = (number(node, k, d) for k, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    distance = np.arange(c) - np.arange(c)[:, None]
    window = ((distance >= -((size - 1) // 2)) & (distance <= size // 2)).astype(np.float32)  # (out, in)
    flat = (n, c, int(np.prod(space)))
    lined = p.op("Reshape", x, p.const(list(flat)), shape=flat)
    sums = p.op("MatMul", p.const(window * np.float32(alpha / size)), p.mul(lined, lined), shape=flat)
    base = p.op("Reshape", p.like("Add", sums, scalar(p, bias)), p.const([n, c, *space]), shape=[n, c, *space])
    direct = ctx.dense(ctx.scaled(single(cots), p.like("Pow", base, scalar(p, -beta))))
    inner = ctx.reshape(ctx.dense(ctx.scaled(single(cots), p.like("Div", y, base))), flat)
    spread = ctx.reshape(ctx.r.op("MatMul", ctx.r.const(window.T.copy()), inner), (n, c, *space))
    slope = ctx.residual(p.like("Mul", x, scalar(p, 2 * alpha * beta / size)))
    return [Cotangent(ctx.r.op("Sub", direct, ctx.r.op("Mul", spread, slope)))]


NORMALIZATION_RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _local_response_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "RMSNormalization": _rms_normalization,
    "Softmax": _softmax,
}
