"""Gates: roundings that are switched at run time.

Every site gets a gate between 0 and 1. Behind an `If` on that gate lies `x + gate * (round(x) - x)`; with the gate at
0 nothing is computed. So a set of sites is a vector of gates, and a fraction of an error (a point on the path from the
float to the rounded network) is a fractional gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from bitalloy.core.units import Edge, Offset, WeightSite
from bitalloy.formats.base import QuantParams, Rounding
from bitalloy.model.read import attribute, beside_output, constant
from bitalloy.model.write import add_initializer, insert_behind
from bitalloy.targets.stored import StoredWeight

GATES = "bitalloy/gates"
LEAVING = "bitalloy/rounded/"
"""Prefix of a graph output's name for the tensor as it leaves the graph, apart from what other nodes read."""


class Gatekeeper:
    """Writes gates into a model. Call `edge` before `weight`: the error of a weight is seen on the rounded input.

    Args:
        model: the model, which is changed in place.
        large: whether to keep only the stored numbers of weights, and compute their errors while gates are open.
    """

    def __init__(self, model: ir.Model, *, large: bool) -> None:
        self._graph = model.graph
        self._large = large
        self._gates = ir.Value(name=GATES, type=ir.TensorType(ir.DataType.FLOAT))
        self._nodes = {str(n.name): n for n in model.graph}
        self._values = {str(v.name): v for v in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]}
        self._leaving: dict[str, ir.Value] = {}
        """Output of the graph -> what leaves in its place."""
        self._count = 0

    def close(self) -> None:
        """Add the vector of gates to the model's inputs."""
        self._gates.shape = ir.Shape((self._count,))
        self._graph.inputs.append(self._gates)

    def weight(self, site: WeightSite, stored: StoredWeight, offset: Offset | None = None) -> None:
        """Add a gate on the error of a weight and its bias offset, which are seen at the output of its node."""
        node = self._nodes[site.node]
        before, delta = self._change(node.inputs[site.slot], stored)
        kept = {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}
        y = node.outputs[0]
        uses = list(y.uses())
        shift = None
        if offset is not None:
            values = beside_output(node, np.array(offset.values, np.float32))
            shift = self.constant(f"gate/{self._count}/offset", values)

        def error() -> list[ir.Node]:
            read = list(node.inputs[:2])
            read[site.slot] = delta
            made = ir.node(node.op_type, read, attributes=kept)  # type: ignore[arg-type]
            moved = [] if shift is None else [ir.node("Add", [made.outputs[0], shift])]
            return [*before, made, *moved]

        result = self._gated(y, error, after=node)
        for user, slot in uses:
            user.replace_input_with(slot, result)
        if y in self._graph.outputs:
            self._graph.outputs[list(self._graph.outputs).index(y)] = result
            name = y.name
            y.name, result.name = f"{name}/float", name
            result.shape = y.shape

    def _change(self, value: ir.Value | None, stored: StoredWeight) -> tuple[list[ir.Node], ir.Value]:
        """Compute what rounding changes in a weight, and return it with the nodes that compute it."""
        weight = constant(value)
        assert weight is not None, "weight sites are constants"
        body = _Body(self, f"gate/{self._count}")
        if not self._large:
            return [], body.constant(stored.rounded - weight, "delta")
        kept = stored.format.write_stored(body, body.constant(stored.numbers, "stored"), stored.params)
        change = ir.node("Sub", [kept, value])
        return [*body.nodes, change], change.outputs[0]

    def edge(self, uses: Sequence[Edge], stored: Rounding, params: QuantParams | None) -> None:
        """Add a gate on a tensor where some inputs of nodes read it, or where it leaves the graph."""
        first = uses[0]
        x = self._leaving.get(first.tensor) or self._values[first.tensor]
        if first.node:
            given = self._nodes[first.node].inputs[first.slot]
            assert given is not None, "what is rounded is there"
            x = given
        body = _Body(self, f"gate/{self._count}")

        def error() -> list[ir.Node]:
            rounded = stored.write(body, x, params)
            return [*body.nodes, ir.node("Sub", [rounded, x])]

        result = self._gated(x, error, after=x.producer())
        for use in uses:
            if use.node:
                self._nodes[use.node].replace_input_with(use.slot, result)
                continue
            if use.tensor in self._leaving:
                self._leaving[use.tensor].name = f"{result.name}/before"
                self._graph.outputs.remove(self._leaving[use.tensor])
            result.name, result.shape = LEAVING + use.tensor, x.shape
            self._graph.outputs.append(result)
            self._leaving[use.tensor] = result

    def _gated(self, x: ir.Value, error: Callable[[], list[ir.Node]], *, after: ir.Node | None) -> ir.Value:
        """Write `x + gate * error` where the gate is open, `x` where it is shut."""
        number, self._count = self._count, self._count + 1
        index = self.constant(f"gate/{number}", np.array(number, np.int64))
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
        choice.outputs[0].type, choice.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), x.shape
        insert_behind(self._graph, after, [gate, open_, choice])
        return choice.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer to the graph, and return its value."""
        return add_initializer(self._graph, name, array)


class _Body:
    """A `bitalloy.formats.base.Writer` that collects the nodes of a gate.

    Args:
        keeper: to whose graph constants go.
        name: start of their names.
    """

    def __init__(self, keeper: Gatekeeper, name: str) -> None:
        self._keeper, self._name = keeper, name
        self.nodes: list[ir.Node] = []

    def constant(self, array: np.ndarray, role: str) -> ir.Value:
        return self._keeper.constant(f"{self._name}/{role}", array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        role: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        made = ir.node(op_type, list(inputs), attributes=dict(attributes))
        self.nodes.append(made)
        return made.outputs[0]
