"""Find the parts of the outputs that mean different things.

Case 1. An output made by a Concat of a few computed tensors: each operand is a head. One number over all of them would
        let boxes in pixels (0 to 640) drown scores (0 to 1).
        An output in half precision or double is a Cast of the float32 tensor that carries its head.
Case 2. Any other float output that the model computes is one head. Outputs that the file's metadata or its family
        leaves out are none, nor are inputs and stored constants that are outputs as they are, nor what is behind a
        selection (`bitalloy.model.selected`).
Case 3. A head that gives a distribution makes a second head, named `... KL`, last in order: how far the predictions
        move (`bitalloy.model.divergence`). It is added where that is certain: a Sigmoid (perhaps reshaped), Softmax or
        LogSoftmax makes the head; the family knows the output as logits; or an output (1, classes) is called `logits`.
Case 4. An output that a Softmax makes: its head are the logits, the operand of the Softmax, measured as logarithms of
        the output. Where the Softmax is saturated, probabilities and their gradients tell nothing of how far the scores
        moved. Sigmoids stay what they are: float32 does not hold the logits of small scores
        (`bitalloy.model.divergence`), and nearly all scores of a detector are small.

The parts of a YOLO detection output (1, 4 + classes [+ 32], anchors) get their usual names. Its boxes make a second
head, `detections`: errors relative to the size of the box, weighted by the squared score of the anchor, because average
precision sees small boxes of confident anchors and hardly any of the other thousands. In models of a known family
other heads are weighted by its relevance (`bitalloy.model.relevance`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.core.records import Head
from bitalloy.model.divergence import BERNOULLI, CATEGORICAL, LOGARITHMS, LOGITS, PROBABILITIES, Divergence
from bitalloy.model.load import Graph
from bitalloy.model.metadata import FAMILY, HEADS, read_fact
from bitalloy.model.read import attribute, constant, is_float, static_shape
from bitalloy.model.relevance import MEANINGS, Meaning
from bitalloy.model.widen import WIDENED

MAX_PARTS = 8
YOLO_PARTS = ("boxes", "scores", "coefficients")
DETECTIONS = "detections"
MOVES = ops.RESHAPERS - ops.IDENTITIES
"""Operators that move the elements of a Sigmoid's result and change none of them."""
KL = " KL"
"""Suffix of the names of heads that measure a divergence."""
LEAST_TOLD = 1e-36
"""Smallest probability whose logarithm a Softmax in float32 tells; ONNX Runtime's flushes what is below e^-88."""
LEAST_SIZE = 1.0
"""Smallest size of a box in pixels; smaller boxes count as this large."""


def find_heads(graph: Graph) -> tuple[Head, ...]:
    """Find the heads of all float outputs that count, in the order of the outputs, divergences last.

    Raises:
        ModelError: the model has no float output.
    """
    made = [v for v in dict.fromkeys(graph.model.graph.outputs) if v.producer() is not None]
    outputs = [v for v in made if is_float(_source(v)) and v.name not in graph.selected]
    if not outputs:
        raise ModelError(f"The model computes no float output to compare; its outputs are {list(graph.output_names)}.")
    family = graph.metadata.get(FAMILY, "")
    meaning = MEANINGS.get(family)
    counted = _counted(graph, outputs, meaning)
    found: list[Head] = []
    divergences = []
    for output in (v for v in outputs if v.name in counted):
        whole = Head(name=str(output.name), output=str(output.name), tensor=str(_source(output).name))
        parts = [msgspec.structs.replace(h, family=family if meaning else "") for h in _parts(output) or [whole]]
        parts = _named_apart(parts, {h.name for h in found} | counted)
        for head in parts:
            means = _distribution(graph.value[head.tensor], head, meaning) if head.scores is None else None
            if means is not None:
                divergences.append(msgspec.structs.replace(means, name=head.name + KL))
            found.append(_logits_of(graph, head, means))
    return (*found, *divergences)


def _source(output: ir.Value) -> ir.Value:
    """Return the float32 tensor that an output is a Cast of; the output itself where it is none."""
    node = output.producer()
    operand = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return operand if operand is not None and is_float(operand) and output.dtype in WIDENED else output


