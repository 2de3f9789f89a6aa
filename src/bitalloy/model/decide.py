"""What a file leaves to be decided at run time, although it is known when it is loaded.

Case 1. `If` whose condition is a constant, which often follows from shapes, or from an input that always has the same
        value, such as a sampling rate: the chosen branch takes its place.
Case 2. `Loop` whose number of turns is a constant, and `Scan`: the body is written once for every turn.
Case 3. Sequences whose elements and positions are known: their tensors are read directly.
Case 4. `If` whose condition follows from the data: both branches are written, and `Where` takes the results of one.

Anything else of the kind stays as it is, and is refused later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
    TopologicalSortPass,
)

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.fold import fold_constants
from bitalloy.model.read import attribute, constant, static_shape
from bitalloy.model.write import Fresh, add_initializer, namer

MOST_NODES = 4096
"""Largest number of nodes that are written for one loop."""
_WHOLE = frozenset(int(t) for t in ir.DataType if t.name == "BOOL" or (t.is_integer() and t.bitwidth >= 8))
"""Types of inputs that decide something."""


def has_undecided(proto: onnx.ModelProto) -> bool:
    """Tell whether a file has branches, loops or sequences."""
    nodes = (*proto.graph.node, *(node for function in proto.functions for node in function.node))
    return any(node.op_type in ops.CONTROL_FLOW | ops.SEQUENCE for node in nodes)


def deciding_inputs(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the inputs of integers or truth values from which follows what a branch or a loop of a file does.

    Inputs are followed through the nodes of the graph itself, not into the graphs that its nodes run.
    """
    made = {name: node for node in proto.graph.node for name in node.output}
    weights = {t.name for t in proto.graph.initializer}
    whole = {v.name for v in proto.graph.input if v.type.tensor_type.elem_type in _WHOLE and v.name not in weights}
    left = [name for node in proto.graph.node if node.op_type in ("If", "Loop") for name in node.input[:2]]
    seen: set[str] = set()
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left.extend(made[name].input if name in made else ())
    return tuple(v.name for v in proto.graph.input if v.name in seen & whole)


def decided(proto: onnx.ModelProto, fixed: Mapping[str, int] | None = None) -> tuple[onnx.ModelProto, bool]:
    """Return a model in which is decided what can be, together with the constants and shapes that follow from it.

    The second result tells whether both branches of some `If` are executed now.

    Args:
        proto: the model with its weights; not changed.
        fixed: inputs of one element that always have this value. They stay inputs, which nothing reads.

    Raises:
        ModelError: a part without inputs cannot be evaluated, or an input with such a value is unknown.
    """
    model = ir.serde.deserialize_model(proto)
    _fix(model, fixed or {})
    chosen: list[tuple[str, ir.Node]] = []
    while True:
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        TopologicalSortPass()(model)
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        if decide(model) or fold_constants(model):
            continue
        if not (made := _choose(model)):
            break
        chosen += made
    _refuse_unequal(chosen)
    RemoveUnusedNodesPass()(model)
    made = ir.serde.serialize_model(model)
    del made.graph.value_info[:]  # inference calls a sequence what its elements are
    return made, bool(chosen)


def decide(model: ir.Model) -> bool:
    """Write branches, loops and sequences as plain nodes, in place, where that is possible.

    Args:
        model: a model whose constants are initializers, with the shapes that are known.

    Returns:
        Whether anything changed. Identity nodes stand where results are handed on, and further shapes may be known now.
    """
    changed = False
    for node in list(model.graph):
        if node.graph is model.graph and node.op_type in ("If", "Loop", "Scan"):
            results = _Paste(model, node).results()
            if results is not None:
                _replace(model, node, results)
                changed = True
    return _Sequences(model).resolved() or changed


def _fix(model: ir.Model, fixed: Mapping[str, int]) -> None:
    """Let constants be read in place of inputs."""
    inputs, fresh = {str(v.name): v for v in model.graph.inputs}, namer(model)
    for name, number in fixed.items():
        value = inputs.get(name)
        if value is None or value.dtype is None:
            raise ModelError(f"No input called '{name}' to fix; the model's inputs are {list(inputs)}.")
        array = np.full([1] * len(value.shape or ()), number, value.dtype.numpy())
        ir.convenience.replace_all_uses_with(value, add_initializer(model.graph, fresh(f"{name}/fixed"), array))


def _choose(model: ir.Model) -> list[tuple[str, ir.Node]]:
    """Write both branches of each `If` that is left; returns its name with each node that chooses of their results."""
    chosen: list[tuple[str, ir.Node]] = []
    for node in list(model.graph):
        if node.op_type == "If":
            results = _Paste(model, node).either()
            chosen += [(str(node.name), made) for value in results if (made := value.producer()) is not None]
            _replace(model, node, results)
    return chosen


