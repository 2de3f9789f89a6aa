"""Questions about images: yes/no as in POPE, multiple choice as in ScienceQA and MMBench, short answers as in GQA.

A file has one JSON object a line: `{"image": "0.jpg", "question": "Is there a dog?", "answer": "yes"}`. POPE's own
files, which say `text` and `label`, are read as they are. `choices` makes a question multiple choice; its answer is a
letter, a number from 0, or the text of a choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import DataError
from bitalloy.core.store import StageInputs
from bitalloy.data.datasets import choose_samples
from bitalloy.data.images import open_image
from bitalloy.tasks.base import RunModel, Seen, TaskMetric, TaskResult, few_images
from bitalloy.tasks.bootstrap import RESAMPLES, compare_models, ratio_of_sums, resampled_weights
from bitalloy.tasks.chat import NEW_TOKENS, Chat, ChatInputs
from bitalloy.tasks.coco import find_images
from bitalloy.tasks.greedy import compare_answers, joined_answers

__all__ = [
    "Kind",
    "Question",
    "QuestionData",
    "is_lines",
    "measure_questions",
    "observe_questions",
    "read_answer",
    "read_questions",
]

Kind = Literal["yes/no", "choice", "open"]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""Texts that are added to a question, as in LLaVA's and MobileVLM's evaluations."""
LETTERS = "ABCDEFGHIJ"
CHANGED_ANSWERS = 0.03
"""Part of the answers that `disturb_answers` changes."""
ANSWER_AGREEMENT = "answer agreement"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image."""

    image: str
    """File name of the image."""
    text: str
    answer: str
    """Answer in lower case, or a letter for multiple choice."""
    kind: Kind
    choices: tuple[str, ...] = ()

    def prompt(self) -> str:
        """Return the text of the question as it is put to the model."""
        if self.kind != "choice":
            return f"{self.text}\n{SHORT}"
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.text, *options, LETTER])


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    image: str
    question: str | None = None
    text: str | None = None
    answer: str | int | None = None
    label: str | None = None
    choices: tuple[str, ...] = ()


class QuestionInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metrics of questions, beside the models."""

    images: tuple[str, ...]
    """SHA-256 of each image."""
    questions: tuple[tuple[Question, ...], ...]
    """Questions about each image."""
    chat: ChatInputs
    new_tokens: int
    """Largest number of tokens of an answer."""


@dataclass(frozen=True)
class QuestionData:
    """Questions about images, opened for one model."""

    path: Path
    folder: Path
    """Folder of the images."""
    questions: tuple[Question, ...]
    chat: Chat

    @property
    def labelled(self) -> bool:
        """True: without a text there is nothing to ask."""
        return True

    @property
    def paired(self) -> bool:
        """False: every model is observed alone."""
        return False

    @cached_property
    def by_image(self) -> dict[str, list[Question]]:
        """Image -> questions about it, in the order of the names of the images."""
        found: dict[str, list[Question]] = {name: [] for name in sorted({q.image for q in self.questions})}
        for question in self.questions:
            found[question.image].append(question)
        return found

    def choose(self, limit: int | None, seed: int) -> list[int]:
        """Choose at most `limit` images, None for all, and return their numbers in the order of their names."""
        return choose_samples(list(self.by_image), limit=limit, seed=seed)

    def images(self, samples: Sequence[int]) -> tuple[Path, ...]:
        """Return the file of the image of each sample."""
        names = list(self.by_image)
        return tuple(self.folder / names[i] for i in samples)

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> QuestionInputs:
        """Return all that decides metrics on some samples, whose images have the given hashes."""
        names = list(self.by_image)
        asked = tuple(tuple(self.by_image[names[i]]) for i in samples)
        ids = [self.chat.prompt(question.prompt()) for some in asked for question in some]
        return QuestionInputs(images=tuple(images), questions=asked, chat=self.chat.inputs(ids), new_tokens=NEW_TOKENS)


def is_lines(path: Path) -> bool:
    """Return whether a file has a question per line: a `.jsonl`, or one whose first line is a question (POPE)."""
    if path.suffix == ".jsonl":
        return True
    try:
        with path.open("rb") as file:
            from_json(file.readline(), _Line)
    except (OSError, ValueError):
        return False
    return True


def read_questions(path: Path, chat: Chat) -> QuestionData:
    """Read a file of questions, one JSON object a line, and find its images.

    Raises:
        DataError: a line is broken (the message has its number), or images are missing.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"Cannot read the questions '{path}': {error.strerror}. Give a .jsonl file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is no UTF-8 text: {error}. Give a .jsonl file.") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(from_json(line, _Line)))
        except ValueError as error:  # msgspec's errors are of this type
            raise DataError(
                f"Line {number} of '{path}' is no question: {error}. Expected "
                '{"image": "0.jpg", "question": "Is there a dog?", "answer": "yes"}.'
            ) from error
    if not questions:
        raise DataError(f"'{path}' has no questions. Write one JSON object a line.")
    folder = find_images(path, sorted({question.image for question in questions}))
    return QuestionData(path, folder, tuple(questions), chat)


def _question(line: _Line) -> Question:
    text = line.question if line.question is not None else line.text
    answer = line.answer if line.answer is not None else line.label
    if not text or not text.strip() or answer is None or not str(answer).strip():
        raise ValueError("it needs a `question` (or `text`) and an `answer` (or `label`)")
    if line.choices:
        return Question(line.image, text, _letter(answer, line.choices), "choice", line.choices)
    plain = _plain(str(answer))
    return Question(line.image, text, plain, "yes/no" if plain in ("yes", "no") else "open")


def _letter(answer: str | int, choices: Sequence[str]) -> str:
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"it has {len(choices)} choices; expected 2 to {len(LETTERS)}")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and answer in choices:
        return letters[choices.index(answer)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    raise ValueError(f"the answer {answer!r} is none of {letters} and none of the choices")


def _plain(text: str) -> str:
    """Lower case without the full stop, with single spaces."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def read_answer(text: str, question: Question) -> str:
    """Read the answer from a generated text: `yes` or `no`, a letter (`?` for none), or the text itself in plain form.

    1. Yes or no as in POPE's evaluation: `no` if the first sentence has the word no or not, else `yes`.
    2. Multiple choice: a letter at the start, alone or before a mark; a letter after `answer is`; the text of a choice.
    3. Else lower case, without a full stop.
    """
    if question.kind == "yes/no":
        words = text.split(".")[0].replace(",", "").split()
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    if question.kind == "choice":
        letters = LETTERS[: len(question.choices)]
        found = re.match(rf"\(?([{letters}])(?:[).:,\s]|$)", text) or re.search(rf"answer is \(?([{letters}])\b", text)
        if found:
            return found.group(1)
        texts = [_plain(choice) for choice in question.choices]
        return letters[texts.index(_plain(text))] if _plain(text) in texts else "?"
    return _plain(text)


