"""Scale channels between layers so that one INT8 step fits all of them; the float network computes the same numbers.

A tensor whose channels differ much in size wastes most of its 256 levels on the small ones. Where nothing but linear
layers reads it, channel j may be divided by any s_j > 0 if the weights that read it are multiplied by s_j:

Case 1. A normalization with a weight per channel: LayerNormalization, BatchNormalization that is not folded into a
        Conv, InstanceNormalization, or a Mul by a constant per channel (as RMSNorm and exports before opset 17 have
        it), perhaps with an Add of one behind it; behind channels of images also with the operators of case 2. Weight
        and bias are divided. SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438.
Case 2. A linear layer (Conv, Gemm, MatMul with or without an Add of a constant vector), perhaps with positively
        homogeneous operators behind it (Relu, LeakyRelu, PRelu, pooling). Its outputs, weights and bias, are divided.
        Cross-layer equalization, Nagel et al. 2019, https://arxiv.org/abs/1906.04721.

All readers must be linear layers with a constant weight that nothing else reads: MatMul and Gemm over the last axis,
Conv (also grouped and depthwise) over channels. A tensor that is read otherwise, or leaves the graph, stays as it is.

In both cases s_j = sqrt(max|X_j| / max|W_j|), over samples of the tensor and over the weights that read it:
SmoothQuant's factor with alpha = 0.5, and that of Nagel et al. with the range of the activation in place of that of the
first layer's weights, which bitalloy rounds per output channel, so that their scale has no effect. s_j is rounded to a
power of two: then every product and sum of the float network is scaled without any rounding.

Two kinds of channels have no such factor. One that is zero whatever the input, because all operands of case 1 or 2 are,
leaves what reads it without effect, and one whose readers are all zero has none itself: the other side becomes zero, so
that it does not widen the scale that its neighbours are rounded on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.calibrate.channels import channel_maxima
from bitalloy.core.jobs import Contexts
from bitalloy.model.graphs.again import GraphFile, open_file
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.read import attribute, constant, consumers, is_static, name_of, node_weight_axes, static_shape
from bitalloy.model.write import Fresh, add_initializer, namer

SMOOTHING, CROSS_LAYER = "smoothing", "cross-layer"
"""Names of cases 1 and 2."""
LINEAR = ops.WEIGHTED - {"ConvTranspose"}
LARGEST_POWER = 8
"""Largest power of two by which a channel is multiplied beside the median one: what no sample showed must not explode.
It is exceeded where even the largest values that the weights allow stay within the range of the other channels."""
SMALLEST_POWER = 16
"""Largest power of two by which a channel is divided beside the median one."""
NEVER = 1 << 10
"""Power of two that stands for infinity: with a minus the power of a channel that is always zero, without of one that
nothing reads."""
SomeGraph = TypeVar("SomeGraph", bound=Graph)


@dataclass(frozen=True, slots=True)
class Operand:
    """A constant operand with a factor per channel."""

    node: str
    slot: int
    axis: int
    """The axis that the channels run along. In a grouped convolution's weights it is 1: the channels of one group."""
    groups: int = 1


@dataclass(frozen=True, slots=True)
class ScalingPlace:
    """A tensor whose channels may be scaled."""

    rule: str
    """SMOOTHING or CROSS_LAYER."""
    tensor: str
    """The tensor that the linear layers read."""
    axis: int
    """The axis of its channels."""
    divided: tuple[Operand, ...]
    multiplied: tuple[Operand, ...]
    """Weights that read the tensor."""


def find_places(graph: Graph) -> tuple[ScalingPlace, ...]:
    """Find all places of a graph, in its order. A large model has none: its weights are shared, not copied.

    In a program a tensor that leaves one of its graphs stays as it is, also where a wire carries it on.
    """
    if graph.large:
        return ()
    outputs = set(graph.output_names)
    if isinstance(graph, Joined):
        parts, names = graph.program.graphs, graph.program.names
        outputs |= {names.get((part, t), f"{part}/{t}") for part in parts for t in parts[part].output_names}
    finder = _Finder(outputs)
    found = (
        finder.normalized(node) or finder.linear(node) for node in graph.nodes if all(map(is_static, node.outputs))
    )
    return tuple(place for place in found if place is not None)


