"""Captions: how surprised a vision-language model is by what people wrote, and how close it stays to the first model.

Every caption is fed after the prompt, so that one run gives the probabilities of all its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bitalloy.core.encoding import from_json
from bitalloy.core.errors import DataError
from bitalloy.core.store import StageInputs
from bitalloy.data.datasets import choose_samples
from bitalloy.data.images import open_image
from bitalloy.tasks.base import RunModel, Seen, TaskResult, few_images
from bitalloy.tasks.bootstrap import RESAMPLES, ResampledMetric, compare_models, ratio_of_sums, resampled_weights
from bitalloy.tasks.chat import Chat, ChatInputs, log_probabilities
from bitalloy.tasks.coco import LabelledImage, find_images
from bitalloy.tasks.greedy import compare_answers, joined_answers

__all__ = ["QUESTION", "CaptionData", "measure_captions", "observe_captions", "read_captions", "write_caption"]

QUESTION = "Provide a one-sentence caption for the provided image."
WRITTEN = 32
"""Largest number of tokens of a caption that a model writes by itself."""
_WORST = 100.0
"""Nats per token at which the loss of a broken model is cut, so that its perplexity is still a number."""
LOSS_NOISE = 0.1
"""Nats by which `disturb_losses` changes the loss of a token, as a standard deviation."""


class _Caption(msgspec.Struct, frozen=True, kw_only=True):
    image_id: int
    caption: str


class _File(msgspec.Struct, frozen=True, kw_only=True):
    images: tuple[LabelledImage, ...]
    annotations: tuple[_Caption, ...]


class CaptionInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the metrics of captions, beside the models."""

    images: tuple[str, ...]
    """SHA-256 of each image."""
    captions: tuple[tuple[str, ...], ...]
    """Captions of each image."""
    chat: ChatInputs
    written: int
    """Largest number of tokens of a caption that a model writes by itself."""


@dataclass(frozen=True, slots=True)
class CaptionData:
    """Images with captions, opened for one model."""

    path: Path
    folder: Path
    """Folder of the images."""
    captions: tuple[tuple[str, tuple[str, ...]], ...]
    """File name of the image and its captions, in the order of the image ids."""
    chat: Chat

    @property
    def labelled(self) -> bool:
        """True: without a text there is nothing to ask."""
        return True

    @property
    def paired(self) -> bool:
        """True: the divergence from the reference needs all of its probabilities, which are too many to be kept."""
        return True

    def choose(self, limit: int | None, seed: int) -> list[int]:
        """Choose at most `limit` images, None for all, and return their numbers in ascending order."""
        return choose_samples([name for name, _ in self.captions], limit=limit, seed=seed)

    def images(self, samples: Sequence[int]) -> tuple[Path, ...]:
        """Return the file of the image of each sample."""
        return tuple(self.folder / self.captions[i][0] for i in samples)

    def inputs(self, samples: Sequence[int], images: Sequence[str]) -> CaptionInputs:
        """Return all that decides metrics on some samples, whose images have the given hashes."""
        captions = tuple(self.captions[i][1] for i in samples)
        turns = [self.chat.turn(QUESTION, caption) for some in captions for caption in some]
        ids = [(*turn.prompt, *turn.answer) for turn in turns]
        return CaptionInputs(images=tuple(images), captions=captions, chat=self.chat.inputs(ids), written=WRITTEN)


def read_captions(path: Path, chat: Chat) -> CaptionData:
    """Read captions in COCO format, e.g. `captions_val2017.json`, and find their images.

    Images without a caption are left out.

    Raises:
        DataError: the file or its images are missing or broken, or it has no captions.
    """
    try:
        content = from_json(path.read_bytes(), _File)
    except OSError as error:
        raise DataError(f"Cannot read the captions '{path}': {error.strerror}. Give a COCO caption file.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is no COCO caption file: {error}. Give one with images and captions.") from error
    texts: dict[int, list[str]] = {image.id: [] for image in content.images}
    for caption in content.annotations:
        if caption.image_id not in texts or not caption.caption.strip():
            raise DataError(
                f"'{path}' has the caption {caption.caption[:40]!r} for image {caption.image_id}; expected some text "
                "for an image that the file lists. Repair the file."
            )
        texts[caption.image_id].append(" ".join(caption.caption.split()))
    used = [image for image in sorted(content.images, key=lambda i: i.id) if texts[image.id]]
    if not used:
        raise DataError(f"'{path}' has {len(content.images)} images and no caption. Give a COCO caption file.")
    names = [image.file_name for image in used]
    return CaptionData(
        path=path,
        folder=find_images(path, names),
        captions=tuple((image.file_name, tuple(texts[image.id])) for image in used),
        chat=chat,
    )


