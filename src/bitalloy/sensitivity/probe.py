"""The probe matrix: one measurement that serves every sensitivity, plan and target.

For a random cotangent v with independent signs (Rademacher) over the elements of one head, and g = J^T v the
gradient at a rounding site with local error e, the product a = <g, e> satisfies E[a^2] = ||J e||^2, and for a plan
that rounds several sites E[(sum a)^2] = ||sum J e||^2 (Hutchinson, "A stochastic estimator of the trace of the
influence matrix", 1990). One reverse pass gives a for every site at once. Rows of the matrix are pairs
(sample, probe) for each head; columns are sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitalloy.adjoint import Adjoint, Tap, build
from bitalloy.adjoint.builder import Builder
from bitalloy.adjoint.rules import RULES
from bitalloy.errors import DataError
from bitalloy.graph import Graph, attribute, constant, static_shape
from bitalloy.matrix import ProbeMatrix
from bitalloy.numerics import activation_params, fake_quantize
from bitalloy.records import Edge, Head, UnitGraph, WeightSite
from bitalloy.runtime import OrtSession
from bitalloy.targets.base import Target, weight_params


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
        self._heads = tuple(h.name for h in heads)
        taps = _taps(graph, units, ranges, target)
        self.sites = tuple(t.id for t in taps)
        adjoint = build(graph, {h.name: h.tensor for h in heads}, taps, RULES, stops=stops)
        self._adjoint: Adjoint = adjoint
        self._primal = OrtSession(adjoint.primal)
        self._reverse = [OrtSession(h.model) for h in adjoint.heads]
        column = {s: i for i, s in enumerate(self.sites)}
        self._columns = [np.array([column[t] for t in h.taps], np.int64) for h in adjoint.heads]

    def measure(self, feeds: Mapping[str, np.ndarray], *, sample: int, probes: int, seed: int) -> ProbeMatrix:
        """Rows of one sample: `probes` per head, with signs drawn from (seed, sample, head)."""
        values = {k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in feeds.items()}
        state = self._primal.run_values(values, self._primal.output_names)
        energy = np.array([[float(state[e].numpy()) for e in self._adjoint.energies]])
        if not np.isfinite(energy).all():
            raise DataError(f"The float model's output is NaN or infinite on sample {sample}.")
        rows = []
        for index, (head, session, columns) in enumerate(
            zip(self._adjoint.heads, self._reverse, self._columns, strict=True)
        ):
            generator = np.random.default_rng([seed, sample, index])
            residuals = {name: state[name] for name in head.residuals}
            block = np.zeros((1, probes, len(self.sites)), np.float32)
            for probe in range(probes):
                signs = generator.integers(0, 2, (1, *head.shape), dtype=np.int8).astype(np.float32) * 2 - 1
                feed = {**residuals, head.cotangent: ort.OrtValue.ortvalue_from_numpy(signs)}
                block[0, probe, columns] = session.run_values(feed, [head.output])[head.output].numpy()[0]
            rows.append(block)
        return ProbeMatrix(self._heads, self.sites, tuple(rows), energy)


def _taps(graph: Graph, units: UnitGraph, ranges: Mapping[str, tuple[float, float]], target: Target) -> list[Tap]:
    int8 = units.quantizable()
    taps = []
    for unit in units.units:
        if unit.id not in int8:
            continue
        taps += [_edge_tap(e, e.tensor, ranges, target) for e in unit.inner]
        taps += [_weight_tap(graph, site, target) for site in unit.weights]
    for edge in units.edges:
        if (edge.rooted and edge.producer in int8) or edge.consumer in int8:
            taps.append(_edge_tap(edge.edge, edge.root, ranges, target))
    return taps


def _edge_tap(edge: Edge, root: str, ranges: Mapping[str, tuple[float, float]], target: Target) -> Tap:
    """Error of rounding a tensor: dequantize(quantize(x)) - x, by the runtime's own operators."""
    params = activation_params(*ranges[root], signed=target.activation_signed)

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[edge.tensor]
        shape = static_shape(x)
        scale, zero = p.const(params.scale), p.const(params.zero_point)
        q = p.op("QuantizeLinear", x, scale, zero, shape=shape)
        return p.like("Sub", p.op("DequantizeLinear", q, scale, zero, shape=shape), x)

    at_output = Edge(tensor=edge.tensor, node="", slot=0)
    return Tap(edge.id, edge if edge.node else at_output, error)


def _weight_tap(graph: Graph, site: WeightSite, target: Target) -> Tap:
    """Error of rounding a weight, seen at the node's output: the node applied to the weight's error, without bias."""
    node = graph.node[site.node]
    weight = constant(node.inputs[site.slot])
    assert weight is not None
    delta = fake_quantize(weight, weight_params(target, node, site)) - weight
    kept = {k: v for k in node.attributes if (v := attribute(node, k, None)) is not None}
    output = node.outputs[0]

    def error(p: Builder, values: Mapping[str, ir.Value]) -> ir.Value:
        x = values[str(node.inputs[0].name)]  # type: ignore[union-attr]
        return p.op(node.op_type, x, p.const(delta), shape=static_shape(output), **kept)  # type: ignore[arg-type]

    return Tap(site.id, Edge(tensor=str(output.name), node="", slot=0), error)
