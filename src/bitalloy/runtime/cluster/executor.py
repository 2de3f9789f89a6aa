"""Jobs on workers of Ray: on this machine, or on a cluster."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import msgspec

from bitalloy.core import errors
from bitalloy.core.errors import BitalloyError, MissingExtraError
from bitalloy.core.jobs import Contexts, Executor, Job, LocalExecutor, residents
from bitalloy.core.limits import memory_limit
from bitalloy.runtime.cluster.travel import Cargo, load_cargo, named_paths
from bitalloy.runtime.cluster.worker import THREADS_OF_PRODUCTS, Refusal, Worker, differences, facts_here
from bitalloy.runtime.ort import available_cores

LOCAL, RAY, SCHEME = "local", "ray", "ray://"
TRIES = 3
"""How often a job is given to a worker before it is given up."""
AHEAD = 4
"""Jobs for each worker that may be done before the results in front of them are taken."""
PATIENCE_S = 120
"""Seconds within which a first worker must start."""
SPARE_S = 30
"""Seconds within which others must start beside it, while it waits."""
SETTLE_S = 2
"""Seconds after which Ray knows that a resource is free, such as the processor of a lost worker."""
LAST_JOBS_S = 5
"""Seconds that jobs whose results nobody takes may need to end, before their workers are ended."""


@contextmanager
def executing(name: str, workers: int | None = None) -> Iterator[Executor]:
    """Give the executor of a name until the end of the block.

    Args:
        name: `local`; `ray` for workers on this machine; or `ray://HOST:PORT` for a cluster of Ray that runs, with the
            address of its head, and this machine in it. `ray://auto` finds the cluster that this machine is in.
        workers: number of workers; None for one for each node, on this machine for each core.

    Raises:
        BitalloyError: the name is none of these, Ray is not installed, or the cluster cannot be reached.
    """
    if name == LOCAL:
        if workers is not None:
            raise BitalloyError("--workers needs --executor ray or ray://HOST:PORT.")
        yield LocalExecutor()
        return
    with RayExecutor(name, workers) as executor:
        yield executor


def check_executor(name: str) -> str:
    """Return the name of an executor.

    Raises:
        BitalloyError: there is none of this name.
    """
    if name in (LOCAL, RAY) or (name.startswith(SCHEME) and len(name) > len(SCHEME)):
        return name
    raise BitalloyError(f"--executor is '{name[:80]}'; expected local, ray or ray://HOST:PORT.")


def imported_ray(purpose: str) -> Any:
    """Import Ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", purpose) from error
    return ray


