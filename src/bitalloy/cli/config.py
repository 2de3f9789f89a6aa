"""Options of the commands in a TOML file: one section for each command, one key for each of its parameters.

Keys are the names of the options without the dashes in front, `max-drop` for `--max-drop`, and the names of arguments.
They come from the commands themselves, so that a new option is a new key. What stands in the file is what would be
typed: it is converted, and refused, as on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from bitalloy.core.errors import BitalloyError, did_you_mean

FILE = "bitalloy.toml"
"""The file that is read in the current folder."""
NOT_KEPT = frozenset({"config", "print_config", "help"})
"""Parameters that say what to do with the file, and do not stand in it."""
CODE = "MODULE:NAME"
"""Metavar of parameters that name code to be executed."""
TRUST = "trust_checkpoint"
"""The parameter that allows a checkpoint to execute code."""


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a command from the file, as defaults; it is called before any other parameter is read.

    Raises:
        BitalloyError: the file is no TOML, or has a section, key or kind of value that the command line does not know.
    """
    found = path or Path(FILE)
    if ctx.resilient_parsing or (path is None and not found.is_file()):
        return path
    group = ctx.parent.command if ctx.parent is not None else None
    commands: Mapping[str, Any] = getattr(group, "commands", {})
    sections = _parsed(found)
    for name, section in sections.items():
        if name not in commands:
            hint = did_you_mean(name, commands)
            raise BitalloyError(f"'{found}' has a section or key '{name}'; sections are commands.{hint}")
        values = _values(commands[name], section, f"[{name}] of '{found}'", asked=path is not None)
        if name == ctx.info_name:
            ctx.default_map = values
    return path


def effective_toml(ctx: typer.Context) -> str:
    """Write the parameters that a command was given or has by default as its section of the file."""
    lines = [f"[{ctx.info_name}]"]
    for key, param in keys_of(ctx.command).items():
        value = ctx.params.get(str(param.name))
        if value is not None and not (isinstance(value, (list, tuple)) and not value):
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def keys_of(command: Any) -> dict[str, Any]:
    """Return key -> parameter of a command: the longest name of an option, or the name of an argument."""
    found = {}
    for param in command.params:
        if param.name in NOT_KEPT:
            continue
        option = param.param_type_name == "option"
        name = max(param.opts, key=len).lstrip("-") if option else str(param.name).replace("_", "-")
        found[name] = param
    return found


def _parsed(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BitalloyError(f"'{path}' cannot be read as TOML: {error}.") from error


def _values(command: Any, section: object, where: str, *, asked: bool) -> dict[str, Any]:
    """Turn a section into defaults by the names of parameters."""
    if not isinstance(section, dict):
        raise BitalloyError(f"{where} is {section!r}; expected a section of options.")
    known, found = keys_of(command), {}
    for key, value in section.items():
        if key not in known:
            hint = did_you_mean(key, known)
            raise BitalloyError(f"{where} has the key '{key}', which is no option of the command.{hint}")
        param = known[key]
        if not asked and value is not False and _runs_code(param):
            raise BitalloyError(
                f"{where} has '{key}', by which code is executed. It is taken only from a file that is named: give "
                f"--config {FILE} if you trust it, or the option on the command line."
            )
        found[str(param.name)] = _typed(param, value, f"'{key}' in {where}")
    return found


def _runs_code(param: Any) -> bool:
    """Whether a command executes code of the user's choice by it, which a file that just lies there may not ask for."""
    return bool(param.metavar == CODE or param.name == TRUST)


def _typed(param: Any, value: object, where: str) -> Any:
    """Check the kind of a value, and return it as the command line takes it: texts, but for flags."""
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise BitalloyError(f"{where} is {value!r}; expected true or false.")
        return value
    several = bool(getattr(param, "multiple", False)) or param.nargs == -1
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in listed) or (
        isinstance(value, list) and not several
    ):
        raise BitalloyError(f"{where} is {value!r}; expected text or a number{', or a list of them' * several}.")
    return [str(one) for one in listed] if several else str(value)


def _toml(value: object) -> str:
    """Write a value as TOML.

    >>> _toml([Path("a b"), "x"]), _toml(True), _toml(0.5)
    ('["a b", "x"]', 'true', '0.5')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
