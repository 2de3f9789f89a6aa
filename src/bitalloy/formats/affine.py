"""How a number is stored: scales, zero points, rounding to INT8 and FP16, and the noise that it makes.

Bit-exact to QuantizeLinear and DequantizeLinear as ONNX Runtime computes them on the CPU
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html), all arithmetic in float32, ties to even:

    q = saturate(round(x / scale) + zero_point)        x' = (q - zero_point) * scale

and to IEEE 754 binary16. Values must not be NaN: what the operators make of it differs between machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitalloy.core.errors import DataError, ModelError

FP16_MAX = 65504.0
"""Largest finite FP16 number; magnitudes from 65520 on become infinite."""
FP16_TINY = 2.0**-14
"""Smallest normal FP16 number, 6.1e-5: below it precision is lost bit by bit, below 2^-25 all becomes 0."""

_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = float(np.finfo(np.float32).tiny)
_BIAS_MAX = 2**31 - 256
"""Largest |b| / scale that an adjusted bias may have: leaves room for the rounding of the scale to float32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantParams:
    """How a tensor is stored as integers. Compare fields, not objects: they hold arrays."""

    scale: NDArray[np.float32]
    """Step between neighbouring values: shape () for a whole tensor, (channels,) along `axis`. Normal and > 0."""
    zero_point: NDArray[np.integer]
    """The integer that stands for 0.0. Same shape as `scale`; its dtype is the storage dtype of the tensor."""
    qmin: int
    """Smallest integer used."""
    qmax: int
    """Largest integer used."""
    axis: int | None = None
    """Dimension of the tensor that `scale` runs along; None: one scale for the whole tensor."""


def activation_params(
    low: float, high: float, *, bits: int = 8, signed: bool = False, symmetric: bool = False
) -> QuantParams:
    """Parameters for a tensor with values in [low, high], one scale for the whole tensor.

    The range is widened to contain 0, so that zero (padding, ReLU) is exact. Infinite bounds and such near the
    end of float32 are drawn in so far that every integer still stands for a finite number.

    Args:
        low: smallest value.
        high: largest value.
        bits: 2 to 16; stored in 8-bit integers up to 8, else in 16-bit integers.
        signed: int8 instead of uint8.
        symmetric: zero point in the middle (0, or 2^(bits-1) if unsigned) and one scale for both signs.

    Example: scale = (high - low) / 255, zero point = round(-low / scale) = round(51.0).

        >>> p = activation_params(-1.0, 4.0)
        >>> print(p.scale, p.zero_point, p.zero_point.dtype, p.qmin, p.qmax)
        0.019607844 51 uint8 0 255
        >>> p = activation_params(-1.0, 4.0, signed=True, symmetric=True)
        >>> print(p.scale, p.zero_point, p.zero_point.dtype)  # 4 / 127
        0.031496063 0 int8
        >>> print(activation_params(0.0, 0.0).scale)  # nothing to resolve: any scale is right
        1.0

    Raises:
        DataError: a bound is NaN, or low > high.
    """
    if not low <= high:
        raise DataError(f"A range must have low <= high, got low={low}, high={high}. Calibrate again.")
    dtype, qmin, qmax = _storage(bits, signed)
    half = 2 ** (bits - 1)
    low, high = max(min(float(low), 0.0), -_reach(half)), min(max(float(high), 0.0), _reach(half))
    if symmetric:
        scale = _normal(max(-low, high) / (half - 1))
        zero = qmin + half
    else:
        scale = _normal((high - low) / (qmax - qmin))
        zero = int(np.clip(np.rint(qmin - low / float(scale)), qmin, qmax))
    return QuantParams(scale=scale, zero_point=np.array(zero, dtype), qmin=qmin, qmax=qmax)


def symmetric_params(
    magnitude: ArrayLike, *, axis: int | None = None, bits: int = 8, reduced: bool = False
) -> QuantParams:
    """Signed parameters with zero point 0 for tensors or channels whose values reach `magnitude`.

    Args:
        magnitude: shape (), or (channels,) with `axis`. A channel of zeros takes the scale of the largest
            channel, so that its bias, which is stored in steps of sx * sw, is as fine as the others'.
        axis: dimension of the tensor that the channels run along.
        bits: 2 to 16.
        reduced: use one bit less: [-64, 64] instead of [-127, 127]. The AVX2 and AVX512F kernels of INT8 matrix
            products add pairs of uint8 * int8 in 16 bits (vpmaddubsw), which saturates for full-range weights:
            2 * 255 * 127 > 2^15, but 2 * 255 * 64 < 2^15. See "reduce_range" in
            https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Example:
        >>> symmetric_params([1.27, 0.0, 2.54], axis=0).scale
        array([0.01, 0.02, 0.02], dtype=float32)
        >>> p = symmetric_params(1.28, reduced=True)
        >>> print(p.scale, p.qmin, p.qmax)
        0.02 -64 64

    Raises:
        ModelError: a magnitude is negative, NaN or infinite.
    """
    dtype, _, full = _storage(bits, True)
    top = np.asarray(magnitude, np.float64)
    if not (np.isfinite(top) & (top >= 0)).all():
        raise ModelError("A weight has NaN or infinite values. Export the model again.")
    qmax = 2 ** (bits - 2) if reduced else full
    top = np.where(top == 0, top.max(initial=0.0), top)
    scale = _normal(np.minimum(top, _reach(qmax + 1)) / qmax)
    return QuantParams(scale=scale, zero_point=np.zeros(scale.shape, dtype), qmin=-qmax, qmax=qmax, axis=axis)