def connect(ray: Any, address: str, workers: int | None = None) -> None:
    """Start Ray on this machine, or connect to a cluster that runs.

    Args:
        ray: the module.
        address: `ray`, or `ray://HOST:PORT`, see `executing`.
        workers: number of workers on this machine; None for one for each core.

    Raises:
        BitalloyError: the cluster cannot be reached.
    """
    handler = signal.getsignal(signal.SIGTERM)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == RAY:
            ray.init(address="local", num_cpus=workers or available_cores(), include_dashboard=False, **quiet)
        else:
            ray.init(address=address.removeprefix(SCHEME), **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise BitalloyError(
            f"No cluster of Ray at '{address}': {str(error).splitlines()[0]} Start one with `ray start --head`, run "
            "this on one of its machines, and give the address that it prints. One that asks for a token needs "
            "RAY_AUTH_MODE=token here too."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def threads_of_workers() -> dict[str, dict[str, str]]:
    """Return the environment of processes that Ray starts: products of matrices have as many threads as here.

    Ray would allow one, and the number of threads decides bits.
    """
    return {"env_vars": {name: os.environ.get(name, str(available_cores())) for name in THREADS_OF_PRODUCTS}}


@dataclass(eq=False)
class _Hand:
    """A worker, as the process sees it that gives it jobs."""

    actor: Any
    node: str
    known: set[str] = field(default_factory=set)
    """Paths whose files are there."""


@dataclass(eq=False)
class _Unit:
    """Jobs that go to one worker, in their order."""

    numbers: deque[int]
    tries: int = 0


class RayExecutor:
    """Does jobs on workers of Ray; where Ray runs in this process already, it is used, and left as it is.

    The results are the bytes that this process would make: a worker whose packages, processor or number of cores differ
    is refused. A job whose worker is lost is given to another one. Work that needs what is in this process's memory is
    done here.

    Args:
        address: `ray`, or `ray://HOST:PORT`, see `executing`.
        workers: number of workers; None for one for each node, on this machine for each core.
        shared: whether files of the same contents at the same paths on a node are read there; else they always travel.
        folder: where files that travelled lie on a node; None for the system's folder of temporary files.

    Raises:
        BitalloyError: the address is malformed, or Ray is not installed.
    """

    def __init__(
        self, address: str = RAY, workers: int | None = None, *, shared: bool = True, folder: Path | None = None
    ) -> None:
        self.contexts = Contexts()
        self._address, self._workers = check_executor(address), workers
        self._shared, self._folder = shared, folder
        self._here = LocalExecutor()
        self._here.contexts = self.contexts
        self._hands: list[_Hand] = []
        self._cargo: dict[str, Cargo] = {}
        self._sent: dict[str, Any] = {}
        self._told: set[str] = set()
        self._started = False
        self._ray: Any = imported_ray(f"--executor {address}")

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            connect(self._ray, self._address, self._workers)
            self._started = True
        if self._workers is None:
            local = self._address == RAY
            self._workers = available_cores() if local else sum(1 for node in self._ray.nodes() if node["Alive"])
        return self

    def __exit__(self, *unused: object) -> None:
        for hand in self._hands:
            self._end(hand.actor)
        self._hands.clear()
        self._sent.clear()
        if self._started:
            self._ray.shutdown()

    def map(
        self,
        jobs: Sequence[Job],
        *,
        keep: Callable[[Job, bytes], object],
        at_once: int = 1,
        scratch: Path | None = None,
    ) -> Generator[bytes]:
        """Do jobs on the workers; see `Executor.map`. None is at work when the iterator has ended."""
        bound = next((found for job in jobs if (found := residents(job))), ())
        if bound:
            self._tell(f"{jobs[0].kind}: done in this process, because {' and '.join(bound)} is in its memory.")
            yield from self._here.map(jobs, keep=keep, at_once=at_once, scratch=scratch)
        elif jobs:
            yield from self._shared_out(jobs, keep)

    def _shared_out(self, jobs: Sequence[Job], keep: Callable[[Job, bytes], object]) -> Generator[bytes]:
        waiting = deque(_units(jobs))
        busy: dict[Any, tuple[_Hand, _Unit]] = {}
        results: dict[int, bytes] = {}
        try:
            self._fill(min(len(waiting), self._workers or 1) - len(self._hands))
            for number in range(len(jobs)):
                while number not in results:
                    free = [hand for hand in self._hands if all(hand is not other for other, _ in busy.values())]
                    ahead = number + AHEAD * len(self._hands)
                    while free and waiting and waiting[0].numbers[0] < ahead:
                        unit, hand = waiting.popleft(), free.pop()
                        self._give(jobs, unit, hand, busy, waiting)
                    done, _ = self._ray.wait(list(busy), num_returns=1) if busy else ([], [])
                    for reference in done:
                        hand, unit = busy.pop(reference)
                        self._take(jobs, unit, hand, reference, (results, waiting, keep))
                        if unit.numbers and hand in self._hands and unit not in waiting:
                            self._give(jobs, unit, hand, busy, waiting)
                yield results.pop(number)
        except GeneratorExit:
            self._ray.wait(list(busy), num_returns=len(busy), timeout=LAST_JOBS_S) if busy else None
            raise
        finally:
            self._stop(busy)

    def _give(
        self, jobs: Sequence[Job], unit: _Unit, hand: _Hand, busy: dict[Any, tuple[_Hand, _Unit]], waiting: deque[_Unit]
    ) -> None:
        job = jobs[unit.numbers[0]]
        try:
            self._send_files(job, hand)
            busy[hand.actor.do.remote(job.to_bytes())] = hand, unit
        except self._ray.exceptions.RayActorError as error:
            self._lost(job, unit, hand, waiting, error)

    def _take(self, jobs: Sequence[Job], unit: _Unit, hand: _Hand, reference: Any, into: tuple[Any, Any, Any]) -> None:
        results, waiting, keep = into
        job = jobs[unit.numbers[0]]
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:  # the worker, its node, or the result is lost
            self._lost(job, unit, hand, waiting, error)
            return
        if isinstance(result, Refusal):
            kind = getattr(errors, result.kind, BitalloyError)
            raise (BitalloyError if kind is MissingExtraError else kind)(result.told)
        keep(job, result)
        results[unit.numbers.popleft()] = result
        unit.tries = 0

    def _lost(self, job: Job, unit: _Unit, hand: _Hand, waiting: deque[_Unit], error: Exception) -> None:
        unit.tries += 1
        self._end(hand.actor)
        self._hands.remove(hand)
        if unit.tries == TRIES:
            raise BitalloyError(
                f"Part {job.shard} of the stage '{job.kind}' lost its worker {TRIES} times, last on node {hand.node}: "
                f"{str(error).splitlines()[0]} The node may lack memory; see its logs of Ray. All other results are "
                "kept, and the same command goes on from here."
            ) from error
        self._tell(
            f"{job.kind}: the worker of part {job.shard} on node {hand.node} is lost; it is done again.", again=True
        )
        ordered = sorted((unit, *waiting), key=lambda unit: unit.numbers[0])  # the next result's part is always first
        waiting.clear()
        waiting.extend(ordered)
        self._fill(1, SETTLE_S)

    def _fill(self, count: int, settle_s: float = 0) -> None:
        """Start so many workers, as far as there are free processors for them; one at least where there is none.

        Args:
            count: how many.
            settle_s: seconds within which the processor of a lost worker may become free.
        """
        if count > 0 and not self._hands:
            self._hands += self._hired(1, PATIENCE_S)
            count -= 1
            if not self._hands:
                raise BitalloyError(
                    f"No worker started within {PATIENCE_S} s: of its CPUs, which are "
                    f"{self._ray.cluster_resources().get('CPU', 0):g}, Ray has none that is free. Add nodes, or wait."
                )
        end = time.monotonic() + settle_s
        while count > 0 and not (free := int(self._ray.available_resources().get("CPU", 0))):
            if time.monotonic() >= end:
                return
            time.sleep(0.1)
        if count > 0:
            self._hands += self._hired(min(count, free), SPARE_S)

    def _hired(self, count: int, patience_s: float) -> list[_Hand]:
        """Start workers side by side, and return those that started within some seconds.

        Processors that seem free may be those of a lost node.

        Raises:
            BitalloyError: one cannot start, or would give other bits.
        """
        local = self._address == RAY and self._started
        limit = memory_limit() // (self._workers or 1) if local else None
        kind = self._ray.remote(Worker).options(
            num_cpus=1, scheduling_strategy="SPREAD", max_restarts=0, runtime_env=threads_of_workers()
        )
        actors = [kind.remote(limit, str(self._folder) if self._folder else None) for _ in range(count)]
        known = {actor.facts.remote(): actor for actor in actors}
        ready, late = self._ray.wait(list(known), num_returns=count, timeout=patience_s)
        hands: list[_Hand] = []
        try:
            hands += (self._checked(known[reference], reference) for reference in ready)
        except BaseException:
            late = list(known)
            raise
        finally:
            for reference in late:
                self._end(known[reference])
        return hands

    def _checked(self, actor: Any, facts: Any) -> _Hand:
        """Return a worker that has started, whose node gives the same bits as this machine."""
        try:
            there, node, _ = self._ray.get(facts)
        except self._ray.exceptions.RayError as error:
            raise BitalloyError(
                f"A worker could not start: {str(error).splitlines()[-1]} Is bitalloy installed on every node?"
            ) from error
        found = differences(facts_here(), there)
        if found:
            raise BitalloyError(
                f"Node {node} would give other bits than this machine: {found}. Use nodes with the same packages, "
                "processor and number of cores as this machine."
            )
        return _Hand(actor, node)

    def _send_files(self, job: Job, hand: _Hand) -> None:
        for root in set(named_paths(msgspec.to_builtins(job.spec))) - hand.known:
            if not Path(root).exists():
                continue  # the job says it better
            cargo = self._cargo.get(root) or self._cargo.setdefault(root, load_cargo(root))
            missing = self._ray.get(hand.actor.lacking.remote(cargo, self._shared))
            if missing:
                places = {sha256: path for path, sha256 in cargo.files.items()}
                for sha256 in missing:
                    if sha256 not in self._sent:
                        self._sent[sha256] = self._ray.put(Path(places[sha256]).read_bytes())
                self._ray.get(hand.actor.bring.remote(cargo, [(sha256, self._sent[sha256]) for sha256 in missing]))
            hand.known.add(root)

    def _stop(self, busy: dict[Any, tuple[_Hand, _Unit]]) -> None:
        """End the workers that are at work, and let the others close what they have open."""
        ready, _ = self._ray.wait(list(busy), num_returns=len(busy), timeout=0) if busy else ([], [])
        for reference, (hand, _) in busy.items():
            if reference not in ready and hand in self._hands:
                self._end(hand.actor)
                self._hands.remove(hand)
        for hand in list(self._hands):
            try:
                self._ray.get(hand.actor.rest.remote())
            except self._ray.exceptions.RayError:  # lost while it had nothing to do
                self._hands.remove(hand)
        self._cargo.clear()

    def _end(self, actor: Any) -> None:
        with suppress(Exception):  # it has ended already
            self._ray.kill(actor)

    def _tell(self, text: str, *, again: bool = False) -> None:
        if again or text not in self._told:
            self._told.add(text)
            sys.stderr.write(f"{text}\n")


def _units(jobs: Sequence[Job]) -> Iterator[_Unit]:
    """Divide jobs: those of a group stay together, those of none go one by one."""
    for group, some in groupby(range(len(jobs)), key=lambda number: jobs[number].group):
        if group:
            yield _Unit(deque(some))
        else:
            yield from (_Unit(deque([number])) for number in some)
