"""Roundings of a model with fixed sizes, written into the same model with open ones.

A plan is made at the sizes of the samples: one length of a prompt, an empty cache. What is shipped must take every
length. Names of nodes are the same in both forms (`load_graph` and `load_open`), so what an operand of a node
is rounded by can be carried over, operand by operand:

1. A stored constant (INT8 weights, INT32 biases) takes the place of the same operand.
2. A rounded tensor: the same pair of QuantizeLinear and DequantizeLinear on the operand of the open form; operands
   that are the same tensor on the same scale share one pair.
3. A rounded output of the graph: likewise.
4. A node in FP16 runs in FP16, with Cast nodes where it meets others (`bitalloy.rewrite.cast`).
5. A float constant that the rewriting changed (a scaled weight, a corrected bias) takes the place of the same operand.

A node that only one of the forms has (shape arithmetic, a Concat with an empty cache) is left as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.metadata import KERNEL, TAG
from bitalloy.model.read import constant, name_of
from bitalloy.model.write import add_initializer, check_model, drop_unread, insert_behind, namer
from bitalloy.rewrite.cast import computing_nodes, is_border, lower

ALIAS = "/to_last"
"""Ending of the node that `bitalloy.rewrite.apply` puts before a Softmax: it has the operand of the Softmax."""


def reopen(mixed: ir.Model, model: ir.Model, fixed: ir.Model) -> ir.Model:
    """Write the roundings of one form of a graph into the other, in place.

    Args:
        mixed: rewritten by a plan, with fixed sizes; not changed.
        model: float, from `load_open` of the same file.
        fixed: float, with fixed sizes, from the same file; tells which constants were changed.

    Returns:
        `model`, with its own inputs, outputs and sizes.

    Raises:
        ModelError: a rounded or changed operand is missing in the open form, or a stored one is computed there.
    """
    return _Carrier(mixed, model, fixed).carry()


class _Carrier:
    def __init__(self, mixed: ir.Model, model: ir.Model, fixed: ir.Model) -> None:
        self._mixed, self._model = mixed, model
        self._before = {name_of(n): n for n in fixed.graph}
        self._ranks = {str(v.name): len(v.shape or ()) for v in fixed.graph.outputs}
        self._lowered = computing_nodes(mixed)
        self._computing = frozenset[str]().union(*self._lowered.values())
        self._pairs: dict[tuple[ir.Value, str], ir.Value] = {}
        self._stored: dict[str, ir.Value] = {}

    def carry(self) -> ir.Model:
        rounded, changed = self._operands()
        for node, slot, pair in rounded:
            value = node.inputs[slot]
            assert value is not None
            node.replace_input_with(slot, self._store(pair) if _is_stored(pair) else self._round(value, pair))
        for node, slot, value in changed:
            self._change(node, slot, value)
        last = {str(v.name): v for v in self._model.graph.outputs}
        for value in self._mixed.graph.outputs:
            left = _rounding(value)
            if left is not None and not _is_stored(left):
                self._leave(last[str(value.name)], left)
        for kind, names in self._lowered.items():
            lower(self._model, names, kind, namer(self._model))
        drop_unread(self._model.graph)
        for value in self._model.graph.outputs:
            if value.shape is None:  # the checker wants a rank
                value.shape = ir.Shape([None] * self._ranks[str(value.name)])
        check_model(self._model)
        return self._model

    def _operands(self) -> tuple[list[tuple[ir.Node, int, ir.Node]], list[tuple[ir.Node, int, ir.Value | None]]]:
        """List the operands of the open form, as node and slot: those to be rounded, and those with other numbers."""
        open_nodes = {name_of(n): n for n in self._model.graph}
        rounded: list[tuple[ir.Node, int, ir.Node]] = []
        changed: list[tuple[ir.Node, int, ir.Value | None]] = []
        missing: list[str | None] = []
        for node in self._mixed.graph:
            if node.op_type in ops.ROUNDING or is_border(node):
                continue
            other = open_nodes.get(name_of(node).removesuffix(ALIAS))
            pairs = [(slot, pair) for slot, v in enumerate(node.inputs) if (pair := _rounding(v)) is not None]
            others = self._changed(node)
            if other is None or (node.name in self._computing and any(v.dtype is None for v in other.outputs)):
                missing += [node.name] if node.name in self._computing or pairs or others else []
                continue
            other.metadata_props.update({k: node.metadata_props[k] for k in (TAG, KERNEL) if k in node.metadata_props})
            for slot, pair in pairs:
                operand = _operand(other, slot)
                if operand is None or (_is_stored(pair) and constant(operand) is None):
                    missing.append(node.name)
                else:
                    rounded.append((other, slot, pair))
            for slot in others:
                if constant(_operand(other, slot)) is None:
                    missing.append(node.name)
                else:
                    changed.append((other, slot, node.inputs[slot]))
        if missing:
            raise ModelError(
                f"{len(missing)} rewritten nodes differ between fixed and open sizes, the first is '{missing[0]}'."
            )
        return rounded, changed

    def _changed(self, node: ir.Node) -> list[int]:
        """List the slots of the float constants of a node that the rewriting changed."""
        before, found = self._before.get(name_of(node)), []
        for slot, value in enumerate(node.inputs if before is not None else ()):
            now, then = constant(value), constant(before.inputs[slot]) if slot < len(before.inputs) else None  # type: ignore[union-attr]
            if now is not None and then is not None and now.dtype == np.float32 and not np.array_equal(now, then):
                found.append(slot)
        return found

    def _change(self, node: ir.Node, slot: int, value: ir.Value | None) -> None:
        """Give an operand other values; one that others read too is replaced by a constant of its own."""
        array, operand = constant(value), node.inputs[slot]
        assert array is not None and operand is not None
        name = str(operand.name)
        if len(operand.uses()) == 1 and not operand.is_graph_output():
            operand.const_value = ir.tensor(array, name=name)
            return
        node.replace_input_with(slot, add_initializer(self._model.graph, namer(self._model)(name), array))

    def _store(self, pair: ir.Node) -> ir.Value:
        """Store numbers of the mixed model, with their scale."""
        name = name_of(pair)
        if name not in self._stored:
            node = ir.node(pair.op_type, self._constants(pair), dict(pair.attributes), name=name)
            self._finish(node, pair)
            insert_behind(self._model.graph, None, [node])
            self._stored[name] = node.outputs[0]
        return self._stored[name]

    def _round(self, value: ir.Value, pair: ir.Node) -> ir.Value:
        scale = pair.inputs[1]
        assert scale is not None
        key = (value, str(scale.name))
        if key not in self._pairs:
            source = pair.inputs[0]
            before = source.producer() if source is not None else None
            assert before is not None
            _, *constants = self._constants(pair)
            first = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}/{scale.name}/QuantizeLinear")
            second = ir.node(
                "DequantizeLinear",
                [first.outputs[0], *constants],
                name=f"{value.name}/{scale.name}/DequantizeLinear",
            )
            self._finish(first, before)
            self._finish(second, pair)
            insert_behind(self._model.graph, value.producer(), [first, second])
            self._pairs[key] = second.outputs[0]
        return self._pairs[key]

    def _leave(self, value: ir.Value, pair: ir.Node) -> None:
        """Let a rounded output keep its name."""
        rounded = self._round(value, pair)
        name = value.name
        rounded.shape, rounded.type = value.shape, value.type
        value.name, rounded.name = f"{name}/float", name
        self._model.graph.outputs[list(self._model.graph.outputs).index(value)] = rounded

    def _constants(self, pair: ir.Node) -> list[ir.Value | None]:
        """Copy the operands of a rounding node to this model: integers (None where computed), scale, zero point."""
        found: list[ir.Value | None] = []
        for value in pair.inputs:
            if value is None or value.const_value is None or constant(value) is None:
                found.append(None)
                continue
            name = str(value.name)
            if name not in self._model.graph.initializers:
                kept = add_initializer(self._model.graph, name, value.const_value)
                kept.meta.update(value.meta)
            found.append(self._model.graph.initializers[name])
        return found

    def _finish(self, node: ir.Node, like: ir.Node) -> None:
        node.outputs[0].name = f"{node.name}/output"
        if TAG in like.metadata_props:
            node.metadata_props[TAG] = like.metadata_props[TAG]


def _rounding(value: ir.Value | None) -> ir.Node | None:
    """Find the DequantizeLinear that makes a value, or the Cast of a stored one; perhaps with a Cast to FP16 behind."""
    node = value.producer() if value is not None else None
    if node is not None and is_border(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type == "DequantizeLinear":
        return node
    return node if node.op_type == "Cast" and not is_border(node) and _is_stored(node) else None


def _operand(node: ir.Node, slot: int) -> ir.Value | None:
    return node.inputs[slot] if slot < len(node.inputs) else None


def _is_stored(pair: ir.Node) -> bool:
    return constant(pair.inputs[0]) is not None
