"""Latency of a run's float and mixed model on TensorRT, in turns, on the GPU of this machine.

    python benchmarks/tensorrt_latency.py model.onnx RUN/tensorrt/mixed.onnx [--repeats 200]

Ends with one JSON line; without TensorRT or a GPU the line says what is missing, and the exit code is 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from bitalloy.runtime.tensorrt import TensorRtSession, missing

ROUNDS = 10


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("float_model", type=Path)
    parser.add_argument("mixed_model", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    if reason := missing():
        print(json.dumps({"benchmark": "tensorrt_latency", "skipped": reason}))
        return 3
    sessions = {"float": TensorRtSession(options.float_model), "mixed": TensorRtSession(options.mixed_model)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            times[name] += session.milliseconds(max(options.repeats // ROUNDS, 1))
    types = {
        name: sorted({t.split()[0] for layer in session.layers() for t in layer.outputs})
        for name, session in sessions.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {"median_ms": medians, "ratio": medians["mixed"] / medians["float"], "types": types}
    print(json.dumps({"benchmark": "tensorrt_latency", **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
