"""Operators that read or write elements at given positions.

Positions may be constant or computed from the sample; the latter come from the primal graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.elementwise import mask, one_minus, scalar, select, single
from bitalloy.adjoint.rules.shape import data, dense, scatter_add
from bitalloy.model.read import attribute, constant, static_shape


def _axis(node: ir.Node, default: int = 0) -> int:
    axis: int = int(attribute(node, "axis", default))  # type: ignore[call-overload]
    return axis % len(static_shape(data(node)))


def _gather(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: one constant position: a window. Case 2: constant positions. Case 3: computed positions; both scatter."""
    shape = static_shape(data(node))
    axis, positions = _axis(node), data(node, 1)
    index = constant(positions)
    count = int(np.prod(static_shape(positions)))
    picked = (*shape[:axis], count, *shape[axis + 1 :])
    cot = single(cots)
    if index is not None and index.size == 1 and (cot.diagonal is None or index.ndim == 1):
        start = int(index.reshape(-1)[0]) % shape[axis]
        base = cot.base if index.ndim == 1 else ctx.reshape(cot.base, picked)
        return [Cotangent(base, cot.diagonal, (axis, start, start + 1)), None]
    grad = ctx.reshape(dense(ctx, cots), picked)
    if index is not None:
        return [Cotangent(scatter_add(ctx, grad, shape, axis, index.reshape(-1) % shape[axis])), None]
    lined = (count, *[1] * (len(shape) - axis - 1))
    flat = ctx.p.op("Reshape", positions, ctx.p.const(list(lined)), shape=lined)
    return [Cotangent(_add_at(ctx, grad, shape, axis, flat)), None]


def _add_at(ctx: Context, grad: ir.Value, shape: Sequence[int], axis: int, index: ir.Value) -> ir.Value:
    """Zeros (P, *shape) with the gradient (P, ...) added along `axis` where `index`, a primal value, points."""
    expanded = ctx.r.op("Expand", ctx.residual(index), ctx.r.op("Shape", grad))
    return ctx.r.op("ScatterElements", ctx.zeros(shape), expanded, grad, axis=axis + 1, reduction="add")


