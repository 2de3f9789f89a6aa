"""Samples at other sizes than those that they have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitalloy.data.arrays import Feeds
from bitalloy.data.datasets import Dataset, Samples


class Fitted(Samples):
    """The samples of another data set, cut or repeated along each axis to the shapes of a model.

    Args:
        base: the other data set.
        shapes: input -> shape of the same rank; inputs that are not named stay as they are.
    """

    def __init__(self, base: Dataset, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._base, self._shapes = base, dict(shapes)
        self.label, self.preprocessing = base.info.name, base.info.preprocessing
        self.decisive = f"{base.info.sha256} {sorted(self._shapes.items())}"

    def __len__(self) -> int:
        return len(self._base)

    def name(self, index: int) -> str:
        return self._base.name(index)

    def feeds(self, index: int) -> Feeds:
        found = self._base.feeds(index)
        return {name: fit(array, self._shapes.get(name, array.shape)) for name, array in found.items()}

    def fingerprint(self, index: int) -> str:
        """Return its name: what the samples hold is part of `decisive`."""
        return self.name(index)

    def files(self, index: int) -> tuple[Path, ...]:
        return self._base.files(index) if isinstance(self._base, Samples) else ()


def fit(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cut an array, or repeat it from its start, along each axis; zeros where it holds nothing to be repeated.

    >>> fit(np.array([[1, 2, 3]]), (2, 5)).tolist()
    [[1, 2, 3, 1, 2], [1, 2, 3, 1, 2]]
    """
    if array.shape == shape:
        return array
    if array.size == 0:
        return np.zeros(shape, array.dtype)
    return np.ascontiguousarray(
        array[np.ix_(*(np.arange(n) % have for n, have in zip(shape, array.shape, strict=True)))]
    )
