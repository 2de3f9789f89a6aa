"""Train a small MobileVLM V2 on the generated sample `shapes` from scratch on a CPU and write the package's program.

    python reference/train_language.py --work /tmp/language

First the vision tower alone: every patch says which classes and colours its pixels have, which of them belong to a
shape, and where that shape ends, by linear layers that are dropped later. Then tower, projector and language model
together, on answers to questions about classes, colours and numbers and on captions; half of the yes/no questions have
the answer yes. All questions about an image follow it in one sequence, and none sees another. `--work` receives
`checkpoint.pt` every few minutes; the same command goes on from it. At the end, or at once with `--export-only`, the
averaged weights are written as the folder `mobilevlm-shapes` in the layout of the published checkpoints, exported by
`bitalloy.zoo`, and the *exported program* is measured.
"""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from bitalloy.data.images import ImageSpec
from bitalloy.samples import shapes, words
from bitalloy.tasks.captions import QUESTION
from bitalloy.tasks.chat import IMAGE_TOKEN, Chat, Turn
from bitalloy.tasks.pieces import read_pieces
from bitalloy.tasks.questions import Question
from bitalloy.zoo.mobilevlm import FIELDS, MOBILEVLM_SHAPES, clip, export_mobilevlm, llama
from bitalloy.zoo.mobilevlm_chat import CLIP_DEVIATION, CLIP_MEAN, TOKENIZER_FILE
from bitalloy.zoo.networks.mobilevlm import Vision
from program_file import evaluate_language
from program_file import export as export_program
from training import Batch, Recipe, main

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "bitalloy" / "samples" / "mobilevlm-shapes"
PIECES = Path(__file__).with_name(TOKENIZER_FILE)
"""Written by `vocabulary.py`."""
NUMBERS: dict[str, Any] = dict(MOBILEVLM_SHAPES.architecture)
SIDE, PATCH = MOBILEVLM_SHAPES.size[0], NUMBERS["clip_patch"]
ALONE = 0.6
"""Part of all steps in which the vision tower learns alone."""
EACH = 2
"""Most yes/no questions with one answer about an image."""
DENSE, SAID = 0.5, 0.5
"""Weights of the patches' loss and of the loss of all other answers, beside that of yes and no."""
KINDS = len(shapes.CLASSES)
REACH, SHARP = (1, 1, 2), 2.6
"""How far the heads of the first layers look before training, in patches, and how sharply."""


