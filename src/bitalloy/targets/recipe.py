"""All that decides how a graph is rounded on a target, in one record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.core.jobs import Contexts, Opening, Resident
from bitalloy.core.records import Record
from bitalloy.core.schemes import Granularity, Scheme
from bitalloy.core.store import key_of
from bitalloy.core.units import Offset, UnitGraph, WeightSite
from bitalloy.formats import find_format, find_rounding, required_opset
from bitalloy.formats.base import ComputedFloat, Format, QuantParams, Rounding
from bitalloy.model.read import constant, static_shape
from bitalloy.targets import TARGETS, on_devices, target
from bitalloy.targets.base import Target
from bitalloy.targets.pairs import largest_pairs
from bitalloy.targets.placement import weight_site
from bitalloy.targets.stored import ChosenRoundings, RoundingFile, StoredWeight, open_roundings

Ranges: TypeAlias = Mapping[str, tuple[float, float]]
"""Tensor -> calibrated (low, high)."""
PACKED = ", packed"
"""Ending of the name of a form in which equal numbers are stored once, whatever constant they come from."""


@dataclass(frozen=True)
class Recipe:
    """How a target rounds what it can round in a graph."""

    units: UnitGraph
    target: Target
    ranges: Ranges
    offsets: Mapping[str, Offset] = field(default_factory=dict)
    """Id of the site of a weight -> what is added to a bias where the weight is rounded."""
    roundings: ChosenRoundings = field(default_factory=ChosenRoundings)
    """Weights whose stored numbers are not all the nearest ones."""

    @property
    def opset(self) -> int:
        """Smallest version of the ONNX operators in which all that it rounds can be written."""
        used = {name for unit in self.units.units for name in unit.allowed}
        return max((required_opset(scheme) for scheme in self.units.schemes if scheme.name in used), default=0)

    def tensor_params(self, scheme: str, tensor: str) -> tuple[Rounding, QuantParams | None]:
        """Return how tensors are rounded in a scheme, with the parameters for one of them."""
        used = self.units.scheme(scheme)
        found = find_rounding(used.activation)
        return found, None if used.dynamic else found.of_range(*self.ranges[tensor])

    def weight(self, scheme: str, node: ir.Node, site: WeightSite) -> StoredWeight:
        """Say how a weight is stored in a scheme: on the parameters of `stored_weight`, or as `roundings` say."""
        used, weight = self.units.scheme(scheme), constant(node.inputs[site.slot])
        assert weight is not None, "weight sites are constants"
        params = stored_weight(used, node, site)
        stored = find_format(used.weight if site.axis is not None else used.activation)
        nearest = StoredWeight(format=stored, params=params, values=weight)
        return nearest.chosen(self.roundings.sites.get(weight_site(site, scheme).id))


def stored_weight(scheme: Scheme, node: ir.Node, site: WeightSite) -> QuantParams | None:
    """Choose how a weight is stored: by tensor, by channel of `site.axis`, or by block along the reduction.

    A constant without such an axis is stored as the tensors of the scheme are: see `patterns.Constants`.

    With a `pair_limit` the scale of a channel is raised until no two weights that a kernel may add (`largest_pairs`)
    sum to more than the limit: 128 keeps 255 * (|a| + |b|) below 2^15. Where nodes compute in another format than
    float32, scales are numbers of that format (`_representable`).
    """
    axis, weight = site.axis, constant(node.inputs[site.slot])
    assert weight is not None, "weight sites are constants"
    if axis is None:
        return find_format(scheme.activation).of_range(float(weight.min(initial=0.0)), float(weight.max(initial=0.0)))
    stored = find_format(scheme.weight)
    if scheme.granularity is Granularity.BLOCK:
        along = reduction_axis(node, axis, weight.ndim)
        starts = np.arange(0, weight.shape[along], scheme.block)
        low, high = (extreme.reduceat(weight, starts, axis=along) for extreme in (np.minimum, np.maximum))
        found = stored.of_parts(low, high, axis=along, block=scheme.block)
        return _representable(found, find_format(scheme.activation)) if scheme.cast else found
    high = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(axis=1)
    if scheme.pair_limit is not None:
        # rounding may lift both members by half a step
        high = np.maximum(high, largest_pairs(node, weight, axis) * np.float32(127 / (scheme.pair_limit - 1)))
    if scheme.granularity is Granularity.TENSOR:
        high = np.full_like(high, high.max(initial=0.0))
    return stored.of_parts(-high, high, axis=axis)


def _representable(params: QuantParams | None, kind: Format) -> QuantParams | None:
    """Round scales to a format, to its smallest positive number at least: a scale of 0 stands for no number."""
    if params is None:
        return None
    assert isinstance(kind, ComputedFloat), "nodes compute in floating-point formats"
    return replace(params, scale=np.maximum(kind.reference(params.scale), np.float32(kind.least)))


def stored_form(scheme: Scheme, stored: StoredWeight, node: ir.Node, site: WeightSite) -> str:
    """Name the form in which a node stores a weight: those that read a constant in the same form share one copy.

    Kernels pack a matrix and its transpose alike, with equal scales; the name of such a form ends with `PACKED`.
    Products fill up the last block, tables do not. Numbers that were chosen are those of one orientation.
    """
    params, name = stored.params, scheme.name
    if params is None:
        return name
    scale = params.scale
    if scheme.kernel and params.block and site.axis is not None:
        scale = np.moveaxis(scale, site.axis, 0)
        if node.op_type == "Gather" and static_shape(node.inputs[site.slot])[-1] % params.block:  # type: ignore[arg-type]
            name = f"{name} of rows"
    digest = hashlib.sha256(np.ascontiguousarray(scale).tobytes() + stored.digest.encode()).hexdigest()[:12]
    return f"{name} {digest}{PACKED}" if scheme.kernel else f"{name} {digest} along {site.axis}"


def reduction_axis(node: ir.Node, channels: int, rank: int) -> int:
    """Return the axis along which a layer sums: the other one of a matrix, the input channels of a convolution."""
    if rank == 2:
        return 1 - channels % 2
    return 0 if node.op_type == "ConvTranspose" else 1


class RecipeData(Record, frozen=True, kw_only=True):
    """A recipe as plain data, from which any process can make it again."""

    units: UnitGraph
    target: str
    """Name of the target."""
    device: str
    """Id of the device that it is on; empty for the one that it has by itself, or none."""
    ranges: dict[str, tuple[float, float]]
    offsets: dict[str, Offset]
    roundings: RoundingFile | None = None
    """Weights whose stored numbers are not all the nearest ones."""


def recipe_opening(recipe: Recipe) -> Opening:
    """Describe how jobs come by a recipe.

    It stays in this process for a target without a known name, and with chosen roundings that are in no file.
    """
    found, file = recipe_identity(recipe), recipe.roundings.file
    if file is None or found.kind == "resident":
        return found
    if not file.path:
        return _resident("the rounded weights of a model", found.spec)
    return Opening(kind="recipe", spec=msgspec.structs.replace(found.spec, roundings=file))


def recipe_identity(recipe: Recipe) -> Opening:
    """Say all that decides a recipe, for keys: as `recipe_opening`, wherever its files lie."""
    name = recipe.target.name
    known = {"": TARGETS[name], **on_devices(TARGETS[name])} if name in TARGETS else {}
    device = next((d for d, found in known.items() if found == recipe.target), None)
    spec = RecipeData(
        units=recipe.units,
        target=name,
        device=device or "",
        ranges=dict(recipe.ranges),
        offsets=dict(recipe.offsets),
        roundings=RoundingFile(path="", sha256=recipe.roundings.sha256) if recipe.roundings.sha256 else None,
    )
    return Opening(kind="recipe", spec=spec) if device is not None else _resident(f"the target '{name}'", spec)


def _resident(what: str, spec: RecipeData) -> Opening:
    return Opening(kind="resident", spec=Resident(what=what, key=key_of(spec)))


def open_recipe(spec: RecipeData, _: Contexts) -> Recipe:
    """Make the recipe from its plain data."""
    roundings = open_roundings(spec.roundings)
    return Recipe(spec.units, target(spec.target, spec.device), spec.ranges, spec.offsets, roundings)
