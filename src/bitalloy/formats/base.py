"""What a number format must be able to do, and how a rounding is written into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.units import Evidence


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

    def write_stored(self, writer: Writer, stored: ir.Value, params: QuantParams | None) -> ir.Value:
        """Read a constant that is stored in the format; returns it as float32."""
        ...

    def safe(self, evidence: Evidence) -> tuple[float, str]:
        """Judge a unit that would compute in the format.

        Returns:
            The expected relative rounding of its sums, and why the unit may not compute in it: empty where it may.
        """
        ...


def cast_type(stored: Format) -> ir.DataType:
    """Return the type of ONNX that nodes compute in which run in a format."""
    return ir.DataType.from_numpy(stored.encode(np.zeros(1, np.float32), None).dtype)


def opset_of(scheme: Scheme, formats: Sequence[Rounding]) -> int:
    """Return the smallest version of the ONNX operators that can write a scheme of these formats; 0 for none."""
    block = 21 if scheme.granularity is Granularity.BLOCK and scheme.weight is not None else 0
    return max([block, *(f.opset for f in formats)])
