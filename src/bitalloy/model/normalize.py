"""The normal form that every later stage relies on, and the passes that bring a model to it.

1. Constants are initializers, weights are float32 (a stored float16 weight with its Cast is widened).
2. Shapes are static, shape arithmetic is folded away; only tensors behind a selection (`model.selected`) may have
   sizes that nothing says.
3. No Constant, Dropout or CastLike nodes, none of the operators in `ops.EXPANDED`, and Identity only where an output
   would otherwise have no node of its own; BatchNormalization is folded into the Conv before it, an Add of a
   constant per channel into its bias, a Concat has no
   empty operands (an empty cache), and a Gemm with constant weights has no factors, and a bias of one number per column
   where it had but one row. A constant matrix of a MatMul has two dimensions, where leading ones of size 1 say nothing.
4. Every node has a unique name (the file's own where it has one), nodes are in topological order.
5. Inputs and outputs keep their names, types and order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
    TopologicalSortPass,
)

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.bounds import refuse_tensors
from bitalloy.model.decide import decide, refuse_undecided
from bitalloy.model.fold import first_input, fold_constants, session
from bitalloy.model.products import absorb, fold_bias, plain_products
from bitalloy.model.read import attribute, constant, consumers, is_static, static_shape
from bitalloy.model.selected import selected_values
from bitalloy.model.weights import pack
from bitalloy.model.widen import WIDENED
from bitalloy.model.write import add_initializer, namer

logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
"""A failed inference is logged with its traceback; whether it matters is known, and said, later."""
DEFAULTS: Mapping[str, Mapping[str, int]] = {"STFT": {"onesided": 1}}
"""Operator -> attributes whose default shape inference takes for another than the standard and the runtime do."""
IR_VERSIONS = range(8, 12)
"""Versions of the file format that ONNX Runtime reads and the supported opsets need."""


def normalize(model: ir.Model) -> ir.Model:
    """Bring a model with static input shapes to normal form, in place.

    Raises:
        ModelError: shapes cannot be determined, a part cannot be evaluated, weights are NaN or infinite, or
            the model computes in half precision.
    """
    _settle(model)
    _fill_missing_shapes(model)
    _drop_empty_operands(model)
    fold_bias(model)
    _fold_batch_norm(model)
    plain_products(model)
    RemoveUnusedNodesPass()(model)
    _refuse_numbers(model)
    return model


def tidy(model: ir.Model) -> ir.Model:
    """Do the part of `normalize` that needs no static shapes, in place; nodes get their names of the normal form."""
    _settle(model)
    fold_bias(model)
    _fold_batch_norm(model)
    plain_products(model)
    RemoveUnusedNodesPass()(model)
    return model


def _settle(model: ir.Model) -> None:
    """Constants, names and order of the nodes, shapes as far as they follow from those of the inputs."""
    model.ir_version = min(max(model.ir_version, IR_VERSIONS[0]), IR_VERSIONS[-1])
    for step in (
        RemoveInitializersFromInputsPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        _drop_identities,
        RemoveUnusedNodesPass(),
        TopologicalSortPass(),
    ):
        step(model)
    _write_defaults(model)
    _name_nodes(model)
    while True:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        refuse_tensors(model)
        if not (
            _decided(model)
            or _expand_functions(model)
            or _resolve_cast_like(model)
            or fold_constants(model)
            or _resolve_ceil_mode(model)
        ):
            break
    refuse_undecided(model)


def _decided(model: ir.Model) -> bool:
    if not decide(model):
        return False
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _drop_identities(model)
    _name_nodes(model)
    return True


def _write_defaults(model: ir.Model) -> None:
    """Write out the attributes of `DEFAULTS` where a node leaves them to the standard."""
    for node in model.graph:
        for name, value in DEFAULTS.get(node.op_type, {}).items():
            if name not in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, value)


def _drop_identities(model: ir.Model) -> None:
    """Remove Identity, and Dropout, which is the identity in inference.

    Case 1: the result is a graph output, and the operand an input, a constant or another output: Identity stays.
    Case 2: the result is a graph output otherwise: the operand takes its name.
    Case 3: any other: consumers read the operand.

    Not by `IdentityEliminationPass` of onnx-ir, which renames an output that the Identity reads (case 1).
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type not in ops.IDENTITIES:
            continue
        if node.op_type == "Dropout":
            _refuse_training(node)
        source, result = first_input(node), node.outputs[0]
        is_output = result in graph.outputs
        if is_output and (source.producer() is None or source in graph.outputs):
            node.op_type = "Identity"
            node.attributes.clear()
            node.resize_inputs(1)
            node.resize_outputs(1)
            continue
        source.type = source.type or result.type
        ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if is_output:
            source.name = result.name


