"""Put what was measured exactly into the probe matrix, so that every plan's prediction gains from it.

A thing (unit or site) that was measured alone has a factor per head: measured over predicted damage. The columns of
its sites are scaled by the square root of that factor, which multiplies its own damage by the factor and keeps its
correlations with all other columns. A site that several measured things round gets the geometric mean of their
factors; one that was measured itself, its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np

from bitalloy.matrix import ProbeMatrix
from bitalloy.records import Secant

LARGEST_FACTOR = 100.0
"""And its inverse the smallest: beyond 20 dB the prediction is wrong in kind, not in size."""


def site_factors(measured: Mapping[frozenset[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Factors (heads,) of sites, from those of sets of sites."""
    logs: dict[str, list[np.ndarray]] = defaultdict(list)
    for sites, factor in measured.items():
        for site in sites:
            logs[site].append(np.log(np.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR)))
    found = {site: np.exp(np.mean(values, axis=0)) for site, values in logs.items()}
    single = {next(iter(sites)): factor for sites, factor in measured.items() if len(sites) == 1}
    return {**found, **{s: np.clip(f, 1 / LARGEST_FACTOR, LARGEST_FACTOR) for s, f in single.items()}}


def corrected(matrix: ProbeMatrix, factors: Mapping[str, np.ndarray]) -> ProbeMatrix:
    """The matrix with the columns of some sites scaled: site -> factor (heads,) on its damage."""
    scale = np.ones((len(matrix.heads), len(matrix.sites)))
    for site, factor in factors.items():
        if site in matrix.column:
            scale[:, matrix.column[site]] = np.sqrt(factor)
    rows = tuple((block * s).astype(block.dtype) for block, s in zip(matrix.rows, scale, strict=True))
    return replace(matrix, rows=rows)


def realigned(secant: Secant, before: ProbeMatrix, after: ProbeMatrix, sites: frozenset[str]) -> Secant:
    """The secant for a corrected matrix: what was measured stays, the linear prediction is that of the new matrix.

    Args:
        secant: of the matrix `before`.
        before: matrix without corrections.
        after: matrix with them.
        sites: that the all-INT8 plan rounds.
    """
    old, new = (m.damage(m.select(sites))[: secant.samples].mean(axis=0) for m in (before, after))
    linear = np.array(secant.linear) * new / np.maximum(old, 1e-30)
    return msgspec.structs.replace(secant, linear=tuple(float(d) for d in linear))
