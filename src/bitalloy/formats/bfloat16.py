"""bfloat16, which nodes compute in: the range of float32 with 8 significant bits.

The upper half of a float32 number, ties to even. Operators take it from opset 22 on: Conv, pooling and some activations
are defined for it in no earlier one, so that a model rises to that version where a plan uses the format.

A unit is refused it where this holds:

Case 1. Overflow: a tensor or constant of the unit reaches half of the largest number, 3.39e38. A mask of -3.4e38, the
        smallest float32, would become minus infinity, and a row of it NaN behind a Softmax.

There is no loss of bits near zero, because the exponents are those of float32; and no rounding of running sums, because
kernels of bfloat16 add up in float32 (NVIDIA, "Parallel Thread Execution ISA", mma with .bf16 operands; Intel,
"Intrinsics Guide", _mm512_dpbf16_ps and _tile_dpbf16ps): a sum is rounded once, to 1 / 256 of it at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bitalloy.core.units import Evidence
from bitalloy.formats.base import ComputedFloat

BRAIN_LARGEST = float.fromhex("0x1.fep127")
"""Largest finite bfloat16 number, 3.39e38."""
BRAIN_HEADROOM = 2.0
BRAIN_ERROR = 1 / 256
"""Largest relative error of one rounding."""


@dataclass(frozen=True, kw_only=True)
class Bfloat16(ComputedFloat):
    """The format, see `bitalloy.formats.base.Format`.

    >>> import numpy as np
    >>> Bfloat16().reference(np.float32([0.1, 1 + 2**-8, 1 + 3 * 2**-8, -3.0]))
    array([ 0.10009766,  1.        ,  1.015625  , -3.        ], dtype=float32)
    """

    name: str = "bfloat16"
    bits: int = 16
    kind: ir.DataType = ir.DataType.BFLOAT16
    opset: int = 22
    least: float = 2.0**-133

    def safe(self, evidence: Evidence) -> tuple[float, str]:
        """Judge a unit by the case of the module."""
        if evidence.magnitude * BRAIN_HEADROOM > BRAIN_LARGEST:
            return BRAIN_ERROR, f"BF16 would overflow: values reach {evidence.magnitude:.3g}, and it ends at 3.39e+38"
        return BRAIN_ERROR, ""


BFLOAT16 = Bfloat16()
