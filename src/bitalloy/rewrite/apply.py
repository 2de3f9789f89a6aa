"""Write the model of a plan: roundings where its schemes put them, and Cast nodes around what computes in a format.

Case 1. The core of a unit that rounds its result: rounded behind its root, for all consumers.
Case 2. Tensors inside a unit that rounds (inner edges, outputs of tail nodes): each rounded; the tail keeps the root's
        scale. Outputs of tail nodes, and case 1, only where the target rounds at both ends (`targets.placement`).
Case 3. A tensor that enters a unit that rounds what it reads: rounded once for each scheme, shared by all its units;
        others read the original.
Case 4. Weights: stored in their format, and read back as float; biases: moved where they have an offset
        (`rewrite.biases`), then INT32 with scale input * weight, in schemes that want them so.
Case 5. Units that compute in another format: `rewrite.cast`, after all roundings stand; these stay in float32, with a
        Cast between. Weights that such a unit stores in a third format are read in the one that it computes in.
Case 6. Units whose kernel rounds what it reads: `rewrite.kernels`. What enters them is not rounded here.
Case 7. Softmax over another axis than the last, computed in float32, its result rounded or not: between two Transposes
        over the last axis, with the same numbers. ONNX Runtime's kernel is several times slower on other axes.

Conditions verified on the way out: the ONNX checker passes; inputs and outputs keep names, types and shapes; the
input model is untouched (it is cloned).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitalloy.core.errors import BitalloyError, ModelError
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.formats import find_format, required_opset
from bitalloy.formats.affine import bias_int32
from bitalloy.formats.base import Format, QuantParams, Rounding, cast_type
from bitalloy.model.load import Graph
from bitalloy.model.metadata import BORDER, SOURCE, TAG
from bitalloy.model.opset import raise_opset
from bitalloy.model.read import attribute, bias_slot, constant, consumers, name_of
from bitalloy.model.weights import save, to_bytes
from bitalloy.model.write import add_initializer, check_model, drop_unread, insert_behind, namer, node_namer
from bitalloy.rewrite.cast import lower
from bitalloy.rewrite.kernels import lower_kernels, mark_kernel
from bitalloy.targets.placement import roundings, touched, weight_site
from bitalloy.targets.recipe import Recipe, stored_form


@dataclass(frozen=True)
class MixedModel:
    """A model that was rewritten so that its units run in the schemes of a plan."""

    model: ir.Model
    units: UnitGraph

    def to_bytes(self) -> bytes:
        """Write the model as a serialized `ModelProto`.

        Raises:
            ModelError: it does not fit into the 2 GB of one message: see `save`.
        """
        return to_bytes(self.model)

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """Write the model, whole or not at all; from 2 GB on with its weights in `<name>.data` beside it."""
        return save(self.model, path)


def write_plan(graph: Graph, recipe: Recipe, plan: Plan, *, kernels: bool = True) -> MixedModel:
    """Rewrite a graph so that every unit of a plan runs in its scheme, and all others as they are.

    Args:
        graph: the model in normal form; not changed.
        recipe: the units of the graph on a target, and how they are rounded.
        plan: unit -> scheme.
        kernels: whether products whose kernel rounds become that kernel; otherwise they are only marked, and
            `lower_kernels` is to follow.

    Raises:
        BitalloyError: a unit is unknown or may not run in its scheme.
        ModelError: the result fails the ONNX checker.
    """
    units, target = recipe.units, recipe.target
    _check(recipe, plan)
    known = {scheme.name: scheme for scheme in units.schemes}
    model = graph.clone()
    for name, value in model.graph.initializers.items():
        value.meta[SOURCE] = (name, BASELINE)
    raise_opset(model, max((required_opset(known[name]) for name in set(plan.values())), default=0))
    writer = _GraphWriter(model, recipe)
    by_id = {u.id: u for u in units.units}
    for unit in units.units:
        for name in (*unit.core, *unit.tail):
            writer.nodes[name].metadata_props[TAG] = unit.id
    writer.shift_biases(plan)
    ends, entries = _borders(units, plan)
    inputs = {use.node: e.root for e in units.edges for use in e.uses if use.slot == 0}
    for unit in units.units:
        scheme = known[plan.scheme_of(unit.id)]
        if scheme.sited:
            writer.unit(unit, scheme, inputs, end=unit.id in ends)
    for edge, rounded in entries:
        writer.enter(edge, rounded)
    for unit in units.units:
        if target.slow_softmax and unit.kind == "Softmax" and not known[plan.scheme_of(unit.id)].cast:
            _softmax_last(writer, writer.nodes[unit.id], unit.id)
    for computed in dict.fromkeys(s.activation for s in units.schemes if s.cast):
        schemes = [s.name for s in units.schemes if s.cast and s.activation == computed]
        members = [by_id[unit] for name in schemes for unit in plan.units_in(name)]
        nodes = {n for u in members for n in (*u.core, *u.tail)}
        lower(model, nodes, cast_type(find_format(computed)), writer.fresh)
    if kernels:
        lower_kernels(model)
    _verify(graph, model)
    return MixedModel(model, units)


def _check(recipe: Recipe, plan: Plan) -> None:
    by_id = {u.id: u for u in recipe.units.units}
    for name, scheme in plan.items():
        if name not in by_id:
            raise BitalloyError(f"The plan names the unit '{name}', which the model does not have.")
        unit = by_id[name]
        if scheme not in unit.allowed:
            lacks = recipe.units.lacks.get(scheme)
            why = unit.reason or unit.refused.get(scheme) or lacks or f"{recipe.target.name} has no {scheme.upper()}"
            raise BitalloyError(f"The plan puts unit '{name}' in {scheme.upper()}, where it cannot run: {why}.")


def _borders(units: UnitGraph, plan: Plan) -> tuple[set[str], list[tuple[UnitEdge, str]]]:
    """List the units that round their result for all readers, and the tensors rounded for a reader, with its scheme."""
    ends, entries = set[str](), []
    for edge, source, sink in touched(units, plan):
        for site in roundings(edge, source, sink):
            if site.end:
                ends.add(str(edge.producer))
            elif not sink.kernel:
                entries.append((edge, site.scheme))
    return ends, entries


class _GraphWriter:
    """Writes roundings into a model, each at its `_Place`."""

    def __init__(self, model: ir.Model, recipe: Recipe) -> None:
        self.graph = model.graph
        self.nodes = {name_of(n): n for n in model.graph}
        self.fresh, self.fresh_node = namer(model), node_namer(model)
        self._recipe = recipe
        self._values = {str(v.name): v for v in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]}
        self._entries: dict[tuple[str, str], ir.Value] = {}
        self._stored: dict[tuple[str, str], ir.Value] = {}
        """A constant and the form in which it is stored -> what is read of it."""

    def unit(self, unit: Unit, scheme: Scheme, inputs: Mapping[str, str], *, end: bool) -> None:
        """Write the roundings inside one unit: cases 1, 2 and 4.

        Args:
            unit: the unit to be rounded.
            scheme: the scheme that it runs in.
            inputs: node -> tensor whose scale its first input has.
            end: whether the unit rounds its result.
        """
        for site in unit.weights if scheme.weight is not None else ():
            entry = None
            if scheme.bias is not None and site.slot == 1:
                _, entry = self._recipe.tensor_params(scheme.name, inputs[site.node])
            self._weight(self.nodes[site.node], site, scheme, entry, unit.id)
            mark_kernel(self.nodes[site.node], scheme)
        for edge in unit.inner if scheme.rounds else ():
            self._pair(edge.tensor, self._recipe.tensor_params(scheme.name, edge.tensor), unit.id)
        if not end:
            return
        rounding = self._recipe.tensor_params(scheme.name, unit.root)
        self._pair(unit.root, rounding, unit.id)
        for name in unit.tail:
            for value in list(self.nodes[name].outputs):
                self._pair(str(value.name), rounding, unit.id)

    def shift_biases(self, plan: Plan) -> None:
        """Add the offsets of a plan's rounded weights to the biases of Conv and Gemm, or to the constants of Adds."""
        offsets = self._recipe.offsets
        for unit in self._recipe.units.units:
            for site in unit.weights if unit.id in plan else ():
                offset = offsets.get(weight_site(site, plan[unit.id]).id)
                if offset is None:
                    continue
                node = self.nodes[offset.node]
                slot = bias_slot(node)
                assert slot is not None, "only constant biases are shifted"
                bias = constant(node.inputs[slot])
                assert bias is not None
                shifted = (bias + np.array(offset.values).reshape(bias.shape)).astype(np.float32)
                node.replace_input_with(slot, self.constant(f"{node.name}/corrected_bias", shifted))

    def enter(self, edge: UnitEdge, scheme: str) -> None:
        """Round a tensor for the consumers of an edge: case 3."""
        key = edge.tensor, scheme
        if key not in self._entries:
            first = edge.uses[0]
            value = self.nodes[first.node].inputs[first.slot]  # rounded already where its producer does so
            assert value is not None, "what is rounded is there"
            rounding = self._recipe.tensor_params(scheme, edge.root)
            self._entries[key] = self._round(value, rounding, BORDER, after=value.producer())
        for use in edge.uses:
            self.nodes[use.node].replace_input_with(use.slot, self._entries[key])

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Store a constant under a name that no tensor has."""
        return add_initializer(self.graph, self.fresh(name), array)

    def _weight(self, node: ir.Node, site: WeightSite, scheme: Scheme, entry: QuantParams | None, unit: str) -> None:
        """Store weights; given `entry`, how the input is stored, a bias becomes integers in steps of input * weight.

        Then the scale of weights grows where the bias would leave int32. Without `entry` it stays float.
        """
        stored = self._recipe.weight(scheme.name, node, site)
        params = stored.params
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None and entry is not None and params is not None:
            integers, steps = bias_int32(bias, entry.scale * params.scale)
            params = replace(params, scale=np.maximum(params.scale, (steps / entry.scale).astype(np.float32)))
            stored = replace(stored, params=params)
            zeros = np.zeros(steps.shape, np.int32)
            grid = QuantParams(scale=steps, zero_point=zeros, qmin=-(2**31), qmax=2**31 - 1, axis=0)
            kept = self.constant(f"{node.name}/bias_{scheme.bias}", integers)
            node.replace_input_with(2, self._read(kept, find_format(scheme.bias), grid, unit))
        form = stored_form(scheme, stored, node, site)
        if (site.tensor, form) not in self._stored:  # or else another node reads the same numbers in the same form
            kept = self.constant(f"{node.name}/weight_{stored.format.name}", stored.numbers)
            self._stored[site.tensor, form] = read = self._read(kept, stored.format, params, unit)
            for value in read.producer().inputs:  # type: ignore[union-attr]
                value.meta[SOURCE] = (site.tensor, form)  # type: ignore[union-attr]
        node.replace_input_with(site.slot, self._stored[site.tensor, form])

    def _pair(self, tensor: str, rounding: tuple[Rounding, QuantParams | None], unit: str) -> None:
        """Round a tensor for all its consumers; a graph output keeps its name on the rounded value."""
        value = self._values[tensor]
        uses = consumers(value)
        rounded = self._round(value, rounding, unit, after=value.producer())
        for use in uses:
            use.node.replace_input_with(use.slot, rounded)
        if value.is_graph_output():
            index = list(self.graph.outputs).index(value)
            rounded.shape, rounded.type = value.shape, value.type
            value.name, rounded.name = self.fresh(f"{tensor}/float"), tensor
            self.graph.outputs[index] = rounded

    def _round(
        self, value: ir.Value, rounding: tuple[Rounding, QuantParams | None], unit: str, *, after: ir.Node | None
    ) -> ir.Value:
        stored, params = rounding
        return stored.write(_Place(self, str(value.name), unit, after), value, params)

    def _read(self, kept: ir.Value, stored: Format, params: QuantParams | None, unit: str) -> ir.Value:
        return stored.write_stored(_Place(self, str(kept.name), unit, None), kept, params)


class _Place:
    """A place of the graph where a format writes: behind a node, or at the start. See `bitalloy.formats.base.Writer`.

    Args:
        writer: the writer of the graph.
        name: start of all names.
        unit: the unit that the nodes belong to.
        after: node behind which they stand; None for the start of the graph.
    """

    def __init__(self, writer: _GraphWriter, name: str, unit: str, after: ir.Node | None) -> None:
        self._writer, self._name, self._unit, self._after = writer, name, unit, after

    def constant(self, array: np.ndarray, role: str) -> ir.Value:
        return self._writer.constant(f"{self._name}/{role}", array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        role: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        made = ir.node(op_type, list(inputs), dict(attributes), name=self._writer.fresh_node(f"{self._name}/{op_type}"))
        made.outputs[0].name = self._writer.fresh(f"{self._name}/{role}")
        made.metadata_props[TAG] = self._unit
        insert_behind(self._writer.graph, self._after, [made])
        self._after = made
        return made.outputs[0]


def _softmax_last(writer: _GraphWriter, node: ir.Node, unit: str) -> None:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None and y.shape is not None
    rank = len(y.shape)
    axis = int(attribute(node, "axis", -1)) % rank  # type: ignore[call-overload]
    if axis == rank - 1 or y.is_graph_output():
        return
    there = [*(i for i in range(rank) if i != axis), axis]
    back = [there.index(i) for i in range(rank)]
    first = ir.node("Transpose", [x], {"perm": there}, name=f"{node.name}/to_last")
    middle = ir.node("Softmax", first.outputs, {"axis": -1}, name=f"{node.name}/over_last")
    last = ir.node("Transpose", middle.outputs, {"perm": back}, name=f"{node.name}/from_last")
    for made in (first, middle, last):
        made.outputs[0].name = writer.fresh(f"{made.name}/output")
        made.metadata_props[TAG] = unit
    writer.graph.insert_before(node, [first, middle, last])
    ir.convenience.replace_all_uses_with(y, last.outputs[0])
    writer.graph.remove(node, safe=True)
    last.outputs[0].name, y.name = y.name, None


def _verify(graph: Graph, model: ir.Model) -> None:
    drop_unread(model.graph)
    for value in [v for node in model.graph for v in node.outputs]:
        if value.dtype is None:
            value.shape = None
    check_model(model)
    before = [(v.name, v.dtype, v.shape) for v in (*graph.model.graph.inputs, *graph.model.graph.outputs)]
    after = [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    if before != after:
        raise ModelError(f"The rewriting changed the model's interface from {before} to {after}.")
