"""What a run directory takes, and what `clean` frees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.conftest import save_feeds, two_inputs

from bitalloy.core.disk import clean_run, disk_use, told_freed
from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.store import RunDirectory


def test_the_cache_is_freed_and_results_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.publish("report.html", "x" * 10)
    run.put("probe", "k", b"1" * 100, "0")
    run.put("probe", "k", b"1" * 50, "1")
    run.put("rounding-trial", "k", b"1" * 200)
    other = RunDirectory(run.path / "tensorrt")
    other.publish("report.html", "x" * 5)
    other.put("cost", "k", b"1" * 7)
    (run.cache / "scratch-elsewhere+1+00000000-x").mkdir()
    (run.cache / "scratch-elsewhere+1+00000000-x" / "file").write_bytes(b"1" * 3)
    before = disk_use(run.path)
    assert (before.total_bytes, before.cache_bytes, before.freed) == (375, 360, False)
    assert list(before.stages.items()) == [("rounding-trial", 200), ("probe", 150)]
    assert clean_run(run.path, dry_run=True) == before and run.has("rounding-trial", "k")
    assert told_freed(run.path) == ""
    assert clean_run(run.path).freed
    left = {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file() and p.name[0] != "."}
    assert left == {"report.html", "tensorrt/report.html", "cache/freed.json"}
    assert "compute again: rounding-trial, probe." in told_freed(run.path)


def test_only_a_run_directory_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine").touch()
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            clean_run(path)
    assert (tmp_path / "cache" / "mine").is_file() and not (tmp_path / "absent").exists()


def test_plans_are_made_again_after_the_cache_was_freed(inside: Any, here: Path) -> None:
    onnx.save(two_inputs(), here / "two.onnx")
    save_feeds(here / "feeds", count=8, left=(1, 16), right=(1, 16))
    words = ("run", "two.onnx", "--data", "feeds", "--samples", "1", "--probes", "1", "--effort", "quick")
    shown = inside(*words, "--latency", "2x", "--out", "run").succeeded()
    assert "'run' takes" in shown.out and "`bitalloy clean run` frees" in shown.out
    plan = ("plan", "run", "--json")
    first = inside(*plan).succeeded()
    assert "freed" not in first.err
    assert "probe" in inside("clean", "run", "--dry-run").succeeded().out
    assert '"freed": true' in inside("clean", "run", "--json").succeeded().out
    again = inside(*plan).succeeded()
    assert again.out == first.out and "compute again: " in again.err and "probe" in again.err
    assert "Passed." in inside("check", "run").succeeded().out
    inside(*words, "--latency", "2x", "--out", "run").succeeded()
    assert "freed" not in inside(*plan).succeeded().err
