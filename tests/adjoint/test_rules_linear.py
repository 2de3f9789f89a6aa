"""Convolutions and matrix products against finite differences and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloy.adjoint.engine import build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.errors import UnsupportedOpError

PROPERTY = settings(max_examples=12)
Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(torch: Any, array: Array) -> Any:
    return torch.from_numpy(array.astype(np.float64))


def f(torch: Any, name: str, rank: int) -> Any:
    return getattr(torch.nn.functional, f"{name}{rank}d")


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv(rig: Any, rank: int, data: st.DataObject) -> None:
    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    group = data.draw(st.sampled_from([1, 2, 4]))
    kernel, strides, dilations, before, after = each(1, 3), each(1, 3), each(1, 2), each(0, 2), each(0, 2)
    size = [(k - 1) * d + 1 + e for k, d, e in zip(kernel, dilations, each(0, 4), strict=True)]
    w = normal(group * data.draw(st.integers(1, 2)), 4 // group, *kernel, seed=2)
    bias = normal(len(w)) if data.draw(st.booleans()) else None

    def run(torch: Any, x: Any) -> Any:
        sides = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        b = None if bias is None else double(torch, bias)
        padded = torch.nn.functional.pad(x, sides)
        return f(torch, "conv", rank)(padded, double(torch, w), b, strides, 0, dilations, group)

    inputs = [normal(data.draw(st.integers(1, 2)), 4, *size), w, *([] if bias is None else [bias])]
    rig.check("Conv", *inputs, linear=True, torch=run,
              strides=strides, dilations=dilations, group=group, pads=[*before, *after])  # fmt: skip


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (4, 2, 1), (1, 2, 1), (3, 3, 1), (4, 1, 1)])
def test_conv_auto_pad(rig: Any, auto_pad: str, kernel: int, stride: int, dilation: int) -> None:
    rig.check("Conv", normal(1, 2, 7, 6), normal(3, 2, kernel, kernel, seed=2), linear=True, auto_pad=auto_pad,
              strides=[stride, stride], dilations=[dilation, dilation])  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_with_weights_from_outside(rig: Any, stride: int) -> None:
    rig.check("Conv", normal(1, 2, 6, 6), normal(3, 2, 3, 3, seed=2), live=(1,), linear=True, strides=[stride, stride])


@pytest.mark.parametrize("slot", [1, 2])
def test_conv_with_measured_weights_or_bias_is_refused(rig: Any, slot: int) -> None:
    with pytest.raises(UnsupportedOpError, match=r"'node' .Conv.*--exclude 'node'"):
        rig.check("Conv", normal(1, 2, 6, 6), normal(3, 2, 3, 3), normal(3), wanted=(0, slot), linear=True)


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("rank", [1, 2])
def test_conv_transpose(rig: Any, rank: int, data: st.DataObject) -> None:
    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    group = data.draw(st.sampled_from([1, 2, 4]))
    kernel, strides, dilations, size = each(1, 4), each(1, 3), each(1, 2), each(2, 4)
    before, after = each(0, 1), each(0, 1)
    extra = [min(e, s - 1) for e, s in zip(each(0, 2), strides, strict=True)]
    w = normal(4, data.draw(st.integers(1, 2)), *kernel, seed=2)
    full = [(s - 1) * t + (k - 1) * d + 1 + e for s, t, k, d, e
            in zip(size, strides, kernel, dilations, extra, strict=True)]  # fmt: skip
    if any(o - b - a < 1 for o, b, a in zip(full, before, after, strict=True)):
        before = after = [0] * rank

    def run(torch: Any, x: Any) -> Any:
        y = f(torch, "conv_transpose", rank)(x, double(torch, w), None, strides, 0, extra, group, dilations)
        for axis, (b, a) in enumerate(zip(before, after, strict=True)):
            y = y.narrow(axis + 2, b, y.shape[axis + 2] - a - b)
        return y

    larger = any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    rig.check("ConvTranspose", normal(2, 4, *size), w, linear=True, torch=None if larger else run, strides=strides,
              dilations=dilations, group=group, pads=[*before, *after], output_padding=extra)  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
        {"output_shape": [7, 8]},
        {"output_shape": [6, 9], "auto_pad": "SAME_UPPER"},
        {"output_shape": [6, 9], "auto_pad": "SAME_LOWER"},
    ],
)
def test_conv_transpose_padding_given_by_the_output(rig: Any, attributes: dict[str, Any]) -> None:
    rig.check(
        "ConvTranspose", normal(1, 2, 4, 4), normal(2, 3, 3, 4, seed=2), linear=True, strides=[2, 2], **attributes
    )


@PROPERTY
@given(
    a=st.booleans(),
    b=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5]),
    beta=st.sampled_from([1.0, -2.0]),
    c=st.sampled_from([None, (), (1,), (4,), (1, 4), (3, 1), (3, 4)]),
)
def test_gemm(rig: Any, *, a: bool, b: bool, alpha: float, beta: float, c: tuple[int, ...] | None) -> None:
    inputs = [normal(*((5, 3) if a else (3, 5))), normal(*((4, 5) if b else (5, 4)), seed=2)]
    inputs += [] if c is None else [np.asarray(normal(*c, seed=3), np.float32)]

    def run(torch: Any, x: Any, w: Any, *rest: Any) -> Any:
        y = alpha * (x.T if a else x) @ (w.T if b else w)
        return y + beta * rest[0] if rest else y

    rig.check("Gemm", *inputs, wanted=range(len(inputs)), linear=True, torch=run,
              transA=int(a), transB=int(b), alpha=alpha, beta=beta)  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (5, 4, 2)),
        ((1, 3, 4), (2, 4, 5)),
        ((4,), (4, 5)),
        ((4,), (2, 4, 5)),
        ((3, 4), (4,)),
        ((2, 3, 4), (4,)),
        ((4,), (4,)),
    ],
)
@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,)])
def test_matmul(rig: Any, a: tuple[int, ...], b: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    x, y = normal(*a), normal(*b, seed=2)

    def run(torch: Any, *given: Any) -> Any:
        both = {0: double(torch, x), 1: double(torch, y), **dict(zip(wanted, given, strict=True))}
        return both[0] @ both[1]

    rig.check("MatMul", x, y, wanted=wanted, linear=True, torch=run)
    if len(wanted) == 1:
        rig.check("MatMul", x, y, wanted=wanted, live=(0, 1), linear=True)


def test_constant_matrices_are_not_copied_transposed(rig: Any, micro: Any, tap: Any) -> None:
    helper, x, w = onnx.helper, normal(1, 3, 90), normal(90, 80, seed=2)
    for op, shape in (("MatMul", (1, 3, 90)), ("Gemm", (3, 90))):
        model = micro([helper.make_node(op, ["x", "w"], ["y"])], {"x": x.reshape(shape)}, {"y": np.float32}, {"w": w})
        (head,) = build(rig.load(model), {"y": "y"}, [tap("x", x.reshape(shape))], RULES).heads
        stored = [onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(head.model.data).graph.initializer]
        (large,) = (a for a in stored if a.size > 4096)
        np.testing.assert_array_equal(large, w)


EQUATIONS = [
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("bhwc,hkc->bhwk", (2, 3, 2, 4), (3, 5, 4)),
    ("bhwc,wkc->bhwk", (2, 3, 2, 4), (2, 5, 4)),
    ("i,i", (4,), (4,)),
    ("i,j->ij", (3,), (4,)),
    ("ij,k->i", (2, 3), (4,)),
    ("ij,jk", (2, 3), (3, 2)),
    ("bqc,bchw->bqhw", (2, 3, 4), (2, 4, 2, 3)),
    ("ab c,c -> a", (2, 3, 4), (4,)),
]


@pytest.mark.parametrize(("equation", "a", "b"), EQUATIONS, ids=str)
@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,)])
def test_einsum(rig: Any, equation: str, a: tuple[int, ...], b: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    x, y = normal(*a), normal(*b, seed=2)

    def run(torch: Any, *given: Any) -> Any:
        both = {0: double(torch, x), 1: double(torch, y), **dict(zip(wanted, given, strict=True))}
        return torch.einsum(equation, both[0], both[1])

    rig.check("Einsum", x, y, wanted=wanted, equation=equation, linear=True, torch=run)


@pytest.mark.parametrize("equation", ["ij->ji", "ij->i", "ij->", "ij->ij", "ji"])
def test_einsum_of_one_operand(rig: Any, equation: str) -> None:
    rig.check("Einsum", normal(3, 4), equation=equation, linear=True,
              torch=lambda torch, x: torch.einsum(equation, x))  # fmt: skip


def test_einsum_of_other_forms_is_refused(rig: Any) -> None:
    for equation, *inputs in (
        ("...ij->...ji", normal(2, 3, 4)),
        ("ii->i", normal(3, 3)),
        ("ij,jk,kl->il", normal(2, 3), normal(3, 4), normal(4, 2)),
    ):
        with pytest.raises(UnsupportedOpError, match=r"'node'.*equation"):
            rig.check("Einsum", *inputs, equation=equation, linear=True)
    with pytest.raises(UnsupportedOpError, match=r"'node'.*broadcasts"):
        rig.check("Einsum", normal(2, 3), normal(1, 3), equation="ij,ij->ij", linear=True)
