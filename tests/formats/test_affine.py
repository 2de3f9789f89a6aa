"""Numbers against ONNX Runtime, IEEE 754 and hand-computed tables."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from tests.definition import asymmetric, per_channel

from bitalloy.core.errors import DataError, ModelError
from bitalloy.formats import affine as numerics
from bitalloy.formats.affine import (
    activation_params,
    bias_int32,
    dequantize,
    fake_quantize,
    quantize,
    symmetric_params,
)
from bitalloy.formats.base import QuantParams
from bitalloy.formats.float16 import FLOAT16, HALF_SMALLEST_NORMAL

FLOAT_MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


def single(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32)


floats = st.floats(float(np.float32(-3.3e38)), float(np.float32(3.3e38)), width=32)
moderate = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 70), elements=floats)
formats = st.fixed_dictionaries({"signed": st.booleans(), "symmetric": st.booleans()})


@cache
def runtime(dtype: str, axis: int | None) -> ort.InferenceSession:
    """x, scale, zero -> QuantizeLinear and DequantizeLinear of it."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("zero", kind, None),
    ]
    outputs = [
        helper.make_tensor_value_info("q", kind, None),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "qdq", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def weight_params(w: np.ndarray, *, axis: int | None, reduced: bool = False) -> QuantParams:
    """Of weights, from their own values."""
    others = None if axis is None else tuple(d for d in range(w.ndim) if d != axis)
    magnitude = np.abs(np.asarray(w, np.float64)).max(axis=others, initial=0.0)
    return symmetric_params(magnitude, axis=axis, reduced=reduced)


def assert_like_runtime(x: np.ndarray, p: QuantParams) -> None:
    session = runtime(str(p.zero_point.dtype), p.axis)
    q, y = session.run(None, {"x": x, "scale": p.scale, "zero": p.zero_point})
    ours = quantize(x, p)
    assert ours.dtype == q.dtype
    np.testing.assert_array_equal(ours, q)
    np.testing.assert_array_equal(dequantize(q, p).view(np.uint32), y.view(np.uint32))
    np.testing.assert_array_equal(fake_quantize(x, p).view(np.uint32), y.view(np.uint32))


class TestAgainstOnnxRuntime:
    @given(x=arrays, low=floats, high=floats, form=formats, bits=st.sampled_from([8, 16]))
    @settings(max_examples=300)
    def test_activation(self, x: np.ndarray, low: float, high: float, form: dict[str, bool], bits: int) -> None:
        assert_like_runtime(x, activation_params(min(low, high), max(low, high), bits=bits, **form))

    @given(
        steps=hnp.arrays(np.int32, 64, elements=st.integers(-600, 600)),
        scale=single(1e-30, 1e30),
        zero=st.integers(0, 255),
        signed=st.booleans(),
    )
    @settings(max_examples=300)
    def test_ties(self, steps: np.ndarray, scale: float, zero: int, signed: bool) -> None:
        """The points (k / 2) * scale land on or next to every tie and both ends."""
        qmin, qmax, dtype = (-128, 127, np.int8) if signed else (0, 255, np.uint8)
        point = np.array(zero + qmin, dtype)
        p = QuantParams(scale=np.array(scale, np.float32), zero_point=point, qmin=qmin, qmax=qmax)
        assert_like_runtime((steps / 2).astype(np.float32) * np.float32(scale), p)

    @given(data=st.data(), symmetric=st.booleans())
    @settings(max_examples=200)
    def test_per_axis(self, data: st.DataObject, symmetric: bool) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
        axis = data.draw(st.integers(0, len(shape) - 1))
        w = data.draw(hnp.arrays(np.float32, shape, elements=floats))
        p = weight_params(w, axis=axis)
        assert p.scale.shape == (shape[axis],)
        if not symmetric:
            zero = data.draw(hnp.arrays(np.int8, shape[axis], elements=st.integers(-128, 127)))
            p = replace(p, zero_point=zero, qmin=-128)
        assert_like_runtime(w, p)
        if not symmetric:
            assert_like_runtime(data.draw(hnp.arrays(np.float32, shape, elements=floats)), p)

    def test_infinite_values_saturate(self) -> None:
        assert_like_runtime(np.array([-np.inf, np.inf, -0.0, 0.0], np.float32), activation_params(-1.0, 2.0))

    @given(x=hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False)))
    @settings(max_examples=100)
    def test_fp16_cast(self, x: np.ndarray) -> None:
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
                helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
            ],
            "half",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [40])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [40])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(
            FLOAT16.reference(x).view(np.uint32), session.run(None, {"x": x})[0].view(np.uint32)
        )


