"""SIGKILL at random times over chains of commands on three models, on workers of Ray too, and over a study."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from tests import fuzz

COMMON = ("--samples", "2", "--probes", "4", "--calibration-samples", "4")
NUMBERS = ("plan.json", "sensitivity.json", "calibration.json", "units.json", "probe_matrix.npz")
"""Files that must be the same, where the target's latencies are estimates; else those that rest on no latency."""
MEASURED = frozenset({"plan.json"})
CORRECTED = ("--equalize", "--bias-correction", "--weight-rounding", "search")
STUDY, RAY = "a study", "tensorrt with Ray"
STUDY_FILE = """
targets = ["tensorrt"]
[budget.fast]
latency = "1.5x"
[budget.faithful]
min-sqnr-db = 10.0
[[model]]
name = "net"
model = "model.onnx"
data = "{feeds}"
"""
OWN_METRIC = """
import glob, sys
import numpy as np

def size(session):
    feeds = dict(np.load(sorted(glob.glob(sys.argv[sys.argv.index("--data") + 1] + "/*.npz"))[0]))
    return float(np.mean([np.abs(value).mean() for value in session.run(None, feeds)]))
"""
LONGEST_DELAY = 0.5
"""Seconds that a command lives on after the line of progress that it is killed after."""
STAGE = re.compile(r"([a-z][a-z -]*), (?:\d+ steps, )?[\d.]+ s \(")
"""A line of progress, which begins with the name of a stage."""
LIMIT = 240
"""Seconds after which a command that is not killed counts as a hang."""


