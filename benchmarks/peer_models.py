"""One model made by a peer, for `plans_vs_peers.py`: runs in an environment that has the peers.

    PEERS_PYTHON benchmarks/peer_models.py JOB.json

The job names the kind (a key of `KINDS`), the model, the calibration images with their preprocessing, for accuracy
control the labels, and where model and result go. The result: wall seconds of the peer's own call (loading and saving
excluded; every image is read when the peer asks for it, as in a run of bitalloy), processor seconds, and the load of
the machine. Of bitalloy only the reading of images and the evaluation are used, so that all sides see the same pixels
and the same AP.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.records import TensorSpec
from bitalloy.data.datasets import open_dataset
from bitalloy.data.images import ImageSpec, image_feed
from bitalloy.tasks.base import RunModel
from bitalloy.tasks.coco import CocoLabels, LabelledImage, read_coco
from bitalloy.tasks.detection import on_image
from bitalloy.tasks.precision import match_boxes
from bitalloy.tasks.yolo import split_predictions, suppress

MAX_DROP = 0.003
"""Of AP50-95, absolute: what accuracy control may lose."""
HEAD = {"inputs": ["/model.23/Concat", "/model.23/Concat_1"]}
"""Where the decoding of boxes and scores begins in YOLO11n."""


class Feeds:
    """The calibration samples, opened anew whenever they are asked for."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.spec = ImageSpec(**job["image"])
        shape = (1, self.spec.channels, self.spec.height, self.spec.width)
        inputs = (TensorSpec(name=self.spec.input, dtype="FLOAT", shape=shape),)
        self._data = open_dataset(job["images"], inputs, image=self.spec, limit=job["samples"], seed=job["seed"])

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._data.feeds(i)[self.spec.input] for i in range(len(self._data)))


def nncf_model(job: Mapping[str, Any], *, scope: bool, control: bool) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """NNCF's post-training quantization of the OpenVINO model, preset MIXED, model type none.

    Args:
        job: what to do.
        scope: leave out what NNCF's own YOLO examples leave out: Multiply, Subtract, Sigmoid, and the decoding.
        control: restore operators until AP50-95 on the labelled images is at most `MAX_DROP` lower.
    """
    import nncf
    import openvino as ov

    model = ov.Core().read_model(job["model"])
    feeds = Feeds(job)
    ignored = None
    if scope:
        result = model.get_results()[0].get_friendly_name()
        ignored = nncf.IgnoredScope(
            types=["Multiply", "Subtract", "Sigmoid"], subgraphs=[nncf.Subgraph(**HEAD, outputs=[result])]
        )
    common: dict[str, Any] = {
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": len(feeds),
        "ignored_scope": ignored,
    }
    calls: list[float] = []
    labels = read_coco(Path(job["labels"])) if control else None

    def validate(compiled: Any, images: Iterable[LabelledImage]) -> tuple[float, None]:
        """AP50-95 of a compiled model on some of the images: all for a decision, single ones to rank operators."""
        started = time.perf_counter()
        entries = tuple(images)
        assert labels is not None
        value = average_precision(lambda feed: {"output": compiled(feed)[0]}, labels, entries, feeds.spec)
        calls.append(time.perf_counter() - started)
        if len(entries) > 1:
            print(f"validation {len(calls)}: AP {value:.4f}", file=sys.stderr, flush=True)
        return value, None

    def feed_of(entry: LabelledImage) -> np.ndarray:
        assert labels is not None
        return image_feed(labels.open_image(entry), feeds.spec)[0]

    start = Clock()
    if labels is not None:
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(feeds),
            nncf.Dataset(labels.images, feed_of),
            validation_fn=validate,
            max_drop=MAX_DROP,
            **common,
        )
    else:
        quantized = nncf.quantize(model, nncf.Dataset(feeds), **common)
    result_ = {**start.read(), "validations": len(calls), "validation_seconds": round(sum(calls), 1)}
    return result_, lambda path: ov.save_model(quantized, path, compress_to_fp16=False)


def average_precision(run: RunModel, labels: CocoLabels, images: Sequence[LabelledImage], spec: ImageSpec) -> float:
    """AP50-95 on some labelled images, as `bitalloy.tasks.detection` measures it; 0 where they show nothing."""
    found = []
    for entry in images:
        opened = labels.open_image(entry, spec.channels)
        feed, geometry = image_feed(opened, spec)
        boxes, scores = split_predictions(run({spec.input: feed}))
        found.append(on_image(suppress(boxes, scores), geometry, opened.size))
    try:
        return match_boxes(labels, images, found, labels.category_ids(len(scores), None)).ap
    except DataError:  # images without labels
        return 0.0


def ort_model(job: Mapping[str, Any], *, operators: list[str] | None) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """ONNX Runtime's `quantize_static`: QDQ, per channel, min-max; after its own preparation of the model."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnxruntime.set_default_logger_severity(3)
    feeds = Feeds(job)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._all = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            value = next(self._all, None)
            return None if value is None else {feeds.spec.input: value}

    out = Path(job["out"])
    prepared = out.with_suffix(".prepared.onnx")
    start = Clock()
    quant_pre_process(job["model"], prepared)
    quantize_static(
        prepared,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=operators,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    found = start.read()
    prepared.unlink()
    return found, lambda path: None


class Clock:
    """Wall and processor seconds, and how busy the machine was."""

    def __init__(self) -> None:
        self._wall, self._own = time.perf_counter(), os.times()

    def read(self) -> dict[str, Any]:
        """Since the beginning; the load is the mean number of runnable processes, this one included."""
        own = os.times()
        return {
            "wall_seconds": round(time.perf_counter() - self._wall, 2),
            "processor_seconds": round(own.user + own.system - self._own.user - self._own.system, 2),
            "load_15_minutes": round(os.getloadavg()[2], 2),
            "cores": len(os.sched_getaffinity(0)),
            "nice": os.nice(0),
        }


KINDS: dict[str, Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[Path], None]]]] = {
    "nncf": lambda job: nncf_model(job, scope=False, control=False),
    "nncf-scope": lambda job: nncf_model(job, scope=True, control=False),
    "nncf-control": lambda job: nncf_model(job, scope=False, control=True),
    "nncf-control-scope": lambda job: nncf_model(job, scope=True, control=True),
    "ort-conv": lambda job: ort_model(job, operators=["Conv"]),
    "ort-all": lambda job: ort_model(job, operators=None),
}


def main() -> None:
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    figures, save = KINDS[job["kind"]](job)
    save(Path(job["out"]))
    packages = ["onnxruntime"] if job["kind"].startswith("ort") else ["nncf", "openvino"]
    figures["versions"] = {name: importlib.metadata.version(name) for name in packages}
    figures["samples"], figures["seed"] = job["samples"], job["seed"]
    Path(job["result"]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