class TestActivationParams:
    # computed by hand: scale = (max(high, 0) - min(low, 0)) / 255, zero point = round(-min(low, 0) / scale)
    GOLDEN = (
        (0.0, 1.0, 1 / 255, 0),
        (0.0, 255.0, 1.0, 0),
        (-128.0, 127.0, 1.0, 128),
        (-1.0, 4.0, 5 / 255, 51),
        (-0.5, 0.0, 0.5 / 255, 255),
        (-127.5, 127.5, 1.0, 128),  # -low / scale = 127.5: tie to even
        (-126.5, 128.5, 1.0, 126),  # tie to even, downwards
        (2.0, 51.0, 51 / 255, 0),  # widened to 0
        (-51.0, -2.0, 51 / 255, 255),
        # degenerate
        (0.0, 0.0, 1.0, 0),
        (1.0, 1.0, 1 / 255, 0),
        (-1.0, -1.0, 1 / 255, 255),
        (0.0, 1e-45, TINY, 0),
        (-1e-45, 0.0, TINY, 0),
        (-TINY, TINY, TINY, 1),
        # 3.4e38 is drawn in to FLOAT_MAX * 127 / 128, so that (0 - 128) * scale is finite
        (-3.4e38, 3.4e38, 2 * FLOAT_MAX * 127 / 128 / 255, 128),
        (-math.inf, math.inf, 2 * FLOAT_MAX * 127 / 128 / 255, 128),
        (0.0, math.inf, FLOAT_MAX * 127 / 128 / 255, 0),
    )

    @pytest.mark.parametrize(("low", "high", "scale", "zero"), GOLDEN)
    def test_golden(self, low: float, high: float, scale: float, zero: int) -> None:
        p = activation_params(low, high)
        assert p.scale.dtype == np.float32
        assert p.zero_point.dtype == np.uint8
        assert (p.scale.shape, p.zero_point.shape, p.qmin, p.qmax, p.axis) == ((), (), 0, 255, None)
        np.testing.assert_allclose(p.scale, scale, rtol=2e-6)
        assert p.zero_point == zero
        signed = activation_params(low, high, signed=True)
        assert (signed.scale, int(signed.zero_point), signed.qmin, signed.qmax) == (p.scale, zero - 128, -128, 127)
        assert signed.zero_point.dtype == np.int8

    @pytest.mark.parametrize(("signed", "zero", "qmin", "dtype"), [(True, 0, -128, np.int8), (False, 128, 0, np.uint8)])
    def test_symmetric(self, signed: bool, zero: int, qmin: int, dtype: Any) -> None:
        p = activation_params(-1.0, 2.54, signed=signed, symmetric=True)
        np.testing.assert_allclose(p.scale, 0.02, rtol=1e-6)
        assert (int(p.zero_point), p.zero_point.dtype, p.qmin, p.qmax) == (zero, dtype, qmin, qmin + 255)

    @given(low=floats, high=floats, form=formats, bits=st.integers(2, 16))
    @settings(max_examples=500)
    def test_scale_is_normal_and_all_integers_are_finite(
        self, low: float, high: float, form: dict[str, bool], bits: int
    ) -> None:
        p = activation_params(min(low, high), max(low, high), bits=bits, **form)
        assert TINY <= p.scale < np.inf
        ends = np.array([p.qmin, p.qmax, p.zero_point], p.zero_point.dtype)
        values = dequantize(ends, p)
        assert np.isfinite(values).all()
        assert values[2] == 0
        assert fake_quantize(np.zeros(1, np.float32), p)[0] == 0

    @given(x=hnp.arrays(np.float32, 50, elements=moderate), form=formats, bits=st.sampled_from([4, 8, 16]))
    @settings(max_examples=300)
    def test_error_is_at_most_half_a_step_inside_the_range(
        self, x: np.ndarray, form: dict[str, bool], bits: int
    ) -> None:
        p = activation_params(float(x.min()), float(x.max()), bits=bits, **form)
        step = float(p.scale)
        slack = 4 * np.finfo(np.float32).eps * np.abs(x).astype(np.float64)
        error = np.abs(fake_quantize(x, p).astype(np.float64) - x)
        assert (error <= step / 2 * (1 + 1e-5) + slack).all()

    @given(x=arrays, low=floats, high=floats, form=formats)
    @settings(max_examples=300)
    def test_monotone_and_idempotent(self, x: np.ndarray, low: float, high: float, form: dict[str, bool]) -> None:
        p = activation_params(min(low, high), max(low, high), **form)
        x = np.sort(x)
        once = fake_quantize(x, p)
        assert (np.diff(quantize(x, p).astype(np.int64)) >= 0).all()
        assert (once[1:] >= once[:-1]).all()
        np.testing.assert_array_equal(fake_quantize(once, p), once)

    @given(low=moderate, high=moderate)
    def test_parameters_are_those_of_the_definition(self, low: float, high: float) -> None:
        low, high = min(low, high), max(low, high)
        assume(max(high, 0) - min(low, 0) > 1e-30)
        found, expected = activation_params(low, high), asymmetric(low, high)
        np.testing.assert_array_equal(found.scale, expected.scale, strict=True)
        np.testing.assert_array_equal(found.zero_point, expected.zero, strict=True)

    @given(low=floats, high=floats, form=formats, bits=st.integers(2, 16))
    def test_every_integer_survives(self, low: float, high: float, form: dict[str, bool], bits: int) -> None:
        p = activation_params(min(low, high), max(low, high), bits=bits, **form)
        every = np.arange(p.qmin, p.qmax + 1).astype(p.zero_point.dtype)
        np.testing.assert_array_equal(quantize(dequantize(every, p), p), every)

    @given(x=hnp.arrays(np.float32, 30, elements=single(-1e3, 1e3)), form=formats, shift=st.integers(-40, 40))
    def test_a_power_of_two_changes_the_scale_alone(self, x: np.ndarray, form: dict[str, bool], shift: int) -> None:
        x[np.abs(x) < 1e-3] = 0
        assume(x.any())
        factor = np.float32(2.0**shift)
        plain = activation_params(float(x.min()), float(x.max()), **form)
        moved = activation_params(float((x * factor).min()), float((x * factor).max()), **form)
        assert moved.scale == plain.scale * factor and moved.zero_point == plain.zero_point
        np.testing.assert_array_equal(quantize(x * factor, moved), quantize(x, plain))

    @given(low=moderate, high=moderate)
    def test_wider_range_never_has_a_finer_scale(self, low: float, high: float) -> None:
        low, high = min(low, high), max(low, high)
        assume(low < 0 or high > 0)
        assert activation_params(low - 1, high + 1).scale >= activation_params(low, high).scale

    @pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)])
    def test_refuses_what_is_no_range(self, low: float, high: float) -> None:
        with pytest.raises(DataError, match="low <= high"):
            activation_params(low, high)

    @pytest.mark.parametrize("bits", [1, 17])
    def test_refuses_unknown_widths(self, bits: int) -> None:
        with pytest.raises(ValueError, match="2 to 16 bits"):
            activation_params(0.0, 1.0, bits=bits)


