"""Everything that is known about a model before a budget is given."""

from __future__ import annotations

from dataclasses import dataclass

from bitalloy.core.records import RangeChoice, Secant, SensitivityTable
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.sensitivity.matrix import ProbeMatrix


@dataclass(frozen=True, kw_only=True)
class Analysis(Calibrated):
    """Everything that is known about a model before a budget is given."""

    matrix: ProbeMatrix
    """Columns of this target."""
    secant: Secant
    table: SensitivityTable
    choice: RangeChoice | None = None
    """What choosing the ranges per tensor brought; None where one method was asked for or is all there is."""
    others: tuple[Analysis, ...] = ()
    """The same for the other targets, from the same passes through the network."""

    @property
    def targets(self) -> tuple[Analysis, ...]:
        """This analysis and the others, in the order of the settings."""
        return (self, *self.others)
