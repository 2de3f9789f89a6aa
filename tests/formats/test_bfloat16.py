"""bfloat16: the upper half of a float32 number, and what is refused it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitalloy.core.units import Evidence
from bitalloy.formats.bfloat16 import BFLOAT16

CALM = Evidence(magnitude=1.0, partial_sum=1.0, subnormal=0.0, depth=4)
LARGEST = float(np.array([0x7F7F0000], np.uint32).view(np.float32)[0])


def upper_half(x: np.ndarray) -> np.ndarray:
    """Round to 16 bits by integers alone: add half of the last place, less one where the number before is even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return ((rounded >> 16) << 16).astype(np.uint32).view(np.float32)


@given(hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False)))
def test_numbers_are_the_upper_half(x: np.ndarray) -> None:
    np.testing.assert_array_equal(BFLOAT16.reference(x).view(np.uint32), upper_half(x).view(np.uint32))


def test_ties_go_to_the_even_neighbour() -> None:
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, -3.4e38], np.float32)
    expected = np.array([1.0, 1 + 2**-6, -1.0, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(BFLOAT16.reference(x), expected)
    assert (BFLOAT16.bits, BFLOAT16.encode(x).itemsize) == (16, 2)


@pytest.mark.parametrize(("magnitude", "refused"), [(70000.0, False), (LARGEST / 2, False), (LARGEST * 0.51, True)])
def test_only_the_end_of_float32_is_refused(magnitude: float, refused: bool) -> None:
    """70000 and sums of it, half of a tensor below 6e-5 and long sums, which FP16 is refused for, are fine."""
    evidence = msgspec.structs.replace(CALM, magnitude=magnitude, partial_sum=1e6, subnormal=0.9, depth=1 << 20)
    error, reason = BFLOAT16.safe(evidence)
    assert error == 2.0**-8 and bool(reason) == refused == ("BF16 would overflow" in reason)