class TestWeightParams:
    W = np.array([[1.27, -0.5, 0.0], [0.0, 0.0, 0.0], [-2.54, 2.0, 0.1]], np.float32)

    def test_per_channel(self) -> None:
        p = weight_params(self.W, axis=0)
        np.testing.assert_allclose(p.scale, [0.01, 0.02, 0.02], rtol=1e-6)  # zeros: the largest channel's
        assert (p.qmin, p.qmax, p.axis, p.zero_point.dtype) == (-127, 127, 0, np.dtype(np.int8))
        np.testing.assert_array_equal(p.zero_point, np.zeros(3))
        np.testing.assert_array_equal(quantize(self.W, p), [[127, -50, 0], [0, 0, 0], [-127, 100, 5]])

    def test_per_tensor_and_negative_axis(self) -> None:
        p = weight_params(self.W, axis=None)
        assert p.scale.shape == ()
        np.testing.assert_allclose(p.scale, 0.02, rtol=1e-6)
        last = weight_params(self.W, axis=1)
        np.testing.assert_allclose(last.scale, np.array([2.54, 2, 0.1], np.float32) / 127, rtol=1e-6)
        counted_back = replace(last, axis=-1)
        np.testing.assert_array_equal(fake_quantize(self.W, counted_back), fake_quantize(self.W, last))

    def test_reduced_keeps_pairs_inside_16_bits(self) -> None:
        p = weight_params(self.W, axis=0, reduced=True)
        q = quantize(self.W, p).astype(np.int64)
        assert (p.qmin, p.qmax) == (-64, 64)
        assert np.abs(q).max() == 64
        assert 255 * 2 * np.abs(q).max() < 2**15

    def test_all_zero_and_empty(self) -> None:
        for w in (np.zeros((2, 3), np.float32), np.zeros((2, 0), np.float32)):
            p = weight_params(w, axis=0)
            np.testing.assert_array_equal(p.scale, [1, 1])
            np.testing.assert_array_equal(fake_quantize(w, p), w)

    @given(
        w=hnp.arrays(np.float32, (3, 7), elements=single(-3.3e38, 3.3e38)),
        reduced=st.booleans(),
        axis=st.sampled_from([0, 1, None]),
    )
    @settings(max_examples=200)
    def test_error_is_at_most_half_a_step(self, w: np.ndarray, reduced: bool, axis: int | None) -> None:
        p = weight_params(w, axis=axis, reduced=reduced)
        assert (p.scale >= TINY).all()
        q = quantize(w, p).astype(np.int64)
        assert p.qmin <= q.min()
        assert q.max() <= p.qmax
        step = p.scale.astype(np.float64)
        step = step if axis is None else np.expand_dims(step, 1 - axis)
        error = np.abs(fake_quantize(w, p).astype(np.float64) - w)
        assert (error <= step / 2 * (1 + 1e-4)).all()

    @given(w=hnp.arrays(np.float32, (4, 6), elements=moderate), axis=st.sampled_from([0, 1]))
    def test_channels_are_those_of_the_definition_and_do_not_depend_on_signs(self, w: np.ndarray, axis: int) -> None:
        assume((np.abs(w).max(axis=1 - axis) > 1e-30).all())
        p, expected = weight_params(w, axis=axis), per_channel(w, axis)
        np.testing.assert_array_equal(p.scale, expected.scale, strict=True)
        np.testing.assert_array_equal(quantize(w, p), expected.integers(w), strict=True)
        mirrored = weight_params(-w, axis=axis)
        np.testing.assert_array_equal(mirrored.scale, p.scale)
        np.testing.assert_array_equal(quantize(-w, mirrored), -quantize(w, p))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_refuses_weights_that_are_not_finite(self, bad: float) -> None:
        with pytest.raises(ModelError, match="NaN or infinite"):
            weight_params(np.array([1.0, bad], np.float32), axis=None)
        with pytest.raises(ModelError, match="NaN or infinite"):
            symmetric_params(bad)


