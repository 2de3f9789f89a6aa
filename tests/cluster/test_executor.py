"""A cluster of two nodes gives the bytes of one process, whatever is lost on the way."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.deadly import Task

import bitalloy
from bitalloy.cluster.executor import RayExecutor, check_executor
from bitalloy.cluster.worker import Facts, differences
from bitalloy.core.errors import BitalloyError
from bitalloy.core.jobs import Job, Opening, Resident
from bitalloy.core.store import RunDirectory
from bitalloy.core.work import Silent, Workspace
from bitalloy.pipeline.prepare import RunOptions
from bitalloy.pipeline.sensitivity import SensitivityQuestion, sensitivity
from bitalloy.sensitivity.measuring import Selection

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
QUICK = bitalloy.Settings(samples=4, probes=2, calibration_samples=20, equalize=False, bias_correction=False)
QUICKLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""How soon a cluster sees that a node is lost."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    former = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": QUICKLY}
        )
        found.add_node(num_cpus=1)
        ray.init(
            address=found.address,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "tests.cluster.deadly.learn"},
        )
        yield found
        ray.shutdown()
        found.shutdown()
    os.environ.clear()
    os.environ.update(former)


def stored(folder: Path) -> dict[str, bytes]:
    """Return the results of a run directory and the files that people read."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def tables(inputs: Any, out: Path, executor: Any = None) -> dict[str, bytes]:
    """Predict and measure sensitivities of a small detector, and return all that is stored."""
    options = RunOptions(executor=executor, progress=Silent())
    exact = SensitivityQuestion(exact=True, selection=Selection(regions=("*",)))
    for asked in (SensitivityQuestion(), exact):
        sensitivity(inputs.detector, out=out, data=inputs.scenes, settings=QUICK, question=asked, options=options)
    return stored(out)


def tasks(notes: Path, values: Sequence[int], **more: Any) -> list[Job]:
    notes.mkdir(exist_ok=True)
    return [Job(kind="task", key="k" * 30, shard=str(v), spec=Task(notes=str(notes), value=v, **more)) for v in values]


@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_store_the_same_bytes(cluster: Any, inputs: Any, tmp_path: Path, shared: bool) -> None:
    expected = tables(inputs, tmp_path / "local")
    with RayExecutor("ray://" + cluster.address, shared=shared, folder=tmp_path / "files") as executor:
        assert tables(inputs, tmp_path / "ray", executor) == expected
    travelled = list((tmp_path / "files" / "contents").glob("*"))
    assert bool(travelled) != shared
    assert ray.is_initialized()  # a cluster that ran before is left as it is


def test_a_killed_worker_costs_its_part(cluster: Any, tmp_path: Path) -> None:
    values, notes = list(range(6)), tmp_path / "notes"
    jobs = [*tasks(notes, [0, 1]), *tasks(notes, [2], deaths=1), *tasks(notes, [3, 4, 5])]
    store = RunDirectory(tmp_path / "run")
    with RayExecutor("ray://" + cluster.address) as executor:
        found = list(Workspace(store, Silent(), executor=executor).map(jobs, Silent()))
    assert found == [str(v**2).encode() for v in values]
    assert len(list(notes.glob("2-*"))) == 2
    assert len({file.name.split("-")[2] for file in notes.glob("2-*")}) == 2


def test_a_job_that_always_kills_its_worker_is_named(cluster: Any, tmp_path: Path) -> None:
    jobs = [*tasks(tmp_path / "notes", [1]), *tasks(tmp_path / "notes", [7], deaths=99)]
    store = RunDirectory(tmp_path / "run")
    with (
        RayExecutor("ray://" + cluster.address) as executor,
        pytest.raises(BitalloyError, match=r"Part 7 of the stage 'task' lost its worker 3 times, last on node"),
    ):
        list(Workspace(store, Silent(), executor=executor).map(jobs, Silent()))
    assert len(list((tmp_path / "notes").glob("7-*"))) == 3
    assert store.get("task", "k" * 30, "1") == b"1"


def test_an_error_of_the_users_is_not_tried_again(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    spec = {
        "origin": {
            "kind": "files",
            "spec": {"path": "/nowhere", "inputs": [], "image": None, "limit": None, "seed": 0},
        },
        "info": {"name": "x", "count": 1, "seed": 0, "sha256": "0" * 64, "preprocessing": ""},
    }
    graph = {"kind": "graph", "spec": {"path": str(inputs.detector), "shapes": {}, "sha256": "0" * 64}}
    whole = {"graph": graph, "data": {"kind": "samples", "spec": spec}, "tensors": [], "masked": [], "samples": [0]}
    job = Job(kind="calibrate", key="k" * 30, shard="0", spec=whole)
    with (
        RayExecutor("ray://" + cluster.address) as executor,
        pytest.raises(BitalloyError, match=r"has changed since this job was made|does not exist"),
    ):
        list(executor.map([job], keep=lambda job, result: None))


def test_what_is_in_memory_is_done_here(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    resident = Opening(kind="resident", spec=Resident(what="the data set 'mine'", key="1"))
    job = Job(kind="calibrate", key="k" * 30, shard="0", spec={"graph": resident, "data": resident, "tensors": [],
              "masked": [], "samples": [0]})  # fmt: skip
    with RayExecutor("ray://" + cluster.address) as executor, pytest.raises(BitalloyError, match="only in the process"):
        list(executor.map([job], keep=lambda job, result: None))
    assert "calibrate: done in this process, because the data set 'mine' is in its memory." in capsys.readouterr().err


def test_nothing_is_at_work_when_no_more_is_taken(cluster: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with RayExecutor("ray://" + cluster.address) as executor:
        results = executor.map(tasks(notes, range(40), wait_s=0.1), keep=lambda job, result: None)
        assert next(results) == b"0"
        results.close()
        begun = len(list(notes.iterdir()))
        time.sleep(0.5)
        assert len(list(notes.iterdir())) == begun < 40


def test_a_lost_node_costs_its_part(cluster: Any, inputs: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    node = cluster.add_node(num_cpus=1)
    with RayExecutor("ray://" + cluster.address, workers=3) as executor:
        results = executor.map(tasks(notes, range(12), wait_s=0.3), keep=lambda job, result: None)
        found = [next(results)]
        cluster.remove_node(node, allow_graceful=False)
        found += results
    assert found == [str(v**2).encode() for v in range(12)]


def test_machines_of_other_bits_are_told_apart() -> None:
    mine = Facts(versions={"numpy": "2.1", "onnx": "1.17"}, features=("avx2", "avx512_vnni"), threads=8)
    other = Facts(versions={"numpy": "2.2", "onnx": "1.17"}, features=("avx2",), threads=4)
    assert differences(mine, mine) == ""
    assert differences(mine, other) == (
        "numpy 2.1 here and 2.2 there; the processor here has avx512_vnni; 8 cores here and 4 there"
    )


def test_unknown_executors_are_refused() -> None:
    for wrong in ("slurm", "ray://", ""):
        with pytest.raises(BitalloyError, match=r"expected local, ray or ray://HOST:PORT"):
            check_executor(wrong)
