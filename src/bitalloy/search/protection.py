"""What a model's family keeps in float, unless measurement says otherwise.

The exporter of a family writes its advice into the ONNX file (`bitalloy.protect`): patterns of nodes, each with a
reason and its source. Advice is a default, not a fact about this model on this data, and the probe matrix has columns
for the sites of protected units too. A protected unit is free where rounding it alone does at most `LEAST_DAMAGE_SHARE`
of what rounding everything does, on every head; the search then treats it as any other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.model.load import Graph
from bitalloy.model.metadata import PROTECT, read_fact
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.placement import rounded

LEAST_DAMAGE_SHARE = 0.01
"""Part of the damage of the model with all it can rounded that a unit must do to be protected."""


class FamilyAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a model file's metadata: nodes that its family keeps in float, and why."""

    pattern: str
    """Glob over node names."""
    reason: str
    source: str


@dataclass(frozen=True)
class ProtectedUnits:
    """The units of a model after the advice of its family was held against measurement."""

    units: UnitGraph
    """The units, of which those that are protected have no choice."""
    kept: Mapping[str, str]
    """Protected unit -> why it stays in float."""
    freed: Mapping[str, str]
    """Unit that the advice names -> why measurement overrules it."""


def read_advice(graph: Graph) -> tuple[FamilyAdvice, ...]:
    """Read what the model's file advises.

    Raises:
        ModelError: the entry is damaged.
    """
    return read_fact(graph.metadata, PROTECT, tuple[FamilyAdvice, ...], ())


def protect(advice: Sequence[FamilyAdvice], units: UnitGraph, matrix: ProbeMatrix) -> ProtectedUnits:
    """Take the choice from units that the family protects and whose measured damage bears it out.

    Args:
        advice: what the model's family advises, from `read_advice`.
        units: all units of the model.
        matrix: probe matrix with the sites of all of them.
    """
    whole = _damage(matrix, units, units.lowest_gated())
    kept: dict[str, str] = {}
    freed: dict[str, str] = {}
    changed = []
    for unit in units.units:
        named = next((a for a in advice if any(fnmatch.fnmatchcase(n, a.pattern) for n in unit.core)), None)
        gated = [name for name in unit.choices if units.scheme(name).gated]
        for name in gated if named is not None else ():
            assert named is not None
            shares = _damage(matrix, units, Plan.of(name, unit.id)) / np.maximum(whole, 1e-30)
            share = float(np.max(shares[matrix.plain]))
            measured = f"measured: {100 * share:.3g} % of the damage of all {name.upper()}"
            default = f"{named.reason} {named.source}"
            if share <= LEAST_DAMAGE_SHARE:
                freed[unit.id] = f"protected by default ({default}), but free here; {measured}"
            else:
                kept[unit.id] = f"protected by default: {default}; {measured}, above {100 * LEAST_DAMAGE_SHARE:g} %"
                unit = unit.without(name, kept[unit.id])
        changed.append(unit)
    return ProtectedUnits(msgspec.structs.replace(units, units=tuple(changed)), kept, freed)


def _damage(matrix: ProbeMatrix, units: UnitGraph, plan: Plan) -> np.ndarray:
    """Predict the relative error energy (heads,) of a plan with sites taken as independent."""
    return np.asarray(matrix.site_damage().mean(axis=0) @ matrix.select(rounded(units, plan)))
