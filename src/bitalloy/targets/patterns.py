"""Patterns that several targets know: weighted operators, activations behind them, nodes that only move data."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.schemes import Scheme
from bitalloy.core.units import WeightSite
from bitalloy.formats.float16 import HALF_LARGEST
from bitalloy.model.read import attribute, constant, consumers, is_float, name_of, static_shape
from bitalloy.targets.base import Core, Offer

LEAST_TABLE = 4096
"""Numbers from which on it is worth to store a table in fewer bits."""
NO_WEIGHTS = (
    "only products with a constant matrix, and Gathers from a constant table of "
    f"{LEAST_TABLE} numbers or more, have kernels for weights in blocks, and not {{kind}}"
)


def moves(node: ir.Node) -> bool:
    """Tell whether a node only moves data, so that rounding before and after it are the same."""
    if node.op_type == "Resize":
        inside = attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        return inside and attribute(node, "mode", "nearest") == "nearest"
    if node.op_type == "Gather":
        return constant(node.inputs[1]) is not None
    return node.op_type in ops.MOVERS


def match_weighted(node: ir.Node, *, axis: int) -> Core:
    """Match a node with constant weights, rounded along `axis`, and perhaps a constant bias; otherwise in float."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if constant(node.inputs[1]) is None or (bias is not None and constant(bias) is None):
        return Core(node.op_type, (node,), unfit="weights or bias are computed at run time")
    if bias is not None and len(static_shape(bias)) != 1:
        return Core(node.op_type, (node,), unfit="the bias is not a vector")
    return Core(node.op_type, (node,), weights=(stored_operand(node, 1, axis),))


class Constants(StrEnum):
    """Which constant operands of a MatMul a kernel for rounded numbers takes, and with how many scales."""

    MATRICES = "matrices"
    """One matrix on the right, with a scale for each column."""
    COLUMNS = "columns"
    """Several matrices on the right, too, with a scale for each column that they share."""
    TENSORS = "tensors"
    """Several matrices on the right and constants on the left, too, stored as tensors are: with one scale."""


def match_matmul(node: ir.Node, constants: Constants = Constants.MATRICES) -> Core:
    """Match a product with a constant, or of two activations; in float where the kernel does not take the constant."""
    left, right = node.inputs
    assert left is not None and right is not None
    slot = 0 if constant(left) is not None else 1
    operand = left if slot == 0 else right
    if constant(operand) is None:
        return Core("MatMul", (node,))
    rank = len(static_shape(operand))
    if slot == 0 and constants is not Constants.TENSORS:
        return Core("MatMul", (node,), unfit="the left operand is constant")
    if rank < 2 or (rank > 2 and constants is Constants.MATRICES):
        return Core("MatMul", (node,), unfit="the constant operand is not a matrix")
    axis = None if slot == 0 or (rank > 2 and constants is Constants.TENSORS) else rank - 1
    return Core("MatMul", (node,), weights=(stored_operand(node, slot, axis),))


def match_gemm(node: ir.Node, runtime: str) -> Core:
    """Match a Gemm with constant weights; in float with factors or a transposed input, which no runtime fuses."""
    plain = (
        attribute(node, "transA", 0) == 0
        and attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
    )
    if not plain:
        return Core("Gemm", (node,), unfit=f"{runtime} fuses only alpha = beta = 1 without transA")
    return match_weighted(node, axis=0 if attribute(node, "transB", 0) else 1)


def stored_matrix(core: Core, nodes: Sequence[ir.Node]) -> str:
    """Refuse all but products with a constant matrix."""
    if core.kind in ("Gemm", "MatMul"):
        if core.unfit or not core.weights:
            return core.unfit or NO_WEIGHTS.format(kind=f"this {core.kind} of two tensors")
        return "" if _is_matrix(core) else NO_WEIGHTS.format(kind="a constant on the left, or several matrices")
    return NO_WEIGHTS.format(kind=core.kind)


def _is_matrix(core: Core) -> bool:
    site = core.weights[0]
    value = core.nodes[0].inputs[site.slot]
    return site.slot == 1 and value is not None and len(static_shape(value)) == 2


