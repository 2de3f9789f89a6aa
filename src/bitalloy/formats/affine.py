"""Integers with a scale and a zero point: INT8, UINT8, INT4 and the like.

Bit-exact to QuantizeLinear and DequantizeLinear as ONNX Runtime computes them on the CPU
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html), all arithmetic in float32, ties to even:

    q = saturate(round(x / scale) + zero_point)        x' = (q - zero_point) * scale

Values must not be NaN: what the operators make of it differs between machines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from bitalloy.core.errors import DataError, ModelError
from bitalloy.core.units import Evidence
from bitalloy.formats.base import (
    FLOAT_MAX,
    FLOAT_TINY,
    QuantParams,
    Writer,
    along,
    checked_magnitudes,
    normal_scale,
    write_pair,
    write_reading,
)

_BIAS_MAX = 2**31 - 256
"""Largest |b| / scale that an adjusted bias may have: leaves room for the rounding of the scale to float32."""


def activation_params(
    low: float, high: float, *, bits: int = 8, signed: bool = False, symmetric: bool = False
) -> QuantParams:
    """Choose parameters for a tensor with values in [low, high], with one scale for the whole tensor.

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
        scale = normal_scale(max(-low, high) / (half - 1))
        zero = qmin + half
    else:
        scale = normal_scale((high - low) / (qmax - qmin))
        zero = int(np.clip(np.rint(qmin - low / float(scale)), qmin, qmax))
    return QuantParams(scale=scale, zero_point=np.array(zero, dtype), qmin=qmin, qmax=qmax)


def symmetric_params(
    magnitude: ArrayLike, *, axis: int | None = None, bits: int = 8, reduced: bool = False
) -> QuantParams:
    """Choose signed parameters with zero point 0 for tensors or channels whose values reach `magnitude`.

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
    qmax = 2 ** (bits - 2) if reduced else full
    scale = normal_scale(np.minimum(checked_magnitudes(magnitude), _reach(qmax + 1)) / qmax)
    return QuantParams(scale=scale, zero_point=np.zeros(scale.shape, dtype), qmin=-qmax, qmax=qmax, axis=axis)


def asymmetric_params(
    low: ArrayLike, high: ArrayLike, *, axis: int | None = None, bits: int = 8, signed: bool = False
) -> QuantParams:
    """Choose parameters with zero points for channels or blocks with values in [low, high].

    Each range is widened to contain 0. A range of zeros takes the scale of the widest one.

    Args:
        low: smallest values, any shape.
        high: largest values, of the same shape.
        axis: dimension of the tensor that they run along.
        bits: 2 to 16.
        signed: whether the integers are.

    Example: steps of 1.5 / 15, and 0 at the fifth of them.

        >>> p = asymmetric_params([-0.5, 0.0], [1.0, 0.0], axis=0, bits=4)
        >>> print(p.scale, p.zero_point)
        [0.1 0.1] [5 0]

    Raises:
        ModelError: a bound is NaN or infinite.
    """
    dtype, qmin, qmax = _storage(bits, signed)
    reach = _reach(2 ** (bits - 1))
    bottom, top = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (np.isfinite(bottom) & np.isfinite(top)).all():
        raise ModelError("A weight has NaN or infinite values. Export the model again.")
    bottom, top = np.clip(bottom, -reach, 0.0), np.clip(top, 0.0, reach)
    width = top - bottom
    scale = normal_scale(np.where(width == 0, width.max(initial=0.0), width) / (qmax - qmin))
    zero = np.clip(np.rint(qmin - bottom / scale), qmin, qmax).astype(dtype)
    return QuantParams(scale=scale, zero_point=zero, qmin=qmin, qmax=qmax, axis=axis)


def quantize(x: NDArray[np.floating], p: QuantParams) -> NDArray[np.integer]:
    """Round `x` (any shape, read as float32) to integers in the dtype of the zero point.

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
    """Return the float32 numbers that the integers `q` stand for, in the same shape.

    >>> p = QuantParams(scale=np.float32(0.5), zero_point=np.uint8(51), qmin=0, qmax=255)
    >>> dequantize(np.uint8([51, 53, 0]), p)
    array([  0. ,   1. , -25.5], dtype=float32)
    """
    scale, zero = _along(q, p)
    return np.asarray((q.astype(np.int64) - zero).astype(np.float32) * scale)


def fake_quantize(x: NDArray[np.floating], p: QuantParams) -> NDArray[np.float32]:
    """Return what rounding leaves of `x`: `dequantize(quantize(x))`. A second rounding changes nothing more.

    >>> fake_quantize(np.float32([0.3, -1.0, 9.0]), activation_params(-1.0, 4.0))
    array([ 0.29411766, -1.        ,  4.        ], dtype=float32)
    """
    return dequantize(quantize(x, p), p)


