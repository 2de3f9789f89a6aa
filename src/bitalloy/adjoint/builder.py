"""Write ONNX nodes one call at a time, with constants shared and repeated expressions computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.model.read import static_shape
from bitalloy.model.write import add_initializer

SHARED_ELEMENTS = 4096
AttributeValue = int | float | str | Sequence[int] | Sequence[float]
Made = TypeVar("Made")
ScanStep = Callable[["Builder", Sequence[ir.Value], Sequence[ir.Value]], tuple[Sequence[ir.Value], Sequence[ir.Value]]]
"""Writes one step of a `Builder.scan`: from the states and a slice of every stream to the next states and results."""


class Builder:
    """Appends nodes to one graph.

    Args:
        graph: the graph to write to; its opset decides which operator versions `op` may use.
        prefix: start of the names of all values that this builder makes.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self._prefix = prefix
        self._count = 0
        self._expressions: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._once: dict[Hashable, object] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        shape: Sequence[int] | None = None,
        **attributes: AttributeValue,
    ) -> ir.Value:
        """Append a node and return its only output; a static `shape` is recorded on it."""
        return self.op_multi(op_type, *inputs, outputs=1, shape=shape, **attributes)[0]

    def op_multi(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        shape: Sequence[int] | None = None,
        **attributes: AttributeValue,
    ) -> tuple[ir.Value, ...]:
        """Append a node and return its outputs. The same call twice returns the same values."""
        key = (
            op_type,
            tuple(id(v) for v in inputs),
            outputs,
            tuple(sorted((k, _hashable(a)) for k, a in attributes.items())),
        )
        if key not in self._expressions:
            values: Mapping[str, AttributeValue] = attributes
            node = ir.node(
                op_type,
                list(inputs),
                attributes=dict(values),
                domain=ops.domain_of(op_type),
                num_outputs=outputs,
                name=self._name(op_type),
            )
            for value in node.outputs:
                value.name = self._name(op_type)
                value.type = _result_type(op_type, inputs, attributes)
            if shape is not None:
                node.outputs[0].shape = ir.Shape(tuple(int(d) for d in shape))
            self.graph.append(node)
            self._expressions[key] = tuple(node.outputs)
        return self._expressions[key]

    def scan(
        self,
        step: ScanStep,
        states: Sequence[ir.Value],
        streams: Sequence[tuple[ir.Value, int]],
        *,
        backwards: bool,
        axis: int,
    ) -> tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]:
        """Append a Scan: a loop over the slices of some tensors, which hands on states.

        Args:
            step: writes one step of the loop; what it reads of this graph, the loop reads as well.
            states: the first states.
            streams: tensors with the axis along which each is cut into slices.
            backwards: whether the loop begins at the last slice. Results lie as the slices do all the same.
            axis: along which the results of all steps are put together.

        Returns:
            The last states, and the results.
        """
        names = [self._name("step") for _ in (*states, *streams)]
        inputs = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in names]
        for value, state in zip(inputs, states, strict=False):
            value.shape = state.shape
        for value, (stream, along) in zip(inputs[len(states) :], streams, strict=True):
            if stream.shape is not None:
                value.shape = ir.Shape([d for i, d in enumerate(stream.shape) if i != along])
        body = ir.Graph(inputs, [], nodes=[], opset_imports=self.graph.opset_imports, name=self._name("body"))
        builder = Builder(body, f"{body.name}/")
        after, results = step(builder, inputs[: len(states)], inputs[len(states) :])
        body.outputs.extend([*after, *results])
        directions = {"scan_input_directions": len(streams), "scan_output_directions": len(results)}
        node = ir.Node(
            "",
            "Scan",
            [*states, *(stream for stream, _ in streams)],
            [
                ir.AttrGraph("body", body),
                ir.AttrInt64("num_scan_inputs", len(streams)),
                ir.AttrInt64s("scan_input_axes", [along for _, along in streams]),
                ir.AttrInt64s("scan_output_axes", [axis] * len(results)),
                *(ir.AttrInt64s(name, [int(backwards)] * count) for name, count in directions.items()),
            ],
            num_outputs=len(after) + len(results),
            name=self._name("Scan"),
        )
        for value in node.outputs:
            value.name, value.type = self._name("Scan"), ir.TensorType(ir.DataType.FLOAT)
        first, along = streams[0]
        for value, result in zip(node.outputs[len(after) :], results, strict=True):
            if first.shape is not None and result.shape is not None:
                value.shape = ir.Shape([*result.shape[:axis], first.shape[along], *result.shape[axis:]])
        self.graph.append(node)
        return tuple(node.outputs[: len(after)]), tuple(node.outputs[len(after) :])

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` returned when it was called first with this key."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]  # type: ignore[return-value]

    def const(self, array: np.ndarray | Sequence[int] | float) -> ir.Value:
        """Store an initializer; lists become int64, floats float32. Small equal arrays share one initializer."""
        kind = np.float32 if isinstance(array, float) else np.int64
        data = np.asarray(array, dtype=None if isinstance(array, np.ndarray) else kind)
        data = np.ascontiguousarray(data) if data.ndim else data
        if data.size > SHARED_ELEMENTS:
            return add_initializer(self.graph, self._name("const"), data)
        key = (str(data.dtype), data.shape, data.tobytes())
        if key not in self._constants:
            self._constants[key] = add_initializer(self.graph, self._name("const"), data)
        return self._constants[key]

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the elementwise product, with the broadcast shape recorded."""
        return self.op("Mul", a, b, shape=_broadcast(a, b))

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the elementwise sum, with the broadcast shape recorded."""
        return self.op("Add", a, b, shape=_broadcast(a, b))

    def like(self, op_type: str, x: ir.Value, *rest: ir.Value | None, **attributes: AttributeValue) -> ir.Value:
        """Append a node with one output, which has the shape of `x`."""
        return self.op(op_type, x, *rest, shape=static_shape(x), **attributes)

    def flat(self, x: ir.Value) -> ir.Value:
        """Reshape `x` to one row, (1, n)."""
        return self.op("Reshape", x, self.const([1, -1]), shape=(1, int(np.prod(static_shape(x)))))

    def _name(self, hint: str) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}_{hint}"


def _result_type(
    op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, AttributeValue]
) -> ir.TypeProtocol | None:
    if op_type == "Shape":
        return ir.TensorType(ir.DataType.INT64)
    if op_type in ops.BOOLEAN:
        return ir.TensorType(ir.DataType.BOOL)
    if op_type == "Cast":
        return ir.TensorType(ir.DataType(attributes["to"]))  # type: ignore[arg-type]
    if op_type == "QuantizeLinear":
        return inputs[2].type if inputs[2] is not None else None
    source = inputs[1] if op_type in ("Where", "DequantizeLinear") else inputs[0]
    return source.type if source is not None else None


def _broadcast(a: ir.Value, b: ir.Value) -> tuple[int, ...] | None:
    if a.shape is None or b.shape is None:
        return None
    return tuple(np.broadcast_shapes(static_shape(a), static_shape(b)))


def _hashable(value: AttributeValue) -> object:
    return tuple(value) if isinstance(value, (list, tuple)) else value
