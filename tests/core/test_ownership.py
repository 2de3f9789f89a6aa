"""One process at a time writes a run directory; temporary files belong to processes, and go with them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitalloy.core import ownership
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.store import MARKER, RunDirectory, claimed

HOLDS = """
import sys
from pathlib import Path
from bitalloy.core.ownership import make_temporary
from bitalloy.core.store import claimed
with claimed(sys.argv[1]) as store:
    print(make_temporary(store.cache), make_temporary(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """Another process that holds a run directory, and its temporary folders there and elsewhere."""
    words = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [Path(name) for name in process.stdout.readline().split()]
        finally:
            process.kill()


def test_a_run_directory_has_one_writer_whose_name_is_told(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as (process, folders):
        with pytest.raises(RunDirectoryError) as refused, claimed(tmp_path / "run"):
            pass
        told = str(refused.value)
        assert f"process {process.pid} on {socket.gethostname()}, since 20" in told and "another --out" in told
        assert f"-c {tmp_path / 'run'}" in told
        RunDirectory(tmp_path / "run").put("plan", "k", b"1")  # what adds results shares the folder
        assert all(folder.is_dir() for folder in folders)
        with claimed(tmp_path / "other"):
            assert all(folder.is_dir() for folder in folders)
        process.kill()
        process.wait()
        with claimed(tmp_path / "run") as store:  # no lock is left by a killed process, and none of its files
            assert not any(folder.exists() for folder in folders)
            assert store.get("plan", "k") == b"1"
    assert (tmp_path / "run" / MARKER).read_bytes() == b""


def test_holders_of_one_process_share_a_lock_until_the_last_is_done(tmp_path: Path) -> None:
    other = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with claimed(tmp_path / "run") as store:
        with claimed(tmp_path / "run"):
            store.put("plan", "k", b"1")
        failed = subprocess.run(other, capture_output=True, text=True, input="", check=False)
        assert f"in use by process {os.getpid()} on" in failed.stderr
    assert subprocess.run(other, capture_output=True, text=True, input="", check=False).returncode == 0


def test_files_of_running_processes_and_of_other_machines_are_kept(tmp_path: Path) -> None:
    cache = RunDirectory(tmp_path / "run").cache
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, _, token = ownership.mark().partition("+")
    names = {
        f"scratch-{host}+{ended.pid}+{'0' * 8}-x": False,
        f"scratch-{host}+{os.getpid()}+{'0' * 8}-x": False,  # an earlier process of this number
        f"scratch-{host}+{os.getppid()}+{'0' * 8}-x": True,
        f"scratch-{host}+{token}x": True,
        f"scratch-elsewhere+{ended.pid}+{'0' * 8}-x": True,
        "scratch-abcdef": False,  # of a version that did not name its processes
        "probe-scratch": True,
        f"{host}+{ended.pid}+{'0' * 8}-x{ownership.PARTIAL}": False,
        f"elsewhere+{ended.pid}+{'0' * 8}-x{ownership.PARTIAL}": True,
    }
    for name in names:
        (cache / name).mkdir() if name.startswith("scratch") else (cache / name).touch()
    RunDirectory(tmp_path / "run")
    assert {path.name for path in cache.iterdir()} == set(names)
    with claimed(tmp_path / "run"):
        assert {path.name for path in cache.iterdir()} == {name for name, kept in names.items() if kept}


def test_a_folder_in_which_nothing_was_kept_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), claimed(tmp_path / "run"):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()
    with claimed(tmp_path / "run") as store:
        store.put("plan", "k", b"1")
    with pytest.raises(ValueError, match="refused"), claimed(tmp_path / "run"):
        raise ValueError("refused")
    assert (tmp_path / "run" / MARKER).is_file()


def test_temporary_folders_are_named_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "bitalloy-mine").mkdir()
    with ownership.temporary() as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path and str(os.getpid()) in folder.name
    assert [path.name for path in tmp_path.iterdir()] == ["bitalloy-mine"]
