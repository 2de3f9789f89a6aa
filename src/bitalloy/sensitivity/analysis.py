"""The analysis of a model, which serves every budget."""

from __future__ import annotations

from dataclasses import dataclass

from bitalloy.core.records import RangeChoice, Secant, SensitivityTable
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.sensitivity.matrix import ProbeMatrix


@dataclass(frozen=True, kw_only=True)
class Analysis(Calibrated):
    """Everything that is known about a model before a budget is given."""

    matrix: ProbeMatrix
    """The columns of the probe matrix that belong to this target."""
    secant: Secant
    table: SensitivityTable
    choice: RangeChoice | None = None
    """Gain of choosing a range method per tensor; None where there was only one method to choose from."""
    others: tuple[Analysis, ...] = ()
    """Analyses for the other targets, from the same passes through the network."""

    @property
    def targets(self) -> tuple[Analysis, ...]:
        """This analysis and the others, in the order of the settings."""
        return (self, *self.others)
