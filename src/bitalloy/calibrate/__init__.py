"""Ranges of activations: one streaming pass over the data, every range method from it."""