def observe_questions(models: Mapping[str, RunModel], data: QuestionData, sample: int, /) -> dict[str, Seen]:
    """Generate the answers of models to all questions about one image, greedily.

    Raises:
        DataError: the image is damaged, or a model's outputs are not logits.
    """
    file = list(data.by_image)[sample]
    questions = data.by_image[file]
    image = data.chat.feed(open_image(data.folder / file))
    found: dict[str, Seen] = {}
    for name, run in models.items():
        tokens = [data.chat.generate(run, image, q.prompt()) for q in questions]
        answers = [read_answer(data.chat.text(one), q) for one, q in zip(tokens, questions, strict=True)]
        found[name] = {"answers": np.frombuffer(to_json(answers), np.uint8), **joined_answers(tokens)}
    return found


def measure_questions(
    seen: Mapping[str, Sequence[Seen]],
    data: QuestionData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Measure the part of right answers by kind of question, and the agreement with the first model's answers.

    `answer agreement` compares answers as they are read (`read_answer`), `tasks.greedy` their tokens.
    `yes/no F1` counts yes as positive. Intervals draw images with all their questions.
    """
    answers = {
        name: [msgspec.json.decode(one["answers"].tobytes(), type=list[str]) for one in part]
        for name, part in seen.items()
    }
    every = list(data.by_image.values())
    asked = [every[i] for i in samples]
    n, weights = len(samples), resampled_weights(len(samples), resamples, seed)
    total = sum(map(len, asked))
    return TaskResult(
        task="language",
        metrics=(*_metrics(asked, answers, weights), *compare_answers(seen, "answer", weights)),
        notes=(f"{total} questions on {n} images.", *few_images(n)),
    )


def disturb_answers(seen: Seen, rng: np.random.Generator) -> Seen:
    """Change 3 % of the answers about one image: yes to no and no to yes, others to another one."""
    answers = msgspec.json.decode(seen["answers"].tobytes(), type=list[str])
    other = {"yes": "no", "no": "yes"}
    changed = [other.get(a, f"not {a}") if rng.random() < CHANGED_ANSWERS else a for a in answers]
    return {**seen, "answers": np.frombuffer(to_json(changed), np.uint8)}


def _metrics(
    asked: Sequence[Sequence[Question]], answers: Mapping[str, Sequence[Sequence[str]]], weights: np.ndarray
) -> tuple[TaskMetric, ...]:
    n, metrics = len(asked), []
    labels: tuple[tuple[Kind, str], ...] = (
        ("yes/no", "yes/no accuracy"),
        ("choice", "choice accuracy"),
        ("open", "exact match"),
    )
    for kind, label in labels:
        count = np.array([sum(q.kind == kind for q in questions) for questions in asked])
        if not count.any():
            continue
        right = {
            name: [
                sum(q.kind == kind and q.answer == a for q, a in zip(questions, given, strict=True))
                for questions, given in zip(asked, found, strict=True)
            ]
            for name, found in answers.items()
        }
        metrics.append(
            compare_models(
                label,
                {name: ratio_of_sums(np.array(r), count, weights) for name, r in right.items()},
                n,
                witness=ANSWER_AGREEMENT,
            )
        )
        if kind == "yes/no":
            f1 = {name: _yes(asked, found) for name, found in answers.items()}
            if all(table[:, 1].any() for table in f1.values()):
                measured = {name: ratio_of_sums(2 * table[:, 0], table[:, 1], weights) for name, table in f1.items()}
                metrics.append(compare_models("yes/no F1", measured, n, witness=ANSWER_AGREEMENT))
    reference = next(iter(answers.values()))
    same = {
        name: np.array([sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(reference, found, strict=True)])
        for name, found in answers.items()
    }
    count = np.array([len(questions) for questions in asked])
    metrics.append(
        compare_models(
            ANSWER_AGREEMENT, {name: ratio_of_sums(s, count, weights) for name, s in same.items()}, n, agreement=True
        )
    )
    return tuple(metrics)


def _yes(asked: Sequence[Sequence[Question]], found: Sequence[Sequence[str]]) -> np.ndarray:
    """(I, 2) per image: yes rightly said; yes said plus yes expected. F1 is twice the first over the second."""
    rows = []
    for questions, given in zip(asked, found, strict=True):
        pairs = [(q.answer == "yes", a == "yes") for q, a in zip(questions, given, strict=True) if q.kind == "yes/no"]
        rows.append((sum(a and b for a, b in pairs), sum(a + b for a, b in pairs)))
    return np.array(rows)
