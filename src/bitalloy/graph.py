"""Load an ONNX file, refuse what is unsafe or unsupported, and bring it to one normal form.

The normal form that every later stage relies on:

1. constants are initializers, weights are float32 (a stored float16 weight with its Cast is widened);
2. shapes are static, shape arithmetic is folded away;
3. no Identity, Dropout or Constant nodes; BatchNormalization is folded into the Conv before it;
4. every node has a unique name (the file's own where it has one), nodes are in topological order;
5. inputs and outputs keep their names, types and order.

The file itself is never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)

from bitalloy.errors import ModelError
from bitalloy.records import ModelInfo, TensorSpec

OPSETS = range(13, 22)
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
MAX_FOLDED_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Consumer:
    """One use of a tensor: input `slot` of `node`."""

    node: ir.Node
    slot: int


@dataclass(frozen=True)
class Graph:
    """A model in normal form. Read it; never change it: `clone` gives a copy to rewrite."""

    info: ModelInfo
    model: ir.Model
    source: Path
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Nodes in topological order."""
        return tuple(self.model.graph)

    @cached_property
    def node(self) -> Mapping[str, ir.Node]:
        """Node by name."""
        return {name_of(n): n for n in self.model.graph}

    @cached_property
    def value(self) -> Mapping[str, ir.Value]:
        """Tensor by name: inputs, initializers and node outputs."""
        found = {v.name: v for v in self.model.graph.inputs if v.name}
        found.update(self.model.graph.initializers)
        found.update({v.name: v for n in self.model.graph for v in n.outputs if v.name})
        return found

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph inputs, in order."""
        return tuple(str(v.name) for v in self.model.graph.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph outputs, in order."""
        return tuple(str(v.name) for v in self.model.graph.outputs)

    def clone(self) -> ir.Model:
        """A deep copy that may be rewritten; the tensors' memory is shared."""
        return self.model.clone()

    def to_bytes(self) -> bytes:
        """The normal form as a serialized `ModelProto`."""
        return ir.serde.serialize_model(self.model).SerializeToString()


def name_of(node: ir.Node) -> str:
    """Name of a node in normal form."""
    assert node.name, "normal form gives every node a name"
    return node.name


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, or None where the value is computed or absent."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """Shape of a tensor in normal form, as integers."""
    assert value.shape is not None and value.shape.is_static(), f"{value.name} has no static shape"
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def is_float(value: ir.Value) -> bool:
    """Whether a tensor carries float32 data."""
    return value.dtype == ir.DataType.FLOAT


def consumers(value: ir.Value) -> tuple[Consumer, ...]:
    """All uses of a tensor by nodes, in graph order of the uses' registration."""
    return tuple(Consumer(node, slot) for node, slot in value.uses())


def attribute(node: ir.Node, name: str, default: object) -> object:
    """Value of a node attribute as plain Python (int, float, str, tuple), or `default`."""
    attr = node.attributes.get(name)
    if attr is None:
        return default
    value = attr.value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def load(path: str | Path, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Graph:
    """Read and normalise an ONNX file.

    Args:
        path: an .onnx file; external data must lie in its folder or below.
        shapes: input name -> static shape, for inputs with symbolic dimensions. A leading symbolic
            dimension (the batch) is bound to 1 without being asked.

    Raises:
        ModelError: the file is missing, not ONNX, fails the checker, has unsafe or missing external
            data, unbound dimensions, control flow, unknown operators, NaN or infinite weights, or is
            quantized already.
    """
    source = Path(path)
    proto, digest, size = _read(source)
    _refuse(proto, source)
    _bind(proto, dict(shapes or {}))
    inputs = tuple(_spec(v) for v in proto.graph.input if v.name not in {i.name for i in proto.graph.initializer})
    model = _normalise(ir.serde.deserialize_model(proto))
    outputs = tuple(
        TensorSpec(name=str(v.name), dtype=_dtype(v).name, shape=static_shape(v)) for v in model.graph.outputs
    )
    info = ModelInfo(
        name=source.stem,
        sha256=digest,
        size_bytes=size,
        opset=int(model.opset_imports[""]),
        nodes=len(model.graph),
        parameters=sum(
            int(np.prod(v.shape.numpy()))
            for v in model.graph.initializers.values()
            if is_float(v) and v.shape is not None
        ),
        inputs=inputs,
        outputs=outputs,
    )
    return Graph(info, model, source, {p.key: p.value for p in proto.metadata_props})


def _read(source: Path) -> tuple[onnx.ModelProto, str, int]:
    if not source.is_file():
        raise ModelError(
            f"No model file at '{source}'. Give the path of an .onnx file or a name from `bitalloy models`."
        )
    data = source.read_bytes()
    digest, size = hashlib.sha256(data), len(data)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"'{source}' is not an ONNX file or is truncated ({error}). Export or download it again."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"'{source}' holds no ONNX graph: it is empty, truncated, or another kind of file.")
    for file in _external_files(proto, source):
        content = file.read_bytes()
        digest.update(content)
        size += len(content)
    try:
        onnx.load_external_data_for_model(proto, str(source.parent))
    except Exception as error:  # the onnx package raises ValueError, its own checker error, or OSError
        raise ModelError(f"The external data of '{source}' cannot be read: {error}") from error
    return proto, digest.hexdigest(), size


