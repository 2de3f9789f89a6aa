"""What a budget keeps in a scheme: patterns turned into units without a choice.

A pattern is a shell glob over the ids of units, their nodes, their regions and operator types, or one of these by name.
`{4..20}` in it stands for every number from 4 to 20. Where two patterns name the same unit the later one holds, so that
a part can be taken out of a larger one.

A pattern takes the choice from every named unit that can run in its scheme. The others of a region stay what they are,
and their reason says so; a pattern of which nothing can run in its scheme is refused, with the reason.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product

import msgspec

from bitalloy.core.errors import BitalloyError
from bitalloy.core.order import natural
from bitalloy.core.plans import Keep
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.model.regions import ancestors
from bitalloy.targets import TARGETS

MOST_NUMBERS = 1000
"""The most numbers that a range in a pattern may stand for."""
MOST_PATTERNS = 10_000
"""The most patterns that all ranges of one pattern may stand for together."""
MOST_DIGITS = 16
"""Digits from which on a number of a range is none of a model's."""
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")


@dataclass(frozen=True)
class ConstrainedUnits:
    """Units after the patterns of a budget were applied to them."""

    units: UnitGraph
    """The units, of which those that are kept have no choice; their reason says by which pattern."""
    kept: frozenset[str]
    """Ids of units that a pattern decides."""


def constrain(
    units: UnitGraph, keeps: Sequence[Keep], operators: Mapping[str, str], *, full: UnitGraph | None = None
) -> ConstrainedUnits:
    """Take the choice from all units that patterns name.

    Args:
        units: the units whose choices are narrowed.
        keeps: patterns in order.
        operators: node -> operator type, of the nodes of the units.
        full: the same units with all that each could run in, where `units` lacks some by advice that patterns overrule.

    Raises:
        BitalloyError: a pattern matches nothing, or nothing of it can run in what it asks for.
    """
    full = full or units
    decided: dict[str, Keep] = {}
    missed: dict[str, Keep] = {}
    for keep in keeps:
        named = _named(full, keep, operators)
        able = [u for u in named if keep.scheme in u.allowed]
        if not able:
            raise BitalloyError(_impossible(keep, named, full))
        for unit in named:
            place = decided if keep.scheme in unit.allowed else missed
            place[unit.id] = keep
    changed = []
    for unit, whole in zip(units.units, full.units, strict=True):
        if unit.id in decided:
            unit = _fixed(whole, decided[unit.id])
        elif unit.id in missed:
            asked = f"{missed[unit.id].scheme.upper()} was asked for ({missed[unit.id]})"
            unit = msgspec.structs.replace(unit, reason=f"{unit.why}; {asked}" if unit.why else asked)
        changed.append(unit)
    return ConstrainedUnits(msgspec.structs.replace(units, units=tuple(changed)), frozenset(decided))


def _fixed(unit: Unit, keep: Keep) -> Unit:
    reason = f"kept in {keep.scheme.upper()} as asked ({keep})"
    return msgspec.structs.replace(unit, allowed=(keep.scheme,), reason=reason)


def _named(units: UnitGraph, keep: Keep, operators: Mapping[str, str]) -> list[Unit]:
    """Find the units that a pattern matches; at least one."""
    patterns = _expanded(keep)
    found = [u for u in units.units if any(fnmatch.fnmatchcase(n, p) for n in _names(u, operators) for p in patterns)]
    if found:
        return found
    known = sorted({name for unit in units.units for name in _names(unit, operators)})
    close = difflib.get_close_matches(keep.pattern, known, n=3, cutoff=0.5)
    regions = sorted({r for unit in units.units for r in ancestors(unit.region)[:-1] if "/" not in r}, key=natural)
    hint = f"Close to it: {', '.join(close)}." if close else f"Regions are: {', '.join(regions[:12]) or 'none'}."
    raise BitalloyError(
        f"--keep '{keep}' matches no unit, node, region or operator type of the model. {hint} Patterns are shell "
        "globs: '*' stands for any text, and {4..20} for any number from 4 to 20."
    )


def _names(unit: Unit, operators: Mapping[str, str]) -> set[str]:
    """Collect all that a pattern may call a unit: itself, nodes, regions but the root, operator types."""
    nodes = (*unit.core, *unit.tail)
    types = {operators[n] for n in nodes if n in operators}
    return {unit.id, unit.kind, *nodes, *ancestors(unit.region)[:-1], *types}


def _impossible(keep: Keep, named: Sequence[Unit], units: UnitGraph) -> str:
    unit, scheme = named[0], keep.scheme.upper()
    absent = keep.scheme not in {known.name for known in units.schemes}
    why = (units.lacks.get(keep.scheme) or _absent(keep.scheme, units.target)) if absent else ""
    why = why or unit.refused.get(keep.scheme) or unit.reason
    others = f" Nor can the {len(named) - 1} other units that it names." if len(named) > 1 else ""
    return (
        f"--keep '{keep}' asks for {scheme} where it is not possible: '{unit.id}' cannot, because {why}.{others} "
        f"It can run in {' or '.join(name.upper() for name in unit.allowed)}. {_able(scheme, units.able(keep.scheme))}"
        "Leave the pattern out, or change it."
    )


def _able(scheme: str, able: Collection[str]) -> str:
    """Say which units of the model can run in a scheme."""
    if not able:
        return f"No unit of the model can run in {scheme} as things are. "
    some = ", ".join(f"'{name}'" for name in sorted(able, key=natural)[:3])
    more = f" and {len(able) - 3} more" if len(able) > 3 else ""
    return f"In {scheme} can run: {some}{more}. "


def _absent(scheme: str, target: str) -> str:
    others = [t.name for t in TARGETS.values() if any(offer.scheme.name == scheme for offer in t.offers)]
    return f"{target} has no {scheme.upper()}; choose --target {' or '.join(others)}"


def _expanded(keep: Keep) -> list[str]:
    """Make a pattern for every number of its ranges.

    Not by the package braceexpand: it would also expand `{a,b}`, keep leading zeros, refuse a lone brace, all of which
    names of nodes may have, and make a list of any length from a range before it can be counted.
    """
    texts = _RANGE.split(keep.pattern)
    ranges = []
    for first, last in zip(texts[1::3], texts[2::3], strict=True):
        low, high = int(first[:MOST_DIGITS]), int(last[:MOST_DIGITS])
        if not low <= high < low + MOST_NUMBERS or max(len(first), len(last)) >= MOST_DIGITS:
            raise BitalloyError(
                f"--keep '{keep}' has the range {{{first}..{last}}}; expected the smaller number first and at most "
                f"{MOST_NUMBERS} numbers, such as {{4..20}}."
            )
        ranges.append([str(number) for number in range(low, high + 1)])
    if (count := math.prod(map(len, ranges))) > MOST_PATTERNS:
        raise BitalloyError(
            f"--keep '{keep}' stands for {count} patterns; expected at most {MOST_PATTERNS}. Use '*' in place of "
            "a range."
        )
    return ["".join(chain(*zip(texts[::3], numbers, strict=False), texts[-1:])) for numbers in product(*ranges)]
