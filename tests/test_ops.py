"""Every fact of the table of operators, held against the schemas of ONNX or against what ONNX Runtime computes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from bitalloy import ops

OPSET = 21
FLOAT, HALF, BOOL = "tensor(float)", "tensor(float16)", "tensor(bool)"
SCHEMAS = [s for s in onnx.defs.get_all_schemas_with_history() if not s.domain]
NEWEST = {s.name: s for s in sorted(SCHEMAS, key=lambda s: s.since_version) if s.since_version <= 23}


def execute(op: str, inputs: Sequence[np.ndarray], *, outputs: int = 1, **attributes: Any) -> list[np.ndarray]:
    """Run one operator in ONNX Runtime."""
    names = [f"x{i}" for i in range(len(inputs))]
    results = [f"y{i}" for i in range(outputs)]
    domain = ops.domain_of(op)
    node = helper.make_node(op, names, results, domain=domain, **attributes)
    specs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in zip(names, inputs, strict=True)
    ]
    graph = helper.make_graph([node], "g", specs, [onnx.ValueInfoProto(name=n) for n in results])
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, dict(zip(names, inputs, strict=True)))]


def numbers(*shape: int) -> np.ndarray:
    """Distinct integers in random order, as float32."""
    count = int(np.prod(shape))
    return np.random.default_rng(count).permutation(count).astype(np.float32).reshape(shape) - count // 2


def sizes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def types(schema: Any, value: Any) -> set[str]:
    """Types that an input or output of a schema may have."""
    found = [c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == value.type_str]
    return set(found[0] if found else [value.type_str])


def test_every_operator_exists() -> None:
    missing = {o.name for o in ops.OPERATORS.values() if not o.domain} - set(NEWEST)
    assert missing == {"RotaryEmbedding"} - set(NEWEST)
    with pytest.raises(KeyError):
        ops.OPERATORS["Convolution"]
    (y,) = execute("FusedMatMul", [numbers(2, 3), numbers(4, 3)], transB=1)
    np.testing.assert_array_equal(y, numbers(2, 3) @ numbers(4, 3).T)


def test_an_unknown_operator_has_no_facts() -> None:
    assert ops.domain_of("Convolution") == "" and ops.full_slots("Convolution") == ()


# --- moving data -------------------------------------------------------------------------------------------------

IMAGE = numbers(1, 4, 4, 6)
MOVES: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
    "DepthToSpace": ([IMAGE], {"blocksize": 2}),
    "Expand": ([numbers(3, 1), sizes(2, 3, 4)], {}),
    "Flatten": ([IMAGE], {"axis": 2}),
    "Gather": ([IMAGE, sizes(3, 0, 3)], {"axis": 1}),
    "Identity": ([IMAGE], {}),
    "MaxPool": ([IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "Reshape": ([IMAGE, sizes(8, -1)], {}),
    "Slice": ([IMAGE, sizes(3), sizes(0), sizes(3), sizes(-2)], {}),
    "SpaceToDepth": ([IMAGE], {"blocksize": 2}),
    "Split": ([IMAGE], {"axis": 3, "num_outputs": 2}),
    "Squeeze": ([IMAGE], {}),
    "Tile": ([IMAGE, sizes(1, 2, 1, 3)], {}),
    "Transpose": ([IMAGE], {"perm": [2, 0, 3, 1]}),
    "Unsqueeze": ([IMAGE, sizes(0, 3)], {}),
}


def test_what_moves_data_gives_numbers_of_its_first_input() -> None:
    assert set(MOVES) == ops.MOVERS | ops.RESHAPERS
    for op, (inputs, attributes) in MOVES.items():
        found = execute(op, inputs, outputs=2 if op in ops.SEVERAL_OUTPUTS else 1, **attributes)
        values = np.concatenate([y.reshape(-1) for y in found])
        assert np.isin(values, inputs[0]).all(), op
        if op in ops.RESHAPERS or op in ops.SEVERAL_OUTPUTS:
            np.testing.assert_array_equal(np.sort(values), np.sort(inputs[0].reshape(-1)), err_msg=op)


def test_rounding_before_and_after_moving_is_the_same() -> None:
    for op in ops.MOVERS:
        (x, *rest), attributes = MOVES[op]
        count = 2 if op in ops.SEVERAL_OUTPUTS else 1
        before = execute(op, [np.round(x / 7) * 7, *rest], outputs=count, **attributes)
        after = [np.round(y / 7) * 7 for y in execute(op, [x, *rest], outputs=count, **attributes)]
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=op)


@pytest.mark.parametrize("op", sorted(ops.IDENTITIES))
def test_the_identity(op: str) -> None:
    np.testing.assert_array_equal(execute(op, [IMAGE])[0], IMAGE)


@pytest.mark.parametrize(
    ("op", "rest", "attributes"),
    [
        ("Cast", [], {"to": onnx.TensorProto.FLOAT16}),
        ("QuantizeLinear", [np.float32(1), np.int8(0)], {}),
        ("DequantizeLinear", [np.float32(1), np.int8(0)], {}),
    ],
)
def test_what_converts_keeps_integers(op: str, rest: list[Any], attributes: dict[str, Any]) -> None:
    assert op in ops.CONVERTERS and len(ops.CONVERTERS) == 3
    x = IMAGE.astype(np.int8) if op == "DequantizeLinear" else IMAGE
    np.testing.assert_array_equal(execute(op, [x, *map(np.asarray, rest)], **attributes)[0], IMAGE)


# --- functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(ops.RISING))
def test_rising(op: str) -> None:
    assert len(NEWEST[op].inputs) == 1 and not NEWEST[op].attributes
    x = np.linspace(1e-3 if op in ("Log", "Sqrt") else -6, 6, 4001, dtype=np.float32)
    (y,) = execute(op, [x])
    last_bits = 4 * np.spacing(np.abs(y).max())
    assert y.shape == x.shape and (np.diff(y) >= -last_bits).all() and y[-1] > y[0]
    np.testing.assert_allclose(execute(op, [x[:1]])[0], y[:1], rtol=1e-6)


@pytest.mark.parametrize("op", sorted(ops.HOMOGENEOUS))
def test_homogeneous_channel_by_channel(op: str) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [2, 3]} if op in ("AveragePool", "MaxPool") else {}
    slope = [np.array([0.1, -2, 0.5, 3], np.float32).reshape(1, 4, 1, 1)] if op == "PRelu" else []
    factors = np.array([0.25, 1, 8, 2], np.float32).reshape(1, 4, 1, 1)
    (y,) = execute(op, [IMAGE, *slope], **attributes)
    (scaled,) = execute(op, [IMAGE * factors, *slope], **attributes)
    np.testing.assert_array_equal(scaled, y * factors)
    assert (y.shape != IMAGE.shape) == (op in ops.POOLS)


@pytest.mark.parametrize("op", sorted(ops.CARRIES_NAN))
@pytest.mark.parametrize("slot", [0, 1])
def test_nan_reaches_the_result(op: str, slot: int) -> None:
    inputs = [numbers(3, 3), numbers(3, 3)]
    inputs[slot][1, 2] = np.nan
    (y,) = execute(op, inputs, **({"axis": 0} if op == "Concat" else {}))
    assert np.isnan(y.sum())


@pytest.mark.parametrize("op", sorted(ops.TAKES_INFINITY))
def test_infinity_has_a_use(op: str) -> None:
    """The result is infinite nowhere, or where that masks: exp(-inf) is 0."""
    x, low = numbers(2, 3), np.float32(-np.inf)
    rest = {
        "Clip": [np.asarray(low), np.asarray(-low)],
        "Pad": [sizes(0, 1, 0, 1), np.asarray(low)],
        "Where": [np.full((2, 3), low)],
    }.get(op, [np.full((2, 3), -low if op == "Min" else low)])
    first = [x > 0] if op == "Where" else []
    (y,) = execute(op, [*first, x, *rest])
    assert not np.isnan(y).any() and not np.isnan(np.exp(y)).any()
    if op in ("Clip", "Max", "Min"):
        np.testing.assert_array_equal(y, x)


# --- gradients ---------------------------------------------------------------------------------------------------


def test_what_is_stepwise_gives_no_floats_or_steps() -> None:
    x = numbers(4, 5) + np.float32(0.3)
    left = set()
    for op in ops.STEPWISE:
        schema = NEWEST[op]
        if any(FLOAT in types(schema, v) for v in schema.outputs):
            left.add(op)
    assert left == {"Ceil", "ConstantOfShape", "EyeLike", "Floor", "Hardmax", "Round", "Sign"}
    for op in left - {"ConstantOfShape"}:
        np.testing.assert_array_equal(execute(op, [x])[0], execute(op, [x + np.float32(1e-3)])[0], err_msg=op)
    assert FLOAT not in types(NEWEST["ConstantOfShape"], NEWEST["ConstantOfShape"].inputs[0])


def test_what_is_boolean_is_what_the_schemas_say() -> None:
    known = [NEWEST[o.name] for o in ops.OPERATORS.values() if o.name in NEWEST]
    assert {s.name for s in known if all(types(s, v) == {BOOL} for v in s.outputs)} == ops.BOOLEAN
    assert ops.BOOLEAN <= ops.STEPWISE


@pytest.mark.parametrize("op", sorted(ops.SHAPE_READERS))
def test_the_shape_alone_counts(op: str) -> None:
    np.testing.assert_array_equal(execute(op, [IMAGE])[0], execute(op, [np.full_like(IMAGE, np.nan)])[0])


def test_several_outputs_are_parts_of_one_kind() -> None:
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    assert all(NEWEST[op].outputs[0].option == variadic for op in ops.SEVERAL_OUTPUTS)


@pytest.mark.parametrize("op", sorted(ops.RECURRENT))
def test_states_are_handed_on(op: str) -> None:
    """What comes later changes no state before it, and the last state is the last of all states."""
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    x, w, r = numbers(3, 2, 4), numbers(1, gates * 5, 4), numbers(1, gates * 5, 5)
    every, last = execute(op, [x, w, r], outputs=2, hidden_size=5)
    later = np.concatenate([x[:2], numbers(1, 2, 4) + 1])
    changed = execute(op, [later, w, r], outputs=2, hidden_size=5)[0]
    np.testing.assert_array_equal(every[-1], last)
    np.testing.assert_array_equal(every[:2], changed[:2])
    assert (every[2] != changed[2]).any()


# --- products ----------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Mapping[str, Any]]] = {
    "Conv": ((1, 3, 5, 5), (4, 3, 2, 2), {}),
    "ConvTranspose": ((1, 3, 5, 5), (3, 4, 2, 2), {}),
    "Gemm": ((2, 3), (3, 4), {}),
    "Gemm turned": ((2, 3), (4, 3), {"transB": 1}),
    "MatMul": ((2, 5, 3), (3, 4), {}),
    "MatMul of many": ((2, 5, 3), (2, 3, 4), {}),
}


@pytest.mark.parametrize("case", sorted(LAYERS))
def test_axes_of_products(case: str) -> None:
    assert {name.partition(" ")[0] for name in LAYERS} == ops.WEIGHTED
    op = case.partition(" ")[0]
    shape, kernel, attributes = LAYERS[case]
    x, w = numbers(*shape), numbers(*kernel)
    axis = ops.channel_axis(op, x.ndim)
    entering, leaving = ops.weight_axes(op, w.ndim, attributes)
    (y,) = execute(op, [x, w], **attributes)
    assert (x.shape[axis], y.shape[axis]) == (3, 4) == (w.shape[entering], w.shape[leaving])
    for factors, of_weight, of_tensor in (([1, 2, 4], entering, x), ([1, 2, 4, 8], leaving, y)):
        steps = np.array(factors, np.float32)
        turned = w * steps.reshape([-1 if d == of_weight else 1 for d in range(w.ndim)])
        scaled = of_tensor * steps.reshape([-1 if d == axis else 1 for d in range(of_tensor.ndim)])
        wanted = execute(op, [scaled, w], **attributes)[0] if of_tensor is x else scaled
        np.testing.assert_array_equal(execute(op, [x, turned], **attributes)[0], wanted)


# --- types and schemas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(ops.LOWERABLE))
def test_types_that_may_be_lowered(op: str) -> None:
    schema = NEWEST[op]
    assert HALF in types(schema, schema.outputs[0])
    for slot, value in enumerate(schema.inputs):
        if slot in ops.full_slots(op):
            assert FLOAT in types(schema, value) and value.type_str != schema.outputs[0].type_str
        elif FLOAT in types(schema, value):
            assert HALF in types(schema, value), value.name


def test_control_flow_is_what_has_graphs() -> None:
    kind = onnx.defs.OpSchema.AttrType.GRAPH
    assert {s.name for s in NEWEST.values() if any(a.type == kind for a in s.attributes.values())} == ops.CONTROL_FLOW


def test_random_is_what_has_a_seed() -> None:
    seeded = {s.name for s in NEWEST.values() if "seed" in s.attributes}
    assert seeded == ops.RANDOM | (ops.TRAINING_ONLY & ops.IDENTITIES) and seeded >= ops.TRAINING_ONLY


def test_quantized_is_what_is_called_so() -> None:
    assert {n for n in NEWEST if re.search("Integer$|^QLinear|[qQ]uantizeLinear$", n)} == ops.QUANTIZED


@pytest.mark.parametrize("op", sorted(ops.EXPANDED))
def test_what_is_expanded_is_defined_by_others(op: str) -> None:
    if op in NEWEST:
        schema: Any = NEWEST[op]  # its type stub does not have these
        assert schema.has_function or schema.has_context_dependent_function
