"""Exact measurement: the network executed with chosen sites rounded, all in one session.

Every site gets a gate between 0 and 1. Behind an `If` on that gate lies `x + gate * (round(x) - x)`; with the gate at
0 nothing is computed. So a set of sites is a vector of gates, and a fraction of an error (a point on the path from the
float to the rounded network) is a fractional gate. No session per site, no rewriting between measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.graph import Graph, attribute, constant
from bitalloy.heads import head_of
from bitalloy.matrix import ProbeMatrix
from bitalloy.numerics import QuantParams, activation_params, dequantize, quantize
from bitalloy.records import AGAIN, Edge, Head, Secant, UnitGraph, WeightSite
from bitalloy.runtime import OrtSession
from bitalloy.targets.base import Target, weight_params

GATES = "bitalloy/gates"
FRACTIONS = (0.125, 0.35, 1.0)


class Switchboard:
    """The model with a gate at every site that an INT8 plan could round.

    Args:
        graph: the model in normal form.
        units: its units on the target.
        ranges: tensor -> calibrated (low, high).
        target: decides formats.
    """

    def __init__(
        self, graph: Graph, units: UnitGraph, ranges: Mapping[str, tuple[float, float]], target: Target
    ) -> None:
        model = graph.clone()
        gates = ir.Value(name=GATES, type=ir.TensorType(ir.DataType.FLOAT))
        board = _Board(model, gates, large=graph.large)
        int8 = units.quantizable()
        chosen = [u for u in units.units if u.id in int8]
        for unit in chosen:
            for edge in unit.inner:
                params = activation_params(*ranges[edge.tensor], signed=target.activation_signed)
                board.edge(edge.id, (edge,), params)
        for entry in units.edges:
            if (entry.rooted and entry.producer in int8) or entry.consumer in int8:
                params = activation_params(*ranges[entry.root], signed=target.activation_signed)
                board.edge(entry.id, entry.uses, params)
        # after the edges: the error of a weight is seen on the rounded input
        for unit in chosen:
            for site in unit.weights:
                board.weight(site, weight_params(target, graph.node[site.node], site))
        self.sites = tuple(board.sites)
        self._column = {s: i for i, s in enumerate(self.sites)}
        gates.shape = ir.Shape((len(self.sites),))
        model.graph.inputs.append(gates)
        self._session = OrtSession(model)

    def gates(self, sites: Iterable[str], scale: float = 1.0) -> np.ndarray:
        """Gate vector (sites,) float32 with `scale` at the given sites."""
        vector = np.zeros(len(self.sites), np.float32)
        vector[[self._column[s.removesuffix(AGAIN)] for s in sites]] = scale
        return vector

    def run(self, feeds: Mapping[str, np.ndarray], gates: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs with the gated roundings in place."""
        return self._session.run({**feeds, GATES: gates})


