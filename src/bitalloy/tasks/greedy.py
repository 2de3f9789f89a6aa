"""Agreement of greedy answers: how often a model writes what the first model writes, and how far both go together.

The first divergent token (FDT) is that of OpenVINO's `who_what_benchmark`: the number of tokens from the start of an
answer that are those of the first model, so that it is the answer's length where nothing differs. The end of an answer
is a token as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np

from bitalloy.tasks.base import Seen, TaskMetric
from bitalloy.tasks.bootstrap import compare_models, ratio_of_sums

__all__ = ["GREEDY", "answers_of", "compare_answers", "first_divergent", "joined_answers"]

GREEDY, LENGTHS = "greedy", "lengths"
"""Names of arrays of an observation: token ids of all answers about an image, and the number of each answer's."""


def joined_answers(answers: Sequence[Sequence[int]]) -> Seen:
    """Return answers, given as token ids, as an observation."""
    return {
        GREEDY: np.array([token for answer in answers for token in answer], np.int64),
        LENGTHS: np.array([len(answer) for answer in answers], np.int64),
    }


def first_divergent(reference: Sequence[int], answer: Sequence[int]) -> int:
    """Count the tokens before the first one that differs.

    >>> first_divergent((5, 7, 9, 2), (5, 7, 8, 9, 2)), first_divergent((5, 2), (5, 2))
    (2, 2)
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reference, answer, strict=False)))


def compare_answers(
    seen: Mapping[str, Sequence[Seen]], noun: str, weights: np.ndarray
) -> tuple[TaskMetric, TaskMetric]:
    """Compare the greedy answers of all models with those of the first one.

    Args:
        seen: model -> observations of `joined_answers`, one for each image.
        noun: what an answer is called in the names of the metrics.
        weights: (B, images) from `resampled_weights`.
    """
    first, n = next(iter(seen.values())), weights.shape[1]
    count = np.array([len(one[LENGTHS]) for one in first], np.float64)
    same, together = {}, {}
    for name, part in seen.items():
        pairs = [list(zip(answers_of(a), answers_of(b), strict=True)) for a, b in zip(first, part, strict=True)]
        equal = np.array([sum(a == b for a, b in some) for some in pairs])
        prefix = np.array([sum(first_divergent(a, b) for a, b in some) for some in pairs])
        same[name], together[name] = (ratio_of_sums(total, count, weights) for total in (equal, prefix))
    endless = (0.0, float("inf"))
    return (
        compare_models(f"greedy {noun} agreement", same, n),
        compare_models(f"first divergent {noun} token", together, n, bounds=endless),
    )


def answers_of(seen: Seen) -> list[tuple[int, ...]]:
    """Return the token ids of each answer, as `joined_answers` stored them."""
    ends = np.cumsum(seen[LENGTHS])[:-1]
    return [tuple(part.tolist()) for part in np.split(seen[GREEDY], ends)]
