"""FP16 at the bounds of its cases, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from bitalloy.core.units import Evidence
from bitalloy.formats.float16 import FLOAT16, HALF_LARGEST, HALF_SMALLEST_NORMAL

CALM = Evidence(magnitude=1.0, partial_sum=1.0, subnormal=0.0, depth=4)


@pytest.mark.parametrize(
    ("field", "last", "first", "reason"),
    [
        ("magnitude", 32752.0, 32752.1, "FP16 would overflow: values reach 3.28e+04, and it ends at 65504"),
        ("partial_sum", 65504.0, 65504.1,
         "FP16 could overflow while 4 products are summed up: the sum may reach 6.55e+04"),
        ("subnormal", 0.5, 0.6, "60 % of a tensor lies below 6.1e-5, where FP16 loses bits"),
        ("depth", 16384, 40000, "a sum of 40000 products would lose 9.8 % in FP16"),
    ],
)  # fmt: skip
def test_a_unit_is_refused_beyond_a_bound_and_not_at_it(field: str, last: float, first: float, reason: str) -> None:
    """Half of the largest number, all of it in sums, half of a tensor, and sqrt(n) / 2048 = 1 / 16."""
    for value, said in ((last, ""), (first, reason)):
        evidence = msgspec.structs.replace(CALM, **{field: value})
        error, found = FLOAT16.safe(evidence)
        assert found == said and error == pytest.approx(evidence.depth**0.5 / 2048, rel=1e-12)


def test_bounds_are_those_of_the_standard() -> None:
    half = np.finfo(np.float16)
    assert float(half.max) == HALF_LARGEST and float(half.smallest_normal) == HALF_SMALLEST_NORMAL
    assert (FLOAT16.name, FLOAT16.bits, FLOAT16.opset) == ("float16", 16, 13)


def test_numbers_keep_eleven_bits() -> None:
    """1 + 2^-11 is a tie and goes to the even neighbour; from 65520 on all is infinite, below 2^-25 zero."""
    x = np.array(
        [1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-10), 65519.0, 65520.0, -1e30, 2.0**-24, 2.0**-25, 0.1], np.float32
    )
    expected = np.array(
        [1.0, 1 + 2**-9, -(1 + 2**-10), 65504.0, np.inf, -np.inf, 2.0**-24, 0.0, 1638 / 16384], np.float32
    )
    for found in (FLOAT16.reference(x), FLOAT16.encode(x).astype(np.float32)):
        np.testing.assert_array_equal(found, expected, strict=True)
    assert FLOAT16.encode(x).dtype == np.float16
    np.testing.assert_array_equal(FLOAT16.reference(np.array([1.0, 1 + 2.0**-11 + 2.0**-40])), [1.0, 1.0])


class Writer:
    """Keeps the nodes that a format writes."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, str, str, object]] = []

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        role: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        self.nodes.append((op_type, str(inputs[0].name), role, attributes["to"]))
        return ir.Value(name=role)

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        raise AssertionError("a Cast has no constants")


def test_it_is_written_as_casts() -> None:
    """10 is FLOAT16 and 1 is FLOAT in ONNX."""
    writer = Writer()
    assert FLOAT16.write(writer, ir.Value(name="x")).name == "single"
    assert FLOAT16.write_stored(writer, ir.Value(name="w")).name == "single"
    assert writer.nodes == [("Cast", "x", "half", 10), ("Cast", "half", "single", 1), ("Cast", "w", "single", 1)]
