"""Write a trained network as a compact ONNX file of the sample, and measure such a file.

The zoo exports it like an official checkpoint. Weights of convolutions and matrix products are then stored as float16
and cast to float32 inside the graph: any runtime opens the file directly and computes in float32, and the file has
half the size. What is measured is the file, through `bitalloy.tasks`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitalloy import zoo
from bitalloy.model import load as graph
from bitalloy.runtime.ort import OrtSession
from bitalloy.samples import shapes
from bitalloy.tasks import find_task
from bitalloy.tasks.base import Interface

__all__ = ["evaluate", "export", "store_weights_as_float16"]

VALIDATION_IMAGES = 200
SMALLEST_HALVED = 256
"""Elements from which a weight is stored as float16."""
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def export(
    checkpoint: Path, path: Path, *, variant: str, size: int, names: Sequence[str], state: Mapping[str, Any]
) -> None:
    """Export a checkpoint by the zoo, halve its weights, say where it comes from, write `path`.

    Args:
        checkpoint: what `bitalloy export --checkpoint` takes.
        path: file to write.
        variant: name of the architecture in the zoo.
        size: side of the image in pixels.
        names: of the classes.
        state: of the training: `images`, `seed`, `command`.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = zoo.Options(size=(size, size))
        exported = zoo.export_model(variant, checkpoint=checkpoint, folder=Path(folder), options=options)
        proto = onnx.load(str(exported.graphs[variant]))
    store_weights_as_float16(proto)
    meta = {
        "names": json.dumps(dict(enumerate(names))),
        "imgsz": json.dumps([size, size]),
        "description": f"{variant} trained on generated scenes: a sample, not a benchmark",
        "dataset": f"bitalloy.samples.shapes version {shapes.VERSION}, split train, seed {state['seed']}",
        "training_images": str(state["images"]),
        "trained_by": state["command"],
        "license": "Apache-2.0",
    }
    for key, text in meta.items():
        proto.metadata_props.add(key=key, value=text)
    proto.graph.name = path.stem
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(path))


def store_weights_as_float16(proto: onnx.ModelProto) -> None:
    """Replace each large float32 weight by a float16 initializer and a Cast to its name, in place."""
    weights = {name for node in proto.graph.node if node.op_type in WEIGHTED for name in node.input[:2]}
    casts = []
    for tensor in proto.graph.initializer:
        count = int(np.prod(tensor.dims))
        if tensor.name in weights and tensor.data_type == TensorProto.FLOAT and count >= SMALLEST_HALVED:
            name = tensor.name
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.float16"))
            cast = helper.make_node("Cast", [tensor.name], [name], name=f"{name}/Cast", to=TensorProto.FLOAT)
            casts.append(cast)
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    known = [info for info in proto.graph.value_info if info.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(known)


def evaluate(path: Path, folder: Path, labels: str) -> dict[str, Any]:
    """Metrics of an ONNX file's task on the first scenes of the split `val`, which are written to `folder`.

    Args:
        path: of the file.
        folder: for the scenes.
        labels: file among those of `write_coco` that the task takes; empty for the folder itself.
    """
    model = graph.load_graph(path)
    size = int(model.info.inputs[0].shape[-1])
    folder = shapes.write_coco(folder, count=VALIDATION_IMAGES, size=size, split="val")
    interface = Interface(inputs=model.info.inputs, outputs=model.info.outputs, metadata=model.metadata)
    task = find_task(interface)
    assert task is not None, "the zoo exports what a task knows"
    result = task.evaluate({"float": OrtSession(path).run}, task.open(folder / labels, interface))
    return {"val_images": VALIDATION_IMAGES} | {m.name: round(m.values["float"].value, 4) for m in result.metrics}
