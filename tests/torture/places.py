"""Places that refuse: full disks, folders that are read only, other file systems, locales and names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from tests import fuzz

SIZES_KB = (64, 192, 16, 320, 96, 32, 256, 128, 48, 400, 8)
"""Sizes of disks, at most of which some write of a run fails."""
LIMIT = 240


def suffer(seconds: float, seed: int) -> dict[str, Any]:
    """Try all places; disks of so many sizes as there is time for."""
    faults: list[str] = []
    end = time.monotonic() + seconds / 2
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        root = Path(name)
        fuzz.write_feeds(root / "feeds")
        onnx.save(fuzz.bases()["two"], root / "two.onnx")
        usual = ["run", "two.onnx", "--data", "feeds/two", *fuzz.QUICK, "--effort", "quick", "--size", "0.9x"]
        figures: dict[str, Any] = {"mounts": _can_mount(root)}
        if figures["mounts"]:
            figures["full_disks"] = _full(root, usual, faults, end)
            figures["read_only"] = _read_only(root, usual, faults)
        figures["locales"] = _locales(root, usual, faults)
        figures["names"] = _names(root, faults)
    return {**figures, "faults": faults}


def _run(words: list[str], root: Path, **environment: str) -> tuple[int, str]:
    given = [word.encode("utf-8", "surrogateescape") for word in (sys.executable, "-m", "bitalloy", *words)]
    surroundings = {**os.environ, **environment}
    done = subprocess.run(given, cwd=root, capture_output=True, env=surroundings, timeout=LIMIT, check=False)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def _wrong(code: int, text: str, expected: int) -> str:
    """What is wrong with a result; empty where nothing is."""
    if "Traceback" in text or code != expected or (code == 2 and text.count("Error: ") != 1):
        return f"exit code {code}, expected {expected}: {text[-800:]}"
    return ""


@contextmanager
def _disk(root: Path, size_kb: int) -> Iterator[Path]:
    disk = root / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", disk], check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def _can_mount(root: Path) -> bool:
    try:
        with _disk(root, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _full(root: Path, usual: list[str], faults: list[str], end: float) -> dict[str, int]:
    """Disks of several sizes: a refusal, earlier results are there, and the run goes on with more space."""
    counts = {"refused": 0, "done": 0}
    for size in SIZES_KB:
        if time.monotonic() > end:
            break
        with _disk(root, size) as disk:
            code, text = _run([*usual, "--out", "disk/run"], root)
            counts["done" if code == 0 else "refused"] += 1
            if wrong := _wrong(code, text, 0 if code == 0 else 2):
                faults.append(f"disk of {size} kB: {wrong}")
            kept = {p: p.read_bytes() for p in (disk / "run" / "cache").rglob("*") if p.is_file()}
            subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
            if wrong := _wrong(*_run([*usual, "--out", "disk/run"], root), 0):
                faults.append(f"disk of {size} kB, then of 16 MB: {wrong}")
            lost = [str(p) for p, data in kept.items() if "+" not in str(p) and p.read_bytes() != data]
            faults += [f"disk of {size} kB: {path} was changed" for path in lost]
    return counts


def _read_only(root: Path, usual: list[str], faults: list[str]) -> int:
    """A finished run on another file system that becomes read only: what reads works, what writes is refused."""
    with _disk(root, 16_000) as disk:
        if wrong := _wrong(*_run([*usual, "--out", "disk/run"], root), 0):
            faults.append(f"another file system: {wrong}")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        lines = [
            (["check", "disk/run"], 0),
            (["diff", "disk/run", "disk/run"], 0),
            (["audit", "disk/run"], 0),
            (["clean", "disk/run", "--dry-run"], 0),
            (["clean", "disk/run"], 2),
            (["plan", "disk/run"], 2),
            ([*usual, "--out", "disk/run"], 2),
            ([*usual, "--out", "disk/other"], 2),
        ]
        for words, expected in lines:
            if wrong := _wrong(*_run(words, root), expected):
                faults.append(f"{' '.join(words[:2])} read only: {wrong}")
    return len(lines)


def _locales(root: Path, usual: list[str], faults: list[str]) -> int:
    """Other locales, with names that they cannot write."""
    shutil.copytree(root / "feeds" / "two", root / "é ü 数")
    named = ["é ü 数" if word == "feeds/two" else word for word in usual]
    locales = (
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "tr_TR.UTF-8"},
    )
    for number, environment in enumerate(locales):
        code, text = _run([*named, "--out", f"é{number}"], root, **environment)
        if wrong := _wrong(code, text, 0 if code == 0 else 2):
            faults.append(f"{environment}: {wrong}")
    return len(locales)


def _names(root: Path, faults: list[str]) -> int:
    """Names of files that are not UTF-8."""
    bad = b"\xff".decode("utf-8", "surrogateescape")
    shutil.copy(root / "two.onnx", root / f"{bad}.onnx")
    (root / "odd").mkdir()
    shutil.copy(root / "feeds" / "two" / "000.npz", root / "odd" / f"{bad}.npz")
    lines = [
        ["run", f"{bad}.onnx", "--data", "feeds/two", "--out", "run"],
        ["run", "two.onnx", "--data", "odd", "--out", "run"],
        ["run", "two.onnx", "--data", "feeds/two", "--out", bad],
        ["check", bad],
        ["clean", bad],
        ["plan", bad],
        ["evaluate", f"{bad}.onnx", "--eval", "feeds"],
    ]
    wrongs = ((words[0], _wrong(*_run(words, root), 2)) for words in lines)
    faults += [f"{name} with a name that is not UTF-8: {wrong}" for name, wrong in wrongs if wrong]
    return len(lines)
