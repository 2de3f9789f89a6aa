"""Take the mean error that rounded weights make, per output channel, out of the layer's bias.

Bias correction (Nagel et al. 2019, section 4.2, https://arxiv.org/abs/1906.04721) adds to the bias

    (W - W_q) E[x]

with the mean input per channel of the float network, over samples and positions (the border of a padded convolution
counts like the rest), and W summed over the kernel. It depends on the layer alone, whatever else a plan rounds: so an
offset belongs to a rounded weight, and probe matrix, exact measurement and rewritten model all have it. Layers behind
each other are not corrected twice for the same: taking out what the mixed network's means differ by, for all layers at
once or in a few groups, was tried and did great harm (docs/design.md). The bias that is moved:

Case 1. The third operand of a Conv or Gemm.
Case 2. The constant vector of an Add that alone reads a MatMul, whichever unit the Add is in.

A layer without bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.calibrate.channels import channel_means
from bitalloy.core.schemes import Scheme
from bitalloy.core.units import Offset, UnitGraph, WeightSite
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, bias_slot, constant, consumers, name_of, node_weight_axes, static_shape
from bitalloy.targets.placement import weight_site
from bitalloy.targets.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Bias:
    """The constant bias of a layer that can be rounded."""

    node: str
    """The node that adds it: the layer itself, or the Add behind it."""
    weight: WeightSite
    """The weight of the layer."""
    tensor: str
    """The tensor that the layer reads."""
    axis: int
    """The axis of its channels."""


def find_biases(graph: Graph, units: UnitGraph) -> tuple[Bias, ...]:
    """Find the biases of the layers whose weights can be rounded, in the order of the units."""
    plan, found = units.lowest_gated(), []
    for site in (w for u in units.units if u.id in plan for w in u.weights):
        layer = holder = graph.node[site.node]
        if layer.op_type == "MatMul":
            uses = consumers(layer.outputs[0])
            if len(uses) != 1 or layer.outputs[0].is_graph_output():
                continue
            holder = uses[0].node
        entering = layer.inputs[0]
        if entering is None or constant(entering) is not None or 0 in static_shape(entering):
            continue
        if site.slot != 1 or not _plain(layer):
            continue
        if (holder.op_type == "Add") != (layer.op_type == "MatMul"):
            continue
        slot = bias_slot(holder)
        bias = constant(holder.inputs[slot]) if slot is not None else None
        axis = 1 if layer.op_type == "Conv" else -1
        channels = static_shape(layer.outputs[0])[axis]
        if bias is not None and bias.shape[-1:] == (channels,) == (bias.size,):
            found.append(Bias(name_of(holder), site, str(entering.name), axis))
    return tuple(found)


def _plain(layer: ir.Node) -> bool:
    """Tell whether a layer is a weighted sum of its input and nothing else, with the same weights everywhere."""
    if layer.op_type == "Gemm":
        factors = (attribute(layer, name, 1.0) for name in ("alpha", "beta"))
        return not attribute(layer, "transA", 0) and all(f == 1.0 for f in factors)
    if layer.op_type == "MatMul":
        return len(static_shape(layer.inputs[1])) == 2  # type: ignore[arg-type]
    return layer.op_type == "Conv"


def mean_inputs(
    graph: Graph,
    biases: Iterable[Bias],
    feeds: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Measure what enters the layers on average: tensor -> (channels,) float64.

    Args:
        graph: float.
        biases: the biases of the graph's layers.
        feeds: samples.
        progress: called with 1 after each sample.
    """
    return channel_means(graph.model, {b.tensor: b.axis for b in biases}, feeds, progress)


def bias_offsets(
    graph: Graph, biases: Sequence[Bias], recipe: Recipe, means: Mapping[str, np.ndarray]
) -> dict[str, Offset]:
    """Compute what is added to each bias where its weight is rounded: id of the weight's site -> offset.

    Args:
        graph: float.
        biases: the biases of the graph's layers.
        recipe: decides how weights are rounded, in every scheme that does.
        means: the means that `mean_inputs` gives.
    """
    units = recipe.units
    schemes = {w.id: [s for s in u.choices if _rounds(units.scheme(s))] for u in units.units for w in u.weights}
    found = {}
    for bias in biases:
        layer = graph.node[bias.weight.node]
        weight = constant(layer.inputs[bias.weight.slot])
        assert weight is not None, "weight sites are constants"
        for scheme in schemes[bias.weight.id]:
            lost = weight.astype(np.float64) - recipe.weight(scheme, layer, bias.weight).rounded
            values = _product(layer, lost, means[bias.tensor])
            found[weight_site(bias.weight, scheme).id] = Offset(node=bias.node, values=tuple(values.tolist()))
    return found


def _rounds(scheme: Scheme) -> bool:
    return scheme.gated and scheme.weight is not None


def _product(layer: ir.Node, weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return what a layer makes (outputs,) of an input that is `mean` (inputs,) everywhere."""
    if layer.op_type != "Conv":
        return np.asarray(mean @ np.moveaxis(weight, node_weight_axes(layer), (0, 1)))
    groups = int(attribute(layer, "group", 1))  # type: ignore[call-overload]
    outputs, inputs = weight.shape[:2]
    sums = weight.reshape(groups, outputs // groups, inputs, -1).sum(axis=3)
    return np.asarray(np.einsum("goi,gi->go", sums, mean.reshape(groups, inputs)).reshape(outputs))
