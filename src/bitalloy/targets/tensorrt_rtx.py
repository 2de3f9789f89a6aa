"""TensorRT for RTX, whose compiler builds engines for a GPU on a machine that has none: what it accepts is tried.

Facts from engines of version 1.7.1, built for SM75 to SM121 from the golden graphs of these cases; they name every
kernel with the types that it reads:

Case 1. What `targets.tensorrt` says of convolutions, products, attention, residual Adds, Concat, FP16, BF16, FP8, INT4
        and tables holds: its golden graphs compile, and kernels read the planned types, but for the cases below.
Case 2. Biases stay float. An INT32 bias behind a DequantizeLinear is refused in front of a Conv ("input has type Int32
        but must have type FP8, FP4, Int4, Int8, or UInt8"); a float constant is taken.
Case 3. ConvTranspose is not rounded: the compiler widens rounded operands to floats, and computes in float.
Case 4. Convolutions in groups of fewer than 4 input channels, such as depthwise ones, are not rounded: a kernel in
        front of the convolution puts zeros between the channels until every group has 4, so that a depthwise one reads
        four times as many numbers, where FP16 needs no such kernel.
Case 5. A matrix in INT4 whose reduction is one block as a whole is not stored: a kernel of its own widens it to FP16 in
        every run. From two blocks on the product reads INT4.
Case 6. A kernel that reads rounded numbers never rounds what it writes, but for products of matrices with one scale for
        all weights: a kernel of its own behind it does. With weights per channel and scales in float32 it writes
        float32, and the kernel behind it multiplies by the scales of the channels. Where both DequantizeLinear make
        FP16 on one scale each, it writes FP16, half as much, and the multiplication stays where it was: the form in
        which plans are written (`rewrite.sums`). FP16 layers have no such kernel; SiLU, bias and Add run inside them.
Case 7. Which schemes a GPU runs: FP8 from SM89 on, BF16 and INT4 from SM80 on; otherwise the compiler refuses the model
        ("contains HW-specific datatypes"). INT8 from SM80 on, too: for SM75 the compiler widens the operands of
        convolutions to floats, and refuses products that write float32 ("check_turing_op_compatibility").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from bitalloy.core.schemes import Granularity
from bitalloy.model.load import Graph
from bitalloy.model.read import attribute, constant, static_shape
from bitalloy.runtime.tensorrt_rtx import CAPABILITIES, missing_compiler
from bitalloy.targets.base import Core, Offer
from bitalloy.targets.patterns import stored_sizes
from bitalloy.targets.tensorrt import TENSORRT

LEAST_GROUP = 4
"""Input channels of a group from which on a convolution reads INT8 as it is (case 4)."""


def _match(node: ir.Node, graph: Graph) -> Core:
    core = TENSORRT.match(node, graph)
    reason = _without_integers(node) if core.weights and not core.unfit else ""
    return replace(core, unfit=reason) if reason else core


def _without_integers(node: ir.Node) -> str:
    """Cases 3 and 4."""
    if node.op_type == "ConvTranspose":
        return "TensorRT for RTX widens the operands of a ConvTranspose to floats"
    if node.op_type == "Conv" and attribute(node, "group", 1) != 1 and constant(node.inputs[1]) is not None:
        depth = static_shape(node.inputs[1])[1]  # type: ignore[arg-type]
        if depth < LEAST_GROUP:
            return (
                f"TensorRT for RTX fills groups of fewer than {LEAST_GROUP} channels with zeros, in a kernel of its "
                f"own, and these have {depth}"
            )
    return ""


def _offered(offer: Offer) -> Offer:
    if offer.scheme.granularity is not Granularity.BLOCK or offer.scheme.gather:
        return offer
    return replace(offer, refuse=_two_blocks(offer.scheme.block, offer.refuse))


def _two_blocks(
    block: int, refuse: Callable[[Core, Sequence[ir.Node]], str]
) -> Callable[[Core, Sequence[ir.Node]], str]:
    """Case 5."""

    def refused(core: Core, nodes: Sequence[ir.Node]) -> str:
        reason = refuse(core, nodes)
        if not reason and stored_sizes(core)[0] <= block:
            return f"TensorRT for RTX widens a matrix of one block of {block} in every run"
        return reason

    return refused


TENSORRT_RTX = replace(
    TENSORRT,
    name="tensorrt-rtx",
    describe="TensorRT for RTX, strongly typed: FP16; INT8 and, from SM89 on, FP8 in Q/DQ form, weights per channel; "
    "with --schemes BF16, and products in w4, w4-128 (INT4 weights alone); compiled here where it is installed",
    offers=tuple(map(_offered, TENSORRT.offers)),
    match=_match,
    rounds_apart=True,
    native=None,
    missing=missing_compiler,
    capabilities=frozenset(CAPABILITIES),
    least_capability={"int8": 80},
)
