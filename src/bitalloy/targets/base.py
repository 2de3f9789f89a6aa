"""The description of a target, and the grouping of a graph's nodes into its units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.core.records import Head
from bitalloy.core.schemes import BASELINE, Scheme
from bitalloy.core.units import Edge, Placement, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, consumers, elements, is_float, is_static, name_of, static_shape
from bitalloy.model.regions import path_of, region_id
from bitalloy.model.selected import SELECTED
from bitalloy.runtime.base import Runtime
from bitalloy.targets.devices import DEVICES, Device, lacking


@dataclass(frozen=True, slots=True)
class Core:
    """A match of a target's pattern: nodes that run as one kernel, or as kernels that only make sense together."""

    kind: str
    nodes: tuple[ir.Node, ...]
    weights: tuple[WeightSite, ...] = ()
    inner: tuple[Edge, ...] = ()
    unfit: str = ""
    """Why the target has no kernel for the pattern that reads rounded tensors; empty where it has one."""
    kept: str = ""
    """Why it stays in the baseline, whatever a scheme rounds; empty where it need not."""
    reader: ir.Node | None = None
    """The node that reads rounded tensors, where that is not the first one; of targets with a `single_reader`."""
    joined: tuple[Edge, ...] = ()
    """Inputs that the kernel takes unrounded in any case, because it makes them itself (`Placement.NONE`)."""

    @property
    def root(self) -> str:
        """Name of the tensor that the pattern makes."""
        return str(self.nodes[-1].outputs[0].name)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A scheme that a target has, and which of its units may run in it: one row of the target."""

    scheme: Scheme
    refuse: Callable[[Core, Sequence[ir.Node]], str]
    """Why a pattern, with all nodes of its unit, may not run in it; empty where it may."""
    usual: bool = True
    """Whether plans may use it without being asked to; otherwise `--schemes` must name it."""
    rare: bool = False
    """Whether `--schemes` must name it for language models as well, which may use all others without being asked to."""


def whole_kernel(core: Core, nodes: Sequence[ir.Node]) -> str:
    """Refuse a pattern for which the target has no kernel as a whole."""
    return core.unfit


def all_operators(operators: frozenset[str], name: str) -> Callable[[Core, Sequence[ir.Node]], str]:
    """Make the rule of schemes that need all operators of a unit to compute in a format.

    Args:
        operators: the operators that can.
        name: the format, as people write it.
    """

    def refuse(core: Core, nodes: Sequence[ir.Node]) -> str:
        if not all(len(n.outputs) == 1 and is_float(n.outputs[0]) for n in core.nodes):
            return f"{core.kind} does not make one floating-point tensor"
        missing = sorted({n.op_type for n in nodes if n.op_type not in operators})
        return f"{', '.join(missing)} does not run in {name}" if missing else ""

    return refuse


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device with its runtime, described by rules for what runs on it and how."""

    name: str
    describe: str
    runtime: Runtime
    """What executes its models here; of a `device` that is not here, what verifies them."""
    offers: tuple[Offer, ...]
    """Its schemes beside the baseline, on whatever device, from the highest precision to the lowest."""
    match: Callable[[ir.Node, Graph], Core]
    """The core that starts at a node; called in topological order for nodes not yet taken."""
    follows: Callable[[ir.Node], bool]
    """Whether a node only moves data and so takes the scheme of the unit that feeds it."""
    placement: Placement = Placement.ENDS
    """Where its units round tensors."""
    single_reader: bool = False
    """Whether one node of a unit alone reads rounded tensors: `Core.reader`, or else its first. Nothing is rounded on
    the way to the others, and every tensor is rounded on its own scale."""
    writes_floats: frozenset[str] = frozenset()
    """Operators whose kernel for rounded numbers writes floats where nothing rounds its result: a unit of such a node
    alone that makes an output does not round that."""
    slow_softmax: bool = True
    """Whether the runtime's Softmax is slow on other axes than the last, so that a Transpose on both sides pays."""
    rounds_floats: bool = False
    """Whether the runtime rounds, or computes in integers, what a plan keeps in float: see `rewrite.floats`."""
    device: Device | None = None
    """The device for which cost is estimated, where it is not on this machine; None where cost is measured. What it has
    no rate for is not offered."""
    native: Runtime | None = None
    """What executes its models on such a device, to be audited there; None where `runtime` does."""
    missing: Callable[[], str] = str
    """Why such a device cannot be used here, with the install line; empty where it can."""
    rounds_apart: bool = False
    """Whether a kernel of its own rounds behind every convolution or product of rounded numbers, which itself writes
    FP16 where the graph says so: see `rewrite.sums`."""
    compiled: bool = False
    """Whether TensorRT for RTX compiles its models, which tells what kernels read without the device."""
    capabilities: frozenset[int] = frozenset()
    """Compute capabilities of the devices that it runs on; empty for all."""
    least_capability: Mapping[str, int] = field(default_factory=dict)
    """Scheme -> least compute capability for which its runtime has kernels, where rates do not tell it."""
    usual: str = BASELINE
    """Scheme in which people run whole models on it, because that takes a switch and loses nothing worth telling."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Scheme of other targets that this one does not offer, and that people may ask for -> why."""
    refuses_branches: str = ""
    """Why the runtime does not take files with branches that are decided when they run; empty where it does."""

    @property
    def runnable(self) -> tuple[Offer, ...]:
        """Its offers that its device can run."""
        return tuple(o for o in self.offers if self.device is None or self._runs(o.scheme, self.device))

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The baseline and those that it offers on its device."""
        return (Scheme(name=BASELINE), *(offer.scheme for offer in self.runnable))

    @property
    def lacking_schemes(self) -> dict[str, str]:
        """Scheme that it does not have, or not on its device -> why."""
        if self.device is None:
            return dict(self.lacks)
        found = dict(self.lacks)
        for scheme in (offer.scheme for offer in self.offers if offer not in self.runnable):
            able = [device for device in self.devices if self._runs(scheme, device)]
            found[scheme.name] = lacking(self.device, scheme.name, able)
        return found

    def _runs(self, scheme: Scheme, device: Device) -> bool:
        """Tell whether a device has kernels for a scheme; rows of a stored table are only looked up."""
        if scheme.activation is None:
            return True
        known = scheme.name in device.operations_per_second
        return known and device.capability >= self.least_capability.get(scheme.name, 0)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Devices for which it can be estimated; none where it is measured where it runs."""
        if self.device is None:
            return ()
        return tuple(d for d in DEVICES.values() if not self.capabilities or d.capability in self.capabilities)

    def offered(self, schemes: Collection[str] = ()) -> tuple[Offer, ...]:
        """Return the offers of the given names, or the usual ones without names, in the order of the target."""
        return tuple(o for o in self.runnable if (o.scheme.name in schemes if schemes else o.usual))

    @property
    def casts(self) -> bool:
        """Whether units may compute in another format, which not every machine has kernels for."""
        return any(scheme.cast for scheme in self.schemes)


