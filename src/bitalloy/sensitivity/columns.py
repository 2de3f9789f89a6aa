"""Columns of the probe matrix: every rounding that a plan on some target could make, as a local error.

Case 1. A tensor on its way into a unit, or inside one: dequantize(quantize(x)) - x.
Case 2. The same where a graph input enters the one Conv that reads it: seen behind that Conv, so that no gradient is
        needed upstream.
Case 3. The output of an INT8 Concat, whose operands are rounded already: rounded once more, on one scale.
Case 4. A weight: seen at the output of its node, which is applied to the weight's error; with the offset that is added
        to the bias where the weight is rounded.
Case 5. A unit in FP16, all its roundings together, seen at its root: weights and the output of every node, and inputs
        of the graph. Other inputs are taken as they are: in a run of FP16 units what enters a unit is rounded where it
        is made, and counting it again would take one rounding for two.

Columns are told apart by what they round and how. Targets that round a site alike share the column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Tap
from bitalloy.core.records import AGAIN, HALF, Edge, Offset, Precision, Unit, UnitEdge, WeightSite
from bitalloy.formats.affine import QuantParams, dequantize, fake_fp16, quantize
from bitalloy.model.load import Graph, attribute, constant, is_float, name_of, static_shape
from bitalloy.model.read import beside_output
from bitalloy.targets.base import Target, weight_params
from bitalloy.targets.recipe import Ranges, Recipe


@dataclass(frozen=True)
class Column:
    """One rounding of one target."""

    site: str
    target: str
    key: tuple[object, ...]
    """What is rounded, and how: equal for targets that do the same."""
    tap: Callable[[str], Tap]
    """Makes its local error under a name."""


def views(graph: Graph, wanted: Sequence[Recipe]) -> list[dict[str, str]]:
    """For every scheme: site -> name of its column in the matrix that `Prober` measures for all of them."""
    return names([columns(graph, scheme) for scheme in wanted])


def columns(graph: Graph, scheme: Recipe) -> list[Column]:
    """All columns of a scheme, one per site."""
    units, target, ranges = scheme.units, scheme.target, scheme.ranges
    int8 = units.quantizable()
    found = []
    for unit in units.units:
        if unit.id in int8:
            found += [_edge(e.id, (e,), e.tensor, ranges, target) for e in unit.inner]
            found += [_weight(graph, site, target, scheme.offsets.get(site.id)) for site in unit.weights]
    roots = {(use.node, use.slot): e.root for e in units.edges for use in e.uses}
    for edge in units.edges:
        if edge.rounds(int8) and (edge.consumer in int8 or not edge.passed_on):
            found.append(_entering(graph, edge, ranges, target))
        if edge.passed_on and edge.producer in int8:
            found.append(_again(graph, edge, roots, ranges, target))
    found += [_half(graph, u, target) for u in units.units if Precision.FP16 in u.allowed]
    return found


def merge(targets: Sequence[Sequence[Column]]) -> dict[str, Column]:
    """Column by name, without repetitions: sites of the first target keep their names, see `names`."""
    found: dict[str, Column] = {}
    for wanted, known in zip(targets, names(targets), strict=True):
        for column in wanted:
            found.setdefault(known[column.site], column)
    return found


def names(targets: Sequence[Sequence[Column]]) -> list[dict[str, str]]:
    """For every scheme: site -> name of its column.

    What differs from a former one's is `site on target`; further ranges on that target get a number.
    """
    taken: set[str] = set()
    name_of_key: dict[tuple[object, ...], str] = {}
    result = []
    for wanted in targets:
        for column in wanted:
            if column.key not in name_of_key:
                own, number = f"{column.site} on {column.target}", 2
                name = column.site if column.site not in taken else own
                while name in taken:
                    name, number = f"{own} {number}", number + 1
                taken.add(name)
                name_of_key[column.key] = name
        result.append({c.site: name_of_key[c.key] for c in wanted})
    return result


def _edge(
    site: str, uses: tuple[Edge, ...], root: str, ranges: Ranges, target: Target, *, leaving: bool = False
) -> Column:
    params = target.activation(*ranges[root])

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[uses[0].tensor]
        return p.like("Sub", _rounded(p, x, params), x)

    key = ("edge", *(use.id for use in uses), leaving, *_format(params))
    return Column(site, target.name, key, lambda name: Tap(name, uses, error, leaving))


def _entering(graph: Graph, edge: UnitEdge, ranges: Ranges, target: Target) -> Column:
    plain = _edge(edge.id, edge.uses, edge.root, ranges, target, leaving=edge.consumer is None)
    node = graph.node.get(edge.uses[0].node)
    if edge.producer is not None or len(edge.uses) != 1 or node is None or node.op_type != "Conv":
        return plain
    kept = _attributes(node)
    output, weight = node.outputs[0], str(node.inputs[1].name)  # type: ignore[union-attr]
    before = plain.tap(edge.id)

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        return p.op("Conv", before.error(p, values), values[weight], shape=static_shape(output), **kept)  # type: ignore[arg-type]

    behind = (Edge(tensor=str(output.name), node="", slot=0),)
    return Column(edge.id, target.name, plain.key, lambda name: Tap(name, behind, error))


def _again(
    graph: Graph, edge: UnitEdge, roots: Mapping[tuple[str, int], str], ranges: Ranges, target: Target
) -> Column:
    node = graph.node[str(edge.producer)]
    out = target.activation(*ranges[edge.root])
    entries = [target.activation(*ranges[roots[str(node.name), slot]]) for slot in range(len(node.inputs))]

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        operands = [
            _rounded(p, values[str(operand.name)], params)  # type: ignore[union-attr]
            for operand, params in zip(node.inputs, entries, strict=True)
        ]
        shape = static_shape(values[edge.tensor])
        joined = p.op("Concat", *operands, axis=int(attribute(node, "axis", 0)), shape=shape)  # type: ignore[call-overload]
        return p.like("Sub", _rounded(p, joined, out), joined)

    key = ("again", edge.id, *(part for params in (*entries, out) for part in _format(params)))
    return Column(
        edge.id + AGAIN, target.name, key, lambda name: Tap(name, edge.uses, error, leaving=edge.consumer is None)
    )


def _weight(graph: Graph, site: WeightSite, target: Target, offset: Offset | None) -> Column:
    """Case 4. The error is a constant.

    Of a large model it is computed at every run instead, so that only the integers are kept beside the weight.
    """
    node = graph.node[site.node]
    weight = constant(node.inputs[site.slot])
    assert weight is not None
    params = weight_params(target, node, site)
    kept, output = _attributes(node), node.outputs[0]

    def tap(name: str) -> Tap:
        rounded = quantize(weight, params)
        delta = None if graph.large else dequantize(rounded, params) - weight

        def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
            x = values[str(node.inputs[0].name)]  # type: ignore[union-attr]
            change = p.const(delta) if delta is not None else _change(p, values[site.tensor], rounded, params)
            made = p.op(node.op_type, x, change, shape=static_shape(output), **kept)  # type: ignore[arg-type]
            if offset is None:
                return made
            return p.like("Add", made, p.const(beside_output(node, np.array(offset.values, np.float32))))

        return Tap(name, (Edge(tensor=str(output.name), node="", slot=0),), error)

    return Column(site.id, target.name, ("weight", site.id, offset, *_format(params)), tap)


def _half(graph: Graph, unit: Unit, target: Target) -> Column:
    nodes = [graph.node[name] for name in unit.core]
    inputs = {str(v.name) for v in graph.model.graph.inputs}

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        known: dict[str, ir.Value] = {}

        def read(value: ir.Value | None) -> ir.Value | None:
            if value is None or not is_float(value):
                return None if value is None else values[str(value.name)]
            name, array = str(value.name), constant(value)
            if name not in known:
                if array is not None and not graph.large:
                    known[name] = p.const(fake_fp16(array))
                elif array is not None or name in inputs:
                    known[name] = _half_of(p, values[name])
                else:
                    known[name] = values[name]
            return known[name]

        for node in nodes:
            y, full = node.outputs[0], ops.full_slots(node.op_type)
            given = [
                values[str(v.name)] if v is not None and slot in full else read(v) for slot, v in enumerate(node.inputs)
            ]
            made = p.op(node.op_type, *given, shape=static_shape(y), **_attributes(node))  # type: ignore[arg-type]
            known[str(y.name)] = _half_of(p, made)
        return p.like("Sub", known[unit.root], values[unit.root])

    place = (Edge(tensor=unit.root, node="", slot=0),)
    key = ("fp16", *map(name_of, nodes))
    return Column(unit.id + HALF, target.name, key, lambda name: Tap(name, place, error))


def _half_of(p: Builder, x: ir.Value) -> ir.Value:
    """What is left of a tensor in FP16."""
    half = p.like("Cast", x, to=int(ir.DataType.FLOAT16))
    return p.like("Cast", half, to=int(ir.DataType.FLOAT))


def _rounded(p: Builder, x: ir.Value, params: QuantParams) -> ir.Value:
    """dequantize(quantize(x)), by the runtime's own operators."""
    scale, zero = p.const(params.scale), p.const(params.zero_point)
    q = p.op("QuantizeLinear", x, scale, zero, shape=static_shape(x))
    return p.op("DequantizeLinear", q, scale, zero, shape=static_shape(x))


def _change(p: Builder, weight: ir.Value, rounded: np.ndarray, params: QuantParams) -> ir.Value:
    """dequantize(integers) - weight."""
    axis = {} if params.axis is None else {"axis": params.axis}
    scale, zero = p.const(params.scale), p.const(params.zero_point)
    return p.like("Sub", p.like("DequantizeLinear", p.const(rounded), scale, zero, **axis), weight)


def _attributes(node: ir.Node) -> dict[str, object]:
    return {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}


def _format(params: QuantParams) -> tuple[object, ...]:
    """A format as something that can be compared."""
    zero = params.zero_point
    return params.scale.tobytes(), zero.tobytes(), str(zero.dtype), params.axis
