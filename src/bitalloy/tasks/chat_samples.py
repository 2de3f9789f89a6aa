"""Samples of a vision-language model: an image with the tokens of a question, perhaps with its answer."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitalloy.core.store import key_of
from bitalloy.data.datasets import ImageFolder, Samples, choose_samples
from bitalloy.data.images import file_hash, open_image
from bitalloy.tasks.base import Interface, image_input
from bitalloy.tasks.captions import QUESTION, read_captions
from bitalloy.tasks.chat import AFTER, BEFORE, IMAGE_TOKEN, MASK, POSITIONS, Chat, empty_cache, open_chat
from bitalloy.tasks.questions import is_lines, read_questions

__all__ = ["ChatSamples"]


@dataclass(frozen=True, slots=True)
class _Turn:
    file: Path
    text: str
    ids: tuple[int, ...]
    """Token ids, with the image's placeholder."""


class ChatSamples(Samples):
    """Images with token ids, all of the same length, for a program of vision, embedding and decoder.

    1. A question is fed up to where its answer begins; a caption with its tokens, so that one run predicts each.
    2. The length is the most common one. Longer turns are cut at the end, which changes nothing for the positions that
       are left, since no position sees a later one; shorter turns are left out.
    3. Turns about one image lie far apart, so that the first samples show many images.

    Args:
        chat: tokenizer, prompt and image preparation of the model.
        turns: image files with token ids.
        cache: layers, heads and width per head of the decoder's cache, which is fed empty.
        tokens: number of vectors that stand for the image.
        label: name of the data set.
        seed: seed of the choice of samples.
    """

    def __init__(
        self, chat: Chat, turns: Sequence[_Turn], cache: tuple[int, int, int], tokens: int, *, label: str, seed: int = 0
    ) -> None:
        self.label, self.seed = label, seed
        self._chat, self._turns, self._cache, self._tokens = chat, tuple(turns), cache, tokens
        self.preprocessing = f"{chat.describe()}; {len(self._turns[0].ids) - 1} tokens beside the image"
        self.decisive = key_of(chat.image)

    @staticmethod
    def open(
        paths: Sequence[Path],
        model: Interface,
        cache: tuple[int, int, int],
        tokens: int,
        *,
        limit: int | None,
        seed: int,
    ) -> ChatSamples:
        """Open samples from questions (JSON lines), captions (COCO) and folders of images.

        Raises:
            DataError: the paths hold nothing usable.
        """
        chat = open_chat(model)
        turns = [turn for path in paths for turn in _turns(path, chat, model)]
        counts = Counter(len(turn.ids) for turn in turns)
        length = max(counts, key=lambda n: (counts[n], n))
        fitting = [_Turn(t.file, t.text, t.ids[:length]) for t in turns if len(t.ids) >= length]
        chosen = choose_samples([f"{t.file.name}\0{t.text}" for t in fitting], limit=limit, seed=seed)
        label = "+".join(path.resolve().name for path in paths)
        used = _spread([fitting[i] for i in chosen])
        return ChatSamples(chat, used, cache, tokens, label=label, seed=seed if limit else 0)

    def __len__(self) -> int:
        return len(self._turns)

    def name(self, index: int) -> str:
        return f"{self._turns[index].file.name}: {self._turns[index].text}"

    def source(self, index: int) -> str:
        return self._turns[index].file.name

    def files(self, index: int) -> tuple[Path, ...]:
        return (self._turns[index].file,)

    def feeds(self, index: int) -> dict[str, np.ndarray]:
        turn = self._turns[index]
        at = turn.ids.index(IMAGE_TOKEN)
        before, after = (np.array([part], np.int64) for part in (turn.ids[:at], turn.ids[at + 1 :]))
        count = before.shape[1] + self._tokens + after.shape[1]
        return {
            self._chat.image.input: self._chat.feed(open_image(turn.file)),
            BEFORE: before,
            AFTER: after,
            MASK: np.ones((1, count), np.int64),
            POSITIONS: np.arange(count, dtype=np.int64)[None],
            **empty_cache(self._cache),
        }

    def fingerprint(self, index: int) -> str:
        turn = self._turns[index]
        digest = hashlib.sha256(f"{self.preprocessing}\0{turn.text}\0{turn.ids}\0".encode())
        digest.update(file_hash(turn.file).encode())
        return digest.hexdigest()


def _turns(path: Path, chat: Chat, model: Interface) -> list[_Turn]:
    if path.is_dir():
        picture = image_input(model)
        assert picture is not None, "a language model without an image input is refused"
        images = ImageFolder(path, (picture,), chat.image)
        return [_Turn(path / images.name(i), QUESTION, chat.prompt(QUESTION)) for i in range(len(images))]
    if is_lines(path):
        asked = read_questions(path, chat)
        return [_Turn(asked.folder / q.image, q.text, chat.prompt(q.prompt())) for q in asked.questions]
    found = []
    captions = read_captions(path, chat)
    for file, texts in captions.captions:
        for text in texts:
            turn = chat.turn(QUESTION, text)
            found.append(_Turn(captions.folder / file, text, (*turn.prompt, *turn.answer[:-1])))
    return found


def _spread(turns: Sequence[_Turn]) -> list[_Turn]:
    """The first turn of each image, then the second of each, and so on."""
    seen: dict[Path, int] = defaultdict(int)
    places = []
    for turn in turns:
        places.append(seen[turn.file])
        seen[turn.file] += 1
    return [turn for _, turn in sorted(zip(places, turns, strict=True), key=lambda pair: pair[0])]