class TestBias:
    @given(
        b=hnp.arrays(np.float32, 6, elements=floats),
        scale=hnp.arrays(np.float32, 6, elements=single(0, 1e30)),
    )
    @settings(max_examples=300)
    def test_always_fits_and_is_within_half_a_step(self, b: np.ndarray, scale: np.ndarray) -> None:
        q, used = bias_int32(b, scale)
        assert (q.dtype, used.dtype, used.shape) == (np.dtype(np.int32), np.dtype(np.float32), b.shape)
        assert (used >= TINY).all()
        assert (used >= scale).all()
        error = np.abs(q.astype(np.float64) * used - b)
        assert (error <= used.astype(np.float64) / 2 * (1 + 1e-9)).all()
        kept = used == scale
        assert (np.abs(b.astype(np.float64))[kept] <= (2**31 - 1) * scale.astype(np.float64)[kept]).all()

    def test_golden(self) -> None:
        q, used = bias_int32(np.array([0.5, -0.75, 0.0], np.float32), np.float32(0.5))
        np.testing.assert_array_equal(q, [1, -2, 0])  # -1.5 to even
        np.testing.assert_array_equal(used, np.array([0.5, 0.5, 0.5], np.float32))

    def test_edge_of_int32(self) -> None:
        q, used = bias_int32(np.array([2.0**31 - 128, -(2.0**31)], np.float32), np.array([1.0, 1.0], np.float32))
        assert q[0] == 2**31 - 128
        assert used[0] == 1.0
        assert used[1] > 1.0
        assert q[1] >= -(2**31) + 1

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_refuses_what_is_not_finite(self, bad: float) -> None:
        with pytest.raises(ModelError, match="bias"):
            bias_int32(np.array([bad], np.float32), np.float32(1.0))