def exponents(
    graph: Graph, places: Sequence[ScalingPlace], feeds: Iterable[Mapping[str, np.ndarray]]
) -> dict[ScalingPlace, tuple[int, ...]]:
    """Choose the factors of every place that has any to gain, as powers of two per channel.

    Args:
        graph: a graph in normal form.
        places: the places of the graph.
        feeds: samples.
    """
    if not places:
        return {}
    first = {place: graph.node[place.divided[0].node] for place in places}
    sources = {place: str(node.inputs[0].name) for place, node in first.items() if node.op_type in LINEAR}  # type: ignore[union-attr]
    tensors = {**dict.fromkeys(sources.values(), 0), **{p.tensor: p.axis for p in places}}
    maxima = channel_maxima(graph.model, tensors, feeds)
    found = {}
    for place in places:
        weights = np.max([_reach(graph.node[o.node], o) for o in place.multiplied], axis=0)
        sizes = [_sizes(graph.node[o.node], o) for o in place.divided]
        bound = np.full(len(weights), np.inf)
        if place in sources:
            bound = sizes[0] * float(maxima[sources[place]].max()) + np.sum(sizes[1:], axis=0)
        powers = _powers(maxima[place.tensor].astype(np.float64), weights, bound)
        dead = np.sum(sizes, axis=0) == 0
        powers[dead & (weights > 0)], powers[~dead & (weights == 0)] = -NEVER, NEVER
        if powers.any():
            found[place] = tuple(powers.tolist())
    return found


