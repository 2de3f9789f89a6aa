"""Models of several runtimes side by side, for `plans_vs_peers.py`: runs where both runtimes are there.

    python benchmarks/peer_runtimes.py JOB.json

One process loads all models, each with the same number of threads, and takes turns with single inferences, so that
what disturbs the machine disturbs all. Sessions are made anew three times. The result: times of every round, and
AP50-95 of all models on the same images through one evaluation, with drops against the first model.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bitalloy.data.images import ImageSpec, image_feed
from bitalloy.measure import bench
from bitalloy.runtime.ort import OrtSession
from bitalloy.runtime.steps import once
from bitalloy.tasks.coco import read_coco
from bitalloy.tasks.detection import DETECTION, DetectionData


class OpenVinoModel:
    """A compiled model: one stream; what stays float is computed in `precision`, whatever the plugin prefers."""

    def __init__(self, path: str, threads: int, precision: str) -> None:
        import openvino as ov

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,  # all sessions take turns on the same cores
        }
        self._request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Feeds in the order of the model's inputs -> its first output."""
        return {"output": self._request.infer(list(feeds.values()), share_inputs=True)[0].copy()}

    def close(self) -> None:
        """Let go of the memory."""
        del self._request


def opener(model: Mapping[str, Any], threads: int) -> Callable[[], Any]:
    """What makes a session of a model."""
    if model["runtime"] == "openvino":
        return partial(OpenVinoModel, model["path"], threads, model["precision"])
    return partial(OrtSession, model["path"], threads=threads)


def main() -> None:
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    spec, labels = ImageSpec(**job["image"]), read_coco(Path(job["labels"]))
    data = DetectionData(labels, spec)
    sessions = {m["name"]: opener(m, job["threads"]) for m in job["models"]}
    feed, _ = image_feed(labels.open_image(labels.images[data.choose(1, job["seed"])[0]]), spec)
    times = bench.time_sittings(sessions, [once({spec.input: feed})], repeats=job["repeats"])
    opened = {name: make() for name, make in sessions.items()}
    runs = {name: session.run for name, session in opened.items()}
    precision = DETECTION.evaluate(runs, data, limit=job["limit"], seed=job["seed"]).metrics[0]
    result = {
        "times_ms": {name: [round(float(t), 3) for t in series[..., 0].ravel()] for name, series in times.items()},
        "ap": msgspec.to_builtins(precision.values),
        "drops": msgspec.to_builtins(precision.drops),
        "load_1_minute": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in ("onnxruntime", "openvino", "numpy")},
    }
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
