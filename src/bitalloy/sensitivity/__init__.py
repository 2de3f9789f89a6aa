"""Sensitivities: how rounding disturbs the outputs, predicted for every plan by the probe matrix or measured."""
