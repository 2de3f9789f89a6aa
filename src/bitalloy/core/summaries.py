"""`summary.json` as a file: written with the names of all versions, read from any of them.

Schema 1 counted units by two names, `int8_units` and `fp16_units`, in the summary, its rounds and its evaluations.
Schema 2 has a mapping `schemes` in their place, which knows every scheme; the old names are still written beside it.
Its first summaries had no `status`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.outcome import Summary
from bitalloy.core.status import Status, Verdict

UNJUDGED = Status(
    verdict=Verdict.UNDECIDED, warnings=("This run was made by a version that did not judge its limits.",)
)
"""Status of a summary that has none."""
OLD_COUNTS = {"int8_units": "int8", "fp16_units": "fp16"}
"""Field of schema 1 -> the scheme that it counts."""
COUNTED = ("rounds", "evaluations")
"""Lists of the summary whose entries count units too."""


def write_summary(summary: Summary) -> bytes:
    """Write a summary as JSON, with the counts of schema 1 beside those of schema 2."""
    content: dict[str, Any] = msgspec.to_builtins(summary)
    for part in (content, *(entry for name in COUNTED for entry in content[name])):
        part.update({old: part["schemes"].get(scheme, 0) for old, scheme in OLD_COUNTS.items()})
    return to_json(content, pretty=True)


def read_summary(data: bytes) -> Summary:
    """Read a summary of schema 1 or 2.

    Raises:
        RunDirectoryError: the file is damaged, or of another version.
    """
    try:
        content = from_json(data, dict[str, Any])
        for part in (content, *(entry for name in COUNTED for entry in content.get(name, ()))):
            counts = {scheme: part.pop(old, 0) for old, scheme in OLD_COUNTS.items()}
            part.setdefault("schemes", {scheme: count for scheme, count in counts.items() if count})
        content.setdefault("status", msgspec.to_builtins(UNJUDGED))
        return msgspec.convert(content | {"schema": 2}, type=Summary)
    except (msgspec.MsgspecError, AttributeError, TypeError) as error:
        raise RunDirectoryError(
            f"This is no summary.json that this version can read: {error}. Expected schema 1 or 2; give the run's "
            "command again."
        ) from error
