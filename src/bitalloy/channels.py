"""One number per channel of chosen tensors, from a copy of a model that measures itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitalloy.errors import DataError
from bitalloy.runtime import OrtSession

_PREFIX = "bitalloy.channels/"
AXES_ARE_INPUTS = 18
"""Opset from which on ReduceMax and ReduceMean take their axes as an input."""


def channel_maxima(
    model: ir.Model, tensors: Mapping[str, int], feeds: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Largest magnitude of every channel over samples.

    Args:
        model: float32; not changed.
        tensors: results of nodes with a known rank -> axis of their channels.
        feeds: samples, consumed one by one.

    Returns:
        tensor -> (channels,).

    Raises:
        DataError: `feeds` is empty.
    """
    found: dict[str, np.ndarray] = {}
    for seen in _run(model, tensors, ("Abs", "ReduceMax"), feeds):
        found = {t: np.maximum(found[t], v) if found else v for t, v in seen.items()}
    if not found:
        raise DataError("There is no sample to measure channels with. Give at least one.")
    return found


def channel_means(
    model: ir.Model,
    tensors: Mapping[str, int],
    feeds: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Mean of every channel in each sample.

    Args:
        model: not changed.
        tensors: float32 results of nodes with a known rank -> axis of their channels.
        feeds: samples, consumed one by one.
        progress: called with 1 after each sample.

    Returns:
        tensor -> (samples, channels) float64.

    Raises:
        DataError: `feeds` is empty.
    """
    rows = []
    for seen in _run(model, tensors, ("ReduceMean",), feeds):
        rows.append(seen)
        if progress is not None:
            progress(1)
    if not rows:
        raise DataError("There is no sample to measure channels with. Give at least one.")
    return {t: np.array([row[t] for row in rows], np.float64) for t in tensors}


def _run(
    model: ir.Model,
    tensors: Mapping[str, int],
    operators: tuple[str, ...],
    feeds: Iterable[Mapping[str, np.ndarray]],
) -> Iterable[dict[str, np.ndarray]]:
    """Per sample: tensor -> (channels,). The last operator reduces over all other axes."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    opset = int(copy.opset_imports[""])
    copy.graph.outputs.clear()
    for tensor, axis in tensors.items():
        value = values[tensor]
        assert value.shape is not None, "tensors with channels have a known rank"
        rank = len(value.shape)
        axes = [a for a in range(rank) if a != axis % rank]
        for operator in operators:
            inputs, attributes = [value], {}
            if operator.startswith("Reduce"):
                attributes = {"keepdims": 0}
                if opset < AXES_ARE_INPUTS:
                    attributes["axes"] = axes
                else:
                    inputs.append(_constant(copy, f"{_PREFIX}{tensor}/axes", axes))
            node = ir.node(operator, inputs, attributes, name=f"{_PREFIX}{tensor}/{operator}")
            value = node.outputs[0]
            value.name = f"{_PREFIX}{tensor}/{operator}/value"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            copy.graph.append(node)
        copy.graph.outputs.append(value)
    RemoveUnusedNodesPass()(copy)
    names = {t: str(v.name) for t, v in zip(tensors, copy.graph.outputs, strict=True)}
    session = OrtSession(copy)
    try:
        for sample in feeds:
            seen = session.run(sample)
            yield {t: seen[n] for t, n in names.items()}
    finally:
        session.close()


def _constant(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    array = np.array(numbers, np.int64)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64))
    value.const_value = ir.tensor(array, name=name)
    model.graph.register_initializer(value)
    return value
