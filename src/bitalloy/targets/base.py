"""The description of a target, and the grouping of a graph's nodes into its units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.graph import Graph, attribute, constant, consumers, is_float, name_of, static_shape
from bitalloy.numerics import QuantParams, symmetric_params
from bitalloy.records import Edge, Head, Precision, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.regions import path_of, region_id
from bitalloy.runtime import Runtime


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
    """The node that reads integers, where that is not the first one; only of targets that do not round outputs."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device with its runtime, as rules."""

    name: str
    describe: str
    runtime: Runtime
    """What executes its models."""
    activation_signed: bool
    """Whether INT8 activations are int8 (True) or uint8 (False)."""
    pair_limit: int | None
    """Largest safe |a| + |b| of two neighbouring quantized weights, where the device's INT8 kernels add pairs of
    products in 16 bits and saturate; None where they do not."""
    match: Callable[[ir.Node, Graph], Core]
    """The core that starts at a node; called in topological order for nodes not yet taken."""
    follows: Callable[[ir.Node], bool]
    """Whether a node only moves data and so takes the precision of the unit that feeds it."""
    rounds_outputs: bool = True
    """Whether an INT8 kernel can only write INT8, so that an INT8 unit rounds what it makes. Where it may write float
    (False), a tensor is rounded only where it enters the core node of an INT8 unit that reads integers."""
    rounds_bias: bool = True
    """Whether the bias of an INT8 kernel is INT32 in steps of input * weight; float otherwise."""


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
        if root in joined:
            int8, reason = False, "joins outputs of different meaning, which one scale cannot serve"
        elif root in final and target.rounds_outputs:
            int8, reason = False, "makes an output: 256 levels would flatten small values, such as low scores, to zero"
        if exclude & {name_of(n) for n in (*core.nodes, *tails[name])}:
            int8, reason = False, "excluded by the user"
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
                allowed=(Precision.FP32, Precision.INT8) if int8 else (Precision.FP32,),
                macs=sum(macs(n) for n in core.nodes),
                reason=reason,
            )
        )
    edges = _edges(graph, owner, {u.id: u for u in units})
    if not target.rounds_outputs:
        edges = _entering(edges, {name: name_of(core.reader or core.nodes[0]) for name, core in cores.items()})
    return UnitGraph(target=target.name, model_sha256=graph.info.sha256, units=tuple(units), edges=tuple(edges))


def _edges(graph: Graph, owner: dict[str, str], units: dict[str, Unit]) -> list[UnitEdge]:
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
            found.append(
                UnitEdge(
                    tensor=tensor,
                    uses=tuple(sorted(edges, key=lambda e: (e.node, e.slot))),
                    producer=source,
                    consumer=consumer or None,
                    root=root,
                    rooted=tensor in roots,
                    elements=elements,
                    passed_on=tensor in roots and source is not None and units[source].kind == "Concat",
                )
            )
    return found


def _entering(edges: Sequence[UnitEdge], readers: Mapping[str, str]) -> list[UnitEdge]:
    """Of all edges, those on which a kernel may read integers: each is rounded where it ends, on its own scale."""
    found = []
    for edge in edges:
        uses = tuple(use for use in edge.uses if use.node == readers.get(edge.consumer or ""))
        if uses:
            found.append(
                msgspec.structs.replace(edge, uses=uses, root=edge.tensor, rooted=False, passed_on=False, entering=True)
            )
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