def _external_files(proto: onnx.ModelProto, source: Path) -> list[Path]:
    folder = source.parent.resolve()
    files: set[Path] = set()
    for tensor in _all_tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {e.key: e.value for e in tensor.external_data}.get("location", "")
        target = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise ModelError(
                f"Weight '{tensor.name}' of '{source}' points outside the model's folder ('{location}'). "
                "Refused: external data must lie beside the model."
            )
        if not target.is_file():
            raise ModelError(
                f"Weight '{tensor.name}' of '{source}' is in the external file '{location}', which is missing. "
                "Copy it beside the model."
            )
        files.add(target)
    return sorted(files)


def _all_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    tensors = list(graph.initializer)
    for node in graph.node:
        for attr in node.attribute:
            tensors += [attr.t] if attr.HasField("t") else []
            tensors += list(attr.tensors)
            for sub in [attr.g, *attr.graphs] if attr.HasField("g") else attr.graphs:
                tensors += _all_tensors(sub)
    return tensors


def _refuse(proto: onnx.ModelProto, source: Path) -> None:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset not in OPSETS:
        raise ModelError(
            f"'{source}' uses opset {opset}; supported are {OPSETS[0]} to {OPSETS[-1]}. Export it again with opset 17, "
            "or convert it with onnx.version_converter."
        )
    for node in proto.graph.node:
        label = f"node '{node.name or node.output[0]}' ({node.op_type})"
        if node.op_type in CONTROL_FLOW:
            raise ModelError(
                f"Control flow is not supported: {label}. Export with fixed shapes so that it is traced away."
            )
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"Operator domain '{node.domain}' is not supported: {label}. Export with standard ONNX operators."
            )
        if node.op_type in {
            "QuantizeLinear",
            "DequantizeLinear",
            "QLinearConv",
            "QLinearMatMul",
            "ConvInteger",
        }:
            raise ModelError(f"The model is quantized already: {label}. Give the float model.")
        if node.op_type in RANDOM:
            raise ModelError(f"The model draws random numbers: {label}. Export it in evaluation mode.")
    try:
        if proto.ByteSize() < 1 << 30:
            onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"'{source}' is not valid ONNX: {str(error).strip()}") from error
    names = {i.name for i in proto.graph.initializer}
    for value in [v for v in proto.graph.input if v.name not in names] + list(proto.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE):
            raise ModelError(
                f"'{value.name}' is {onnx.TensorProto.DataType.Name(kind)}; bitalloy analyses the float32 model. "
                "Export in float32."
            )


