"""A bare process that opens a model and makes one step of its workload, for the sake of its peak memory.

It imports nothing but numpy and the runtime, as a program that only runs the model would. `measure.memory` starts it
and says in a JSON file what to do.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Run = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Function that executes a graph once, from its feeds to its results."""


def peak_bytes() -> int | None:
    """Return the largest resident memory that this process has had; None where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) or None


def open_with_onnxruntime(path: str) -> Run:
    """Open a file with ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def open_with_openvino(path: str) -> Run:
    """Open a file with OpenVINO on the CPU, for the least latency and without loss of precision."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    names = [port.get_node().get_friendly_name().removesuffix("/sink_port_0") for port in compiled.outputs]
    inputs = [port.get_node().get_friendly_name() for port in compiled.inputs]

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = compiled([feeds[name] for name in inputs])
        return {name: found[i] for i, name in enumerate(names)}

    return run


OPENERS: dict[str, Callable[[str], Run]] = {"onnxruntime": open_with_onnxruntime, "openvino": open_with_openvino}
"""Package of a runtime -> function that opens the file of a model with it."""


def make_steps(path: str) -> None:
    """Do what a file says, and print the peaks before a model was opened and behind the last run, in bytes."""
    import numpy

    asked = json.loads(Path(path).read_text())
    importlib.import_module(asked["library"])
    before = peak_bytes()
    runs = {name: OPENERS[asked["library"]](file) for name, file in asked["graphs"].items()}
    for step in asked["steps"]:
        results: dict[str, dict[str, Any]] = {}
        for part in step:
            with numpy.load(part["feeds"]) as arrays:
                feeds = {name: arrays[str(i)] for i, name in enumerate(part["names"])}
            feeds |= {name: results[graph][output] for name, (graph, output) in part["wires"].items()}
            results[part["graph"]] = runs[part["graph"]](feeds)
    print(json.dumps({"before": before, "peak": peak_bytes()}))


if __name__ == "__main__":
    make_steps(sys.argv[1])
