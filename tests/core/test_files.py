import os
from pathlib import Path

import pytest

from bitalloy.core import files, ownership


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with files.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_finished_leaves_no_trace(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half of the n")
        assert [p.suffix for p in tmp_path.iterdir() if p != path] == [ownership.PARTIAL]
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_a_file_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        (tmp_path / "plain").touch()
        files.write(tmp_path / "a", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