def _powers(seen: np.ndarray, weights: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Choose the power of two (channels,) by which each channel is divided.

    Args:
        seen: largest magnitude of each channel on samples.
        weights: largest magnitude of the weights that read it.
        bound: largest magnitude that the weights before it allow, whatever the input looks like; infinite if unknown.
    """
    alive = (seen > 0) & (weights > 0)
    if not alive.any():
        return np.zeros(len(seen), int)
    wanted = np.zeros(len(seen))
    wanted[alive] = 0.5 * (np.log2(seen[alive]) - np.log2(weights[alive]))
    wanted[alive] -= np.median(wanted[alive])
    least = np.full(len(seen), -float(LARGEST_POWER))
    largest = (seen[alive] / np.exp2(np.clip(wanted[alive], -LARGEST_POWER, SMALLEST_POWER))).max()
    least[alive] = np.minimum(least[alive], np.ceil(np.log2(np.maximum(bound[alive], 1e-300) / largest)))
    return np.clip(np.rint(wanted), least, SMALLEST_POWER).astype(int)


def scale(graph: SomeGraph, factors: Mapping[ScalingPlace, Sequence[int]]) -> SomeGraph:
    """Return the same network with other weights: each place divided by 2^factor, channel by channel.

    Args:
        graph: a graph in normal form, which is not changed.
        factors: from `exponents`; places of one graph, each tensor once.

    Returns:
        A graph with the same names, whose `rewritten` tells it from the one given.
    """
    model = graph.clone()
    nodes, fresh = {name_of(n): n for n in model.graph}, namer(model)
    for place, powers in factors.items():
        exponent = np.asarray(powers, np.float32)
        for operand in place.divided:
            _scale(model, fresh, nodes[operand.node], operand, np.exp2(-np.where(exponent == -NEVER, 0, exponent)))
        for operand in place.multiplied:
            _scale(model, fresh, nodes[operand.node], operand, np.exp2(np.where(exponent == NEVER, 0, exponent)))
    base = graph.base or graph.model
    if not factors:
        return replace(graph, model=model, base=base)
    said = [(p.tensor, list(powers)) for p, powers in factors.items()]
    digest = hashlib.sha256(f"{graph.rewritten}{said}".encode()).hexdigest()
    step = tuple((p.tensor, tuple(map(int, powers))) for p, powers in factors.items())
    return replace(graph, model=model, base=base, rewritten=digest, factors=(*graph.factors, step))


def open_graph(spec: GraphFile, _: Contexts) -> Graph:
    """Open a model again as a job needs it, with its channels scaled.

    Raises:
        ModelError: the file is missing, or has changed.
    """
    return _rescaled(open_file(spec), spec.factors)


def at_sizes(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """Load a model of one graph again, with other shapes of some inputs and the same factors.

    Raises:
        ModelError: the model does not take these shapes.
    """
    bound = {spec.name: tuple(int(d) for d in spec.shape) for spec in graph.info.inputs}
    return _rescaled(load_graph(graph.source, shapes={**bound, **shapes}, fixed=graph.fixed), graph.factors)


def _rescaled(graph: Graph, factors: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]) -> Graph:
    places = {place.tensor: place for place in find_places(graph)} if factors else {}
    for step in factors:
        graph = scale(graph, {places[tensor]: powers for tensor, powers in step})
    return graph


class _Finder:
    def __init__(self, outputs: Collection[str]) -> None:
        self._outputs = outputs
        """Tensors that leave the graph."""

    def normalized(self, node: ir.Node) -> ScalingPlace | None:
        """Find the places behind a normalization: case 1."""
        if node.op_type in ("BatchNormalization", "InstanceNormalization"):
            return self._behind(node, 1, (1, 2))
        if node.op_type not in ("LayerNormalization", "Mul"):
            return None
        rank = len(static_shape(node.outputs[0]))
        if node.op_type == "LayerNormalization" or not rank:
            return self._behind(node, rank - 1, (1, 2)) if rank else None
        axes = dict.fromkeys((rank - 1, 1)) if rank > 2 else (rank - 1,)
        return next((place for axis in axes if (place := self._behind(node, axis, ())) is not None), None)

    def _behind(self, node: ir.Node, axis: int, slots: Sequence[int]) -> ScalingPlace | None:
        """Find the place whose channels run along an axis of what a node gives.

        Args:
            node: the node.
            axis: of the channels.
            slots: its inputs that are vectors over the channels; none where one of both inputs is.
        """
        out = node.outputs[0]
        shape = static_shape(out)
        rank, size = len(shape), shape[axis]
        if slots:
            slots = [s for s in slots if s < len(node.inputs) and node.inputs[s] is not None]
            if any(_vector_axis(node.inputs[s], 1, 0, size) is None for s in slots):
                return None
            divided = [Operand(name_of(node), slot, -1) for slot in slots]
        else:
            found = [(s, _vector_axis(v, rank, axis, size)) for s, v in enumerate(node.inputs)]
            divided = [Operand(name_of(node), slot, at) for slot, at in found if at is not None]
            if len(divided) != 1:
                return None
        added = self._added(out, axis)
        if added is not None:
            divided.append(added[1])
            out = added[0]
        if axis == 1 and rank > 2:
            out = self._homogeneous(out, axis, "Conv")
        readers = self._readers(out, axis)
        return ScalingPlace(SMOOTHING, str(out.name), axis, tuple(divided), readers) if readers else None

    def linear(self, node: ir.Node) -> ScalingPlace | None:
        """Find the places between two linear layers: case 2."""
        weights = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if node.op_type not in LINEAR or weights is None or not _is_own(node.inputs[1]):
            return None
        if node.op_type != "Conv" and weights.ndim != 2:
            return None
        out = node.outputs[0]
        shape = static_shape(out)
        axis = ops.channel_axis(node.op_type, len(shape))
        divided = [Operand(name_of(node), 1, node_weight_axes(node)[1])]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            if _vector_axis(bias, 1, 0, shape[axis]) is None:
                return None
            divided.append(Operand(name_of(node), 2, -1))
        added = self._added(out, axis) if node.op_type == "MatMul" else None
        if added is not None:
            divided.append(added[1])
            out = added[0]
        out = self._homogeneous(out, axis, node.op_type)
        readers = self._readers(out, axis)
        return ScalingPlace(CROSS_LAYER, str(out.name), axis, tuple(divided), readers) if readers else None

    def _readers(self, value: ir.Value, axis: int) -> tuple[Operand, ...]:
        """List the weights of the linear layers that read a tensor; none where anything else does."""
        found = []
        rank = len(static_shape(value))
        for use in consumers(value):
            node, weight = use.node, use.node.inputs[1] if len(use.node.inputs) > 1 else None
            array = constant(weight)
            if use.slot != 0 or array is None or not _is_own(weight):
                return ()
            if node.op_type not in LINEAR or axis != ops.channel_axis(node.op_type, rank):
                return ()
            if attribute(node, "transA", 0) or (node.op_type != "Conv" and array.ndim != 2):
                return ()
            groups = int(attribute(node, "group", 1))  # type: ignore[call-overload]
            found.append(Operand(name_of(node), 1, node_weight_axes(node)[0], groups))
        empty = 0 in static_shape(value)  # as a cache before the first token
        return () if empty or value.name in self._outputs else tuple(found)

    def _added(self, value: ir.Value, axis: int) -> tuple[ir.Value, Operand] | None:
        """Find the Add of a constant per channel that alone reads a tensor: its result, and the constant."""
        node = self._only_reader(value)
        if node is None or node.op_type != "Add":
            return None
        shape = static_shape(value)
        found = [(s, _vector_axis(v, len(shape), axis, shape[axis])) for s, v in enumerate(node.inputs)]
        slots = [(slot, at) for slot, at in found if at is not None]
        if len(slots) != 1 or len(node.outputs[0].shape or ()) != len(shape):
            return None
        return node.outputs[0], Operand(name_of(node), *slots[0])

    def _homogeneous(self, value: ir.Value, axis: int, source: str) -> ir.Value:
        """Follow a tensor through the homogeneous operators that alone read it."""
        while (after := self._only_reader(value)) is not None and _is_homogeneous(after, value, axis, source):
            value = after.outputs[0]
        return value

    def _only_reader(self, value: ir.Value) -> ir.Node | None:
        uses = consumers(value)
        return uses[0].node if len(uses) == 1 and value.name not in self._outputs else None


def _is_homogeneous(node: ir.Node, value: ir.Value, axis: int, source: str) -> bool:
    """Tell whether a node carries factors of its first operand's channels through; pools do on axis 1 only."""
    if node.op_type not in ops.HOMOGENEOUS or node.inputs[0] is not value or len(node.outputs) != 1:
        return False
    if node.op_type == "PRelu":
        return constant(node.inputs[1]) is not None
    return node.op_type not in ops.POOLS or (axis == 1 and source == "Conv")


def _vector_axis(value: ir.Value | None, rank: int, axis: int, size: int) -> int | None:
    """Find along which of its own axes, counted from the last, a constant has a number for each of `size` channels.

    Args:
        value: an operand that is broadcast to the tensor; None is no constant.
        rank: of the tensor.
        axis: of the channels in the tensor.
        size: number of the channels.
    """
    array, at = constant(value), axis - rank
    if array is None or array.dtype != np.float32 or array.ndim < -at or array.size != size:
        return None
    return at if array.shape[at] == size else None


def _is_own(value: ir.Value | None) -> bool:
    """Tell whether a weight is read once, and is no output."""
    return value is not None and len(consumers(value)) == 1 and not value.is_graph_output()


def _reach(node: ir.Node, operand: Operand) -> np.ndarray:
    """Return the largest magnitude (channels,) of the weights that read each channel."""
    array = constant(node.inputs[operand.slot])
    assert array is not None, "weights of a place are constants"
    parts = np.abs(np.moveaxis(array, operand.axis, 0)).reshape(array.shape[operand.axis], -1)
    if operand.groups == 1:
        return np.asarray(parts.max(axis=1))
    grouped = np.abs(array).reshape(operand.groups, array.shape[0] // operand.groups, array.shape[1], -1)
    return np.asarray(grouped.max(axis=(1, 3)).reshape(-1))


def _sizes(node: ir.Node, operand: Operand) -> np.ndarray:
    """Return the sum of magnitudes (channels,) of an operand that is divided."""
    array = constant(node.inputs[operand.slot])
    assert array is not None, "operands of a place are constants"
    axis = operand.axis % array.ndim
    return np.asarray(np.abs(array).sum(axis=tuple(d for d in range(array.ndim) if d != axis), dtype=np.float64))


def _scale(model: ir.Model, fresh: Fresh, node: ir.Node, operand: Operand, steps: np.ndarray) -> None:
    """Multiply a constant operand by a factor per channel; one that others read too is copied first."""
    value = node.inputs[operand.slot]
    array = constant(value)
    assert value is not None and array is not None, "operands of a place are constants"
    if operand.groups > 1:
        rows = np.repeat(steps.reshape(operand.groups, -1), array.shape[0] // operand.groups, axis=0)
        factor = rows.reshape(*rows.shape, *[1] * (array.ndim - 2))
    else:
        axis = operand.axis % array.ndim
        factor = steps.reshape([-1 if d == axis else 1 for d in range(array.ndim)])
    scaled = np.asarray(array * factor, np.float32)
    if _is_own(value):
        value.const_value = ir.tensor(scaled, name=value.name)
        return
    own = add_initializer(model.graph, fresh(f"{node.name}/scaled{operand.slot}"), scaled)
    node.replace_input_with(operand.slot, own)