class TestHalf:
    def test_golden(self) -> None:
        # IEEE 754 binary16: 10 stored bits, subnormal step 2^-24
        table = {
            1.0: 1.0,
            1 + 2.0**-11: 1.0,  # tie to even
            1 + 3 * 2.0**-11: 1 + 2.0**-9,  # tie to even, upwards
            65504.0: 65504.0,
            65519.99: 65504.0,
            65520.0: math.inf,
            -1e30: -math.inf,
            2.0**-24: 2.0**-24,
            2.0**-25: 0.0,  # tie to even
            2.0**-25 * 1.01: 2.0**-24,
            HALF_SMALLEST_NORMAL: HALF_SMALLEST_NORMAL,
        }
        x = np.array(list(table), np.float32)
        np.testing.assert_array_equal(FLOAT16.reference(x), np.array(list(table.values()), np.float32))

    @given(x=hnp.arrays(np.float32, 20, elements=st.floats(-65504, 65504, width=32)))
    def test_relative_error(self, x: np.ndarray) -> None:
        error = np.abs(FLOAT16.reference(x).astype(np.float64) - x)
        assert (error <= np.maximum(np.abs(x).astype(np.float64) * 2.0**-11, 2.0**-25)).all()
        np.testing.assert_array_equal(FLOAT16.reference(FLOAT16.reference(x)), FLOAT16.reference(x))

    @given(x=hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False)))
    def test_monotone_and_odd(self, x: np.ndarray) -> None:
        x = np.sort(x)
        found = FLOAT16.reference(x)
        assert (found[1:] >= found[:-1]).all()
        np.testing.assert_array_equal(FLOAT16.reference(-x), -found)

    def test_all_half_numbers_survive(self) -> None:
        every = np.arange(2**16, dtype=np.uint16).view(np.float16)
        every = every[np.isfinite(every)].astype(np.float32)
        np.testing.assert_array_equal(FLOAT16.reference(every), every)


@given(x=hnp.arrays(np.float32, 400, elements=st.floats(-1, 1, width=32)), bits=st.integers(6, 12))
def test_a_bit_is_worth_six_decibels(x: np.ndarray, bits: int) -> None:
    """Bounded by the worst case: every error half a step."""
    assume(np.abs(x).max() > 1e-3)
    p = activation_params(float(x.min()), float(x.max()), bits=bits)
    exact = x.astype(np.float64)
    signal, noise = np.square(exact).sum(), np.square(fake_quantize(x, p) - exact).sum()
    least = 10 * math.log10(signal / (x.size * float(p.scale) ** 2 / 4))
    assert noise == 0 or 10 * math.log10(signal / noise) >= least - 1e-2


def test_docstring_examples() -> None:
    result = doctest.testmod(numerics)
    assert result.attempted >= 15
    assert result.failed == 0