def _named_apart(parts: Sequence[Head], taken: set[str]) -> list[Head]:
    """Give heads names that no other head has, and that do not end as those of divergences do.

    An output keeps its name where that is possible; a part whose usual name is taken has the output's in front.
    """
    found: list[Head] = []
    for head in parts:
        name, others = head.name, (taken | {h.name for h in found}) - ({head.output} if head.axis is None else set())
        if name in others:
            name = f"{head.output}/{name}"
        while name in others or is_divergence(name):
            name += "'"
        found.append(msgspec.structs.replace(head, name=name))
    return found


def _logits_of(graph: Graph, head: Head, means: Head | None) -> Head:
    """Return the head of the logits where a head is the probabilities that a Softmax makes of them; see case 4."""
    node = graph.value[head.tensor].producer()
    if means is None or node is None or node.op_type != "Softmax" or head.axis is not None:
        return head
    logits = node.inputs[0]
    assert logits is not None, "a Softmax has an operand"
    return msgspec.structs.replace(head, tensor=str(logits.name), given=PROBABILITIES, classes=means.classes)


def is_divergence(name: str) -> bool:
    """Return whether a head measures a KL divergence, by its name: damage is in nats, and dB are below 1 nat."""
    return name.endswith(KL)


def _counted(graph: Graph, outputs: Iterable[ir.Value], meaning: Meaning | None) -> set[str]:
    shapes = {str(v.name): static_shape(v) for v in outputs}
    named = set(read_fact(graph.metadata, HEADS, list[str], [])) & set(shapes)
    if not named and meaning is not None:
        named = set(meaning.weights({name: np.zeros(shape) for name, shape in shapes.items()}))
    return named or set(shapes)


def _distribution(value: ir.Value, head: Head, meaning: Meaning | None) -> Head | None:
    """The head as a distribution, where it certainly is one."""
    node, shape = value.producer(), static_shape(value)
    operator = node.op_type if node is not None else ""
    source = node
    while source is not None and source.op_type in MOVES and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    if source is not None and source.op_type == "Sigmoid":
        return msgspec.structs.replace(head, kind=BERNOULLI, given=PROBABILITIES)
    if node is not None and operator in ("Softmax", "LogSoftmax"):
        axis = int(attribute(node, "axis", -1)) % len(shape)  # type: ignore[call-overload]
        given = PROBABILITIES if operator == "Softmax" else LOGARITHMS
        return msgspec.structs.replace(head, kind=CATEGORICAL, given=given, classes=axis)
    if head.axis is not None:
        return None
    classes = (meaning.classes if meaning is not None else {}).get(head.output)
    if classes is None and head.output == "logits" and len(shape) == 2:
        classes = 1
    if classes is None or classes >= len(shape) or shape[classes] < 2:
        return None
    return msgspec.structs.replace(head, kind=CATEGORICAL, given=LOGITS, classes=classes)


def _parts(output: ir.Value) -> list[Head]:
    node, shape = _source(output).producer(), static_shape(output)
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
    """Return the part of the outputs that belongs to a head, in float64."""
    value = outputs[head.output].astype(np.float64)
    return value if head.axis is None else _along(value, head.axis, head.start, head.stop)


def needs_values(head: Head) -> bool:
    """Return whether errors of a head are weighted by its float values."""
    return bool(head.scores or head.kind or head.family or head.given)


class Squares:
    """Squared errors of a head, weighted by relevance: the noise and the signal of its SQNR.

    Args:
        head: the part of the outputs that is compared.
        exact: outputs of the float model on one sample.
        weights: weights of the head's elements, from the model's family; None where all count alike.
    """

    def __init__(self, head: Head, exact: Mapping[str, np.ndarray], weights: np.ndarray | None) -> None:
        self._value = signal = head_of(exact, head)
        self._factors = None if weights is None else np.sqrt(weights)
        if head.scores is not None and head.axis is not None:
            scores = _along(exact[head.output].astype(np.float64), head.axis, *head.scores)
            confidence = np.clip(scores.max(axis=head.axis, keepdims=True), 0.0, 1.0)
            size = np.maximum(_along(self._value, head.axis, 2, 4), LEAST_SIZE)
            signal = np.concatenate([size, size], axis=head.axis)
            self._factors = np.square(confidence) / signal
        self.energy = float(np.square(self._weighted(signal)).sum())
        """||y||^2, weighted. For weighted boxes their sizes stand for y: an error as large as the box is 0 dB."""

    noise = 0.0
    """Error energy of float32 arithmetic alone, which is negligible beside ||y||^2."""

    def error(self, found: np.ndarray) -> float:
        """Return ||y_found - y||^2, weighted by relevance."""
        return float(np.square(self._weighted(found - self._value)).sum())

    def cotangents(self, signs: np.ndarray) -> np.ndarray:
        """Turn independent signs (probes, *shape of the head) into probes v with E[<v, e>^2] = ||e||^2, weighted."""
        return self._weighted(signs)

    def _weighted(self, value: np.ndarray) -> np.ndarray:
        return value if self._factors is None else value * self._factors.astype(value.dtype)


