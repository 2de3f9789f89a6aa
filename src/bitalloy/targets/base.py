"""The description of a target, and the grouping of a graph's nodes into its units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.core.records import Head, Precision
from bitalloy.core.units import Edge, Placement, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.formats.affine import QuantParams, activation_params, symmetric_params
from bitalloy.model.load import Graph, attribute, constant, consumers, is_float, name_of, static_shape
from bitalloy.model.regions import path_of, region_id
from bitalloy.runtime.base import Runtime


@dataclass(frozen=True, slots=True)
class Core:
    """A match of a target's pattern: nodes that run as one kernel, or as kernels that only make sense together."""

    kind: str
    nodes: tuple[ir.Node, ...]
    weights: tuple[WeightSite, ...] = ()
    inner: tuple[Edge, ...] = ()
    int8: bool = True
    reason: str = ""
    reader: ir.Node | None = None
    """The node that reads integers, where that is not the first one; of targets with a `single_reader`."""
    joined: tuple[Edge, ...] = ()
    """Inputs that the kernel takes unrounded also in INT8, because it makes them itself (`Placement.NONE`)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak rates of a device, from its data sheet."""

    name: str
    operations_per_second: Mapping[Precision, float]
    """Dense; a multiply-accumulate is two."""
    bytes_per_second: float
    start_us: float
    """Assumed time between two kernels in microseconds."""


A10 = Device(
    name="NVIDIA A10 (estimated from peak rates)",
    operations_per_second={Precision.FP32: 62.5e12, Precision.FP16: 125e12, Precision.INT8: 250e12},
    bytes_per_second=600e9,
    start_us=2.0,
)
"""NVIDIA A10 data sheet, tensor cores without sparsity; FP32 as TF32, which is the default of both runtimes."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device with its runtime, as rules."""

    name: str
    describe: str
    runtime: Runtime
    """What executes its models here; of a `device` that is not here, what verifies them."""
    activation_signed: bool
    """Whether INT8 activations are int8 (True) or uint8 (False)."""
    pair_limit: int | None
    """Largest safe |a| + |b| of two neighbouring quantized weights, where the device's INT8 kernels add pairs of
    products in 16 bits and saturate; None where they do not."""
    match: Callable[[ir.Node, Graph], Core]
    """The core that starts at a node; called in topological order for nodes not yet taken."""
    follows: Callable[[ir.Node], bool]
    """Whether a node only moves data and so takes the precision of the unit that feeds it."""
    activation_symmetric: bool = False
    """Whether the zero point of INT8 activations is 0."""
    placement: Placement = Placement.ENDS
    """Where INT8 units round."""
    single_reader: bool = False
    """Whether one node of a unit alone reads integers: `Core.reader`, or else its first. Nothing is rounded on the way
    to the others, and every tensor is rounded on its own scale."""
    int32_bias: bool = True
    """Whether biases of INT8 units are stored as int32 in steps of input times weight, or stay float."""
    slow_softmax: bool = True
    """Whether the runtime's Softmax is slow on other axes than the last, so that a Transpose on both sides pays."""
    half: frozenset[str] = frozenset()
    """Operators that run in FP16; empty where the target has no FP16."""

    device: Device | None = None
    """For which cost is estimated, where the target cannot run on this machine; None where it is measured."""
    native: Runtime | None = None
    """What executes its models on such a device, to be audited there; None where `runtime` does."""
    missing: Callable[[], str] = str
    """Why such a device cannot be used here, with the install line; empty where it can."""

    def activation(self, low: float, high: float) -> QuantParams:
        """Parameters of an INT8 activation with values in [low, high]."""
        return activation_params(low, high, signed=self.activation_signed, symmetric=self.activation_symmetric)


def split(graph: Graph, target: Target, heads: Sequence[Head], *, exclude: frozenset[str] = frozenset()) -> UnitGraph:
    """Group all nodes of a graph into units of a target and list the edges between them.

    Args:
        graph: the model in normal form.
        target: whose rules decide.
        heads: parts of the outputs; a Concat that joins heads stays in float, because one scale would have to
            serve parts of different meaning, and so do units that make a head's last tensor.
        exclude: node names that must stay in float.
    """
    order = {name_of(n): i for i, n in enumerate(graph.nodes)}
    joined = {h.output for h in heads if h.axis is not None}
    final = {h.tensor for h in heads}
    owner: dict[str, str] = {}
    cores: dict[str, Core] = {}
    tails: dict[str, list[ir.Node]] = {}
    root_unit: dict[str, str] = {}
    for node in graph.nodes:
        name = name_of(node)
        if name in owner:
            continue
        source = node.inputs[0].name if node.inputs and node.inputs[0] is not None else None
        if target.follows(node) and source in root_unit:
            unit = root_unit[str(source)]
            tails[unit].append(node)
            owner[name] = unit
            root_unit.update({str(v.name): unit for v in node.outputs})
            continue
        core = target.match(node, graph)
        cores[name], tails[name] = core, []
        owner.update({name_of(n): name for n in core.nodes})
        root_unit[str(core.nodes[-1].outputs[0].name)] = name
    units = []
    for name, core in cores.items():
        root = str(core.nodes[-1].outputs[0].name)
        reason, int8 = core.reason, core.int8
        members = (*core.nodes, *tails[name])
        floats = all(len(n.outputs) == 1 and is_float(n.outputs[0]) for n in core.nodes)
        half = floats and all(n.op_type in target.half for n in members)
        if target.placement is not Placement.ENDS or not int8:
            pass  # what a unit makes is not rounded by it
        elif root in joined:
            int8, reason = False, "joins outputs of different meaning, which one scale cannot serve"
        elif root in final:
            int8, reason = False, "makes an output: 256 levels would flatten small values, such as low scores, to zero"
        if exclude & {name_of(n) for n in members}:
            int8, half, reason = False, False, "excluded by the user"
        allowed = (Precision.FP32, *(Precision.FP16,) * half, *(Precision.INT8,) * int8)
        units.append(
            Unit(
                id=name,
                kind=core.kind,
                region=region_id(path_of(core.nodes[0])),
                core=tuple(name_of(n) for n in core.nodes),
                tail=tuple(name_of(n) for n in sorted(tails[name], key=lambda n: order[name_of(n)])),
                root=root,
                inner=core.inner if int8 else (),
                weights=core.weights if int8 else (),
                allowed=allowed,
                macs=sum(macs(n) for n in core.nodes),
                reason=reason,
            )
        )
    unrounded = frozenset(e for core in cores.values() for e in core.joined)
    edges = _edges(graph, owner, {u.id: u for u in units}, target.placement, unrounded)
    if target.single_reader:
        edges = _entering(edges, {name: name_of(core.reader or core.nodes[0]) for name, core in cores.items()})
    return UnitGraph(target=target.name, model_sha256=graph.info.sha256, units=tuple(units), edges=tuple(edges))


