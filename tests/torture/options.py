"""Every option of every command with absurd values."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from tests import fuzz

VALUES = (
    *("", " ", "\x07", "²", "-1", "nan", "inf", "1e999", "9" * 400, "0x10", "1_000", "../../..", "/dev/null", "\udcff"),
    *("a=b=c", ",,,", "{0..9}{0..9}{0..9}{0..9}", "[", "*" * 5000, "é" * 300),
)
"""Twenty values that no option expects, but for patterns that match nothing."""
SECONDS, LONGEST = 2.0, 10.0
"""Time of the processor within which a value must be refused, as others may use it too; and time by the clock after
which a command has taken it, and is stopped."""
REAL = 40
"""One case in so many is given to a process of its own, start-up included."""


def suffer(seconds: float, seed: int) -> dict[str, Any]:
    """Try the cases in random order."""
    import typer.main

    import bitalloy.pipeline.run
    import bitalloy.pipeline.sensitivity  # noqa: F401  imported once, for all children
    from bitalloy.cli.main import app

    cases = [
        (name, option.opts[0], value)
        for name, command in sorted(typer.main.get_command(app).commands.items())  # type: ignore[attr-defined]
        for option in command.params
        if option.param_type_name == "option" and not option.is_flag
        for value in VALUES
    ]
    random.Random(seed).shuffle(cases)
    end, tried = time.monotonic() + seconds, 0
    codes: Counter[str] = Counter()
    faults, slow, slowest = [], [], 0.0
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        base = Path(root) / "base"
        base.mkdir()
        fuzz.write_feeds(base / "feeds")
        onnx.save(fuzz.bases()["two"], base / "two.onnx")
        for tried, (name, option, value) in enumerate(cases, 1):
            if time.monotonic() > end:
                tried -= 1
                break
            folder = Path(root) / "case"
            shutil.copytree(base, folder)
            words = [*_usual(name), option, value]
            told = f"{name} {option} {value[:20]!a}"
            if tried % REAL == 0 and "\0" not in value:
                took, text, code = _process(words, folder)
            else:
                outcome = fuzz.attempt(words, folder, seconds=LONGEST)
                took, text, code = outcome.cpu_seconds, outcome.text, outcome.code
            codes[{None: "taken", 0: "taken"}.get(code, str(code))] += 1
            if "Traceback" in text or code not in (None, 0, 2, 3, 4):
                faults.append(f"{told}: exit code {code}: {text[-500:]}")
            elif code == 2:
                slowest = max(slowest, took)
                if took > SECONDS:
                    faults.append(f"{told}: refused after {took:.1f} s: {text[-300:]}")
                if text.count("Error: ") + text.count("─ Error ─") != 1:
                    faults.append(f"{told}: not one message: {text[-500:]}")
            if code is None:
                slow.append(told)
            shutil.rmtree(folder)
    return {
        "cases": tried,
        "of": len(cases),
        "exit_codes": dict(codes),
        "slowest_refusal_cpu_s": round(slowest, 2),
        "running_on": sorted(slow),
        "faults": faults,
    }


def _usual(name: str) -> list[str]:
    match name:
        case "run" | "sensitivity":
            return [name, "two.onnx", "--data", "feeds/two", "--out", "run"]
        case "evaluate":
            return [name, "two.onnx"]
        case "export":
            return [name, "yolo11n"]
        case "doctor" | "models" | "targets":
            return [name]
        case "diff":
            return [name, "run", "run"]
    return [name, "run"]


def _process(words: list[str], folder: Path) -> tuple[float, str, int | None]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    given = [word.encode("utf-8", "surrogateescape") for word in (sys.executable, "-m", "bitalloy", *words)]
    try:
        done = subprocess.run(given, cwd=folder, capture_output=True, timeout=2 * LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return 0.0, "", None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, (done.stdout + done.stderr).decode(errors="replace"), done.returncode
