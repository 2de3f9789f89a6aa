"""Adjoint rules, one per operator, in files by group. `RULES` maps an operator to its rule."""

from bitalloy.adjoint.rules import elementwise, linear, normalize, pool, shape

RULES = {**elementwise.RULES, **linear.RULES, **normalize.RULES, **pool.RULES, **shape.RULES}

__all__ = ["RULES"]
