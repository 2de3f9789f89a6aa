"""Records of arguments as commands: a parameter for every field."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

Arguments = TypeVar("Arguments")


def collected(record: type[Arguments]) -> Callable[[Callable[[Arguments], None]], Callable[..., None]]:
    """Turn a function of a record into a command with a parameter for every field of it and of the records inside.

    Args:
        record: a frozen dataclass; each field is annotated as a typer parameter, or is itself such a record.
    """

    def decorate(command: Callable[[Arguments], None]) -> Callable[..., None]:
        def collect(**values: Any) -> None:
            command(_filled(record, values))

        parameters = _parameters(record)
        collect.__name__, collect.__doc__ = command.__name__, command.__doc__
        collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        collect.__annotations__ = {p.name: p.annotation for p in parameters}
        return collect

    return decorate


def _parameters(record: type) -> list[inspect.Parameter]:
    found = []
    for part, kind in _parts(record):
        if _is_record(kind):
            found += _parameters(kind)
            continue
        default = inspect.Parameter.empty if part.default is MISSING else part.default
        found.append(inspect.Parameter(part.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return found


def _filled(record: type[Arguments], values: dict[str, Any]) -> Arguments:
    return record(
        **{p.name: _filled(kind, values) if _is_record(kind) else values[p.name] for p, kind in _parts(record)}
    )


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind)


def _parts(record: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(record, include_extras=True)
    return [(part, hints[part.name]) for part in fields(record)]