def _refuse_training(node: ir.Node) -> None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    switch = constant(training)
    if (training is not None and (switch is None or switch.any())) or any(
        o.uses() or o.is_graph_output() for o in node.outputs[1:]
    ):
        raise ModelError(f"The model is in training mode: node '{node.name}' (Dropout). Export it in evaluation mode.")


def _name_nodes(model: ir.Model) -> None:
    """Keep the file's names; the second node of a name and nameless nodes get one of their own.

    Not by `NameFixPass` of onnx-ir, which may give a later node's own name to an earlier one, and then renames the
    later: patterns of the user would miss it.
    """
    taken = {node.name for node in model.graph if node.name}
    seen: set[str] = set()
    for node in model.graph:
        name = base = node.name or node.outputs[0].name or node.op_type
        suffix = 0
        while name in seen or (name in taken and name != node.name):
            suffix += 1
            name = f"{base}_{suffix}"
        node.name = name
        seen.add(name)


def _expand_functions(model: ir.Model) -> bool:
    """Put the body by which ONNX defines an operator in its place; True where anything changed.

    The body depends on the ranks of the inputs: a node waits until these are known.
    """
    found = [
        n
        for n in model.graph
        if n.op_type in ops.EXPANDED
        and all(v is None or (v.shape is not None and v.dtype is not None) for v in n.inputs)
    ]
    for node in found:
        proto = onnx.ModelProto(ir_version=model.ir_version)
        for domain, version in model.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        proto.graph.name = "call"
        proto.graph.node.append(ir.serde.serialize_node(node))
        given = {str(v.name): v for v in node.inputs if v is not None}
        proto.graph.input.extend(ir.serde.serialize_value(v) for v in given.values())
        if None in node.inputs:  # the inliner asks for the type of an input that is left out as well
            proto.graph.value_info.append(onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, None))
        proto.graph.output.extend(onnx.ValueInfoProto(name=v.name) for v in node.outputs if v.name)
        body = onnx.inliner.inline_selected_functions(proto, [("", node.op_type)], inline_schema_functions=True)
        inner = ir.serde.deserialize_model(body).graph
        results = dict(zip((o for o in node.outputs if o.name), list(inner.outputs), strict=True))
        for value in inner.inputs:
            ir.convenience.replace_all_uses_with(value, given[str(value.name)])
        parts = list(inner)
        for part in parts:
            part.name = f"{node.name}/{(part.outputs[0].name or part.op_type).removesuffix('__1')}"
            for value in part.outputs:
                value.name = f"{node.name}/{value.name}" if value.name else value.name
        inner.outputs.clear()
        inner.remove(parts)
        model.graph.insert_before(node, parts)
        for old, new in results.items():
            name = old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name, new.name = f"{name}/expanded", name
        model.graph.remove(node, safe=True)
    if found:
        _drop_identities(model)
        _name_nodes(model)
    return bool(found)


def _resolve_cast_like(model: ir.Model) -> bool:
    """Write CastLike, which only reads the type of its second input, as Cast."""
    found = [n for n in model.graph if n.op_type == "CastLike" and n.inputs[1] is not None and n.inputs[1].dtype]
    for node in found:
        like = node.inputs[1]
        assert like is not None and like.dtype is not None
        node.op_type = "Cast"
        node.resize_inputs(1)
        node.attributes["to"] = ir.AttrInt64("to", int(like.dtype))
    return bool(found)


def _drop_empty_operands(model: ir.Model) -> None:
    """Leave operands without elements out of a Concat; one with a single operand left is the identity."""
    single = False
    for node in model.graph:
        if node.op_type != "Concat" or not all(v is not None and is_static(v) for v in (*node.inputs, *node.outputs)):
            continue
        if not np.prod(static_shape(node.outputs[0])):
            continue
        kept = [v for v in node.inputs if v is not None and np.prod(static_shape(v))]
        if len(kept) == len(node.inputs):
            continue
        node.resize_inputs(len(kept))
        for slot, value in enumerate(kept):
            node.replace_input_with(slot, value)
        if len(kept) == 1:
            node.op_type = "Identity"
            node.attributes.clear()
            single = True
    if single:
        _drop_identities(model)