class Student(nn.Module):
    """Vision tower with projector, language model, and the linear layers that are dropped at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Vision(clip(NUMBERS, SIDE), NUMBERS["hidden_size"])
        self.language = llama(NUMBERS)
        self.patches = nn.Linear(NUMBERS["clip_hidden_size"], KINDS + len(shapes.COLORS) + 2)
        self.pixels = nn.Linear(NUMBERS["clip_hidden_size"], PATCH**2)
        self.boxes = nn.Linear(NUMBERS["clip_hidden_size"], 4)
        self.cells = nn.Linear(NUMBERS["hidden_size"], KINDS)
        look_around(self.vision.vision_tower)
        look_up(self.language, self.cells)


@torch.no_grad()
def look_up(language: Any, cells: nn.Linear) -> None:
    """Let equal words attend to each other before training, and let tokens of the image be like the words for them.

    Meant to let a question find its class in the image early; whether it does in this recipe was not shown yet.
    """
    table = language.model.embed_tokens.weight
    table.normal_(std=0.1)
    for layer in language.model.layers:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        query.normal_(std=query.shape[1] ** -0.5)
        key.copy_(query)
    for token, number in class_words().items():
        cells.weight[number] = table[token]


@torch.no_grad()
def look_around(tower: Any) -> None:
    """Let every head of the first layers look at one neighbour, before training: a convolution to start with.

    Few scenes teach a vision transformer little about shapes without it (https://arxiv.org/abs/2103.10697). Positions
    are sines and cosines of four frequencies per axis in the first channels; a key is turned by the head's offset.
    """
    grid = SIDE // PATCH
    waves = math.tau / (2 * grid) * torch.tensor([1.0, 3.0, 5.0, 7.0])
    used = 4 * len(waves)  # sine and cosine on two axes
    steps = torch.arange(grid)[:, None] * waves
    axis = math.sqrt(2) * torch.stack((steps.sin(), steps.cos()), -1).flatten(1)
    table, patch = tower.embeddings.position_embedding.weight, tower.embeddings.patch_embedding.weight
    table.normal_(std=0.02)
    down, along = axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)
    table[1:, :used] = torch.cat((along, down), 1)
    patch.normal_(std=0.06)
    patch[:used] = 0
    size = NUMBERS["clip_hidden_size"] // NUMBERS["clip_heads"]
    ring = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if (x, y) != (0, 0)]
    for layer, far in zip(tower.encoder.layers, REACH, strict=False):
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for head, (x, y) in enumerate(ring):
            rows = slice(head * size, head * size + used)
            query[rows, :used] = SHARP * torch.eye(used)
            angles = -far * torch.cat((x * waves, y * waves))
            turns = [torch.tensor([[a.cos(), a.sin()], [-a.sin(), a.cos()]]) for a in angles]
            key[rows, :used] = SHARP * torch.block_diag(*turns)


@cache
def chat() -> Chat:
    """The conversation that `bitalloy.tasks` has with the model."""
    image = ImageSpec(input="pixel_values", height=SIDE, width=SIDE, mean=CLIP_MEAN, std=CLIP_DEVIATION)
    pieces = read_pieces(PIECES)
    assert pieces is not None
    return Chat(pieces, image)


@cache
def turn(question: str, answer: str) -> Turn:
    """Ids of a question and its answer."""
    return chat().turn(question, answer)


@cache
def class_words() -> dict[int, int]:
    """Token -> class; every name of a class is one token."""
    return {chat().tokenizer.encode(name)[0]: i for i, name in enumerate(shapes.CLASSES)}


def loss(student: Any, batch: Batch, done: float) -> tuple[Tensor, dict[str, float]]:
    """Of the patches, and from `ALONE` on of the image's tokens and of the answers."""
    mean, deviation = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_DEVIATION))
    seen = student.vision.vision_tower((batch.images - mean) / deviation, output_hidden_states=True)
    patches = seen.hidden_states[-2][:, 1:]
    classes, colors = (covered(table, batch.instances, n) for table, n in ((batch.labels, KINDS), (batch.colors, 8)))
    found = student.patches(patches).float()
    dense = soft(found[..., : KINDS + 1], classes) + soft(found[..., KINDS + 1 :], colors)
    outline, extent = geometry(student, seen.hidden_states, batch)
    parts = {"patches": dense.item(), "pixels": outline.item(), "boxes": extent.item()}
    dense = dense + outline + extent
    if done < ALONE:
        return dense, parts
    features = student.vision.mm_projector(patches)
    grid = SIDE // PATCH
    shown = F.max_pool2d(classes[..., 1:].transpose(1, 2).unflatten(2, (grid, grid)), 2).flatten(2).transpose(1, 2)
    there = F.binary_cross_entropy_with_logits(student.cells(features).float(), (shown > 0.2).float())
    yes, other, known, right = answers(student, features, batch)
    parts |= {"cells": there.item(), "yes/no": yes.item(), "other": other.item(), "known": known.item(), "right": right}
    return DENSE * dense + there + known + yes + SAID * other, parts


