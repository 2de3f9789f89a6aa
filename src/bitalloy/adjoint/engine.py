"""Build the reverse pass of a graph as a second ONNX graph.

Two graphs come out. The *primal* graph is the network plus everything that the reverse pass needs and
that depends on the sample alone: local derivatives, and the local error of every rounding. The *reverse*
graph of one head is linear in the cotangent: it carries it back through the network and multiplies it
with the errors where they arise, so that only one number per tap leaves the session.

A cotangent travels as `base * diagonal`: the base lives in the reverse graph, the diagonal (a product
of elementwise derivatives) in the primal one. Chains of elementwise operators therefore cost the
reverse pass nothing but one product at the next operator that mixes elements, and all sums over
branches of such a chain (x * sigmoid(x)) are taken once per sample instead of once per probe.

Every value of the reverse graph has a leading axis of probes, so several cotangents can go back at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.adjoint.builder import Builder
from bitalloy.core.errors import UnsupportedOpError
from bitalloy.core.units import Edge
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, consumers, is_float, name_of, read_values, static_shape
from bitalloy.model.weights import Packed, pack

REVERSE_OPSET = 17
PARTS = 16
"""Largest number of parts into which the error of a tap is cut. Roundings in different parts are nearly independent, so
that the squares of the parts together tell the energy of the tap with far less noise than the square of their sum."""
FLOATING = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, slots=True)
class Cotangent:
    """The gradient of one tensor for every probe: `base * diagonal`, on `window` of the tensor only.

    `base` is (P, *shape of the window); `diagonal` broadcasts to the window's shape, None means ones.
    `window` is (axis, start, stop); outside it the gradient is zero. None means the whole tensor.
    """

    base: ir.Value
    diagonal: ir.Value | None = None
    window: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Tap:
    """A local error whose effect on the heads the reverse pass computes.

    `edges` names where the error is added: into some consumers of one tensor; an edge with an empty node adds
    it to the tensor itself, ahead of all consumers, or, where `leaving`, behind them: to what leaves the graph and
    nothing else. `error` writes the error, of the tensor's shape, into the primal graph.
    """

    id: str
    edges: tuple[Edge, ...]
    error: Callable[[Builder, Mapping[str, ir.Value]], ir.Value]
    leaving: bool = False


@dataclass(frozen=True)
class ReverseGraph:
    """The reverse pass of one head."""

    head: str
    cotangent: str
    """Name of the input (P, *shape of the head's tensor)."""
    shape: tuple[int, ...]
    residuals: tuple[str, ...]
    """Outputs of the primal graph that are inputs here."""
    taps: tuple[str, ...]
    """Tap ids in the order of the output's columns; taps that cannot reach the head are left out."""
    parts: tuple[int, ...]
    """How many neighbouring columns each tap has: its error is cut into so many parts (blocks of channels)."""
    model: Packed
    output: str
    """Name of the output (P, sum of parts): the inner products of cotangent and error, part by part."""
    rows: dict[str, str]
    """Tensor -> name of the output (P, *shape without the last axis) with the squared norms of its gradient's rows."""

    def by_tap(self, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each tap's inner product with the cotangent, and the sum of squares over its parts; (P, taps) each."""
        starts = np.cumsum((0, *self.parts))[:-1]
        if not len(starts):
            return products, products
        sums, squares = (np.add.reduceat(p, starts, axis=1) for p in (products, np.square(products)))
        return sums, squares


@dataclass(frozen=True)
class Adjoint:
    """A primal graph and one reverse graph per head."""

    primal: Packed
    energies: tuple[str, ...]
    """Names of scalar primal outputs: the sum of squares of each head's tensor, in the order of the heads."""
    heads: tuple[ReverseGraph, ...]


class Context:
    """What an adjoint rule works with: the builders of both graphs, and the residuals that cross between them."""

    def __init__(self, primal: Builder, reverse: Builder, wanted: set[ir.Value], probes: ir.Value) -> None:
        self.p = primal
        self.r = reverse
        self.probes = probes
        """(1,) int64 in the reverse graph: the number of probes."""
        self.opset = int(primal.graph.opset_imports[""])
        """Opset of the network; the meaning of some operators depends on it."""
        self._wanted = wanted
        self.residuals: dict[ir.Value, ir.Value] = {}

    def wants(self, value: ir.Value | None) -> bool:
        """Return whether the gradient of this input is needed at all."""
        return value in self._wanted

    def residual(self, value: ir.Value) -> ir.Value:
        """Bring a primal value into the reverse graph: constants share memory, others cross the session border."""
        if value not in self.residuals:
            array = constant(value)
            if array is not None:
                self.residuals[value] = self.r.const(array)
            else:
                copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
                self.r.graph.inputs.append(copy)
                self.residuals[value] = copy
        return self.residuals[value]

    def scaled(self, cot: Cotangent, factor: ir.Value) -> Cotangent:
        """Multiply by an elementwise factor of the primal graph, at no cost in the reverse graph."""
        return replace(cot, diagonal=factor if cot.diagonal is None else self.p.mul(cot.diagonal, factor))

    def dense(self, cot: Cotangent) -> ir.Value:
        """Return the gradient as one reverse value (P, *shape of the window)."""
        if cot.diagonal is None:
            return cot.base
        return self.r.op("Mul", cot.base, self.residual(cot.diagonal))

    def whole(self, cot: Cotangent, value: ir.Value) -> Cotangent:
        """Return the gradient of `value` without its window: zeros fill what lies outside of it."""
        if cot.window is None:
            return cot
        axis, start, stop = cot.window
        shape = static_shape(value)
        before, after = [0] * (len(shape) + 1), [0] * (len(shape) + 1)
        before[axis + 1], after[axis + 1] = start, shape[axis] - stop
        return Cotangent(self.r.op("Pad", self.dense(cot), self.r.const(before + after)))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape a reverse value to (P, *shape)."""
        return self.r.op("Reshape", value, self.r.const([-1, *shape]))

    def zeros(self, shape: Sequence[int]) -> ir.Value:
        """Return a reverse value of zeros, (P, *shape)."""
        full = self.r.op("Concat", self.probes, self.r.const(list(shape)), axis=0) if shape else self.probes
        return self.r.op("Expand", self.r.const(np.zeros((), np.float32)), full)

    def unbroadcast(self, value: ir.Value, shape: tuple[int, ...], to: tuple[int, ...]) -> ir.Value:
        """Sum a reverse value (P, *shape) over the axes along which `to` was broadcast to `shape`."""
        if shape == to:
            return value
        lead = len(shape) - len(to)
        axes = [i + 1 for i in range(len(shape)) if i < lead or (to[i - lead] == 1 and shape[i] > 1)]
        if axes:
            value = self.r.op("ReduceSum", value, self.r.const(axes), keepdims=1)
        return self.reshape(value, to) if lead else value


Cots = Sequence[Cotangent | None]
"""Gradients of a node's outputs or inputs, by position; None where a tensor has no gradient."""
Rule = Callable[[Context, ir.Node, Cots], Cots]
"""Function from the gradients of a node's outputs to those of its inputs; None where none exists or is wanted."""


def build(
    graph: Graph,
    heads: Mapping[str, str],
    taps: Sequence[Tap],
    rules: Mapping[str, Rule],
    *,
    stops: frozenset[str] = frozenset(),
    keep: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Adjoint:
    """Write the primal graph and a reverse graph for every head.

    Args:
        graph: the network in normal form.
        heads: head name -> tensor from which it is read.
        taps: the local errors to be carried to the heads.
        rules: operator -> rule.
        stops: node names through which no gradient flows; of what lies before them nothing is known.
        keep: further tensors that the primal graph returns.
        rows: tensors of whose gradients the reverse graphs return the squared norm of every row, the last axis.

    Raises:
        UnsupportedOpError: an operator between a tap and a head has no rule, or its rule does not cover this use.
    """
    model = graph.clone()
    nodes = list(model.graph)
    values: dict[str, ir.Value] = {str(v.name): v for v in [*model.graph.inputs, *model.graph.initializers.values()]}
    values.update({str(v.name): v for n in nodes for v in n.outputs})
    prefix = "adjoint/"
    while any(name.startswith(prefix) for name in (*values, *map(name_of, nodes))):
        prefix = f"_{prefix}"
    primal = Builder(model.graph, f"{prefix}p/")
    network = _Network(
        nodes=nodes,
        values=values,
        taps=taps,
        errors={tap.id: tap.error(primal, values) for tap in taps},
        wanted=_wanted(nodes, {values[t.edges[0].tensor] for t in taps} | {values[name] for name in rows}, stops),
        primal=primal,
        rules=rules,
        stops=stops,
        rows=frozenset(rows),
        prefix=prefix,
    )
    energies = [
        primal.op("ReduceSumSquare", primal.flat(values[tensor]), keepdims=0, shape=()) for tensor in heads.values()
    ]
    reverses = []
    exported = dict.fromkeys([*energies, *(values[name] for name in keep)])
    for head, tensor in heads.items():
        reversal = _Reversal(network, head, values[tensor])
        reverses.append(reversal.written())
        exported.update(dict.fromkeys(v for v in reversal.context.residuals if constant(v) is None))
    del model.graph.outputs[:]
    model.graph.outputs.extend(exported)
    _drop_unused(model)
    return Adjoint(pack(model), tuple(str(e.name) for e in energies), tuple(reverses))


def _wanted(nodes: list[ir.Node], asked: set[ir.Value], stops: frozenset[str]) -> set[ir.Value]:
    """Tensors whose gradient is needed: those asked for, and all floating-point tensors that vary with them."""
    wanted = set(asked)
    for node in nodes:
        if not _blocks(node, stops) and any(v in wanted for v in node.inputs):
            wanted.update(v for v in node.outputs if v.dtype in FLOATING)
    return wanted


def _blocks(node: ir.Node, stops: frozenset[str]) -> bool:
    return node.name in stops or node.op_type in ops.STEPWISE


@dataclass(frozen=True, kw_only=True)
class _Network:
    """What the reverse graphs of all heads have in common."""

    nodes: Sequence[ir.Node]
    values: Mapping[str, ir.Value]
    taps: Sequence[Tap]
    errors: Mapping[str, ir.Value]
    """Tap id -> the error, in the primal graph."""
    wanted: set[ir.Value]
    primal: Builder
    rules: Mapping[str, Rule]
    stops: frozenset[str]
    rows: frozenset[str]
    """Tensors of whose gradients the norms of the rows are wanted."""
    prefix: str


class _Reversal:
    """Writes the reverse graph of one head."""

    def __init__(self, network: _Network, head: str, tensor: ir.Value) -> None:
        self._network, self._head, self._tensor = network, head, tensor
        shape, prefix = ir.Shape(("P", *static_shape(tensor))), network.prefix
        self._cotangent = ir.Value(name=f"{prefix}v", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        opsets = {"": REVERSE_OPSET, "com.microsoft": 1}
        self._graph = ir.Graph([self._cotangent], [], nodes=[], opset_imports=opsets, name="reverse")
        self._builder = Builder(self._graph, f"{prefix}r/")
        probes = self._builder.op("Shape", self._cotangent, start=0, end=1)
        self.context = Context(network.primal, self._builder, network.wanted, probes)
        self._incoming: dict[ir.Value, list[Cotangent]] = defaultdict(list)
        self._incoming[tensor].append(Cotangent(self._cotangent))
        # a head that is joined with others by the last Concat, or read by the last Softmax, is tapped on its way there
        last = [
            c
            for c in consumers(tensor)
            if c.node.op_type in ("Concat", "Softmax") and c.node.outputs[0].is_graph_output()
        ]
        self._collected = {(name_of(c.node), c.slot): Cotangent(self._cotangent) for c in last}
        self._columns: list[tuple[str, ir.Value, int]] = []
        self._rows: dict[str, ir.Value] = {}
        self._tapped: dict[ir.Value, list[Tap]] = defaultdict(list)
        for tap in network.taps:
            self._tapped[network.values[tap.edges[0].tensor]].append(tap)
        self._used = {(e.node, e.slot) for t in network.taps for e in t.edges}

    def written(self) -> ReverseGraph:
        for node in reversed(self._network.nodes):
            self._pass(node)
        for value in list(self._incoming):
            self._close(value)
        return self._finished()

    def _pass(self, node: ir.Node) -> None:
        """Carry the gradients of a node's outputs to its inputs."""
        outputs = [self._close(v) for v in node.outputs]
        if all(c is None for c in outputs) or not any(self.context.wants(v) for v in node.inputs):
            return
        if _blocks(node, self._network.stops):
            return
        for slot, cot in _gradients(self.context, self._network.rules, node, outputs).items():
            source = node.inputs[slot]
            assert source is not None
            if (name_of(node), slot) in self._used:
                self._collected[name_of(node), slot] = cot
            self._incoming[source].append(cot)

    def _close(self, value: ir.Value) -> Cotangent | None:
        """All gradients of a tensor are known: add them up, and read its taps."""
        total = _sum(self.context, value, self._incoming.pop(value, []))
        for tap in self._tapped[value]:
            leaving = Cotangent(self._cotangent) if value is self._tensor else None
            whole = leaving if tap.leaving else total
            found = [whole if not e.node else self._collected.get((e.node, e.slot)) for e in tap.edges]
            products: dict[tuple[int, int, int] | None, list[tuple[ir.Value, int]]] = defaultdict(list)
            for term in _merge(self.context, [c for c in found if c is not None]):
                products[term.window].append(_inner(self.context, value, term, self._network.errors[tap.id]))
            for same in products.values():
                (first, count), rest = same[0], [p for p, _ in same[1:]]
                column = self._builder.op("Sum", first, *rest) if rest else first
                self._columns.append((tap.id, column, count))
        if total is not None and value.name in self._network.rows:
            dense = self.context.dense(self.context.whole(total, value))
            self._rows[value.name] = self._builder.op("ReduceSumSquare", dense, axes=[-1], keepdims=0)
        return total

    def _finished(self) -> ReverseGraph:
        """The graph, with the columns of all taps as its output."""
        result = self.context.zeros((0,))
        if self._columns:
            joined = self._builder.op("Concat", *(c for _, c, _ in self._columns), axis=1)
            result = self.context.reshape(joined, [sum(n for _, _, n in self._columns)])
        parts: dict[str, int] = defaultdict(int)
        for tap_id, _, count in self._columns:
            parts[tap_id] += count
        result.name = f"{self._network.prefix}a"
        self._graph.outputs.extend([result, *self._rows.values()])
        return ReverseGraph(
            head=self._head,
            cotangent=str(self._cotangent.name),
            shape=static_shape(self._tensor),
            residuals=tuple(str(v.name) for v in self.context.residuals if constant(v) is None),
            taps=tuple(parts),
            parts=tuple(parts.values()),
            model=pack(ir.Model(self._graph, ir_version=8)),
            output=result.name,
            rows={tensor: str(value.name) for tensor, value in self._rows.items()},
        )


def _gradients(
    context: Context, rules: Mapping[str, Rule], node: ir.Node, outputs: Sequence[Cotangent | None]
) -> dict[int, Cotangent]:
    """Slot -> gradient for every input that wants one; refuses what the rule does not cover.

    Case 1: no rule for the operator.
    Case 2: an input in another precision than float32.
    Case 3: a secondary output (e.g. the indices or statistics of the main one) carries a gradient.
    Case 4: a wanted input that the rule has no derivative for (e.g. computed weights).
    """
    rule = rules.get(node.op_type)
    if rule is None:
        raise unsupported(node, "has no adjoint rule")
    slots = {s: v for s, v in enumerate(node.inputs) if v is not None and context.wants(v)}
    for value in slots.values():
        if not is_float(value):
            raise unsupported(node, f"reads '{value.name}', which is {value.dtype} and not FLOAT")
    if node.op_type not in ops.SEVERAL_OUTPUTS | ops.RECURRENT and any(outputs[1:]):
        raise unsupported(node, "has an adjoint rule for its first output only")
    gradients = dict(enumerate(rule(context, node, outputs)))
    found = {s: cot for s in slots if (cot := gradients.get(s)) is not None}
    for slot, value in slots.items():
        if slot not in found:
            raise unsupported(node, f"has no adjoint rule for a computed input {slot} ('{value.name}')")
    return found


def unsupported(node: ir.Node, what: str) -> UnsupportedOpError:
    """Return the error of a node that stands between a tap and a head and cannot be differentiated."""
    return UnsupportedOpError(
        f"Node '{node.name}' ({node.op_type}) {what}, so gradients do not tell what rounding before it "
        f"does. Keep it in float with --exclude '{node.name}': what lies before it is then measured by execution.",
        node=name_of(node),
        what=f"{node.op_type} '{node.name}' {what}",
    )


def _sum(context: Context, value: ir.Value, cots: list[Cotangent]) -> Cotangent | None:
    """Add gradients that reach a tensor along several ways.

    Case 1: the same base: the diagonals are added in the primal graph.
    Case 2: windows that tile an axis: one Concat.
    Case 3: anything else: pad windows with zeros and add.
    """
    if not cots:
        return None
    terms = _merge(context, cots)
    if len(terms) == 1 and terms[0].window is None:
        return terms[0]
    shape = static_shape(value)
    whole = [context.dense(t) for t in terms if t.window is None]
    windows = sorted((t for t in terms if t.window is not None), key=lambda t: t.window or (0, 0, 0))
    axes = {t.window[0] for t in windows if t.window}
    if len(axes) == 1:
        axis = axes.pop()
        bounds = [(t.window[1], t.window[2]) for t in windows if t.window]
        if [b[0] for b in bounds] == [0, *(b[1] for b in bounds[:-1])] and bounds[-1][1] == shape[axis]:
            whole.append(context.r.op("Concat", *(context.dense(t) for t in windows), axis=axis + 1))
            windows = []
    whole += [context.whole(t, value).base for t in windows]
    total = whole[0]
    for term in whole[1:]:
        total = context.r.op("Add", total, term)
    return Cotangent(total)


def _merge(context: Context, cots: Sequence[Cotangent]) -> list[Cotangent]:
    """Gradients with the same base and window as one: their diagonals are added in the primal graph."""
    merged: dict[tuple[ir.Value, tuple[int, int, int] | None], ir.Value | None] = {}
    for cot in cots:
        key = (cot.base, cot.window)
        if key not in merged:
            merged[key] = cot.diagonal
            continue
        one = context.p.const(np.ones((), np.float32))
        merged[key] = context.p.add(merged[key] or one, cot.diagonal or one)
    return [Cotangent(base, diagonal, window) for (base, window), diagonal in merged.items()]


def _inner(context: Context, value: ir.Value, cot: Cotangent, error: ir.Value) -> tuple[ir.Value, int]:
    """<gradient, error> for every probe and part of the error, (P, parts, 1, 1), and the number of parts.

    The first axis longer than one (the channels of an image) is cut into equal blocks.
    """
    shape = list(static_shape(value))
    if cot.window is not None:
        axis, start, stop = cot.window
        shape[axis] = stop - start
        bounds = [context.p.const([x]) for x in (start, stop, axis)]
        error = context.p.op("Slice", error, *bounds, shape=shape)
    if cot.diagonal is not None:
        error = context.p.mul(error, cot.diagonal)
    channels = next((d for d in shape if d > 1), 1)
    parts = next(n for n in range(min(PARTS, channels), 0, -1) if channels % n == 0)
    view = [parts, 1, int(np.prod(shape)) // parts]
    # viewed here, because the runtime copies what a Reshape hands out of a graph
    flat = context.r.op("Reshape", context.residual(error), context.r.const([1, *view]))
    # a batch of dot products of contiguous memory, which MatMul without its transposed form does slowly
    rows = context.reshape(cot.base, view)
    return context.r.op("FusedMatMul", flat, rows, transB=1), parts


def _drop_unused(model: ir.Model) -> None:
    used = set(model.graph.outputs)
    for node in reversed(list(model.graph)):
        if any(v in used for v in node.outputs):
            used.update(read_values(node))
        else:
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if value not in used:
            model.graph.initializers.pop(name)
