"""One number per channel of chosen tensors, from a copy of a model that measures itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitalloy.core.errors import DataError
from bitalloy.model.write import add_initializer
from bitalloy.runtime.ort import OrtSession

_PREFIX = "bitalloy.calibrate.channels/"
AXES_ARE_INPUTS = 18
"""First opset in which ReduceMax and ReduceMean take their axes as an input."""


def channel_maxima(
    model: ir.Model, tensors: Mapping[str, int], feeds: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Measure the largest magnitude of every channel over samples.

    Args:
        model: float32 model; it is not changed.
        tensors: name of a node output of known rank -> axis of its channels.
        feeds: samples, consumed one by one.

    Returns:
        tensor -> (channels,).

    Raises:
        DataError: `feeds` is empty.
    """
    found: dict[str, np.ndarray] = {}
    for seen in _run(model, tensors, ("Abs", "ReduceMax"), feeds):
        found = {t: np.maximum(found.get(t, 0.0), v) for t, v in seen.items()}
    if not found:
        raise DataError("There is no sample to measure channels with. Give at least one.")
    return found


def channel_means(
    model: ir.Model,
    tensors: Mapping[str, int],
    feeds: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Measure the mean of every channel over samples and positions.

    Args:
        model: float32 model; it is not changed.
        tensors: name of a float32 input or node output of known rank -> axis of its channels.
        feeds: samples, consumed one by one.
        progress: called with 1 after each sample.

    Returns:
        tensor -> (channels,) float64.

    Raises:
        DataError: `feeds` is empty.
    """
    total: dict[str, np.ndarray] = {}
    count = 0
    for seen in _run(model, tensors, ("ReduceMean",), feeds):
        count += 1
        total = {t: total.get(t, 0.0) + v.astype(np.float64) for t, v in seen.items()}
        if progress is not None:
            progress(1)
    if not count:
        raise DataError("There is no sample to measure channels with. Give at least one.")
    return {t: v / count for t, v in total.items()}


def _run(
    model: ir.Model,
    tensors: Mapping[str, int],
    operators: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
) -> Iterable[dict[str, np.ndarray]]:
    """Per sample: tensor -> (channels,), by operators of which the last one reduces all other axes."""
    copy = model.clone()
    values = {str(v.name): v for v in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    axes_are_inputs = int(copy.opset_imports[""]) >= AXES_ARE_INPUTS
    copy.graph.outputs.clear()
    names: dict[str, str] = {}
    for tensor, axis in tensors.items():
        value = values[tensor]
        assert value.shape is not None, "tensors with channels have a known rank"
        axes = [a for a in range(len(value.shape)) if a != axis % len(value.shape)]
        *others, last = operators
        for operator in (*others, last if axes else "Identity"):  # without axes a reduction takes all
            name, inputs, attributes = f"{_PREFIX}{tensor}/{operator}", [value], dict[str, object]()
            if operator == last:
                attributes = {"keepdims": 0} if axes_are_inputs else {"keepdims": 0, "axes": axes}
                if axes_are_inputs:
                    inputs.append(add_initializer(copy.graph, f"{name}/axes", np.array(axes, np.int64)))
            node = ir.node(operator, inputs, attributes, name=name)  # type: ignore[arg-type]
            value = node.outputs[0]
            value.name, value.type = f"{name}/value", ir.TensorType(ir.DataType.FLOAT)
            copy.graph.append(node)
        copy.graph.outputs.append(value)
        names[tensor] = str(value.name)
    RemoveUnusedNodesPass()(copy)
    session = OrtSession(copy)
    try:
        for sample in feeds:
            seen = session.run(sample)
            yield {t: seen[n] for t, n in names.items()}
    finally:
        session.close()
