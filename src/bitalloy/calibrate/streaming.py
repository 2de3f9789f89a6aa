"""The pass over the data: a copy of the float model that measures itself.

The copy has extra outputs that are computed inside the graph, so that per tensor and sample only the minimum,
the maximum and at most 2048 values leave the session. To stay near the cost of the plain model:

1. a tensor that only rearranges another (Reshape, Transpose ...) shares that one's statistics;
2. a tensor y = f(x) with a rising f (Sigmoid, Relu ...) has f applied to the few numbers taken from x: its extremes
   are exact up to the last bit of f, and the runtime may still fuse the operator itself;
3. of a tensor that a mask may make infinite only the finite numbers count, and whether there are others is counted;
4. NaN is looked for only where no sum, product or concatenation carries it on to another measured tensor: there the
   sum of all values leaves the session as well. The first bad tensor is then found by a second run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from bitalloy import ops
from bitalloy.calibrate.statistics import ARRAYS, Statistics, observe
from bitalloy.core.errors import DataError, ModelError
from bitalloy.model.weights import Packed, pack
from bitalloy.runtime.ort import OrtSession

VALUES = 2048
"""Largest number of values of one tensor that leave the session per sample."""

_PREFIX = "bitalloy.calibrate/"
_NOUGHT = f"{_PREFIX}nought"
"""Name of the constant 0.0."""


def collect(
    model: ir.Model | onnx.ModelProto | bytes,
    tensors: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    masked: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the float model once per sample and gather statistics of `tensors`.

    Args:
        model: float32 model, opset 10 or later; never changed. Of a large `ir.Model` the weights are lent, not copied;
            a `ModelProto` has them inside.
        tensors: float32 tensors with static shapes known to the graph.
        feeds: input name -> array, per sample; consumed one by one.
        masked: tensors that may hold infinite numbers (`bitalloy.model.masked`).
        progress: called with 1 after each sample.

    Raises:
        ModelError: the model or a tensor cannot be used, or a tensor has NaN or infinite values; the message names
            the first such tensor in graph order, and the sample.
        DataError: `feeds` is empty.
    """
    weights: Mapping[str, np.ndarray] = {}
    if isinstance(model, ir.Model):
        packed = pack(model)
        model, weights = packed.data, packed.weights
    source = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model
    plan = _plan(source, tensors, masked)
    session = OrtSession(Packed(_instrumented(source, plan), weights))
    total: Statistics | None = None
    try:
        for number, sample in enumerate(feeds):
            found = session.run(sample)
            vectors = [found[_vector(i)] for i in range(len(plan.measured))]
            ends = np.array([v[:2] for v in vectors], np.float64)
            suspects = [t for t, e in zip(plan.measured, ends, strict=True) if not np.isfinite(e).all()]
            if suspects or not all(np.isfinite(found[_sum(i)]) for i in plan.checked):
                bad = [*_not_finite(source, plan, sample, weights), *suspects]
                if bad:  # else only a sum overflowed
                    raise ModelError(
                        f"Tensor '{bad[0]}' has NaN or infinite values in sample {number}, counted from 0. "
                        "Check that sample, and whether the model needs inputs of another scale."
                    )
            seen = observe(plan.measured, list(plan.sizes.values()), ends, [v[2:] for v in vectors], total)
            infinite = [int(found[_mask(i)]) if t in plan.masked else 0 for i, t in enumerate(plan.measured)]
            seen = replace(seen, infinite=np.array(infinite, np.int64))
            total = seen if total is None else total.merge(seen)
            if progress is not None:
                progress(1)
    finally:
        session.close()
    if total is None:
        raise DataError("There is no sample to calibrate with. Give at least one.")
    place = {t: i for i, t in enumerate(plan.measured)}
    rows = [place[root] for root in plan.roots.values()]
    return Statistics(tensors=tuple(plan.roots), samples=total.samples, **{f: getattr(total, f)[rows] for f in ARRAYS})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    roots: dict[str, str]
    """Requested tensor -> the tensor that it rearranges, or itself; in graph order."""
    sizes: dict[str, int]
    """Elements of each root, in graph order."""
    derived: dict[str, tuple[onnx.NodeProto, str]]
    """Roots that are a rising function of another root: the function's node and that root."""
    checked: tuple[int, ...]
    """Positions of the roots whose sum is looked at for NaN."""
    masked: frozenset[str]
    """Roots that may hold infinite numbers."""

    @property
    def measured(self) -> tuple[str, ...]:
        return tuple(self.sizes)


