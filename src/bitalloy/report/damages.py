"""Rows of a study: the damage of regions, kinds of operators, weights and activations, and sides of questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import combinations

from bitalloy.core.records import Estimate
from bitalloy.core.schemes import BASELINE
from bitalloy.core.studies import PartContrast, PartDamage
from bitalloy.core.units import Unit
from bitalloy.search.planning import PlanTables
from bitalloy.sensitivity.parts import (
    KINDS,
    Effects,
    PartEffect,
    difference_db,
    mean_effect,
    operator_kind,
    top_regions,
)
from bitalloy.zoo.questions import LANGUAGE_PARTS, SIDES, Side

MOST_SENSITIVE = "Which part of MobileVLM is the most sensitive?"
"""The question of which all pairs of parts are contrasts."""


class DamageRows:
    """Rows and contrasts of one model on one target.

    Args:
        effects: damages of sets of units.
        tables: units, cost table and operators.
        depthwise: nodes that are depthwise convolutions.
        row: makes a row of its own fields, with model, family, target and schemes filled in.
        start: what ids of rows begin with.
    """

    def __init__(
        self,
        effects: Effects,
        tables: PlanTables,
        depthwise: frozenset[str],
        row: Callable[..., PartDamage],
        start: str,
    ) -> None:
        self._effects, self._tables, self._depthwise = effects, tables, depthwise
        self._row, self._start = row, start
        self._samples = effects.matrix.samples
        self._times = {cost.unit: cost.us for cost in tables.cost.units}
        self._lowest = tables.units.lowest_name
        self.rows: list[PartDamage] = []
        self.contrasts: list[PartContrast] = []

    def collect(self) -> DamageRows:
        """Fill in everything, and return this."""
        units = self._tables.units
        for name, region in top_regions(units).items():
            self._add("region", name, self._effects.of_units(region), region)
        kinds: dict[str, list[Unit]] = {}
        for unit in units.units:
            if unit.choices:
                kinds.setdefault(operator_kind(unit, self._tables.facts.operators, self._depthwise), []).append(unit)
        for name, members in kinds.items():
            self._add("operator", name, self._effects.of_units(members), members)
        for name, part in KINDS.items():
            self._add("kind", name, self._effects.of_kind(part), ())
        for question in SIDES:
            self._contrast(question.text, [question.first, question.second])
        self._contrast(MOST_SENSITIVE, LANGUAGE_PARTS)
        self._formats(LANGUAGE_PARTS)
        return self

    def _add(self, scope: str, part: str, effect: PartEffect | None, members: Iterable[Unit], scheme: str = "") -> str:
        if effect is None:
            return ""
        ratio = self._ratio(members, scheme or None)
        name = f"{self._start}/{scope}/{part}" + (f"/{scheme}" if scheme else "")
        shared = scope in ("region", "operator", "kind")
        common = {"scope": scope, "part": part, "scheme": scheme or self._lowest, "units": effect.units}
        self.rows.append(
            self._row(
                id=name,
                head="",
                sqnr_db=mean_effect(effect, self._samples),
                share=_mean(effect.share) if shared else None,
                latency_ratio=ratio,
                **common,
            )
        )
        if shared:
            for head, sqnr, share in zip(self._effects.heads, effect.sqnr, effect.share, strict=True):
                self.rows.append(
                    self._row(id=f"{name}@{head}", head=head, sqnr_db=sqnr, share=share, latency_ratio=ratio, **common)
                )
        return name

    def _ratio(self, members: Iterable[Unit], scheme: str | None) -> float | None:
        """Time of units in a scheme, or the lowest of each, over that in float, without borders; None if unknown."""
        known = (u for u in members if u.id in self._times and u.choices)
        found = [(self._times[u.id], scheme or u.choices[0]) for u in known]
        pairs = [(us[name], us[BASELINE]) for us, name in found if name in us]
        before = sum(b for _, b in pairs)
        return round(sum(a for a, _ in pairs) / before, 4) if before > 0 else None

    def _members(self, side: Side) -> list[Unit]:
        return [u for u in self._tables.units.units if any(fnmatchcase(u.region, glob) for glob in side.regions)]

    def _heads(self, side: Side) -> list[str]:
        return [h for h in self._effects.heads if any(fnmatchcase(h, glob) for glob in side.heads)]

    def _contrast(self, question: str, sides: Sequence[Side]) -> None:
        """Add the sides of a question, where the model has all of them, and the contrasts of all pairs."""
        found = []
        for side in sides:
            members = self._members(side)
            effect = self._effects.of_units(members, heads=self._heads(side))
            if effect is not None:
                found.append((side, members, effect))
        if len(found) < len(sides):
            return
        names = [self._add("side", side.name, effect, members) for side, members, effect in found]
        for (i, (_, _, one)), (j, (_, _, other)) in combinations(enumerate(found), 2):
            self.contrasts.append(
                PartContrast(
                    question=question,
                    model=self.rows[0].model,
                    target=self.rows[0].target,
                    schemes=self.rows[0].schemes,
                    first=names[i],
                    second=names[j],
                    value=difference_db(one, other, self._samples),
                )
            )

    def _formats(self, sides: Sequence[Side]) -> None:
        """Add every part of a model that has all of them, in every scheme that some of its units may take."""
        if not all(self._members(side) for side in sides):
            return
        for side in sides:
            members = self._members(side)
            for scheme in (s.name for s in self._tables.units.schemes if s.name != BASELINE):
                able = [u for u in members if scheme in u.allowed]
                self._add("format", side.name, self._effects.of_units(able, scheme), able, scheme)


def _mean(shares: Sequence[Estimate]) -> Estimate:
    """Return the mean of shares of several heads, and of the ends of their intervals."""
    ends = ((s.value, s.low, s.high) for s in shares)
    value, low, high = (round(sum(column) / len(shares), 4) for column in zip(*ends, strict=True))
    return Estimate(value=value, low=low, high=high)
