"""The border to a runtime: one method plus close."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Session(Protocol):
    """An executable model."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the feeds that `run` expects."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the results that `run` returns, in graph order."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Execute once. Shapes and dtypes of `feeds` are those of the graph inputs."""
        ...

    def close(self) -> None:
        """Release the runtime's memory. `run` may not be called afterwards."""
        ...
