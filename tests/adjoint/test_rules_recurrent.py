"""LSTM, GRU and RNN, against finite differences in ONNX Runtime and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from bitalloy.adjoint.engine import build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]
TIME, BATCH, WIDTH, HIDDEN = 4, 2, 3, 5
CORNERS = 2e-2
"""Tolerance of functions with corners: differences in float32 reach across them."""
CORNERED = {
    "HardSigmoid": (6, -6, 0, 6, 0),
    **dict.fromkeys(("Elu", "LeakyRelu", "Relu", "Softsign", "ThresholdedRelu"), (2, -2, 2, -2, 2)),
}
"""Functions with corners, and biases far from them."""
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OPERATORS = pytest.mark.parametrize("op", sorted(GATES))
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])


def normal(*shape: int, seed: int = 1, scale: float = 1.0) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


def operands(op: str, count: int, *, bias: bool = True, states: bool = True) -> list[Array | None]:
    """X, W, R, B, lengths, first states, as the operator takes them."""
    rows = GATES[op] * HIDDEN
    found: list[Array | None] = [
        normal(TIME, BATCH, WIDTH),
        normal(count, rows, WIDTH, seed=2, scale=0.5),
        normal(count, rows, HIDDEN, seed=3, scale=0.5),
        normal(count, 2 * rows, seed=4, scale=0.3) if bias else None,
        None,
    ]
    if states:
        found += [normal(count, BATCH, HIDDEN, seed=5 + i) for i in range(2 if op == "LSTM" else 1)]
    return found


def results(op: str) -> int:
    return 3 if op == "LSTM" else 2


@OPERATORS
@DIRECTIONS
@pytest.mark.parametrize("bare", [False, True], ids=["states", "bare"])
def test_directions_and_states(rig: Any, op: str, direction: str, bare: bool) -> None:
    count = 2 if direction == "bidirectional" else 1
    given = operands(op, count, bias=not bare, states=not bare)
    wanted = [0] if bare else [0, 5, 6] if op == "LSTM" else [0, 5]
    outputs = results(op)
    rig.check(op, *given, wanted=wanted, outputs=outputs, heads=range(outputs), hidden_size=HIDDEN, direction=direction)


@OPERATORS
@pytest.mark.parametrize("live", [(), (4,)], ids=["constant", "computed"])
def test_sequences_of_several_lengths(rig: Any, op: str, live: tuple[int, ...]) -> None:
    given = operands(op, 2)
    given[4] = np.array([2, 4], np.int32)
    wanted = [0, 5, 6] if op == "LSTM" else [0, 5]
    rig.check(
        op, *given, wanted=wanted, live=live, outputs=results(op), heads=range(results(op)), hidden_size=HIDDEN,
        direction="bidirectional",
    )  # fmt: skip


def test_sequences_of_full_length_cost_nothing(rig: Any, micro: Any, tap: Any) -> None:
    nodes = []
    for lengths in (None, [TIME, TIME], [TIME, 1]):
        given = operands("GRU", 1, states=False)
        given[4] = None if lengths is None else np.array(lengths, np.int32)
        names = ["" if a is None else f"i{n}" for n, a in enumerate(given)]
        node = onnx.helper.make_node("GRU", names, ["y"], hidden_size=HIDDEN, name="node")
        constants = {f"i{n}": a for n, a in enumerate(given) if n and a is not None}
        x: Any = given[0]
        net = rig.load(micro([node], {"i0": x}, {"y": np.float32}, constants))
        adjoint = build(net, {"y": "y"}, [tap("i0", np.ones(x.shape))], RULES)
        (loop,) = [n for n in onnx.load_from_string(adjoint.primal.data).graph.node if n.op_type == "Scan"]
        nodes.append(len(next(a for a in loop.attribute if a.name == "body").g.node))
    assert nodes[0] == nodes[1] < nodes[2]


@pytest.mark.parametrize("after", [0, 1])
def test_gru_with_either_place_of_the_reset(rig: Any, after: int) -> None:
    def run(torch: Any, x: Any) -> Any:
        net = torch.nn.GRU(WIDTH, HIDDEN).double()
        turn = np.r_[HIDDEN : 2 * HIDDEN, :HIDDEN, 2 * HIDDEN : 3 * HIDDEN]  # torch: reset, update, candidate
        with torch.no_grad():
            net.weight_ih_l0.copy_(torch.from_numpy(given[1][0][turn]))
            net.weight_hh_l0.copy_(torch.from_numpy(given[2][0][turn]))
            net.bias_ih_l0.copy_(torch.from_numpy(given[3][0][: 3 * HIDDEN][turn]))
            net.bias_hh_l0.copy_(torch.from_numpy(given[3][0][3 * HIDDEN :][turn]))
        return net(x)[0][:, None]

    given: Any = operands("GRU", 1, states=False)
    rig.check(
        "GRU", *given, outputs=2, hidden_size=HIDDEN, linear_before_reset=after, torch=run if after else None
    )  # fmt: skip


def test_lstm_of_torch(rig: Any) -> None:
    def run(torch: Any, x: Any) -> Any:
        net = torch.nn.LSTM(WIDTH, HIDDEN).double()
        turn = np.r_[:HIDDEN, 2 * HIDDEN : 4 * HIDDEN, HIDDEN : 2 * HIDDEN]  # torch: input, forget, cell, output
        with torch.no_grad():
            net.weight_ih_l0.copy_(torch.from_numpy(given[1][0][turn]))
            net.weight_hh_l0.copy_(torch.from_numpy(given[2][0][turn]))
            net.bias_ih_l0.copy_(torch.from_numpy(given[3][0][: 4 * HIDDEN][turn]))
            net.bias_hh_l0.copy_(torch.from_numpy(given[3][0][4 * HIDDEN :][turn]))
        return net(x)[0][:, None]

    given: Any = operands("LSTM", 1, states=False)
    rig.check("LSTM", *given, outputs=3, hidden_size=HIDDEN, torch=run)


@pytest.mark.parametrize("coupled", [0, 1])
def test_peepholes_and_coupled_gates(rig: Any, coupled: int) -> None:
    given = [*operands("LSTM", 2), normal(2, 3 * HIDDEN, seed=9)]
    rig.check(
        "LSTM", *given, wanted=[0, 5, 6], outputs=3, heads=[0, 1, 2], hidden_size=HIDDEN, direction="bidirectional",
        input_forget=coupled,
    )  # fmt: skip


@OPERATORS
def test_clipped_gates(rig: Any, op: str) -> None:
    rig.check(
        op,
        *operands(op, 1),
        outputs=results(op),
        heads=range(results(op)),
        hidden_size=HIDDEN,
        clip=0.8,
        tolerance=CORNERS,
    )


@pytest.mark.parametrize(
    ("function", "numbers"),
    [("Affine", (0.7, 0.1)), ("Elu", (0.6,)), ("HardSigmoid", (0.3, 0.4)), ("LeakyRelu", (0.2,)), ("Relu", ()),
     ("ScaledTanh", (0.9, 1.1)), ("Sigmoid", ()), ("Softplus", ()), ("Softsign", ()), ("ThresholdedRelu", (0.3,)),
     ("HardSigmoid", ()), ("ThresholdedRelu", ()), ("Tanh", ())],
)  # fmt: skip
def test_activation_functions(rig: Any, function: str, numbers: tuple[float, ...]) -> None:
    given = {"activation_alpha": list(numbers[:1]), "activation_beta": list(numbers[1:])}
    inputs = operands("RNN", 1)
    if function in CORNERED:  # far from the corners, on both sides of them
        inputs[0], inputs[2] = 0.3 * normal(TIME, BATCH, WIDTH), normal(1, HIDDEN, HIDDEN, seed=3, scale=0.1)
        inputs[3] = np.array([[*CORNERED[function], *[0] * HIDDEN]], np.float32)
    rig.check(
        "RNN", *inputs, wanted=[0, 5], outputs=2, hidden_size=HIDDEN, activations=[function],
        **{k: v for k, v in given.items() if v},
    )  # fmt: skip


def test_numbers_go_to_the_functions_that_take_them(rig: Any) -> None:
    rig.check(
        "LSTM", *operands("LSTM", 2), outputs=3, hidden_size=HIDDEN, direction="bidirectional",
        activations=["HardSigmoid", "LeakyRelu", "Tanh", "Sigmoid", "Elu", "ScaledTanh"],
        activation_alpha=[0.3, 0.1, 0.7, 0.9], activation_beta=[0.45, 1.2], tolerance=CORNERS,
    )  # fmt: skip


def test_only_the_last_state_is_read(rig: Any) -> None:
    rig.check("LSTM", *operands("LSTM", 1), outputs=3, heads=[1], hidden_size=HIDDEN)


def test_computed_weights_are_refused(rig: Any) -> None:
    with pytest.raises(UnsupportedOpError, match="computes its weights"):
        rig.check("GRU", *operands("GRU", 1), live=[2], outputs=2, hidden_size=HIDDEN)