def weight_params(
    w: NDArray[np.floating], *, axis: int | None, bits: int = 8, symmetric: bool = True, reduced: bool = False
) -> QuantParams:
    """Parameters for a constant, from its own values: signed integers, one scale per channel or tensor.

    Args:
        w: the weights, any shape.
        axis: output channels: 0 for Conv, 1 for ConvTranspose, the last for MatMul; None: whole tensor.
        bits: 2 to 16.
        symmetric: zero point 0, as the INT8 kernels of most runtimes require of weights.
        reduced: one bit less, see `symmetric_params`.

    Example: scales 2.54 / 127 and 0.127 / 127.

        >>> weight_params(np.float32([[1.0, -2.54], [0.127, 0.05]]), axis=0).scale
        array([0.02 , 0.001], dtype=float32)

    Raises:
        ModelError: NaN or infinite weights.
    """
    axis = None if axis is None else range(w.ndim)[axis]
    others = None if axis is None else tuple(d for d in range(w.ndim) if d != axis)
    values = np.asarray(w, np.float64)
    if symmetric:
        return symmetric_params(np.abs(values).max(axis=others, initial=0.0), axis=axis, bits=bits, reduced=reduced)
    if not np.isfinite(values).all():
        raise ModelError("A weight has NaN or infinite values. Export the model again.")
    dtype, qmin, qmax = _storage(bits, True)
    if reduced:
        qmin, qmax = -(2 ** (bits - 2)), 2 ** (bits - 2)
    values = np.clip(values, -_reach(qmax), _reach(qmax))
    low, high = values.min(axis=others, initial=0.0), values.max(axis=others, initial=0.0)
    span = high - low
    scale = _normal(np.where(span == 0, span.max(initial=0.0), span) / (qmax - qmin))
    zero = np.clip(np.rint(qmin - low / scale), qmin, qmax).astype(dtype)
    return QuantParams(scale=scale, zero_point=np.asarray(zero), qmin=qmin, qmax=qmax, axis=axis)


def quantize(x: NDArray[np.floating], p: QuantParams) -> NDArray[np.integer]:
    """Integers for `x` (any shape, read as float32), in the dtype of the zero point.

    Example: 0.05 / 0.02 = 2.5 goes to the even neighbour; 3 / 0.02 = 150 saturates.

        >>> p = QuantParams(scale=np.float32(0.02), zero_point=np.int8(0), qmin=-128, qmax=127)
        >>> quantize(np.float32([0.05, 0.07, -0.05, 3.0]), p)
        array([  2,   4,  -2, 127], dtype=int8)
    """
    scale, zero = _along(x, p)
    with np.errstate(over="ignore"):
        steps = np.asarray(x, np.float32) / scale
    kept = np.clip(steps, p.qmin - zero.astype(np.float64), p.qmax - zero.astype(np.float64))
    return np.asarray((np.rint(kept).astype(np.int64) + zero).astype(p.zero_point.dtype))


def dequantize(q: NDArray[np.integer], p: QuantParams) -> NDArray[np.float32]:
    """The float32 numbers that integers `q` stand for, same shape.

    >>> p = QuantParams(scale=np.float32(0.5), zero_point=np.uint8(51), qmin=0, qmax=255)
    >>> dequantize(np.uint8([51, 53, 0]), p)
    array([  0. ,   1. , -25.5], dtype=float32)
    """
    scale, zero = _along(q, p)
    return np.asarray((q.astype(np.int64) - zero).astype(np.float32) * scale)


def fake_quantize(x: NDArray[np.floating], p: QuantParams) -> NDArray[np.float32]:
    """What is left of `x` after rounding: `dequantize(quantize(x))`; applying it twice changes nothing more.

    >>> fake_quantize(np.float32([0.3, -1.0, 9.0]), activation_params(-1.0, 4.0))
    array([ 0.29411766, -1.        ,  4.        ], dtype=float32)
    """
    return dequantize(quantize(x, p), p)


