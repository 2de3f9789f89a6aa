"""JSON as it is stored and printed: the one writer, which lets no NaN, no infinity and no damaged text through.

`msgspec` writes a number that is not finite as null, so that the reader meets it in place of the writer, or takes it
for absent. What is not known has words of its own in each record: a field that may be None.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import msgspec

from bitalloy.core.errors import BitalloyError

Decoded = TypeVar("Decoded")


def to_json(content: Any, *, pretty: bool = False, order: Literal["sorted"] | None = None) -> bytes:
    """Write records, or what JSON is made of, as JSON.

    Args:
        content: records, mappings, sequences, texts and numbers.
        pretty: whether it is indented, for people.
        order: `sorted` for keys in alphabetical order.

    Raises:
        BitalloyError: a number is NaN or infinite, an integer is beyond what `msgspec` writes, or a text is not UTF-8.
    """
    try:
        data = msgspec.json.encode(content, order=order)
        wrong = _not_finite(msgspec.to_builtins(content)) if b"null" in data else ""
    except UnicodeEncodeError as error:
        raise BitalloyError(
            f"A name is not UTF-8 text: {_legible(error.object)}. Rename that file, folder or pattern."
        ) from error
    except OverflowError as error:
        raise BitalloyError(f"A number is too large to be stored ({error}). Give smaller numbers.") from error
    if wrong:
        raise BitalloyError(
            f"The result '{wrong}' is not a finite number, so it is not stored. The model's numbers overflow or vanish "
            "on these samples: check its weights and the preparation of its inputs."
        )
    return msgspec.json.format(data, indent=2) if pretty else data


def from_json(data: bytes | str, kind: type[Decoded]) -> Decoded:
    """Read JSON of strangers as records, or as what JSON is made of.

    Raises:
        msgspec.DecodeError: it is no JSON, not UTF-8, nested too deeply, or no such record.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def _not_finite(content: object) -> str:
    """Return the path of the first number that is NaN or infinite, e.g. `heads.0.low`; empty where all are finite."""
    waiting: list[tuple[str, object]] = [("", content)]
    while waiting:
        path, part = waiting.pop()
        if isinstance(part, float) and not math.isfinite(part):
            return path.removeprefix(".") or "number"
        if isinstance(part, dict):
            waiting += [(f"{path}.{name}", inside) for name, inside in part.items()]
        elif isinstance(part, (list, tuple)):
            waiting += [(f"{path}.{index}", inside) for index, inside in enumerate(part)]
    return ""


def _legible(text: str) -> str:
    return repr(text.encode("utf-8", "surrogateescape"))[1:80]
