"""Convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.shape import data, dense
from bitalloy.model.read import attribute, constant, static_shape


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    return [int(x) for x in attribute(node, name, tuple(default))]  # type: ignore[attr-defined]


def geometry(node: ir.Node, size: Sequence[int], out: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], ...]:
    """Return strides, dilations, padding before and padding after of a Conv, with `auto_pad` resolved."""
    rank = len(size)
    strides, dilations = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = _ints(node, "pads", [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return strides, dilations, pads[:rank], pads[rank:]
    total = [max(0, (out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size[i]) for i in range(rank)]
    small = [t // 2 for t in total]
    large = [t - s for t, s in zip(total, small, strict=True)]
    return (strides, dilations, small, large) if auto == "SAME_UPPER" else (strides, dilations, large, small)


def _merged(ctx: Context, grad: ir.Value, shape: Sequence[int]) -> ir.Value:
    """(P, N, ...) as (P * N, ...)."""
    return ctx.r.op("Reshape", grad, ctx.r.const([-1, *shape[1:]]))


def _conv(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: stride 1 and constant weights: a Conv with flipped kernels. Case 2: otherwise a ConvTranspose.

    A strided Conv could also go back as a stride-1 Conv with stride^2 times the channels and a DepthToSpace.
    On ONNX Runtime's CPU kernels (1.32, 2 threads) that takes 1.2 to 3 times as long.
    """
    x, w = data(node), data(node, 1)
    size, out = static_shape(x)[2:], static_shape(node.outputs[0])[2:]
    weight, kernel = constant(w), static_shape(w)[2:]
    group = int(attribute(node, "group", 1))  # type: ignore[call-overload]
    strides, dilations, before, after = geometry(node, size, out, kernel)
    grad = _merged(ctx, dense(ctx, cots), static_shape(node.outputs[0]))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    back = (
        [r - p for r, p in zip(reach, [*before], strict=True)],
        [r - p for r, p in zip(reach, [*after], strict=True)],
    )
    if weight is not None and all(s == 1 for s in strides) and min(*back[0], *back[1], 0) == 0:
        m, c = weight.shape[0] // group, weight.shape[1]
        blocks = weight.reshape(group, m, c, *kernel).swapaxes(1, 2).reshape(group * c, m, *kernel)
        flipped = np.ascontiguousarray(np.flip(blocks, axis=tuple(range(2, 2 + len(kernel)))))
        result = ctx.r.op(
            "Conv", grad, ctx.r.const(flipped), dilations=dilations, group=group, pads=[*back[0], *back[1]]
        )
    else:
        # out = (in - 1) * stride + extra + reach + 1 - pads, solved for `extra` so that the input's size comes back
        extra = [size[i] - ((out[i] - 1) * strides[i] + reach[i] + 1 - before[i] - after[i]) for i in range(len(size))]
        pads_after = [a + min(e, 0) * -1 for a, e in zip(after, extra, strict=True)]
        result = ctx.r.op(
            "ConvTranspose",
            grad,
            ctx.residual(w),
            strides=strides,
            dilations=dilations,
            group=group,
            pads=[*before, *pads_after],
            output_padding=[max(e, 0) for e in extra],
        )
    return [Cotangent(ctx.reshape(result, static_shape(x)))]


