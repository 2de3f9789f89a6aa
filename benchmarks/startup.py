"""What it costs to start: processor seconds of `import bitalloy` and of commands that do no work, and of a refusal.

    python benchmarks/startup.py
    python benchmarks/startup.py --repeats 15

Each case is a process of its own with compiled byte code, which the first, untimed one writes into a temporary folder.
Prints the median and the smallest of the repeats; the smallest says more on a busy machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

CASES = {
    "python alone": ["-c", "pass"],
    "import bitalloy": ["-c", "import bitalloy"],
    "bitalloy --help": ["-m", "bitalloy", "--help"],
    "bitalloy --version": ["-m", "bitalloy", "--version"],
    "bitalloy run --wrong": ["-m", "bitalloy", "run", "--wrong"],
    "bitalloy run (no model)": ["-m", "bitalloy", "run", "broken.onnx"],
}


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    cases: dict[str, dict[str, float]] = {}
    print(f"{'':<26}{'processor s, median':>22}{'smallest':>10}{'wall s, median':>16}{'smallest':>10}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "broken.onnx").write_text("this is no model\n" * 100)
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for case, words in CASES.items():
            once([sys.executable, *words], folder, environment)
            processor, wall = zip(
                *(once([sys.executable, *words], folder, environment) for _ in range(repeats)), strict=True
            )
            print(
                f"{case:<26}{statistics.median(processor):>22.3f}{min(processor):>10.3f}"
                f"{statistics.median(wall):>16.3f}{min(wall):>10.3f}"
            )
            cases[case] = {
                "processor_s": round(statistics.median(processor), 3),
                "smallest_processor_s": round(min(processor), 3),
                "wall_s": round(statistics.median(wall), 3),
                "smallest_wall_s": round(min(wall), 3),
            }
    print(json.dumps({"benchmark": "startup", "repeats": repeats, "cases": cases}))


def once(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Processor and wall seconds of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    main()
