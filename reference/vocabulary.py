"""The words of `shapes` as a SentencePiece model: byte-pair encoding with bytes for what it does not know, as Llama's.

    python reference/vocabulary.py

writes `reference/tokenizer.model`, which `train_language.py` reads.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from bitalloy.samples import shapes
from bitalloy.tasks.captions import QUESTION
from bitalloy.tasks.chat import TEMPLATE
from bitalloy.tasks.questions import LETTER, SHORT

__all__ = ["corpus", "tokenizer"]

SCENES = 2000
"""Of the training split, whose captions and questions are read."""


def corpus(scenes: int = SCENES) -> list[str]:
    """Every kind of line that a conversation about a scene has."""
    fixed = [*TEMPLATE.replace("{question}", "").split("<image>"), QUESTION, SHORT, LETTER]
    lines = [line for text in fixed for line in text.split("\n") if line.strip()] * 50
    for index in range(scenes):
        drawn = shapes.scene(index, size=64, split="train")
        lines.append(drawn.caption())
        for asked in drawn.questions():
            options = [f"{letter}. {choice}" for letter, choice in zip("ABCD", asked.get("choices", ()), strict=False)]
            lines += [asked["question"], *options, asked["answer"]]
    return lines


def tokenizer() -> bytes:
    """The file `tokenizer.model`, with the largest vocabulary that the corpus gives: every word is one token."""
    lines = corpus()
    size = 4000
    while True:
        file = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=file,
                model_type="bpe",
                vocab_size=size,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            found = re.search(r"value <= (\d+)", str(error))
            if not found or int(found[1]) >= size:
                raise
            size = int(found[1])
            continue
        return file.getvalue()


if __name__ == "__main__":
    Path(__file__).with_name("tokenizer.model").write_bytes(tokenizer())
