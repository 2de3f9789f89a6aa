"""Write a trained network of several graphs as a compact program of the sample, and measure such a program.

The zoo exports it like an official checkpoint; see `sample_file` for how weights are stored.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from bitalloy import zoo
from bitalloy.model.graphs.outline import read_outline
from bitalloy.model.graphs.wiring import load_program, write_wiring
from bitalloy.runtime.ort import OrtSession
from bitalloy.samples import shapes
from bitalloy.tasks import chat, language, promptable
from bitalloy.tasks.base import Interface
from bitalloy.tasks.open import cache_size, interface
from bitalloy.zoo.base import Export, Variant
from sample_file import store_weights_as_float16

__all__ = ["evaluate_language", "evaluate_promptable", "export"]

VALIDATION_IMAGES = 200


def export(checkpoint: Path, output: Path, *, variant: Variant, by: Export, state: Mapping[str, Any]) -> None:
    """Export a checkpoint, halve the weights of its graphs, say where they come from, write the folder `output`.

    Args:
        checkpoint: in the layout of the published one.
        output: folder to write.
        variant: the size that was trained.
        by: export of its family.
        state: of the training: `images`, `seed`, `command`.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        exported = by(variant, checkpoint, zoo.Options(), Path(folder))
        protos = {name: onnx.load(str(path)) for name, path in exported.graphs.items()}
    meta = {
        "description": f"{variant.name} trained from scratch on generated scenes: a sample, not a benchmark",
        "dataset": f"bitalloy.samples.shapes version {shapes.VERSION}, split train, seed {state['seed']}",
        "training_images": str(state["images"]),
        "trained_by": state["command"],
        "license": "Apache-2.0",
    }
    for name, proto in protos.items():
        store_weights_as_float16(proto)
        for key, text in meta.items():
            proto.metadata_props.add(key=key, value=text)
        proto.graph.name = f"{variant.name}-{name}"
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, str(output / f"{name}.onnx"))
    write_wiring(output, {name: f"{name}.onnx" for name in protos}, exported.wires)


def evaluate_promptable(program: Path, folder: Path, *, count: int = VALIDATION_IMAGES) -> dict[str, Any]:
    """Mean IoU of a promptable program on the first scenes of the split `val`, which are written to `folder`."""
    open_sizes = {"decoder:point_coords": (1, 2, 2), "decoder:point_labels": (1, 2)}
    graphs = load_program(program, shapes=open_sizes).graphs
    encoder, decoder = graphs["encoder"].info, graphs["decoder"].info
    interface = Interface(inputs=(*encoder.inputs, *decoder.inputs[1:]), outputs=decoder.outputs)
    folder = shapes.write_coco(folder, count=count, size=int(encoder.inputs[0].shape[-1]), split="val")
    run = promptable.join_promptable(*(OrtSession(program / f"{name}.onnx").run for name in ("encoder", "decoder")))
    data = promptable.open_prompts(folder / "instances.json", interface)
    result = promptable.PROMPTABLE.evaluate({"float": run}, data)
    found = {m.name: m.values["float"] for m in result.metrics if m.name.startswith("mIoU")}
    return {"val_images": count, "notes": list(result.notes)} | {
        name: [round(v, 4) for v in (value.value, value.low, value.high)] for name, value in found.items()
    }


def evaluate_language(program: Path, folder: Path, *, count: int = VALIDATION_IMAGES) -> dict[str, Any]:
    """Answers and perplexity of a language program on the first scenes of the split `val`, written to `folder`."""
    outline = read_outline(program)
    known = interface(outline.open_inputs, outline.free_outputs, outline.facts, program)
    side = int(known.inputs[0].shape[-1])
    folder = shapes.write_coco(folder, count=count, size=side, split="val")
    vision, embed, decode = (OrtSession(program / f"{name}.onnx").run for name in ("vision", "embedding", "decoder"))
    models = {"float": chat.join_chat(vision, embed, decode, cache_size(outline.open_inputs))}
    scores: dict[str, Any] = {"val_images": count, "notes": []}
    for labels in ("questions.jsonl", "captions.json"):
        result = language.LANGUAGE.evaluate(models, language.open_language(folder / labels, known))
        scores["notes"] += result.notes
        for metric in result.metrics:
            value = metric.values["float"]
            scores[metric.name] = [round(v, 4) for v in (value.value, value.low, value.high)]
    return scores
