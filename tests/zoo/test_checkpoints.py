"""Weights are read without running what others put into a file, and misfits are named."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bitalloy import zoo
from bitalloy.core.errors import ModelError
from bitalloy.zoo import checkpoints, downloads
from bitalloy.zoo.base import Remote

torch = pytest.importorskip("torch")
Module: Any = torch.nn.Module


class Block(Module):
    """A module that is pickled as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.bn = torch.nn.BatchNorm2d(4)
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
        self.register_buffer("anchors", torch.ones(3), persistent=False)


class Evil:
    """Leaves a file where it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_wrapped_and_plain_state_dicts_are_read(tmp_path: Path) -> None:
    state = Block().state_dict()
    for name, content in (("plain", state), ("wrapped", {"state_dict": state, "epoch": 3})):
        torch.save(content, tmp_path / f"{name}.pt")
        got = checkpoints.read(tmp_path / f"{name}.pt")
        assert got.keys() == state.keys()
        assert all(torch.equal(got[k], state[k]) for k in state)


def test_safetensors_are_read_and_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {k: v for k, v in Block().state_dict().items()}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    assert all(torch.equal(v, state[k]) for k, v in checkpoints.read(path).items())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelError, match="truncated"):
        checkpoints.read(path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_truncated_checkpoint_is_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Linear(100, 100).state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"a\.pt' is truncated, damaged or no checkpoint"):
        checkpoints.read(path)


def test_pickled_module_needs_permission_and_gives_its_state_dict(tmp_path: Path) -> None:
    module = Block().half()
    path = tmp_path / "a.pt"
    torch.save({"model": module, "ema": None}, path)
    with pytest.raises(ModelError, match="--trust-checkpoint"):
        checkpoints.read(path)
    got = checkpoints.read(path, trust=True)
    want = module.float().state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_by_python_itself_needs_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(ModelError, match="--trust-checkpoint"):
        checkpoints.read(path)


def test_a_refused_checkpoint_leaves_no_folder(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    (tmp_path / "there").mkdir()
    for folder in ("new", "there"):
        with pytest.raises(ModelError, match="no checkpoint of yolo11n"):
            zoo.export_model("yolo11n", checkpoint=tmp_path / "a.pt", folder=tmp_path / folder)
    assert not (tmp_path / "new").exists() and (tmp_path / "there").is_dir()


def test_code_in_a_trusted_pickle_does_not_run(tmp_path: Path) -> None:
    path, trap = tmp_path / "a.pt", tmp_path / "trap"
    torch.save({"model": Block(), "evil": Evil(trap)}, path)
    assert len(checkpoints.read(path, trust=True)) == len(Block().state_dict())
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


def test_pickle_without_a_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"model": Evil(tmp_path / "trap")}, path)
    with pytest.raises(ModelError, match="holds no torch module"):
        checkpoints.read(path, trust=True)


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ModelError, match="holds no tensors by name"):
        checkpoints.read(tmp_path / "a.pt")


def test_keys_and_shapes_that_differ_are_named(tmp_path: Path) -> None:
    state = Block().state_dict()
    state["extra.weight"] = state.pop("conv.bias")
    state["inner.0.bias"] = torch.zeros(5)
    with pytest.raises(ModelError) as caught:
        checkpoints.load_weights(Block(), state, source=Path("x.pt"), name="block")
    text = str(caught.value)
    assert "1 missing (conv.bias)" in text
    assert "1 unexpected (extra.weight)" in text
    assert "inner.0.bias is [5] in place of [2]" in text


def test_shards_of_a_folder_are_joined_and_a_lost_one_is_named(tmp_path: Path) -> None:
    state = Block().state_dict()
    first, second = list(state)[:3], list(state)[3:]
    torch.save({k: state[k] for k in first}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({k: state[k] for k in second}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {k: f"pytorch_model-0000{1 if k in first else 2}-of-00002.bin" for k in state}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert checkpoints.read(tmp_path).keys() == state.keys()
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002\.bin"):
        checkpoints.read(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        checkpoints.read(tmp_path)


# -- downloads ---------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves `tmp_path/remote` on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *unused: object) -> None:
            pass

    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "weights.pt").write_bytes(b"weights")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/weights.pt"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "checkpoints"


SHA = "9b2c4de1f4f0e3d1d2ba44d6a2ecdb4bd0cf1a0ca7f1d5b9f0d9f9ab4f1e0e0f"


def test_download_is_checked_and_cached(server: str, cache: Path, tmp_path: Path) -> None:
    import hashlib

    good = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ModelError, match="not the file that was published"):
        downloads.fetch(Remote(file="weights.pt", url=server, sha256=SHA, licence=""), extra="zoo")
    assert not (cache / "weights.pt").exists()
    remote = Remote(file="weights.pt", url=server, sha256=good, licence="")
    assert downloads.fetch(remote, extra="zoo").read_bytes() == b"weights"
    (tmp_path / "remote" / "weights.pt").unlink()
    assert downloads.fetch(remote, extra="zoo") == cache / "weights.pt"


def test_failed_download_says_what_to_put_where(cache: Path) -> None:
    remote = Remote(file="weights.pt", url="http://127.0.0.1:9/weights.pt", licence="")
    with pytest.raises(ModelError) as caught:
        downloads.fetch(remote, extra="zoo")
    assert "http://127.0.0.1:9/weights.pt" in str(caught.value)
    assert str(cache / "weights.pt") in str(caught.value)


def test_hub_without_network_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote = Remote(file="config.json, model.safetensors", hub="nobody/nothing", licence="")
    with pytest.raises(ModelError, match=r"config\.json, model\.safetensors.*huggingface\.co/nobody/nothing"):
        downloads.fetch(remote, extra="zoo")


def test_checkpoint_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ModelError, match=r"No checkpoint at 'nowhere\.pt'"):
        downloads.locate("nowhere.pt", Remote(file="a", url="http://127.0.0.1:9/a", licence=""), extra="zoo")


def test_a_place_without_weights_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bitalloy import zoo\n"
        "try: zoo.export_model('yolo11n', checkpoint=sys.argv[1], folder=Path(sys.argv[2]))\n"
        "except zoo.ModelError as error: print(error, 'torch' in sys.modules)"
    )
    for place, told in ((tmp_path, "holds no weights"), (Path("/dev/null"), "No checkpoint file")):
        words = [sys.executable, "-c", code, str(place), str(tmp_path / "out")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert told in done.stdout and done.stdout.endswith("False\n")
    assert not (tmp_path / "out").exists()