def fake_fp16(x: NDArray[np.floating]) -> NDArray[np.float32]:
    """What is left of float32 values stored as IEEE 754 binary16: 11 significant bits, infinite from 65520 on.

    >>> fake_fp16(np.float32([0.1, 65519.0, 65520.0, 2e-8]))
    array([9.9975586e-02, 6.5504000e+04,           inf, 0.0000000e+00],
          dtype=float32)
    """
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.asarray(x, np.float32).astype(np.float16).astype(np.float32))


def bias_int32(b: NDArray[np.floating], scale: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Bias as int32 in steps of `scale` = sx * sw, so that it adds to an INT8 product without rescaling.

    Where |b| / scale leaves int32, or sx * sw is not a normal float32, the returned scale is the smallest that
    holds b, and differs from the one given: a runtime that insists on sx * sw needs that channel's weights
    quantized again, with sw = scale / sx.

    Args:
        b: shape (channels,).
        scale: shape () or (channels,), > 0.

    Returns:
        The integers, shape (channels,), and the scales that they count in, shape of `scale` broadcast with b.

    Example: the third channel's weights were nearly 0, so its bias of 50 would need 5e10 steps.

        >>> q, s = bias_int32(np.float32([1.0, -0.06, 50.0]), np.float32([0.01, 0.02, 1e-9]))
        >>> print(q[:2], f"{s[2]:.3e}")
        [100  -3] 2.328e-08

    Raises:
        ModelError: a bias is NaN or infinite.
    """
    values = np.asarray(b, np.float64)
    if not np.isfinite(values).all():
        raise ModelError("A bias has NaN or infinite values. Export the model again.")
    steps = np.broadcast_to(np.asarray(scale, np.float32), values.shape)
    least = np.maximum(np.abs(values) / _BIAS_MAX, _FLOAT_TINY).astype(np.float32)
    fits = (np.abs(values) <= (2**31 - 1) * steps.astype(np.float64)) & (steps >= np.float32(_FLOAT_TINY))
    kept = np.where(fits, steps, least).astype(np.float32)
    return np.asarray(np.rint(values / kept.astype(np.float64)).astype(np.int32)), kept


def sqnr_db(reference_energy: ArrayLike, error_energy: ArrayLike) -> NDArray[np.float64]:
    """Signal to quantization noise ratio, 10 log10(reference / error), of sums of squares; broadcasts.

    Without error +inf (also of nothing), -inf where an error meets no signal:

        >>> print(sqnr_db(200.0, 2.0), sqnr_db(1.0, 0.0), sqnr_db(0.0, 1.0))
        20.0 inf -inf
    """
    signal, noise = np.asarray(reference_energy, np.float64), np.asarray(error_energy, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(noise))
    return np.asarray(np.where(noise == 0, np.inf, ratio))


def sqnr_db_of(reference: NDArray[np.floating], test: NDArray[np.floating]) -> float:
    """SQNR of `test` against `reference` in dB: 10 log10(||r||^2 / ||t - r||^2), sums in float64.

        >>> round(sqnr_db_of(np.float32([1, -1]), np.float32([1.1, -0.9])), 3)
        20.0

    Raises:
        DataError: the shapes differ.
    """
    if reference.shape != test.shape:
        raise DataError(f"Outputs to compare differ in shape: {reference.shape} and {test.shape}.")
    r = np.asarray(reference, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(sqnr_db(np.square(r).sum(), np.square(np.asarray(test, np.float64) - r).sum()))


def _storage(bits: int, signed: bool) -> tuple[type[np.integer], int, int]:
    """Dtype, smallest and largest integer of a format."""
    if not 2 <= bits <= 16:
        raise ValueError(f"Integer formats have 2 to 16 bits, got {bits}.")
    small, large = (np.int8, np.int16) if signed else (np.uint8, np.uint16)
    qmin = -(2 ** (bits - 1)) if signed else 0
    return small if bits <= 8 else large, qmin, qmin + 2**bits - 1


def _reach(half: int) -> float:
    """Largest magnitude that may be quantized: `half` steps of 1 / (half - 1) of it stay finite in float32."""
    return _FLOAT_MAX * (half - 1) / half * (1 - 2**-20)


def _normal(scale: ArrayLike) -> NDArray[np.float32]:
    """As float32, 1 for nothing, never denormal: kernels may flush those to zero and divide by it."""
    wide = np.asarray(scale, np.float64)
    return np.where(wide == 0, 1.0, np.maximum(wide, _FLOAT_TINY)).astype(np.float32)


def _along(x: NDArray[np.generic], p: QuantParams) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scale and zero point shaped to broadcast along the axis."""
    shape: tuple[int, ...] = ()
    if p.axis is not None:
        shape = tuple(-1 if d == p.axis % x.ndim else 1 for d in range(x.ndim))
    return np.reshape(p.scale, shape), np.reshape(p.zero_point, shape).astype(np.int64)
