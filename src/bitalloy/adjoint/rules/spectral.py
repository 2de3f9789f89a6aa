"""Fourier transforms, and columns put back together: linear maps along one axis, whose matrix the operator gives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.shape import data, dense, integers, scatter_add
from bitalloy.model.read import attribute, constant, static_shape
from bitalloy.runtime.ort import evaluate_node

LONGEST = 2048
"""Longest axis whose matrix is kept."""


def _dft(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """The matrix from (length, real and imaginary part) to the same of the result: the transform of unit vectors."""
    shape, out = static_shape(data(node)), static_shape(node.outputs[0])
    rank = len(shape)
    given = integers(node, 2) if ctx.opset >= 20 else None
    default = -2 if ctx.opset >= 20 else 1
    axis = (given[0] if given else int(attribute(node, "axis", default))) % rank  # type: ignore[call-overload]
    length, parts = shape[axis], shape[-1]
    if max(length, out[axis]) > LONGEST:
        raise unsupported(node, f"is longer than {LONGEST}, up to which the adjoint rule keeps its matrix")
    kept = {k: attribute(node, k, 0) for k in ("inverse", "onesided")}
    units = np.eye(length * parts, dtype=np.float32).reshape(length * parts, length, parts)
    size = integers(node, 1)
    inputs: list[np.ndarray] = [units, np.array(size[0] if size else length, np.int64)]
    if ctx.opset >= 20:
        inputs.append(np.array(1, np.int64))
    else:
        kept["axis"] = 1
    matrix = evaluate_node("DFT", inputs, kept, opset=ctx.opset)[0].reshape(length * parts, -1)
    order = [i for i in range(rank - 1) if i != axis]
    perm = [0, *(i + 1 for i in order), axis + 1, rank]
    turned = ctx.r.op("Transpose", dense(ctx, cots), perm=perm)
    rows = ctx.reshape(turned, [*(shape[i] for i in order), out[axis] * out[-1]])
    product = ctx.r.op("MatMul", rows, ctx.r.const(np.ascontiguousarray(matrix.T)))
    lined = ctx.reshape(product, [*(shape[i] for i in order), length, parts])
    back = [int(i) for i in np.argsort(perm)]
    return [Cotangent(ctx.r.op("Transpose", lined, perm=back)), None, None]


def _stft(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Every frame back through the transform of one frame, added up where frames overlap."""
    shape, (batch, frames, *rest) = static_shape(data(node)), static_shape(node.outputs[0])
    step, given, window = integers(node, 1), integers(node, 3), None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        window = constant(node.inputs[2])
        if window is None:
            raise unsupported(node, "computes its window at run time")
    assert step is not None, "the operator asks for it"
    length = given[0] if given else len(window) if window is not None else shape[1]
    if length > LONGEST or (len(shape) > 2 and shape[2] != 1):
        raise unsupported(node, f"is complex or longer than {LONGEST}, which the adjoint rule does not cover")
    inputs: list[np.ndarray] = [
        np.eye(length, dtype=np.float32)[:, :, None],
        np.array(length, np.int64),
        np.zeros(0, np.float32) if window is None else window,
        np.array(length, np.int64),
    ]
    kept = {"onesided": attribute(node, "onesided", 1)}
    matrix = evaluate_node("STFT", inputs, kept, opset=ctx.opset)[0].reshape(length, -1)
    rows = ctx.reshape(dense(ctx, cots), (batch, frames, int(np.prod(rest))))
    product = ctx.r.op("MatMul", rows, ctx.r.const(np.ascontiguousarray(matrix.T)))
    index = (np.arange(frames)[:, None] * step[0] + np.arange(length)).reshape(-1)
    added = scatter_add(ctx, ctx.reshape(product, (batch, frames * length)), (batch, shape[1]), 1, index)
    return [Cotangent(ctx.reshape(added, shape)), None, None, None]


def _col2im(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    """Every element is read where its column has it; zero where that is padding."""
    n, rows, columns = static_shape(data(node))
    image, block = integers(node, 1), integers(node, 2)
    assert image is not None and block is not None, "the operator asks for them"
    rank = len(image)
    ones: Sequence[int] = (1,) * rank
    strides, dilations, pads = (
        [int(v) for v in attribute(node, name, default)]  # type: ignore[attr-defined]
        for name, default in (("strides", ones), ("dilations", ones), ("pads", (0,) * 2 * rank))
    )
    places = []
    for size, k, stride, dilation, before, after in zip(
        image, block, strides, dilations, pads[:rank], pads[rank:], strict=True
    ):
        count = (size + before + after - dilation * (k - 1) - 1) // stride + 1
        at = np.arange(k)[:, None] * dilation + np.arange(count) * stride - before
        places.append(np.where((at >= 0) & (at < size), at, -1))
    total = int(np.prod(image))
    index = np.full((int(np.prod(block)), columns), total)
    for row, inside in enumerate(itertools.product(*(range(k) for k in block))):
        grids = np.meshgrid(*(at[i] for at, i in zip(places, inside, strict=True)), indexing="ij")
        line = np.zeros(grids[0].shape, np.int64)
        for grid, size in zip(grids, image, strict=True):
            line = line * size + grid
        index[row] = np.where(np.all([g >= 0 for g in grids], axis=0), line, total).reshape(-1)
    channels = rows // len(index)
    flat = ctx.reshape(dense(ctx, cots), (n, channels, total))
    padded = ctx.r.op("Pad", flat, ctx.r.const([0] * 7 + [1]))
    taken = ctx.r.op("Gather", padded, ctx.r.const(index.reshape(-1).astype(np.int64)), axis=3)
    return [Cotangent(ctx.reshape(taken, (n, rows, columns))), None, None]


SPECTRAL_RULES: dict[str, Rule] = {"Col2Im": _col2im, "DFT": _dft, "STFT": _stft}
