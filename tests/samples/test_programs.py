"""The packaged programs are small, open with the core alone, and see what the sample shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitalloy import zoo
from bitalloy.model.graphs.outline import read_outline
from bitalloy.model.graphs.wiring import load_program
from bitalloy.runtime.ort import OrtSession
from bitalloy.samples.shapes import scene, write_coco
from bitalloy.targets.base import macs
from bitalloy.tasks import chat, language, promptable
from bitalloy.tasks.base import Interface
from bitalloy.tasks.open import cache_size, interface
from bitalloy.zoo import mobilesam, mobilevlm
from bitalloy.zoo.base import Variant
from bitalloy.zoo.mobilevlm_chat import CLIP_DEVIATION, CLIP_MEAN

PROMPTED, SPEAKING = "mobilesam-shapes", "mobilevlm-shapes"
LARGEST = {PROMPTED: 8_000_000, SPEAKING: 6_000_000}
"""Bytes of all files of a program."""
SHAPES = {"decoder:point_coords": (1, 2, 2), "decoder:point_labels": (1, 2)}
LIBRARIES = {"torch", "kornia", "transformers", "sentencepiece"}
MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
"""Of the published preparation of images, on 0..255."""


def sessions() -> tuple[OrtSession, OrtSession]:
    folder = zoo.resolve(PROMPTED).path
    return OrtSession(folder / "encoder.onnx"), OrtSession(folder / "decoder.onnx")


@pytest.mark.parametrize("name", zoo.PROGRAMS)
def test_folders_are_small_and_say_where_they_come_from(name: str) -> None:
    source = zoo.resolve(name)
    assert source.sample
    assert sum(f.stat().st_size for f in source.path.iterdir()) < LARGEST[name]
    for part in load_program(source.path, shapes=read_outline(source.path).shapes()).graphs.values():
        assert part.metadata["trained_by"].startswith("python reference/train_")
        assert part.metadata["bitalloy.variant"] == name


@pytest.mark.parametrize("variant", [mobilesam.MOBILESAM_SHAPES, mobilevlm.MOBILEVLM_SHAPES], ids=lambda v: v.name)
def test_operations_are_those_that_the_zoo_states(variant: Variant) -> None:
    path = zoo.resolve(variant.name).path
    graphs = load_program(path, shapes=read_outline(path).shapes()).graphs.values()
    assert 2 * sum(macs(n) for g in graphs for n in g.nodes) / 1e9 == pytest.approx(variant.flops_b, rel=1e-3)


@pytest.mark.parametrize("name", zoo.PROGRAMS)
def test_a_program_opens_without_torch_and_the_network_library(name: str) -> None:
    code = f"import sys, bitalloy; bitalloy.load({name!r}); assert not {LIBRARIES} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["box", "point"])
def test_masks_cover_what_the_prompt_means(kind: str) -> None:
    """Straight from the outputs, on new scenes: no code of the task is used."""
    encoder, decoder = sessions()
    overlaps = []
    for index in range(12):
        drawn = scene(index, seed=7, size=224)
        image = ((drawn.image - MEAN) / DEVIATION).transpose(2, 0, 1)[None].astype(np.float32)
        embeddings = encoder.run({"image": image})["image_embeddings"]
        for mask, box, point in zip(drawn.masks(), drawn.boxes(), drawn.points(), strict=True):
            coords, labels = (box.reshape(2, 2), [2, 3]) if kind == "box" else ([point, [0, 0]], [1, -1])
            feeds = {
                "image_embeddings": embeddings,
                "point_coords": np.array([coords], np.float32),
                "point_labels": np.array([labels], np.float32),
            }
            low, quality = decoder.run(feeds).values()
            best = 0 if kind == "box" else 1 + int(quality[0, 1:].argmax())
            found = low[0, best].repeat(4, 0).repeat(4, 1) > 0
            overlaps.append(np.count_nonzero(found & mask) / np.count_nonzero(found | mask))
    assert np.mean(overlaps) > 0.55  # cells of 4 x 4 pixels blunt small shapes


def test_the_task_measures_them(tmp_path: Path) -> None:
    graphs = load_program(zoo.resolve(PROMPTED).path, shapes=SHAPES).graphs
    encoder, decoder = graphs["encoder"].info, graphs["decoder"].info
    interface = Interface(inputs=(*encoder.inputs, *decoder.inputs[1:]), outputs=decoder.outputs)
    data = promptable.open_prompts(write_coco(tmp_path / "val", count=16, size=224) / "instances.json", interface)
    encode, decode = (session.run for session in sessions())
    result = promptable.PROMPTABLE.evaluate({"float": promptable.join_promptable(encode, decode)}, data)
    found = {m.name: m.values["float"].value for m in result.metrics}
    assert found["mIoU, box prompts"] > 0.65 and found["mIoU, point prompts"] > 0.6


def test_yes_and_no_follow_the_image() -> None:
    """Straight from the logits, on new scenes: the likelier of the two words, by the tokens in the file alone."""
    folder = zoo.resolve(SPEAKING).path
    vision, embedding, decoder = (OrtSession(folder / f"{n}.onnx") for n in ("vision", "embedding", "decoder"))
    talk = chat.open_chat(interface_of(folder))
    yes, no = (talk.tokenizer.encode(word)[0] for word in ("yes", "no"))
    right = []
    for index in range(60):
        drawn = scene(index, seed=7, size=96)
        pixels = ((drawn.image / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_DEVIATION)).transpose(2, 0, 1)[None]
        features = vision.run({"pixel_values": pixels.astype(np.float32)})["image_features"]
        for line in drawn.questions():
            if line["answer"] not in ("yes", "no"):
                continue
            ids = talk.prompt(f"{line['question']}\nAnswer the question using a single word or phrase.")
            at = ids.index(chat.IMAGE_TOKEN)
            sides = {"before": np.array([ids[:at]], np.int64), "after": np.array([ids[at + 1 :]], np.int64)}
            vectors = embedding.run({**sides, "image_features": features})["inputs_embeds"]
            count = vectors.shape[1]
            feeds = {
                "inputs_embeds": vectors,
                "attention_mask": np.ones((1, count), np.int64),
                "position_ids": np.arange(count)[None],
                **chat.empty_cache(cache_size(read_outline(folder).open_inputs)),
            }
            logits = decoder.run(feeds)["logits"][0, -1]
            right.append(("yes" if logits[yes] > logits[no] else "no") == line["answer"])
    assert np.mean(right) > 0.7


def test_answers_are_measured_by_the_task(tmp_path: Path) -> None:
    folder = zoo.resolve(SPEAKING).path
    known = interface_of(folder)
    vision, embed, decode = (OrtSession(folder / f"{name}.onnx").run for name in ("vision", "embedding", "decoder"))
    run = chat.join_chat(vision, embed, decode, cache_size(read_outline(folder).open_inputs))
    drawn = write_coco(tmp_path / "val", count=40, size=96)
    data = language.open_language(drawn / "questions.jsonl", known)
    found = {m.name: m.values["float"].value for m in language.LANGUAGE.evaluate({"float": run}, data).metrics}
    assert found["yes/no accuracy"] > 0.7
    data = language.open_language(drawn / "captions.json", known)
    found = {m.name: m.values["float"].value for m in language.LANGUAGE.evaluate({"float": run}, data).metrics}
    assert found["perplexity"] < 6  # of 932 words


def interface_of(folder: Path) -> Interface:
    outline = read_outline(folder)
    return interface(outline.open_inputs, outline.free_outputs, outline.facts, folder)