def _resolve_ceil_mode(model: ir.Model) -> bool:
    """Make pools agree with the runtime where their last window would start in the padding.

    With `ceil_mode` such a window is dropped (ONNX says so for all versions since opset 22, and so does
    ONNX Runtime), but shape inference counts it. Where that undoes every rounding up, `ceil_mode` is cleared.
    """
    changed = False
    for node in model.graph:
        if node.op_type not in ops.POOLS or not attribute(node, "ceil_mode", 0):
            continue
        shape = first_input(node).shape
        if shape is None or not shape.is_static() or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            continue
        size = [int(d) for d in shape.numpy()[2:]]
        rank = len(size)
        kernel, strides, dilations, pads = (
            [int(x) for x in attribute(node, name, default)]  # type: ignore[attr-defined]
            for name, default in (
                ("kernel_shape", ()),
                ("strides", (1,) * rank),
                ("dilations", (1,) * rank),
                ("pads", (0,) * 2 * rank),
            )
        )
        if [len(kernel), len(strides), len(dilations), len(pads)] != [rank, rank, rank, 2 * rank] or 0 in strides:
            continue  # the runtime will say what is wrong
        room = [size[i] + pads[i] + pads[rank + i] - (kernel[i] - 1) * dilations[i] - 1 for i in range(rank)]
        down = [r // s for r, s in zip(room, strides, strict=True)]
        up = [-(-r // s) for r, s in zip(room, strides, strict=True)]
        dropped = [up[i] > down[i] and up[i] * strides[i] >= size[i] + pads[i] for i in range(rank)]
        if not any(dropped):
            continue
        if any(u > d and not gone for u, d, gone in zip(up, down, dropped, strict=True)):
            raise ModelError(
                f"Node '{node.name}' ({node.op_type}) rounds its size up on one axis and drops a window on another, "
                "which shape inference gets wrong. Export it with explicit padding and ceil_mode=0."
            )
        node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
        changed = True
    if changed:
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
    return changed


def _fill_missing_shapes(model: ir.Model) -> None:
    """Ask the runtime, on zeros, for shapes that static inference left open. Behind a selection they stay open."""
    selected = selected_values(model.graph)
    missing = [v for n in model.graph for v in n.outputs if v.name and (not is_static(v) or v.dtype is None)]
    if not missing:
        return
    try:
        packed = pack(model)
        proto = onnx.ModelProto.FromString(packed.data)
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=str(v.name)) for v in missing)
        feeds = {str(v.name): np.zeros(static_shape(v), _numpy_type(v)) for v in model.graph.inputs}
        arrays = session(proto).run(None, {**feeds, **packed.weights})
    except Exception as error:  # ORT raises a dozen unrelated types from its C++ border
        raise ModelError(f"ONNX Runtime cannot run the model: {error}") from error
    for value, array in zip(missing, arrays, strict=True):
        if value not in selected:
            value.shape = ir.Shape(array.shape)
        elif value.shape is None:
            value.shape = ir.Shape([None] * array.ndim)
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def _numpy_type(value: ir.Value) -> np.dtype:
    return value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)


def _fold_batch_norm(model: ir.Model) -> None:
    """Case 1: Conv whose only consumer is BatchNormalization in inference form; weights and bias absorb it."""
    fresh = namer(model)
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            continue
        source = first_input(node)
        conv = source.producer()
        if conv is None or conv.op_type != "Conv" or len(source.uses()) != 1 or source in model.graph.outputs:
            continue
        weight = constant(conv.inputs[1])
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.float32(0)
        terms = [constant(v) for v in node.inputs[1:5]]
        if weight is None or bias is None or any(t is None for t in terms):
            continue
        gamma, beta, mean, variance = (np.asarray(t, np.float64) for t in terms)
        if {t.shape for t in (gamma, beta, mean, variance)} != {weight.shape[:1]}:
            continue  # the runtime will say what is wrong
        with np.errstate(all="ignore"):  # a damaged checkpoint is told by its NaN
            factor = gamma / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
            new_weight = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
            new_bias = (beta + (bias - mean) * factor).astype(np.float32)
        values = [
            add_initializer(model.graph, fresh(f"{conv.name}/{kind}"), array)
            for kind, array in (("weight", new_weight), ("bias", new_bias))
        ]
        absorb(model, conv, node, [conv.inputs[0], *values])


def _refuse_numbers(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        array = constant(value)
        if array is None or array.dtype != np.float32 or np.isfinite(array).all():
            continue
        users = {c.node.op_type for c in consumers(value)}
        if np.isnan(array).any() or not users <= ops.TAKES_INFINITY:
            raise ModelError(
                f"Weight '{name}' holds NaN or infinite values. The checkpoint is damaged; export it again."
            )
    for node in model.graph:
        for result in node.outputs:
            narrow = result.dtype in WIDENED
            if (
                result.dtype is not None
                and narrow
                and not (node.op_type == "Cast" and result.is_graph_output() and not result.uses())
            ):
                raise ModelError(
                    f"Node '{node.name}' ({node.op_type}) computes in {result.dtype.name}; bitalloy analyses the "
                    "float32 model. Export in float32."
                )
