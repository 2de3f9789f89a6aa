"""Exact measurement: the network executed with chosen sites rounded.

Every site has a gate (`gates`), the network runs in segments (`segments`), and each segment has two sessions: as it is,
and with its gates. No session per site, no rewriting between measurements. A `SampleWalk` keeps what every segment of a
first execution handed on; another vector of gates then runs only the segments in which a gate changed, and those that
read something changed. Which session runs depends on the gates of the segment alone, so the numbers are the same, bit
by bit, as in an execution from the start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitalloy.core.records import Head, Secant
from bitalloy.core.units import Edge, Offset, WeightSite
from bitalloy.formats.base import QuantParams, Rounding
from bitalloy.model.heads import Reference
from bitalloy.model.load import Graph
from bitalloy.model.opset import raised_graph
from bitalloy.model.read import constant, name_of
from bitalloy.runtime.ort import OrtSession, available_cores
from bitalloy.sensitivity.gates import GATES, LEAVING, Gatekeeper
from bitalloy.sensitivity.matrix import ProbeMatrix, relative
from bitalloy.sensitivity.segments import cut, extract, reads
from bitalloy.targets.placement import WEIGHTS, Site, own_sites, possible_sites
from bitalloy.targets.recipe import Recipe
from bitalloy.targets.stored import StoredWeight

FRACTIONS = (0.125, 0.35, 1.0)
SEGMENTS = 24
"""Number of segments; more of them save little, because the runtime cannot optimize across a cut."""


class Switchboard:
    """The model with a gate at every site that exact measurement can switch.

    Args:
        graph: the model in normal form.
        recipe: the recipe, which decides what is rounded, and how.
        segments: number of parts that can run again by themselves.
        at_once: samples that will be measured at the same time, each on its share of the cores. That keeps all cores
            busy in small layers, too. Of a large model it is one: each takes memory.
    """

    def __init__(
        self,
        graph: Graph,
        recipe: Recipe,
        *,
        segments: int = SEGMENTS,
        at_once: int = 1,
    ) -> None:
        units, graph = recipe.units, raised_graph(graph, recipe.opset)
        self.at_once = 1 if graph.large else min(max(at_once, 1), available_cores())
        threads = available_cores() // self.at_once
        parts = cut(graph, segments)
        self._place = {name_of(n): i for i, nodes in enumerate(parts) for n in nodes}
        self._segments = [Segment(graph, nodes, threads) for nodes in parts]
        self._outputs = {name: name for name in graph.output_names}
        stored = {name: constant(graph.value[name]) for name in graph.output_names}
        self._stored = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in stored.items() if a is not None}
        """Outputs that no node makes."""
        self._column: dict[str, int] = {}
        self._count = 0
        self._graph, self._recipe = graph, recipe
        for scheme in (s for s in units.schemes if s.gated):
            for unit in (u for u in units.units if scheme.name in u.allowed):
                inner, weights = {e.id: e for e in unit.inner}, {w.id: w for w in unit.weights}
                for site in own_sites(unit, scheme):
                    if site.part == WEIGHTS:
                        self._add_weight(site, weights[site.place])
                    else:
                        self._add_edge(site, (inner[site.place],), inner[site.place].tensor)
        for entry in units.edges:
            sites = dict.fromkeys(replace(s, again=False, end=False) for s in possible_sites(units, entry))
            for site in sorted(sites, key=lambda s: bool(s.after)):
                self._add_edge(site, entry.uses, entry.root)

    def _add_weight(self, site: Site, weight: WeightSite) -> None:
        stored = self._recipe.weight(site.scheme, self._graph.node[weight.node], weight)
        gate = (self._gate(site), weight, stored, self._recipe.offsets.get(site.id))
        self._segments[self._place[weight.node]].weights.append(gate)

    def _add_edge(self, site: Site, uses: Sequence[Edge], root: str) -> None:
        rounding = self._recipe.tensor_params(site.scheme, root)
        split: dict[int, list[Edge]] = defaultdict(list)
        for use in uses:
            if not use.node:
                self._outputs[use.tensor] = LEAVING + use.tensor
            node = use.node or name_of(self._graph.value[use.tensor].producer())  # type: ignore[arg-type]
            split[self._place[node]].append(use)
        for index, group in split.items():
            self._segments[index].edges.append((self._gate(site), group, *rounding))

    def _gate(self, site: Site) -> int:
        """Return the number of a site's gate; what is rounded again passes the gate of what is rounded first."""
        ids = replace(site, again=False).id, replace(site, again=True).id
        number = self._column.get(ids[0], self._count)
        self._column.update(dict.fromkeys(ids, number))
        self._count = max(self._count, number + 1)
        return number

    @property
    def sites(self) -> tuple[str, ...]:
        """Ids of the sites with a gate, in the order of the gates, without those that are rounded again."""
        first: dict[int, str] = {}
        for site, number in self._column.items():
            first.setdefault(number, site)
        return tuple(first[number] for number in range(self._count))

    def gates(self, sites: Iterable[str], scale: float = 1.0) -> np.ndarray:
        """Return the gate vector (sites,) float32 with `scale` at the given sites."""
        vector = np.zeros(self._count, np.float32)
        vector[[self._column[s] for s in sites]] = scale
        return vector

    def walk(self, feeds: Mapping[str, np.ndarray], gates: np.ndarray) -> SampleWalk:
        """Execute a sample and keep what the segments hand on."""
        values = {k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in feeds.items()}
        values |= self._stored
        for segment in self._segments:
            values.update(segment.run(values, gates[segment.columns]))
        return SampleWalk(self._segments, self._outputs, gates, values)

    def run(self, feeds: Mapping[str, np.ndarray], gates: np.ndarray) -> dict[str, np.ndarray]:
        """Execute a sample with gates, and return the outputs."""
        return self.walk(feeds, gates).outputs


