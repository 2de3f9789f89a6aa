"""A run that is asked to end: one line says what is kept, temporary files are gone, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.conftest import save_feeds, two_inputs

SLOW = """
import time
from pathlib import Path

def waiting(session):
    if not Path("tried").exists():  # before the analysis
        Path("tried").touch()
        return 1.0
    Path("waits").touch()
    while not Path("go").exists():
        time.sleep(0.05)
    return 1.0
"""
QUICK = ("--samples", "1", "--probes", "1", "--calibration-samples", "4", "--effort", "quick")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_removes_what_is_temporary_and_tells_what_is_kept(
    number: int, code: int, here: Path, request: pytest.FixtureRequest
) -> None:
    onnx.save(two_inputs(), here / "two.onnx")
    save_feeds(here / "feeds", count=8, left=(1, 16), right=(1, 16))
    (here / "slow_of_test.py").write_text(SLOW)
    words = ("run", "two.onnx", "--data", "feeds", *QUICK, "--metric", "slow_of_test:waiting")
    line: Any = [sys.executable, "-m", "bitalloy", *words, "--out", "run"]
    usual = {signal.SIGINT: signal.default_int_handler}
    started = subprocess.Popen(
        line,
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: [signal.signal(n, h) for n, h in usual.items()],
    )
    request.addfinalizer(started.kill)
    while not (here / "waits").exists():
        assert started.poll() is None
        time.sleep(0.05)
    cache = here / "run" / "cache"
    assert list(cache.glob("scratch-*"))
    second = subprocess.run(line, cwd=here, capture_output=True, text=True, check=False)
    assert second.returncode == 2 and f"in use by process {started.pid}" in second.stderr
    assert list(cache.glob("scratch-*")), "the second deleted what the first one works on"
    started.send_signal(number)
    (here / "go").touch()
    shown, _ = started.communicate(timeout=60)
    assert started.returncode == code, shown
    assert "Stopped. The same command goes on from here: 'run' keeps what is done (calibrate" in shown
    assert "Traceback" not in shown
    assert not [*cache.glob("scratch-*"), *(here / "run").rglob("*.partial")]
    if number == signal.SIGTERM:  # both leave the same
        done = subprocess.run(line, cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (here / "run" / "summary.json").is_file()
