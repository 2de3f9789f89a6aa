"""What one price pays for: the runs that a user makes of a model, and how often each is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitalloy.runtime.artefact import Chain
from bitalloy.runtime.base import Session


@dataclass(frozen=True)
class Step:
    """Runs of a model, or of one graph of a program, with the same sizes."""

    name: str
    """What it is called in reports."""
    feeds: Mapping[str, np.ndarray]
    times: int = 1
    """How often it is made."""
    graph: str | None = None
    """Graph of a program that runs alone; None for all."""

    def run(self, session: Session) -> None:
        """Make it once."""
        if self.graph is None:
            session.run(self.feeds)
        else:
            assert isinstance(session, Chain), "a graph by itself belongs to a program"
            session.part(self.graph).run(self.feeds)


def once(feeds: Mapping[str, np.ndarray]) -> Step:
    """Return the only step of a model that is run once."""
    return Step("inference", feeds)


def total(times: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    """Return what all steps take together, each as often as it is made: (...) of times (..., steps)."""
    return np.asarray(times @ np.array([step.times for step in steps], np.float64))
