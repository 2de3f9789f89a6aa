"""Downloads of published weights with the libraries' own tools, into their own caches."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.zoo.base import RANDOM_WEIGHTS, Remote

HUB_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer.model")


def locate(checkpoint: str | Path | None, remote: Remote, *, extra: str) -> Path:
    """Find a checkpoint: a path, a hub repository such as `owner/name`, or None for the published `remote`.

    Raises:
        ModelError: the path does not exist, or the download failed.
        MissingExtraError: the library that downloads it is not installed.
    """
    if checkpoint is None:
        return fetch(remote, extra=extra)
    path = Path(checkpoint)
    if path.exists():
        return path
    if remote.hub and isinstance(checkpoint, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        return fetch(replace(remote, hub=checkpoint, revision=None), extra=extra)
    hub = " a repository on the Hugging Face hub," if remote.hub else ""
    raise ModelError(
        f"No checkpoint at '{checkpoint}'. Give a file, a folder,{hub} or `{RANDOM_WEIGHTS}` for random weights."
    )


def fetch(remote: Remote, *, extra: str) -> Path:
    """Download the file of a URL or the folder of a hub repository, once, with a progress bar; return its path.

    Raises:
        ModelError: the download fails, or its checksum is wrong; the message says what to put where.
        MissingExtraError: the library that downloads it is not installed.
    """
    return _from_hub(remote, extra) if remote.hub else _from_url(remote)


def _from_url(remote: Remote) -> Path:
    import torch.hub

    assert remote.url is not None
    path = Path(torch.hub.get_dir()) / "checkpoints" / remote.file
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(remote.url, str(path), hash_prefix=remote.sha256)
    except (URLError, OSError) as error:
        raise ModelError(
            f"'{remote.file}' could not be downloaded ({error}). Download {remote.url} on another machine and put it "
            f"at '{path}', or give it with --checkpoint."
        ) from error
    except RuntimeError as error:  # torch.hub says so when the checksum is wrong
        raise ModelError(
            f"{remote.url} is not the file that was published ({error}). Try again; if it happens again, do not use it."
        ) from error
    return path


def _from_hub(remote: Remote, extra: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", extra, f"Downloading '{remote.hub}'") from error
    try:
        return Path(snapshot_download(remote.hub, revision=remote.revision, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"'{remote.hub}' could not be downloaded ({first}). Put its files ({remote.file}) from "
            f"https://huggingface.co/{remote.hub} into a folder and give that with --checkpoint."
        ) from error
