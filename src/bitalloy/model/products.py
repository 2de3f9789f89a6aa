"""Products with constants, written in the one form that runtimes fuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.model.read import attribute, constant
from bitalloy.model.write import add_initializer, namer


def plain_products(model: ir.Model) -> None:
    """Write products with constants in the one form that runtimes fuse.

    Case 1. Factors of a Gemm go into its weights and its bias, where those are constants.
    Case 2. Leading dimensions of size 1 of a constant operand are dropped, where the other has as many dimensions.
    Case 3. A constant bias of a Gemm that is one number, or one row, becomes a vector of one number per column.
    """
    fresh = namer(model)
    for node in model.graph:
        if node.op_type == "Gemm":
            _fold_factors(node, model, fresh)
            _spread_bias(node, model, fresh)
        if node.op_type != "MatMul":
            continue
        weight, left = constant(node.inputs[1]), node.inputs[0]
        rank = len(left.shape) if left is not None and left.shape is not None else 0
        if weight is None or not 2 < weight.ndim <= rank or any(d != 1 for d in weight.shape[:-2]):
            continue
        matrix = np.ascontiguousarray(weight.reshape(weight.shape[-2:]))
        node.replace_input_with(1, add_initializer(model.graph, fresh(f"{node.name}/matrix"), matrix))


def fold_bias(model: ir.Model) -> None:
    """Put what an Add adds to all positions of a channel behind a convolution into its bias."""
    fresh = namer(model)
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        for slot in (0, 1):
            source, added = node.inputs[slot], constant(node.inputs[1 - slot])
            conv = source.producer() if source is not None else None
            if conv is None or added is None or conv.op_type not in ("Conv", "ConvTranspose"):
                continue
            weight = constant(conv.inputs[1])
            own = constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.float32(0)
            alone = source is not None and len(source.uses()) == 1 and not source.is_graph_output()
            if not alone or weight is None or own is None:
                continue
            channels = weight.shape[0] if conv.op_type == "Conv" else weight.shape[1] * int(attribute(conv, "group", 1))  # type: ignore[call-overload]
            behind = (1,) * (weight.ndim - 2)
            if added.ndim > weight.ndim or (added.size > 1 and added.shape[-len(behind) - 1 :] != (channels, *behind)):
                continue
            if added.size not in (1, channels):
                continue
            total = np.broadcast_to(added.reshape(-1) + own, (channels,)).astype(np.float32)
            bias = add_initializer(model.graph, fresh(f"{conv.name}/bias"), np.ascontiguousarray(total))
            absorb(model, conv, node, [*conv.inputs[:2], bias])
            break


def absorb(model: ir.Model, conv: ir.Node, node: ir.Node, operands: Sequence[ir.Value | None]) -> None:
    """Put a convolution with other operands in place of itself and of the only node that reads it."""
    fused = ir.Node(
        "",
        conv.op_type,
        operands,
        attributes=list(conv.attributes.values()),
        name=conv.name,
        metadata_props=dict(conv.metadata_props),
    )
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [fused], [node.outputs[0]], [fused.outputs[0]])
    model.graph.remove(conv, safe=True)


def _fold_factors(node: ir.Node, model: ir.Model, fresh: Callable[[str], str]) -> None:
    alpha, beta = (float(attribute(node, name, 1.0)) for name in ("alpha", "beta"))  # type: ignore[arg-type]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    found = {1: (constant(node.inputs[1]), alpha), 2: (constant(bias), beta if bias is not None else 1.0)}
    if all(factor == 1.0 or array is None for array, factor in found.values()):
        return
    if any(factor != 1.0 and array is None for array, factor in found.values()):
        return
    for slot, (array, factor) in found.items():
        if factor != 1.0 and array is not None:
            with np.errstate(all="ignore"):  # what leaves float32 is refused as infinite
                scaled = (array * np.float32(factor)).astype(np.float32)
            kind = "weight" if slot == 1 else "bias"
            node.replace_input_with(slot, add_initializer(model.graph, fresh(f"{node.name}/scaled_{kind}"), scaled))
    node.attributes["alpha"], node.attributes["beta"] = ir.AttrFloat32("alpha", 1.0), ir.AttrFloat32("beta", 1.0)


def _spread_bias(node: ir.Node, model: ir.Model, fresh: Callable[[str], str]) -> None:
    bias, result = constant(node.inputs[2]) if len(node.inputs) > 2 else None, node.outputs[0].shape
    columns = result[-1] if result is not None else None
    if (
        bias is None
        or not isinstance(columns, int)
        or bias.shape == (columns,)
        or bias.size != max(bias.shape[-1:], default=1)
    ):
        return
    row = np.broadcast_to(bias.reshape(-1), (columns,)).copy()
    node.replace_input_with(2, add_initializer(model.graph, fresh(f"{node.name}/bias"), row))
