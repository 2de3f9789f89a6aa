"""Extraction of tensors from a pickled torch module without its classes: `python unpickle.py FILE TENSORS`.

Runs in a process of its own. Only what rebuilds tensors is imported; every other class or function that the pickle
names becomes an empty shell, so the library that wrote the file is not needed and its code does not run.
"""

from __future__ import annotations

import collections
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ALLOWED = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    **{
        ("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage")
        for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
    },
}
"""Classes and functions that a pickle may name, by module and name."""


class Shell:
    """Placeholder for an object of a class that is not imported; it keeps the object's attributes."""

    def __new__(cls, *unused: object, **named: object) -> Shell:
        return super().__new__(cls)

    def __init__(self, *unused: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Drop an item: pickles fill lists by this method, and lists are no attributes of modules."""

    def extend(self, values: object) -> None:
        """Drop items, as `append` does."""


class Unpickler(pickle.Unpickler):
    """An unpickler that imports only what is in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        return ALLOWED.get((module, name), Shell)


def state_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module's shell, by the names of its state dict."""
    fields = vars(module) if isinstance(module, Shell) else {}
    left_out = fields.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in (fields.get(kind) or {}).items():
            if torch.is_tensor(value) and name not in left_out:
                yield prefix + name, value.detach().float() if value.is_floating_point() else value.detach()
    for name, child in (fields.get("_modules") or {}).items():
        yield from state_tensors(child, f"{prefix}{name}.")


def _main(source: str, target: str) -> None:
    """Read the pickle `source` and write its tensors to `target`."""
    reader = ModuleType("reader")  # what torch.load asks of a pickle module
    reader.__dict__.update(Unpickler=Unpickler, load=lambda file, **named: Unpickler(file, **named).load())
    content = torch.load(source, map_location="cpu", pickle_module=reader, weights_only=False)
    if isinstance(content, dict):
        content = content.get("ema") or content.get("model")
    found = dict(state_tensors(content))
    if not found:
        raise SystemExit("it holds no torch module")
    torch.save(found, target)


if __name__ == "__main__":
    _main(*sys.argv[1:3])
