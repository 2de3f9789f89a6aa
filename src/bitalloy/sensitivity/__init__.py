"""How rounding disturbs the outputs: predicted for every plan by the probe matrix, or measured exactly."""

from bitalloy.sensitivity.columns import Scheme, views
from bitalloy.sensitivity.correct import Correction, Finding, correct, damage_of
from bitalloy.sensitivity.exact import Measurement, Switchboard, damage, secant
from bitalloy.sensitivity.probe import Prober
from bitalloy.sensitivity.ranges import choose, late, picked
from bitalloy.sensitivity.table import alike, groups, sensitivities, settled

__all__ = [
    "Correction",
    "Finding",
    "Measurement",
    "Prober",
    "Scheme",
    "Switchboard",
    "alike",
    "choose",
    "correct",
    "damage",
    "damage_of",
    "groups",
    "late",
    "picked",
    "secant",
    "sensitivities",
    "settled",
    "views",
]
