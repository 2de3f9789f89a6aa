"""Numbers of weights that a quantized file stores, kept where a unit stays in such integers.

A kernel may forbid them: `Scheme.pair_limit`. Then, and where the weight is another one by now, or of another kind of
integers, it is rounded as that of a float file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.store import StageInputs
from bitalloy.core.units import WeightSite
from bitalloy.core.work import Workspace
from bitalloy.formats import find_format
from bitalloy.formats.affine import Affine
from bitalloy.formats.base import QuantParams
from bitalloy.model.dequantizer import GivenWeight
from bitalloy.model.load import Graph
from bitalloy.model.read import constant
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork
from bitalloy.targets.pairs import largest_pairs
from bitalloy.targets.placement import weight_site
from bitalloy.targets.stored import ChosenRounding, ChosenRoundings, read_roundings, write_roundings


class KeptInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides which numbers of weights are kept."""

    network: ExecutedNetwork


def keep_weights(part: Calibrated, work: Workspace) -> ChosenRoundings:
    """Return the roundings of the recipe with those of a quantized file beside them; the same for a float file."""
    if not part.graph.quantization.weights:
        return part.roundings

    def make() -> bytes:
        return write_roundings({**part.roundings.sites, **_kept(part)})

    inputs = KeptInputs(network=part.executed)
    place = work.place("kept", inputs)
    return read_roundings(work.cached("kept", inputs, make), "" if place is None else str(place))


def _kept(part: Calibrated) -> Mapping[str, ChosenRounding]:
    found = {}
    schemes = [s for s in part.units.schemes if s.gated and s.weight and s.granularity is not Granularity.BLOCK]
    for unit in part.units.units:
        for site in unit.weights:
            given = part.graph.quantization.weights.get(site.tensor)
            for scheme in schemes:
                if given is None or scheme.name not in unit.allowed:
                    continue
                rounding = _rounding(part.graph, site, scheme, given)
                if rounding is not None:
                    found[weight_site(site, scheme.name).id] = rounding
    return found


def _rounding(graph: Graph, site: WeightSite, scheme: Scheme, given: GivenWeight) -> ChosenRounding | None:
    node, stored = graph.node[site.node], find_format(scheme.weight)
    weight = constant(node.inputs[site.slot])
    if weight is None or site.axis is None or given.block or given.axis not in (None, site.axis % weight.ndim):
        return None
    channels = weight.shape[site.axis]
    scale = np.ascontiguousarray(np.broadcast_to(given.scale.astype(np.float32), (channels,)))
    middle = 128 if given.numbers.dtype == np.uint8 else 0
    bytes_around_0 = isinstance(stored, Affine) and stored.bits == 8 and stored.signed and stored.symmetric
    if not bytes_around_0 or given.numbers.shape != weight.shape or np.any(given.zero_point != middle):
        return None
    numbers = (given.numbers.astype(np.int16) - middle).astype(np.int8)
    zeros = np.zeros(channels, np.int8)
    params = QuantParams(scale=scale, zero_point=zeros, qmin=-128, qmax=127, axis=site.axis)
    if not np.array_equal(stored.decode(numbers, params), weight):
        return None
    if scheme.pair_limit is not None:
        most = largest_pairs(node, numbers.astype(np.float32), site.axis)
        if np.any(most > scheme.pair_limit):
            return None
    return ChosenRounding(numbers=numbers, scale=scale, zero_point=zeros)
