"""Columns of the probe matrix: every rounding that a plan on some target could make, as a local error.

Case 1. A tensor on its way into a unit, or inside one: dequantize(quantize(x)) - x.
Case 2. The same where a graph input enters the one Conv that reads it: seen behind that Conv, so that no gradient is
        needed upstream.
Case 3. The output of a Concat that rounds, whose operands are rounded already: rounded once more, on one scale.
Case 4. A weight: seen at the output of its node, which is applied to the weight's error; with the offset that is added
        to the bias where the weight is rounded.
Case 5. A tensor that was rounded where it is made, on its way into a unit that reads another format: what the second
        rounding adds to the first.
Case 6. A unit that computes in another format, all its roundings together, seen at its root: weights and the output of
        every node, and inputs of the graph. Other inputs are taken as they are: in a run of such units what enters a
        unit is rounded where it is made, and counting it again would take one rounding for two. Weights that the unit
        stores in a third format are rounded to that first.

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
from bitalloy.core.schemes import Scheme
from bitalloy.core.units import Edge, Unit, UnitEdge, WeightSite
from bitalloy.formats import find_format
from bitalloy.formats.base import QuantParams, Rounding
from bitalloy.model.load import Graph
from bitalloy.model.masked import masked_tensors
from bitalloy.model.read import attribute, beside_output, constant, is_float, name_of, static_shape
from bitalloy.targets.placement import WEIGHTS, Site, own_sites, possible_sites
from bitalloy.targets.recipe import Recipe


@dataclass(frozen=True)
class Column:
    """One rounding that a plan for one target can make."""

    site: str
    target: str
    key: tuple[object, ...]
    """Key of what is rounded, and how: equal for targets that round alike."""
    tap: Callable[[str], Tap]
    """Function from a name to the tap that adds the column's local error."""


def views(graph: Graph, wanted: Sequence[Recipe]) -> list[dict[str, str]]:
    """Map for every scheme each site to the name of its column in the matrix that `Prober` measures for all of them."""
    return names([columns(graph, scheme) for scheme in wanted])


def columns(graph: Graph, recipe: Recipe) -> list[Column]:
    """Return all columns of a recipe, one per site."""
    units = recipe.units
    found = []
    for scheme in (s for s in units.schemes if s.gated):
        for unit in units.units:
            if scheme.name not in unit.allowed:
                continue
            inner = {e.id: e for e in unit.inner}
            weights = {w.id: w for w in unit.weights}
            for site in own_sites(unit, scheme):
                if site.part == WEIGHTS:
                    found.append(_weight(graph, site, weights[site.place], recipe))
                else:
                    edge = inner[site.place]
                    found.append(_edge(site, (edge,), edge.tensor, recipe))
    roots = {(use.node, use.slot): e.root for e in units.edges for use in e.uses}
    for between in units.edges:
        found += [
            (_again if site.again else _entering)(graph, between, site, roots, recipe)
            for site in possible_sites(units, between)
        ]
    casts = [scheme for scheme in units.schemes if scheme.cast]
    masked = masked_tensors(graph) if casts else frozenset()
    for scheme in casts:
        able = (unit for unit in units.units if scheme.name in unit.allowed)
        found += [_computed(graph, unit, scheme, recipe, masked=unit.root in masked) for unit in able]
    return found


def merge(targets: Sequence[Sequence[Column]]) -> dict[str, Column]:
    """Return name -> column, without repetitions; sites of the first target keep their names, see `names`."""
    found: dict[str, Column] = {}
    for wanted, known in zip(targets, names(targets), strict=True):
        for column in wanted:
            found.setdefault(known[column.site], column)
    return found