class LogitSquares:
    """Squared errors of the logits of a head that gives probabilities: logarithms, centred over the classes.

    A Softmax tells logits but for what all of a position have in common. Classes whose probability is below
    `LEAST_TOLD` are left out: float32 holds them no longer.
    """

    noise = 0.0
    """Error energy of float32 arithmetic alone, which is negligible beside the energy of the logits."""

    def __init__(self, head: Head, exact: Mapping[str, np.ndarray]) -> None:
        assert head.classes is not None, "a head of probabilities has an axis of classes"
        self._axis, found = head.classes, head_of(exact, head)
        self._told = found > LEAST_TOLD
        self._count = np.maximum(self._told.sum(axis=self._axis, keepdims=True), 1)
        self._value = self._logits(found)
        self.energy = float(np.square(self._value).sum())
        """Energy of the centred logits."""

    def error(self, found: np.ndarray) -> float:
        """Return the squared error of the centred logits of other probabilities."""
        return float(np.square(self._logits(found) - self._value).sum())

    def cotangents(self, signs: np.ndarray) -> np.ndarray:
        """Turn independent signs (probes, *shape of the head) into probes v with E[<v, e>^2] = ||e||^2, e centred."""
        told, axis = self._told.astype(signs.dtype), self._axis + 1
        v = signs * told
        return np.asarray(v - told * (v.sum(axis=axis, keepdims=True) / self._count.astype(signs.dtype)))

    def _logits(self, probabilities: np.ndarray) -> np.ndarray:
        logs = np.where(self._told, np.log(np.maximum(probabilities, LEAST_TOLD)), 0.0)
        return np.asarray(self._told * (logs - logs.sum(axis=self._axis, keepdims=True) / self._count))


class Reference:
    """The float outputs of one sample, against which other outputs are measured, head by head.

    Args:
        exact: outputs of the float model on the sample.
        heads: the parts of the outputs that are compared.
    """

    def __init__(self, exact: Mapping[str, np.ndarray], heads: Sequence[Head]) -> None:
        self._heads = tuple(heads)
        families = {h.family for h in heads if h.family}
        weights = {name: w for f in families for name, w in MEANINGS[f].weights(exact).items()}
        self.parts = tuple(_measure(h, exact, weights.get(h.output) if h.family else None) for h in heads)
        """Measures of the errors, one per head."""

    @property
    def energy(self) -> np.ndarray:
        """Energy of each head, (heads,): ||y||^2, or twice the number of positions of a divergence."""
        return np.array([part.energy for part in self.parts])

    @property
    def noise(self) -> np.ndarray:
        """Error between any two models that float32 arithmetic causes, (heads,); see `Divergence.noise`."""
        return np.array([part.noise for part in self.parts])

    def error(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the error of each head, (heads,): ||y_found - y||^2, weighted, or 2 KL in nats of a divergence."""
        return np.array([p.error(head_of(found, h)) for h, p in zip(self._heads, self.parts, strict=True)])


def _measure(
    head: Head, exact: Mapping[str, np.ndarray], weights: np.ndarray | None
) -> Squares | LogitSquares | Divergence:
    if weights is not None:
        weights = np.broadcast_to(weights, exact[head.output].shape).astype(np.float64)
        weights = weights if head.axis is None else _along(weights, head.axis, head.start, head.stop)
        weights = None if (weights == 1.0).all() else weights
    if head.kind:
        return Divergence(head, head_of(exact, head), weights)
    if head.given:
        return LogitSquares(head, exact)
    return Squares(head, exact, weights)


def _along(value: np.ndarray, axis: int, start: int, stop: int | None) -> np.ndarray:
    return value[(slice(None),) * axis + (slice(start, stop),)]
