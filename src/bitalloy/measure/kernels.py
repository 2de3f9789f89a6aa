"""Differences between what a model gives as its runtime optimizes it and what its graph says, with their causes.

The graph as it is written, every node by its own kernel, is what predictions are about. A cause is proven by execution:
without it the difference is gone.

Case 1. Sums of pairs of products saturate in 16 bits (`targets.pairs`): gone with unsigned weights.
Case 2. The optimizer rounds weights that the plan keeps in float (`rewrite.floats`): gone without that pass.
Case 3. Integer kernels compute otherwise than the graph says: gone where ONNX Runtime makes none.
Case 4. None of these, or a runtime that cannot be asked to do without: unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from bitalloy.core.errors import ModelError
from bitalloy.core.outcome import KernelEffect
from bitalloy.core.records import Head
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.model.heads import is_divergence
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Runtime
from bitalloy.runtime.ort import ORT, Execution, OrtSession

EFFECT_DB = 1.0
"""A smaller difference in SQNR is no effect: roundings at half a step fall either way."""
FLOAT_DB = 100.0
"""SQNR above which only the order of float32 sums differs."""
UNEXPLAINED = "the cause is not known"
SATURATING = "sums of two products saturate in 16 bits"
ROUNDED_WEIGHTS = "the optimizer rounds weights that the plan keeps in float"
CAUSES: Mapping[str, Execution] = {
    SATURATING: Execution(wide_sums=True),
    ROUNDED_WEIGHTS: Execution(rounds_weights=False),
    f"{SATURATING}, and {ROUNDED_WEIGHTS}": Execution(wide_sums=True, rounds_weights=False),
    "integer kernels compute otherwise than the graph says": Execution(integers=False),
}
"""Cause -> the execution of ONNX Runtime in which it is gone, in the order in which they are tried."""


def kernel_effects(
    reference: Artefact,
    shipped: Artefact,
    heads: Sequence[Head],
    feeds: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[KernelEffect, ...]:
    """Find the heads whose SQNR differs by more than `EFFECT_DB` between a model as optimized and as written.

    Args:
        reference: the float model.
        shipped: a rewritten model, on the runtime that executes it.
        heads: parts of the outputs; divergences are left out.
        feeds: gives the samples, each time from the first.
        progress: called once per sample of the first comparison.
    """
    plain = [head for head in heads if not is_divergence(head.name)]
    written = _by_ort(shipped, partial(OrtSession, optimize=False))
    both = artefact_sqnr(reference, {"shipped": shipped, "written": written}, plain, feeds(), progress=progress)
    found = {
        head.name: (optimized.value, exact.value)
        for head, optimized, exact in zip(plain, both["shipped"], both["written"], strict=True)
        if abs(optimized.value - exact.value) > EFFECT_DB and min(optimized.value, exact.value) < FLOAT_DB
    }
    causes = dict.fromkeys(found, UNEXPLAINED)
    for cause, execution in CAUSES.items() if shipped.runtime is ORT else ():
        left = [head for head in plain if causes.get(head.name) == UNEXPLAINED]
        if not left:
            break
        try:
            without = _by_ort(shipped, partial(OrtSession, execution=execution))
            values = artefact_sqnr(reference, {cause: without}, left, feeds())[cause]
        except ModelError:
            continue  # the runtime refuses the model in this form
        gone = [h.name for h, v in zip(left, values, strict=True) if abs(v.value - found[h.name][1]) <= EFFECT_DB]
        causes.update(dict.fromkeys(gone, cause))
    return tuple(
        KernelEffect(head=name, optimized_db=round(optimized, 3), written_db=round(exact, 3), cause=causes[name])
        for name, (optimized, exact) in found.items()
    )


def _by_ort(artefact: Artefact, open_: Callable[..., OrtSession]) -> Artefact:
    return replace(artefact, runtime=Runtime(ORT.name, open_, ORT.version))
