"""Ranges of activations: one streaming pass over the data, every range method from it."""

from bitalloy.calibrate.statistics import METHODS, Statistics
from bitalloy.calibrate.streaming import collect

__all__ = ["METHODS", "Statistics", "collect"]
