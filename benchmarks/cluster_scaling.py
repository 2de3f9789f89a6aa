"""What sharing out the work of `bitalloy sensitivity` costs, and what it would gain on many nodes.

An embedded model is analysed in this process and with 1, 2, 3 and 4 workers of Ray on this machine. Each worker uses
all cores, as the number of threads decides bits: on one machine more workers gain nothing, and what is measured is the
overhead. From the jobs that this process does come the constants of a model of cost:

    T(w) = serial + a + b min(w, jobs, 2) + sum over stages (open + ceil(jobs / w) cost)

`serial` is what only the process itself does, `open` what a worker does before the first job of a stage, `cost` one
job. `a` and `b` are fitted to the runs with workers: T_ray(w) - T_local = a + b w. The runs share one machine, so `b`
holds the start of a worker while others use the cores, which is more than on a node of its own. On paper there are w
nodes like this one, and workers start in two steps: the first, then all others side by side. With `--shard` there is no
Ray (a = b = 0), and measurements of one sample are on several nodes too; a part and the merge are two starts of a
process. Both are told for many times the samples as well, since an embedded model on few samples is done before a
cluster has started.

    python benchmarks/cluster_scaling.py
    python benchmarks/cluster_scaling.py --samples 2 --calibration 4 --probes 1 --workers 1 --units '*/cv1/*'    a look

Needs `pip install 'bitalloy[ray]'` and a quiet machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from bitalloy import Settings
from bitalloy.core.jobs import Executor, Job, LocalExecutor
from bitalloy.core.work import Silent
from bitalloy.pipeline.prepare import RunOptions
from bitalloy.pipeline.sensitivity import SensitivityQuestion, sensitivity
from bitalloy.runtime.cluster.executor import RAY, RayExecutor
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.measuring import Selection

NODES = (1, 2, 4, 8, 16, 32, 64, 100)
START_STEPS = 2
"""Steps in which workers on nodes of their own start."""


@dataclass
class Stage:
    """The jobs of a kind, as this process did them."""

    seconds: list[float] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)

    @property
    def jobs(self) -> int:
        return len(self.seconds)

    @property
    def cost(self) -> float:
        """Seconds of a job that finds everything open."""
        return float(np.mean(self.seconds[1:] or self.seconds))

    @property
    def open(self) -> float:
        """Seconds that the first job needs beyond that."""
        return max(0.0, self.seconds[0] - self.cost)

    def pieces(self, *, split: bool) -> int:
        """What may be done at different places: groups of jobs, or each job where groups are split."""
        return self.jobs if split else len(self.groups)

    def on(self, nodes: int, pieces: int, times: int) -> float:
        """Seconds on some nodes, where there are `times` as many pieces, each done at one place."""
        each = math.ceil(self.jobs / pieces)
        return self.open + math.ceil(pieces * times / nodes) * each * self.cost


class Timed(LocalExecutor):
    """Does jobs here, one after the other, and takes their times."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, Stage] = {}

    def map(
        self,
        jobs: Sequence[Job],
        *,
        keep: Callable[[Job, bytes], object],
        at_once: int = 1,
        scratch: Path | None = None,
    ) -> Generator[bytes]:
        """See `Executor.map`; at once is done what one job does with all cores."""
        last = time.perf_counter()

        def timed(job: Job, result: bytes) -> None:
            nonlocal last
            stage = self.stages.setdefault(job.kind, Stage())
            stage.seconds.append(time.perf_counter() - last)
            stage.groups.add(job.group or job.shard)
            keep(job, result)
            last = time.perf_counter()

        yield from super().map(jobs, keep=timed, scratch=scratch)


def seconds_of(options: argparse.Namespace, question: SensitivityQuestion, executor: Executor | None) -> float:
    """Time `sensitivity` in a new run directory."""
    settings = Settings(samples=options.samples, calibration_samples=options.calibration, probes=options.probes)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        opened = RunOptions(progress=Silent(), executor=executor)
        sensitivity(options.model, out=Path(folder) / "run", settings=settings, question=question, options=opened)
        return time.perf_counter() - start


