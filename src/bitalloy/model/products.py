"""Products with constants, written in the one form that runtimes fuse."""

from __future__ import annotations

from collections.abc import Callable

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
