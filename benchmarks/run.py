"""Repeats benchmarks, and writes what they measured here to `benchmarks/results/`.

    python benchmarks/run.py search-time op-coverage
    python benchmarks/run.py --quick     # those of `make bench`: no data of one's own, about 10 minutes in all
    python benchmarks/run.py --list

Runs the command of each record, takes the JSON that it prints last, and writes the record anew with these figures, the
commit, day, machine and versions. Commands that need data take their folders from the environment, see `--list`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench_records import VARIABLES, BenchFigure, BenchMachine, BenchmarkRecord, read_record, record_names, write_record
from bitalloy.core.store import versions
from bitalloy.runtime.machine import this_machine

BUSY = 0.1
"""Part of all processors that others use, from which on a machine is called busy."""
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Repeat the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of benchmarks/results, without .json")
    parser.add_argument("--quick", action="store_true", help="all that need nothing and take a few minutes at most")
    parser.add_argument("--list", action="store_true", help="names, commands, and what must be set for them")
    asked = parser.parse_args()
    records = {name: read_record(name) for name in record_names()}
    if asked.list:
        for name, record in records.items():
            print(f"{name}: {record.command}" + ("" if record.repeatable else "  (a person reads its figures)"))
        print(*(f"${name}: {meaning}" for name, meaning in VARIABLES.items()), sep="\n")
        return
    names = [name for name, record in records.items() if record.quick] if asked.quick else asked.names
    if not names or (unknown := set(names) - records.keys()):
        parser.error(
            f"Give names of records, or --quick; see --list. {'Unknown: ' + ', '.join(unknown) if names else ''}"
        )
    for name in names:
        if not records[name].repeatable:
            parser.error(f"{name}: its figures are not in the JSON of its command: {records[name].command}")
    for name in names:
        print(f"{name}: {records[name].command}", flush=True)
        print(f"  {write_record(name, repeated(records[name])).relative_to(ROOT)}", flush=True)


def repeated(record: BenchmarkRecord) -> BenchmarkRecord:
    """Run the command of a record here, and return the record of that run."""
    assert record.command is not None
    machine, begun, before = this_machine(), time.monotonic(), (used_by_all(), used_by_commands())
    with tempfile.TemporaryDirectory() as folder:
        words = command_words(record.command, {"OUT": folder, **os.environ})
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds, printed = round(time.monotonic() - begun, 1), last_json(done.stdout)
    busy = None
    if before[0] is not None and (all_used := used_by_all()) is not None:
        others = all_used - before[0] - (used_by_commands() - before[1])
        busy = others >= BUSY * seconds * (os.cpu_count() or 1)
    figures = tuple(measured(figure, printed, seconds) for figure in record.figures)
    if all(figure.value is None for figure in figures):
        raise ValueError(f"No figure of the record is in what the command printed: {done.stdout[-200:]}")
    return msgspec.structs.replace(
        record,
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=BenchMachine(
            processor=machine.processor,
            vnni=any("vnni" in feature for feature in machine.features),
            threads=machine.threads,
            busy=busy,
        ),
        versions={"python": platform.python_version(), **versions()},
        stale="",
        figures=figures,
    )


def used_by_all() -> float | None:
    """Return the seconds of processors that were used since the machine started, also by other machines on its host.

    `None` where the system does not tell.
    """
    file = Path("/proc/stat")
    if not file.exists():
        return None
    user, nice, system, _, _, *others = map(int, file.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def used_by_commands() -> float:
    """Return the seconds of processors that commands used that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command_words(command: str, environment: Mapping[str, str]) -> list[str]:
    """Split a command, with the interpreter and environment that run this.

    Raises:
        SystemExit: A variable is not set.
    """
    template = string.Template(command)
    for name in template.get_identifiers():
        if name not in environment:
            sys.exit(f"Set {name}: {VARIABLES[name]}.")
    words = shlex.split(template.substitute(environment))
    launchers = {"python": [sys.executable], "bitalloy": [sys.executable, "-m", "bitalloy"]}
    return [*launchers.get(words[0], words[:1]), *words[1:]]


def last_json(text: str) -> Any:
    """Return the JSON that ends a text and starts at a line of its own.

    Raises:
        ValueError: There is none.
    """
    lines = text.splitlines()
    for first in range(len(lines) - 1, -1, -1):
        if lines[first].startswith(("{", "[")):
            try:
                return json.loads("\n".join(lines[first:]))
            except json.JSONDecodeError:
                continue
    raise ValueError(f"The command printed no JSON at its end, but: {text[-200:]}")


def measured(figure: BenchFigure, printed: Any, seconds: float) -> BenchFigure:
    """Return a figure with the numbers that a command printed, or `None` where it printed none."""
    found = {k: seconds if path == ("WALL_SECONDS",) else at(printed, path) for k, path in figure.paths.items()}
    spread = (found.get("low"), found.get("high"))
    return msgspec.structs.replace(
        figure,
        value=found["value"],
        predicted=found.get("predicted"),
        interval=None if None in spread else spread,
    )


def at(printed: Any, path: Sequence[str | int]) -> Any:
    """Follow keys and positions into JSON; `None` where they lead nowhere."""
    for step in path:
        try:
            printed = printed[step]
        except (KeyError, IndexError, TypeError):
            return None
    return printed


def commit() -> str | None:
    """Return the commit of the checkout, and whether code differs from it; `None` outside of a repository."""
    head = git("rev-parse", "--short", "HEAD")
    return f"{head} with changes" if head and git("status", "--porcelain", "--", "src", "benchmarks/*.py") else head


def git(*words: str) -> str | None:
    """Return what git prints, or `None` where it fails."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


if __name__ == "__main__":
    main()
