"""What a model's family keeps in float, unless measurement says otherwise.

The exporter of a family writes its advice into the ONNX file (`bitalloy.protect`): patterns of nodes, each with a
reason and its source. Advice is a default, not a fact about this model on this data, and the probe matrix has columns
for the sites of protected units too. A protected unit is free where rounding it alone does at most `SHARE` of what
rounding everything does, on every head; the search then treats it as any other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from bitalloy.core.errors import ModelError
from bitalloy.core.records import Precision, UnitGraph
from bitalloy.model.load import Graph
from bitalloy.model.metadata import PROTECT
from bitalloy.sensitivity.matrix import ProbeMatrix

SHARE = 0.01
"""Of the damage of the all-INT8 model."""


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a file's metadata."""

    pattern: str
    """Glob over node names."""
    reason: str
    source: str


@dataclass(frozen=True)
class Protection:
    """What the advice comes to on one model."""

    units: UnitGraph
    """In which protected units have no choice."""
    kept: Mapping[str, str]
    """Protected unit -> why it stays in float."""
    freed: Mapping[str, str]
    """Unit that the advice names -> why measurement overrules it."""


def read_advice(graph: Graph) -> tuple[Advice, ...]:
    """What the model's file says.

    Raises:
        ModelError: the entry is damaged.
    """
    try:
        return msgspec.json.decode(graph.metadata.get(PROTECT, "[]"), type=tuple[Advice, ...])
    except msgspec.MsgspecError as error:
        raise ModelError(
            f"The metadata '{PROTECT}' of '{graph.source}' is damaged: {error}. Export it again, or add --no-protect."
        ) from error


def protect(advice: Sequence[Advice], units: UnitGraph, matrix: ProbeMatrix) -> Protection:
    """Take the choice from units that the family protects and whose measured damage bears it out.

    Args:
        advice: of the model's family, from `read_advice`.
        units: all units of the model.
        matrix: probe matrix with the sites of all of them.
    """
    free = units.quantizable()
    whole = _damage(matrix, units, free)
    kept: dict[str, str] = {}
    freed: dict[str, str] = {}
    for unit in units.units:
        named = next((a for a in advice if any(fnmatch.fnmatchcase(n, a.pattern) for n in unit.core)), None)
        if named is None or unit.id not in free:
            continue
        shares = _damage(matrix, units, frozenset({unit.id})) / np.maximum(whole, 1e-30)
        share = float(np.max(shares[matrix.plain]))
        measured = f"measured: {100 * share:.3g} % of the damage of all INT8"
        if share <= SHARE:
            freed[unit.id] = f"protected by default ({named.reason} {named.source}), but free here; {measured}"
        else:
            kept[unit.id] = f"protected by default: {named.reason} {named.source}; {measured}, above {100 * SHARE:g} %"
    changed = (u.without(Precision.INT8, kept[u.id]) if u.id in kept else u for u in units.units)
    return Protection(msgspec.structs.replace(units, units=tuple(changed)), kept, freed)


def _damage(matrix: ProbeMatrix, units: UnitGraph, int8: frozenset[str]) -> np.ndarray:
    """(heads,): mean relative error energy of a set of units, sites taken as independent."""
    return np.asarray(matrix.site_damage().mean(axis=0) @ matrix.select(units.rounded(int8)))
