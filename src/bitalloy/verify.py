"""Run the shipped model on the real runtime and put what it does beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bitalloy.heads import energy as energy_of
from bitalloy.heads import error
from bitalloy.matrix import draws, interval
from bitalloy.records import Estimate, Head
from bitalloy.runtime import Session


def output_sqnr(
    reference: Session,
    models: Mapping[str, Session],
    heads: Sequence[Head],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[Estimate, ...]]:
    """SQNR in dB of each model's heads against the reference, over the given samples.

    Returns:
        model -> one estimate per head, with a 95 % bootstrap interval over samples.
    """
    energy: list[list[float]] = []
    damage: dict[str, list[list[float]]] = {name: [] for name in models}
    for sample in feeds:
        exact = reference.run(sample)
        energy.append([energy_of(exact, h) for h in heads])
        for name, session in models.items():
            found = session.run(sample)
            damage[name].append([error(exact, found, h) for h in heads])
        if progress is not None:
            progress(1)
    total = np.array(energy)
    scale = np.maximum(total.mean(axis=0), 1e-30)
    weights = draws(len(total), seed)
    return {
        name: tuple(
            interval(np.array(rows)[:, h] / scale[h], total[:, h] / scale[h], weights) for h in range(len(heads))
        )
        for name, rows in damage.items()
    }