def _bind(proto: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> None:
    names = {i.name for i in proto.graph.initializer}
    values = [v for v in proto.graph.input if v.name not in names]
    unknown = sorted(set(shapes) - {v.name for v in values})
    if unknown:
        raise ModelError(f"No input called {unknown}; the model's inputs are {[v.name for v in values]}.")
    symbolic: dict[str, int] = {}
    for value in values:
        dims = value.type.tensor_type.shape.dim
        given = shapes.get(value.name)
        if given is not None and len(given) != len(dims):
            raise ModelError(f"Input '{value.name}' has {len(dims)} dimensions, but the shape {list(given)} was given.")
        for axis, dim in enumerate(dims):
            fixed = dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
            wanted = given[axis] if given is not None else None
            if fixed is not None and wanted not in (None, fixed):
                raise ModelError(f"Input '{value.name}' is fixed to {fixed} on axis {axis}, but {wanted} was given.")
            size = fixed or wanted or symbolic.get(dim.dim_param) or (1 if axis == 0 else None)
            if size is None:
                text = [d.dim_value or d.dim_param or "?" for d in dims]
                raise ModelError(
                    f"Input '{value.name}' has symbolic shape {text} and no size was given. "
                    f"Add --shape {value.name}=1x3x640x640 (with your sizes)."
                )
            if dim.dim_param:
                symbolic[dim.dim_param] = size
            dim.dim_value = size
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=onnx.TensorProto.DataType.Name(kind.elem_type),
        shape=tuple(d.dim_value for d in kind.shape.dim),
    )


def _normalise(model: ir.Model) -> ir.Model:
    for step in (
        RemoveInitializersFromInputsPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        _drop_dropout,
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        TopologicalSortPass(),
    ):
        step(model)
    _name_nodes(model)
    for _ in range(4):
        model = _infer(model)
        if not _fold_constants(model):
            break
    _fill_missing_shapes(model)
    if _fold_batch_norm(model):
        RemoveUnusedNodesPass()(model)
    for name, value in model.graph.initializers.items():
        array = constant(value)
        if array is not None and array.dtype == np.float32 and not np.isfinite(array).all():
            raise ModelError(
                f"Weight '{name}' holds NaN or infinite values. The checkpoint is damaged; export it again."
            )
    return model


def _drop_dropout(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "Dropout":
            ir.convenience.replace_all_uses_with(node.outputs[0], _required(node.inputs[0]), replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


def _name_nodes(model: ir.Model) -> None:
    taken: set[str] = set()
    for node in model.graph:
        base = node.name or node.outputs[0].name or node.op_type
        name, suffix = base, 1
        while name in taken:
            name, suffix = f"{base}_{suffix}", suffix + 1
        node.name = name
        taken.add(name)


def _infer(model: ir.Model) -> ir.Model:
    try:
        proto = ir.serde.serialize_model(model)
        if proto.ByteSize() < 1 << 30:
            proto = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
            return ir.serde.deserialize_model(proto)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"Shape inference fails: {error}") from error
    return model


def _fold_constants(model: ir.Model) -> bool:
    """Evaluate, in ONNX Runtime, every node whose inputs are all known; True where anything changed."""
    graph = model.graph
    known: set[ir.Value] = set(graph.initializers.values())
    folded: list[ir.Node] = []
    for node in graph:
        shape_known = node.op_type == "Shape" and (s := _required(node.inputs[0]).shape) is not None and s.is_static()
        inputs_known = all(v is None or v in known for v in node.inputs)
        if (shape_known or inputs_known) and node.op_type not in RANDOM and _small(node):
            folded.append(node)
            known.update(node.outputs)
    if not folded:
        return False
    inside = set(folded)
    outputs = set(graph.outputs)
    wanted = [v for n in folded for v in n.outputs if v in outputs or any(c.node not in inside for c in consumers(v))]
    arrays = _evaluate(model, folded, [str(v.name) for v in wanted])
    for value, array in zip(wanted, arrays, strict=True):
        new = ir.Value(name=f"{value.name}", shape=ir.Shape(array.shape), type=ir.TensorType(_dtype(value)))
        new.const_value = ir.tensor(array, name=new.name)
        if value in outputs:
            raise ModelError(f"Output '{value.name}' does not depend on any input.")
        ir.convenience.replace_all_uses_with(value, new)
        value.name = f"{value.name}/folded"
        graph.register_initializer(new)
    for node in reversed(folded):
        graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    return True


def _small(node: ir.Node) -> bool:
    sizes = [int(np.prod(v.shape.numpy())) for v in node.outputs if v.shape is not None and v.shape.is_static()]
    return node.op_type == "Cast" or all(s <= MAX_FOLDED_ELEMENTS for s in sizes)


def _evaluate(model: ir.Model, nodes: list[ir.Node], outputs: list[str]) -> list[np.ndarray]:
    """Run a closed set of nodes; Shape nodes read a zero-size stand-in only where their input is not constant."""
    proto = onnx.ModelProto(ir_version=min(model.ir_version, 10))
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.graph.name = "constants"
    initializers: dict[str, ir.Value] = {}
    for node in nodes:
        if node.op_type == "Shape":
            dims = np.array(static_shape(_required(node.inputs[0])), dtype=np.int64)
            start, end = attribute(node, "start", 0), attribute(node, "end", None)
            array = dims[start:end]  # type: ignore[misc]
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, str(node.outputs[0].name)))
            continue
        proto.graph.node.append(ir.serde.serialize_node(node))
        initializers.update({str(v.name): v for v in node.inputs if v is not None and v.producer() is None})
    for value in initializers.values():
        proto.graph.initializer.append(ir.serde.serialize_tensor(value.const_value))  # type: ignore[arg-type]
    made = {o for n in proto.graph.node for o in n.output}
    direct = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    asked = [o for o in outputs if o in made]
    for name in asked:
        proto.graph.output.add(name=name)
    results: dict[str, np.ndarray] = {}
    if asked:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
            results = dict(zip(asked, session.run(asked, {}), strict=True))
        except Exception as error:  # ORT raises a dozen unrelated types from its C++ border
            raise ModelError(f"The constant part of the model cannot be evaluated: {error}") from error
    return [results[o] if o in results else direct[o] for o in outputs]


