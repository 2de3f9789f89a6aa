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
import onnx
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.model.read import TAG, constant, name_of, namer
from bitalloy.model.weights import pack
from bitalloy.rewrite.cast import computed, halve, is_border

ALIAS = "/to_last"
"""Ending of the node that `bitalloy.apply` puts before a Softmax: it has the operand of the Softmax."""


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
        self._pairs: dict[tuple[ir.Value, str], ir.Value] = {}
        self._stored: dict[str, ir.Value] = {}

    def carry(self) -> ir.Model:
        half = computed(self._mixed)
        open_nodes = {name_of(n): n for n in self._model.graph}
        last = {str(v.name): v for v in self._model.graph.outputs}
        missing: list[str | None] = []
        jobs: list[tuple[ir.Node, int, ir.Node, ir.Value]] = []
        changes: list[tuple[ir.Node, int, ir.Value | None]] = []
        for node in self._mixed.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") or is_border(node):
                continue
            other = open_nodes.get(name_of(node).removesuffix(ALIAS))
            if other is None or (node.name in half and any(v.dtype is None for v in other.outputs)):
                rounded = node.name in half or any(_rounding(v) is not None for v in node.inputs)
                missing += [node.name] if rounded or self._changed(node) else []
                continue
            if TAG in node.metadata_props:
                other.metadata_props[TAG] = node.metadata_props[TAG]
            for slot, value in enumerate(node.inputs):
                pair = _rounding(value)
                if pair is not None:
                    operand = other.inputs[slot] if slot < len(other.inputs) else None
                    if operand is None or (_is_stored(pair) and constant(operand) is None):
                        missing.append(node.name)
                    else:
                        jobs.append((other, slot, pair, operand))
            for slot in self._changed(node):
                operand = other.inputs[slot] if slot < len(other.inputs) else None
                if constant(operand) is None:
                    missing.append(node.name)
                else:
                    changes.append((other, slot, node.inputs[slot]))
        if missing:
            raise ModelError(
                f"{len(missing)} rewritten nodes differ between fixed and open sizes, the first is '{missing[0]}'."
            )
        for other, slot, pair, operand in jobs:
            other.replace_input_with(slot, self._store(pair) if _is_stored(pair) else self._round(operand, pair))
        for other, slot, value in changes:
            self._change(other, slot, value)
        for value in self._mixed.graph.outputs:
            pair = _rounding(value)
            if pair is not None and not _is_stored(pair):
                self._leave(last[str(value.name)], pair)
        halve(self._model, half, namer(self._model))
        for name in [n for n, v in self._model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            self._model.graph.initializers.pop(name)
        try:
            onnx.checker.check_model(pack(self._model).data)
        except onnx.checker.ValidationError as error:
            raise ModelError(f"The rewritten model fails the ONNX checker: {error}") from error
        return self._model

    def _changed(self, node: ir.Node) -> list[int]:
        """Slots of the float constants of a node that the rewriting changed."""
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
        taken = {v.name for n in self._model.graph for v in n.outputs} | set(self._model.graph.initializers)
        while name in taken:
            name += "'"
        own = ir.Value(name=name, shape=operand.shape, type=operand.type, const_value=ir.tensor(array, name=name))
        self._model.graph.register_initializer(own)
        node.replace_input_with(slot, own)

    def _store(self, pair: ir.Node) -> ir.Value:
        """INT8 or INT32 integers of the mixed model, with their scale."""
        name = name_of(pair)
        if name not in self._stored:
            node = ir.node("DequantizeLinear", self._constants(pair), dict(pair.attributes), name=name)
            self._finish(node, pair)
            self._model.graph.insert_before(self._model.graph[0], [node])
            self._stored[name] = node.outputs[0]
        return self._stored[name]

    def _round(self, value: ir.Value, pair: ir.Node) -> ir.Value:
        producer, scale = value.producer(), pair.inputs[1]
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
            if producer is None:
                self._model.graph.insert_before(self._model.graph[0], [first, second])
            else:
                self._model.graph.insert_after(producer, [first, second])
            self._pairs[key] = second.outputs[0]
        return self._pairs[key]

    def _leave(self, value: ir.Value, pair: ir.Node) -> None:
        """A rounded output keeps its name."""
        rounded = self._round(value, pair)
        name = value.name
        rounded.shape, rounded.type = value.shape, value.type
        value.name, rounded.name = f"{name}/float", name
        self._model.graph.outputs[list(self._model.graph.outputs).index(value)] = rounded

    def _constants(self, pair: ir.Node) -> list[ir.Value | None]:
        """Operands of a rounding node in this model: integers (or None where they are computed), scale, zero point."""
        found: list[ir.Value | None] = []
        for value in pair.inputs:
            if value is None or constant(value) is None:
                found.append(None)
                continue
            name = str(value.name)
            if name not in self._model.graph.initializers:
                copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
                self._model.graph.register_initializer(copy)
            found.append(self._model.graph.initializers[name])
        return found

    def _finish(self, node: ir.Node, like: ir.Node) -> None:
        node.outputs[0].name = f"{node.name}/output"
        if TAG in like.metadata_props:
            node.metadata_props[TAG] = like.metadata_props[TAG]


def _rounding(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes a value, where one does, perhaps with a Cast to FP16 behind."""
    node = value.producer() if value is not None else None
    if node is not None and is_border(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_stored(pair: ir.Node) -> bool:
    return constant(pair.inputs[0]) is not None
