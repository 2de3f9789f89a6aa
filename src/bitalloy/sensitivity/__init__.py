"""How rounding disturbs the outputs: predicted for every plan by the probe matrix, or measured exactly."""

from bitalloy.sensitivity.exact import Switchboard, damage, secant
from bitalloy.sensitivity.probe import Prober
from bitalloy.sensitivity.table import sensitivities, settled

__all__ = ["Prober", "Switchboard", "damage", "secant", "sensitivities", "settled"]