def _fill_missing_shapes(model: ir.Model) -> None:
    """Ask the runtime, on zeros, for shapes that static inference left open."""
    missing = [
        v
        for n in model.graph
        for v in n.outputs
        if v.name and (v.shape is None or not v.shape.is_static() or v.dtype is None)
    ]
    if not missing:
        return
    proto = ir.serde.serialize_model(model)
    del proto.graph.output[:]
    for value in missing:
        proto.graph.output.add(name=str(value.name))
    feeds = {str(v.name): np.zeros(static_shape(v), _dtype(v).numpy()) for v in model.graph.inputs}
    try:
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        arrays = session.run(None, feeds)
    except Exception as error:  # ORT raises a dozen unrelated types from its C++ border
        raise ModelError(f"ONNX Runtime cannot run the model: {error}") from error
    for value, array in zip(missing, arrays, strict=True):
        value.shape = ir.Shape(array.shape)
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def _fold_batch_norm(model: ir.Model) -> bool:
    """Case 1: Conv whose only consumer is BatchNormalization in inference form; weights and bias absorb it."""
    changed = False
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or len(node.outputs) > 1 and any(o.uses() for o in node.outputs[1:]):
            continue
        source = _required(node.inputs[0])
        conv = source.producer()
        if conv is None or conv.op_type != "Conv" or len(source.uses()) != 1 or source in model.graph.outputs:
            continue
        weight = constant(conv.inputs[1])
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.float32(0)
        terms = [constant(v) for v in node.inputs[1:5]]
        if weight is None or bias is None or any(t is None for t in terms):
            continue
        gamma, beta, mean, variance = (np.asarray(t, np.float64) for t in terms)
        factor = gamma / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
        new_weight = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        new_bias = (beta + (bias - mean) * factor).astype(np.float32)
        values = [
            _initializer(model, f"{conv.name}/{kind}", a) for kind, a in (("weight", new_weight), ("bias", new_bias))
        ]
        fused = ir.Node(
            "",
            "Conv",
            [conv.inputs[0], *values],
            attributes=list(conv.attributes.values()),
            name=conv.name,
            metadata_props=dict(conv.metadata_props),
        )
        fused.outputs[0].shape, fused.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [fused], [node.outputs[0]], [fused.outputs[0]]
        )
        fused.outputs[0].name = name
        model.graph.remove(conv, safe=True)
        changed = True
    return changed


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    while name in model.graph.initializers:
        name += "'"
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(array, name=name)
    model.graph.register_initializer(value)
    return value


def _required(value: ir.Value | None) -> ir.Value:
    assert value is not None, "the checker has made sure that this input exists"
    return value


def _dtype(value: ir.Value) -> ir.DataType:
    return value.dtype if value.dtype is not None else ir.DataType.FLOAT


Pass = Callable[[ir.Model], object]
