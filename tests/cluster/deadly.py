"""Kinds of jobs that only tests have: a worker of Ray learns them when it starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bitalloy.cli import there
from bitalloy.core.jobs import JOB_KINDS, Contexts
from bitalloy.core.records import Record


class Task(Record, frozen=True, kw_only=True):
    """What a job does: it notes its process, may wait, and may end its worker."""

    notes: str
    value: int
    deaths: int = 0
    """How often its worker is killed before it gives a result."""
    wait_s: float = 0.0


def work(spec: Task, contexts: Contexts) -> bytes:
    """Give the square of the value."""
    place = Path(spec.notes)
    tries = len(list(place.glob(f"{spec.value}-*")))
    (place / f"{spec.value}-{tries}-{os.getpid()}").touch()
    if tries < spec.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(spec.wait_s)
    return str(spec.value**2).encode()


def alone(notes: str) -> str:
    """Name the node on which this runs, and fail where another call of this is there at the same time."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    place = Path(notes) / node
    place.mkdir()
    time.sleep(0.5)
    place.rmdir()
    return node


def learn() -> None:
    """Add the kinds to those that a process knows; a machine that tests is never idle."""
    JOB_KINDS["task"] = "tests.cluster.deadly:work"
    there.MOST_BUSY = 1.0
