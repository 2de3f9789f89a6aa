"""What parts of a model do to its outputs: regions, kinds of operators, weights and activations, on one scale.

The scale is the relative error energy ||sum J e||^2 / ||y||^2 of a head (`ProbeMatrix.damage`), so that parts of
different models can be compared: as SQNR in dB, and as shares of the damage of all roundings of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bitalloy.core.records import Estimate
from bitalloy.core.schemes import Plan
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.model.regions import ancestors
from bitalloy.sensitivity.matrix import (
    CEILING_DB,
    FLOOR_DB,
    ProbeMatrix,
    decibel,
    draws,
    lognormal_limit,
    reach_of,
    sqnr_interval,
)
from bitalloy.targets.placement import ACTIVATIONS, WEIGHTS, all_sites, rounded, site_owners

ROUNDED_PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
NORMALIZING = frozenset(
    {"LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"}
    | {"ReduceMean", "Pow", "Sqrt", "Reciprocal", "LpNormalization"}
)
ACTIVATING = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf"}
    | {"Gelu", "Softplus", "Softsign", "Mish", "ThresholdedRelu", "SiLU", "Swish"}
)
MOVING = frozenset({"Concat", "Resize", "Upsample", "Split", "Slice", "Gather", "Pad", "Transpose", "Reshape"})
MOST_GROUPS = 16
"""Regions beside each other in a comparison; a deeper level of the tree is taken only where it has no more."""
LEAST_GROUPS = 3


@dataclass(frozen=True)
class PartEffect:
    """The damage of a part, with what a bootstrap over samples makes of it."""

    units: int
    sqnr: tuple[Estimate, ...]
    """Of each head, in dB."""
    share: tuple[Estimate, ...]
    """Part of the damage of all roundings of the model on each head, 0 to 1."""
    damage: float
    """Mean relative error energy over the heads."""
    drawn: np.ndarray
    """Bootstrap draws of it: (draws,)."""
    most: float
    """Upper end of its interval where damages of samples are lognormal."""


def operator_kind(unit: Unit, operators: Mapping[str, str], depthwise: frozenset[str]) -> str:
    """Name the kind of work of a unit, as quantization tells them apart.

    Args:
        unit: the unit.
        operators: node -> operator type.
        depthwise: nodes that are convolutions of each channel alone.
    """
    first = operators.get(unit.core[0], unit.kind) if unit.core else unit.kind
    types = {operators.get(node, unit.kind) for node in unit.core} or {unit.kind}
    if types & {"Conv", "ConvTranspose"}:
        return "depthwise convolution" if depthwise.intersection(unit.core) else "convolution"
    if types & ROUNDED_PRODUCTS:
        return "product with weights" if unit.weights else "attention product"
    if "Softmax" in types:
        return "Softmax"
    if types & NORMALIZING or "norm" in unit.region.lower().rpartition("/")[2]:
        return "normalization"
    if types & ACTIVATING:
        return "activation"
    if first in MOVING:
        return "Concat, Resize and moves"
    return "other elementwise"


def top_regions(units: UnitGraph) -> dict[str, tuple[Unit, ...]]:
    """Divide a model into a few regions: the highest level of its region tree that has at least three of them.

    Returns:
        Region -> its units, in the order of the graph; units above the level stand under their own region.
    """
    found: dict[str, list[Unit]] = {}
    for level in (1, 2, 3):
        at_level: dict[str, list[Unit]] = {}
        for unit in units.units:
            path = [*reversed(ancestors(unit.region))][1:]
            at_level.setdefault(path[min(level, len(path)) - 1] if path else unit.region or "(model)", []).append(unit)
        if found and len(at_level) > MOST_GROUPS:
            break
        found = at_level
        if len(found) >= LEAST_GROUPS:
            break
    return {name: tuple(members) for name, members in found.items()}


class Effects:
    """Damages of any sets of units of one model on one target.

    Args:
        matrix: the probe matrix of the target.
        units: the model on it.
        seed: seed of the bootstrap.
    """

    def __init__(self, matrix: ProbeMatrix, units: UnitGraph, seed: int) -> None:
        self.matrix, self.units = matrix, units
        self.heads = tuple(h for h, plain in zip(matrix.heads, matrix.plain, strict=True) if plain)
        self._plain = np.flatnonzero(matrix.plain)
        self._weights = draws(matrix.samples, seed)
        self._owners = site_owners(units)
        self._lowest = units.lowest_gated()
        self._sites = rounded(units, self._lowest)
        self._alone = matrix.site_damage()[:, self._plain]  # (samples, heads, sites)
        self._all = self._alone @ matrix.select(self._sites)  # (samples, heads)

    def of_units(
        self, members: Iterable[Unit], scheme: str | None = None, heads: Iterable[str] | None = None
    ) -> PartEffect | None:
        """Return what rounding all of some units that can does; None where none of them can, or there is no head.

        Args:
            members: the units.
            scheme: scheme that they are put into; by default the lowest that each may take.
            heads: heads that count; all by default.
        """
        known = self.heads if heads is None else set(heads)
        at = np.array([i for i, name in enumerate(self.heads) if name in known], np.int64)
        wanted = {u.id: self._lowest.scheme_of(u.id) if scheme is None else scheme for u in members}
        chosen = {u: s for u, s in wanted.items() if s in self.units.allowed[u] and s != self.units.schemes[0].name}
        if not chosen or not len(at):
            return None
        owned = [s for s in self._sites if self._owners.get(s) in chosen]
        return self._effect(rounded(self.units, Plan(chosen)), owned, len(chosen), at)

    def of_kind(self, part: str) -> PartEffect | None:
        """Return what rounding all weights, or all activations, does."""
        kinds = {site.id: site.part for site in all_sites(self.units)}
        sites = [s for s in self._sites if kinds.get(s) == part]
        count = len({self._owners.get(s) for s in sites})
        return self._effect(sites, sites, count, np.arange(len(self.heads))) if sites else None

    def _effect(self, sites: Iterable[str], owned: Iterable[str], count: int, at: np.ndarray) -> PartEffect:
        chosen = self.matrix.select(sites)
        each = self.matrix.damage(chosen)[:, self._plain][:, at]
        drawn = self.matrix.resampled(chosen, self._weights)[:, self._plain][:, at]
        found = zip(each.mean(axis=0), drawn.T, lognormal_limit(each), strict=True)
        return PartEffect(
            units=count,
            sqnr=tuple(sqnr_interval(*of_head, len(each)) for of_head in found),
            share=self._share(owned, at),
            damage=float(each.mean()),
            drawn=drawn.mean(axis=1),
            most=float(lognormal_limit(each.mean(axis=1))),
        )

    def _share(self, owned: Iterable[str], at: np.ndarray) -> tuple[Estimate, ...]:
        part = self._alone[:, at] @ self.matrix.select(owned)
        found = []
        for mine, everything in zip(part.T, self._all.T[at], strict=True):
            total = self._weights @ everything
            shares = np.divide(self._weights @ mine, total, out=np.zeros_like(total), where=total > 0)
            low, high = np.percentile(shares, [2.5, 97.5])
            value = float(mine.sum() / everything.sum()) if everything.sum() > 0 else 0.0
            found.append(Estimate(value=round(value, 4), low=round(float(low), 4), high=round(float(high), 4)))
        return tuple(found)


def mean_effect(effect: PartEffect, samples: int) -> Estimate:
    """Return the SQNR of the mean damage over the heads, in dB, with its interval."""
    return sqnr_interval(effect.damage, effect.drawn, effect.most, samples)


def difference_db(first: PartEffect, second: PartEffect, samples: int) -> Estimate:
    """Return by how many dB the first part does more damage than the second, with a 95 % interval.

    Both are of one probe matrix, so that each draw takes the same samples for both.

    Args:
        first: one part.
        second: the other.
        samples: number of samples; one leaves the interval open.
    """
    value = float(decibel(np.asarray(second.damage)) - decibel(np.asarray(first.damage)))
    if samples < 2:
        return Estimate(value=round(value, 3), low=2 * FLOOR_DB, high=2 * CEILING_DB)
    low, high = np.percentile(decibel(second.drawn) - decibel(first.drawn), [2.5, 97.5])
    reach = reach_of(value, float(low), float(high), samples)
    return Estimate(value=round(value, 3), low=round(value - reach, 3), high=round(value + reach, 3))


KINDS = {"weights": WEIGHTS, "activations": ACTIVATIONS}
"""Parts of all roundings by name."""
