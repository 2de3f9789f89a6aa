"""Operators that treat every element alone: their derivative is a diagonal, computed in the primal graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Context, Cotangent, Rule, unsupported
from bitalloy.graph import attribute, constant, static_shape

Cots = Sequence[Cotangent | None]
Derivative = Callable[[Builder, ir.Value, ir.Value, ir.Node], ir.Value]
"""(builder, x, y, node) -> dy/dx, of the shape of x."""


def single(cots: Cots) -> Cotangent:
    """The gradient of a node's first output."""
    assert cots[0] is not None, "the engine calls a rule where its first output carries a gradient"
    return cots[0]


def one_minus(p: Builder, y: ir.Value) -> ir.Value:
    """1 - y."""
    return p.op("Sub", _f(p, 1.0), y, shape=static_shape(y))


def unary(derivative: Derivative) -> Rule:
    """Rule of y = f(x) from its derivative."""

    def rule(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
        assert node.inputs[0] is not None
        return [ctx.scaled(single(cots), derivative(ctx.p, node.inputs[0], node.outputs[0], node))]

    return rule


def _f(p: Builder, x: float) -> ir.Value:
    return p.const(np.array(x, np.float32))


def _mask(p: Builder, condition: ir.Value, like: ir.Value) -> ir.Value:
    return p.op("Cast", condition, to=int(ir.DataType.FLOAT), shape=static_shape(like))


def _number(node: ir.Node, name: str, default: float) -> float:
    return float(attribute(node, name, default))  # type: ignore[arg-type]


def _sigmoid(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.mul(y, one_minus(p, y))


def _tanh(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return one_minus(p, p.mul(y, y))


def _relu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return _mask(p, p.op("Greater", x, _f(p, 0.0)), x)


def _between(p: Builder, x: ir.Value, low: ir.Value | None, high: ir.Value | None) -> ir.Value:
    """1 where low <= x <= high."""
    mask = None
    for op, bound in (("GreaterOrEqual", low), ("LessOrEqual", high)):
        if bound is not None:
            part = _mask(p, p.op(op, x, bound), x)
            mask = part if mask is None else p.mul(mask, part)
    return mask if mask is not None else _f(p, 1.0)


def _clip(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    bounds = [*node.inputs[1:], None, None]
    return _between(p, x, bounds[0], bounds[1])


def _select(p: Builder, condition: ir.Value, a: ir.Value, b: ir.Value, like: ir.Value) -> ir.Value:
    return p.op("Where", condition, a, b, shape=static_shape(like))


def _leaky_relu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    slope = _f(p, _number(node, "alpha", 0.01))
    return _select(p, p.op("GreaterOrEqual", x, _f(p, 0.0)), _f(p, 1.0), slope, x)


def _elu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha = _f(p, _number(node, "alpha", 1.0))
    return _select(p, p.op("Greater", x, _f(p, 0.0)), _f(p, 1.0), p.like("Add", y, alpha), x)


def _selu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha = _number(node, "alpha", 1.67326319217681884765625)
    gamma = _number(node, "gamma", 1.05070102214813232421875)
    return _select(p, p.op("Greater", x, _f(p, 0.0)), _f(p, gamma), p.like("Add", y, _f(p, alpha * gamma)), x)


def _hard_sigmoid(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha, beta = _number(node, "alpha", 0.2), _number(node, "beta", 0.5)
    line = p.like("Add", p.like("Mul", x, _f(p, alpha)), _f(p, beta))
    return p.like("Mul", _between(p, line, _f(p, 0.0), _f(p, 1.0)), _f(p, alpha))


def _hard_swish(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    # x * clip(x/6 + 1/2, 0, 1)
    line = p.like("Add", p.like("Mul", x, _f(p, 1 / 6)), _f(p, 0.5))
    gate = p.like("Clip", line, _f(p, 0.0), _f(p, 1.0))
    slope = p.like("Mul", _between(p, line, _f(p, 0.0), _f(p, 1.0)), _f(p, 1 / 6))
    return p.add(gate, p.mul(x, slope))


def _softplus(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Sigmoid", x)


def _softsign(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    down = p.like("Add", p.like("Abs", x), _f(p, 1.0))
    return p.like("Reciprocal", p.mul(down, down))


def _exp(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return y


def _log(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Reciprocal", x)


def _sqrt(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.op("Div", _f(p, 0.5), y, shape=static_shape(y))


def _reciprocal(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Neg", p.mul(y, y))


def _neg(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return _f(p, -1.0)


def _abs(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Sign", x)


def _sin(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Cos", x)


def _cos(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Neg", p.like("Sin", x))


def _gaussian(p: Builder, x: ir.Value) -> ir.Value:
    """exp(-x^2 / 2) / sqrt(2 pi)."""
    power = p.like("Mul", p.mul(x, x), _f(p, -0.5))
    return p.like("Mul", p.like("Exp", power), _f(p, 1 / math.sqrt(2 * math.pi)))


def _erf(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    power = p.like("Neg", p.mul(x, x))
    return p.like("Mul", p.like("Exp", power), _f(p, 2 / math.sqrt(math.pi)))


def _gelu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    if attribute(node, "approximate", "none") == "tanh":
        # 0.5 x (1 + tanh u), u = c (x + 0.044715 x^3), c = sqrt(2 / pi)
        c, square = math.sqrt(2 / math.pi), p.mul(x, x)
        inner = p.like("Mul", p.add(x, p.like("Mul", p.mul(square, x), _f(p, 0.044715))), _f(p, c))
        t = p.like("Tanh", inner)
        slope = p.like("Add", p.like("Mul", square, _f(p, 3 * 0.044715 * c)), _f(p, c))
        first = p.like("Mul", p.like("Add", t, _f(p, 1.0)), _f(p, 0.5))
        second = p.mul(p.like("Mul", x, _f(p, 0.5)), p.mul(one_minus(p, p.mul(t, t)), slope))
        return p.add(first, second)
    cdf = p.like("Add", p.like("Mul", p.like("Erf", p.like("Mul", x, _f(p, math.sqrt(0.5)))), _f(p, 0.5)), _f(p, 0.5))
    return p.add(cdf, p.mul(x, _gaussian(p, x)))


def _mish(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    t = p.like("Tanh", p.like("Softplus", x))
    return p.add(t, p.mul(p.mul(x, p.like("Sigmoid", x)), one_minus(p, p.mul(t, t))))


def _broadcasting(ctx: Context, node: ir.Node, slot: int, cot: Cotangent) -> Cotangent:
    """Send a gradient of the output's shape back to an operand that was broadcast to it."""
    value = node.inputs[slot]
    assert value is not None
    shape, to = static_shape(node.outputs[0]), static_shape(value)
    if shape == to:
        return cot
    return Cotangent(ctx.unbroadcast(ctx.dense(cot), shape, to))


def _add(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    return [_broadcasting(ctx, node, s, cot) if ctx.wants(v) else None for s, v in enumerate(node.inputs)]


def _sub(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    signed = [cot, ctx.scaled(cot, _f(ctx.p, -1.0))]
    return [_broadcasting(ctx, node, s, signed[s]) if ctx.wants(v) else None for s, v in enumerate(node.inputs)]


def _mul(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    a, b = node.inputs
    assert a is not None and b is not None
    return [
        _broadcasting(ctx, node, s, ctx.scaled(cot, other)) if ctx.wants(v) else None
        for s, (v, other) in enumerate(((a, b), (b, a)))
    ]


def _div(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    a, b = node.inputs
    assert a is not None and b is not None
    inverse = ctx.p.like("Reciprocal", b)
    result: list[Cotangent | None] = [None, None]
    if ctx.wants(a):
        result[0] = _broadcasting(ctx, node, 0, ctx.scaled(cot, inverse))
    if ctx.wants(b):
        slope = ctx.p.like("Neg", ctx.p.mul(node.outputs[0], inverse))
        result[1] = _broadcasting(ctx, node, 1, ctx.scaled(cot, slope))
    return result


def _pow(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    x, e = node.inputs
    assert x is not None
    exponent = constant(e)
    if exponent is None:
        raise unsupported(node, "has an adjoint rule for constant exponents only")
    exponent = np.asarray(exponent, np.float32)
    lower = ctx.p.const(np.where(exponent == 0, 0, exponent - 1).astype(np.float32))  # x^0: no 0 * inf at x = 0
    slope = ctx.p.mul(ctx.p.op("Pow", x, lower, shape=static_shape(node.outputs[0])), ctx.p.const(exponent))
    return [_broadcasting(ctx, node, 0, ctx.scaled(cot, slope)), None]


def _where(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    condition, a, b = node.inputs
    assert condition is not None
    mask = ctx.p.op("Cast", condition, to=int(ir.DataType.FLOAT), shape=static_shape(condition))
    return [
        None,
        _broadcasting(ctx, node, 1, ctx.scaled(cot, mask)) if ctx.wants(a) else None,
        _broadcasting(ctx, node, 2, ctx.scaled(cot, one_minus(ctx.p, mask))) if ctx.wants(b) else None,
    ]


def _extremum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Min, Max: the gradient goes to the operands that attain the result, in equal shares where several do."""
    cot = single(cots)
    y = node.outputs[0]
    hits = [
        ctx.p.op("Cast", ctx.p.op("Equal", v, y), to=int(ir.DataType.FLOAT), shape=static_shape(y)) for v in node.inputs
    ]
    count = hits[0]
    for hit in hits[1:]:
        count = ctx.p.add(count, hit)
    return [
        _broadcasting(ctx, node, s, ctx.scaled(cot, ctx.p.like("Div", hits[s], count))) if ctx.wants(v) else None
        for s, v in enumerate(node.inputs)
    ]


def _prelu(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    x, slope = node.inputs
    assert x is not None and slope is not None
    positive = ctx.p.op("GreaterOrEqual", x, _f(ctx.p, 0.0))
    return [ctx.scaled(cot, _select(ctx.p, positive, _f(ctx.p, 1.0), slope, x)), None]


def _cast(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return [single(cots)]


RULES: dict[str, Rule] = {
    **{
        op: unary(derivative)
        for op, derivative in {
            "Abs": _abs, "Clip": _clip, "Cos": _cos, "Elu": _elu, "Erf": _erf, "Exp": _exp, "Gelu": _gelu,
            "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish, "LeakyRelu": _leaky_relu, "Log": _log,
            "Mish": _mish, "Neg": _neg, "Reciprocal": _reciprocal, "Relu": _relu, "Selu": _selu, "Sigmoid": _sigmoid,
            "Sin": _sin, "Softplus": _softplus, "Softsign": _softsign, "Sqrt": _sqrt, "Tanh": _tanh,
        }.items()
    },
    "Add": _add, "Cast": _cast, "Div": _div, "Identity": _cast, "Max": _extremum, "Min": _extremum, "Mul": _mul,
    "Pow": _pow, "PRelu": _prelu, "Sub": _sub, "Sum": _add, "Where": _where,
}  # fmt: skip
