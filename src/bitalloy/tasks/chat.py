"""Chats with a vision-language model: tokens of the prompt, the image, log-probabilities, and greedy answers.

A model is one function from `input_ids` (1, s) and an image to logits (1, s', vocabulary). One id, `IMAGE_TOKEN`,
stands for the image; the model puts as many embeddings in its place as it likes, so rows of logits are counted from the
end. While an answer is generated, ids grow at the end and the image is the very same array: a model that keeps its keys
and values recognises what it has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from bitalloy.core.errors import DataError
from bitalloy.core.records import Record
from bitalloy.data.images import ImageOptions, ImageSpec, image_feed, infer_image_spec, refuse_enlarged
from bitalloy.tasks.base import Interface, RunModel, Tokenizer, refuse_fit

__all__ = [
    "AFTER",
    "BEFORE",
    "IDS",
    "IMAGE_TOKEN",
    "MASK",
    "POSITIONS",
    "TEMPLATE",
    "Chat",
    "SentencePieces",
    "Turn",
    "empty_cache",
    "join_chat",
    "log_probabilities",
    "open_chat",
]

IDS = "input_ids"
BEFORE, AFTER = "before", "after"
"""Names of the inputs of the graph that embeds tokens: ids before and after the image."""
MASK, POSITIONS = "attention_mask", "position_ids"
"""Names of the decoder's inputs beside embeddings and cache."""
IMAGE_TOKEN = -200
"""Token id that stands for the image; LLaVA and MobileVLM use this number."""
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
"""MobileVLM's prompt (conversation `v1`)."""
NEW_TOKENS = 16
"""Largest number of tokens of an answer to a question."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of pixels in CLIP's image processor."""


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """A `sentencepiece.SentencePieceProcessor` as a tokenizer."""

    processor: Any

    @property
    def bos(self) -> int | None:
        """Id of `<s>`; None where the model has none."""
        found = int(self.processor.bos_id())
        return found if found >= 0 else None

    @property
    def eos(self) -> int:
        """Id of `</s>`."""
        return int(self.processor.eos_id())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return [int(i) for i in self.processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; ids beyond the vocabulary, which padded models may give, are left out."""
        size = int(self.processor.vocab_size())
        return str(self.processor.decode([i for i in ids if i < size]))


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answer, as token ids."""

    prompt: tuple[int, ...]
    """Token ids of the question, with the image's placeholder."""
    answer: tuple[int, ...]
    """Token ids of the answer, which end with the tokenizer's `eos`."""


class ChatInputs(Record, frozen=True, kw_only=True):
    """All that decides what a chat feeds: a part of stages' inputs."""

    image: ImageSpec
    template: str
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt or answer, which the tokenizer decides."""
    eos: int
    """Token id that ends an answer."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Tokenizer, prompt and image preparation of one vision-language model."""

    tokenizer: Tokenizer
    image: ImageSpec
    template: str = TEMPLATE
    """Text of the prompt, with the placeholders `<image>` and `{question}`."""

    def inputs(self, ids: Sequence[Sequence[int]]) -> ChatInputs:
        """Return all that decides what is fed for token ids, and where answers end."""
        return ChatInputs(image=self.image, template=self.template, ids=tuple(map(tuple, ids)), eos=self.tokenizer.eos)

    def describe(self) -> str:
        """Describe the preparation of images and the prompt in words."""
        return f"padded to a square with the mean colour, {self.image.describe()}, prompt {self.template!r}"

    def feed(self, image: Image.Image) -> np.ndarray:
        """Pad an image to a square with the mean colour, resize it (bicubic) and normalise it: (1, 3, h, w)."""
        side = max(image.size)
        refuse_enlarged(image, side, side)
        square = Image.new("RGB", (side, side), _colour(self.image))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        resized = square.resize((self.image.width, self.image.height), Image.Resampling.BICUBIC)
        return image_feed(resized, self.image)[0]

    def prompt(self, question: str) -> tuple[int, ...]:
        """Return the token ids of a question; each side of the image is tokenised alone, as in training."""
        before, after = self.template.split("<image>")
        return self._lead(before) + tuple(self.tokenizer.encode(after.replace("{question}", question)))

    def turn(self, question: str, answer: str) -> Turn:
        """Return the token ids of a question and its answer, which are tokenised as one text."""
        before, after = self.template.split("<image>")
        asked = after.replace("{question}", question)
        alone, both = self.tokenizer.encode(asked), self.tokenizer.encode(f"{asked} {answer}")
        shared = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone))
        return Turn(self._lead(before) + tuple(both[:shared]), (*both[shared:], self.tokenizer.eos))

    def _lead(self, before: str) -> tuple[int, ...]:
        start = () if self.tokenizer.bos is None else (self.tokenizer.bos,)
        return (*start, *self.tokenizer.encode(before), IMAGE_TOKEN)

    def feeds(self, image: np.ndarray, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the model's feeds for a prepared image and token ids."""
        return {self.image.input: image, IDS: np.array([ids], np.int64)}

    def answer(self, run: RunModel, image: np.ndarray, question: str, limit: int = NEW_TOKENS) -> str:
        """Answer a question greedily, one most probable token after the other, until `eos` or `limit` tokens."""
        return self.text(self.generate(run, image, question, limit))

    def generate(self, run: RunModel, image: np.ndarray, question: str, limit: int = NEW_TOKENS) -> tuple[int, ...]:
        """Return the token ids of the greedy answer, the last of which is `eos` unless it was cut at `limit` tokens."""
        prompt = self.prompt(question)
        new: list[int] = []
        while len(new) < limit and new[-1:] != [self.tokenizer.eos]:
            new.append(int(log_probabilities(run(self.feeds(image, (*prompt, *new))), 1)[0].argmax()))
        return tuple(new)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without the `eos` at its end."""
        ends = list(ids[-1:]) == [self.tokenizer.eos]
        return self.tokenizer.decode(ids[:-1] if ends else ids).strip()


def open_chat(model: Interface) -> Chat:
    """Make the chat of a model from its tokenizer and CLIP's image preparation.

    Raises:
        DataError: the model comes without a tokenizer.
    """
    if model.tokenizer is None:
        raise DataError("A language task needs the model's tokenizer. Give its folder, or load the model by its name.")
    options = ImageOptions(fit="stretch", mean=_MEAN, std=_STD)
    image = model.image or infer_image_spec(model.inputs, task=None, options=options)
    assert image is not None, "a vision-language model without an image input is refused"
    refuse_fit(image, "a chat pads them to a square")
    return Chat(model.tokenizer, image)


def log_probabilities(outputs: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Return the log-probabilities (count, vocabulary) float64 of the token after each of the last `count` positions.

    Logits that are not numbers count as 0, infinite ones as the largest numbers: a broken model is a bad model.

    Raises:
        DataError: the first output is not (1, s, vocabulary) with at least `count` positions.
    """
    logits = next(iter(outputs.values()))
    if logits.ndim != 3 or logits.shape[0] != 1 or logits.shape[1] < count:
        raise DataError(
            f"The first output has shape {list(logits.shape)}; expected logits [1, positions, vocabulary] with at "
            f"least {count} positions."
        )
    rows = np.nan_to_num(logits[0, logits.shape[1] - count :].astype(np.float64), posinf=1e4, neginf=-1e4)
    rows -= rows.max(axis=1, keepdims=True)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))


