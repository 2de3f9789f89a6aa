"""The samples on which two models differ most, as pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitalloy.core.examples import Example, Examples
from bitalloy.data.images import open_image
from bitalloy.tasks.base import Seen, Task, TaskData
from bitalloy.tasks.pictures import jpeg_of

__all__ = ["SHOWN_SAMPLES", "examples_of"]

SHOWN_SAMPLES = 6
"""Largest number of samples that are shown."""


def examples_of(
    task: Task[Any],
    data: TaskData,
    samples: Sequence[int],
    seen: tuple[Sequence[Seen], Sequence[Seen]],
    judged: tuple[Any, Any],
    seed: int,
) -> Examples | None:
    """Show the samples on which the model agrees least with the reference, from what was observed of both.

    Args:
        task: the model's task.
        data: labelled samples, opened for the model.
        samples: numbers of the observed samples.
        seen: observations of the reference and of the model on each of them.
        judged: the two judged models, see `Task.judge`.
        seed: seed of the bootstrap of the classes.

    Returns:
        Pictures of at most `SHOWN_SAMPLES` samples; None where the task cannot show its samples.

    Raises:
        DataError: an image cannot be read any more.
    """
    show = task.show
    if show is None:
        return None
    agreements = [show.agree(first, second) for first, second in zip(*seen, strict=True)]
    order = sorted(range(len(samples)), key=lambda i: agreements[i])[:SHOWN_SAMPLES]
    files = data.images([samples[i] for i in order])
    worst = []
    for index, file in zip(order, files, strict=True):
        shown = show.draw(open_image(file), seen[0][index], seen[1][index], data, samples[index])
        worst.append(
            Example(
                name=file.name,
                agreement=agreements[index],
                reference=jpeg_of(shown.reference),
                mixed=b"" if shown.other is None else jpeg_of(shown.other),
                texts=shown.texts,
            )
        )
    return Examples(
        task=task.name,
        measure=show.measure,
        samples=len(samples),
        same=sum(value >= 1 for value in agreements),
        worst=tuple(worst),
        classes=() if show.classes is None else show.classes(*judged, data, seed),
    )
