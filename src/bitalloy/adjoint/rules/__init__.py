"""Adjoint rules, one per operator, in one file per group. `RULES` maps an operator to its rule."""

from bitalloy.adjoint.rules import (
    activations,
    elementwise,
    indexing,
    linear,
    normalize,
    pool,
    recurrent,
    reductions,
    sampling,
    shape,
    spectral,
)

RULES = {
    **activations.ACTIVATION_RULES,
    **elementwise.ELEMENTWISE_RULES,
    **indexing.INDEXING_RULES,
    **linear.LINEAR_RULES,
    **normalize.NORMALIZATION_RULES,
    **pool.POOL_RULES,
    **recurrent.RECURRENT_RULES,
    **reductions.REDUCTION_RULES,
    **sampling.SAMPLING_RULES,
    **shape.SHAPE_RULES,
    **spectral.SPECTRAL_RULES,
}

__all__ = ["RULES"]