def join_chat(vision: RunModel, embed: RunModel, decode: RunModel, cache: tuple[int, int, int]) -> RunModel:
    """Join the three graphs of MobileVLM to one function, which reuses the cache of the call that it continues.

    A call goes on from the one before if its image is the very same array and its ids start with the former ids. The
    logits returned are always those of all positions.

    Args:
        vision: `pixel_values` -> `image_features` (1, t, d).
        embed: `before` (1, a) ids, `image_features`, `after` (1, b) ids -> `inputs_embeds` (1, a + t + b, d).
        decode: `inputs_embeds`, `attention_mask`, `position_ids` and `past.0.key` ... -> `logits`, `present.0.key` ...
        cache: layers, heads and width per head of the keys and values.

    Returns:
        `pixel_values` and `input_ids` with one `IMAGE_TOKEN` -> `logits` (1, a + t + b, vocabulary).
    """
    empty = empty_cache(cache)
    names = [name.removeprefix("past.") for name in empty]
    kept: list[_Kept] = []

    def run(feeds: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        image = next(value for name, value in feeds.items() if name != IDS)
        ids = tuple(feeds[IDS][0].tolist())
        known = kept[0] if kept and kept[0].image is image else None
        if known is None or ids[: len(known.ids)] != known.ids or len(ids) == len(known.ids):
            at = ids.index(IMAGE_TOKEN)
            features = known.features if known else vision({"pixel_values": image})["image_features"]
            before, shown, after = ids[:at], features, ids[at + 1 :]
            past = empty
            logits: list[np.ndarray] = []
        else:
            features, past, logits = known.features, known.past, [known.logits]
            before, shown, after = (), features[:, :0], ids[len(known.ids) :]
        tokens = {BEFORE: np.array([before], np.int64), AFTER: np.array([after], np.int64)}
        embeds = embed({**tokens, "image_features": shown})["inputs_embeds"]
        done, count = sum(part.shape[1] for part in logits), embeds.shape[1]
        step = decode(
            {
                "inputs_embeds": embeds,
                MASK: np.ones((1, done + count), np.int64),
                POSITIONS: np.arange(done, done + count, dtype=np.int64)[None],
                **past,
            }
        )
        every = np.concatenate([*logits, step["logits"]], axis=1)
        kept[:] = [_Kept(image, ids, features, {f"past.{name}": step[f"present.{name}"] for name in names}, every)]
        return {"logits": every}

    return run


def empty_cache(cache: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return an empty cache, `past.0.key` (1, heads, 0, width) ..., for (layers, heads, width per head)."""
    layers, heads, width = cache
    names = [f"past.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    return {name: np.zeros((1, heads, 0, width), np.float32) for name in names}


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a call leaves for the next."""

    image: np.ndarray
    ids: tuple[int, ...]
    features: np.ndarray
    past: dict[str, np.ndarray]
    logits: np.ndarray


def _colour(image: ImageSpec) -> tuple[int, int, int]:
    """The mean as a colour; e.g. CLIP's is (122, 116, 104)."""
    red, green, blue = (int(part * 255) for part in (image.mean or (0.0, 0.0, 0.0)))
    return red, green, blue