def _plan(model: onnx.ModelProto, tensors: Sequence[str], masked: Collection[str] = ()) -> _Plan:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < 10:
        raise ModelError(f"Calibration needs opset 10 or later, the model has {opset}. Export it again.")
    graph = model.graph
    sizes = _sizes(graph)
    producer = {name: node for node in graph.node for name in node.output}
    order = [*(i.name for i in graph.initializer), *(i.name for i in graph.input), *producer]
    rank = {name: i for i, name in reversed(list(enumerate(order)))}
    for name in tensors:
        if not sizes.get(name) or name not in rank:
            raise ModelError(f"Tensor '{name}' is no non-empty float32 tensor of static shape. Infer shapes first.")
    if not tensors:
        raise ModelError("There is no tensor to calibrate.")

    def root(name: str) -> str:
        while (node := producer.get(name)) is not None and node.op_type in ops.RESHAPERS and sizes.get(node.input[0]):
            name = node.input[0]
        return name

    roots = {name: root(name) for name in sorted(set(tensors), key=rank.__getitem__)}
    measured = sorted(set(roots.values()), key=rank.__getitem__)
    derived = {
        t: (producer[t], argument)
        for t in measured
        if t in producer
        and producer[t].op_type in ops.RISING
        and (argument := root(producer[t].input[0])) in measured
        and argument not in masked
    }
    carried = {root(i) for n in graph.node if n.output and n.output[0] in measured for i in _carried(n)}
    return _Plan(
        roots=roots,
        sizes={t: sizes[t] for t in measured},
        derived=derived,
        checked=tuple(i for i, t in enumerate(measured) if t not in derived and t not in carried),
        masked=frozenset(measured) & frozenset(masked) - frozenset(derived),
    )


def _carried(node: onnx.NodeProto) -> Sequence[str]:
    """Inputs of which every element enters the sums or products of some output element, so that NaN cannot hide."""
    if node.op_type == "Conv":
        steps = [v for a in node.attribute if a.name in ("strides", "dilations") for v in a.ints]
        return node.input[:1] if all(v == 1 for v in steps) else ()
    return node.input if node.op_type in ops.CARRIES_NAN else ()


