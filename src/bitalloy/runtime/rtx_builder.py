"""A process of its own that compiles one model with TensorRT for RTX: a crash of the compiler ends nothing else.

`runtime.tensorrt_rtx` starts it, and says in a JSON file what to do. It imports nothing but the compiler.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def build_engine(asked: dict[str, Any]) -> dict[str, Any]:
    """Compile a model and write the engine.

    Args:
        asked: `model` (path), `engine` (path to write), `capability` (such as 89), and `profile`, which maps each input
            with open sizes to its least, usual and largest shape.

    Returns:
        `error`, empty where the engine was written; `seconds` that the compiler took, and what it said (`messages`).
    """
    trt = importlib.import_module("tensorrt_rtx")
    messages: list[str] = []

    class Listener(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append(message.strip())

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(asked["model"]):
        reasons = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        return {"error": f"it cannot read the model: {reasons}", "seconds": 0.0, "messages": messages}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{asked['capability']}"), 0)
    if asked["profile"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in asked["profile"].items():
            profile.set_shape(name, least, usual, largest)
        config.add_optimization_profile(profile)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if engine is None:
        return {"error": "it builds no engine from the model", "seconds": seconds, "messages": messages}
    Path(asked["engine"]).write_bytes(engine)
    return {"error": "", "seconds": seconds, "messages": messages}


if __name__ == "__main__":
    found = build_engine(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
