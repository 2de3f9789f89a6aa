"""Bring a file to the operators that the rest reads: standard ones, of the versions in `OPSETS`.

Case 1. Local functions are put in place of their calls (`onnx.inliner`).
        Branches, loops and sequences that are known already become plain nodes (`model.decide`).
Case 2. Operators of `com.microsoft` that ONNX Runtime's optimizers and exporters write, and that standard operators
        define: `model.contrib`. Also the normalizations that it accepts in the standard domain below opset 17.
Case 3. Opset 7 to 12: `onnx.version_converter` raises it to 13.
Case 4. Opsets above the last one: lowered, where all nodes of the file mean the same there.
Case 5. Half precision and double become float32 inside (`model.widen`); inputs and outputs keep their types.
Case 6. A quantized file becomes the float model that it rounds (`model.quantized`); its roundings are kept beside it.
Case 7. Recurrent operators with the batch first get the time first (`model.layout`).

What was done is told as a note; `agrees` then runs the file as it was and as it became on random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
import onnxruntime as ort
from onnx import helper

from bitalloy.core.errors import ModelError
from bitalloy.model.contrib import EXPANSIONS, MICROSOFT, ContribCall
from bitalloy.model.decide import decided, has_undecided
from bitalloy.model.dequantizer import GivenRoundings
from bitalloy.model.layout import has_batch_first, time_first
from bitalloy.model.quantized import dequantized, is_quantized
from bitalloy.model.widen import computes_narrow, widened

DEFAULT_DOMAINS = ("", "ai.onnx")
"""Both names of the standard operators."""
OPSETS = range(13, 24)
"""Versions of the standard operators that are read as they are."""
OLDEST = 7
"""Oldest version that is converted: ONNX Runtime executes none below."""
_MEANS_ELSE = frozenset({"Attention"})
"""Operators above the last opset that compute something else than their earlier version of the same form."""
_CLOSE, _CLOSE_NARROW = 1e-3, 0.1
"""Largest difference between a file and its conversion, over the largest magnitude of an output; and of a file that
computes in half precision, whose own roundings are in it."""


def opset_of_model(proto: onnx.ModelProto) -> int | None:
    """Return the version of the standard operators that a file asks for; None where it names none."""
    return next((int(o.version) for o in proto.opset_import if o.domain in DEFAULT_DOMAINS), None)


@dataclass(frozen=True)
class Standard:
    """A file in standard operators."""

    proto: onnx.ModelProto
    changes: tuple[str, ...] = ()
    """Sentences that tell what was changed."""
    given: GivenRoundings = field(default_factory=GivenRoundings)
    """What the file rounds, where it is quantized."""


def standardized(proto: onnx.ModelProto, name: str, fixed: Mapping[str, int] | None = None) -> Standard:
    """Return a model of standard operators in a supported version.

    Args:
        proto: the model with its weights; not changed.
        name: how messages call the file.
        fixed: inputs of one element that always have this value, see `model.decide`.

    Raises:
        ModelError: something cannot be written in such operators; the message says what.
    """
    notes, given = [], GivenRoundings()
    if proto.functions:
        called = len(proto.functions)
        proto = onnx.inliner.inline_local_functions(proto)
        notes.append(f"{called} local functions of '{name}' were put in place of their calls.")
    if has_undecided(proto):
        proto, doubled = decided(proto, fixed)
        notes.append(f"Branches, loops and sequences of '{name}' were written as plain nodes where they are known.")
        if doubled:
            notes.append(
                f"Where the data decides which branch of an If in '{name}' runs, both run in what is made here."
            )
        notes += [
            f"'{given}' is {value} in every sample, and what '{name}' does depends on it: what is analysed and made "
            f"here does what '{name}' does then, whatever '{given}' is. For another value give samples that have it."
            for given, value in (fixed or {}).items()
        ]
    if is_quantized(proto):
        proto, given = dequantized(proto)
        notes.append(
            f"'{name}' is quantized: {len(given.tensors) + len(given.at_run_time)} tensors and {len(given.weights)} "
            "weights are rounded. Float stands for the same model without these roundings. Ranges and stored numbers "
            "are kept where a unit stays in such integers."
        )
    expanded, kinds = _expanded(proto)
    if kinds:
        proto = expanded
        notes.append(f"Operators of '{name}' were written in standard ones: {', '.join(sorted(kinds))}.")
    opset = opset_of_model(proto)
    if opset is not None and OLDEST <= opset < OPSETS[0]:
        proto = _raised(proto, name)
        notes.append(f"'{name}' was converted from opset {opset} to {OPSETS[0]}.")
    elif opset is not None and OPSETS[-1] < opset <= onnx.defs.onnx_opset_version():
        proto = _lowered(proto, name, opset)
        notes.append(f"'{name}' is of opset {opset}, and its operators mean the same in opset {OPSETS[-1]}.")
    if has_batch_first(proto):
        proto = time_first(proto)
        notes.append(f"Recurrent operators of '{name}' that have the batch first were written with the time first.")
    wide = widened(proto)
    if wide is not None:
        proto = wide
        notes.append(
            f"'{name}' computes in another precision than float32. It is analysed in float32, and shipped in it where "
            "the plan says nothing else, with its own inputs and outputs. What is compared with is the file as it is."
        )
    return Standard(proto, tuple(notes), given)


def agrees(
    before: onnx.ModelProto, standard: Standard, name: str, fixed: Mapping[str, int] | None = None
) -> tuple[str, bool]:
    """Execute a file and its conversion on random numbers, with all sizes known and the values that inputs always have.

    Returns:
        A sentence that tells how far they differ, or why the file itself could not be executed; and whether it could.

    Raises:
        ModelError: they differ.
    """
    initial = {t.name for t in before.graph.initializer}
    generator, feeds = np.random.default_rng(0), {}
    for value in before.graph.input:
        if value.name in initial:
            continue
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if kind.kind in "iub":
            drawn = np.full(shape, (fixed or {}).get(value.name, 1))
        elif value.name in standard.given.tensors:
            drawn = generator.uniform(*standard.given.tensors[value.name].limits, shape)
        else:
            drawn = generator.standard_normal(shape)
        feeds[value.name] = drawn.astype(kind)
    try:
        reference = _run_anyhow(before, feeds)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        return (
            f"ONNX Runtime does not execute '{name}' as it is ({_first_line(error)}), so the conversion is unproven.",
            False,
        )
    try:
        found = _run(standard.proto, feeds)
    except Exception as error:
        raise ModelError(
            f"'{name}' cannot be executed any more after its conversion: {_first_line(error)}. Export it with opset 17."
        ) from error
    worst = 0.0
    for old, new in zip(reference, found, strict=True):
        if not isinstance(old, np.ndarray) or old.dtype.kind in "iubO":
            continue
        assert isinstance(new, np.ndarray), "an output stays a tensor"
        scale = float(np.abs(old).max(initial=0.0)) or 1.0
        gap = (
            float(np.abs(old.astype(np.float64) - new).max(initial=0.0)) / scale if old.shape == new.shape else math.inf
        )
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    if standard.given:
        return f"On random inputs the roundings of '{name}' make up to {worst:.1e} of the largest output.", True
    if worst > (_CLOSE_NARROW if computes_narrow(before.graph) else _CLOSE):
        raise ModelError(
            f"'{name}' gives other numbers after its conversion to standard operators of opset {OPSETS[0]} (difference "
            f"{worst:.1e} of the largest). Export it with opset 17."
        )
    return f"On random inputs the conversion of '{name}' differs by {worst:.1e} of the largest output.", True


def _run_anyhow(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Sequence[object]:
    """Execute a file; where its fixed sizes contradict a branch that is not executed, with the sizes of inputs open."""
    try:
        return _run(proto, feeds)
    except Exception:  # as above
        opened = onnx.ModelProto()
        opened.CopyFrom(proto)
        for value in opened.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
        return _run(opened, feeds)


def _run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Sequence[object]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _raised(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(proto, OPSETS[0])
    except Exception as error:  # the converter raises RuntimeError and its own types from C++
        raise ModelError(
            f"'{name}' could not be converted to opset {OPSETS[0]}: {_first_line(error)}. Export it with opset 17."
        ) from error


def _lowered(proto: onnx.ModelProto, name: str, opset: int) -> onnx.ModelProto:
    for node in proto.graph.node:
        if node.domain in DEFAULT_DOMAINS and (why := _newer(node, opset)):
            raise ModelError(
                f"'{name}' uses opset {opset}, and its node '{node.name or node.output[0]}' ({node.op_type}) {why} in "
                f"opset {OPSETS[-1]}, the last that is known. Export it with opset {OPSETS[-1]} or earlier."
            )
    lower = onnx.ModelProto()
    lower.CopyFrom(proto)
    for item in lower.opset_import:
        if item.domain in DEFAULT_DOMAINS:
            item.version = OPSETS[-1]
    return lower


def _newer(node: onnx.NodeProto, opset: int) -> str:
    """Say what a node has that the last supported opset does not know; empty where it has nothing of the kind."""
    try:
        new = onnx.defs.get_schema(node.op_type, opset, "")
        old = onnx.defs.get_schema(node.op_type, OPSETS[-1], "")
    except onnx.defs.SchemaError:
        return "does not exist"
    if old.since_version == new.since_version:
        return ""
    if node.op_type in _MEANS_ELSE:
        return "means something else"
    unknown = sorted({a.name for a in node.attribute} - set(old.attributes))
    return (
        f"has no attribute {unknown[0]}" if unknown else "has fewer inputs" if len(node.input) > old.max_input else ""
    )


def _expanded(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, set[str]]:
    """Write the operators of `EXPANSIONS` in standard ones; returns the model and which there were."""
    opset = opset_of_model(proto) or OPSETS[0]
    kinds = {n.op_type for n in proto.graph.node if _key(n, opset) in EXPANSIONS}
    if not kinds:
        return proto, set()
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    constants = {t.name: t for t in changed.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: list[onnx.TensorProto] = []
    for node in changed.graph.node:
        expansion = EXPANSIONS.get(_key(node, opset))
        if expansion is None:
            nodes.append(node)
            continue
        call = ContribCall(node, opset, constants)
        if any(node.output[1:]) and not node.op_type.startswith("Skip"):
            raise call.refuse("it has more than one result")
        expansion(call)
        nodes += call.nodes
        made += call.initializers
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del changed.graph.node[:]
    changed.graph.node.extend(kept)
    changed.graph.initializer.extend(made)
    if not any(n.domain == MICROSOFT for n in kept):
        imports = [o for o in changed.opset_import if o.domain != MICROSOFT]
        del changed.opset_import[:]
        changed.opset_import.extend(imports)
    return changed, kinds


def _key(node: onnx.NodeProto, opset: int) -> tuple[str, str]:
    """Return (domain, operator); of what ONNX defines itself by now, another key, which has no expansion."""
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    return (
        ("onnx", node.op_type)
        if not domain and node.op_type == "LayerNormalization" and opset >= 17
        else (
            domain,
            node.op_type,
        )
    )