@dataclass(frozen=True)
class SampleWalk:
    """One execution of a sample, from which others branch off."""

    _segments: Sequence[Segment]
    _names: Mapping[str, str]
    """Output -> tensor that carries it."""
    gates: np.ndarray
    _values: Mapping[str, ort.OrtValue]

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """Outputs of this execution."""
        return {output: self._values[name].numpy() for output, name in self._names.items()}

    def run(self, gates: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs with other gates; only segments that these change are executed."""
        values = dict(self._values)
        changed: set[str] = set()
        for segment in self._segments:
            own = gates[segment.columns]
            if changed.isdisjoint(segment.inputs) and np.array_equal(own, self.gates[segment.columns]):
                continue
            found = segment.run(values, own)
            values.update(found)
            changed.update(found)
        return {output: values[name].numpy() for output, name in self._names.items()}


class Segment:
    """Some nodes of a graph, with and without gates; a session is built when it is first needed."""

    def __init__(self, graph: Graph, nodes: Sequence[ir.Node], threads: int) -> None:
        self._graph, self._nodes, self._threads = graph, nodes, threads
        self.edges: list[tuple[int, Sequence[Edge], Rounding, QuantParams | None]] = []
        self.weights: list[tuple[int, WeightSite, StoredWeight, Offset | None]] = []
        """Gates with their columns."""
        self.inputs = reads(nodes)
        """Tensors that it reads."""

    @cached_property
    def columns(self) -> np.ndarray:
        """Columns of the gates, in the order of the session's vector."""
        return np.array([column for column, *_ in (*self.edges, *self.weights)], np.int64)

    def run(self, values: Mapping[str, ort.OrtValue], gates: np.ndarray) -> dict[str, ort.OrtValue]:
        """Run the segment on the tensors of earlier segments, and return the tensors that it hands on."""
        feeds = {name: values[name] for name in self.inputs}
        if gates.any():
            feeds[GATES] = ort.OrtValue.ortvalue_from_numpy(gates)
            return self._gated.run_values(feeds, self._gated.output_names)
        found = self._plain.run_values(feeds, self._plain.output_names)
        leaving = [use.tensor for _, uses, *_ in self.edges for use in uses if not use.node]
        return {**found, **{LEAVING + tensor: found[tensor] for tensor in leaving}}

    @cached_property
    def _plain(self) -> OrtSession:
        return OrtSession(extract(self._graph, self._nodes), threads=self._threads, shared=True)

    @cached_property
    def _gated(self) -> OrtSession:
        model = extract(self._graph, self._nodes)
        keeper = Gatekeeper(model, large=self._graph.large)
        for _, uses, stored, params in self.edges:
            keeper.edge(uses, stored, params)
        for _, site, weight, offset in self.weights:
            keeper.weight(site, weight, offset)
        keeper.close()
        return OrtSession(model, threads=self._threads, shared=True)


class Measurement:
    """Exact errors of one sample.

    Args:
        board: the switchable model.
        heads: parts of the outputs.
        feeds: the sample.
        around: gates from which the measured ones differ little; None for the float network.
    """

    def __init__(
        self,
        board: Switchboard,
        heads: Sequence[Head],
        feeds: Mapping[str, np.ndarray],
        around: np.ndarray | None = None,
    ) -> None:
        walk = board.walk(feeds, board.gates(()))
        self._exact = Reference(walk.outputs, heads)
        self._walk = walk if around is None else board.walk(feeds, around)
        self.energy = self._exact.energy
        """||y||^2 of the float network, (heads,)."""

    def error(self, gates: np.ndarray) -> np.ndarray:
        """Return ||y_rounded - y||^2 as an array (heads,)."""
        return self._exact.error(self._walk.run(gates))


def damage(
    board: Switchboard,
    sets: Sequence[np.ndarray],
    heads: Sequence[Head],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the measured error energies of sets of sites.

    Args:
        board: the switchable model.
        sets: one gate vector per measurement.
        heads: parts of the outputs.
        feeds: samples.
        progress: called with 1 after every execution.

    Returns:
        (samples, heads, sets): ||y_rounded - y||^2 / mean ||y||^2, and (samples, heads): ||y||^2.
    """

    def measure(sample: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        measurement = Measurement(board, heads, sample)
        errors = []
        for gates in sets:
            errors.append(measurement.error(gates))
            if progress is not None:
                progress(1)
        return np.array(errors).T, measurement.energy

    found: list[tuple[np.ndarray, np.ndarray]] = []
    waiting = iter(feeds)
    with ThreadPoolExecutor(board.at_once) as pool:
        while some := list(islice(waiting, board.at_once)):
            found += pool.map(measure, some)
    rows, energy = zip(*found, strict=True)
    total = np.array(energy)
    return relative(np.stack(rows), total.mean(axis=0)[None, :, None]), total


def secant(
    board: Switchboard,
    matrix: ProbeMatrix,
    sites: frozenset[str],
    heads: Sequence[Head],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Secant:
    """Measure how the outputs bend when all errors grow together.

    Args:
        board: the switchable model.
        matrix: the probe matrix, whose first samples are those of `feeds`.
        sites: sites of the plan that rounds everything that can be rounded.
        heads: parts of the outputs.
        feeds: samples.
        progress: called with 1 after every execution.
    """
    sets = [board.gates(sites, fraction) for fraction in FRACTIONS]
    measured, _ = damage(board, sets, heads, feeds, progress=progress)
    count = len(feeds)
    part = matrix.subset(slice(count))
    linear = part.damage(part.select(sites)).mean(axis=0)
    return Secant(
        heads=matrix.heads,
        fractions=FRACTIONS,
        damage=tuple(tuple(float(d) for d in row) for row in measured.mean(axis=0).T),
        linear=tuple(float(d) for d in linear),
        samples=count,
    )
