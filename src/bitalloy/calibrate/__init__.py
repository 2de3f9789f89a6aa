"""Ranges of activations: one streaming pass over the data serves every range method."""
