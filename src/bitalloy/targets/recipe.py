"""All that decides how a graph is rounded on a target: one record in place of four arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitalloy.core.jobs import Contexts, Opening, Resident
from bitalloy.core.records import Offset, Record, UnitGraph
from bitalloy.core.store import key_of
from bitalloy.targets import TARGETS, target
from bitalloy.targets.base import Target

Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Recipe:
    """How a target rounds what it can round in a graph."""

    units: UnitGraph
    target: Target
    ranges: Ranges
    """Tensor -> calibrated (low, high)."""
    offsets: Mapping[str, Offset] = field(default_factory=dict)
    """Weight site -> what is added to a bias where the weight is rounded."""


class RecipeData(Record, frozen=True, kw_only=True):
    """A recipe as plain data."""

    units: UnitGraph
    target: str
    """Its name."""
    ranges: dict[str, tuple[float, float]]
    offsets: dict[str, Offset]


def recipe_opening(recipe: Recipe) -> Opening:
    """How jobs come by a recipe; one for a target that has no name among the known ones stays in this process."""
    name = recipe.target.name
    spec = RecipeData(units=recipe.units, target=name, ranges=dict(recipe.ranges), offsets=dict(recipe.offsets))
    if TARGETS.get(name) is not recipe.target:
        return Opening(kind="resident", spec=Resident(what=f"the target '{name}'", key=key_of(recipe=spec)))
    return Opening(kind="recipe", spec=spec)


def open_recipe(spec: RecipeData, _: Contexts) -> Recipe:
    """The recipe of its plain data."""
    return Recipe(spec.units, target(spec.target), spec.ranges, spec.offsets)