UNASKED = "plans do not use it unless --schemes names it"
NO_UNIT = "no unit of the model can run in it"


def split(
    graph: Graph,
    target: Target,
    heads: Sequence[Head],
    *,
    exclude: frozenset[str] = frozenset(),
    schemes: Collection[str] = (),
) -> UnitGraph:
    """Group all nodes of a graph into units of a target and list the edges between them.

    Args:
        graph: the model in normal form.
        target: the target whose rules decide.
        heads: parts of the outputs; a Concat that joins heads is not rounded, because one scale would have to
            serve parts of different meaning, and neither are units that make a head's last tensor.
        exclude: node names that stay in the baseline.
        schemes: names of those that plans may use beside the baseline; without them, the target's usual ones.
    """
    found = _group(graph, target)
    joined = {h.output for h in heads if h.axis is not None}
    final = {h.output if h.given and h.axis is None else h.tensor for h in heads}
    offers = target.offered(schemes) if schemes else _serving(target, found)
    units = []
    floating = frozenset(name for name in found.cores if _writes_floats(target, found, name))
    for name, core in found.cores.items():
        unfit_output = "" if name in floating else _unfit_output(core.root, joined, final)
        refused = _refused(target, offers, core, found.members(name), unfit_output)
        units.append(_unit(name, found, offers, refused, exclude))
    unrounded = frozenset(e for core in found.cores.values() for e in core.joined)
    edges = _edges(graph, found.owner, {u.id: u for u in units}, target.placement, unrounded)
    edges = [msgspec.structs.replace(e, rooted=False) if e.producer in floating else e for e in edges]
    if target.single_reader:
        edges = _entering(edges, {name: name_of(c.reader or c.nodes[0]) for name, c in found.cores.items()})
    return UnitGraph(
        target=target.name,
        model_sha256=graph.info.sha256,
        units=tuple(units),
        edges=tuple(edges),
        schemes=(Scheme(name=BASELINE), *(offer.scheme for offer in offers)),
        lacks=_lacks(target, offers, asked=bool(schemes)),
        usual=target.usual if any(offer.scheme.name == target.usual for offer in offers) else BASELINE,
    )