def _refuse_unequal(chosen: Sequence[tuple[str, ir.Node]]) -> None:
    """Refuse results of two branches whose shapes are not known to be equal: what is chosen would be repeated."""
    for name, node in chosen:
        shapes = [value.shape for value in node.inputs[1:] if value is not None]
        if None in shapes or shapes[0] != shapes[1]:
            raise ModelError(
                f"Control flow is not supported: the data decides which branch of node '{name}' (If) runs, and their "
                f"results have the shapes {shapes[0]} and {shapes[1]}. Give fixed sizes with --shape, or export the "
                "model without the branch."
            )


def refuse_undecided(model: ir.Model) -> None:
    """Refuse branches, loops and sequences that are left.

    Raises:
        ModelError: the message names the node.
    """
    for node in model.graph:
        label = f"node '{node.name}' ({node.op_type})"
        if node.op_type in ops.CONTROL_FLOW:
            raise ModelError(
                f"Control flow is not supported: what {label} does is not known before it runs. Export with fixed "
                "shapes so that it is traced away."
            )
        if node.op_type in ops.SEQUENCE:
            raise ModelError(
                f"{label.capitalize()} works on a sequence whose tensors or positions are not known before it runs. "
                "Export with fixed shapes, and with tensors in place of lists."
            )


class _Paste:
    """Writes the graphs that a node runs in front of it."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self._model, self._node = model, node
        self._fresh = namer(model)

    def results(self) -> list[ir.Value] | None:
        """The values that are the results of the node; None where it stays as it is."""
        kind = {"If": self._branch, "Loop": self._loop, "Scan": self._scan}
        return kind[self._node.op_type]()

    def _branch(self) -> list[ir.Value] | None:
        condition = constant(self._node.inputs[0])
        if condition is None:
            return None
        name = "then_branch" if condition.item() else "else_branch"
        return self._paste(self._node.attributes[name].as_graph(), [])

    def either(self) -> list[ir.Value]:
        """The results of both branches of an `If`, of which its condition chooses."""
        scalar = add_initializer(self._model.graph, self._fresh(f"{self._node.name}/scalar"), np.zeros(0, np.int64))
        condition = self._made("Reshape", [self._node.inputs[0], scalar])
        then, other = (
            self._paste(self._node.attributes[name].as_graph(), []) for name in ("then_branch", "else_branch")
        )
        return [self._made("Where", [condition, a, b]) for a, b in zip(then, other, strict=True)]

    def _loop(self) -> list[ir.Value] | None:
        body = self._node.attributes["body"].as_graph()
        turns, condition = (constant(v) for v in self._node.inputs[:2])
        unasked = self._node.inputs[1] is None or (condition is not None and condition.item())
        if turns is None or not unasked or not _goes_on(body) or turns.item() * len(body) > MOST_NODES:
            return None
        going = add_initializer(self._model.graph, self._fresh(f"{self._node.name}/goes on"), np.array(True))
        states: list[ir.Value] = [v for v in self._node.inputs[2:] if v is not None]
        rows: list[list[ir.Value]] = [[] for _ in body.outputs[1 + len(states) :]]
        if rows and turns.item() < 1:
            return None  # nothing tells the shape of an empty result
        for turn in range(turns.item()):
            number = add_initializer(
                self._model.graph, self._fresh(f"{self._node.name}/turn"), np.array(turn, np.int64)
            )
            _, *after = self._paste(body, [number, going, *states])
            states, results = after[: len(states)], after[len(states) :]
            for row, result in zip(rows, results, strict=True):
                row.append(result)
        return [*states, *(self._stacked(row, 0) for row in rows)]

    def _scan(self) -> list[ir.Value] | None:
        node, body = self._node, self._node.attributes["body"].as_graph()
        count = int(attribute(node, "num_scan_inputs", 0))  # type: ignore[call-overload]
        first, streams = list(node.inputs[: len(node.inputs) - count]), list(node.inputs[len(node.inputs) - count :])
        results = len(body.outputs) - len(first)
        into, out = self._axes("input", count), self._axes("output", results)
        if any(v is None or v.shape is None or not v.shape.is_static() for v in streams) or None in first:
            return None
        axes = [axis % len(static_shape(v)) for v, (axis, _) in zip(streams, into, strict=True) if v is not None]
        turns = static_shape(streams[0])[axes[0]]  # type: ignore[arg-type]
        if not 0 < turns * len(body) <= MOST_NODES:
            return None
        states: list[ir.Value] = [v for v in first if v is not None]
        rows: list[list[ir.Value]] = [[] for _ in range(results)]
        for turn in range(turns):
            slices = []
            for stream, axis, (_, back) in zip(streams, axes, into, strict=True):
                place = np.array(turns - 1 - turn if back else turn, np.int64)
                index = add_initializer(self._model.graph, self._fresh(f"{node.name}/turn"), place)
                slices.append(self._made("Gather", [stream, index], axis=axis))
            after = self._paste(body, [*states, *slices])
            states = after[: len(states)]
            for row, result in zip(rows, after[len(states) :], strict=True):
                row.append(result)
        joined = [self._stacked(row[::-1] if back else row, axis) for row, (axis, back) in zip(rows, out, strict=True)]
        return [*states, *joined]

    def _axes(self, side: str, count: int) -> list[tuple[int, int]]:
        """Axis and direction of each stream of a Scan."""
        axes: Sequence[int] = attribute(self._node, f"scan_{side}_axes", (0,) * count)  # type: ignore[assignment]
        ways: Sequence[int] = attribute(self._node, f"scan_{side}_directions", (0,) * count)  # type: ignore[assignment]
        return list(zip(axes, ways, strict=True))

    def _paste(self, body: ir.Graph, given: Sequence[ir.Value]) -> list[ir.Value]:
        """Write a copy of a graph in front of the node; returns what its outputs became."""
        copy, graph = body.clone(allow_outer_scope_values=True), self._model.graph
        for inner, outer in zip(list(copy.inputs), given, strict=True):
            ir.convenience.replace_all_uses_with(inner, outer, replace_graph_outputs=True)
        results, nodes = list(copy.outputs), list(copy)
        copy.outputs.clear()
        for value in list(copy.initializers.values()):
            copy.initializers.pop(str(value.name))
            value.name = self._fresh(str(value.name))
            graph.register_initializer(value)
        for part in nodes:
            for value in part.outputs:
                value.name = self._fresh(str(value.name)) if value.name else value.name
        copy.remove(nodes)
        graph.insert_before(self._node, nodes)
        return results

    def _stacked(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        lined = [_with_axis(self._model, self._node, self._fresh, "Unsqueeze", part, axis) for part in parts]
        return self._made("Concat", lined, axis=axis)

    def _made(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        return _made(self._model, self._node, self._fresh, op_type, inputs, **attributes)


def _goes_on(body: ir.Graph) -> bool:
    """Whether the body of a Loop never ends it."""
    value = body.outputs[0]
    while (producer := value.producer()) is not None and producer.op_type in ("Identity", "Cast"):
        source = producer.inputs[0]
        assert source is not None
        value = source
    known = constant(value)
    return value is body.inputs[1] or (known is not None and bool(known.all()))


def _made(
    model: ir.Model,
    before: ir.Node,
    fresh: Fresh,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    **attributes: int | list[int],
) -> ir.Value:
    """Write a node in front of another, and return its result."""
    node = ir.node(op_type, list(inputs), attributes=dict(attributes))
    node.outputs[0].name = fresh(f"{before.name or before.outputs[0].name}/{op_type}")
    model.graph.insert_before(before, [node])
    return node.outputs[0]


def _with_axis(model: ir.Model, before: ir.Node, fresh: Fresh, op_type: str, value: ir.Value, axis: int) -> ir.Value:
    """Write Squeeze or Unsqueeze, whose axes are an attribute in the versions below 13."""
    if int(model.opset_imports[""]) < 13:
        return _made(model, before, fresh, op_type, [value], axes=[axis])
    axes = add_initializer(model.graph, fresh(f"{before.name}/axes"), np.array([axis], np.int64))
    return _made(model, before, fresh, op_type, [value, axes])


def _replace(model: ir.Model, node: ir.Node, results: Sequence[ir.Value]) -> None:
    """Hand results on in place of those of a node, and remove it with the graphs that it runs."""
    for old, new in zip(node.outputs, results, strict=True):
        name = old.name
        if not name:
            continue
        hand = ir.node("Identity", [new])
        hand.outputs[0].type, hand.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, [hand])
        ir.convenience.replace_all_uses_with(old, hand.outputs[0], replace_graph_outputs=True)
        old.name, hand.outputs[0].name = None, name
    _empty(node)
    model.graph.remove(node, safe=True)


def _empty(node: ir.Node) -> None:
    """Remove all nodes of the graphs that a node runs, so that they read nothing any more."""
    for item in node.attributes.values():
        if item.type == ir.AttributeType.GRAPH:
            inner = item.as_graph()
            for part in inner:
                _empty(part)
            inner.outputs.clear()
            inner.remove(list(inner), safe=True)


class _Sequences:
    """Follows sequences of tensors through a graph."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._fresh = model, namer(model)
        self._known: dict[ir.Value, list[ir.Value]] = {}

    def resolved(self) -> bool:
        """Read the tensors of known sequences directly; True where anything changed."""
        changed = False
        for node in list(self._model.graph):
            if node.op_type in ops.SEQUENCE or any(v in self._known for v in node.inputs):
                self._follow(node)
                result = self._read(node)
                if result is not None:
                    _replace(self._model, node, [result])
                    changed = True
        for node in reversed(list(self._model.graph)):
            unread = not any(v.uses() or v.is_graph_output() for v in node.outputs)
            if unread and node.outputs[0] in self._known:
                self._model.graph.remove(node, safe=True)
                changed = True
        return changed

    def _follow(self, node: ir.Node) -> None:
        """Note the elements of the sequence that a node makes, where they are known."""
        first = node.inputs[0] if node.inputs else None
        known = self._known.get(first) if first is not None else None
        found: list[ir.Value] | None = None
        if node.op_type == "SequenceEmpty":
            found = []
        elif node.op_type == "SequenceConstruct":
            found = [v for v in node.inputs if v is not None]
        elif node.op_type == "SplitToSequence":
            if node.outputs[0] not in self._known:
                found = self._split(node)
        elif node.op_type == "Identity":
            found = known
        elif node.op_type == "SequenceInsert" and known is not None:
            place, value = self._place(node, 2, len(known)), node.inputs[1]
            if place is not None and value is not None:
                found = [*known[:place], value, *known[place:]]
        elif node.op_type == "SequenceErase" and known:
            place = self._place(node, 1, -1)
            found = None if place is None else [v for i, v in enumerate(known) if i != place % len(known)]
        if found is not None:
            self._known[node.outputs[0]] = found

    def _read(self, node: ir.Node) -> ir.Value | None:
        """What a node reads of a known sequence, as a tensor; None where it does not, or does not say what."""
        first = node.inputs[0] if node.inputs else None
        known = self._known.get(first) if first is not None else None
        if known is None:
            return None
        if node.op_type == "SequenceLength":
            return add_initializer(
                self._model.graph, self._fresh(f"{node.name}/length"), np.array(len(known), np.int64)
            )
        if node.op_type == "SequenceAt":
            place = self._place(node, 1, 0)
            return known[place] if place is not None and -len(known) <= place < len(known) else None
        if node.op_type == "ConcatFromSequence" and known:
            axis = int(attribute(node, "axis", 0))  # type: ignore[call-overload]
            if attribute(node, "new_axis", 0):
                known = [_with_axis(self._model, node, self._fresh, "Unsqueeze", v, axis) for v in known]
            return _made(self._model, node, self._fresh, "Concat", known, axis=axis)
        return None

    def _place(self, node: ir.Node, slot: int, default: int) -> int | None:
        """The position that a node names; None where it is computed."""
        if slot >= len(node.inputs) or node.inputs[slot] is None:
            return default
        found = constant(node.inputs[slot])
        return None if found is None else int(found.item())

    def _split(self, node: ir.Node) -> list[ir.Value] | None:
        """Write the Split that stands for a SplitToSequence; None where its parts are not known."""
        value = node.inputs[0]
        assert value is not None, "the operator asks for it"
        given = node.inputs[1] if len(node.inputs) > 1 else None
        sizes = constant(given)
        if value.shape is None or (given is not None and sizes is None):
            return None
        axis = int(attribute(node, "axis", 0)) % len(value.shape)  # type: ignore[call-overload]
        length = value.shape[axis]
        if not isinstance(length, int):
            return None
        if sizes is None or not sizes.ndim:
            step = 1 if sizes is None else int(sizes.item())
            parts = [min(step, length - start) for start in range(0, length, step)]
        else:
            parts = [int(s) for s in sizes]
        attributes: dict[str, int | list[int]] = {"axis": axis}
        inputs = [value]
        if int(self._model.opset_imports[""]) < 13:
            attributes["split"] = parts
        else:
            name = self._fresh(f"{node.name}/sizes")
            inputs.append(add_initializer(self._model.graph, name, np.array(parts, np.int64)))
        split = ir.node("Split", inputs, attributes=attributes, num_outputs=len(parts))
        for index, part in enumerate(split.outputs):
            part.name, part.type = self._fresh(f"{node.outputs[0].name}/{index}"), value.type
        self._model.graph.insert_before(node, [split])
        if given is not None or attribute(node, "keepdims", 1):
            return list(split.outputs)
        return [_with_axis(self._model, node, self._fresh, "Squeeze", part, axis) for part in split.outputs]
