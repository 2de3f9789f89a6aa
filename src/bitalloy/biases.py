"""Take the mean error of each output channel of INT8 layers out of their biases.

Rounding weights, and clipping what enters, moves the mean of a layer's output. What a mixed model's channel differs by
from the float one, on average over positions and samples, is subtracted from its bias (empirical bias correction, Nagel
et al. 2019, section 4.2, https://arxiv.org/abs/1906.04721). The bias that counts:

Case 1. The third operand of a Conv, ConvTranspose or Gemm in an INT8 unit.
Case 2. The constant vector of an Add that alone reads a MatMul in an INT8 unit, whichever unit the Add is in.

A layer without bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitalloy.channels import channel_means
from bitalloy.graph import Graph, consumers, name_of, static_shape
from bitalloy.records import HALF, UnitGraph
from bitalloy.values import bias_slot


@dataclass(frozen=True, slots=True)
class Bias:
    """A constant bias of a layer that is rounded."""

    node: str
    """That adds it; its result is what is measured."""
    axis: int
    """Of the channels of the result."""


def find_biases(graph: Graph, units: UnitGraph, lowered: frozenset[str]) -> tuple[Bias, ...]:
    """Biases of a plan's INT8 layers, in graph order."""
    half = {n for u in units.units if u.id + HALF in lowered for n in (*u.core, *u.tail)}
    weighted = {w.node for u in units.units if u.id in lowered for w in u.weights}
    found = []
    for node in graph.nodes:
        if name_of(node) not in weighted:
            continue
        if node.op_type == "MatMul":
            uses = consumers(node.outputs[0])
            if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
                continue
            node = uses[0].node
        slot, shape = bias_slot(node), static_shape(node.outputs[0])
        if slot is None or name_of(node) in half:
            continue
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else len(shape) - 1
        value = node.inputs[slot]
        assert value is not None
        bias = static_shape(value)
        if bias and bias[-1] == np.prod(bias) == shape[axis]:
            found.append(Bias(name_of(node), axis))
    return tuple(found)


def mean_outputs(
    model: ir.Model,
    biases: Sequence[Bias],
    feeds: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None] | None = None,
) -> dict[Bias, np.ndarray]:
    """Mean over samples and positions of what every layer puts out.

    Args:
        model: float, or rewritten by `bitalloy.apply`.
        biases: of its layers.
        feeds: samples.
        progress: called with 1 after each sample.

    Returns:
        bias -> (channels,) float64.
    """
    nodes = {n.name: n for n in model.graph}
    tensors = {b: str(nodes[b.node].outputs[0].name) for b in biases}
    means = channel_means(model, {tensors[b]: b.axis for b in biases}, feeds, progress)
    return {b: means[t].mean(axis=0) for b, t in tensors.items()}
