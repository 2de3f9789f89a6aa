"""Recurrent layers: LSTM, GRU and RNN, of one or both directions.

A step of such a layer is linear in what it hands on, once its gates are known. So the primal graph runs the layer again
as a Scan that keeps the local derivatives of every step, and the reverse graph runs back through these with another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import Context, Cotangent, Cots, Rule, unsupported
from bitalloy.adjoint.rules.activations import DERIVATIVES
from bitalloy.adjoint.rules.elementwise import between, one_minus, scalar
from bitalloy.adjoint.rules.shape import data
from bitalloy.model.read import attribute, constant, name_of, static_shape

_WEIGHT, _RECURRENCE, _BIAS, _LENGTHS, _FIRST_HIDDEN, _FIRST_CELL, _PEEPHOLES = range(1, 8)
"""Inputs of a recurrent layer. Only an LSTM has the last two."""
TAKES_ALPHA = {
    "Affine": 0.0, "Elu": 1.0, "HardSigmoid": 0.2, "LeakyRelu": 0.01, "ScaledTanh": 0.0, "ThresholdedRelu": 0.0,
}  # fmt: skip
"""Functions that take the first number, with the value that ONNX Runtime takes where it is not given."""
TAKES_BETA = {"Affine": 0.0, "HardSigmoid": 0.5, "ScaledTanh": 0.0}
"""The same of the second number."""
FUNCTIONS = {f.lower(): f for f in ("Elu", "Relu", "Sigmoid", "Softplus", "Softsign", "Tanh", *TAKES_ALPHA)}
"""Activation functions of recurrent layers, whose names may be written in any case."""
Activation = Callable[[Builder, ir.Value], tuple[ir.Value, ir.Value]]
"""Function (builder, x) -> y and dy/dx."""


@dataclass(frozen=True)
class RecurrentLayer:
    """What tells one recurrent layer from another."""

    activations: tuple[str, ...]
    """Activation functions of a direction, where the node names none."""
    states: int
    step: Callable[[_Direction, Builder, Sequence[ir.Value], ir.Value], tuple[Sequence[ir.Value], Sequence[ir.Value]]]
    """Function (direction, builder, states, what the input adds to the gates) -> next states, local derivatives."""
    back: Callable[
        [_Direction, Builder, ir.Value, Sequence[ir.Value], Sequence[ir.Value]], tuple[Sequence[ir.Value], ir.Value]
    ]
    """Function (direction, builder, the hidden state's gradient, those of all states, local derivatives) -> gradients
    of the states before, gradient of the gates."""


@dataclass(frozen=True)
class _Direction:
    """One direction of a recurrent layer."""

    ctx: Context
    node: ir.Node
    index: int
    hidden: int
    activations: tuple[Activation, ...]
    clip: float | None

    @property
    def backwards(self) -> bool:
        return self.index == 1 or attribute(self.node, "direction", "forward") == "reverse"

    def array(self, slot: int) -> np.ndarray | None:
        """The part of a weight that belongs to this direction; None where the node has none."""
        if slot >= len(self.node.inputs) or self.node.inputs[slot] is None:
            return None
        found = constant(self.node.inputs[slot])
        if found is None:
            raise unsupported(self.node, f"computes its weights '{data(self.node, slot).name}' at run time")
        return np.ascontiguousarray(found[self.index])

    @property
    def recurrence(self) -> np.ndarray:
        """Weights of the hidden state, (gates * hidden, hidden)."""
        found = self.array(_RECURRENCE)
        assert found is not None, "the operator asks for these weights"
        return found

    @property
    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """What is added to the gates with the input, and with the hidden state."""
        found = self.array(_BIAS)
        both = np.zeros(2 * len(self.recurrence), np.float32) if found is None else found
        return both[: len(both) // 2], both[len(both) // 2 :]

    def activated(self, builder: Builder, which: int, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Apply an activation function; returns the result and the derivative.

        Gates are clipped ahead of it, but not the cell of an LSTM: so does ONNX Runtime.
        """
        if self.clip is None or which == 2:
            return self.activations[which](builder, x)
        ends = scalar(builder, -self.clip), scalar(builder, self.clip)
        y, slope = self.activations[which](builder, builder.like("Clip", x, *ends))
        return y, builder.mul(slope, between(builder, x, *ends))

    def by_state(self, builder: Builder, hidden: ir.Value, start: int, stop: int) -> ir.Value:
        """Product of the hidden state and the weights of the gates from `start` to before `stop`."""
        rows = np.ascontiguousarray(self.recurrence[start * self.hidden : stop * self.hidden].T)
        shape = (static_shape(hidden)[0], rows.shape[1])
        return builder.op("MatMul", hidden, self.ctx.p.const(rows), shape=shape)

    def back_by_state(self, builder: Builder, gates: ir.Value, start: int, stop: int) -> ir.Value:
        """The adjoint of `by_state`."""
        rows = self.recurrence[start * self.hidden : stop * self.hidden]
        return builder.op("MatMul", gates, self.ctx.r.const(np.ascontiguousarray(rows)))


def _split(builder: Builder, x: ir.Value, hidden: int) -> Sequence[ir.Value]:
    """Cut gates side by side into one tensor each."""
    rows, columns = static_shape(x)
    sizes = builder.const([hidden] * (columns // hidden))
    parts = builder.op_multi("Split", x, sizes, outputs=columns // hidden, axis=1) if columns > hidden else (x,)
    for part in parts:
        part.shape = ir.Shape((rows, hidden))
    return parts


def _join(builder: Builder, *parts: ir.Value) -> ir.Value:
    """Put gates side by side."""
    shape = None
    if all(p.shape is not None for p in parts):
        shape = (static_shape(parts[0])[0], sum(static_shape(p)[1] for p in parts))
    return builder.op("Concat", *parts, axis=-1, shape=shape)


def _lstm_step(
    way: _Direction, b: Builder, states: Sequence[ir.Value], given: ir.Value
) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
    """Derivatives: of the cell by the hidden state, of the gates by cell and hidden state, of the cell before."""
    hidden, cell = states
    i, o, f, z = _split(b, b.add(given, way.by_state(b, hidden, 0, 4)), way.hidden)
    peepholes = way.array(_PEEPHOLES)
    looks = [] if peepholes is None else [b.const(part) for part in np.split(peepholes, 3)]
    if looks:
        i, f = b.add(i, b.mul(looks[0], cell)), b.add(f, b.mul(looks[2], cell))
    i, di = way.activated(b, 0, i)
    f, df = way.activated(b, 0, f)
    z, dz = way.activated(b, 1, z)
    into = z
    if coupled := bool(attribute(way.node, "input_forget", 0)):
        f, into = one_minus(b, i), b.like("Sub", z, cell)
    by_i = b.mul(into, di)
    by_f = b.mul(cell, df) if not coupled else b.mul(df, scalar(b, 0.0))
    new_cell = b.add(b.mul(f, cell), b.mul(i, z))
    if looks:
        o = b.add(o, b.mul(looks[1], new_cell))
    o, do = way.activated(b, 0, o)
    shown, slope = way.activated(b, 2, new_cell)
    by_o, by_cell, kept = b.mul(shown, do), b.mul(o, slope), f
    if looks:
        by_cell = b.add(by_cell, b.mul(by_o, looks[1]))
        kept = b.add(kept, b.add(b.mul(by_i, looks[0]), b.mul(by_f, looks[2])))
    return (b.mul(o, shown), new_cell), (by_cell, _join(b, by_i, by_o, by_f, b.mul(i, dz)), kept)


def _lstm_back(
    way: _Direction, b: Builder, hidden: ir.Value, states: Sequence[ir.Value], slopes: Sequence[ir.Value]
) -> tuple[Sequence[ir.Value], ir.Value]:
    by_cell, by_gates, kept = slopes
    cell = b.op("Add", states[1], b.op("Mul", hidden, by_cell))
    gates = b.op("Mul", _join(b, cell, hidden, cell, cell), by_gates)
    return (way.back_by_state(b, gates, 0, 4), b.op("Mul", cell, kept)), gates


def _gru_step(
    way: _Direction, b: Builder, states: Sequence[ir.Value], given: ir.Value
) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
    """Derivatives: of update, reset and candidate; the reset and the update gate themselves."""
    (hidden,) = states
    z, r, new = _split(b, given, way.hidden)
    by_z, by_r = _split(b, way.by_state(b, hidden, 0, 2), way.hidden)
    z, dz = way.activated(b, 0, b.add(z, by_z))
    r, dr = way.activated(b, 0, b.add(r, by_r))
    if linear_before_reset(way.node):
        bias = way.biases[1][2 * way.hidden :]
        inner = b.add(way.by_state(b, hidden, 2, 3), b.const(bias))
        new, slope = way.activated(b, 1, b.add(new, b.mul(r, inner)))
    else:
        inner = hidden
        new, slope = way.activated(b, 1, b.add(new, way.by_state(b, b.mul(r, hidden), 2, 3)))
    result = b.add(b.mul(one_minus(b, z), new), b.mul(z, hidden))
    by_new = b.mul(one_minus(b, z), slope)
    return (result,), (b.mul(b.like("Sub", hidden, new), dz), b.mul(inner, dr), by_new, r, z)


def linear_before_reset(node: ir.Node) -> bool:
    """Whether a GRU multiplies by its weights ahead of the reset gate."""
    return bool(attribute(node, "linear_before_reset", 0))


def _gru_back(
    way: _Direction, b: Builder, hidden: ir.Value, states: Sequence[ir.Value], slopes: Sequence[ir.Value]
) -> tuple[Sequence[ir.Value], ir.Value]:
    by_z, by_r, by_new, r, z = slopes
    update, new = b.op("Mul", hidden, by_z), b.op("Mul", hidden, by_new)
    kept = b.op("Mul", hidden, z)
    if linear_before_reset(way.node):
        reset = b.op("Mul", new, by_r)
        before = b.op("Add", kept, way.back_by_state(b, _join(b, update, reset, b.op("Mul", new, r)), 0, 3))
    else:
        inner = way.back_by_state(b, new, 2, 3)
        reset = b.op("Mul", inner, by_r)
        gated = b.op("Add", kept, b.op("Mul", inner, r))
        before = b.op("Add", gated, way.back_by_state(b, _join(b, update, reset), 0, 2))
    return (before,), _join(b, update, reset, new)


def _rnn_step(
    way: _Direction, b: Builder, states: Sequence[ir.Value], given: ir.Value
) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
    hidden, slope = way.activated(b, 0, b.add(given, way.by_state(b, states[0], 0, 1)))
    return (hidden,), (slope,)


def _rnn_back(
    way: _Direction, b: Builder, hidden: ir.Value, states: Sequence[ir.Value], slopes: Sequence[ir.Value]
) -> tuple[Sequence[ir.Value], ir.Value]:
    gates = b.op("Mul", hidden, slopes[0])
    return (way.back_by_state(b, gates, 0, 1),), gates


LAYERS = {
    "GRU": RecurrentLayer(("Sigmoid", "Tanh"), 1, _gru_step, _gru_back),
    "LSTM": RecurrentLayer(("Sigmoid", "Tanh", "Tanh"), 2, _lstm_step, _lstm_back),
    "RNN": RecurrentLayer(("Tanh",), 1, _rnn_step, _rnn_back),
}


def _recurrent(ctx: Context, node: ir.Node, cots: Cots) -> Cots:
    layer, x = LAYERS[node.op_type], data(node)
    assert not attribute(node, "layout", 0), "normal form has the time first"
    count = 2 if attribute(node, "direction", "forward") == "bidirectional" else 1
    hidden, clip = static_shape(data(node, _RECURRENCE))[2], attribute(node, "clip", None)
    activations = _activations(node, layer.activations * count)
    given: list[ir.Value] = []
    first: list[list[ir.Value]] = [[] for _ in range(layer.states)]
    for index in range(count):
        own = activations[index * len(layer.activations) :]
        way = _Direction(ctx, node, index, hidden, own, None if clip is None else float(clip))  # type: ignore[arg-type]
        states, gates = _back(way, layer, cots)
        weight = way.array(_WEIGHT)
        assert weight is not None, "the operator asks for these weights"
        given.append(ctx.r.op("MatMul", gates, ctx.r.const(weight)))
        for found, state in zip(first, states, strict=True):
            found.append(ctx.r.op("Unsqueeze", state, ctx.r.const([1])))
    result: list[Cotangent | None] = [None] * 8
    total = given[0] if count == 1 else ctx.r.op("Add", *given)
    result[0] = Cotangent(ctx.reshape(total, static_shape(x)))
    for slot, found in zip((_FIRST_HIDDEN, _FIRST_CELL), first, strict=False):
        result[slot] = Cotangent(found[0] if count == 1 else ctx.r.op("Concat", *found, axis=1))
    return result


def _back(way: _Direction, layer: RecurrentLayer, cots: Cots) -> tuple[tuple[ir.Value, ...], ir.Value]:
    """Run back through one direction: gradients of the first states, and of the gates at all times."""
    ctx, node = way.ctx, way.node
    time, batch, _ = static_shape(data(node))
    count, mask = static_shape(data(node, _WEIGHT))[0], _mask(ctx, node)
    slopes = ctx.p.once(("recurrent", name_of(node), way.index), lambda: _forward(way, layer, mask))
    streams = [(ctx.residual(slope), 0) for slope in slopes]
    if (shown := cots[0]) is not None:
        every = ctx.reshape(ctx.dense(shown), (time, count, batch, way.hidden))
        own = ctx.r.op("Gather", every, ctx.r.const(np.array(way.index, np.int64)), axis=2)
        streams.append((own if mask is None else ctx.r.op("Mul", own, ctx.residual(mask)), 1))
    states = []
    for place in range(1, layer.states + 1):
        last = cots[place] if place < len(cots) else None
        if last is None:
            states.append(ctx.zeros((batch, way.hidden)))
        else:
            index = ctx.r.const(np.array(way.index, np.int64))
            states.append(ctx.r.op("Gather", ctx.dense(last), index, axis=1))

    def step(
        b: Builder, after: Sequence[ir.Value], slices: Sequence[ir.Value]
    ) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        local = list(slices[: len(slopes)])
        idle = local.pop() if mask is not None else None
        hidden = after[0] if shown is None else b.op("Add", after[0], slices[-1])
        before, gates = layer.back(way, b, hidden, after, local)
        if idle is not None:
            before = (b.op("Add", before[0], b.op("Mul", hidden, idle)), *before[1:])
        return before, (gates,)

    first, (gates,) = ctx.r.scan(step, states, streams, backwards=not way.backwards, axis=1)
    return first, gates


def _forward(way: _Direction, layer: RecurrentLayer, mask: ir.Value | None) -> tuple[ir.Value, ...]:
    """Run the layer again in the primal graph; returns the local derivatives of all steps, (time, batch, ...).

    Where sequences differ in length, a step behind the end of one leaves its states as they are. All derivatives are
    zero there, but that of the last state by the one before, which is one, as the last result says.
    """
    p, node = way.ctx.p, way.node
    time, batch, _ = static_shape(data(node))
    weight = way.array(_WEIGHT)
    assert weight is not None, "the operator asks for these weights"
    before, behind = way.biases
    if node.op_type == "GRU" and linear_before_reset(node):
        behind = np.concatenate([behind[: 2 * way.hidden], np.zeros(way.hidden, np.float32)])
    transposed = p.const(np.ascontiguousarray(weight.T))
    given = p.op("MatMul", data(node), transposed, shape=(time, batch, len(weight)))
    given = p.add(given, p.const(before + behind))
    states = [_first_state(way, slot, batch) for slot in (_FIRST_HIDDEN, _FIRST_CELL)[: layer.states]]
    streams = [(given, 0)] if mask is None else [(given, 0), (mask, 0)]

    def step(
        b: Builder, old: Sequence[ir.Value], slices: Sequence[ir.Value]
    ) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        new, slopes = layer.step(way, b, old, slices[0])
        if mask is None:
            return new, slopes
        kept, rest = slices[1], one_minus(b, slices[1])
        new = [b.add(o, b.mul(kept, b.like("Sub", n, o))) for n, o in zip(new, old, strict=True)]
        slopes = [b.mul(kept, s) for s in slopes]
        if node.op_type == "LSTM":
            slopes[-1] = b.add(slopes[-1], rest)
        return new, (*slopes, rest)

    return p.scan(step, states, streams, backwards=way.backwards, axis=0)[1]


def _first_state(way: _Direction, slot: int, batch: int) -> ir.Value:
    p, shape = way.ctx.p, (batch, way.hidden)
    given = way.node.inputs[slot] if slot < len(way.node.inputs) else None
    if given is None:
        return p.const(np.zeros(shape, np.float32))
    return p.op("Gather", given, p.const(np.array(way.index, np.int64)), axis=0, shape=shape)


def _mask(ctx: Context, node: ir.Node) -> ir.Value | None:
    """1.0 at the times (time, batch, 1) at which a sequence has not ended; None where all are of full length."""
    lengths = node.inputs[_LENGTHS] if len(node.inputs) > _LENGTHS else None
    if lengths is None:
        return None
    time, batch, _ = static_shape(data(node))
    known = constant(lengths)
    if known is not None and (known >= time).all():
        return None
    p, shape = ctx.p, (time, batch, 1)
    at = p.const(np.arange(time, dtype=np.int32).reshape(time, 1, 1))
    ends = p.op("Reshape", lengths, p.const([1, batch, 1]), shape=(1, batch, 1))
    return p.op("Cast", p.op("Less", at, ends, shape=shape), to=int(ir.DataType.FLOAT), shape=shape)


def _activations(node: ir.Node, usual: Sequence[str]) -> tuple[Activation, ...]:
    """The activation functions of all directions, in the order in which the node names them."""
    names: Sequence[str] = attribute(node, "activations", usual)  # type: ignore[assignment]
    numbers = {
        key: list(attribute(node, key, ()))  # type: ignore[call-overload]
        for key in ("activation_alpha", "activation_beta")
    }
    found = []
    for name in names:
        function = FUNCTIONS.get(name.lower())
        if function is None:
            raise unsupported(node, f"has the activation function '{name}', which the adjoint rule does not cover")
        taken = []
        for key, takers in (("activation_alpha", TAKES_ALPHA), ("activation_beta", TAKES_BETA)):
            given = function in takers and numbers[key]
            taken.append(float(numbers[key].pop(0)) if given else takers.get(function, 0.0))
        found.append(_activation(function, *taken))
    return tuple(found)


def _activation(function: str, alpha: float, beta: float) -> Activation:
    def affine(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        scaled = b.like("Mul", x, scalar(b, alpha))
        shape = static_shape(x)
        return b.like("Add", scaled, scalar(b, beta)), b.op("Expand", scalar(b, alpha), b.const(shape), shape=shape)

    def scaled_tanh(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        y = b.like("Tanh", b.like("Mul", x, scalar(b, beta)))
        return b.like("Mul", y, scalar(b, alpha)), b.like("Mul", one_minus(b, b.mul(y, y)), scalar(b, alpha * beta))

    def standard(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        attributes = {}
        if function in TAKES_ALPHA:
            attributes["alpha"] = alpha
        if function in TAKES_BETA:
            attributes["beta"] = beta
        y = b.like(function, x, **attributes)
        node = y.producer()
        assert node is not None
        return y, DERIVATIVES[function](b, x, y, node)

    return {"Affine": affine, "ScaledTanh": scaled_tanh}.get(function, standard)


RECURRENT_RULES: dict[str, Rule] = {op: _recurrent for op in LAYERS}