def _edges(
    graph: Graph, owner: dict[str, str], units: dict[str, Unit], placement: Placement, unrounded: frozenset[Edge]
) -> list[UnitEdge]:
    """Float edges that leave a unit's core or enter another unit; edges inside a core are left out."""
    roots = {u.root: u.id for u in units.values()}
    outputs = {name: i for i, name in enumerate(graph.output_names)}
    found = []
    for tensor, value in graph.value.items():
        if value.is_initializer() or not is_float(value):
            continue
        producer = value.producer()
        source = owner[name_of(producer)] if producer is not None else None
        inside = source is not None and tensor not in roots and name_of(producer) in units[source].core  # type: ignore[arg-type]
        root = units[source].root if source is not None and not inside else tensor
        elements = int(np.prod(static_shape(value)))
        entering: dict[str, list[Edge]] = {}
        for use in consumers(value):
            edge = Edge(tensor=tensor, node=name_of(use.node), slot=use.slot)
            entering.setdefault(owner[edge.node], []).append(edge)
        if tensor in outputs:
            entering[""] = [Edge(tensor=tensor, node="", slot=outputs[tensor])]
        for consumer, edges in sorted(entering.items()):
            if inside and consumer == source:
                continue
            own = consumer == source and placement is Placement.ENTRY  # a unit's tail reads what it makes
            found.append(
                UnitEdge(
                    tensor=tensor,
                    uses=tuple(sorted(edges, key=lambda e: (e.node, e.slot))),
                    producer=source,
                    consumer=consumer or None,
                    root=root,
                    rooted=tensor in roots,
                    elements=elements,
                    passed_on=placement is Placement.ENDS
                    and tensor in roots
                    and source is not None
                    and units[source].kind == "Concat",
                    placement=Placement.NONE if own or unrounded.issuperset(edges) else placement,
                )
            )
    return found


def _entering(edges: Sequence[UnitEdge], readers: Mapping[str, str]) -> list[UnitEdge]:
    """Of all edges, those on which a kernel may read integers: each is rounded where it ends, on its own scale."""
    found = []
    for edge in edges:
        uses = tuple(use for use in edge.uses if use.node == readers.get(edge.consumer or ""))
        if uses:
            found.append(msgspec.structs.replace(edge, uses=uses, root=edge.tensor, rooted=False, passed_on=False))
    return found


def weight_params(target: Target, node: ir.Node, site: WeightSite) -> QuantParams:
    """Symmetric INT8 parameters of a weight on a target, per channel of `site.axis`.

    With a `pair_limit` the scale of a channel is raised until no two neighbours along the reduction, in the
    orders (channel, kernel) and (kernel, channel), sum to more than the limit: 128 keeps
    255 * (|a| + |b|) below 2^15. Depthwise kernels do not add pairs.
    """
    axis, weight = site.axis, constant(node.inputs[site.slot])
    assert axis is not None, "weights are quantized per channel"
    assert weight is not None, "weight sites are constants"
    depthwise = node.op_type == "Conv" and weight.shape[1] == 1
    channels = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1)
    high = channels.max(axis=1)
    if target.pair_limit is not None and not depthwise:
        orders = [channels]
        if weight.ndim > 2:
            orders.append(np.moveaxis(np.abs(weight), 1, -1).reshape(weight.shape[0], -1))
        for rows in orders:
            pairs = (rows[:, 1:] + rows[:, :-1]).max(axis=1, initial=0.0)
            # rounding may lift both members by half a step
            high = np.maximum(high, pairs * np.float32(127 / (target.pair_limit - 1)))
    return symmetric_params(high, axis=axis)


def macs(node: ir.Node) -> int:
    """Multiply-accumulates of a convolution or matrix product; 0 for other operators."""
    out = node.outputs[0]
    if node.op_type == "Conv":
        weight = static_shape(node.inputs[1])  # type: ignore[arg-type]
        return int(np.prod(static_shape(out)) * np.prod(weight[1:]))
    if node.op_type == "ConvTranspose":
        weight = static_shape(node.inputs[1])  # type: ignore[arg-type]
        return int(np.prod(static_shape(node.inputs[0])) * np.prod(weight[1:]))  # type: ignore[arg-type]
    if node.op_type in ("MatMul", "Gemm"):
        inner = static_shape(node.inputs[0])  # type: ignore[arg-type]
        depth = inner[-2] if node.op_type == "Gemm" and attribute(node, "transA", 0) else inner[-1]
        return int(np.prod(static_shape(out)) * depth)
    return 0
