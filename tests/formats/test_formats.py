"""Every format: its reference is what ONNX Runtime executes of what it writes, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitalloy.core.errors import BitalloyError
from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.formats import FORMATS, find_format, required_opset
from bitalloy.formats.affine import bias_int32
from bitalloy.formats.base import Format, QuantParams, cast_type
from bitalloy.model.write import add_initializer
from bitalloy.runtime.ort import OrtSession

TENSORS = ("uint8", "int8", "uint4", "int4", "float8e4m3fn", "bfloat16", "float16")
"""Formats of tensors that ONNX Runtime's CPU provider has QuantizeLinear or Cast for."""
WEIGHTS = TENSORS
"""Of constants that it has DequantizeLinear or Cast for."""
BLOCK = 32
BLOCKS_SINCE = 21


@dataclass
class Sheet:
    """A graph that a format writes into; see `bitalloy.formats.base.Writer`."""

    opset: int
    graph: ir.Graph = field(init=False)

    def __post_init__(self) -> None:
        self.graph = ir.Graph([], [], nodes=[], name="sheet", opset_imports={"": self.opset})

    def constant(self, array: np.ndarray, role: str) -> ir.Value:
        return add_initializer(self.graph, f"{role}{len(self.graph.initializers)}", array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        role: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        made = ir.node(op_type, list(inputs), dict(attributes), name=f"{role}{len(self.graph)}")
        made.outputs[0].name = f"{role}{len(self.graph)}/output"
        self.graph.append(made)
        return made.outputs[0]

    def tensor(self, shape: Sequence[int]) -> ir.Value:
        """An input of the graph."""
        value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def run(self, y: ir.Value, shape: Sequence[int], **feeds: np.ndarray) -> np.ndarray:
        """What ONNX Runtime computes, as written."""
        y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.graph.outputs.append(y)
        proto = ir.to_proto(ir.Model(self.graph, ir_version=10))
        onnx.checker.check_model(proto, full_check=True)
        return OrtSession(proto.SerializeToString(), optimize=False, threads=1).run(feeds)["y"]


def opset(stored: Format, params: QuantParams | None) -> int:
    return max(stored.opset, BLOCKS_SINCE if params is not None and params.block else 0)


def written(stored: Format, x: np.ndarray, params: QuantParams | None) -> np.ndarray:
    """A tensor that is rounded at run time."""
    sheet = Sheet(opset(stored, params))
    y = stored.write(sheet, sheet.tensor(x.shape), params)
    return sheet.run(y, x.shape, x=x)


def read(stored: Format, x: np.ndarray, params: QuantParams | None) -> np.ndarray:
    """A constant that is stored in the format."""
    sheet = Sheet(opset(stored, params))
    y = stored.write_stored(sheet, sheet.constant(stored.encode(x, params), "stored"), params)
    return sheet.run(y, x.shape)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), strict=True)


def of_constant(stored: Format, w: np.ndarray, *, axis: int, block: int = 0) -> QuantParams | None:
    """Parameters of a constant: of all of it (axis -1), of its channels, or of blocks along an axis."""
    if block:
        starts = np.arange(0, w.shape[axis], block)
        low, high = (extreme.reduceat(w, starts, axis=axis) for extreme in (np.minimum, np.maximum))
        return stored.of_parts(low, high, axis=axis, block=block)
    others = tuple(d for d in range(w.ndim) if d != axis)
    return stored.of_parts(w.min(axis=others), w.max(axis=others), axis=axis)


numbers = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize("name", TENSORS)
@settings(max_examples=60)
@given(
    x=hnp.arrays(np.float32, (3, 25), elements=st.one_of(numbers, st.floats(width=32, allow_nan=False))),
    low=numbers,
    high=numbers,
)
def test_tensors_per_tensor(name: str, x: np.ndarray, low: float, high: float) -> None:
    """Also outside of the range, infinite, and next to every tie."""
    stored = find_format(name)
    params = stored.of_range(min(low, high), max(low, high))
    ties = x
    if params is not None:
        ties = (np.arange(-300, 300) / 2).astype(np.float32) * params.scale
    for given_ in (x, ties):
        assert_same_bits(written(stored, given_, params), stored.reference(given_, params))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_per_channel(name: str, axis: int) -> None:
    stored, x = find_format(name), normal(4, 6, 5)
    params = of_constant(stored, x, axis=axis)
    assert (params is None) == (name in ("float16", "bfloat16"))
    if params is not None and name == "uint8":  # each channel with a zero point of its own
        zero = np.arange(120, 120 + x.shape[axis]).astype(np.uint8)
        params = replace(params, zero_point=zero, qmin=0, qmax=255)
    assert_same_bits(written(stored, x, params), stored.reference(x, params))


LAYOUTS: dict[str, Callable[[Format, np.ndarray], QuantParams | None]] = {
    "tensor": lambda stored, w: stored.of_range(-float(np.abs(w).max()), float(np.abs(w).max())),
    "channel": lambda stored, w: of_constant(stored, w, axis=0),
    "last channel": lambda stored, w: of_constant(stored, w, axis=w.ndim - 1),
    "block": lambda stored, w: of_constant(stored, w, axis=1, block=BLOCK),
    "first block": lambda stored, w: of_constant(stored, w, axis=0, block=BLOCK),
}


