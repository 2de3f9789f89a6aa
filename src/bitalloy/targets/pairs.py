"""Which integer kernels add pairs of products in 16 bits, and which weights meet there.

On x86 CPUs without VNNI (AVX2, AVX-512) products of uint8 and int8 are taken by vpmaddubsw, which adds two of them in
16 bits and saturates: 2 * 255 * 127 > 2^15. ONNX Runtime 1.32 does so in every matrix product with int8 weights (MLAS,
U8S8 and S8S8), and its convolutions are such products over (kernel, channel), except the depthwise ones, which have a
kernel of their own. Products with uint8 weights are added in 32 bits. OpenVINO 2026.4 (oneDNN) pairs neighbouring
channels, in groups too. `tests/targets/test_pairs.py` executes every row of `ADDS_PAIRS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitalloy.model.read import attribute


class Channels(StrEnum):
    """Which channels one group of a convolution or a matrix product sums up."""

    DENSE = "several input channels"
    GREY = "one input channel, no groups"
    MULTIPLIER = "one input channel, several output channels in each of several groups"
    DEPTHWISE = "one input channel, one output channel"


ADDS_PAIRS: Mapping[tuple[str, Channels], bool] = {
    ("Conv", Channels.DENSE): True,
    ("Conv", Channels.GREY): True,
    ("Conv", Channels.MULTIPLIER): True,
    ("Conv", Channels.DEPTHWISE): False,
    ("Gemm", Channels.DENSE): True,
    ("MatMul", Channels.DENSE): True,
}
"""Operator and its channels -> whether a runtime's kernel with int8 weights adds pairs. Kernels of OpenVINO do not for
`GREY`; those of ONNX Runtime do. What is not listed counts as adding pairs."""


def channels_of(node: ir.Node, shape: tuple[int, ...]) -> Channels:
    """Tell which channels a weighted node sums up; `shape` is that of its weights."""
    if node.op_type != "Conv" or shape[1] != 1:
        return Channels.DENSE
    groups = attribute(node, "group", 1)
    if groups == shape[0]:
        return Channels.DEPTHWISE
    return Channels.GREY if groups == 1 else Channels.MULTIPLIER


def largest_pairs(node: ir.Node, weight: NDArray[np.floating], axis: int) -> NDArray[np.floating]:
    """Return the largest sum of the magnitudes of two weights that a kernel may add, for each channel.

    Args:
        node: the node that reads the weight.
        weight: its weight; any rank.
        axis: along which the channels run. Weights of a channel are neighbours in both orders that kernels use,
            (channel, kernel) and (kernel, channel), in which "channel" is the axis that the node sums over.

    Returns:
        (channels,), 0 where the kernel adds no pairs.
    """
    rows = np.abs(np.moveaxis(weight, axis, 0))
    if not ADDS_PAIRS.get((node.op_type, channels_of(node, weight.shape)), True):
        return np.zeros(len(rows), rows.dtype)
    orders = [rows] if rows.ndim < 3 else [rows, np.moveaxis(rows, 1, -1)]
    flat = [order.reshape(len(rows), -1) for order in orders]
    sums = [(f[:, 1:] + f[:, :-1]).max(axis=1, initial=0.0) for f in flat]
    return np.asarray(np.maximum(sums[0], sums[-1]))