def geometry(student: Any, states: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses of which pixels of a patch belong to a shape, and of the box of the shape that its middle belongs to.

    The earlier layers learn them: a class is a matter of outlines, whatever the colours are.
    """
    pixels = student.pixels(states[2][:, 1:]).float()
    painted = F.unfold((batch.instances > 0).float()[:, None], PATCH, stride=PATCH).transpose(1, 2)
    outline = F.binary_cross_entropy_with_logits(pixels, painted)
    middle = torch.arange(PATCH // 2, SIDE, PATCH)
    owner = batch.instances[:, middle][:, :, middle].flatten(1).long()
    places = torch.stack((middle.repeat(len(middle)), middle.repeat_interleave(len(middle))), 1)
    boxes = batch.boxes.gather(1, (owner - 1).clamp(min=0)[..., None].expand(-1, -1, 4))
    wanted = (boxes - places.repeat(1, 2)) / (SIDE / 4)
    found = student.boxes(states[3][:, 1:]).float()
    return outline, F.smooth_l1_loss(found[owner > 0], wanted[owner > 0], beta=0.2)


def covered(table: Tensor, instances: Tensor, count: int) -> Tensor:
    """(B, P, count + 1): which part of a patch is background and which has each number of the `table` (B, M)."""
    lookup = F.pad(table + 1, (1, 0))
    pixels = lookup.gather(1, instances.flatten(1).long()).view(instances.shape)
    return F.avg_pool2d(F.one_hot(pixels, count + 1).permute(0, 3, 1, 2).float(), PATCH).flatten(2).transpose(1, 2)


def soft(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy per patch; a patch of background counts a quarter."""
    weight = 0.25 + (1 - wanted[..., 0])
    return -((wanted * logits.log_softmax(-1)).sum(-1) * weight).sum() / weight.sum()


def asked(labels: list[int], colors: list[int]) -> tuple[list[Turn], list[Turn]]:
    """Yes/no questions about a scene, as many of each kind where that is possible, and one of the others."""
    present = [i for i in range(KINDS) if i in labels]
    absent = [i for i in range(KINDS) if i not in labels]
    count = min(EACH, len(present) or 1, len(absent) or 1)
    polar, others = [], [turn(QUESTION, words.caption(labels, colors))]
    for classes, answer in ((present, "yes"), (absent, "no")):
        for i in random.sample(classes, min(count, len(classes))):
            question = Question("", f"Is there a {shapes.CLASSES[i]} in the image?", answer, "yes/no")
            polar.append(turn(question.prompt(), answer))
    for line in words.questions(labels, colors):
        if line["answer"] not in ("yes", "no"):
            choices = tuple(line.get("choices", ()))
            question = Question("", line["question"], line["answer"], "choice" if choices else "open", choices)
            others.append(turn(question.prompt(), line["answer"]))
    return polar, random.sample(others, 1)


def answers(student: Any, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, float]:
    """Losses of yes and no, of all other answers, and of what is known early; and the part of yes and no that is right.

    What is known early: from the word of a class on, every state of a yes/no question tells by the layer `cells`
    whether the class is there. Without it the answer stays a guess for long.

    A row is the prompt up to the image, the image, and then every question with its answer from the same position on;
    each of these sees what stands before the questions, and itself.
    """
    rows = []
    for labels, colors in zip(batch.labels.tolist(), batch.colors.tolist(), strict=True):
        polar, others = asked([v for v in labels if v >= 0], [v for v in colors if v >= 0])
        rows.append([(t, kind) for kind, turns in ((1, polar), (2, others)) for t in turns])
    before = rows[0][0][0].prompt
    lead = before[: before.index(IMAGE_TOKEN)]
    start = len(lead) + features.shape[1]
    after = len(lead) + 1
    length = max(sum(len(t.prompt) - after + len(t.answer) for t, _ in row) for row in rows)
    ids = np.zeros((len(rows), length), np.int64)
    target, segment, place, what, early, there = (np.zeros_like(ids) for _ in range(6))
    for r, row in enumerate(rows):
        at = 0
        for number, (t, kind) in enumerate(row, 1):
            text = (*t.prompt[after:], *t.answer)
            end, first = at + len(text), at + len(text) - len(t.answer) - 1
            ids[r, at:end], segment[r, at:end], place[r, at:end] = text, number, range(start, start + len(text))
            target[r, first : end - 1], what[r, first : end - 1] = t.answer, kind
            if kind == 1:
                word = next(i for i, token in enumerate(text) if token in class_words())
                early[r, at + word : first + 1] = class_words()[text[word]] + 1
                there[r, at:end] = t.answer == turn("", "yes").answer
            at = end
    language = student.language
    embed = language.model.embed_tokens
    opening = embed(torch.tensor(lead)).expand(len(rows), -1, -1)
    vectors = torch.cat((opening, features, embed(torch.from_numpy(ids))), 1)
    groups = F.pad(torch.from_numpy(segment), (start, 0))
    open_ = torch.ones(start + length, start + length, dtype=torch.bool).tril()
    sees = open_ & ((groups[:, None, :] == 0) | (groups[:, None, :] == groups[:, :, None]))
    sees[:, :, start:] &= groups[:, :, None] == groups[:, None, start:]
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    places = torch.cat((torch.arange(start).expand(len(rows), -1), torch.from_numpy(place)), 1)
    states = language.model(
        inputs_embeds=vectors, attention_mask=mask, position_ids=places, use_cache=False
    ).last_hidden_state[:, start:]
    kinds, truth = torch.from_numpy(what), torch.from_numpy(target)
    chosen = kinds > 0
    logits = language.lm_head(states[chosen]).float()
    each = F.cross_entropy(logits, truth[chosen], reduction="none")
    yes_or_no = kinds[chosen] == 1
    opening_word = yes_or_no & (truth[chosen] != chat().tokenizer.eos)
    right = (logits[opening_word].argmax(-1) == truth[chosen][opening_word]).float().mean().item()
    asked_for = torch.from_numpy(early)
    told = student.cells(states[asked_for > 0]).float().gather(1, asked_for[asked_for > 0][:, None] - 1)[:, 0]
    known = F.binary_cross_entropy_with_logits(told, torch.from_numpy(there)[asked_for > 0].float())
    return each[yes_or_no].mean() * 2, each[~yes_or_no].mean(), known, right


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights under the names of the published checkpoints."""
    found = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "language":
            found[rest] = tensor
        elif part == "vision":
            rest = rest.replace("vision_tower.", "vision_tower.vision_tower.vision_model.", 1)
            found[f"model.{rest}"] = tensor
    return found


def orthogonal(name: str) -> bool:
    """The matrices inside the layers of both transformers."""
    return ".layers." in name and "norm" not in name and name.endswith("weight")


def write(state: dict[str, Any], output: Path, work: Path) -> None:
    """Write the checkpoint as a folder in `work`, and the program to the folder `output`."""
    folder = work / MOBILEVLM_SHAPES.name
    folder.mkdir(exist_ok=True)
    torch.save(published(state["average"]), folder / "pytorch_model.bin")
    config = {theirs: NUMBERS[ours] for ours, theirs in FIELDS.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / TOKENIZER_FILE).write_bytes(PIECES.read_bytes())
    export_program(folder, output, variant=MOBILEVLM_SHAPES, by=export_mobilevlm, state=state)
    (output / TOKENIZER_FILE).write_bytes(PIECES.read_bytes())


def finish(state: dict[str, Any], output: Path, work: Path) -> dict[str, Any]:
    """Write the checkpoint and the program, and measure the program."""
    write(state, output, work)
    return {"bytes": sum(f.stat().st_size for f in output.iterdir())} | evaluate_language(output, work / "val")


RECIPE = Recipe(
    build=Student,
    loss=loss,
    stages=((SIDE, 4000),),
    learning_rate=1.5e-3,
    final_rate=1e-5,
    rate_of=lambda name: 2.0 if orthogonal(name) or name.startswith("language") else 1.0,
    orthogonal=orthogonal,
    bfloat16=True,
)


if __name__ == "__main__":
    main(__doc__, RECIPE, OUTPUT, finish)
