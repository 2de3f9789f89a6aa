"""Write the mixed-precision model: QuantizeLinear/DequantizeLinear pairs and Cast nodes where a plan rounds.

Case 1. The core of an INT8 unit: a pair after its root, read by all consumers.
Case 2. Tensors inside an INT8 unit (inner edges, outputs of tail nodes): a pair each; the tail keeps the root's scale.
        Cases 1 and 2 do not exist on targets whose kernels round only what they read (`Placement.ENTRY`).
Case 3. A float tensor that enters an INT8 unit: one pair, shared by all INT8 consumers; float ones read the original.
Case 4. Weights: INT8 initializers with DequantizeLinear, per channel; biases: moved where they have an offset
        (`bitalloy.rewrite.biases`), then INT32 with scale input * weight, on targets that want them so.
Case 5. Units in FP16: `halving`, after all pairs stand; these stay in float32, with a Cast between.

Case 6. Softmax over another axis than the last, in float: between two Transposes over the last axis, with the same
        numbers. ONNX Runtime's kernel is several times slower on other axes.

Conditions verified on the way out: the ONNX checker passes; inputs and outputs keep names, types and shapes; the
input model is untouched (it is cloned).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from bitalloy.core.errors import BitalloyError, ModelError
from bitalloy.core.records import HALF, Offset, Placement, Precision, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.formats.affine import QuantParams, bias_int32, quantize
from bitalloy.model.load import Graph, attribute, constant, consumers, name_of
from bitalloy.model.metadata import BORDER, TAG
from bitalloy.model.read import bias_slot
from bitalloy.model.weights import pack, save, to_bytes
from bitalloy.model.write import add_initializer, namer
from bitalloy.rewrite.cast import halve
from bitalloy.targets.base import Target, weight_params


@dataclass(frozen=True)
class Mixed:
    """A rewritten model."""

    model: ir.Model
    units: UnitGraph

    def to_bytes(self) -> bytes:
        """The model as a serialized `ModelProto`.

        Raises:
            ModelError: it does not fit into the 2 GB of one message: see `save`.
        """
        return to_bytes(self.model)

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """Write the model, whole or not at all; from 2 GB on with its weights in `<name>.data` beside it."""
        return save(self.model, path)


def apply(
    graph: Graph,
    units: UnitGraph,
    lowered: frozenset[str],
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    offsets: Mapping[str, Offset] | None = None,
) -> Mixed:
    """Rewrite a graph so that a plan's units run in INT8 or FP16 and all others as they are.

    Args:
        graph: the model in normal form; not changed.
        units: its units on the target.
        lowered: the plan: ids of the units in INT8, and those in FP16 with `HALF` behind.
        ranges: tensor -> calibrated (low, high).
        target: decides formats.
        offsets: weight site -> what is added to a bias where the weight is rounded.

    Raises:
        BitalloyError: a unit is unknown or may not run in its precision.
        ModelError: the result fails the ONNX checker.
    """
    by_id = {u.id: u for u in units.units}
    int8, half = set[str](), set[str]()
    for member in lowered:
        name, precision = member.removesuffix(HALF), Precision.FP16 if member.endswith(HALF) else Precision.INT8
        if name not in by_id:
            raise BitalloyError(f"The plan names the unit '{name}', which the model does not have.")
        unit = by_id[name]
        if precision not in unit.allowed:
            why = unit.half.reason if precision is Precision.FP16 and unit.half else unit.reason
            why = why or f"{target.name} has no {precision.name}"
            raise BitalloyError(f"The plan puts unit '{name}' in {precision.name}, but it must stay float: {why}.")
        (half if precision is Precision.FP16 else int8).add(name)
    if both := int8 & half:
        raise BitalloyError(f"The plan puts unit '{min(both)}' in INT8 and in FP16. Give it one precision.")
    model = graph.clone()
    writer = _Writer(model, ranges, target)
    for unit in units.units:
        for name in (*unit.core, *unit.tail):
            writer.nodes[name].metadata_props[TAG] = unit.id
    for site in (w for u in units.units if u.id in int8 for w in u.weights):
        if offset := (offsets or {}).get(site.id):
            writer.shift(writer.nodes[offset.node], np.array(offset.values))
    inputs = {use.node: e.root for e in units.edges for use in e.uses if use.slot == 0}
    for unit in units.units:
        if unit.id in int8:
            writer.unit(unit, inputs)
    for edge in units.edges:
        entered = edge.consumer in int8 and edge.placement is not Placement.NONE
        if entered and (edge.producer not in int8 or edge.placement is Placement.ENTRY):
            writer.enter(edge)
    for unit in units.units:
        if target.slow_softmax and unit.kind == "Softmax" and unit.id not in int8 and unit.id not in half:
            _softmax_last(writer, writer.nodes[unit.id], unit.id)
    halve(model, {n for name in half for n in (*by_id[name].core, *by_id[name].tail)}, writer.fresh)
    _verify(graph, model)
    return Mixed(model, units)


class _Writer:
    def __init__(self, model: ir.Model, ranges: Mapping[str, tuple[float, float]], target: Target) -> None:
        self.graph = model.graph
        self.nodes = {name_of(n): n for n in model.graph}
        self._values = {str(v.name): v for v in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]}
        self._ranges = ranges
        self._target = target
        self.fresh = namer(model)
        self._entries: dict[str, ir.Value] = {}

    def params(self, tensor: str) -> QuantParams:
        return self._target.activation(*self._ranges[tensor])

    def unit(self, unit: Unit, inputs: Mapping[str, str]) -> None:
        for site in unit.weights:
            entry = self.params(inputs[site.node]) if self._target.int32_bias else None
            self._weight(self.nodes[site.node], site, entry, unit.id)
        for edge in unit.inner:
            self._pair(edge.tensor, self.params(edge.tensor), unit.id)
        if self._target.placement is Placement.ENTRY:
            return
        self._pair(unit.root, self.params(unit.root), unit.id)
        for name in unit.tail:
            for value in list(self.nodes[name].outputs):
                self._pair(str(value.name), self.params(unit.root), unit.id)

    def shift(self, node: ir.Node, offset: np.ndarray) -> None:
        """Add to the bias of a Conv or Gemm, or to the constant of an Add."""
        slot = bias_slot(node)
        assert slot is not None, "only constant biases are shifted"
        bias = constant(node.inputs[slot])
        assert bias is not None
        shifted = (bias + offset.reshape(bias.shape)).astype(np.float32)
        node.replace_input_with(slot, self._constant(f"{node.name}/corrected_bias", shifted))

    def enter(self, edge: UnitEdge) -> None:
        if edge.tensor not in self._entries:
            value = self._values[edge.tensor]
            self._entries[edge.tensor] = self._round(value, self.params(edge.root), BORDER, after=value.producer())
        for use in edge.uses:
            self.nodes[use.node].replace_input_with(use.slot, self._entries[edge.tensor])

    def _weight(self, node: ir.Node, site: WeightSite, entry: QuantParams | None, unit: str) -> None:
        """INT8 weights; given `entry`, how the input is stored, a bias becomes integers in steps of input * weight.

        Then the scale of weights grows where the bias would leave int32. Without `entry` it stays float.
        """
        weight, params = constant(node.inputs[site.slot]), weight_params(self._target, node, site)
        assert weight is not None, "weight sites are constants"
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None and entry is not None:
            stored, steps = bias_int32(bias, entry.scale * params.scale)
            params = replace(params, scale=np.maximum(params.scale, (steps / entry.scale).astype(np.float32)))
            zeros = np.zeros(steps.shape, np.int32)
            grid = QuantParams(scale=steps, zero_point=zeros, qmin=-(2**31), qmax=2**31 - 1, axis=0)
            q = self._constant(f"{node.name}/bias_int32", stored)
            node.replace_input_with(2, self._dequantize(q, grid, unit))
        q = self._constant(f"{node.name}/weight_int8", quantize(weight, params))
        node.replace_input_with(site.slot, self._dequantize(q, params, unit))

    def _pair(self, tensor: str, params: QuantParams, unit: str) -> None:
        """Round a tensor for all its consumers; a graph output keeps its name on the rounded value."""
        value = self._values[tensor]
        uses = consumers(value)
        rounded = self._round(value, params, unit, after=value.producer())
        for use in uses:
            use.node.replace_input_with(use.slot, rounded)
        if value.is_graph_output():
            index = list(self.graph.outputs).index(value)
            rounded.shape, rounded.type = value.shape, value.type
            value.name, rounded.name = self.fresh(f"{tensor}/float"), tensor
            self.graph.outputs[index] = rounded

    def _round(self, value: ir.Value, params: QuantParams, unit: str, *, after: ir.Node | None) -> ir.Value:
        name = str(value.name)
        scale, zero = self._scale(name, params)
        q = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}/QuantizeLinear")
        dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=f"{name}/DequantizeLinear")
        q.outputs[0].name, dq.outputs[0].name = self.fresh(f"{name}/quantized"), self.fresh(f"{name}/dequantized")
        for node in (q, dq):
            node.metadata_props[TAG] = unit
        if after is None:
            first = self.graph[0]
            self.graph.insert_before(first, [q, dq])
        else:
            self.graph.insert_after(after, [q, dq])
        return dq.outputs[0]

    def _scale(self, name: str, params: QuantParams) -> tuple[ir.Value, ir.Value]:
        return self._constant(f"{name}/scale", params.scale), self._constant(f"{name}/zero_point", params.zero_point)

    def _dequantize(self, q: ir.Value, params: QuantParams, unit: str) -> ir.Value:
        name = str(q.name)
        scale, zero = self._scale(name, params)
        attributes = {} if params.axis is None else {"axis": params.axis}
        dq = ir.node("DequantizeLinear", [q, scale, zero], attributes, name=f"{name}/DequantizeLinear")
        dq.outputs[0].name = self.fresh(f"{name}/dequantized")
        dq.metadata_props[TAG] = unit
        self.graph.insert_before(self.graph[0], [dq])
        return dq.outputs[0]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self.graph, self.fresh(name), array)


def _softmax_last(writer: _Writer, node: ir.Node, unit: str) -> None:
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
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        model.graph.initializers.pop(name)
    for value in [v for node in model.graph for v in node.outputs]:
        if value.dtype is None:
            value.shape = None
    try:
        onnx.checker.check_model(pack(model).data)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"The rewritten model fails the ONNX checker: {error}") from error
    before = [(v.name, v.dtype, v.shape) for v in (*graph.model.graph.inputs, *graph.model.graph.outputs)]
    after = [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    if before != after:
        raise ModelError(f"The rewriting changed the model's interface from {before} to {after}.")
