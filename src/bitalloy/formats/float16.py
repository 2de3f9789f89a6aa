"""IEEE 754 binary16, which nodes compute in.

A unit is refused it where one of these holds:

Case 1. Overflow: a tensor or constant of the unit reaches half of 65504. Calibration sees samples, not all inputs.
Case 2. Overflow inside a sum of products: the largest possible running sum, from the ranges of its inputs and its own
        weights, exceeds 65504. Kernels may hold it in FP16.
Case 3. Subnormals: of a tensor more than half of the non-zero values lie below 6.1e-5, where FP16 loses bits.
Case 4. Accumulation: the expected relative error of a sum of n products in FP16, sqrt(n) / 2048 (Higham and Mary, "A
        New Approach to Probabilistic Rounding Error Analysis", 2019, with lambda = 1), exceeds 1/16: n > 16384.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from bitalloy.core.units import Evidence
from bitalloy.formats.base import ComputedFloat

HALF_LARGEST = 65504.0
"""Largest finite FP16 number; magnitudes from 65520 on become infinite."""
HALF_SMALLEST_NORMAL = 2.0**-14
"""Smallest normal FP16 number, 6.1e-5: below it precision is lost bit by bit, below 2^-25 all becomes 0."""
HEADROOM = 2.0
LARGEST_SUBNORMAL = 0.5
LARGEST_ERROR = 1 / 16


@dataclass(frozen=True, kw_only=True)
class Float16(ComputedFloat):
    """The format, see `bitalloy.formats.base.Format`: 11 bits, infinite from 65520 on.

    >>> import numpy as np
    >>> Float16().reference(np.float32([0.1, 65519.0, 65520.0, 2e-8]))
    array([9.9975586e-02, 6.5504000e+04,           inf, 0.0000000e+00],
          dtype=float32)
    """

    name: str = "float16"
    bits: int = 16
    kind: ir.DataType = ir.DataType.FLOAT16
    opset: int = 13
    least: float = 2.0**-24

    def safe(self, evidence: Evidence) -> tuple[float, str]:
        """Judge a unit by the cases of the module."""
        error = math.sqrt(evidence.depth) / 2048
        if evidence.magnitude * HEADROOM > HALF_LARGEST:
            return error, f"FP16 would overflow: values reach {evidence.magnitude:.3g}, and it ends at 65504"
        if evidence.partial_sum > HALF_LARGEST:
            return error, (
                f"FP16 could overflow while {evidence.depth} products are summed up: the sum may reach "
                f"{evidence.partial_sum:.3g}"
            )
        if evidence.subnormal > LARGEST_SUBNORMAL:
            return error, f"{100 * evidence.subnormal:.0f} % of a tensor lies below 6.1e-5, where FP16 loses bits"
        if error > LARGEST_ERROR:
            return error, f"a sum of {evidence.depth} products would lose {100 * error:.1f} % in FP16"
        return error, ""


FLOAT16 = Float16()
