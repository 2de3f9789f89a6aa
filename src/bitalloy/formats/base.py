"""What a number format must be able to do, and how a rounding is written into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from bitalloy.core.errors import ModelError
from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.units import Evidence

Number = TypeVar("Number", bound=np.generic)
FLOAT_MAX = float(np.finfo(np.float32).max)
FLOAT_TINY = float(np.finfo(np.float32).tiny)
"""Smallest normal float32 number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantParams:
    """How a tensor is stored as numbers with a scale. Compare fields, not objects: they hold arrays."""

    scale: NDArray[np.float32]
    """What a stored 1 stands for: shape () for a whole tensor, (channels,) along `axis`. Normal and > 0."""
    zero_point: NDArray[np.generic]
    """The stored number that stands for 0.0. Same shape as `scale`; its dtype is the storage dtype of the tensor."""
    qmin: int
    """Smallest stored number."""
    qmax: int
    """Largest stored number."""
    axis: int | None = None
    """Dimension of the tensor that `scale` runs along; None: one scale for the whole tensor."""
    block: int = 0
    """Elements along `axis` that share a scale: then `scale` has the rank of the tensor, and its size along `axis` is
    that of the tensor over `block`, rounded up. 0: one scale for each index."""


class Writer(Protocol):
    """Where a rounding is written: a graph that is rewritten, the body of a gate, the graph of a probe."""

    def constant(self, array: NDArray[np.generic], role: str) -> ir.Value:
        """Add a constant; `role` is a part of its name."""
        ...

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        role: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """Add a node of one result.

        Args:
            op_type: the operator.
            inputs: what it reads.
            role: a part of its name.
            shape: that of the result; None where it is that of the first input.
            attributes: of the operator.
        """
        ...


class Rounding(Protocol):
    """How a tensor is rounded at run time. Every `Format` is one; others are registered in `formats.ROUNDINGS`."""

    @property
    def name(self) -> str:
        """As schemes refer to it."""
        ...

    @property
    def bits(self) -> int:
        """Of one number."""
        ...

    @property
    def opset(self) -> int:
        """Smallest version of the ONNX operators that can store it."""
        ...

    def of_range(self, low: float, high: float) -> QuantParams | None:
        """Choose the parameters of a tensor with values in [low, high]; None where there are none."""
        ...

    def reference(self, x: NDArray[np.floating], params: QuantParams | None) -> NDArray[np.float32]:
        """Return what rounding leaves of values, computed by numpy; runtimes are held against it, bit by bit."""
        ...

    def write(self, writer: Writer, x: ir.Value, params: QuantParams | None) -> ir.Value:
        """Round a float32 tensor at run time; returns what is left of it."""
        ...


