"""Small labelled data for the tests of the tasks, and the real data where it is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitalloy.samples.shapes import write_coco


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes of 160x160 with labels for every task."""
    return write_coco(tmp_path_factory.mktemp("sample") / "shapes", count=6, size=160, seed=3)


@pytest.fixture(scope="session")
def real() -> Path:
    """A `shared/data` folder somewhere above the repository."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared/data/coco-val-94/instances.json").is_file():
            return parent / "shared/data"
    pytest.skip("the real data is not here")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
