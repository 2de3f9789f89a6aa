"""Operators that treat every element alone: their derivative is a diagonal, computed in the primal graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule
from bitalloy.model.read import attribute, constant, static_shape

Derivative = Callable[[Builder, ir.Value, ir.Value, ir.Node], ir.Value]
"""Function (builder, x, y, node) -> dy/dx, which has the shape of x."""


def single(cots: Cots) -> Cotangent:
    """Return the gradient of a node's first output."""
    assert cots[0] is not None, "the engine calls a rule where its first output carries a gradient"
    return cots[0]


def one_minus(p: Builder, y: ir.Value) -> ir.Value:
    """Return 1 - y."""
    return p.op("Sub", scalar(p, 1.0), y, shape=static_shape(y))


def unary(derivative: Derivative) -> Rule:
    """Make the adjoint rule of y = f(x) from the derivative of f."""

    def rule(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
        assert node.inputs[0] is not None
        return [ctx.scaled(single(cots), derivative(ctx.p, node.inputs[0], node.outputs[0], node))]

    return rule


def scalar(p: Builder, x: float) -> ir.Value:
    """Make a float32 constant without axes."""
    return p.const(np.array(x, np.float32))


def mask(p: Builder, condition: ir.Value, like: ir.Value) -> ir.Value:
    """Return 1.0 where the condition holds and 0.0 elsewhere, in the shape of `like`."""
    return p.op("Cast", condition, to=int(ir.DataType.FLOAT), shape=static_shape(like))


def number(node: ir.Node, name: str, default: float) -> float:
    """Return a numeric attribute of a node as a float, or `default` where the node does not have it."""
    return float(attribute(node, name, default))  # type: ignore[arg-type]


def between(p: Builder, x: ir.Value, low: ir.Value | None, high: ir.Value | None) -> ir.Value:
    """Return 1.0 where low <= x <= high and 0.0 elsewhere; a bound of None does not limit."""
    inside = None
    for op, bound in (("GreaterOrEqual", low), ("LessOrEqual", high)):
        if bound is not None:
            part = mask(p, p.op(op, x, bound), x)
            inside = part if inside is None else p.mul(inside, part)
    return inside if inside is not None else scalar(p, 1.0)


def select(p: Builder, condition: ir.Value, a: ir.Value, b: ir.Value, like: ir.Value) -> ir.Value:
    """Return `a` where the condition holds and `b` elsewhere, in the shape of `like`."""
    return p.op("Where", condition, a, b, shape=static_shape(like))


def _exp(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return y


def _log(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Reciprocal", x)


def _sqrt(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.op("Div", scalar(p, 0.5), y, shape=static_shape(y))


def _reciprocal(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Neg", p.mul(y, y))


def _neg(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return scalar(p, -1.0)


def _abs(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Sign", x)


def _erf(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    power = p.like("Neg", p.mul(x, x))
    return p.like("Mul", p.like("Exp", power), scalar(p, 2 / math.sqrt(math.pi)))


def _sin(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Cos", x)


def _cos(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Neg", p.like("Sin", x))


def _tan(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Add", p.mul(y, y), scalar(p, 1.0))


def _sinh(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Cosh", x)


def _cosh(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Sinh", x)


def _inverse(sign: float, offset: float, power: float, factor: float = 1.0) -> Derivative:
    """Derivative factor * (sign * x^2 + offset)^power, the form of all inverse trigonometric functions."""

    def derivative(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
        inner = p.like("Add", p.like("Mul", p.mul(x, x), scalar(p, sign)), scalar(p, offset))
        return p.like("Mul", p.like("Pow", inner, scalar(p, power)), scalar(p, factor))

    return derivative


def broadcasting(ctx: Context, node: ir.Node, slot: int, cot: Cotangent) -> Cotangent:
    """Send a gradient of the output's shape back to an operand that was broadcast to it."""
    value = node.inputs[slot]
    assert value is not None
    shape, to = static_shape(node.outputs[0]), static_shape(value)
    if shape == to:
        return cot
    return Cotangent(ctx.unbroadcast(ctx.dense(cot), shape, to))


def _add(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    return [broadcasting(ctx, node, s, cot) if ctx.wants(v) else None for s, v in enumerate(node.inputs)]


def _mean(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return _add(ctx, node, [ctx.scaled(single(cots), scalar(ctx.p, 1 / len(node.inputs)))])


def _sub(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    signed = [cot, ctx.scaled(cot, scalar(ctx.p, -1.0))]
    return [broadcasting(ctx, node, s, signed[s]) if ctx.wants(v) else None for s, v in enumerate(node.inputs)]


def _mul(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    a, b = node.inputs
    assert a is not None and b is not None
    return [
        broadcasting(ctx, node, s, ctx.scaled(cot, other)) if ctx.wants(v) else None
        for s, (v, other) in enumerate(((a, b), (b, a)))
    ]


def _div(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    a, b = node.inputs
    assert a is not None and b is not None
    inverse = ctx.p.like("Reciprocal", b)
    result: list[Cotangent | None] = [None, None]
    if ctx.wants(a):
        result[0] = broadcasting(ctx, node, 0, ctx.scaled(cot, inverse))
    if ctx.wants(b):
        slope = ctx.p.like("Neg", ctx.p.mul(node.outputs[0], inverse))
        result[1] = broadcasting(ctx, node, 1, ctx.scaled(cot, slope))
    return result


def _mod(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The result is a - b * n, with the whole number n of times that b goes into a."""
    cot, p, y = single(cots), ctx.p, node.outputs[0]
    a, b = node.inputs
    assert a is not None and b is not None
    result: list[Cotangent | None] = [None, None]
    if ctx.wants(a):
        result[0] = broadcasting(ctx, node, 0, cot)
    if ctx.wants(b):
        times = p.op("Div", p.op("Sub", y, a, shape=static_shape(y)), b, shape=static_shape(y))
        result[1] = broadcasting(ctx, node, 1, ctx.scaled(cot, p.like("Round", times)))
    return result


def _pow(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Base: e * x^(e - 1), and 0 where e is 0. Exponent: y * ln x, and 0 where x is 0."""
    cot, p, y = single(cots), ctx.p, node.outputs[0]
    x, e = node.inputs
    assert x is not None and e is not None
    fixed = constant(e)
    if fixed is not None:
        exponent = np.asarray(fixed, np.float32)
        power = p.const(exponent)
        lower = p.const(np.where(exponent == 0, 0, exponent - 1).astype(np.float32))  # x^0: no 0 * inf at x = 0
    else:
        power = e if e.dtype == ir.DataType.FLOAT else p.like("Cast", e, to=int(ir.DataType.FLOAT))
        zero = p.op("Equal", power, scalar(p, 0.0))
        lower = select(p, zero, scalar(p, 0.0), p.like("Sub", power, scalar(p, 1.0)), power)
    result: list[Cotangent | None] = [None, None]
    if ctx.wants(x):
        slope = p.mul(p.op("Pow", x, lower, shape=static_shape(y)), power)
        result[0] = broadcasting(ctx, node, 0, ctx.scaled(cot, slope))
    if ctx.wants(e):
        slope = p.mul(y, p.like("Log", x))
        slope = select(p, p.op("Equal", x, scalar(p, 0.0)), scalar(p, 0.0), slope, y)
        result[1] = broadcasting(ctx, node, 1, ctx.scaled(cot, slope))
    return result


def _where(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot = single(cots)
    condition, a, b = node.inputs
    assert condition is not None
    chosen = mask(ctx.p, condition, condition)
    return [
        None,
        broadcasting(ctx, node, 1, ctx.scaled(cot, chosen)) if ctx.wants(a) else None,
        broadcasting(ctx, node, 2, ctx.scaled(cot, one_minus(ctx.p, chosen))) if ctx.wants(b) else None,
    ]


def _extremum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Min, Max: the gradient goes to the operands that attain the result, in equal shares where several do."""
    cot = single(cots)
    y = node.outputs[0]
    hits = [mask(ctx.p, ctx.p.op("Equal", v, y), y) for v in node.inputs]
    count = hits[0]
    for hit in hits[1:]:
        count = ctx.p.add(count, hit)
    return [
        broadcasting(ctx, node, s, ctx.scaled(cot, ctx.p.like("Div", hits[s], count))) if ctx.wants(v) else None
        for s, v in enumerate(node.inputs)
    ]


def _clip(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """A bound that is computed gets the gradients of the elements that it holds."""
    cot, p, x = single(cots), ctx.p, node.inputs[0]
    assert x is not None
    low, high = [*node.inputs[1:], None, None][:2]
    result: list[Cotangent | None] = [ctx.scaled(cot, between(p, x, low, high)), None, None]
    for slot, op, bound in ((1, "Less", low), (2, "Greater", high)):
        if bound is not None and ctx.wants(bound):
            result[slot] = broadcasting(ctx, node, slot, ctx.scaled(cot, mask(p, p.op(op, x, bound), x)))
    return result


def _cast(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return [single(cots), None]


ELEMENTWISE_RULES: dict[str, Rule] = {
    **{
        op: unary(derivative)
        for op, derivative in {
            "Abs": _abs, "Acos": _inverse(-1, 1, -0.5, -1), "Acosh": _inverse(1, -1, -0.5),
            "Asin": _inverse(-1, 1, -0.5), "Asinh": _inverse(1, 1, -0.5), "Atan": _inverse(1, 1, -1),
            "Atanh": _inverse(-1, 1, -1), "Cos": _cos, "Cosh": _cosh, "Erf": _erf, "Exp": _exp,
            "Log": _log, "Neg": _neg, "Reciprocal": _reciprocal, "Sin": _sin, "Sinh": _sinh, "Sqrt": _sqrt,
            "Tan": _tan,
        }.items()
    },
    "Add": _add, "Cast": _cast, "Clip": _clip, "Div": _div, "Identity": _cast, "Max": _extremum, "Mean": _mean,
    "Min": _extremum, "Mod": _mod, "Mul": _mul, "Pow": _pow, "Sub": _sub, "Sum": _add, "Where": _where,
}  # fmt: skip