def observe_captions(models: Mapping[str, RunModel], data: CaptionData, sample: int, /) -> dict[str, Seen]:
    """Return loss, agreements and divergence summed over the tokens of one image's captions, and their number.

    Raises:
        DataError: the image is damaged, or a model's outputs are not logits.
    """
    file, captions = data.captions[sample]
    image = data.chat.feed(open_image(data.folder / file))
    sums, tokens = {name: np.zeros(3) for name in models}, 0
    for caption in captions:
        turn = data.chat.turn(QUESTION, caption)
        feeds = data.chat.feeds(image, (*turn.prompt, *turn.answer[:-1]))
        tokens += len(turn.answer)
        reference: np.ndarray | None = None
        for name, run in models.items():
            found = log_probabilities(run(dict(feeds)), len(turn.answer))
            reference = found if reference is None else reference
            sums[name] += _sums(reference, found, np.array(turn.answer))
    return {name: {"sums": total, "tokens": np.array(tokens)} for name, total in sums.items()}


def write_caption(model: RunModel, data: CaptionData, sample: int, /) -> Seen:
    """Let a model write a caption of its own, greedily.

    Raises:
        DataError: the image is damaged, or the model's outputs are not logits.
    """
    image = data.chat.feed(open_image(data.folder / data.captions[sample][0]))
    return joined_answers([data.chat.generate(model, image, QUESTION, WRITTEN)])


def measure_captions(
    seen: Mapping[str, Sequence[Seen]],
    data: CaptionData,
    samples: Sequence[int],
    /,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:
    """Measure the perplexity, and agreement with the first model, over the tokens of the captions and their ends.

    Perplexity is the exponential of the mean loss per token. `top-1 agreement` is the part of positions at which a
    model's best token is the first model's. `KL divergence` is the mean over positions of KL(first || model), in nats.
    The caption that a model writes by itself, greedily and up to `WRITTEN` tokens, is compared with the first model's:
    see `tasks.greedy`.
    """
    sums = {name: np.array([one["sums"] for one in part]) for name, part in seen.items()}
    tokens = np.array([float(one["tokens"]) for one in next(iter(seen.values()))])
    n, weights = len(samples), resampled_weights(len(samples), resamples, seed)
    loss, agreed, divergence = (
        {name: ratio_of_sums(total[:, column], tokens, weights) for name, total in sums.items()} for column in range(3)
    )
    perplexity = {name: ResampledMetric(float(np.exp(m.value)), np.exp(m.resampled)) for name, m in loss.items()}
    endless = (0.0, float("inf"))
    return TaskResult(
        task="language",
        metrics=(
            compare_models(
                "perplexity", perplexity, n, higher_is_better=False, bounds=(1.0, float("inf")), witness="KL divergence"
            ),
            compare_models("top-1 agreement", agreed, n, agreement=True),
            compare_models("KL divergence", divergence, n, higher_is_better=False, bounds=endless),
            *compare_answers(seen, "caption", weights),
        ),
        notes=(f"{int(tokens.sum())} tokens of captions on {n} images.", *few_images(n)),
    )


def disturb_losses(seen: Seen, rng: np.random.Generator) -> Seen:
    """Change the loss of every token of one image's captions by 0.1 nats, up or down."""
    loss, *others = seen["sums"]
    return {**seen, "sums": np.array([loss + rng.normal(0, LOSS_NOISE * float(seen["tokens"]) ** 0.5), *others])}


def _sums(reference: np.ndarray, found: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Loss, agreements and divergence, each summed over the positions; both are log-probabilities (a, vocabulary)."""
    loss = np.minimum(-found[np.arange(len(answer)), answer], _WORST)
    same = reference.argmax(axis=1) == found.argmax(axis=1)
    divergence = (np.exp(reference) * (reference - found)).sum(axis=1)
    return np.array([loss.sum(), same.sum(), divergence.sum()])
