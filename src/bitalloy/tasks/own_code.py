"""What tells a function of the user's from another: its code, and the plain data that it holds."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.data.handed import as_plain
from bitalloy.data.images import file_hash

DEEPEST = 8
"""Largest number of containers inside each other whose content decides a key."""


def code_digest(function: Callable[..., object]) -> str:
    """Return a SHA-256 that changes with a function: of the file that defines it, or without one of its code.

    Plain data and tensors that it holds count as well: defaults, captured and global variables, arguments of a
    `partial`, fields of an object. Without a file so do the functions that it calls by a global name, with all that
    they hold, and the other methods of its class.
    """
    held: list[object] = []
    while isinstance(function, partial):
        held += [list(function.args), dict(function.keywords)]
        function = function.func
    function = inspect.unwrap(function)
    methods: dict[str, object] = {}
    if inspect.ismethod(function):
        held.append(getattr(function.__self__, "__dict__", {}))
        methods = _methods(type(function.__self__))
        function = function.__func__
    elif not hasattr(function, "__code__"):
        held.append(getattr(function, "__dict__", {}))
        methods = _methods(type(function))
        function = methods.get("__call__", function)  # type: ignore[assignment]
    digest = hashlib.sha256(getattr(function, "__qualname__", repr(type(function))).encode())
    if isinstance(function, FunctionType):
        file = Path(function.__code__.co_filename)
        digest.update((file_hash(file) if file.is_file() else _code(function.__code__)).encode())
        held += [_held(function), {} if file.is_file() else methods]
    digest.update(content_digest(held).digest())
    return digest.hexdigest()


def _methods(kind: type) -> dict[str, object]:
    return {name: one for name, one in vars(kind).items() if isinstance(one, FunctionType)}


def _held(function: FunctionType) -> list[object]:
    """What a function holds: defaults, captured variables, and global ones that it or a function inside it names."""
    known = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    captured = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    return [known, function.__defaults__, function.__kwdefaults__, *captured]


def _names(code: CodeType) -> list[str]:
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return sorted({*code.co_names, *inner})


def _code(code: CodeType) -> str:
    """Hash code that no file holds, such as that of a notebook."""
    digest = hashlib.sha256(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        digest.update((_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    return digest.hexdigest()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that has no value yet
        return False


def content_digest(value: object, depth: int = 0) -> hashlib._Hash:
    """Hash plain data and tensors by their content, functions by their code, anything else by its type.

    What lies deeper than `DEEPEST` containers is told by its type alone: it may hold itself.
    """
    if hasattr(value, "__array__") and not isinstance(value, (np.ndarray, type)):
        with suppress(DataError):  # it is no array of numbers after all
            value = as_plain(value)
    digest = hashlib.sha256(type(value).__qualname__.encode())
    match value:
        case FunctionType():
            digest.update(_code(value.__code__).encode())
            if depth < DEEPEST and not Path(value.__code__.co_filename).is_file():
                digest.update(content_digest(_held(value), depth + 1).digest())
        case np.ndarray():
            digest.update(f"{value.dtype.str}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        case Mapping() if depth < DEEPEST:
            for name, part in value.items():
                digest.update(content_digest(str(name)).digest() + content_digest(part, depth + 1).digest())
        case list() | tuple() if depth < DEEPEST:
            for part in value:
                digest.update(content_digest(part, depth + 1).digest())
        case str() | bytes() | bool() | int() | float() | complex() | np.generic() | None:
            digest.update(repr(value).encode())
        case Path():
            digest.update(str(value).encode())
        case _:
            digest.update(str(vars(value).get("_fingerprint")).encode() if hasattr(value, "__dict__") else b"")
    return digest
