"""Run the shipped model on the real runtime and put what it does beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bitalloy.heads import Reference
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
        exact = Reference(reference.run(sample), heads)
        energy.append(exact.energy.tolist())
        for name, session in models.items():
            damage[name].append(exact.error(session.run(sample)).tolist())
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