def bias_int32(b: NDArray[np.floating], scale: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Store a bias as int32 in steps of `scale` = sx * sw, so that it adds to an INT8 product without rescaling.

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
    least = np.maximum(np.abs(values) / _BIAS_MAX, FLOAT_TINY).astype(np.float32)
    fits = (np.abs(values) <= (2**31 - 1) * steps.astype(np.float64)) & (steps >= np.float32(FLOAT_TINY))
    kept = np.where(fits, steps, least).astype(np.float32)
    return np.asarray(np.rint(values / kept.astype(np.float64)).astype(np.int32)), kept


def _storage(bits: int, signed: bool) -> tuple[type[np.integer], int, int]:
    """Return the dtype, the smallest and the largest integer of a format."""
    if not 2 <= bits <= 16:
        raise ValueError(f"Integer formats have 2 to 16 bits, got {bits}.")
    small, large = (np.int8, np.int16) if signed else (np.uint8, np.uint16)
    qmin = -(2 ** (bits - 1)) if signed else 0
    return small if bits <= 8 else large, qmin, qmin + 2**bits - 1


def _reach(half: int) -> float:
    """Return the largest magnitude to quantize: `half` steps of 1 / (half - 1) of it stay finite in float32."""
    return FLOAT_MAX * (half - 1) / half * (1 - 2**-20)


def _along(x: NDArray[np.generic], p: QuantParams) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scale and zero point shaped to broadcast along the axis."""
    return along(p.scale, x, p), along(np.asarray(p.zero_point).astype(np.int64), x, p)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A format of integers, see `bitalloy.formats.base.Format`.

    >>> Affine(name="uint8", bits=8, signed=False).reference(np.float32([0.3, -1.0, 9.0]), activation_params(-1.0, 4.0))
    array([ 0.29411766, -1.        ,  4.        ], dtype=float32)
    """

    name: str
    bits: int
    signed: bool
    symmetric: bool = False
    """Whether the zero point is in the middle."""
    opset: int = 13

    def of_range(self, low: float, high: float) -> QuantParams:
        """Choose the parameters of a tensor as `activation_params` does."""
        return self._stored(activation_params(low, high, bits=self.bits, signed=self.signed, symmetric=self.symmetric))

    def of_parts(
        self, low: NDArray[np.floating], high: NDArray[np.floating], *, axis: int, block: int = 0
    ) -> QuantParams:
        """Choose the parameters of a constant, around 0 as `symmetric_params` does, or with zero points.

        Args:
            low: smallest values, (channels,), or of blocks in the rank of the constant.
            high: largest values, likewise.
            axis: along which the channels, or the blocks, run.
            block: elements that share a scale, 0 without blocks.
        """
        if self.symmetric:
            found = symmetric_params(np.maximum(-np.asarray(low), high), axis=axis, bits=self.bits)
        else:
            found = asymmetric_params(low, high, axis=axis, bits=self.bits, signed=self.signed)
        return self._stored(replace(found, block=block))

    def encode(self, x: NDArray[np.floating], params: QuantParams | None) -> NDArray[np.generic]:
        """Round numbers to integers as `quantize` does."""
        assert params is not None, "integers have a scale"
        return quantize(x, params)

    def decode(self, numbers: NDArray[np.generic], params: QuantParams | None) -> NDArray[np.float32]:
        """Return what integers stand for, as `dequantize` does."""
        assert params is not None, "integers have a scale"
        return dequantize(numbers, params)  # type: ignore[arg-type]

    def reference(self, x: NDArray[np.floating], params: QuantParams | None) -> NDArray[np.float32]:
        """Round numbers as `fake_quantize` does."""
        assert params is not None, "integers have a scale"
        return fake_quantize(x, params)

    def write(self, writer: Writer, x: ir.Value, params: QuantParams | None) -> ir.Value:
        """Write a QuantizeLinear and a DequantizeLinear that share scale and zero point."""
        assert params is not None, "integers have a scale"
        return write_pair(writer, x, params)

    def write_stored(self, writer: Writer, stored: ir.Value, params: QuantParams | None) -> ir.Value:
        """Write a DequantizeLinear behind the stored integers."""
        assert params is not None, "integers have a scale"
        return write_reading(writer, stored, params)

    def safe(self, evidence: Evidence) -> tuple[float, str]:
        """Refuse nothing: kernels that read such integers sum up in 32 bits."""
        return 0.0, ""

    def _stored(self, params: QuantParams) -> QuantParams:
        """Turn zero points into the type of the format, where that has less than 8 bits."""
        if self.bits != 4:
            return params
        kind = ml_dtypes.int4 if self.signed else ml_dtypes.uint4
        return replace(params, zero_point=np.asarray(params.zero_point).astype(kind))


UINT8 = Affine(name="uint8", bits=8, signed=False)
INT8 = Affine(name="int8", bits=8, signed=True, symmetric=True)
UINT4 = Affine(name="uint4", bits=4, signed=False, opset=21)
INT4 = Affine(name="int4", bits=4, signed=True, symmetric=True, opset=21)
INT32 = Affine(name="int32", bits=32, signed=True, symmetric=True)
"""The format of biases; `bias_int32` makes its numbers."""
