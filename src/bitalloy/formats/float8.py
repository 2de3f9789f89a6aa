"""Eight-bit floats with a scale: E4M3, of which 448 is the largest number and which has no infinities.

Bit-exact to QuantizeLinear and DequantizeLinear from opset 19 on as ONNX Runtime computes them on the CPU
(https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html), the division and the product in float32, ties to even:

    q = float8(clip(x / scale, -448, 448))        x' = q * scale

A number keeps 4 significant bits from scale / 64 on, below that steps of scale / 512: the error is in proportion to the
number, where that of integers is in proportion to the range. Values must not be NaN, as for integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitalloy.core.errors import DataError
from bitalloy.core.units import Evidence
from bitalloy.formats.base import (
    FLOAT_MAX,
    QuantParams,
    Writer,
    along,
    checked_magnitudes,
    normal_scale,
    write_pair,
    write_reading,
)

LARGEST_E4M3 = 448
_REACH = FLOAT_MAX * (1 - 2**-20)
"""Largest magnitude to scale: 448 steps of 1 / 448 of it stay finite in float32."""


@dataclass(frozen=True, kw_only=True)
class Float8:
    """The format E4M3, see `bitalloy.formats.base.Format`: the largest magnitude of a tensor becomes 448.

    Example: 0.3 is 0.3 / scale = 16.8 steps, between 16 and 18; 9 saturates.

        >>> e4m3 = Float8()
        >>> e4m3.reference(np.float32([0.3, -1.0, 9.0]), e4m3.of_range(-1.0, 8.0))
        array([ 0.2857143, -1.       ,  8.       ], dtype=float32)
    """

    name: str = "float8e4m3fn"
    bits: int = 8
    opset: int = 19

    def of_range(self, low: float, high: float) -> QuantParams:
        """Choose the scale of a tensor with values in [low, high], for both signs.

        Raises:
            DataError: a bound is NaN, or low > high.
        """
        if not low <= high:
            raise DataError(f"A range must have low <= high, got low={low}, high={high}. Calibrate again.")
        return _scaled(np.asarray(max(-float(low), float(high), 0.0)))

    def of_parts(
        self, low: NDArray[np.floating], high: NDArray[np.floating], *, axis: int, block: int = 0
    ) -> QuantParams:
        """Choose the scales of a constant, for each index along `axis`; with a `block`, the bounds have its rank.

        Raises:
            ModelError: a bound is NaN or infinite.
        """
        magnitude = np.maximum(np.maximum(-np.asarray(low), high), 0.0)
        return replace(_scaled(checked_magnitudes(magnitude)), axis=axis, block=block)

    def encode(self, x: NDArray[np.floating], params: QuantParams | None) -> NDArray[np.generic]:
        """Round numbers to the format; what lies beyond the largest saturates."""
        assert params is not None, "E4M3 has a scale"
        with np.errstate(over="ignore"):
            steps = np.asarray(x, np.float32) / along(params.scale, x, params)
        return np.asarray(np.clip(steps, -LARGEST_E4M3, LARGEST_E4M3).astype(ml_dtypes.float8_e4m3fn))

    def decode(self, numbers: NDArray[np.generic], params: QuantParams | None) -> NDArray[np.float32]:
        """Return what stored numbers stand for."""
        assert params is not None, "E4M3 has a scale"
        return np.asarray(numbers.astype(np.float32) * along(params.scale, numbers, params))

    def reference(self, x: NDArray[np.floating], params: QuantParams | None) -> NDArray[np.float32]:
        """Return what rounding leaves of numbers."""
        return self.decode(self.encode(x, params), params)

    def write(self, writer: Writer, x: ir.Value, params: QuantParams | None) -> ir.Value:
        """Write a QuantizeLinear and a DequantizeLinear, whose zero point tells the format."""
        assert params is not None, "E4M3 has a scale"
        return write_pair(writer, x, params)

    def write_stored(self, writer: Writer, stored: ir.Value, params: QuantParams | None) -> ir.Value:
        """Write a DequantizeLinear behind the stored numbers."""
        assert params is not None, "E4M3 has a scale"
        return write_reading(writer, stored, params)

    def safe(self, evidence: Evidence) -> tuple[float, str]:
        """Refuse nothing: kernels that read E4M3 sum up in float32."""
        return 0.0, ""


FLOAT8 = Float8()


def _scaled(magnitude: NDArray[np.float64]) -> QuantParams:
    scale = normal_scale(np.minimum(magnitude, _REACH) / LARGEST_E4M3)
    zero = np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)
    return QuantParams(scale=scale, zero_point=zero, qmin=-LARGEST_E4M3, qmax=LARGEST_E4M3)