def start_of_a_process() -> float:
    """Time how long a process takes until it can work."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import bitalloy.pipeline.sensitivity"], check=True)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Costs:
    """The model of cost of one question."""

    serial: float
    stages: Sequence[Stage]
    a: float
    b: float
    split: bool

    def on(self, nodes: int, times: int) -> float:
        """Return the seconds on some nodes, for `times` as many samples as were measured."""
        pieces = [stage.pieces(split=self.split) for stage in self.stages]
        each = [stage.on(nodes, count, times) for stage, count in zip(self.stages, pieces, strict=True)]
        return self.serial + self.a + self.b * min(nodes, max(pieces) * times, START_STEPS) + sum(each)


def main() -> None:
    """Run with and without workers, fit the constants, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n-shapes")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--units", action="append", help="units of exact measurement, as of --units; all by default")
    parser.add_argument("--times", type=int, default=100, help="how many times the samples there are on paper, too")
    parser.add_argument("--workers", type=int, default=4, help="largest number of workers")
    options = parser.parse_args()
    console = Console(stderr=True)
    probe = SensitivityQuestion()
    exact = SensitivityQuestion(exact=True, selection=Selection(units=tuple(options.units or ())))

    seconds_of(options, probe, None)  # reads files and imports, which later runs find done
    local, measured = Timed(), Timed()
    whole, whole_exact = seconds_of(options, probe, local), seconds_of(options, exact, measured)
    serial = {
        name: total - sum(sum(stage.seconds) for stage in timed.stages.values())
        for name, total, timed in (("probe", whole, local), ("exact", whole_exact, measured))
    }
    console.print(f"here: {whole:.1f} s, of which jobs {whole - serial['probe']:.1f} s; exact {whole_exact:.1f} s")
    seconds = {}
    for workers in range(1, options.workers + 1):
        start = time.perf_counter()
        with RayExecutor(RAY, workers) as executor:
            begun = time.perf_counter() - start
            seconds[workers] = begun + seconds_of(options, probe, executor)
        console.print(f"{workers} workers: {seconds[workers]:.1f} s, of which Ray starts for {begun:.1f} s")
    counts = np.array(list(seconds))
    over = np.array(list(seconds.values())) - whole
    b, a = np.polyfit(counts, over, 1) if len(counts) > 1 else (0.0, float(over[0]))
    start = start_of_a_process()
    paper: dict[str, dict[int, float]] = {}
    for name, timed in (("probe", local), ("exact", measured)):
        stages = list(timed.stages.values())
        ray = Costs(serial[name], stages, float(a), float(b), split=False)
        parts = Costs(serial[name] + 2 * start, stages, 0.0, 0.0, split=True)
        for times in (1, options.times):
            samples = "" if times == 1 else f", {times} x the samples"
            paper[f"{name} with Ray{samples}"] = {n: ray.on(n, times) for n in NODES}
            paper[f"{name} in parts{samples}"] = {n: parts.on(n, times) for n in NODES}
    for name, row in paper.items():
        console.print(f"{name}: " + ", ".join(f"{n} nodes {s:.1f} s" for n, s in row.items()))
    result = {
        "benchmark": "cluster_scaling",
        "model": options.model,
        "cores": available_cores(),
        "samples": options.samples,
        "calibration_samples": options.calibration,
        "probes": options.probes,
        "seconds_here": round(whole, 2),
        "seconds_by_workers": {n: round(s, 2) for n, s in seconds.items()},
        "a": round(float(a), 2),
        "b": round(float(b), 2),
        "largest_residual": round(float(np.abs(over - (a + b * counts)).max()), 2),
        "start": round(start, 2),
        "serial": {name: round(s, 2) for name, s in serial.items()},
        "stages": {
            f"{name}: {kind}": {
                "jobs": stage.jobs,
                "groups": len(stage.groups),
                "open": round(stage.open, 4),
                "cost": round(stage.cost, 4),
            }
            for name, timed in (("probe", local), ("exact", measured))
            for kind, stage in timed.stages.items()
        },
        "on_paper": {name: {n: round(s, 2) for n, s in row.items()} for name, row in paper.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
