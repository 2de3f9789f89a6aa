"""Elementwise operators against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PROPERTY = settings(max_examples=12)
Array = np.ndarray[Any, Any]


def spread(*shape: int, low: float = -3.0, high: float = 3.0, seed: int = 1) -> Array:
    """Distinct values at equal distances in random order, none of them 0 or an integer."""
    count = int(np.prod(shape))
    values = low + (high - low) * (np.arange(count) + 0.37) / count
    return np.random.default_rng(seed).permutation(values).reshape(shape).astype(np.float32)


def constant(torch: Any, array: Array) -> Any:
    return torch.from_numpy(np.asarray(array, np.float64))


def functional(name: str, **options: Any) -> Any:
    return lambda torch, x: getattr(torch.nn.functional, name)(x, **options)


def plain(name: str) -> Any:
    return lambda torch, x: getattr(torch, name)(x)


UNARY: list[tuple[str, dict[str, Any], Any]] = [
    ("Abs", {}, plain("abs")),
    ("Asinh", {}, plain("asinh")),
    ("Atan", {}, plain("atan")),
    ("Celu", {}, functional("celu")),
    ("Celu", {"alpha": 0.6}, functional("celu", alpha=0.6)),
    ("Cos", {}, plain("cos")),
    ("Cosh", {}, plain("cosh")),
    ("Elu", {}, functional("elu")),
    ("Elu", {"alpha": 0.5}, functional("elu", alpha=0.5)),
    ("Erf", {}, plain("erf")),
    ("Exp", {}, plain("exp")),
    ("Gelu", {}, functional("gelu")),
    ("Gelu", {"approximate": "tanh"}, functional("gelu", approximate="tanh")),
    ("HardSigmoid", {}, lambda torch, x: torch.clamp(0.2 * x + 0.5, 0, 1)),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.42}, lambda torch, x: torch.clamp(x / 6 + 0.42, 0, 1)),
    ("HardSwish", {}, functional("hardswish")),
    ("LeakyRelu", {}, functional("leaky_relu")),
    ("LeakyRelu", {"alpha": 0.2}, functional("leaky_relu", negative_slope=0.2)),
    ("Mish", {}, functional("mish")),
    ("Neg", {}, plain("neg")),
    ("Relu", {}, plain("relu")),
    ("Selu", {}, functional("selu")),
    ("Selu", {"alpha": 1.5, "gamma": 0.8}, lambda torch, x: 0.8 * torch.nn.functional.elu(x, alpha=1.5)),
    ("Shrink", {"lambd": 1.01}, functional("hardshrink", lambd=1.01)),
    ("Shrink", {"lambd": 1.01, "bias": 1.01}, functional("softshrink", lambd=1.01)),
    ("Sigmoid", {}, plain("sigmoid")),
    ("Sin", {}, plain("sin")),
    ("Sinh", {}, plain("sinh")),
    ("Softplus", {}, functional("softplus")),
    ("Softsign", {}, functional("softsign")),
    ("Tanh", {}, plain("tanh")),
    ("ThresholdedRelu", {"alpha": 1.01}, functional("threshold", threshold=1.01, value=0.0)),
]
POSITIVE = [("Log", plain("log")), ("Sqrt", plain("sqrt")), ("Reciprocal", plain("reciprocal"))]
BOUNDED = [
    ("Acos", plain("acos"), -0.8, 0.8),
    ("Acosh", plain("acosh"), 1.5, 4.0),
    ("Asin", plain("asin"), -0.8, 0.8),
    ("Atanh", plain("atanh"), -0.8, 0.8),
    ("Tan", plain("tan"), -1.1, 1.1),
]


@pytest.mark.parametrize(("op", "attributes", "torch"), UNARY, ids=lambda v: str(v) if isinstance(v, str) else "")
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
def test_unary(rig: Any, op: str, attributes: dict[str, Any], torch: Any, shape: tuple[int, ...]) -> None:
    high = 5.0 if op == "HardSwish" else 3.0
    opset = 20 if op == "Gelu" else 18
    rig.check(op, spread(*shape, low=-high, high=high), opset=opset, torch=torch, tolerance=2e-3, **attributes)


@pytest.mark.parametrize(("op", "torch"), POSITIVE)
def test_unary_of_positive_numbers(rig: Any, op: str, torch: Any) -> None:
    rig.check(op, spread(2, 5, low=0.5), torch=torch)
    rig.check(op, spread(2, 5, low=0.1, high=0.5), reference=True)


@pytest.mark.parametrize(("op", "torch", "low", "high"), BOUNDED)
def test_unary_on_its_domain(rig: Any, op: str, torch: Any, low: float, high: float) -> None:
    rig.check(op, spread(2, 9, low=low, high=high), torch=torch)


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "Softplus", "Mish", "Gelu", "Erf", "Elu", "Selu", "HardSwish"])
def test_saturated_unary_is_finite(rig: Any, op: str) -> None:
    rig.check(op, np.array([-90.0, -30.0, 30.0, 80.0], np.float32), opset=20 if op == "Gelu" else 18)


@pytest.mark.parametrize("low", [None, -1.5])
@pytest.mark.parametrize("high", [None, 1.25])
@pytest.mark.parametrize("opset", [13, 17])
def test_clip(rig: Any, low: float | None, high: float | None, opset: int) -> None:
    bounds = [None if b is None else np.array(b, np.float32) for b in (low, high)]
    while bounds and bounds[-1] is None:
        bounds.pop()

    def run(torch: Any, x: Any) -> Any:
        return torch.clamp(x, -np.inf if low is None else low, np.inf if high is None else high)

    rig.check("Clip", spread(3, 8), *bounds, opset=opset, torch=run)


def test_clip_with_bounds_from_outside(rig: Any) -> None:
    low, high = np.array(-1.5, np.float32), np.array(1.25, np.float32)
    rig.check("Clip", spread(3, 8), low, high, live=(1, 2))


SHAPES = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (4,)), ((3, 1), (2, 3, 4)), ((2, 3, 4), ()), ((), (5,)), ((3, 1), (1, 4)),
          ((1, 2, 1, 3), (4, 1, 2, 1))]  # fmt: skip
BINARY = {"Add": lambda _, a, b: a + b, "Sub": lambda _, a, b: a - b, "Mul": lambda _, a, b: a * b,
          "Div": lambda _, a, b: a / b}  # fmt: skip


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize(("a", "b"), SHAPES, ids=str)
def test_arithmetic_with_broadcasting(rig: Any, op: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = spread(*a), spread(*b, low=0.7, high=2.0, seed=2)
    rig.check(op, x, y, wanted=(0, 1), torch=BINARY[op])
    rig.check(op, x, y, wanted=(1,))
    rig.check(op, x, y, wanted=(0,), live=(1,))


@PROPERTY
@given(dims=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=4),
       cut=st.integers(0, 3), op=st.sampled_from(sorted(BINARY)))  # fmt: skip
def test_any_broadcasting(rig: Any, dims: list[tuple[int, bool, bool]], cut: int, op: str) -> None:
    a = tuple(1 if one else d for d, one, _ in dims)
    b = tuple(1 if one else d for d, _, one in dims)[min(cut, len(dims)) :]
    rig.check(op, spread(*a), spread(*b, low=0.7, high=2.0, seed=2), wanted=(0, 1), torch=BINARY[op])


@pytest.mark.parametrize("op", ["Max", "Min"])
@pytest.mark.parametrize("shapes", [((3, 4),), ((3, 4), (3, 4)), ((2, 3), (3,), (2, 1))], ids=str)
def test_extremum(rig: Any, op: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    # values that stay apart under the finite difference, whatever is compared with whatever
    values = np.random.default_rng(0).permutation(np.arange(40) * 0.25).astype(np.float32)
    parts = np.split(values, np.cumsum([int(np.prod(s)) for s in shapes]))
    xs = [p.reshape(s) for p, s in zip(parts, shapes, strict=False)]

    def run(torch: Any, *given: Any) -> Any:
        result = given[0].clone()
        for x in given[1:]:
            result = (torch.maximum if op == "Max" else torch.minimum)(result, x)
        return result

    rig.check(op, *xs, wanted=range(len(xs)), torch=run)


def test_extremum_shares_ties(rig: Any, micro: Any, tap: Any) -> None:
    helper = pytest.importorskip("onnx").helper
    x = np.array([1.0, 2.0], np.float32)
    model = micro([helper.make_node("Max", ["x", "z"], ["y"], name="max")], {"x": x, "z": x}, {"y": np.float32})
    a = rig.run(
        rig.load(model), {"x": x, "z": x}, [tap("x", np.eye(2)[0], name="0")], {"y": np.eye(2, dtype=np.float32)}
    )
    np.testing.assert_allclose(a["y"]["0"], [0.5, 0.0])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0, -1.0, -1.5])
def test_pow(rig: Any, exponent: float) -> None:
    power = np.array(exponent, np.float32)
    rig.check("Pow", spread(3, 4, low=0.5), power, torch=lambda _, x: x**exponent)
    if exponent == int(exponent):
        rig.check("Pow", spread(3, 4, low=-3, high=-0.5), power, torch=lambda _, x: x**exponent)
        rig.check("Pow", spread(3, 4, low=0.5), np.array([exponent], np.int64), torch=lambda _, x: x**exponent)


def test_pow_with_an_exponent_per_element(rig: Any) -> None:
    power = np.array([[0.0], [1.0], [2.5]], np.float32)
    rig.check("Pow", spread(4, low=0.5), power, torch=lambda torch, x: x ** constant(torch, power))


def test_pow_at_zero_is_finite(rig: Any) -> None:
    for exponent in (0.0, 1.0, 2.0):
        rig.check("Pow", np.zeros(3, np.float32), np.array(exponent, np.float32), linear=exponent < 2)


@pytest.mark.parametrize(("x", "e"), [((3, 4), (3, 4)), ((3, 1), (2, 1, 4)), ((3, 4), ())], ids=str)
def test_pow_with_a_computed_exponent(rig: Any, x: tuple[int, ...], e: tuple[int, ...]) -> None:
    base, exponent = spread(*x, low=0.5), spread(*e, low=-2, high=2, seed=2)
    rig.check("Pow", base, exponent, wanted=(0, 1), torch=lambda torch, a, b: torch.pow(a, b))
    rig.check("Pow", base, exponent, wanted=(0,), live=(1,))
    rig.check("Pow", base, np.array([0, 3, -1, 1]), wanted=(0,), live=(1,)) if x == (3, 4) else None


def test_pow_of_zero_and_of_negative_numbers(rig: Any, micro: Any, tap: Any) -> None:
    """As in torch: 0 for the base of x^0 and for the exponent of 0^e."""
    helper, torch = pytest.importorskip("onnx").helper, pytest.importorskip("torch")
    x, e = np.array([0.0, 0.0, 0.0, 2.0], np.float32), np.array([0.0, 1.0, 2.0, 2.0], np.float32)
    model = micro([helper.make_node("Pow", ["x", "e"], ["y"])], {"x": x, "e": e}, {"y": np.float32})
    taps = [tap("x", np.ones(4), name="x"), tap("e", np.ones(4), name="e")]
    a = rig.run(rig.load(model), {"x": x, "e": e}, taps, {"y": np.eye(4, dtype=np.float32)})["y"]
    given = [torch.from_numpy(v).requires_grad_() for v in (x, e)]
    for name, gradient in zip("xe", torch.autograd.grad((given[0] ** given[1]).sum(), given), strict=True):
        np.testing.assert_allclose(a[name], gradient.numpy(), rtol=1e-6)
    rig.check("Pow", np.array([-2.0, -0.5], np.float32), np.full(2, 3.0, np.float32), live=(1,))


@pytest.mark.parametrize(
    ("c", "a", "b"), [((2, 3), (2, 3), (2, 3)), ((3,), (2, 1), (2, 3)), ((2, 1), (3,), ())], ids=str
)
def test_where(rig: Any, c: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    condition = spread(*c, seed=3) > 0

    def run(torch: Any, x: Any, y: Any) -> Any:
        return torch.where(torch.from_numpy(condition), x, y)

    for live in ((), (0,)):
        rig.check("Where", condition, spread(*a), spread(*b, seed=2), wanted=(1, 2), live=live, linear=True, torch=run)


@pytest.mark.parametrize("slope", [(1,), (3, 1, 1), (3, 2, 2)], ids=str)
def test_prelu(rig: Any, slope: tuple[int, ...]) -> None:
    s = spread(*slope, seed=2)
    rig.check("PRelu", spread(1, 3, 2, 2), s, torch=lambda torch, x: torch.where(x > 0, x, x * constant(torch, s)))
    rig.check("PRelu", spread(1, 3, 2, 2), s, wanted=(0, 1), torch=lambda torch, x, a: torch.where(x > 0, x, x * a))


@pytest.mark.parametrize("shapes", [((2, 3),), ((2, 3), (3,)), ((2, 3), (3,), (2, 1))], ids=str)
def test_sum(rig: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    xs = [spread(*s, seed=i) for i, s in enumerate(shapes)]
    rig.check("Sum", *xs, wanted=range(len(xs)), linear=True, torch=lambda _, *given: sum(given[1:], given[0] * 1.0))


@pytest.mark.parametrize("shapes", [((2, 3),), ((2, 3), (3,)), ((2, 3), (3,), (2, 1))], ids=str)
def test_mean(rig: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    xs = [spread(*s, seed=i) for i, s in enumerate(shapes)]
    rig.check("Mean", *xs, wanted=range(len(xs)), linear=True, torch=lambda _, *given: sum(given) / len(given))


@pytest.mark.parametrize(("a", "b"), [((3, 4), (3, 4)), ((4,), (3, 1)), ((3, 4), ())], ids=str)
def test_mod(rig: Any, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    divisor = np.asarray(rng.uniform(1.0, 1.4, b), np.float32)
    # a lies between the multiples of b, so that no finite difference crosses one
    times = rng.choice([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.broadcast_shapes(a, b))
    dividend = np.asarray((times * np.broadcast_to(divisor, times.shape)), np.float32)
    dividend = dividend if dividend.shape == a else dividend[0]
    if a == (4,):
        divisor = np.full((3, 1), 1.2, np.float32)
        dividend = (times[0] * 1.2).astype(np.float32)
    rig.check("Mod", dividend, divisor, wanted=(0, 1), fmod=1, torch=lambda torch, x, y: torch.fmod(x, y))


def test_cast_to_float_is_the_identity(rig: Any) -> None:
    rig.check("Cast", spread(2, 3), to=1, linear=True, torch=lambda _, x: x * 1.0)


def test_clip_with_computed_bounds(rig: Any) -> None:
    x = np.array([[-2.0, -0.7, 0.1, 0.6, 1.4], [3.0, 0.3, -1.1, 0.8, -0.2]], np.float32)
    low, high = np.array(-0.5, np.float32), np.array(0.9, np.float32)
    rig.check("Clip", x, low, high, wanted=[0, 1, 2])
    rig.check("Clip", x, low, None, wanted=[0, 1])
    rig.check("Clip", x, None, high, wanted=[0, 2])
