"""What `Problem.neighbours` must give, plan by plan."""

from __future__ import annotations

import numpy as np
import pytest

from bitalloy.core.schemes import Plan
from bitalloy.search.problem import Problem


def same_one_by_one(problem: Problem, plan: Plan) -> None:
    """All neighbours of a plan at once, and each from the definitions."""
    damage, latency, size = problem.neighbours(plan)
    for i, move in enumerate(problem.moves):
        other = problem.moved(plan, move)
        np.testing.assert_allclose(damage[i], problem.damage(other), rtol=1e-6)
        assert latency[i] == pytest.approx(problem.latency_us(other), rel=1e-9)
        assert size[i] == problem.size_bytes(other)
