"""Which nodes hand on no gradient because the adjoint does not cover them: known before anything is calibrated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from bitalloy import ops
from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import FLOATING, Rule, Tap, build
from bitalloy.core.errors import UnsupportedOpError
from bitalloy.core.units import Edge
from bitalloy.model.load import Graph
from bitalloy.model.read import name_of


def uncovered(
    graph: Graph,
    heads: Sequence[str],
    tensors: Sequence[str],
    rules: Mapping[str, Rule],
    *,
    stops: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Find the nodes between tensors and heads through which the adjoint cannot go.

    The reverse graph is written, as for probing but with errors of nothing, until it meets no more of them.

    Args:
        graph: the network in normal form.
        heads: tensors from which heads are read.
        tensors: floating-point tensors at which errors may arise.
        rules: operator -> rule.
        stops: nodes through which no gradient is wanted.

    Returns:
        Name of a node -> why, in the words of the error that probing would end with.
    """
    found: dict[str, str] = {}
    while True:
        blocked = stops | found.keys()
        taps = [Tap(t, (Edge(tensor=t, node="", slot=0),), _Copied(t)) for t in _first(graph, set(tensors), blocked)]
        try:
            build(graph, {head: head for head in heads}, taps, rules, stops=blocked)
        except UnsupportedOpError as error:
            found[error.node] = error.what
        else:
            return found


def _first(graph: Graph, tensors: set[str], stops: Collection[str]) -> list[str]:
    """Leave out tensors that vary with others: the ways from those lead through them."""
    reached, found = set[ir.Value](), list[str]()

    def visit(values: Iterable[ir.Value | None]) -> None:
        for value in values:
            if value is not None and value.name in tensors and value not in reached:
                reached.add(value)
                found.append(value.name)

    for node in graph.nodes:
        visit(node.inputs)
        if name_of(node) not in stops and node.op_type not in ops.STEPWISE and reached.intersection(node.inputs):
            reached.update(v for v in node.outputs if v.dtype in FLOATING)
        visit(node.outputs)
    return found


class _Copied:
    """Writes a tensor itself as the error that is made of it: what it is does not matter here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, builder: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        return values[self._name]