def _conv_transpose(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    x, w = data(node), data(node, 1)
    size, out, kernel = static_shape(x)[2:], static_shape(node.outputs[0])[2:], static_shape(w)[2:]
    rank = len(size)
    strides, dilations = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    group = int(attribute(node, "group", 1))  # type: ignore[call-overload]
    auto = attribute(node, "auto_pad", "NOTSET")
    before = _ints(node, "pads", [0] * 2 * rank)[:rank]
    if auto in ("SAME_UPPER", "SAME_LOWER") or "output_shape" in node.attributes:
        extra = _ints(node, "output_padding", [0] * rank)
        total = [
            (size[i] - 1) * strides[i] + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - out[i] for i in range(rank)
        ]
        # the larger half lies after for SAME_UPPER, before otherwise (ONNX specification of ConvTranspose)
        before = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    # the adjoint is the Conv that reads `size` positions; padding after may be negative, so crop or pad instead
    after = [(size[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - before[i] - out[i] for i in range(rank)]
    grad = _merged(ctx, dense(ctx, cots), static_shape(node.outputs[0]))
    pads = [0, 0, *before, 0, 0, *after]
    padded = ctx.r.op("Pad", grad, ctx.r.const(pads)) if any(pads) else grad
    result = ctx.r.op("Conv", padded, ctx.residual(w), strides=strides, dilations=dilations, group=group)
    return [Cotangent(ctx.reshape(result, static_shape(x)))]


def _matmul(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: a two-dimensional right operand: Gemm, which reads it transposed in place. Case 2: batches: MatMul."""
    a, b = data(node), data(node, 1)
    sa, sb, out = static_shape(a), static_shape(b), static_shape(node.outputs[0])
    full_a = (1, *sa) if len(sa) == 1 else sa
    full_b = (*sb, 1) if len(sb) == 1 else sb
    batch = tuple(np.broadcast_shapes(full_a[:-2], full_b[:-2]))
    m, k, n = full_a[-2], full_a[-1], full_b[-1]
    grad = dense(ctx, cots)
    if out != (*batch, m, n):
        grad = ctx.reshape(grad, (*batch, m, n))
    result: list[Cotangent | None] = [None, None]
    if ctx.wants(a) and len(sb) == 2:
        result[0] = Cotangent(_by_rows(ctx, grad, n, b, sa, trans=1))
    elif ctx.wants(a):
        right = ctx.r.op("MatMul", grad, _transposed(ctx, b, full_b))
        result[0] = Cotangent(_view(ctx, ctx.unbroadcast(right, (*batch, m, k), full_a), full_a, sa))
    if ctx.wants(b):
        left = ctx.r.op("MatMul", _transposed(ctx, a, full_a), grad)
        result[1] = Cotangent(_view(ctx, ctx.unbroadcast(left, (*batch, k, n), full_b), full_b, sb))
    return result


def _by_rows(ctx: Context, grad: ir.Value, columns: int, b: ir.Value, shape: tuple[int, ...], trans: int) -> ir.Value:
    """Rows of the gradient (..., columns) times `b`, or its transpose, as (P, *shape). No copy of `b` is turned."""
    rows = ctx.r.op("Reshape", grad, ctx.r.const([-1, columns]))
    return ctx.reshape(ctx.r.op("Gemm", rows, ctx.residual(b), transB=trans), shape)


def _view(ctx: Context, value: ir.Value, shape: tuple[int, ...], to: tuple[int, ...]) -> ir.Value:
    return value if shape == to else ctx.reshape(value, to)


def _transposed(ctx: Context, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """The operand with its last two axes exchanged, computed once per sample, or ahead for a constant."""
    array = constant(value)
    if array is not None:
        return ctx.r.const(np.ascontiguousarray(array.reshape(shape).swapaxes(-1, -2)))
    if shape != static_shape(value):
        value = ctx.p.op("Reshape", value, ctx.p.const(list(shape)), shape=shape)
    perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    return ctx.residual(ctx.p.op("Transpose", value, perm=perm, shape=[shape[i] for i in perm]))


def _gemm(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Y = alpha A' B' + beta C, A' and B' transposed where the attributes say so."""
    a, b = data(node), data(node, 1)
    alpha, beta = (float(attribute(node, k, 1.0)) for k in ("alpha", "beta"))  # type: ignore[arg-type]
    trans_a, trans_b = (bool(attribute(node, k, 0)) for k in ("transA", "transB"))
    (m, n), k = static_shape(node.outputs[0]), static_shape(a)[0 if trans_a else 1]
    grad = dense(ctx, cots)
    result: list[Cotangent | None] = [None] * len(node.inputs)

    def times(factor: float, value: ir.Value) -> ir.Value:
        return value if factor == 1.0 else ctx.r.op("Mul", value, ctx.r.const(np.array(factor, np.float32)))

    if ctx.wants(a):
        product = _by_rows(ctx, grad, n, b, (m, k), trans=0 if trans_b else 1)
        result[0] = Cotangent(times(alpha, ctx.r.op("Transpose", product, perm=[0, 2, 1]) if trans_a else product))
    if ctx.wants(b):
        left = ctx.residual(a) if trans_a else _transposed(ctx, a, static_shape(a))
        product = ctx.r.op("MatMul", left, grad)
        result[1] = Cotangent(times(alpha, ctx.r.op("Transpose", product, perm=[0, 2, 1]) if trans_b else product))
    if len(node.inputs) > 2 and ctx.wants(node.inputs[2]):
        c = data(node, 2)
        result[2] = Cotangent(times(beta, ctx.unbroadcast(grad, static_shape(node.outputs[0]), static_shape(c))))
    return result


def _einsum(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The gradient of an operand is the Einsum of the result's gradient and the other operand, with its own letters.

    A letter of one operand alone that the result lacks is summed over; the gradient is the same along it.
    """
    terms, result = _letters(node)
    shapes = [static_shape(v) for v in node.inputs if v is not None]
    sizes: dict[str, set[int]] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes.setdefault(letter, set()).add(size)
    if any(len(s) > 1 for s in sizes.values()):
        raise unsupported(node, "broadcasts an axis of its equation")
    probe = next(c for c in "PABCDEFGHIJKLMNOQRSTUVWXYZ" if c not in sizes)
    grad = dense(ctx, cots)
    gradients: list[Cotangent | None] = []
    for slot, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
        if not ctx.wants(node.inputs[slot]):
            gradients.append(None)
            continue
        others = [i for i in range(len(terms)) if i != slot]
        known = set(result).union(*(terms[i] for i in others))
        given = ",".join([probe + result, *(terms[i] for i in others)])
        values = [ctx.residual(data(node, i)) for i in others]
        kept = "".join(c for c in term if c in known)
        product = ctx.r.op("Einsum", grad, *values, equation=f"{given}->{probe}{kept}")
        if kept != term:
            lined = ctx.reshape(product, [d if c in known else 1 for c, d in zip(term, shape, strict=True)])
            product = ctx.r.op("Expand", lined, ctx.r.const([1, *shape]))
        gradients.append(Cotangent(product))
    return gradients


def _letters(node: ir.Node) -> tuple[list[str], str]:
    """Terms of the operands and of the result of an Einsum; what the rule does not cover is refused."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    if len(terms) > 2 or "." in equation or any(len(set(t)) < len(t) for t in terms):
        raise unsupported(
            node,
            f"has the equation '{equation}', and the adjoint rule covers one or two operands, without '...' or "
            "a letter twice in an operand",
        )
    return terms, right


LINEAR_RULES: dict[str, Rule] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Einsum": _einsum, "Gemm": _gemm, "MatMul": _matmul
}  # fmt: skip
