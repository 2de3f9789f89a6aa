"""Samples of a promptable model: an image with one prompt each."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.data import masks
from bitalloy.data.datasets import Samples, choose_samples
from bitalloy.tasks.base import Interface
from bitalloy.tasks.promptable import (
    PROMPT_KINDS,
    Prompt,
    PromptData,
    feeds_of,
    grid,
    open_prompts,
    prepare_image,
    prompts_of,
)

__all__ = ["PromptSamples"]


class PromptSamples(Samples):
    """Images with a box or a point in turn; all feeds have the same shapes, since both prompts have two points.

    With labels the prompt is that of one of the objects, chosen by the image's place; images without any are left
    out. Without labels it is a cell of a grid over the image, or its centre.

    Args:
        data: the images, perhaps with labels.
        indices: indices of the images, at least one.
        seed: seed of the choice of the images.
    """

    def __init__(self, data: PromptData, indices: list[int], *, seed: int = 0) -> None:
        self.label = data.files[0].parent.resolve().name if data.labels is None else data.labels.path.name
        self.preprocessing = f"longest side {data.image.height}, {data.image.describe()}; one prompt an image"
        self.seed = seed
        self._data, self._indices = data, indices
        self._objects = data.labels.objects() if data.labels else {}

    @staticmethod
    def open(path: Path, model: Interface, *, limit: int | None, seed: int) -> PromptSamples:
        """Open samples from a COCO annotation file with masks, or from a folder of images.

        Raises:
            DataError: the path holds nothing usable.
        """
        data = open_prompts(path, model)
        usable = list(range(len(data.files)))
        if data.labels is not None:
            objects = data.labels.objects()
            usable = [i for i in usable if any(not b.iscrowd for b in objects[data.labels.images[i].id])]
        if not usable:
            raise DataError(
                f"No image of '{path}' has an object to ask for. Give labels with masks, or only the images."
            )
        chosen = choose_samples([data.files[i].name for i in usable], limit=limit, seed=seed)
        return PromptSamples(data, [usable[i] for i in chosen], seed=seed if limit is not None else 0)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return f"{self._data.files[self._indices[index]].name}, {PROMPT_KINDS[index % len(PROMPT_KINDS)]}"

    def files(self, index: int) -> tuple[Path, ...]:
        return (self._data.files[self._indices[index]],)

    def feeds(self, index: int) -> dict[str, np.ndarray]:
        data, place = self._data, self._indices[index]
        image = data.open(place)
        canvas, covered = prepare_image(image, data.image)
        return {data.image.input: canvas, **feeds_of(self._prompt(index, image.size), image.size, covered)}

    def fingerprint(self, index: int) -> str:
        digest = hashlib.sha256(f"{self.name(index)}\0{self.preprocessing}\0".encode())
        for name, value in sorted(self.feeds(index).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()

    def _prompt(self, index: int, size: tuple[int, int]) -> Prompt:
        data, kind = self._data, PROMPT_KINDS[index % len(PROMPT_KINDS)]
        if data.labels is None:
            cells = grid(size)
            return cells[(index // len(PROMPT_KINDS)) % len(cells)][kind]
        entry = data.labels.images[self._indices[index]]
        objects = [b for b in self._objects[entry.id] if not b.iscrowd]
        for step in range(len(objects)):
            box = objects[(index + step) % len(objects)]
            mask = masks.decode(data.labels.mask(box, size))
            if mask.any():
                return prompts_of(data.labels, entry, box, mask)[kind]
        raise DataError(f"All {len(objects)} masks of '{entry.file_name}' in '{data.labels.path}' are empty.")
