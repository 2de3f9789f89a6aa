"""Progress of long work as a person sees it: bars on a terminal and in a notebook, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MOST_SILENT = 15.0
"""Seconds after which a line is written though no stage has ended: below the 20 that a reader of a log waits."""
LEAST_KNOWN = 0.05
"""Part of a course that must be behind before what is left is estimated from it."""
LEAST_SECONDS = 0.05
"""A stage that takes less was stored, and tells nothing of the pace."""
NEW_TARGET = "cost"
"""The first stage that every target of a run has for itself."""
RUN_SHARES: Mapping[str, float] = {
    "calibrate": 0.06,
    "debias": 0.03,
    "probe": 0.29,
    "ranges": 0.02,
    "secant": 0.05,
    "exact": 0.02,
    "cost": 0.26,
    "search": 0.01,
    "verify": 0.16,
    "memory": 0.03,
    "kernels": 0.04,
    "audit": 0.03,
}
"""Stage of a run, in order -> its typical part of the time: of detectors and segmenters without labels."""
EVALUATED_SHARES: Mapping[str, float] = {"resolution": 0.02, "front": 0.16, "candidate": 0.06, "evaluate": 0.02}
"""The same of stages that labels add, which come between `search` and `verify`."""


def shares_of_run(*, evaluated: bool) -> dict[str, float]:
    """Return stage -> typical part of the time of a run, in order; with labels there are more stages."""
    found = dict(RUN_SHARES)
    if evaluated:
        after = list(found).index("search") + 1
        found = dict([*list(found.items())[:after], *EVALUATED_SHARES.items(), *list(found.items())[after:]])
    return found


class Course:
    """How much of a command is left, from typical parts of the time and the pace of this run.

    Args:
        shares: stage -> its part of the time, in order; stages that it does not name tell nothing.
        targets: how often the stages from `cost` on come.
    """

    def __init__(self, shares: Mapping[str, float], targets: int = 1) -> None:
        self._shares, self._names, self._targets = shares, list(shares), targets
        self._at, self._worked = -1, 0.0

    def begin(self, stage: str) -> None:
        """Note that a stage begins."""
        if stage not in self._shares:
            return
        place = self._names.index(stage)
        if stage == NEW_TARGET and self._at > place:
            self._targets, self._at = self._targets - 1, place
        self._at = max(self._at, place)

    def end(self, stage: str, seconds: float) -> None:
        """Note that a stage took so long."""
        if seconds >= LEAST_SECONDS:
            self._worked += self._shares.get(stage, 0.0)

    def left(self, seconds: float, stage: str | None = None, part: float = 0.0) -> float | None:
        """Estimate the seconds that are left; None while too little is known.

        Args:
            seconds: how long the work has taken so far.
            stage: the stage at work; None between two.
            part: part of it that is done, in 0..1.
        """
        share = self._shares.get(stage or "", 0.0)
        worked = self._worked + share * part
        if worked < LEAST_KNOWN or not self._shares:
            return None
        ahead = sum(self._shares[name] for name in self._names[self._at + 1 :]) + share * (1 - part)
        if NEW_TARGET in self._names:
            ahead += (self._targets - 1) * sum(
                self._shares[name] for name in self._names[self._names.index(NEW_TARGET) :]
            )
        return seconds / worked * ahead


class Shown:
    """Progress of the stages: bars where the console is alive, elsewhere lines, of which one comes every 15 seconds.

    Args:
        console: where it is shown.
        course: what tells how much is left; without it only stages are told.
    """

    def __init__(self, console: Console, course: Course | None = None) -> None:
        self._console, self._course = console, course or Course({})
        self._bars: Any = _bars(console) if console.is_terminal or console.is_jupyter else None
        self._stage: str | None = None
        self._total: int | None = None
        self._last, self._began, self._done = "", 0.0, 0
        self._start = self._told = time.perf_counter()
        self._lock, self._over = threading.RLock(), threading.Event()

    def __enter__(self) -> Shown:
        self._start = self._told = time.perf_counter()
        if self._bars is not None:
            self._bars.start()
        else:
            self._over.clear()
            threading.Thread(target=self._keep_telling, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._over.set()
        if self._bars is not None:
            self._bars.stop()

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage of `total` steps; None where the number is unknown."""
        with self._lock:
            self._stage, self._total, self._began, self._done = stage, total, time.perf_counter(), 0
            self._course.begin(stage)
        if self._bars is not None:
            self._bars.add_task(stage, total=total)

    def advance(self, steps: int = 1) -> None:
        """Report that steps of the stage are done."""
        if self._stage is not None:
            self._done += steps
            if self._bars is not None:
                self._bars.advance(self._bars.task_ids[-1], steps)

    def finish(self, note: str = "") -> None:
        """End the stage, and show a note on its result."""
        if self._stage is None:
            return
        with self._lock:
            stage, took, self._stage = self._stage, time.perf_counter() - self._began, None
            self._last = stage
            self._course.end(stage, took)
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[-1], total=self._done, completed=self._done)
        else:
            steps = f", {self._done} steps" if self._done else ""
            self._tell(f"{stage}{steps}, {took:.1f} s", None, 0.0)

    def _keep_telling(self) -> None:
        """Write a line whenever none was written for a while, until the work is over."""
        while not self._over.wait(max(0.1, self._told + MOST_SILENT - time.perf_counter())):
            if time.perf_counter() - self._told >= MOST_SILENT:
                self._tell(*self._standing())

    def _standing(self) -> tuple[str, str | None, float]:
        """Say what is at work; with the stage, and the part of it that is done."""
        with self._lock:
            if self._stage is None:
                return f"after {self._last}" if self._last else "opening", None, 0.0
            took, told = time.perf_counter() - self._began, self._stage
            part = min(1.0, self._done / self._total) if self._total else 0.0
            if self._total:
                told += f", {self._done} of {self._total} steps"
            return f"{told}, {took:.1f} s", self._stage, part

    def _tell(self, line: str, stage: str | None, part: float) -> None:
        self._told = time.perf_counter()
        so_far = self._told - self._start
        left = self._course.left(so_far, stage, part)
        line += f" ({duration(so_far)} so far"
        line += f", about {duration(left)} left)" if left is not None else ")"
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


class StageBars:
    """Progress in a notebook: every stage opens a display of its own, and closes it."""

    def __init__(self) -> None:
        self._shown: Shown | None = None

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage of `total` steps; None where the number is unknown."""
        from rich.console import Console

        self._shown = Shown(Console())
        self._shown.__enter__()
        self._shown.start(stage, total)

    def advance(self, steps: int = 1) -> None:
        """Report that steps of the stage are done."""
        if self._shown is not None:
            self._shown.advance(steps)

    def finish(self, note: str = "") -> None:
        """End the stage."""
        if self._shown is not None:
            self._shown.finish(note)
            self._shown.__exit__()
            self._shown = None


def duration(seconds: float) -> str:
    """Write a time as a person says it.

    >>> duration(4.2), duration(61), duration(5000)
    ('4 s', '1 min 1 s', '1 h 23 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bars(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
