"""Correction of the probe matrix by exact measurements, so that the prediction of every plan gains from them.

Things (units and sites) were measured alone at the full size of their errors; the matrix predicts something else for
them. The columns of a site are scaled by a factor per head, the geometric mean of measured over predicted damage of
the things that round it, and the fit is repeated until the prediction of the things is as measured. Scaling a column
keeps its correlations with the others.

The secant tells how the network bends as all errors grow together. The measured things are at full size already, so
of the secant only the full size of everything is kept: between the float and the all-INT8 network the logarithm of
the remaining factor is linear in the size of the plan's error (`matrix.bend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from bitalloy.core.records import Secant
from bitalloy.sensitivity.matrix import ProbeMatrix, bend

ROUNDS = 10
STEP = 0.7
LARGEST_FACTOR = 100.0
"""Largest factor on the damage of a site, and inverse of the smallest; more than 20 dB is an error of another kind."""


@dataclass(frozen=True)
class MeasuredDamage:
    """A set of sites, and the measured damage (heads,) of rounding them together."""

    sites: frozenset[str]
    damage: np.ndarray


@dataclass(frozen=True)
class CorrectedMatrix:
    """A matrix and a secant whose predictions agree with exact measurements."""

    matrix: ProbeMatrix
    secant: Secant
    factors: np.ndarray
    """Factors by which the columns of the matrix were multiplied, (heads, sites)."""

    def carried_over(self, matrix: ProbeMatrix) -> ProbeMatrix:
        """Return the matrix of another target, corrected at the sites that it shares.

        How far a network bends where it is rounded belongs to the place, and less to the format.
        """
        factors = np.ones((len(matrix.heads), len(matrix.sites)))
        shared = [(matrix.column[s], i) for i, s in enumerate(self.matrix.sites) if s in matrix.column]
        for there, here in shared:
            factors[:, there] = self.factors[:, here]
        return matrix.scaled(factors)


def correct_matrix(
    matrix: ProbeMatrix, secant: Secant, findings: Sequence[MeasuredDamage], everything: frozenset[str]
) -> CorrectedMatrix:
    """Fit a matrix and a secant to exact measurements.

    Args:
        matrix: the probe matrix.
        secant: the secant that was measured with the matrix.
        findings: exact measurements, relative to the energy of the matrix' samples.
        everything: sites that the all-INT8 plan rounds.
    """
    logs = np.zeros((len(matrix.heads), len(matrix.sites)))
    columns = [np.array([matrix.column[s] for s in f.sites if s in matrix.column], np.int64) for f in findings]
    limit = np.log(LARGEST_FACTOR)
    fixed, bent = matrix, _at_full_size(secant, matrix, matrix, everything)
    for _ in range(ROUNDS):
        total, count = np.zeros_like(logs), np.zeros(logs.shape[1])
        for finding, inside in zip(findings, columns, strict=True):
            predicted = bent_damage(fixed, bent, finding.sites)
            reached = (predicted > 0) & (finding.damage > 0)
            step = np.log(np.where(reached, finding.damage, 1) / np.where(reached, predicted, 1))
            total[:, inside] += step[:, None]
            count[inside] += 1
        logs = np.clip(logs + STEP * total / np.maximum(count, 1), -limit, limit)
        fixed = matrix.scaled(np.exp(logs / 2))
        bent = _at_full_size(secant, matrix, fixed, everything)
    return CorrectedMatrix(fixed, bent, np.exp(logs / 2))


def bent_damage(matrix: ProbeMatrix, secant: Secant, sites: frozenset[str]) -> np.ndarray:
    """Predict the relative error energy (heads,) of a set of sites by a matrix, corrected by the secant."""
    linear = matrix.damage(matrix.select(sites)).mean(axis=0)
    return np.asarray(linear * bend(secant, linear))


def _at_full_size(secant: Secant, before: ProbeMatrix, after: ProbeMatrix, sites: frozenset[str]) -> Secant:
    """Keep only the last point of a secant, against the prediction of another matrix on the secant's samples."""
    old, new = (m.damage(m.select(sites))[: secant.samples].mean(axis=0) for m in (before, after))
    linear = np.array(secant.linear) * new / np.maximum(old, 1e-30)
    return msgspec.structs.replace(
        secant,
        fractions=secant.fractions[-1:],
        damage=secant.damage[-1:],
        linear=tuple(float(d) for d in linear),
    )
