"""Adjoint rules, one per operator, in files by group. `RULES` maps an operator to its rule."""

from bitalloy.adjoint.rules import activations, elementwise, indexing, linear, normalize, pool, reductions, shape

RULES = {
    **activations.RULES,
    **elementwise.RULES,
    **indexing.RULES,
    **linear.RULES,
    **normalize.RULES,
    **pool.RULES,
    **reductions.RULES,
    **shape.RULES,
}

__all__ = ["RULES"]