@dataclass(frozen=True)
class _Grouped:
    """All nodes of a graph, each in the unit that owns it."""

    cores: Mapping[str, Core]
    """Unit -> the pattern that it was made from, in topological order."""
    tails: Mapping[str, Sequence[ir.Node]]
    """Unit -> the nodes behind its core that only move data, in the order of the graph."""
    owner: Mapping[str, str]
    """Node -> unit."""

    def members(self, unit: str) -> tuple[ir.Node, ...]:
        """Return all nodes of a unit."""
        return (*self.cores[unit].nodes, *self.tails[unit])

    def readers(self, unit: str) -> set[str]:
        """Return the other units that read what a unit makes."""
        made = [value for node in self.members(unit) for value in node.outputs]
        return {self.owner[name_of(use.node)] for value in made for use in consumers(value)} - {unit}


def _group(graph: Graph, target: Target) -> _Grouped:
    """Match the patterns of a target in topological order; what only moves data joins the unit that feeds it."""
    owner: dict[str, str] = {}
    cores: dict[str, Core] = {}
    tails: dict[str, list[ir.Node]] = {}
    root_unit: dict[str, str] = {}
    for node in graph.nodes:
        name = name_of(node)
        if name in owner:
            continue
        if graph.selected.intersection(v.name for v in node.outputs):
            owner[name], cores[name], tails[name] = name, Core(node.op_type, (node,), kept=SELECTED), []
            continue
        source = node.inputs[0].name if node.inputs and node.inputs[0] is not None else None
        if target.follows(node) and source in root_unit:
            unit = root_unit[str(source)]
            tails[unit].append(node)
            owner[name] = unit
            root_unit.update({str(v.name): unit for v in node.outputs})
            continue
        core = target.match(node, graph)
        if graph.selected.intersection(v.name for part in core.nodes for v in part.outputs):
            core = Core(node.op_type, (node,), kept=SELECTED)
        cores[name], tails[name] = core, []
        owner.update({name_of(n): name for n in core.nodes})
        root_unit[core.root] = name
    return _Grouped(cores, tails, owner)


def _unit(
    name: str, found: _Grouped, offers: Sequence[Offer], refused: dict[str, str], exclude: frozenset[str]
) -> Unit:
    """Make the unit of a pattern, which may run in what was offered and not refused."""
    core = found.cores[name]
    excluded = bool(exclude & {name_of(n) for n in found.members(name)})
    allowed = (BASELINE, *(o.scheme.name for o in offers if o.scheme.name not in refused))
    sited = any(o.scheme.sited and o.scheme.name in allowed for o in offers) and not excluded
    return Unit(
        id=name,
        kind=core.kind,
        region=region_id(path_of(core.nodes[0])),
        core=tuple(name_of(n) for n in core.nodes),
        tail=tuple(name_of(n) for n in found.tails[name]),
        root=core.root,
        inner=core.inner if sited else (),
        weights=core.weights if sited else (),
        allowed=(BASELINE,) if excluded else allowed,
        macs=sum(macs(n) for n in core.nodes),
        refused=refused,
        reason="excluded by the user" if excluded else "",
    )


