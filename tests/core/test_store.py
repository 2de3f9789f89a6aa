"""The run directory keeps results under their keys, whole, and apart from what is not its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import msgspec
import pytest

from bitalloy.core import store
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.store import MARKER, RunDirectory, StageInputs, key_of, versions


class One(StageInputs, frozen=True, kw_only=True):
    value: dict[str, int]


def test_a_key_is_a_hash_of_type_versions_and_content() -> None:
    content = ("One", dict(sorted(versions().items())), {"value": {"a": 1, "b": 2}})
    expected = hashlib.sha256(msgspec.msgpack.encode(content, order="sorted")).hexdigest()
    assert key_of(One(value={"a": 1, "b": 2})) == key_of(One(value={"b": 2, "a": 1})) == expected


def test_versions_are_those_of_all_that_computes() -> None:
    assert versions() == {name: importlib.metadata.version(name) for name in store.DECISIVE}
    assert {"bitalloy", "numpy", "onnx", "onnxruntime", "scipy"} <= set(versions())


def test_what_is_stored_is_found_again_under_its_stage_key_and_shard(tmp_path: Path) -> None:
    run, key = RunDirectory(tmp_path / "a" / "run"), "0123456789" * 6
    assert run.path == tmp_path / "a" / "run" and (run.path / MARKER).is_file()
    assert run.get("probe", key) is None and not run.has("probe", key)
    run.put("probe", key, b"whole")
    run.put("probe", key, b"part", "3")
    assert (run.get("probe", key), run.get("probe", key, "3"), run.get("probe", key, "4")) == (b"whole", b"part", None)
    assert run.has("probe", key) and run.has("probe", key, "3") and not run.has("probe", key, "4")
    assert run.get("plan", key) is None and run.get("probe", "9" + key) is None
    found = {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file()}
    assert found == {MARKER, f"cache/probe-{key[:24]}", f"cache/probe-{key[:24]}.d/3"}
    assert RunDirectory(run.path).get("probe", key) == b"whole"


def test_a_result_is_made_once(tmp_path: Path) -> None:
    run, made = RunDirectory(tmp_path / "run"), []

    def make() -> bytes:
        made.append(1)
        return b""

    assert run.cached("plan", "k", make) == run.cached("plan", "k", make) == b"" and made == [1]
    assert run.cached("plan", "l", lambda: b"other") == b"other" and run.get("plan", "l") == b"other"


def test_what_the_user_reads_lies_at_the_top(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.publish("a.txt", "é").read_bytes() == "é".encode()
    assert run.publish("a.bin", b"\xff") == tmp_path / "a.bin" and (tmp_path / "a.bin").read_bytes() == b"\xff"
    assert run.publish_files("b", lambda path: path.write_bytes(b"1")) == tmp_path / "b"
    assert (tmp_path / "b").read_bytes() == b"1"


def test_a_folder_of_other_things_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(RunDirectoryError, match="is not empty and is not a run directory"):
        RunDirectory(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        RunDirectory(tmp_path / "mine")
    with pytest.raises(RunDirectoryError, match="is not UTF-8 text"):
        RunDirectory(tmp_path / "a\udcff")


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    (run.cache / f"probe-{'k' * 24}.d").touch()

    def full(path: Path) -> None:
        raise OSError("No space left on device")

    with pytest.raises(RunDirectoryError, match=r"probe-k+\.d/3' cannot be written.*Free space"):
        run.put("probe", "k" * 24, b"1", "3")
    with pytest.raises(RunDirectoryError, match=r"b' cannot be written: No space left.*Free space"):
        run.publish_files("b", full)