@pytest.mark.parametrize("shape", [(64, 96), (33, 70), (40, 48, 3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_constants(name: str, layout: str, shape: tuple[int, ...]) -> None:
    """Sizes that are multiples of a block, and such that leave a part of one."""
    stored, w = find_format(name), normal(*shape)
    params = LAYOUTS[layout](stored, w)
    if params is not None and layout.endswith("block"):
        axis = params.axis or 0
        assert params.scale.shape[axis] == -(-shape[axis] // BLOCK) and params.scale.ndim == len(shape)
    assert ir.DataType.from_numpy(stored.encode(w, params).dtype).name.lower() == name
    found = stored.reference(w, params)
    assert_same_bits(read(stored, w, params), found)
    assert 0 < np.abs(found - w).max() < np.abs(w).max()


@pytest.mark.parametrize("name", ["uint8", "int8", "uint4", "int4"])
@settings(max_examples=60)
@given(w=hnp.arrays(np.float32, (3, 70), elements=st.one_of(st.just(0.0), numbers)))
def test_blocks_of_any_numbers(name: str, w: np.ndarray) -> None:
    """Also blocks of zeros; no number is off by more than half a step of its own block."""
    stored = find_format(name)
    params = of_constant(stored, w, axis=1, block=BLOCK)
    assert params is not None
    assert_same_bits(read(stored, w, params), stored.reference(w, params))
    step = np.repeat(params.scale, BLOCK, axis=1)[:, :70].astype(np.float64)
    error = np.abs(stored.reference(w, params).astype(np.float64) - w)
    assert (error <= step / 2 * (1 + 1e-4)).all()


def test_every_number_of_float8_and_every_tie_between_two() -> None:
    """Subnormal numbers too, both zeros, the middle between neighbours, and its own neighbours in float32."""
    stored = find_format("float8e4m3fn")
    known = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    known = np.sort(known[np.isfinite(known)])
    assert known[-1] == 448 and known[known > 0][0] == 2.0**-9
    middle = (known[1:] + known[:-1]) / 2
    beyond = np.array([448.1, 463.9, 464.0, 480.0, 1e30, np.inf], np.float32)
    every = np.concatenate(
        [known, middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf), beyond, -beyond]
    )
    for scale in (1.0, 2.0**-20, 0.1, 3e38 / 448):
        params = stored.of_range(-448 * scale, 0.0)
        assert params is not None
        x = (every.astype(np.float64) * params.scale).clip(-3.4e38, 3.4e38).astype(np.float32)
        assert_same_bits(written(stored, x, params), stored.reference(x, params))
        assert_same_bits(read(stored, x, params), stored.reference(x, params))
    params = stored.of_range(0.0, 448.0)
    np.testing.assert_array_equal(stored.reference(known, params), known)
    np.testing.assert_array_equal(stored.reference(beyond, params), np.full(len(beyond), 448, np.float32))


@settings(max_examples=60)
@given(w=hnp.arrays(np.float32, (3, 9), elements=st.one_of(st.just(0.0), numbers)))
def test_float8_channels_of_any_numbers(w: np.ndarray) -> None:
    """No number is off by more than a sixteenth of itself, or half of the smallest step of its channel."""
    stored = find_format("float8e4m3fn")
    params = of_constant(stored, w, axis=0)
    assert params is not None
    found = stored.reference(w, params)
    assert_same_bits(read(stored, w, params), found)
    error = np.abs(found.astype(np.float64) - w)
    allowed = np.maximum(np.abs(w.astype(np.float64)) / 16, params.scale[:, None].astype(np.float64) / 1024)
    assert (error <= allowed * (1 + 1e-6)).all()


@settings(max_examples=60)
@given(b=hnp.arrays(np.float32, 6, elements=numbers), scale=hnp.arrays(np.float32, 6, elements=st.floats(1e-6, 1.0)))
def test_biases(b: np.ndarray, scale: np.ndarray) -> None:
    """INT32 in steps that are given: ONNX Runtime reads what was rounded."""
    stored = find_format("int32")
    integers, steps = bias_int32(b, scale)
    zeros = np.zeros(steps.shape, np.int32)
    params = QuantParams(scale=steps, zero_point=zeros, qmin=-(2**31), qmax=2**31 - 1, axis=0)
    sheet = Sheet(stored.opset)
    y = stored.write_stored(sheet, sheet.constant(integers, "stored"), params)
    assert_same_bits(sheet.run(y, b.shape), integers.astype(np.float32) * steps)


@pytest.mark.parametrize("name", FORMATS)
def test_a_number_takes_the_bits_that_its_format_says(name: str) -> None:
    stored, x = find_format(name), normal(8, 16)
    if name == "int32":
        assert stored.bits == 8 * bias_int32(x[0], 1.0)[0].itemsize
        return
    params = stored.of_range(-2.0, 2.0)
    kept = ir.tensor(stored.encode(x, params), name="kept")
    assert kept.nbytes == x.size * stored.bits // 8


def test_versions_that_schemes_need() -> None:
    rounding = Scheme(name="a", activation="uint8", weight="int8", bias="int32")
    assert required_opset(Scheme(name="fp32")) == 0
    assert required_opset(rounding) == 13
    assert required_opset(Scheme(name="b", weight="int4")) == 21
    assert required_opset(Scheme(name="c", weight="int8", granularity=Granularity.BLOCK, block=BLOCK)) == 21
    with pytest.raises(BitalloyError, match="Unknown format 'int5'"):
        required_opset(Scheme(name="d", weight="int5"))


def test_the_type_that_nodes_compute_in() -> None:
    assert cast_type(find_format("float16")) == ir.DataType.FLOAT16
    assert cast_type(find_format("bfloat16")) == ir.DataType.BFLOAT16


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
