"""Vision-language models: captions (`.json` in COCO format) and questions (JSON lines)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bitalloy.core.examples import ExampleText
from bitalloy.tasks.base import (
    Interface,
    RunModel,
    Seen,
    ShownSample,
    ShowSample,
    Task,
    TaskResult,
    image_input,
)
from bitalloy.tasks.bootstrap import RESAMPLES
from bitalloy.tasks.captions import (
    LOSS_NOISE,
    QUESTION,
    CaptionData,
    disturb_losses,
    measure_captions,
    observe_captions,
    read_captions,
    write_caption,
)
from bitalloy.tasks.chat import IDS, open_chat
from bitalloy.tasks.greedy import answers_of, first_divergent
from bitalloy.tasks.pictures import thumbnail_of
from bitalloy.tasks.questions import (
    CHANGED_ANSWERS,
    QuestionData,
    disturb_answers,
    is_lines,
    measure_questions,
    observe_questions,
    read_questions,
)

__all__ = ["LANGUAGE", "LanguageData", "open_language"]

LanguageData = CaptionData | QuestionData


def open_language(path: Path, model: Interface) -> LanguageData:
    """Read questions from a file of JSON lines, captions from any other.

    Raises:
        DataError: the file is broken, or the model comes without a tokenizer.
    """
    chat = open_chat(model)
    return read_questions(path, chat) if is_lines(path) else read_captions(path, chat)


def _observe(models: Mapping[str, RunModel], data: LanguageData, sample: int, /) -> dict[str, Seen]:
    if isinstance(data, QuestionData):
        return observe_questions(models, data, sample)
    return observe_captions(models, data, sample)


def _alone(model: RunModel, data: LanguageData, sample: int, /) -> Seen:
    return {} if isinstance(data, QuestionData) else write_caption(model, data, sample)


def _measure(
    seen: Mapping[str, Sequence[Seen]],
    data: LanguageData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    if isinstance(data, QuestionData):
        return measure_questions(seen, data, samples, seed=seed, resamples=resamples)
    return measure_captions(seen, data, samples, seed=seed, resamples=resamples)


def _matches(model: Interface) -> bool:
    """An image and token ids come in."""
    return image_input(model) is not None and IDS in {i.name for i in model.inputs}


def _disturb(seen: Seen, rng: np.random.Generator, /) -> Seen:
    return disturb_answers(seen, rng) if "answers" in seen else disturb_losses(seen, rng)


SHOWN_ANSWERS = 4
"""Largest number of answers about one image that are shown."""


def _agree(reference: Seen, other: Seen) -> float:
    pairs = list(zip(answers_of(reference), answers_of(other), strict=True))
    parts = [first_divergent(a, b) / max(len(a), len(b), 1) for a, b in pairs]
    return sum(parts) / len(parts) if parts else 1.0


def _draw(image: Image.Image, reference: Seen, other: Seen, data: LanguageData, sample: int, /) -> ShownSample:
    """Return the image, with the prompts whose answers differ before the others."""
    pairs = list(zip(answers_of(reference), answers_of(other), strict=True))
    asked = [QUESTION] * len(pairs)
    if isinstance(data, QuestionData):
        asked = [question.prompt() for question in data.by_image[list(data.by_image)[sample]]]
    texts = [
        ExampleText(asked=text, reference=data.chat.text(a), mixed=data.chat.text(b))
        for text, (a, b) in sorted(zip(asked, pairs, strict=True), key=lambda pair: pair[1][0] == pair[1][1])
    ]
    return ShownSample(thumbnail_of(image), None, tuple(texts[:SHOWN_ANSWERS]))


LANGUAGE: Task[LanguageData] = Task(
    name="language",
    labels="a COCO caption file, or a file of questions as JSON lines",
    matches=_matches,
    open=open_language,
    disturb=_disturb,
    disturbance=f"the loss of every token changed by {LOSS_NOISE} nats, or {CHANGED_ANSWERS * 100:g} % of the answers",
    observe=_observe,
    measure=_measure,
    alone=_alone,
    show=ShowSample(
        measure="part of an answer up to the first token that differs, mean over the prompts of an image",
        agree=_agree,
        draw=_draw,
    ),
)
