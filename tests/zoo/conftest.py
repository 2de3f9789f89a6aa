"""What the tests of the zoo share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
"""A real checkpoint with its ONNX file, where these lie beside the repository."""


def run(path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of an ONNX file, by ONNX Runtime alone."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


@pytest.fixture
def onnx_run() -> object:
    return run


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("no real checkpoint beside the repository")
    return REAL


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """The libraries' own deprecation warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