def _gather_elements(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    return [Cotangent(_add_at(ctx, dense(ctx, cots), static_shape(data(node)), _axis(node), data(node, 1))), None]


def _top_k(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The values come from where the second output says."""
    indices = node.outputs[1]
    if not indices.name:
        raise unsupported(node, "does not name its second output, the positions,")
    return [Cotangent(_add_at(ctx, dense(ctx, cots), static_shape(data(node)), _axis(node, -1), indices)), None]


def _lines(p: Builder, shape: tuple[int, ...], indices: ir.Value, batch_dims: int = 0) -> tuple[ir.Value, int, int]:
    """Positions of GatherND and ScatterND, in a tensor of `shape`, as rows of a matrix (rows, columns).

    Returns the row of every position (count,) and the numbers of rows and columns. Negative positions count from
    the end.
    """
    given = static_shape(indices)
    depth = given[-1]
    count = int(np.prod(given[:-1]))
    batches, sizes = int(np.prod(shape[:batch_dims])), shape[batch_dims : batch_dims + depth]
    strides = np.array([int(np.prod(sizes[i + 1 :])) for i in range(depth)], np.int64)
    start = np.arange(batches).repeat(count // batches) * int(np.prod(sizes)) if count else np.zeros(0, np.int64)
    rows, columns = batches * int(np.prod(sizes)), int(np.prod(shape[batch_dims + depth :]))
    known = constant(indices)
    if known is not None:
        wrapped = known.reshape(count, depth) % np.array(sizes, np.int64)
        return p.const((wrapped @ strides + start).astype(np.int64)), rows, columns
    flat = p.op("Reshape", indices, p.const([count, depth]), shape=(count, depth))
    ends = p.like("Add", flat, p.const(list(sizes)))
    wrapped_at = p.op("Where", p.op("Less", flat, p.const([0])), ends, flat, shape=(count, depth))
    line = p.op("ReduceSum", p.like("Mul", wrapped_at, p.const(strides)), p.const([1]), keepdims=0, shape=(count,))
    return p.like("Add", line, p.const(start)), rows, columns


def _gather_nd(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    shape = static_shape(data(node))
    batch_dims = int(attribute(node, "batch_dims", 0))  # type: ignore[call-overload]
    line, rows, columns = _lines(ctx.p, shape, data(node, 1), batch_dims)
    (count,) = static_shape(line)
    index = ctx.p.op("Reshape", line, ctx.p.const([count, 1]), shape=(count, 1))
    grad = ctx.reshape(dense(ctx, cots), (count, columns))
    return [Cotangent(ctx.reshape(_add_at(ctx, grad, (rows, columns), 0, index), shape)), None]


def _written(ctx: Context, node: ir.Node, cots: Cots, **attributes: int) -> Cotangent:
    """The gradient of the tensor that is written to.

    Zero where it is overwritten, everywhere where it is added to, times what it is multiplied by, and where it is the
    largest or smallest.
    """
    reduction = attribute(node, "reduction", "none")
    if reduction == "add":
        return single(cots)
    x, y, updates = data(node), node.outputs[0], data(node, 2)
    if reduction in ("max", "min"):
        return ctx.scaled(single(cots), mask(ctx.p, ctx.p.op("Equal", x, y), y))
    ones = ctx.p.op("Expand", scalar(ctx.p, 1.0), ctx.p.const(list(static_shape(x))), shape=static_shape(x))
    if reduction == "mul":
        product = ctx.p.like(node.op_type, ones, data(node, 1), updates, reduction="mul", **attributes)
        return ctx.scaled(single(cots), product)
    shape = static_shape(updates)
    zeros = ctx.p.op("Expand", scalar(ctx.p, 0.0), ctx.p.const(list(shape)), shape=shape)
    return ctx.scaled(single(cots), ctx.p.like(node.op_type, ones, data(node, 1), zeros, **attributes))


def _by_update(ctx: Context, node: ir.Node, taken: ir.Value, read: ir.Value) -> Cotangent:
    """The gradient of what is written, from the result's gradient and the result itself at the same places."""
    reduction, updates = attribute(node, "reduction", "none"), data(node, 2)
    if reduction in ("none", "add"):
        return Cotangent(taken)
    if reduction == "mul":  # the product of all others, which division does not tell where a factor is zero
        none = ctx.p.op("Equal", updates, scalar(ctx.p, 0.0))
        return Cotangent(taken, select(ctx.p, none, scalar(ctx.p, 0.0), ctx.p.like("Div", read, updates), updates))
    return Cotangent(taken, mask(ctx.p, ctx.p.op("Equal", updates, read), updates))


def _scatter_elements(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    written, axis, index = _written(ctx, node, cots, axis=_axis(node)), _axis(node), data(node, 1)
    result: list[Cotangent | None] = [written if ctx.wants(node.inputs[0]) else None, None, None]
    if ctx.wants(node.inputs[2]):
        full = ctx.r.op("Concat", ctx.probes, ctx.r.const(list(static_shape(index))), axis=0)
        places = ctx.r.op("Expand", ctx.residual(index), full)
        read = ctx.p.op("GatherElements", node.outputs[0], index, axis=axis, shape=static_shape(index))
        taken = ctx.r.op("GatherElements", dense(ctx, cots), places, axis=axis + 1)
        result[2] = _by_update(ctx, node, taken, read)
    return result


def _scatter_nd(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    written = _written(ctx, node, cots)
    result: list[Cotangent | None] = [written if ctx.wants(node.inputs[0]) else None, None, None]
    if ctx.wants(node.inputs[2]):
        shape = static_shape(data(node, 2))
        line, rows, columns = _lines(ctx.p, static_shape(data(node)), data(node, 1))
        lined = ctx.reshape(dense(ctx, cots), (rows, columns))
        taken = ctx.reshape(ctx.r.op("Gather", lined, ctx.residual(line), axis=1), shape)
        result[2] = _by_update(ctx, node, taken, ctx.p.op("GatherND", node.outputs[0], data(node, 1), shape=shape))
    return result


def _compress(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Case 1: along an axis. Case 2: of all elements in a row. Only for positions that are constant."""
    chosen = constant(data(node, 1))
    if chosen is None:
        raise unsupported(node, "computes at run time what it keeps")
    (index,), shape = np.nonzero(chosen), static_shape(data(node))
    grad = dense(ctx, cots)
    if "axis" in node.attributes:
        return [Cotangent(scatter_add(ctx, grad, shape, _axis(node), index)), None]
    return [Cotangent(ctx.reshape(scatter_add(ctx, grad, (int(np.prod(shape)),), 0, index), shape)), None]


def _reverse_sequence(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The same again: what is turned twice is as it was."""
    p, x = ctx.p, data(node)
    shape, rank = static_shape(x), len(static_shape(x))
    time, batch = (int(attribute(node, f"{k}_axis", d)) for k, d in (("time", 0), ("batch", 1)))  # type: ignore[call-overload]
    at = p.const(np.arange(shape[time]).reshape([-1 if i == time else 1 for i in range(rank)]))
    lined = [shape[batch] if i == batch else 1 for i in range(rank)]
    lengths = p.op("Reshape", data(node, 1), p.const(lined), shape=lined)
    full = p.op("Expand", lengths, p.const(list(shape)), shape=shape)
    turned = p.op("Sub", p.op("Sub", full, p.const([1]), shape=shape), at, shape=shape)
    places = p.op("Where", p.op("Less", at, full, shape=shape), turned, at, shape=shape)
    every = ctx.r.op("Expand", ctx.residual(places), ctx.r.op("Concat", ctx.probes, ctx.r.const(list(shape)), axis=0))
    return [Cotangent(ctx.r.op("GatherElements", dense(ctx, cots), every, axis=time + 1)), None]


def _max_unpool(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Every element lies where the second input says, in the whole tensor read as one row."""
    shape = static_shape(data(node))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raise unsupported(node, "has a shape of its own, which the adjoint rule does not cover")
    flat = ctx.reshape(dense(ctx, cots), (int(np.prod(static_shape(node.outputs[0]))),))
    index = ctx.p.op("Reshape", data(node, 1), ctx.p.const([-1]), shape=(int(np.prod(shape)),))
    return [Cotangent(ctx.reshape(ctx.r.op("Gather", flat, ctx.residual(index), axis=1), shape)), None]


def _one_hot(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The two numbers of which a result consists: sums of the gradient where each of them stands."""
    p, y = ctx.p, node.outputs[0]
    numbers = p.const(np.array([0, 1], np.float32))
    attributes = {"axis": int(attribute(node, "axis", -1))}  # type: ignore[call-overload]
    hot = p.op("OneHot", data(node, 0), data(node, 1), numbers, shape=static_shape(y), **attributes)
    hot.type = ir.TensorType(ir.DataType.FLOAT)
    count, grad = int(np.prod(static_shape(y))), ctx.reshape(dense(ctx, cots), (int(np.prod(static_shape(y))),))
    both = [p.op("Reshape", v, p.const([count, 1]), shape=(count, 1)) for v in (one_minus(p, hot), hot)]
    return [
        None,
        None,
        Cotangent(ctx.r.op("MatMul", grad, ctx.residual(p.op("Concat", *both, axis=1, shape=(count, 2))))),
    ]


INDEXING_RULES: dict[str, Rule] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "MaxUnpool": _max_unpool,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