def suffer(seconds: float, seed: int) -> dict[str, Any]:
    """Kill commands, give the same ones again until they are done, and compare what they leave."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    faults: list[str] = []
    kills: Counter[str] = Counter()
    rounds = lost = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        root = Path(name)
        fuzz.write_feeds(root / "feeds")
        wanted: dict[str, tuple[Mapping[str, bytes], list[int]]] = {}
        cases = [("net", "tensorrt"), ("text", "tensorrt"), ("head", "ort-cpu"), ("net", "ort-cpu"), ("net", STUDY)]
        cases += [("net", RAY)] if find_spec("ray") else []
        while time.monotonic() < end:
            model, target = cases[rounds % len(cases)]
            case = f"{model} on {target.removesuffix(' with Ray')}"  # whose numbers are to be the same
            folder = root / f"{model}-{rounds}"
            folder.mkdir()
            onnx.save(fuzz.bases()[model], folder / "model.onnx")
            (folder / "own_metric.py").write_text(OWN_METRIC)
            (folder / "study.toml").write_text(STUDY_FILE.format(feeds=root / "feeds" / model))
            lines = commands(root / "feeds" / model, target)
            if case not in wanted:
                stages = [_undisturbed(line, folder, faults) for line in lines]
                wanted[case] = (results(folder, target), stages)
                shutil.rmtree(folder / "run", ignore_errors=True)
            for line, count in zip(lines, wanted[case][1], strict=True):
                while time.monotonic() < end:
                    stage, gone = _killed(line, folder, (rng.randint(0, count), rng.uniform(0, LONGEST_DELAY)), faults)
                    lost = max(lost, gone)
                    if not stage:
                        break
                    kills[stage] += 1
                else:
                    _undisturbed(line, folder, faults)
            found = results(folder, target)
            told = f"{model} on {target}"
            faults += [f"{told}: {file} differs" for file, data in wanted[case][0].items() if found.get(file) != data]
            rounds += 1
            shutil.rmtree(folder)
    return {
        "kills": sum(kills.values()),
        "by_stage": dict(kills.most_common()),
        "chains": rounds,
        "most_results_lost_at_once": lost,
        "not_installed": [] if find_spec("ray") else ["ray"],
        "faults": sorted(set(faults)),
    }


def commands(feeds: Path, target: str) -> list[list[str]]:
    """Command lines of one chain."""
    if target == STUDY:
        return [["study", "study.toml", "--out", "run"]]
    shared = ("--executor", "ray", "--workers", "2") if target == RAY else ()
    usual = ["model.onnx", "--data", str(feeds), *COMMON, "--target", target.split()[0], *shared, "--out", "run"]
    lines = [
        ["sensitivity", *usual, "--confirm", "3"],
        ["run", *usual, *CORRECTED, "--effort", "thorough", "--latency", "1.5x", "--max-drop-db", "10"],
    ]
    if target != "ort-cpu":
        return lines
    limited = ["run", *usual, "--metric", "own_metric:size", "--max-drop", "size=0.5"]
    return [*lines, ["audit", "run"], limited]


def results(folder: Path, target: str) -> Mapping[str, bytes]:
    """What must be the same after every course of events."""
    names = [name for name in NUMBERS if target != "ort-cpu" or name not in MEASURED]
    found = {}
    for path in sorted((folder / "run").rglob("*.json" if target == STUDY else "*")):
        if "cache" not in path.relative_to(folder).parts and path.name in names:
            found[str(path.relative_to(folder))] = path.read_bytes()
    for path in (folder / "run").rglob("summary.json") if target != "ort-cpu" else ():
        content = json.loads(path.read_text())
        numbers = {key: content[key] for key in ("schemes", "size_bytes", "sqnr_db", "predicted_latency_ratio")}
        found[str(path.relative_to(folder))] = json.dumps(numbers, sort_keys=True).encode()
    return found


def _start(line: list[str], folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "bitalloy", *line]
    with (folder / "shown").open("wb") as shown:
        return subprocess.Popen(words, cwd=folder, stdout=shown, stderr=shown, start_new_session=True)


def _undisturbed(line: list[str], folder: Path, faults: list[str]) -> int:
    """Let a command end, and return how many lines of progress it wrote."""
    process = _start(line, folder)
    try:
        code: int | None = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = None
    if code != 0:
        faults.append(f"{line[0]}: exit code {code}: {(folder / 'shown').read_text()[-800:]}")
    return len(_stages(folder))


def _stages(folder: Path) -> list[str]:
    """The stages that the lines of progress name so far."""
    lines = (folder / "shown").read_text(errors="replace").splitlines()
    return [found[1] for text in lines if (found := STAGE.match(text))]


def _killed(line: list[str], folder: Path, when: tuple[int, float], faults: list[str]) -> tuple[str, int]:
    """Start a command and kill it some time after so many lines of progress, or after it began to work.

    Returns:
        The stage after which it was killed, empty where the command was done before; and how many stored results that
        cost.
    """
    cache = folder / "run" / "cache"
    before = _stored(cache)
    process = _start(line, folder)
    swept, end, limit = False, 0.0, time.monotonic() + LIMIT
    while not end or time.monotonic() < end:
        if not end and _owner(folder) == process.pid and len(_stages(folder)) >= when[0]:
            end = time.monotonic() + when[1]
        if process.poll() is not None:
            if process.returncode != 0:
                faults.append(f"{line[0]}: exit code {process.returncode}: {(folder / 'shown').read_text()[-800:]}")
            return "", len(before - _stored(cache))
        if time.monotonic() > limit:
            faults.append(f"{line[0]}: hangs: {(folder / 'shown').read_text()[-800:]}")
            break
        swept = swept or _holds(folder, process.pid)
        if swept and (left := _leftovers(folder, process.pid)):
            faults.append(f"{line[0]}: left by a killed process after the next start: {left}")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stages = _stages(folder)
    return f"after {stages[-1]}" if stages else "before the first stage", len(before - _stored(cache))


def _stored(cache: Path) -> set[str]:
    if not cache.is_dir():
        return set()
    return {
        str(path)
        for path in cache.rglob("*")
        if path.is_file() and "+" not in str(path.relative_to(cache)) and path.name != "freed.json"
    }


def _holds(folder: Path, process: int) -> bool:
    """Whether a process has the lock, and a file that it made since, so that it has swept before."""
    return _owner(folder) == process and any((folder / "run").rglob(f"*+{process}+*"))


def _owner(folder: Path) -> int | None:
    """The process that has the lock of the run directory, or had it when it was killed."""
    try:
        return int(json.loads((folder / "run" / ".bitalloy-run").read_text())["pid"])
    except (OSError, ValueError):
        return None


def _leftovers(folder: Path, process: int) -> list[str]:
    found = (p.name for p in (folder / "run").rglob("*+*+*") if f"+{process}+" not in p.name and "+" in p.name)
    return sorted(found)[:3]