def _sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Elements of every float32 tensor of static shape."""
    found = {i.name: int(np.prod(i.dims)) for i in graph.initializer if i.data_type == TensorProto.FLOAT}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT and kind.HasField("shape"):
            dims = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
            found[value.name] = int(np.prod(dims))
    return found


def _stride(size: int) -> int:
    """Smallest odd prime that leaves at most 2048 of `size` values and divides no dimension; 1 where all fit.

    >>> _stride(2048), _stride(2500), _stride(16 * 320 * 320), _stride(5 * 2040)
    (1, 3, 809, 7)
    """
    if size <= VALUES:
        return 1
    step = max(-(-size // VALUES), 3)
    while size % step == 0 or any(step % d == 0 for d in range(2, int(step**0.5) + 1)):
        step += 1
    return step


def _instrumented(model: onnx.ModelProto, plan: _Plan) -> bytes:
    """The model with the outputs `_vector(i)` for every root and `_sum(i)` for the checked ones.

    The runtime executes depth-first from the last node without consumers: written from the last tensor to the first,
    each measurement runs right after the tensor is made, while it is in the cache, and nothing is kept for later.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    place = {t: i for i, t in enumerate(plan.measured)}
    groups: list[list[onnx.NodeProto]] = []
    steps = {_stride(n) for n in plan.sizes.values()}
    numbers = {"flat": -1, "zero": 0, "end": np.iinfo(np.int64).max, **{f"step{s}": s for s in steps}}
    constant = {name: _PREFIX + name for name in numbers}
    graph.initializer.extend(
        helper.make_tensor(constant[name], TensorProto.INT64, [1], [value]) for name, value in numbers.items()
    )
    graph.initializer.append(helper.make_tensor(_NOUGHT, TensorProto.FLOAT, [], [0.0]))
    for i, tensor in enumerate(plan.measured):
        if tensor in plan.derived:
            function, argument = plan.derived[tensor]
            node = onnx.NodeProto()
            node.CopyFrom(function)
            node.input[:], node.output[:], node.name = [_vector(place[argument])], [_vector(i)], ""
            groups.append([])
            groups[place[argument]].append(node)
            continue
        name = f"{_PREFIX}{i}/"
        flat = name + ("finite" if tensor in plan.masked else "flat")
        nodes = [helper.make_node("Reshape", [tensor, constant["flat"]], [name + "flat"])]
        nodes += _finite(name, _mask(i)) if tensor in plan.masked else ()
        nodes += [
            helper.make_node("ReduceMin", [flat], [name + "low"], keepdims=1),
            helper.make_node("ReduceMax", [flat], [name + "high"], keepdims=1),
        ]
        values = flat
        if (step := _stride(plan.sizes[tensor])) > 1:
            values = name + "values"
            begin = [constant["zero"], constant["end"], constant["zero"], constant[f"step{step}"]]
            nodes.append(helper.make_node("Slice", [flat, *begin], [values]))
        nodes.append(helper.make_node("Concat", [name + "low", name + "high", values], [_vector(i)], axis=0))
        if i in plan.checked:
            nodes.append(helper.make_node("ReduceSum", [flat], [_sum(i)], keepdims=0))
        groups.append(nodes)
    for nodes in reversed(groups):
        graph.node.extend(nodes)
    masks = [_mask(i) for i, t in enumerate(plan.measured) if t in plan.masked]
    return _with_outputs(result, [*map(_vector, range(len(plan.measured))), *map(_sum, plan.checked), *masks])


def _finite(name: str, mask: str) -> list[onnx.NodeProto]:
    """Nodes that put 0 in place of what is infinite in `flat`, as `finite`, and say whether there was any."""
    return [
        helper.make_node("IsInf", [name + "flat"], [name + "infinite"]),
        helper.make_node("Cast", [name + "infinite"], [name + "ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", [name + "ones"], [mask], keepdims=0),
        helper.make_node("Where", [name + "infinite", _NOUGHT, name + "flat"], [name + "finite"]),
    ]


def _not_finite(
    model: onnx.ModelProto, plan: _Plan, sample: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]
) -> list[str]:
    """Requested tensors that are not finite, looking at every value; in graph order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {t: _vector(i) for i, t in enumerate(plan.measured)}
    copy.graph.node.extend(helper.make_node("Identity", [t], [o]) for t, o in names.items())
    session = OrtSession(Packed(_with_outputs(copy, list(names.values())), weights))
    found = session.run(sample)
    session.close()
    unfit = {
        t: np.isnan(v) if t in plan.masked else ~np.isfinite(v) for t, v in ((t, found[o]) for t, o in names.items())
    }
    return [t for t, root in plan.roots.items() if unfit[root].any()]


def _with_outputs(model: onnx.ModelProto, outputs: list[str]) -> bytes:
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs)
    if (size := model.ByteSize()) >= 2**31:
        raise ModelError(f"A model of {size / 1e9:.1f} GB does not fit one protobuf of 2 GB. Split it into graphs.")
    data: bytes = model.SerializeToString()
    return data


def _vector(position: int) -> str:
    """[low, high, values ...] of a root."""
    return f"{_PREFIX}{position}/vector"


def _sum(position: int) -> str:
    return f"{_PREFIX}{position}/sum"


def _mask(position: int) -> str:
    return f"{_PREFIX}{position}/mask"
