"""Columns of the probe matrix for what a quantized file rounds: `round(x) - x` at every tensor that it rounds.

Its weights lie on their grids in the float form too: what their rounding once lost is not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Tap
from bitalloy.core.units import Edge
from bitalloy.formats import find_rounding
from bitalloy.formats.base import Writer
from bitalloy.model.dequantizer import GivenTensor
from bitalloy.model.load import Graph
from bitalloy.model.read import is_float, moved_from
from bitalloy.sensitivity.columns import Column, ProbeWriter

AT_RUN_TIME = "uint8-dynamic"
KEEPS_GRIDS = ops.MOVERS | {"Relu"}
"""Operators that give numbers of the grid on which their operand lies."""


def given_columns(graph: Graph) -> list[Column]:
    """Return a column for every tensor that a quantized file rounds and its float form has, called like the tensor."""
    quantization = graph.quantization
    grids: dict[str, GivenTensor | None] = dict.fromkeys(sorted(quantization.at_run_time))
    grids |= quantization.tensors
    return [
        Column(name, "given", ("given", name), partial(_tap, tensor=name, grid=grid))
        for name, grid in grids.items()
        if name in graph.value and is_float(graph.value[name]) and not _lies_on(grid, graph.value[name], grids)
    ]


def _lies_on(grid: GivenTensor | None, value: ir.Value, grids: Mapping[str, GivenTensor | None]) -> bool:
    """Tell whether a tensor holds numbers of its grid already, because it is moved from one that is rounded to it."""
    if grid is None:
        return False
    return any(grids.get(str(source.name)) == grid for source in moved_from(value, KEEPS_GRIDS))


def round_given(writer: Writer, x: ir.Value, grid: GivenTensor | None) -> ir.Value:
    """Round a tensor as a quantized file does: to a grid, or to the range that it has at run time without one."""
    if grid is None:
        return find_rounding(AT_RUN_TIME).write(writer, x, None)
    scale, least, most = (
        writer.constant(np.array(number, np.float32), role)
        for number, role in (
            (grid.scale, "scale"),
            (grid.least - grid.zero_point, "least"),
            (grid.most - grid.zero_point, "most"),
        )
    )
    whole = writer.node("Round", [writer.node("Div", [x, scale], "divided")], "steps")
    return writer.node("Mul", [writer.node("Clip", [whole, least, most], "kept"), scale], "rounded")


def _tap(name: str, *, tensor: str, grid: GivenTensor | None) -> Tap:
    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[tensor]
        return p.like("Sub", round_given(ProbeWriter(p), x, grid), x)

    return Tap(name, (Edge(tensor=tensor, node="", slot=0),), error)
