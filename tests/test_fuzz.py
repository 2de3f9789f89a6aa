"""A short slice of `tests/fuzz.py`; CONTRIBUTING.md has the command for the long run."""

from __future__ import annotations

import subprocess
import sys


def test_mutated_files_and_absurd_options_neither_crash_nor_hang() -> None:
    words = [sys.executable, "-m", "tests.fuzz", "--files", "10", "--lines", "0", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "10 cases" in done.stdout
