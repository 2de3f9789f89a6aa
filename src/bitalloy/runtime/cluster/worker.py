"""What a worker on a node does with the jobs that it is given."""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bitalloy.core.errors import BitalloyError
from bitalloy.core.jobs import Contexts, Job, perform
from bitalloy.core.limits import limited
from bitalloy.core.records import Record
from bitalloy.core.store import versions
from bitalloy.runtime.cluster.travel import Cargo, Warehouse, lies_here, moved
from bitalloy.runtime.machine import this_machine


class Facts(Record, frozen=True, kw_only=True):
    """What decides the bits of results on a machine."""

    versions: dict[str, str]
    """Package -> version."""
    features: tuple[str, ...]
    """Features of the processor by which runtimes choose kernels."""
    threads: int
    """Cores that a session may use: sums are split by them."""
    products: str
    """SHA-256 of a product of matrices, which the library behind numpy splits by threads in a way of its own."""


THREADS_OF_PRODUCTS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
"""Environment variables that set the number of threads of products of matrices, read when numpy is imported."""


def facts_here() -> Facts:
    """Tell what decides the bits of results on this machine."""
    machine, random = this_machine(), np.random.default_rng(0)
    first, second = (random.random(shape, dtype=np.float32) for shape in ((700, 900), (900, 800)))
    products = hashlib.sha256((first @ second).tobytes() + (first @ second[:, 0]).tobytes()).hexdigest()
    return Facts(versions=dict(versions()), features=machine.features, threads=machine.threads, products=products)


def differences(mine: Facts, other: Facts) -> str:
    """Say in which facts another machine differs, with both values; empty where it does not."""
    found = [
        f"{name} {mine.versions.get(name, 'absent')} here and {other.versions.get(name, 'absent')} there"
        for name in sorted({*mine.versions, *other.versions})
        if mine.versions.get(name) != other.versions.get(name)
    ]
    more, less = (
        sorted(set(a) - set(b)) for a, b in ((mine.features, other.features), (other.features, mine.features))
    )
    found += [f"the processor here has {', '.join(more)}"] if more else []
    found += [f"the processor there has {', '.join(less)}"] if less else []
    found += [f"{mine.threads} cores here and {other.threads} there"] if mine.threads != other.threads else []
    if not found and mine.products != other.products:
        found.append(f"a product of matrices has other bits; {', '.join(THREADS_OF_PRODUCTS)} may differ")
    return "; ".join(found)


class Refusal(Record, frozen=True, kw_only=True):
    """An error of the user's that a job ended with, which another try would end with as well."""

    kind: str
    """Name of the class of the error."""
    told: str


class Worker:
    """Does jobs in a process of its own; what they open stays open until the stage ends, or their group does.

    Args:
        limit: largest number of bytes that files may declare; None for the machine's own limit.
        folder: where files lie that travelled; None for the usual place.
    """

    def __init__(self, limit: int | None = None, folder: str | None = None) -> None:
        self._open, self._group, self._limit = ExitStack(), "", ExitStack()
        self.rest()
        self._limit.enter_context(limited(limit))
        self._warehouse = Warehouse(Path(folder) if folder else None)
        self._places: dict[str, str] = {}

    def facts(self) -> tuple[Facts, str, int]:
        """Tell what decides the bits here, the name of the node, and the number of the process."""
        return facts_here(), socket.gethostname(), os.getpid()

    def lacking(self, cargo: Cargo, shared: bool) -> list[str]:
        """List the hashes of contents that must be sent; none where the same files lie here at the same paths."""
        if shared and lies_here(cargo):
            self._places[cargo.root] = cargo.root
            return []
        missing = self._warehouse.lacking(cargo)
        if not missing:
            self.bring(cargo, [])
        return missing

    def bring(self, cargo: Cargo, contents: list[tuple[str, Any]]) -> None:
        """Store files; the contents are references into the object store, from which a node takes each once."""
        import ray

        known = dict(contents)
        self._places[cargo.root] = self._warehouse.store(cargo, lambda sha256: ray.get(known[sha256]))

    def do(self, data: bytes) -> bytes | Refusal:
        """Do a job, written as JSON, with its paths in the places where the files lie here."""
        job = Job.from_bytes(data)
        if job.group != self._group:
            self.rest()
            self._group = job.group
        job = msgspec.structs.replace(job, spec=moved(job.spec, self._places))
        try:
            return perform(job, self._scope)
        except BitalloyError as error:
            return Refusal(kind=type(error).__name__, told=str(error))

    def rest(self) -> None:
        """Close what is open."""
        self._open.close()
        self._scope = self._open.enter_context(Contexts().inner())
