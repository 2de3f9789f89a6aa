"""Words about a scene of `shapes`: a caption, and questions with their answers.

Everything follows from the labels and colours of the scene, so no random numbers are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitalloy.samples.drawing import CLASSES, COLORS

__all__ = ["caption", "questions"]

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def caption(labels: Sequence[int], colors: Sequence[int]) -> str:
    """Return one sentence that counts every kind of shape, in the order in which they were painted.

    Example: labels (0, 3, 0), colours (0, 5, 0) -> `Two red circles and one blue star.`
    """
    counts: dict[tuple[int, int], int] = {}
    for pair in zip(colors, labels, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    parts = [
        f"{_NUMBERS[count]} {COLORS[color]} {_plural(label) if count > 1 else CLASSES[label]}"
        for (color, label), count in counts.items()
    ]
    if not parts:
        return "An empty background."
    text = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    return f"{text[0].upper()}{text[1:]}."


def questions(labels: Sequence[int], colors: Sequence[int]) -> list[dict[str, Any]]:
    """Return questions about a scene: `question`, `answer`, and `choices` where there are some.

    1. Yes or no, one of each, as in POPE: is there a shape that is there, and one that is not?
    2. How many shapes there are, to be answered with a number.
    3. The colour of a shape that occurs once, with four choices; left out where none does.
    """
    asked: list[dict[str, Any]] = []
    present, absent = (
        [i for i in range(len(CLASSES)) if i in labels],
        [i for i in range(len(CLASSES)) if i not in labels],
    )
    turn = sum(labels) + sum(colors)
    if present:
        asked.append({"question": f"Is there a {CLASSES[present[turn % len(present)]]} in the image?", "answer": "yes"})
    if absent:
        asked.append({"question": f"Is there a {CLASSES[absent[turn % len(absent)]]} in the image?", "answer": "no"})
    asked.append({"question": "How many shapes are in the image?", "answer": str(len(labels))})
    single = [i for i, label in enumerate(labels) if list(labels).count(label) == 1]
    if single:
        chosen = single[turn % len(single)]
        right = colors[chosen]
        options = [(right + step) % len(COLORS) for step in (0, 1, 3, 5)]
        shift = turn % len(options)
        names = [COLORS[i] for i in options[shift:] + options[:shift]]
        asked.append(
            {
                "question": f"Which colour is the {CLASSES[labels[chosen]]}?",
                "answer": "ABCD"[names.index(COLORS[right])],
                "choices": names,
            }
        )
    return asked


def _plural(label: int) -> str:
    name = CLASSES[label]
    return f"{name}es" if name.endswith("s") else f"{name}s"
