"""How rounding disturbs the outputs: predicted for every plan by the probe matrix, or measured exactly."""

from bitalloy.sensitivity.correct import corrected, realigned, site_factors
from bitalloy.sensitivity.exact import Measurement, Switchboard, damage, secant
from bitalloy.sensitivity.probe import Prober
from bitalloy.sensitivity.table import alike, groups, sensitivities, settled

__all__ = [
    "Measurement",
    "Prober",
    "Switchboard",
    "alike",
    "corrected",
    "damage",
    "groups",
    "realigned",
    "secant",
    "sensitivities",
    "settled",
    "site_factors",
]
