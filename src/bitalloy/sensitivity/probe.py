"""The probe matrix: one measurement that serves every sensitivity, plan and target.

For a random cotangent v with independent signs (Rademacher) over the elements of one head, and g = J^T v the
gradient at a rounding site with local error e, the product a = <g, e> satisfies E[a^2] = ||J e||^2, and for a plan
that rounds several sites E[(sum a)^2] = ||sum J e||^2 (Hutchinson, "A stochastic estimator of the trace of the
influence matrix", 1990). For a head that gives a distribution the signs are shaped so that a^2 estimates twice the KL
divergence (`bitalloy.divergence`). One reverse pass gives a for every site at once. Rows of the matrix are pairs
(sample, probe) for each head; columns are sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitalloy.adjoint import Adjoint, Tap, build
from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.rules import RULES
from bitalloy.errors import DataError
from bitalloy.graph import Graph, attribute, constant, static_shape
from bitalloy.heads import Reference, needs_values
from bitalloy.matrix import ProbeMatrix
from bitalloy.numerics import QuantParams, activation_params, dequantize, quantize
from bitalloy.records import AGAIN, Edge, Head, UnitEdge, UnitGraph, WeightSite
from bitalloy.runtime import OrtSession
from bitalloy.targets.base import Target, weight_params

AT_ONCE = 2
"""Probes per reverse execution: they share the reading of the errors; more of them leave the cache."""


class Prober:
    """Sessions that turn a sample into rows of the probe matrix.

    Args:
        graph: the model in normal form.
        units: its units; every site that an INT8 plan could round gets a column.
        heads: the parts of the outputs.
        ranges: tensor -> calibrated (low, high).
        target: decides formats.
        stops: nodes through which nothing is measured.

    Raises:
        UnsupportedOpError: an operator between a site and a head has no adjoint rule.
    """

    def __init__(
        self,
        graph: Graph,
        units: UnitGraph,
        heads: Sequence[Head],
        ranges: Mapping[str, tuple[float, float]],
        target: Target,
        *,
        stops: frozenset[str] = frozenset(),
    ) -> None:
        self._heads = tuple(heads)
        taps, tensors = _taps(graph, units, ranges, target), tuple(dict.fromkeys(h.tensor for h in heads))
        self.sites = tuple(t.id for t in taps)
        self._kept = tuple(dict.fromkeys(h.output for h in heads if needs_values(h)))
        adjoint = build(graph, {t: t for t in tensors}, taps, RULES, stops=stops, keep=self._kept)
        self._adjoint: Adjoint = adjoint
        with ThreadPoolExecutor() as pool:
            models = [adjoint.primal, *(h.model for h in adjoint.heads)]
            self._primal, *self._reverse = pool.map(partial(OrtSession, shared=True), models)
        column = {s: i for i, s in enumerate(self.sites)}
        self._columns = [np.array([column[t] for t in h.taps], np.int64) for h in adjoint.heads]
        self._of = [tensors.index(h.tensor) for h in heads]
        """Reverse pass of each head."""

    def measure(
        self, feeds: Mapping[str, np.ndarray], *, sample: int, probes: int | Sequence[int], seed: int
    ) -> ProbeMatrix:
        """Rows of one sample, with signs drawn from (seed, sample, head); `probes` for every head, or one number each.

        Raises:
            DataError: the float model's output is NaN or infinite.
        """
        values = {k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in feeds.items()}
        state = self._primal.run_values(values, self._primal.output_names)
        weighed = [h for h in self._heads if needs_values(h)]
        found = Reference({name: state[name].numpy() for name in self._kept}, weighed).parts
        parts = {h.name: part for h, part in zip(weighed, found, strict=True)}
        counts = [probes] * len(self._heads) if isinstance(probes, int) else probes
        energy, rows, own = [], [], []
        for index, (head, count) in enumerate(zip(self._heads, counts, strict=True)):
            part, position = parts.get(head.name), self._of[index]
            energy.append(part.energy if part else float(state[self._adjoint.energies[position]].numpy()))
            if not np.isfinite(energy).all():
                raise DataError(f"The float model's output is NaN or infinite on sample {sample}.")
            reverse, columns = self._adjoint.heads[position], self._columns[position]
            generator = np.random.default_rng([seed, sample, index])
            residuals = {name: state[name] for name in reverse.residuals}
            sums, squares = np.zeros((2, 1, count, len(self.sites)), np.float32)
            for start in range(0, count, AT_ONCE):
                some = slice(start, min(start + AT_ONCE, count))
                shape = (some.stop - start, *reverse.shape)
                v = generator.integers(0, 2, shape, dtype=np.int8).astype(np.float32) * 2 - 1
                v = part.cotangents(v) if part else v
                feed = {**residuals, reverse.cotangent: ort.OrtValue.ortvalue_from_numpy(v)}
                result = self._reverse[position].run_values(feed, [reverse.output])[reverse.output].numpy()
                total, squared = reverse.by_tap(result)
                sums[0, some, columns] = total.T
                squares[0, some, columns] = squared.T
            rows.append(sums)
            own.append(squares)
        names = tuple(h.name for h in self._heads)
        return ProbeMatrix(names, self.sites, tuple(rows), tuple(own), np.array([energy]))


def _taps(graph: Graph, units: UnitGraph, ranges: Mapping[str, tuple[float, float]], target: Target) -> list[Tap]:
    int8 = units.quantizable()
    taps = []
    for unit in units.units:
        if unit.id not in int8:
            continue
        taps += [_edge_tap(e.id, (e,), e.tensor, ranges, target) for e in unit.inner]
        taps += [_weight_tap(graph, site, target) for site in unit.weights]
    roots = {(use.node, use.slot): e.root for e in units.edges for use in e.uses}
    for edge in units.edges:
        if edge.consumer in int8 or (edge.rooted and edge.producer in int8 and not edge.passed_on):
            tap = _edge_tap(edge.id, edge.uses, edge.root, ranges, target, leaving=edge.consumer is None)
            taps.append(_forwarded(graph, edge, tap) or tap)
        if edge.passed_on and edge.producer in int8:
            taps.append(_again_tap(graph, edge, roots, ranges, target))
    return taps


def _forwarded(graph: Graph, edge: UnitEdge, tap: Tap) -> Tap | None:
    """The same error behind the one Conv that reads a graph input: nothing upstream needs the gradient there."""
    node = graph.node.get(edge.uses[0].node)
    if edge.producer is not None or len(edge.uses) != 1 or node is None or node.op_type != "Conv":
        return None
    kept = {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}
    output, weight = node.outputs[0], str(node.inputs[1].name)  # type: ignore[union-attr]

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        return p.op("Conv", tap.error(p, values), values[weight], shape=static_shape(output), **kept)  # type: ignore[arg-type]

    return Tap(tap.id, (Edge(tensor=str(output.name), node="", slot=0),), error)


def _again_tap(
    graph: Graph,
    edge: UnitEdge,
    roots: Mapping[tuple[str, int], str],
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
) -> Tap:
    """Error of rounding a Concat's output when its operands are rounded already, each on its own scale."""
    node = graph.node[str(edge.producer)]
    out = activation_params(*ranges[edge.root], signed=target.activation_signed)

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        operands = []
        for slot, operand in enumerate(node.inputs):
            assert operand is not None, "a Concat has no absent operands"
            params = activation_params(*ranges[roots[str(node.name), slot]], signed=target.activation_signed)
            operands.append(_rounded(p, values[str(operand.name)], params))
        shape = static_shape(values[edge.tensor])
        joined = p.op("Concat", *operands, axis=int(attribute(node, "axis", 0)), shape=shape)  # type: ignore[call-overload]
        return p.like("Sub", _rounded(p, joined, out), joined)

    return Tap(edge.id + AGAIN, edge.uses, error, leaving=edge.consumer is None)


