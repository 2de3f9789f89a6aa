"""Reading of checkpoints: tensors only, unless the user trusts the file.

1. `.safetensors`: read directly. A folder as the hub keeps it: all shards, `.safetensors` before `.bin`.
2. A torch file of tensors: `torch.load(weights_only=True)`.
3. A torch file of pickled objects, as ultralytics writes them: only with `trust_checkpoint`, by `unpickle` in a process
   of its own.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.core.limits import refuse_contents
from bitalloy.core.ownership import temporary

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN_KEYS = 4
"""Largest number of keys of each kind that a message names."""
SECONDS = 600
"""Time in seconds after which the process that opens a pickle is stopped."""
WRAPPERS = ("state_dict", "model", "ema")
"""Keys under which training scripts keep the tensors."""


def refuse_without_weights(path: Path) -> None:
    """Refuse a place that is there and holds no weights, before a library that could read them is imported.

    Raises:
        ModelError: it is a folder without weights or with some of them missing, or no file.
    """
    if path.is_dir():
        _shards(path)
    elif path.exists() and not path.is_file():
        raise ModelError(f"No checkpoint file at '{path}'.")


def read(path: Path, *, trust: bool = False, extra: str = "zoo") -> dict[str, Tensor]:
    """Read a checkpoint file or folder: name -> tensor.

    Raises:
        ModelError: the file is missing or damaged, or holds no tensors, or pickled objects without permission.
        MissingExtraError: a library that reads the format is not installed.
    """
    if path.is_dir():
        return {k: v for shard in _shards(path) for k, v in read(shard, trust=trust, extra=extra).items()}
    if not path.is_file():
        raise ModelError(f"No checkpoint file at '{path}'.")
    if path.suffix == ".safetensors":
        return _safetensors(path, extra)
    import torch

    try:
        refuse_contents(path, ModelError)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not re.search(r"[Uu]nsupported (global: )?GLOBAL", str(error)) and not _is_pickle(path, error):
            raise _damaged(path, error) from error
        if not trust:
            raise ModelError(
                f"'{path}' holds pickled Python objects, not only tensors, and opening it can run code that somebody "
                "put there. If you trust where it comes from, add --trust-checkpoint; it is then opened in a process "
                "of its own. Or give a file of its state dict."
            ) from error
        return _unpickled(path)
    except ModelError:
        raise
    except Exception as error:  # torch's readers raise whatever the bytes lead them to
        raise _damaged(path, error) from error
    return _tensors(content, path)


def _is_pickle(path: Path, error: pickle.UnpicklingError) -> bool:
    """Whether a file starts as Python's own pickles do, with an instruction that files of tensors never have."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO and "nsupported operand" in str(error)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, source: Path, name: str) -> None:
    """Copy a state dict into a network of the same keys and shapes.

    Raises:
        ModelError: keys or shapes differ; the message names some of each kind.
    """
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    other = [
        f"{k} is {list(state[k].shape)} in place of {list(v)}"
        for k, v in expected.items()
        if k in state and tuple(state[k].shape) != v
    ]
    refuse(missing, unexpected, other, source=source, name=name)
    module.load_state_dict(dict(state), strict=True)


def refuse(
    missing: Collection[str], unexpected: Collection[str], other: Collection[str], *, source: Path, name: str
) -> None:
    """Refuse a checkpoint with keys that do not fit; the message says which.

    Raises:
        ModelError: any of the collections has a key.
    """
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
    found = [f"{len(keys)} {kind} ({_some(list(keys))})" for kind, keys in kinds if keys]
    if found:
        raise ModelError(
            f"'{source}' is no checkpoint of {name}: of its tensors, {'; '.join(found)}. Check the name and size."
        )


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder, checked against its index."""
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth"):
        files = sorted(folder.glob(pattern))
        if not files:
            continue
        for index in folder.glob("*.index.json"):
            try:
                named = {folder / str(name) for name in json.loads(index.read_text())["weight_map"].values()}
            except (ValueError, KeyError, AttributeError) as error:
                raise _damaged(index, error) from error
            lost = sorted(f.name for f in named - set(files))
            if lost and any(f.suffix == files[0].suffix for f in named):
                raise ModelError(f"'{folder}' is incomplete: {_some(lost)} of '{index.name}' are missing.")
        return files
    raise ModelError(f"'{folder}' holds no weights: no .safetensors, .bin or .pt file.")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")


def _safetensors(path: Path, extra: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError("safetensors", extra, f"Reading '{path.name}'") from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    with temporary() as folder:
        tensors = folder / "tensors.pt"
        script = Path(__file__).with_name("unpickle.py")  # alone: it needs nothing of this package
        command = [sys.executable, "-I", str(script), str(path), str(tensors)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"Opening '{path}' took more than {SECONDS} s and was stopped.") from error
        if done.returncode or not tensors.is_file():
            lines = done.stderr.strip().splitlines() or ["the process ended without a word"]
            raise ModelError(f"'{path}' cannot be opened: {lines[-1]}")
        return read(tensors)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {str(k): v for k, v in content.items() if torch.is_tensor(v)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ModelError(f"'{path}' holds no tensors by name (it is a {type(content).__name__}). Give a state dict.")
    return tensors


def _damaged(path: Path, error: Exception) -> ModelError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"'{path}' is truncated, damaged or no checkpoint ({first}). Download or save it again.")
