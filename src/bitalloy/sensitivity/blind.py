"""Roundings whose damage gradients do not tell: found by the graph and the probe matrix, and measured by execution.

What a rounding does reaches a head by all ways through the graph. The probe matrix misses some of it, or all, where

Case 1. a way leads through a node that the user excluded;
Case 2. a way leads through a function that jumps (ArgMax, Round, NonZero ...), or through integers, such as an index
        that TopK gives. Comparisons count as ways that gradients need not take: what they choose between mostly meets
        where they switch, as in activations that are written with Where;
Case 3. all gradients are zero on the samples where the error is not, behind a dead Relu or a saturated Softmax.

Unknown damage is never zero. Such sites are executed one by one, and their columns hold what was measured: the root of
each sample's error energy with random signs, so that they add up as independent errors do. Of large models each
execution takes minutes: there the units that would round such a site stay in float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitalloy import ops
from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.engine import FLOATING
from bitalloy.core.encoding import to_json
from bitalloy.core.records import Head
from bitalloy.core.schemes import Plan
from bitalloy.core.units import Edge, UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.model.heads import KL, Reference
from bitalloy.model.load import Graph
from bitalloy.model.opset import raised_graph
from bitalloy.model.read import name_of
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.columns import columns
from bitalloy.sensitivity.matrix import LEAST_ENERGY, ProbeMatrix
from bitalloy.sensitivity.measuring import SAMPLES, damage_inputs, measured_damages
from bitalloy.targets.placement import Site, all_sites, own_sites, possible_sites, rounded

JUMPS = ops.STEPWISE - ops.BOOLEAN - ops.SHAPE_READERS
"""Operators whose result jumps, so that the size of what they change says nothing of what that does."""


class _Ways:
    """The ways from everywhere in a graph to a head.

    Args:
        graph: a graph in normal form.
        head: where the ways end.
        stops: nodes that hand on no gradient.
    """

    def __init__(self, graph: Graph, head: Head, stops: Collection[str]) -> None:
        self._head = head
        self._hidden = {head.tensor: False}
        """Tensor with a way -> whether gradients miss one of its ways."""
        self._used: dict[tuple[str, int], bool] = {}
        """The same of a tensor as it enters a node."""
        for node in reversed(graph.nodes):
            made = [v for v in node.outputs if v.name in self._hidden]
            if not made or node.op_type in ops.SHAPE_READERS:
                continue
            hides = node.name in stops or node.op_type in JUMPS or any(map(self._hides, made))
            for slot, value in enumerate(node.inputs):
                if value is not None and not value.is_initializer():
                    self._used[name_of(node), slot] = hides
                    self._hidden[str(value.name)] = hides or self._hidden.get(str(value.name), False)

    def _hides(self, made: ir.Value) -> bool:
        whole = made.dtype not in FLOATING and made.dtype != ir.DataType.BOOL
        return whole or self._hidden[str(made.name)]

    def missed(self, place: str | Sequence[Edge]) -> bool | None:
        """Tell whether gradients miss a way of an error; None where it has no way to the head.

        Args:
            place: the tensor to which the error is added, or the uses of a tensor that alone see it.
        """
        if isinstance(place, str):
            # gradients start at the head's own tensor, ahead of what makes the output of it
            return self._hidden.get(place, True if place == self._head.output else None)
        found = [self._used.get((e.node, e.slot)) for e in place if e.node]
        found += [False for e in place if not e.node and e.tensor == self._head.output]
        known = [hides for hides in found if hides is not None]
        return any(known) if known else None


def blind_sites(ready: Calibrated, matrix: ProbeMatrix) -> frozenset[tuple[str, str]]:
    """Find the heads and sites, as pairs of names, for which the probe matrix does not tell the whole damage.

    Divergences do not count scores that float32 does not tell from zero (`bitalloy.model.divergence`): gradients are
    zero there as they should be, where those of the head itself are not.
    """
    places = _places(ready.graph, ready.units)
    live = [frozenset(s for s in matrix.sites if row[..., matrix.column[s]].any()) for row in matrix.rows]
    plain = {head.name: index for index, head in enumerate(ready.heads)}
    found, silent = set(), set()
    for index, head in enumerate(ready.heads):
        ways = _Ways(ready.graph, head, ready.excluded)
        seen = live[index] | live[plain[head.name.removesuffix(KL)]]
        for site, place in places.items():
            missed = ways.missed(place)
            if missed:
                found.add((head.name, site))
            elif missed is False and site not in seen:
                silent.add((head.name, site))
    moved = _moved(ready, {site for _, site in silent}, ready.parts.probe[: matrix.samples])
    return frozenset(found | {(head, site) for head, site in silent if site in moved})


def _moved(ready: Calibrated, sites: Collection[str], samples: Sequence[int]) -> frozenset[str]:
    """Find those of some sites whose error is not zero on all of some samples."""
    recipe = ready.recipe()
    graph = raised_graph(ready.graph, recipe.opset)
    model = graph.clone()
    values = {str(v.name): v for v in (*model.graph.inputs, *model.graph.initializers.values())}
    values.update({str(v.name): v for node in model.graph for v in node.outputs})
    builder, names = Builder(model.graph, "bitalloy.blind/"), dict[str, str]()
    model.graph.outputs.clear()
    for column in (c for c in columns(graph, recipe) if c.site in sites):
        error = builder.flat(column.tap(column.site).error(builder, values))
        model.graph.outputs.append(builder.op("ReduceL1", error, keepdims=0, shape=()))
        names[column.site] = str(model.graph.outputs[-1].name)
    if not names:
        return frozenset()
    RemoveUnusedNodesPass()(model)
    session, moved = OrtSession(model), set[str]()
    for index in samples:
        sizes = session.run(ready.data.feeds(index))
        moved |= {site for site, name in names.items() if sizes[name] != 0}
    session.close()
    return frozenset(moved)


def _places(graph: Graph, units: UnitGraph) -> dict[str, str | Sequence[Edge]]:
    """Map each site to the tensor to which its error is added, or to the uses of a tensor that alone see it."""
    found: dict[str, str | Sequence[Edge]] = {}
    for unit in units.units:
        inner, weights = {e.id: (e,) for e in unit.inner}, {w.id: w.node for w in unit.weights}
        for site in (s for name in unit.choices for s in own_sites(unit, units.scheme(name))):
            behind = str(graph.node[weights[site.place]].outputs[0].name) if site.place in weights else unit.root
            found[site.id] = inner.get(site.place, behind)
    for edge in units.edges:
        found.update({site.id: edge.uses for site in possible_sites(units, edge)})
    return found


def execute_blind(
    parts: Sequence[Calibrated], matrices: Sequence[ProbeMatrix], work: Workspace
) -> tuple[list[Calibrated], list[ProbeMatrix]]:
    """Measure what gradients do not tell, on each target, and keep in float what cannot be measured.

    Args:
        parts: the model on each target.
        matrices: the probe matrix of each.
        work: where results are stored and progress is shown.

    Returns:
        The parts, in whose units schemes of unknown damage are refused, and the matrices with the measured columns.
    """
    found = [_executed(part, matrix, work) for part, matrix in zip(parts, matrices, strict=True)]
    return [part for part, _ in found], [matrix for _, matrix in found]


def _executed(ready: Calibrated, matrix: ProbeMatrix, work: Workspace) -> tuple[Calibrated, ProbeMatrix]:
    blind = blind_sites(ready, matrix)
    names = {site for _, site in blind}
    if not names:
        return ready, matrix
    if ready.graph.large:
        return replace(ready, units=_refused(ready.units, names)), matrix
    gated = {scheme.name for scheme in ready.units.schemes if scheme.gated}
    sites = sorted({s for s in all_sites(ready.units) if s.id in names}, key=lambda s: s.id)
    switched, others = [s for s in sites if s.scheme in gated], [s for s in sites if s.scheme not in gated]
    samples, known = ready.parts.probe[: min(matrix.samples, SAMPLES)], dict[str, np.ndarray]()
    if switched:
        damage, energy = measured_damages(ready, [frozenset({s.id}) for s in switched], samples, work=work)
        each = (damage * np.maximum(energy.mean(axis=0), LEAST_ENERGY)[None, :, None]).transpose(2, 0, 1)
        known.update(zip([s.id for s in switched], each, strict=True))
    known.update(_computed_errors(ready, others, samples, work) if others else {})
    return ready, _filled(matrix, blind, known, ready.settings.seed)


def _computed_errors(
    ready: Calibrated, sites: Sequence[Site], samples: Sequence[int], work: Workspace
) -> dict[str, np.ndarray]:
    """Execute units that compute in another format, each in a model of its own.

    Returns:
        site -> error energy (samples, heads).
    """

    def make() -> bytes:
        errors = []
        with work.stage("exact", len(sites)) as progress:
            reference = ready.original().session()
            exact = {i: Reference(reference.run(ready.data.feeds(i)), ready.heads) for i in samples}
            reference.close()
            for site in sites:
                session = ready.executable(ready.artefact(Plan.of(site.scheme, site.place))).session()
                errors.append([exact[i].error(session.run(ready.data.feeds(i))).tolist() for i in samples])
                session.close()
                progress.advance(1)
        return to_json(errors)

    inputs = damage_inputs(ready, [frozenset({s.id}) for s in sites], samples)
    return dict(
        zip((s.id for s in sites), map(np.array, msgspec.json.decode(work.cached("blind", inputs, make))), strict=True)
    )


def _filled(
    matrix: ProbeMatrix, blind: Collection[tuple[str, str]], known: Mapping[str, np.ndarray], seed: int
) -> ProbeMatrix:
    """Put measured error energies, site -> (samples, heads) of the first samples, into the columns that are blind."""
    rows, own = [r.copy() for r in matrix.rows], [o.copy() for o in matrix.own]
    generator, executed = np.random.default_rng([seed, 29]), []
    for site, energy in known.items():
        for head, name in enumerate(matrix.heads):
            if (name, site) not in blind:
                continue
            each, whole = energy[:, head], matrix.energy[:, head]
            # samples that were not executed are taken to lose as much of their energy as the others
            rest = whole[len(each) :] * (each.mean() / max(whole[: len(each)].mean(), LEAST_ENERGY))
            column, shape = matrix.column[site], rows[head].shape[:2]
            own[head][:, :, column] = np.broadcast_to(np.concatenate([each, rest])[:, None], shape)
            rows[head][:, :, column] = (generator.integers(0, 2, shape) * 2 - 1) * np.sqrt(own[head][:, :, column])
            executed.append((name, site))
    return replace(matrix, rows=tuple(rows), own=tuple(own), executed=frozenset(executed))


def _refused(units: UnitGraph, unknown: Collection[str]) -> UnitGraph:
    """Keep units out of the schemes in which they would round a site of unknown damage."""
    reason = "what its rounding does is unknown: gradients miss a way from it to an output, and it was not executed"
    changed = []
    for unit in units.units:
        for name in unit.choices:
            if not rounded(units, Plan.of(name, unit.id)).isdisjoint(unknown):
                unit = unit.without(name, reason)
        changed.append(unit)
    return msgspec.structs.replace(units, units=tuple(changed))
