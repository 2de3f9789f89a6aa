"""Activation functions: elementwise operators with a rule each for their derivative."""

from __future__ import annotations

import math

import onnx_ir as ir

from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule
from bitalloy.adjoint.rules.elementwise import (
    Derivative,
    between,
    broadcasting,
    mask,
    number,
    one_minus,
    scalar,
    select,
    single,
    unary,
)
from bitalloy.model.read import attribute


def _sigmoid(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.mul(y, one_minus(p, y))


def _tanh(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return one_minus(p, p.mul(y, y))


def _relu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return mask(p, p.op("Greater", x, scalar(p, 0.0)), x)


def _leaky_relu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    slope = scalar(p, number(node, "alpha", 0.01))
    return select(p, p.op("GreaterOrEqual", x, scalar(p, 0.0)), scalar(p, 1.0), slope, x)


def _elu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha = scalar(p, number(node, "alpha", 1.0))
    return select(p, p.op("Greater", x, scalar(p, 0.0)), scalar(p, 1.0), p.like("Add", y, alpha), x)


def _selu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha = number(node, "alpha", 1.67326319217681884765625)
    gamma = number(node, "gamma", 1.05070102214813232421875)
    return select(
        p, p.op("Greater", x, scalar(p, 0.0)), scalar(p, gamma), p.like("Add", y, scalar(p, alpha * gamma)), x
    )


def _hard_sigmoid(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha, beta = number(node, "alpha", 0.2), number(node, "beta", 0.5)
    line = p.like("Add", p.like("Mul", x, scalar(p, alpha)), scalar(p, beta))
    return p.like("Mul", between(p, line, scalar(p, 0.0), scalar(p, 1.0)), scalar(p, alpha))


def _hard_swish(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    # x * clip(x/6 + 1/2, 0, 1)
    line = p.like("Add", p.like("Mul", x, scalar(p, 1 / 6)), scalar(p, 0.5))
    gate = p.like("Clip", line, scalar(p, 0.0), scalar(p, 1.0))
    slope = p.like("Mul", between(p, line, scalar(p, 0.0), scalar(p, 1.0)), scalar(p, 1 / 6))
    return p.add(gate, p.mul(x, slope))


def _softplus(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return p.like("Sigmoid", x)


def _softsign(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    down = p.like("Add", p.like("Abs", x), scalar(p, 1.0))
    return p.like("Reciprocal", p.mul(down, down))


def _gaussian(p: Builder, x: ir.Value) -> ir.Value:
    """exp(-x^2 / 2) / sqrt(2 pi)."""
    power = p.like("Mul", p.mul(x, x), scalar(p, -0.5))
    return p.like("Mul", p.like("Exp", power), scalar(p, 1 / math.sqrt(2 * math.pi)))


def _gelu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    if attribute(node, "approximate", "none") == "tanh":
        # 0.5 x (1 + tanh u), u = c (x + 0.044715 x^3), c = sqrt(2 / pi)
        c, square = math.sqrt(2 / math.pi), p.mul(x, x)
        inner = p.like("Mul", p.add(x, p.like("Mul", p.mul(square, x), scalar(p, 0.044715))), scalar(p, c))
        t = p.like("Tanh", inner)
        slope = p.like("Add", p.like("Mul", square, scalar(p, 3 * 0.044715 * c)), scalar(p, c))
        first = p.like("Mul", p.like("Add", t, scalar(p, 1.0)), scalar(p, 0.5))
        second = p.mul(p.like("Mul", x, scalar(p, 0.5)), p.mul(one_minus(p, p.mul(t, t)), slope))
        return p.add(first, second)
    cdf = p.like(
        "Add", p.like("Mul", p.like("Erf", p.like("Mul", x, scalar(p, math.sqrt(0.5)))), scalar(p, 0.5)), scalar(p, 0.5)
    )
    return p.add(cdf, p.mul(x, _gaussian(p, x)))


def _mish(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    t = p.like("Tanh", p.like("Softplus", x))
    return p.add(t, p.mul(p.mul(x, p.like("Sigmoid", x)), one_minus(p, p.mul(t, t))))


def _celu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    alpha = number(node, "alpha", 1.0)
    below = p.like("Add", p.like("Mul", y, scalar(p, 1 / alpha)), scalar(p, 1.0))
    return select(p, p.op("Greater", x, scalar(p, 0.0)), scalar(p, 1.0), below, x)


def _thresholded_relu(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return mask(p, p.op("Greater", x, scalar(p, number(node, "alpha", 1.0))), x)


def _shrink(p: Builder, x: ir.Value, y: ir.Value, node: ir.Node) -> ir.Value:
    return mask(p, p.op("Greater", p.like("Abs", x), scalar(p, number(node, "lambd", 0.5))), x)


def _prelu(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    cot, p = single(cots), ctx.p
    x, slope = node.inputs
    assert x is not None and slope is not None
    result: list[Cotangent | None] = [None, None]
    if ctx.wants(x):
        positive = p.op("GreaterOrEqual", x, scalar(p, 0.0))
        result[0] = ctx.scaled(cot, select(p, positive, scalar(p, 1.0), slope, x))
    if ctx.wants(slope):
        result[1] = broadcasting(ctx, node, 1, ctx.scaled(cot, p.like("Min", x, scalar(p, 0.0))))
    return result


DERIVATIVES: dict[str, Derivative] = {
    "Celu": _celu, "Elu": _elu, "Gelu": _gelu, "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu, "Mish": _mish, "Relu": _relu, "Selu": _selu, "Shrink": _shrink, "Sigmoid": _sigmoid,
    "Softplus": _softplus, "Softsign": _softsign, "Tanh": _tanh, "ThresholdedRelu": _thresholded_relu,
}  # fmt: skip
"""Activation function -> its derivative."""
ACTIVATION_RULES: dict[str, Rule] = {
    **{op: unary(derivative) for op, derivative in DERIVATIVES.items()},
    "PRelu": _prelu,
}