def _serving(target: Target, found: _Grouped) -> tuple[Offer, ...]:
    """The usual offers: static ones, and of those with ranges of their own the ones that some unit can run in."""
    members = {name: found.members(name) for name in found.cores}

    def serves(offer: Offer) -> bool:
        return any(not core.kept and not offer.refuse(core, members[name]) for name, core in found.cores.items())

    return tuple(offer for offer in target.offered() if not offer.scheme.dynamic or serves(offer))


def _writes_floats(target: Target, found: _Grouped, name: str) -> bool:
    """Tell whether a unit makes outputs alone, by a kernel that writes floats."""
    core = found.cores[name]
    if core.kept or core.unfit or len(core.nodes) > 1 or core.kind not in target.writes_floats:
        return False
    return not found.readers(name)


def _unfit_output(root: str, joined: set[str], final: set[str]) -> str:
    """Say why what a unit makes may not be rounded where it is made; empty where it may."""
    if root in joined:
        return "joins outputs of different meaning, which one scale cannot serve"
    if root in final:
        return "makes an output: 256 levels would flatten small values, such as low scores, to zero"
    return ""


def _lacks(target: Target, offers: Sequence[Offer], *, asked: bool) -> dict[str, str]:
    """Map each scheme that plans may not use, though people may ask for it, to the reason."""
    missing = (o for o in target.runnable if o not in offers)
    unasked = {o.scheme.name: NO_UNIT if o.usual and not asked else UNASKED for o in missing}
    return {**unasked, **target.lacking_schemes}


def _refused(
    target: Target, offers: Sequence[Offer], core: Core, members: Sequence[ir.Node], unfit_output: str
) -> dict[str, str]:
    """Map each scheme in which the unit of a core may not run to the reason."""
    found: dict[str, str] = {}
    for offer in offers:
        reason = core.kept or offer.refuse(core, members)
        if not reason and offer.scheme.hands_on and target.placement is Placement.ENDS:
            reason = unfit_output
        if reason:
            found[offer.scheme.name] = reason
    return found


def _edges(
    graph: Graph, owner: Mapping[str, str], units: dict[str, Unit], placement: Placement, unrounded: frozenset[Edge]
) -> list[UnitEdge]:
    """List the float edges that leave a unit's core or enter another unit; edges inside a core are left out."""
    roots = {u.root: u.id for u in units.values()}
    outputs = {name: i for i, name in enumerate(graph.output_names)}
    found = []
    for tensor, value in graph.value.items():
        if value.is_initializer() or not is_float(value) or tensor in graph.selected:
            continue
        producer = value.producer()
        source = owner[name_of(producer)] if producer is not None else None
        inside = source is not None and tensor not in roots and name_of(producer) in units[source].core  # type: ignore[arg-type]
        root = units[source].root if source is not None and not inside else tensor
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
                    elements=elements(value),
                    passed_on=placement is Placement.ENDS
                    and tensor in roots
                    and source is not None
                    and units[source].kind == "Concat",
                    placement=Placement.NONE if own or unrounded.issuperset(edges) else placement,
                )
            )
    return found


def _entering(edges: Sequence[UnitEdge], readers: Mapping[str, str]) -> list[UnitEdge]:
    """List the edges on which a kernel may read rounded tensors: each is rounded where it ends, on its own scale."""
    found = []
    for edge in edges:
        uses = tuple(use for use in edge.uses if use.node == readers.get(edge.consumer or ""))
        if uses:
            found.append(msgspec.structs.replace(edge, uses=uses, root=edge.tensor, rooted=False, passed_on=False))
    return found


def macs(node: ir.Node) -> int:
    """Count the multiply-accumulates of a convolution or matrix product; other operators have none.

    Nor have those behind a selection, whose rows the data decides.
    """
    out = node.outputs[0]
    if not all(v is None or is_static(v) for v in (out, *node.inputs)):
        return 0
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
