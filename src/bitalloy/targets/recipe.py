"""All that decides how a graph is rounded on a target: one record in place of four arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitalloy.core.units import Offset, UnitGraph
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
