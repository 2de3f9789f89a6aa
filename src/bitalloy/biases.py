"""Take the mean error of each output channel of INT8 layers out of their biases.

Rounding weights, and clipping what enters, moves the mean of a layer's output. Bias correction (Nagel et al. 2019,
section 4.2, https://arxiv.org/abs/1906.04721) adds to the bias

    W E[x] - W_q E[clip(x)]

with the mean input per channel of the float network, over samples and positions (the border of a padded convolution
counts like the rest), and W summed over the kernel. Each layer is corrected for its own rounding alone, so that layers
behind each other are not corrected twice for the same: taking out what the mixed network's means differ by, for all
layers at once or in a few groups, was tried and did great harm (benchmarks/RESULTS.md). The bias that is moved:

Case 1. The third operand of a Conv or Gemm in an INT8 unit.
Case 2. The constant vector of an Add that alone reads a MatMul in an INT8 unit, whichever unit the Add is in.

A layer without bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.channels import channel_means
from bitalloy.graph import Graph, attribute, constant, consumers, name_of, static_shape
from bitalloy.numerics import fake_quantize
from bitalloy.records import HALF, UnitGraph, WeightSite
from bitalloy.targets import Target
from bitalloy.targets.base import weight_params
from bitalloy.values import bias_slot


@dataclass(frozen=True, slots=True)
class Bias:
    """The constant bias of a layer that is rounded."""

    node: str
    """That adds it: the layer itself, or the Add behind it."""
    weight: WeightSite
    """Of the layer."""
    tensor: str
    """That the layer reads."""
    root: str
    """Tensor whose range it is rounded with."""


def find_biases(graph: Graph, units: UnitGraph, lowered: frozenset[str]) -> tuple[Bias, ...]:
    """Biases of a plan's INT8 layers, in the order of the units."""
    half = {n for u in units.units if u.id + HALF in lowered for n in (*u.core, *u.tail)}
    roots = {use.node: e.root for e in units.edges for use in e.uses if use.slot == 0}
    found = []
    for site in (w for u in units.units if u.id in lowered for w in u.weights):
        layer = holder = graph.node[site.node]
        if layer.op_type == "MatMul":
            uses = consumers(layer.outputs[0])
            if len(uses) != 1 or layer.outputs[0].is_graph_output():
                continue
            holder = uses[0].node
        entering = layer.inputs[0]
        if entering is None or 0 in static_shape(entering) or site.node not in roots:
            continue
        if layer.op_type not in ("Conv", "Gemm", "MatMul") or (holder.op_type == "Add") != (layer.op_type == "MatMul"):
            continue
        slot = bias_slot(holder)
        bias = constant(holder.inputs[slot]) if slot is not None else None
        channels = static_shape(layer.outputs[0])[1 if layer.op_type == "Conv" else -1]
        if name_of(holder) not in half and bias is not None and bias.shape[-1:] == (channels,) == (bias.size,):
            found.append(Bias(name_of(holder), site, str(entering.name), roots[site.node]))
    return tuple(found)


def corrections(
    graph: Graph,
    biases: Sequence[Bias],
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    feeds: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """What is to be added to each bias, per channel.

    Args:
        graph: float.
        biases: of its layers.
        ranges: tensor -> calibrated (low, high).
        target: decides how weights are rounded.
        feeds: samples.
        progress: called with 1 after each sample.

    Returns:
        node -> (channels,) float64.
    """
    axes = {b.tensor: 1 if graph.node[b.weight.node].op_type == "Conv" else -1 for b in biases}
    limits = {b.tensor: ranges[b.root] for b in biases}
    means = channel_means(graph.model, axes, feeds, limits, progress)
    found = {}
    for bias in biases:
        layer = graph.node[bias.weight.node]
        weight = constant(layer.inputs[bias.weight.slot])
        assert weight is not None, "weight sites are constants"
        rounded = fake_quantize(weight, weight_params(target, layer, bias.weight))
        plain, clipped = means[bias.tensor]
        found[bias.node] = _product(layer, weight, plain) - _product(layer, rounded, clipped)
    return found


def _product(layer: ir.Node, weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(outputs,): what a layer makes of an input that is `mean`, (inputs,), everywhere."""
    if layer.op_type != "Conv":
        turned = layer.op_type == "Gemm" and attribute(layer, "transB", 0)
        return np.asarray(mean @ (weight.T if turned else weight).astype(np.float64))
    groups = int(attribute(layer, "group", 1))  # type: ignore[call-overload]
    outputs, inputs = weight.shape[:2]
    sums = weight.reshape(groups, outputs // groups, inputs, -1).sum(axis=3, dtype=np.float64)
    return np.asarray(np.einsum("goi,gi->go", sums, mean.reshape(groups, inputs)).reshape(outputs))
