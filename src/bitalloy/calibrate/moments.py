"""Second moments of what enters layers, from a copy of a model that hands these tensors out.

Of a layer that reads rows x the error that a change D of its weights makes is tr(D H D^T) with H = sum of x^T x over
positions and samples: all that rounding a weight with care needs to know of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitalloy.core.errors import DataError
from bitalloy.runtime.ort import OrtSession

WIDEST = 8192
"""Most channels of a tensor of which a whole matrix is kept, 256 MB; of wider ones its diagonal alone."""


def second_moments(
    model: ir.Model,
    entering: Mapping[str, str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    weights: Callable[[int, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Sum up x^T x over the rows of tensors, all axes but the last, and over samples.

    Args:
        model: float32 model; it is not changed.
        entering: name of a layer -> the tensor that it reads, a float32 input or node output whose last axis is that of
            the channels. Layers that read one tensor share the result, but for those with weights of their own.
        feeds: samples, consumed one by one.
        weights: function from the number of a sample, counted from 0, and the sample to layer -> weights of the rows
            that it reads (rows,). Rows of layers without any count alike.
        progress: called with 1 after each sample.

    Returns:
        layer -> (channels, channels) float32, or (channels,) of more than `WIDEST`: the mean over samples.

    Raises:
        DataError: `feeds` is empty.
    """
    copy = model.clone()
    values = {str(v.name): v for v in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    given = {str(v.name) for v in copy.graph.inputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[t] for t in dict.fromkeys(entering.values()) if t not in given)
    RemoveUnusedNodesPass()(copy)
    session = OrtSession(copy) if len(copy.graph.outputs) else None
    total: dict[tuple[str, str], np.ndarray] = {}
    weighted: set[str] = set()
    count = 0
    try:
        for sample in feeds:
            seen = {**sample, **(session.run(sample) if session is not None else {})}
            rows = weights(count, sample) if weights is not None else {}
            weighted.update(rows)
            for key in dict.fromkeys((t, layer if layer in rows else "") for layer, t in entering.items()):
                moments = _moments(seen[key[0]], rows.get(key[1]))
                total[key] = moments if key not in total else np.add(total[key], moments, out=total[key])
            count += 1
            if progress is not None:
                progress(1)
    finally:
        if session is not None:
            session.close()
    if not count:
        raise DataError("There is no sample to measure second moments with. Give at least one.")
    for moments in total.values():
        moments /= np.float32(count)
    return {layer: total[t, layer if layer in weighted else ""] for layer, t in entering.items()}


def _moments(value: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    rows = value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False)
    if weights is not None:
        rows = rows * np.sqrt(weights, dtype=np.float32)[:, None]
    if rows.shape[1] > WIDEST:
        return np.asarray(np.square(rows).sum(axis=0))
    return np.asarray(rows.T @ rows)