def names(targets: Sequence[Sequence[Column]]) -> list[dict[str, str]]:
    """Map for every scheme each site to the name of its column.

    A column that differs from those of earlier targets is named `site on target`; further ranges there get a number.
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


class ProbeWriter:
    """A `bitalloy.formats.base.Writer` for the graph of a probe."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def constant(self, array: np.ndarray, role: str) -> ir.Value:
        return self._builder.const(array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        role: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        return self._builder.op(
            op_type, *inputs, shape=static_shape(inputs[0]) if shape is None else shape, **attributes
        )


def _edge(site: Site, uses: tuple[Edge, ...], root: str, recipe: Recipe, *, leaving: bool = False) -> Column:
    stored, params = recipe.tensor_params(site.scheme, root)
    before = recipe.tensor_params(site.after, root) if site.after else None

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[uses[0].tensor]
        if before is not None:
            x = before[0].write(ProbeWriter(p), x, before[1])
        return p.like("Sub", stored.write(ProbeWriter(p), x, params), x)

    first = _identity(*before) if before is not None else ()
    key = ("edge", *(use.id for use in uses), leaving, *_identity(stored, params), *first)
    return Column(site.id, recipe.target.name, key, lambda name: Tap(name, uses, error, leaving))


def _entering(graph: Graph, edge: UnitEdge, site: Site, roots: Mapping[tuple[str, int], str], recipe: Recipe) -> Column:
    plain = _edge(site, edge.uses, edge.root, recipe, leaving=edge.consumer is None)
    node = graph.node.get(edge.uses[0].node)
    if edge.producer is not None or len(edge.uses) != 1 or node is None or node.op_type != "Conv":
        return plain
    kept = _attributes(node)
    output, weight = node.outputs[0], str(node.inputs[1].name)  # type: ignore[union-attr]
    before = plain.tap(site.id)

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        return p.op("Conv", before.error(p, values), values[weight], shape=static_shape(output), **kept)  # type: ignore[arg-type]

    behind = (Edge(tensor=str(output.name), node="", slot=0),)
    return Column(site.id, recipe.target.name, plain.key, lambda name: Tap(name, behind, error))


def _again(graph: Graph, edge: UnitEdge, site: Site, roots: Mapping[tuple[str, int], str], recipe: Recipe) -> Column:
    node = graph.node[str(edge.producer)]
    stored, out = recipe.tensor_params(site.scheme, edge.root)
    slots = range(len(node.inputs))
    entries = [recipe.tensor_params(site.scheme, roots[str(node.name), slot])[1] for slot in slots]

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        writer = ProbeWriter(p)
        operands = [
            stored.write(writer, values[str(operand.name)], params)  # type: ignore[union-attr]
            for operand, params in zip(node.inputs, entries, strict=True)
        ]
        shape = static_shape(values[edge.tensor])
        joined = p.op("Concat", *operands, axis=int(attribute(node, "axis", 0)), shape=shape)  # type: ignore[call-overload]
        return p.like("Sub", stored.write(writer, joined, out), joined)

    key = ("again", edge.id, *(part for params in (*entries, out) for part in _identity(stored, params)))
    leaving = edge.consumer is None
    return Column(site.id, recipe.target.name, key, lambda name: Tap(name, edge.uses, error, leaving=leaving))


def _weight(graph: Graph, site: Site, weight_site: WeightSite, recipe: Recipe) -> Column:
    """Make the column of a weight (case 4): its error is a constant.

    Of a large model it is computed at every run instead, so that only the stored numbers are kept beside the weight.
    """
    node = graph.node[weight_site.node]
    weight = constant(node.inputs[weight_site.slot])
    assert weight is not None
    stored = recipe.weight(site.scheme, node, weight_site)
    offset = recipe.offsets.get(site.id)
    kept, output = _attributes(node), node.outputs[0]

    def tap(name: str) -> Tap:
        delta = None if graph.large else stored.rounded - weight
        encoded = stored.numbers if graph.large else None

        def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
            if delta is not None:
                change = p.const(delta)
            else:
                assert encoded is not None
                original = values[weight_site.tensor]
                change = p.like(
                    "Sub", stored.format.write_stored(ProbeWriter(p), p.const(encoded), stored.params), original
                )
            read = [values[str(v.name)] for v in node.inputs[:2]]  # type: ignore[union-attr]
            read[weight_site.slot] = change
            made = p.op(node.op_type, *read, shape=static_shape(output), **kept)  # type: ignore[arg-type]
            if offset is None:
                return made
            return p.like("Add", made, p.const(beside_output(node, np.array(offset.values, np.float32))))

        return Tap(name, (Edge(tensor=str(output.name), node="", slot=0),), error)

    key = ("weight", weight_site.id, offset, stored.digest, *_identity(stored.format, stored.params))
    return Column(site.id, recipe.target.name, key, tap)


def _computed(graph: Graph, unit: Unit, scheme: Scheme, recipe: Recipe, *, masked: bool) -> Column:
    nodes = [graph.node[name] for name in unit.core]
    inputs = {str(v.name) for v in graph.model.graph.inputs}
    stored = find_format(scheme.activation)
    kept = {w.tensor: _Kept(graph, w, scheme, recipe) for w in unit.weights if scheme.weights_only}

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        writer = ProbeWriter(p)
        known: dict[str, ir.Value] = {}

        def read(value: ir.Value | None) -> ir.Value | None:
            if value is None or not is_float(value):
                return None if value is None else values[str(value.name)]
            name, array = str(value.name), constant(value)
            if name not in known:
                if name in kept:
                    known[name] = kept[name].write(writer, values[name])
                elif array is not None and not graph.large:
                    known[name] = p.const(stored.reference(array, None))
                elif array is not None or name in inputs:
                    known[name] = stored.write(writer, values[name], None)
                else:
                    known[name] = values[name]
            return known[name]

        for node in nodes:
            y, full = node.outputs[0], ops.full_slots(node.op_type)
            given = [
                values[str(v.name)] if v is not None and slot in full else read(v) for slot, v in enumerate(node.inputs)
            ]
            made = p.op(node.op_type, *given, shape=static_shape(y), **_attributes(node))  # type: ignore[arg-type]
            known[str(y.name)] = stored.write(writer, made, None)
        error = p.like("Sub", known[unit.root], values[unit.root])
        if masked:  # what is infinite stays so
            infinite = p.like("IsInf", values[unit.root])
            error = p.op("Where", infinite, p.const(np.zeros((), np.float32)), error, shape=static_shape(error))
        return error

    place = (Edge(tensor=unit.root, node="", slot=0),)
    key = (scheme.activation, *(part for k in kept.values() for part in k.identity), *map(name_of, nodes))
    (site,) = own_sites(unit, scheme)
    return Column(site.id, recipe.target.name, key, lambda name: Tap(name, place, error))


class _Kept:
    """A weight that a unit stores in another format than it computes in (case 6)."""

    def __init__(self, graph: Graph, site: WeightSite, scheme: Scheme, recipe: Recipe) -> None:
        self._large, self._stored = graph.large, recipe.weight(scheme.name, graph.node[site.node], site)
        # a kernel widens weights where it multiplies; without one they are numbers of the format before that
        self._made = None if scheme.kernel else find_format(scheme.activation)

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from the same weight stored otherwise."""
        return self._stored.digest, *_identity(self._stored.format, self._stored.params)

    def write(self, writer: ProbeWriter, value: ir.Value) -> ir.Value:
        """Write the weight as the unit multiplies by it; of a large model from the stored numbers, at every run."""
        kept = self._stored
        if self._large:
            stored = writer.constant(kept.numbers, "stored")
            read = kept.format.write_stored(writer, stored, kept.params)
            return read if self._made is None else self._made.write(writer, read, None)
        weight = kept.rounded
        return writer.constant(weight if self._made is None else self._made.reference(weight, None), "read")


def _attributes(node: ir.Node) -> dict[str, object]:
    return {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}


def _identity(stored: Rounding, params: QuantParams | None) -> tuple[object, ...]:
    """Turn a format with its parameters into something that can be compared."""
    if params is None:
        return (stored.name,)
    zero = np.asarray(params.zero_point)
    return params.scale.tobytes(), zero.tobytes(), str(zero.dtype), params.axis, params.block
