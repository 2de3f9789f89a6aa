"""Answers of MobileVLM V2 to questions: prompt, tokens and greedy generation with its graphs, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.zoo.base import Variant

__all__ = [
    "CLIP_BACKGROUND",
    "CLIP_DEVIATION",
    "CLIP_MEAN",
    "TOKENIZER_FILE",
    "RunGraph",
    "generate",
    "prompt",
    "sentence_pieces",
    "tokenize",
    "variant_cache_size",
]

RunGraph = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Function (graph, inputs) -> outputs: one inference of the graph `vision`, `embedding` or `decoder`."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TOKENIZER_FILE = "tokenizer.model"
END = 2
"""Id of the token `</s>`, at which an answer ends."""
CLIP_BACKGROUND = (122, 116, 104)
"""RGB colour that pads an image to a square before it is resized (bicubic) to 336 x 336."""
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of RGB pixels scaled to 0..1, by which CLIP normalises images."""


def prompt(question: str) -> tuple[str, str]:
    r"""Return the prompt's text before and after the image, in conversation format v1 of the published models.

    >>> prompt("What is this?")[1]
    '\nWhat is this? ASSISTANT:'
    """
    return f"{SYSTEM} USER: ", f"\n{question} ASSISTANT:"


def sentence_pieces(path: Path) -> Any:
    """Return the SentencePiece model of `tokenizer.model`, a file or the folder that holds it.

    Raises:
        ModelError: the file is missing or damaged.
        MissingExtraError: sentencepiece is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingExtraError("sentencepiece", "mobilevlm", "Reading the tokenizer") from error
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"No tokenizer at '{file}'. Copy `{TOKENIZER_FILE}` of the checkpoint there.")
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ModelError(f"'{file}' is no SentencePiece model ({error}). Download it again.") from error


def tokenize(question: str, pieces: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids (1, A) before and (1, B) after the image.

    Both halves are tokenized alone, as the published code does; only the first starts with `<s>`.
    """
    before, after = (pieces.encode(half) for half in prompt(question))
    return np.array([[pieces.bos_id(), *before]], np.int64), np.array([after], np.int64)


def variant_cache_size(variant: Variant) -> tuple[int, int, int]:
    """Return layers, heads and width per head of the decoder's cache."""
    numbers: Mapping[str, Any] = variant.architecture
    return numbers["layers"], numbers["heads"], numbers["hidden_size"] // numbers["heads"]


def generate(
    run: RunGraph,
    pixel_values: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    *,
    cache: Sequence[int],
    limit: int = 128,
    end: int | None = END,
) -> list[int]:
    """Return the token ids of the answer, always the likeliest one next.

    Args:
        run: function that runs one of the three graphs.
        pixel_values: (1, 3, 336, 336) normalised image.
        before: (1, A) token ids before the image.
        after: (1, B) token ids after it.
        cache: layers, heads and width per head, see `variant_cache_size`.
        limit: largest number of tokens of an answer.
        end: token that ends the answer and is not returned; None goes on to `limit`.
    """
    layers, heads, width = cache
    features = run("vision", {"pixel_values": pixel_values})["image_features"]
    names = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    past = {f"past.{n}": np.zeros((1, heads, 0, width), np.float32) for n in names}
    answer: list[int] = []
    done = 0
    while len(answer) < limit:
        new = run("embedding", {"before": before, "image_features": features, "after": after})["inputs_embeds"]
        count = new.shape[1]
        step = run(
            "decoder",
            {
                "inputs_embeds": new,
                "attention_mask": np.ones((1, done + count), np.int64),
                "position_ids": np.arange(done, done + count, dtype=np.int64)[None],
                **past,
            },
        )
        token = int(step["logits"][0, -1].argmax())
        if token == end:
            break
        answer.append(token)
        past = {f"past.{n}": step[f"present.{n}"] for n in names}
        done += count
        before, features, after = before[:, :0], features[:, :0], np.array([[token]], np.int64)
    return answer