def _rounded(p: Builder, x: ir.Value, params: QuantParams) -> ir.Value:
    """dequantize(quantize(x)), by the runtime's own operators."""
    scale, zero = p.const(params.scale), p.const(params.zero_point)
    q = p.op("QuantizeLinear", x, scale, zero, shape=static_shape(x))
    return p.op("DequantizeLinear", q, scale, zero, shape=static_shape(x))


def _edge_tap(
    site: str,
    uses: tuple[Edge, ...],
    root: str,
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    *,
    leaving: bool = False,
) -> Tap:
    """Error of rounding a tensor: dequantize(quantize(x)) - x."""
    params = activation_params(*ranges[root], signed=target.activation_signed)

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[uses[0].tensor]
        return p.like("Sub", _rounded(p, x, params), x)

    return Tap(site, uses, error, leaving)


def _weight_tap(graph: Graph, site: WeightSite, target: Target) -> Tap:
    """Error of rounding a weight, seen at the node's output: the node applied to the weight's error, without bias.

    The error is a constant. Of a large model it is computed at every run instead, so that only the integers are kept
    beside the weight.
    """
    node = graph.node[site.node]
    weight = constant(node.inputs[site.slot])
    assert weight is not None
    params = weight_params(target, node, site)
    rounded = quantize(weight, params)
    delta = None if graph.large else dequantize(rounded, params) - weight
    kept = {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}
    output = node.outputs[0]

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[str(node.inputs[0].name)]  # type: ignore[union-attr]
        change = p.const(delta) if delta is not None else _change(p, values[site.tensor], rounded, params)
        return p.op(node.op_type, x, change, shape=static_shape(output), **kept)  # type: ignore[arg-type]

    return Tap(site.id, (Edge(tensor=str(output.name), node="", slot=0),), error)


def _change(p: Builder, weight: ir.Value, rounded: np.ndarray, params: QuantParams) -> ir.Value:
    """dequantize(integers) - weight."""
    axis = {} if params.axis is None else {"axis": params.axis}
    scale, zero = p.const(params.scale), p.const(params.zero_point)
    return p.like("Sub", p.like("DequantizeLinear", p.const(rounded), scale, zero, **axis), weight)
