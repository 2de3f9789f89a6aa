"""Vision-language models: captions (`.json` in COCO format) and questions (JSON lines)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitalloy.tasks.base import Interface, Progress, Run, Task, TaskResult, image_input, nothing
from bitalloy.tasks.captions import CaptionData, evaluate_captions, read_captions
from bitalloy.tasks.chat import IDS, open_chat
from bitalloy.tasks.questions import QuestionData, evaluate_questions, is_lines, read_questions

__all__ = ["TASK", "LanguageData", "evaluate_language", "open_language"]

LanguageData = CaptionData | QuestionData


def open_language(path: Path, model: Interface) -> LanguageData:
    """Read questions from a file of JSON lines, captions from any other.

    Raises:
        DataError: the file is broken, or the model comes without a tokenizer.
    """
    chat = open_chat(model)
    return read_questions(path, chat) if is_lines(path) else read_captions(path, chat)


def evaluate_language(
    models: Mapping[str, Run],
    data: LanguageData,
    /,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress = nothing,
) -> TaskResult:
    """`evaluate_captions` or `evaluate_questions`."""
    if isinstance(data, QuestionData):
        return evaluate_questions(models, data, limit=limit, seed=seed, progress=progress)
    return evaluate_captions(models, data, limit=limit, seed=seed, progress=progress)


def _matches(model: Interface) -> bool:
    """An image and token ids come in."""
    return image_input(model) is not None and IDS in {i.name for i in model.inputs}


TASK: Task[LanguageData] = Task(
    name="language",
    labels="a COCO caption file, or a file of questions as JSON lines",
    matches=_matches,
    open=open_language,
    evaluate=evaluate_language,
)