def damage(
    board: Switchboard,
    sets: Sequence[np.ndarray],
    heads: Sequence[Head],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Measured error energies of sets of sites.

    Args:
        board: the switchable model.
        sets: one gate vector per measurement.
        heads: parts of the outputs.
        feeds: samples.
        progress: called with 1 after every execution.

    Returns:
        (samples, heads, sets): ||y_rounded - y||^2 / mean ||y||^2, and (samples, heads): ||y||^2.
    """
    rows, energy = [], []
    silent = np.zeros(len(board.sites), np.float32)
    for sample in feeds:
        exact = [head_of(y, h) for y in [board.run(sample, silent)] for h in heads]
        energy.append([float(np.square(y).sum()) for y in exact])
        errors = []
        for gates in sets:
            found = board.run(sample, gates)
            errors.append([float(np.square(head_of(found, h) - y).sum()) for h, y in zip(heads, exact, strict=True)])
            if progress is not None:
                progress(1)
        rows.append(np.array(errors).T)
    total = np.array(energy)
    return np.stack(rows) / np.maximum(total.mean(axis=0), 1e-30)[None, :, None], total


def secant(
    board: Switchboard,
    matrix: ProbeMatrix,
    sites: frozenset[str],
    heads: Sequence[Head],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Secant:
    """Measure how the outputs bend when all errors grow together.

    Args:
        board: the switchable model.
        matrix: whose first samples are those of `feeds`.
        sites: that the all-INT8 plan rounds.
        heads: parts of the outputs.
        feeds: samples.
        progress: called with 1 after every execution.
    """
    sets = [board.gates(sites, fraction) for fraction in FRACTIONS]
    measured, _ = damage(board, sets, heads, feeds, progress=progress)
    count = len(feeds)
    part = matrix.subset(slice(count))
    linear = part.damage(part.select(sites)).mean(axis=0)
    return Secant(
        heads=matrix.heads,
        fractions=FRACTIONS,
        damage=tuple(tuple(float(d) for d in row) for row in measured.mean(axis=0).T),
        linear=tuple(float(d) for d in linear),
        samples=count,
    )


class _Board:
    """Writes the gates into a model."""

    def __init__(self, model: ir.Model, gates: ir.Value, *, large: bool) -> None:
        self._graph = model.graph
        self._large = large
        self._gates = gates
        self._nodes = {str(n.name): n for n in model.graph}
        self._values = {str(v.name): v for v in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]}
        self.sites: list[str] = []

    def weight(self, site: WeightSite, params: QuantParams) -> None:
        node = self._nodes[site.node]
        before, delta = self._change(site, node, params)
        kept = {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}
        y = node.outputs[0]
        uses = list(y.uses())

        def error() -> list[ir.Node]:
            return [*before, ir.node(node.op_type, [node.inputs[0], delta], attributes=kept)]  # type: ignore[arg-type]

        result = self._gated(site.id, y, error, after=node)
        for user, slot in uses:
            user.replace_input_with(slot, result)

    def _change(self, site: WeightSite, node: ir.Node, params: QuantParams) -> tuple[list[ir.Node], ir.Value]:
        """What rounding changes in a weight: a constant.

        Of a large model only the integers are kept, and nodes that compute the change while its gate is open.
        """
        value = node.inputs[site.slot]
        weight = constant(value)
        assert weight is not None, "weight sites are constants"
        stored = quantize(weight, params)
        if not self._large:
            return [], self._constant(f"{site.id}/delta", dequantize(stored, params) - weight)
        parts = {"int8": stored, "scale": params.scale, "zero_point": params.zero_point}
        constants = [self._constant(f"{site.id}/{name}", array) for name, array in parts.items()]
        dq = ir.node("DequantizeLinear", constants, {} if params.axis is None else {"axis": params.axis})
        change = ir.node("Sub", [dq.outputs[0], value])
        return [dq, change], change.outputs[0]

    def edge(self, site: str, uses: Sequence[Edge], params: QuantParams) -> None:
        x = self._values[uses[0].tensor]
        scale = self._constant(f"{site}/scale", params.scale)
        zero = self._constant(f"{site}/zero_point", params.zero_point)

        def error() -> list[ir.Node]:
            q = ir.node("QuantizeLinear", [x, scale, zero])
            dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero])
            return [q, dq, ir.node("Sub", [dq.outputs[0], x])]

        result = self._gated(site, x, error, after=x.producer())
        for use in uses:
            if use.node:
                self._nodes[use.node].replace_input_with(use.slot, result)
            else:
                self._rename_output(x, result)

    def _gated(self, site: str, x: ir.Value, error: Callable[[], list[ir.Node]], *, after: ir.Node | None) -> ir.Value:
        """`x + gate * error` where the gate is open, `x` where it is shut."""
        number = len(self.sites)
        self.sites.append(site)
        index = self._constant(f"gate/{number}", np.array(number, np.int64))
        gate = ir.node("Gather", [self._gates, index])
        open_ = ir.node("Cast", [gate.outputs[0]], {"to": int(ir.DataType.BOOL)})
        body = error()
        scaled = ir.node("Mul", [body[-1].outputs[0], gate.outputs[0]])
        total = ir.node("Add", [x, scaled.outputs[0]])
        same = ir.node("Identity", [x])
        for position, node in enumerate((gate, open_, *body, scaled, total, same)):
            node.name = f"gate/{number}/{position}"
            for value in node.outputs:
                value.name = f"gate/{number}/{position}/{node.op_type}"
        branches = {}
        for name, nodes in (("then_branch", [*body, scaled, total]), ("else_branch", [same])):
            output = nodes[-1].outputs[0]
            output.type = ir.TensorType(ir.DataType.FLOAT)
            branches[name] = ir.Graph([], [output], nodes=nodes, name=name)
        choice = ir.node("If", [open_.outputs[0]], attributes=branches)
        choice.name = f"gate/{number}/If"
        choice.outputs[0].name = f"{x.name}/gate{number}"
        choice.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        if after is None:
            self._graph.insert_before(self._graph[0], [gate, open_, choice])
        else:
            self._graph.insert_after(after, [gate, open_, choice])
        return choice.outputs[0]

    def _rename_output(self, old: ir.Value, new: ir.Value) -> None:
        index = list(self._graph.outputs).index(old)
        name = old.name
        old.name, new.name = f"{name}/float", name
        new.shape, new.type = old.shape, old.type
        self._graph.outputs[index] = new

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self._graph.register_initializer(value)
        return value