def match_table(node: ir.Node) -> Core | None:
    """Match a Gather that looks rows up in a constant matrix, such as an embedding of tokens or positions.

    Of a small table nothing would be saved: there, and where the indices are constant, it is no such pattern.
    """
    table = node.inputs[0]
    if node.op_type != "Gather" or table is None or constant(table) is None or constant(node.inputs[1]) is not None:
        return None
    shape = static_shape(table)
    if not is_float(table) or len(shape) != 2 or math.prod(shape) < LEAST_TABLE or attribute(node, "axis", 0) != 0:
        return None
    return Core(
        "Gather", (node,), weights=(stored_operand(node, 0, 0),), unfit="a table is looked up, not computed with"
    )


def stored_table(core: Core, nodes: Sequence[ir.Node]) -> str:
    """Refuse all but tables of rows that a Gather looks up."""
    if core.kind == "Gather" and core.weights:
        return ""
    if core.kind in ("Gemm", "MatMul") and core.weights:
        return f"it is for tables that a Gather looks up alone, and {core.kind} multiplies"
    return NO_WEIGHTS.format(kind=core.kind)


def stored_weights(core: Core, nodes: Sequence[ir.Node]) -> str:
    """Refuse all but products with a constant matrix, and tables of rows that a Gather looks up."""
    return stored_matrix(core, nodes) if stored_table(core, nodes) else ""


def table_by_row(gather: str) -> Offer:
    """Offer tables in INT8 with one scale for each row, in standard ONNX."""
    scheme = Scheme(name="w8-row", weight="int8", gather=gather)
    return Offer(scheme=scheme, refuse=stored_table, usual=False)


def _in_half(core: Core, nodes: Sequence[ir.Node]) -> str:
    if reason := stored_table(core, nodes):
        return reason
    magnitude = float(np.abs(constant(core.nodes[0].inputs[0])).max(initial=0.0))  # type: ignore[arg-type]
    if magnitude > HALF_LARGEST:
        return f"FP16 would overflow: the table has values up to {magnitude:.3g}, and it ends at {HALF_LARGEST:.0f}"
    return ""


TABLES_IN_HALF = Offer(scheme=Scheme(name="w16", weight="float16", gather="Gather"), refuse=_in_half, usual=False)
"""The offer of targets that compute in float: tables in FP16, of which rows become float as they are looked up."""


def divided_depth(core: Core, block: int, runtime: str) -> str:
    """Refuse a product with a stored matrix whose reduction is no multiple of the block."""
    depth, _ = stored_sizes(core)
    if depth % block == 0:
        return ""
    return f"{runtime} takes blocks that divide the reduction, and {block} does not divide {depth}"


def stored_sizes(core: Core) -> tuple[int, int]:
    """Return the length of the reduction and the number of columns of a product with a stored matrix."""
    node, site = core.nodes[0], core.weights[0]
    operand = node.inputs[site.slot]
    assert operand is not None and site.axis is not None, "a stored matrix has channels"
    shape = static_shape(operand)
    return shape[1 - site.axis % 2], shape[site.axis % 2]


def only_reader(value: ir.Value) -> ir.Node | None:
    """Find the node that alone reads a tensor, once; None where it is read otherwise or leaves the graph."""
    uses = consumers(value)
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def silu_of(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """Find the Sigmoid and Mul that make x * Sigmoid(x) of a tensor that nothing else reads; None where they do not."""
    readers = {use.node.op_type: use.node for use in consumers(value)}
    if set(readers) != {"Sigmoid", "Mul"} or len(consumers(value)) != 2 or value.is_graph_output():
        return None
    sigmoid, product = readers["Sigmoid"], readers["Mul"]
    return (sigmoid, product) if only_reader(sigmoid.outputs[0]) is product else None


def stored_operand(node: ir.Node, slot: int, axis: int | None) -> WeightSite:
    """Return a constant operand of a node as a site that is rounded along `axis`, or as a whole."""
    value = node.inputs[slot]
    assert value is not None
    elements = math.prod(static_shape(value))
    return WeightSite(tensor=str(value.name), node=name_of(node), slot=slot, axis=axis, elements=elements)


def has_vnni() -> bool:
    """Tell whether this CPU adds products of uint8 and int8 in 32 bits; x86 without VNNI adds pairs of them in 16.

    Read from the flags that Linux lists, and not by py-cpuinfo: targets ask when they are imported, and that takes a
    second. Where there is no such list, the CPU counts as one without.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and "vnni" in info.read_text()
