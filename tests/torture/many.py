"""Ten thousand images."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from tests.conftest import classifier

COUNTS = (100, 10_000)
SECONDS, SHARE = 10.0, 0.1
"""Goals: seconds of listing and hashing, and growth of memory."""
CALIBRATES = """
import re, sys
from pathlib import Path
import bitalloy
model = bitalloy.load("model.onnx")
data = bitalloy.open_data(model, "images")
bitalloy.calibrate(model, data, bitalloy.Settings(calibration_samples=int(sys.argv[1]), range_method="minmax"))
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def suffer(seconds: float, seed: int) -> dict[str, Any]:
    """Measure; the time is not bounded, as it is below a minute or two."""
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        onnx.save(classifier(), folder / "model.onnx")
        _write_images(folder / "images", COUNTS[-1], seed)
        listing = _listing(folder)
        memory = {count: int(_run([sys.executable, "-c", CALIBRATES, str(count)], folder)) / 1024 for count in COUNTS}
    growth = memory[COUNTS[1]] / memory[COUNTS[0]] - 1
    faults = [f"listing and hashing take {listing:.1f} s"] if listing > SECONDS else []
    faults += [f"memory grows by {growth:.0%}"] if growth > SHARE else []
    return {
        "images": COUNTS[-1],
        "listing_and_hashing_s": round(listing, 2),
        "calibration_peak_mb": {str(count): round(size) for count, size in memory.items()},
        "growth": round(growth, 3),
        "faults": faults,
    }


def _write_images(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for index in range(count):
        pixels = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg")


def _listing(folder: Path) -> float:
    import bitalloy

    model = bitalloy.load(folder / "model.onnx")
    began = time.monotonic()
    assert bitalloy.open_data(model, folder / "images").info.count == COUNTS[-1]
    return time.monotonic() - began


def _run(words: list[str], folder: Path) -> str:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=600).stdout.split()[-1]
