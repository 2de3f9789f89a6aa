"""The order of names as a person sorts them."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(\d+)")


def natural(name: str) -> tuple[tuple[str, int, str], ...]:
    """Return a key by which names with numbers are sorted by these.

    >>> sorted(["model.10", "model.9", "model"], key=natural)
    ['model', 'model.9', 'model.10']
    """
    parts = _NUMBER.split(name)
    digits = [number.lstrip("0") for number in parts[1::2]]  # as text, because a number may have any length
    return (*((text, len(d), d) for text, d in zip(parts[:-1:2], digits, strict=True)), (parts[-1], -1, ""))
