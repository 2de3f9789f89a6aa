"""Find the parts of the outputs that mean different things.

Case 1. An output made by a Concat of a few computed tensors: each operand is a head. One number over all of them would
        let boxes in pixels (0 to 640) drown scores (0 to 1).
Case 2. Any other float output is one head.

The parts of a YOLO detection output (1, 4 + classes [+ 32], anchors) get their usual names. Its boxes make a second
head, `detections`: errors relative to the size of the box, weighed by the squared score of the anchor, because average
precision sees small boxes of confident anchors and hardly any of the other thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.errors import ModelError
from bitalloy.graph import Graph, attribute, constant, is_float, static_shape
from bitalloy.records import Head

MAX_PARTS = 8
YOLO_PARTS = ("boxes", "scores", "coefficients")
DETECTIONS = "detections"
LEAST_SIZE = 1.0
"""Pixels; smaller boxes count as this large."""


def find_heads(graph: Graph) -> tuple[Head, ...]:
    """Heads of all float outputs, in order.

    Raises:
        ModelError: the model has no float output.
    """
    found: list[Head] = []
    for output in graph.model.graph.outputs:
        if is_float(output):
            found += _parts(output) or [Head(name=str(output.name), output=str(output.name), tensor=str(output.name))]
    if not found:
        raise ModelError(f"The model has no float output to compare; its outputs are {list(graph.output_names)}.")
    return tuple(found)


def _parts(output: ir.Value) -> list[Head]:
    node, shape = output.producer(), static_shape(output)
    if node is None or node.op_type != "Concat" or not 2 <= len(node.inputs) <= MAX_PARTS:
        return []
    if any(constant(v) is not None for v in node.inputs) or len(set(node.inputs)) != len(node.inputs):
        return []
    axis = int(attribute(node, "axis", 0)) % len(shape)  # type: ignore[call-overload]
    sizes = [static_shape(v)[axis] for v in node.inputs if v is not None]
    yolo = len(shape) == 3 and axis == 1 and sizes[0] == 4 and len(sizes) <= len(YOLO_PARTS)
    heads, start = [], 0
    for position, (value, size) in enumerate(zip(node.inputs, sizes, strict=True)):
        assert value is not None
        name = YOLO_PARTS[position] if yolo else f"{output.name}[{start}:{start + size}]"
        heads.append(
            Head(
                name=name,
                output=str(output.name),
                tensor=str(value.name),
                axis=axis,
                start=start,
                stop=start + size,
            )
        )
        start += size
    if yolo:
        heads.append(msgspec.structs.replace(heads[0], name=DETECTIONS, scores=(heads[1].start, heads[1].stop)))
    return heads


def head_of(outputs: Mapping[str, np.ndarray], head: Head) -> np.ndarray:
    """The part of the outputs that belongs to a head, in float64."""
    value = outputs[head.output].astype(np.float64)
    return value if head.axis is None else _along(value, head.axis, head.start, head.stop)


def relevance(exact: Mapping[str, np.ndarray], head: Head) -> np.ndarray | None:
    """Factors on the errors of a head's elements, of its shape, from the float outputs; None where all count alike."""
    if head.scores is None or head.axis is None:
        return None
    boxes = head_of(exact, head)
    scores = _along(exact[head.output].astype(np.float64), head.axis, *head.scores)
    confidence = np.clip(scores.max(axis=head.axis, keepdims=True), 0.0, 1.0)
    size = np.maximum(_along(boxes, head.axis, 2, 4), LEAST_SIZE)
    return np.asarray(np.square(confidence) / np.concatenate([size, size], axis=head.axis))


class Reference:
    """The float outputs of one sample, against which other outputs are measured, head by head.

    Args:
        exact: float outputs.
        heads: parts of the outputs.
    """

    def __init__(self, exact: Mapping[str, np.ndarray], heads: Sequence[Head]) -> None:
        self._heads = tuple(heads)
        self._exact = [(head_of(exact, h), relevance(exact, h)) for h in heads]

    @property
    def energy(self) -> np.ndarray:
        """(heads,): ||y||^2. Of weighed boxes the sizes stand for y: an error as large as the box is 0 dB."""
        return np.array([_energy(y, f, h) for h, (y, f) in zip(self._heads, self._exact, strict=True)])

    def error(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """(heads,): ||y_found - y||^2, weighed by relevance."""
        changes = ((head_of(found, h) - y, f) for h, (y, f) in zip(self._heads, self._exact, strict=True))
        return np.array([float(np.square(c if f is None else f * c).sum()) for c, f in changes])


def _energy(y: np.ndarray, factors: np.ndarray | None, head: Head) -> float:
    if factors is None:
        return float(np.square(y).sum())
    assert head.axis is not None, "weighed boxes are part of an output"
    size = np.maximum(_along(y, head.axis, 2, 4), LEAST_SIZE)
    return float(np.square(factors * np.concatenate([size, size], axis=head.axis)).sum())


def _along(value: np.ndarray, axis: int, start: int, stop: int | None) -> np.ndarray:
    return value[(slice(None),) * axis + (slice(start, stop),)]