class Format(Rounding, Protocol):
    """How a number is stored. An instance is registered in `bitalloy.formats.FORMATS`."""

    def of_parts(
        self, low: NDArray[np.floating], high: NDArray[np.floating], *, axis: int, block: int = 0
    ) -> QuantParams | None:
        """Choose the parameters of constants whose parts along `axis` lie in [low, high], see `QuantParams.scale`."""
        ...

    def encode(self, x: NDArray[np.floating], params: QuantParams | None) -> NDArray[np.generic]:
        """Return the numbers as they are stored."""
        ...

    def decode(self, numbers: NDArray[np.generic], params: QuantParams | None) -> NDArray[np.float32]:
        """Return what stored numbers stand for, as the runtime reads them."""
        ...

    def write_stored(self, writer: Writer, stored: ir.Value, params: QuantParams | None) -> ir.Value:
        """Read a constant that is stored in the format; returns it as float32."""
        ...

    def safe(self, evidence: Evidence) -> tuple[float, str]:
        """Judge a unit that would compute in the format.

        Returns:
            The expected relative rounding of its sums, and why the unit may not compute in it: empty where it may.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ComputedFloat:
    """What formats share that nodes compute in and that Cast converts to; they have no parameters."""

    name: str
    bits: int
    kind: ir.DataType
    """The type that ONNX has for it."""
    opset: int
    least: float
    """Smallest positive number."""

    def of_range(self, low: float, high: float) -> None:
        """Return nothing: a floating-point format has no parameters."""

    def of_parts(self, low: NDArray[np.floating], high: NDArray[np.floating], *, axis: int, block: int = 0) -> None:
        """Return nothing: a floating-point format has no parameters."""

    def encode(self, x: NDArray[np.floating], params: QuantParams | None = None) -> NDArray[np.generic]:
        """Convert numbers to the format, read as float32, ties to even."""
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(np.asarray(x, np.float32).astype(self.kind.numpy()))

    def decode(self, numbers: NDArray[np.generic], params: QuantParams | None = None) -> NDArray[np.float32]:
        """Convert stored numbers to float32."""
        return np.asarray(numbers.astype(np.float32))

    def reference(self, x: NDArray[np.floating], params: QuantParams | None = None) -> NDArray[np.float32]:
        """Return what is left of numbers in the format."""
        return self.encode(x).astype(np.float32)

    def write(self, writer: Writer, x: ir.Value, params: QuantParams | None = None) -> ir.Value:
        """Write a Cast to the format and one back."""
        half = writer.node("Cast", [x], "half", to=int(self.kind))
        return writer.node("Cast", [half], "single", to=int(ir.DataType.FLOAT))

    def write_stored(self, writer: Writer, stored: ir.Value, params: QuantParams | None = None) -> ir.Value:
        """Write a Cast behind the stored numbers."""
        return writer.node("Cast", [stored], "single", to=int(ir.DataType.FLOAT))


def cast_type(stored: Format) -> ir.DataType:
    """Return the type of ONNX that nodes compute in which run in a format."""
    return ir.DataType.from_numpy(stored.encode(np.zeros(1, np.float32), None).dtype)


def opset_of(scheme: Scheme, formats: Sequence[Rounding]) -> int:
    """Return the smallest version of the ONNX operators that can write a scheme of these formats; 0 for none."""
    block = 21 if scheme.granularity is Granularity.BLOCK and scheme.weight is not None else 0
    return max([block, *(f.opset for f in formats)])


def write_pair(writer: Writer, x: ir.Value, params: QuantParams) -> ir.Value:
    """Write a QuantizeLinear and a DequantizeLinear that share scale and zero point."""
    grid, attributes = _grid(writer, params), _attributes(params)
    q = writer.node("QuantizeLinear", [x, *grid], "quantized", shape=None, **attributes)
    return writer.node("DequantizeLinear", [q, *grid], "dequantized", shape=None, **attributes)


def write_reading(writer: Writer, stored: ir.Value, params: QuantParams) -> ir.Value:
    """Write a DequantizeLinear behind stored numbers."""
    grid, attributes = _grid(writer, params), _attributes(params)
    return writer.node("DequantizeLinear", [stored, *grid], "dequantized", shape=None, **attributes)


def along(values: NDArray[Number], x: NDArray[np.generic], p: QuantParams) -> NDArray[Number]:
    """Shape scales or zero points of parameters so that they broadcast with the tensor `x`."""
    if p.block:
        assert p.axis is not None, "blocks lie along an axis"
        axis = p.axis % x.ndim
        kept = (slice(None),) * axis + (slice(x.shape[axis]),)
        return np.repeat(values, p.block, axis)[kept]
    shape: tuple[int, ...] = ()
    if p.axis is not None:
        shape = tuple(-1 if d == p.axis % x.ndim else 1 for d in range(x.ndim))
    return np.reshape(values, shape)


def normal_scale(scale: ArrayLike) -> NDArray[np.float32]:
    """Make a scale float32, 1 for nothing, never denormal: kernels may flush those to zero and divide by it."""
    wide = np.asarray(scale, np.float64)
    return np.where(wide == 0, 1.0, np.maximum(wide, FLOAT_TINY)).astype(np.float32)


def checked_magnitudes(magnitude: ArrayLike) -> NDArray[np.float64]:
    """Return the magnitudes of parts of a constant as float64; that of zeros is the largest of all.

    Raises:
        ModelError: a magnitude is negative, NaN or infinite.
    """
    top = np.asarray(magnitude, np.float64)
    if not (np.isfinite(top) & (top >= 0)).all():
        raise ModelError("A weight has NaN or infinite values. Export the model again.")
    return np.where(top == 0, top.max(initial=0.0), top)


def _grid(writer: Writer, params: QuantParams) -> tuple[ir.Value, ir.Value]:
    return writer.constant(params.scale, "scale"), writer.constant(np.asarray(params.zero_point), "zero_point")


def _attributes(params: QuantParams) -> dict[str, int]:
    found = {} if params.axis is None else {"axis": params.axis}
    return {**found, "block_size": params.block} if params.block else found
