"""Run the shipped model on the real runtime and put what it does beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bitalloy.core.records import Estimate, Head
from bitalloy.model.heads import Reference
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Session
from bitalloy.sensitivity.matrix import damage_interval, draws, relative

FLOAT32 = "(float32)"
"""Stands in place of a model's name for what float32 arithmetic alone makes of the outputs."""


def output_sqnr(
    reference: Session,
    models: Mapping[str, Session],
    heads: Sequence[Head],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[Estimate, ...]]:
    """Measure the SQNR in dB of each model's heads against the reference, over the given samples.

    Returns:
        model -> one estimate per head, with a 95 % bootstrap interval over samples; and under `FLOAT32` the highest
        SQNR that can be told from the rounding of the outputs themselves.
    """
    energy: list[list[float]] = []
    damage: dict[str, list[list[float]]] = {name: [] for name in (*models, FLOAT32)}
    for sample in feeds:
        exact = Reference(reference.run(sample), heads)
        energy.append(exact.energy.tolist())
        damage[FLOAT32].append(exact.noise.tolist())
        for name, session in models.items():
            damage[name].append(exact.error(session.run(sample)).tolist())
        if progress is not None:
            progress(1)
    total = np.array(energy)
    share = relative(total, total.mean(axis=0))
    weights = draws(len(total), seed)
    return {
        name: tuple(
            damage_interval(lost, part, weights)
            for lost, part in zip(relative(np.array(rows), total.mean(axis=0)).T, share.T, strict=True)
        )
        for name, rows in damage.items()
    }


def artefact_sqnr(
    reference: Artefact,
    models: Mapping[str, Artefact],
    heads: Sequence[Head],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[Estimate, ...]]:
    """Measure `output_sqnr` of artefacts, whose sessions are opened for it and closed again."""
    exact, sessions = reference.session(), {name: model.session() for name, model in models.items()}
    found = output_sqnr(exact, sessions, heads, feeds, seed=seed, progress=progress)
    for session in (exact, *sessions.values()):
        session.close()
    return found
