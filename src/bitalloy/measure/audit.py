"""What the runtime really ran: every planned unit beside the precision of the kernels that did its work.

Case 1. Its work ran in kernels of the scheme that was planned: as planned.
Case 2. Planned in rounded numbers, run in float: the runtime did not fuse the rounding into a kernel.
Case 3. Planned in float, run in rounded numbers: the unit only moves or joins what its neighbours exchange.
Case 4. Planned to compute in another format, run in float32: the provider has no kernel for it, and casts.
Case 5. No kernel of its own: it runs inside the kernel of another unit, as that kernel's names or the graph that the
        runtime made say. It shares that kernel's precision, except that what was planned in float behind rounded
        numbers may be computed in float there: then nothing is claimed.
Case 6. Neither: its nodes were folded into constants, or removed.
Case 7. Planned in float, and the runtime rounded its weights all the same, for an integer kernel or none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from bitalloy import ops
from bitalloy.core.audited import Audit, AuditedGraph, AuditedKernel, AuditedNode, AuditedUnit
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.measure.tracing import TimedKernel, TracedModel
from bitalloy.runtime.optimized import Rewritten

SECONDARY = (
    "Reorder",
    "Reshape",
    "QuantizeLinear",
    "DequantizeLinear",
    "Transpose",
    "Subgraph",
    "FakeQuantize",
    "Cast",
)
"""Beginnings of kernels that stand beside the work of a unit; they decide only where nothing else ran for it."""


def audit_kernels(
    units: UnitGraph,
    plan: Plan,
    kernels: Sequence[TimedKernel],
    runtime: str,
    version: str,
    *,
    graphs: Sequence[AuditedGraph] = (),
) -> Audit:
    """Compare a plan with a profile of its model.

    Args:
        units: the units on the plan's target.
        plan: unit -> scheme.
        kernels: kernels of the rewritten model in order, with their units (`tracing.profile`, then `reconcile`).
        runtime: the name of the runtime.
        version: the version of the runtime.
        graphs: what the runtime made of each graph (`reconcile`).
    """
    known = {scheme.name: scheme for scheme in units.schemes}
    floats = {BASELINE, "", *(scheme.name for scheme in known.values() if scheme.cast)}
    kernels = [
        _named_by_plan(timed, [known[plan.scheme_of(unit)] for unit in timed.units], floats) for timed in kernels
    ]
    own: dict[str, list[TimedKernel]] = defaultdict(list)
    taken: dict[str, list[TimedKernel]] = defaultdict(list)
    for timed in kernels:
        for place, unit in enumerate(timed.units):
            (taken if place else own)[unit].append(timed)
    return Audit(
        runtime=runtime,
        version=version,
        units=tuple(
            _audited(UnitKernels(u, units.scheme(plan.scheme_of(u.id)), own[u.id], taken[u.id]), runtime, known, graphs)
            for u in units.units
        ),
        share_of_time=_shares(kernels),
        kernels=tuple(
            AuditedKernel(
                op=t.kernel.op, precision=t.kernel.precision, unit=t.unit, us=round(t.us, 3), graph=t.kernel.graph
            )
            for t in kernels
        ),
        graphs=tuple(graphs),
    )


def reconcile(
    traced: TracedModel, kernels: Sequence[TimedKernel], made: Mapping[str, Rewritten | str]
) -> tuple[list[TimedKernel], tuple[AuditedGraph, ...]]:
    """Bring a profile and the graphs that ran together: kernels get the units of their nodes, nodes whether they ran.

    Args:
        traced: the model that was profiled.
        kernels: the profile of the model.
        made: what the runtime made of each of its graphs (`tracing.rewritten_graphs`).
    """
    ran = {(t.kernel.graph, t.kernel.name) for t in kernels}
    known: dict[tuple[str, str], tuple[str, ...]] = {}
    graphs = []
    for name, found in made.items():
        if isinstance(found, str):
            graphs.append(AuditedGraph(graph=name, unknown=found))
            continue
        nodes = []
        for node in found.nodes:
            units = traced.units_of(node.sources)
            known[name, node.name] = units
            names = tuple(map(traced.name_before, node.sources))
            nodes.append(AuditedNode(op=node.op, units=units, nodes=names, ran=(name, node.name) in ran))
        lists = (found.unfused, found.folded, found.removed, found.rounded)
        unfused, folded, removed, rounded = (tuple(map(traced.name_before, part)) for part in lists)
        graphs.append(
            AuditedGraph(
                graph=name, nodes=tuple(nodes), unfused=unfused, folded=folded, removed=removed, rounded=rounded
            )
        )
    merged = []
    for timed in kernels:
        more = known.get((timed.kernel.graph, timed.kernel.name), ())
        merged.append(replace(timed, units=tuple(dict.fromkeys((*timed.units, *more)))))
    return merged, tuple(graphs)


@dataclass(frozen=True)
class UnitKernels:
    """A unit beside the kernels that did its work."""

    unit: Unit
    planned: Scheme
    own: Sequence[TimedKernel]
    """Kernels that are its own."""
    taken: Sequence[TimedKernel]
    """Kernels of other units that work for it too."""


def _audited(
    seen: UnitKernels, runtime: str, known: Mapping[str, Scheme], graphs: Sequence[AuditedGraph]
) -> AuditedUnit:
    unit, planned, own, taken = seen.unit, seen.planned, list(seen.own), _main(seen.taken)
    if taken and not _main(own):  # only rounding and layout changes of its own
        taker = max(taken, key=lambda t: t.us)
        cause = f"runs inside {taker.kernel.op} of '{taker.unit}'"
        # what stands behind the sums of a kernel that reads rounded numbers may be computed in float
        rounded = _rounds(taker.kernel.precision, known)
        executed = "" if rounded and not planned.rounds else taker.kernel.precision
        if executed not in ("", planned.name):
            cause = f"{_cause(planned, executed, runtime, known)}; it {cause}"
    else:
        executed = _decisive(_main(own) or own)
        cause = _cause(planned, executed, runtime, known) if executed else _absence(unit, graphs)
    rounded = planned.weight is None and _weights_rounded(unit, graphs)
    if rounded:
        cause = f"{runtime}'s optimizer rounded its weights, which the plan keeps in float"
    return AuditedUnit(
        unit=unit.id,
        kind=unit.kind,
        planned=planned.name,
        executed=executed,
        kernels=tuple(t.kernel.op for t in own),
        us=round(sum(t.us for t in own), 3),
        cause=cause,
        rounded=rounded,
    )


def _named_by_plan(timed: TimedKernel, planned: Sequence[Scheme], floats: Collection[str]) -> TimedKernel:
    """Give a kernel the name of the scheme of a unit that it computes for, where its operands do not tell.

    Case 1. The operator that the scheme names.
    Case 2. A product of float tensors with a stored weight, which runtimes call by the type of the weight.
    """
    for scheme in planned:
        stored = scheme.weights_only and timed.kernel.precision not in floats
        if stored or timed.kernel.op in {scheme.kernel, scheme.gather} - {"", "Gather"}:
            return replace(timed, kernel=replace(timed.kernel, precision=scheme.name))
    return timed


def _rounds(precision: str, known: Mapping[str, Scheme]) -> bool:
    """Tell whether a kernel of some precision reads rounded numbers."""
    return precision in known and known[precision].rounds


def _main(kernels: Sequence[TimedKernel]) -> list[TimedKernel]:
    return [t for t in kernels if not t.kernel.op.startswith(SECONDARY)]


def _decisive(kernels: Sequence[TimedKernel]) -> str:
    """Return the precision in which most of the time was spent; empty without kernels."""
    times: dict[str, float] = defaultdict(float)
    for timed in kernels:
        times[timed.kernel.precision] += timed.us
    return max(times, key=lambda precision: times[precision]) if times else ""


def _cause(planned: Scheme, executed: str, runtime: str, known: Mapping[str, Scheme]) -> str:
    if executed == planned.name:
        return ""
    if planned.rounds:
        return "the runtime made no integer kernel of it: a pattern that it does not fuse, or an integer one is missing"
    if planned.weights_only and executed == BASELINE:
        return f"{runtime} turns what is stored into floats when it loads the model: the file is smaller, and no more"
    if executed in known and known[executed].weights_only:
        return (
            f"it runs in the kernel of a neighbour whose weights are stored in {executed.upper()}; tensors stay float"
        )
    if _rounds(executed, known):
        return "it handles integers that its neighbours exchange; no rounding of its own"
    if planned.cast and executed == BASELINE:
        name = planned.name.upper()
        return f"{runtime} has no {name} kernel for it on this processor: Cast to {BASELINE.upper()}"
    return f"the runtime chose {executed} by itself"


def _weights_rounded(unit: Unit, graphs: Sequence[AuditedGraph]) -> bool:
    """Tell whether the runtime rounded float weights of a unit."""
    return unit.kind in ops.WEIGHTED and any(
        unit.id in node.units and not set(graph.rounded).isdisjoint(node.nodes)
        for graph in graphs
        for node in graph.nodes
    )


def _absence(unit: Unit, graphs: Sequence[AuditedGraph]) -> str:
    """Say where the work of a unit without kernels went (case 6), as far as the graphs tell."""
    nodes = {*unit.core, *unit.tail}
    if nodes & {n for g in graphs for n in g.folded}:
        return "computed before the model runs: folded into a constant"
    if nodes & {n for g in graphs for n in g.removed}:
        return "removed: nothing that the model gives depends on it"
    if takers := [n.op for g in graphs for n in g.nodes if unit.id in n.units]:
        return f"its nodes became {', '.join(dict.fromkeys(takers))}, which did not run"
    return "runs inside a neighbour's kernel, or was removed"


def _shares(kernels: Sequence[TimedKernel]) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for timed in kernels:
        times[timed.kernel.precision or "other"] += timed.us
    total = sum(times.values())
    return {name: round(us / total, 4) for name, us in sorted(times.items())} if total else {}
