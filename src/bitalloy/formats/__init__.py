"""How numbers are stored: one module for each number format, and the table of all of them.

A new format is an object with the methods of `base.Format`, registered here; schemes of targets name it.
"""

from __future__ import annotations

from bitalloy.core.errors import BitalloyError
from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.formats.affine import INT4, INT8, INT32, UINT4, UINT8
from bitalloy.formats.base import Format, Rounding, opset_of
from bitalloy.formats.bfloat16 import BFLOAT16
from bitalloy.formats.float8 import FLOAT8
from bitalloy.formats.float16 import FLOAT16
from bitalloy.formats.runtime import INT8_BLOCKS, UINT8_DYNAMIC

FORMATS: dict[str, Format] = {f.name: f for f in (UINT8, INT8, UINT4, INT4, INT32, FLOAT8, BFLOAT16, FLOAT16)}
_AT_RUN_TIME: tuple[Rounding, ...] = (UINT8_DYNAMIC, *INT8_BLOCKS)
ROUNDINGS: dict[str, Rounding] = {r.name: r for r in _AT_RUN_TIME}
"""Roundings of tensors that only exist at run time."""


def find_format(name: str | None) -> Format:
    """Look a format up by the name that a scheme gives it.

    Raises:
        BitalloyError: no such format.
    """
    if name is None or name not in FORMATS:
        raise BitalloyError(f"Unknown format '{name}'. Available: {', '.join(FORMATS)}.")
    return FORMATS[name]


def find_rounding(name: str | None) -> Rounding:
    """Look up how a scheme rounds tensors, by the name that it gives it.

    Raises:
        BitalloyError: no such format or rounding.
    """
    return ROUNDINGS[name] if name in ROUNDINGS else find_format(name)


def weight_bits(scheme: Scheme) -> float:
    """Return the size of a weight in bits, with its part of what a block has; scales of channels are left out."""
    if scheme.weight is None:
        return 32.0
    bits = find_format(scheme.weight).bits
    if scheme.granularity is Granularity.BLOCK:
        scale = find_format(scheme.activation).bits if scheme.cast else 32
        return bits + (scale + bits) / scheme.block  # scale and zero point
    return bits


def required_opset(scheme: Scheme) -> int:
    """Return the smallest version of the ONNX operators that can write a scheme; 0 for one that rounds nothing."""
    return opset_of(scheme, [find_rounding(name) for name in (scheme.activation, scheme.weight, scheme.bias) if name])
