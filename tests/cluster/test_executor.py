"""A cluster of two nodes gives the bytes of one process, whatever is lost on the way.

All that needs the cluster is one test, as several processes of tests would each start one.
"""

from __future__ import annotations

import faulthandler
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cluster.deadly import Task, alone
from tests.conftest import Inside

import bitalloy
from bitalloy.core.effort import EFFORTS
from bitalloy.core.errors import BitalloyError
from bitalloy.core.jobs import Job, Opening, Resident
from bitalloy.core.store import RunDirectory
from bitalloy.core.work import Silent, Workspace
from bitalloy.pipeline.prepare import RunOptions
from bitalloy.pipeline.sensitivity import SensitivityQuestion, sensitivity
from bitalloy.runtime.cluster.executor import RayExecutor, check_executor
from bitalloy.runtime.cluster.there import call_there
from bitalloy.runtime.cluster.worker import THREADS_OF_PRODUCTS, Facts, differences, facts_here
from bitalloy.sensitivity.measuring import Selection

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
QUICK = bitalloy.Settings(samples=2, probes=1, calibration_samples=4, equalize=False, bias_correction=False)
QUICKLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""How soon a cluster sees that a node is lost."""
BOUND_S = 120
"""Seconds after which what a cluster does is taken for a hang."""


@contextmanager
def bounded() -> Iterator[None]:
    """End this process where what is in the block hangs, as it may where no signal of Python's is heard."""
    faulthandler.dump_traceback_later(BOUND_S, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def two_nodes(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    for name in THREADS_OF_PRODUCTS:  # of which Ray makes 1 for workers, as on any cluster that was started by hand
        patch.delenv(name, raising=False)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bounded():
            found = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": QUICKLY},
            )
        try:
            with bounded():
                found.add_node(num_cpus=1, resources={"target": 1, "two": 2})
                ray.init(
                    address=found.address,
                    log_to_driver=False,
                    runtime_env={"worker_process_setup_hook": "tests.cluster.deadly.learn"},
                )
            yield found
        finally:
            with bounded():
                ray.shutdown()
                found.shutdown()


def stored(folder: Path) -> dict[str, bytes]:
    """Return the results of a run directory and the files that people read."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def tables(inputs: Any, out: Path, open_executors: Sequence[Any] = (nullcontext, nullcontext)) -> dict[str, bytes]:
    """Predict and measure sensitivities of a small detector, each with an executor; return all that is stored."""
    exact = SensitivityQuestion(exact=True, selection=Selection(regions=("*",)))
    for asked, opened in zip((SensitivityQuestion(), exact), open_executors, strict=True):
        with opened() as executor:
            options = RunOptions(executor=executor, progress=Silent())
            sensitivity(inputs.detector, out=out, data=inputs.scenes, settings=QUICK, question=asked, options=options)
    return stored(out)


def study_cells(address: str, place: Path, inputs: Any, inside: Inside) -> None:
    """A study shares out the samples of its runs, with the bytes that a run in this process stores."""
    file = place / "study.toml"
    file.write_text(
        f'''
        targets = ["ort-cpu"]
        [[model]]
        name = "small"
        model = "{inputs.classifier}"
        data = "{inputs.images}"
        '''
    )
    done = inside("study", file, "--out", place / "out", "--executor", address, "--workers", 2).succeeded()
    assert "done in this process" not in done.err
    settings = bitalloy.Settings(probes=EFFORTS["quick"].probes)
    sensitivity(inputs.classifier, out=place / "local", data=inputs.images, settings=settings)
    found, known = (
        {name: data for name, data in stored(folder).items() if name.startswith(("cache/probe-", "cache/calibration-"))}
        for folder in (place / "out" / "work" / "small" / "usual", place / "local")
    )
    assert found.items() >= known.items()
    assert any(name.count("/") == 2 for name in known)  # parts of a stage, each the result of a job


def on_the_target(address: str, place: Path, node: str, inside: Inside) -> None:
    """A call holds a node that carries the resource, and a command shows here what it shows there."""
    told: list[str] = []
    call = partial(call_there, address, "target", alone, [str(place)], watch=lambda: None, tell=told.append)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: call(), range(3))) == [node] * 3
    for resource, text in (("absent", "None of the 2 nodes of the cluster carries 'absent'"), ("two", "carries 2 of")):
        with pytest.raises(BitalloyError, match=text):
            call_there(address, resource, alone, [str(place)], watch=lambda: None, tell=told.append)
    where = ("--executor", address, "--measure-on", "target", "--out", place / "run")
    message = inside("run", "yolo11n-shapes", "--data", place / "nothing", *where).refused()
    assert f"'{place / 'nothing'}' does not exist" in message
    assert not list(place.rglob("scratch-*"))


def tasks(notes: Path, values: Sequence[int], **more: Any) -> list[Job]:
    notes.mkdir(exist_ok=True)
    return [Job(kind="task", key="k" * 30, shard=str(v), spec=Task(notes=str(notes), value=v, **more)) for v in values]


def test_two_nodes(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], inside: Inside
) -> None:
    cases = (same_bytes, study_cells, on_the_target, killed_worker, deadly_job, left_early, lost_node)
    places = {case: tmp_path / case.__name__ for case in cases}
    monkeypatch.setattr("bitalloy.runtime.cluster.executor.PATIENCE_S", 40)
    monkeypatch.setattr("bitalloy.runtime.cluster.executor.SPARE_S", 10)
    expected = tables(inputs, tmp_path / "local")
    with two_nodes(monkeypatch) as cluster:
        address = "ray://" + cluster.address
        for place in places.values():
            place.mkdir()
        with bounded():
            same_bytes(address, places[same_bytes], inputs, expected)
        with bounded():
            study_cells(address, places[study_cells], inputs, inside)
        with bounded():
            on_the_target(address, places[on_the_target], next(iter(cluster.worker_nodes)).node_id, inside)
        with bounded(), RayExecutor(address) as executor:
            for case in (left_early, killed_worker, deadly_job):
                case(executor, places[case])
            users_error(executor, inputs.detector)
            capsys.readouterr()
            in_memory(executor)
            said = capsys.readouterr().err
            assert "calibrate: done in this process, because the data set 'mine' is in its memory." in said
        with bounded():
            lost_node(cluster, places[lost_node])


def same_bytes(address: str, place: Path, inputs: Any, expected: dict[str, bytes]) -> None:
    """Files that lie where they are read do not travel, others do; the results are those of this process."""
    read, sent = place / "read", place / "sent"
    reads, sends = (
        partial(RayExecutor, address, shared=shared, folder=folder) for shared, folder in ((True, read), (False, sent))
    )
    assert tables(inputs, place / "run", (reads, sends)) == expected
    assert not list((read / "contents").glob("*"))
    assert list((sent / "contents").glob("*"))
    assert ray.is_initialized()  # a cluster that ran before is left as it is


def killed_worker(executor: RayExecutor, place: Path) -> None:
    """A worker that is killed costs its part alone, which another one does."""
    values, notes = list(range(6)), place / "notes"
    jobs = [*tasks(notes, [0, 1]), *tasks(notes, [2], deaths=1), *tasks(notes, [3, 4, 5])]
    found = list(Workspace(RunDirectory(place / "run"), Silent(), executor=executor).map(jobs, Silent()))
    assert found == [str(v**2).encode() for v in values]
    assert len({file.name.split("-")[2] for file in notes.glob("2-*")}) == len(list(notes.glob("2-*"))) == 2


def deadly_job(executor: RayExecutor, place: Path) -> None:
    """A job that always kills its worker is named; what is done before it is kept."""
    jobs = [*tasks(place / "notes", [1]), *tasks(place / "notes", [7], deaths=99)]
    store = RunDirectory(place / "run")
    with pytest.raises(BitalloyError, match=r"Part 7 of the stage 'task' lost its worker 3 times, last on node"):
        list(Workspace(store, Silent(), executor=executor).map(jobs, Silent()))
    assert len(list((place / "notes").glob("7-*"))) == 3
    assert store.get("task", "k" * 30, "1") == b"1"


def left_early(executor: RayExecutor, place: Path) -> None:
    """Nothing is at work when no more results are taken."""
    notes = place / "notes"
    results = executor.map(tasks(notes, range(40), wait_s=0.1), keep=lambda job, result: None)
    assert next(results) == b"0"
    results.close()
    begun = len(list(notes.iterdir()))
    time.sleep(0.5)
    assert len(list(notes.iterdir())) == begun < 40


def users_error(executor: RayExecutor, model: Path) -> None:
    """An error of the user's is told as it is."""
    origin: dict[str, Any] = {"path": "/nowhere", "inputs": [], "image": None, "limit": None, "seed": 0}
    info = {"name": "x", "count": 1, "seed": 0, "sha256": "0" * 64, "preprocessing": ""}
    data = {"kind": "samples", "spec": {"origin": {"kind": "files", "spec": origin}, "info": info}}
    graph = {"kind": "graph", "spec": {"path": str(model), "shapes": {}, "sha256": "0" * 64}}
    spec = {"graph": graph, "data": data, "tensors": [], "masked": [], "samples": [0]}
    with pytest.raises(BitalloyError, match=r"has changed since this job was made|does not exist"):
        list(executor.map([Job(kind="calibrate", key="k" * 30, shard="0", spec=spec)], keep=lambda job, result: None))


def in_memory(executor: RayExecutor) -> None:
    """What needs this process's memory is done here."""
    resident = Opening(kind="resident", spec=Resident(what="the data set 'mine'", key="1"))
    spec = {"graph": resident, "data": resident, "tensors": [], "masked": [], "samples": [0]}
    with pytest.raises(BitalloyError, match="only in the process"):
        list(executor.map([Job(kind="calibrate", key="k" * 30, shard="0", spec=spec)], keep=lambda job, result: None))


def lost_node(cluster: Any, place: Path) -> None:
    """A node that is lost costs the parts that were there: the other one does them."""
    notes = place / "notes"
    node = next(iter(cluster.worker_nodes))
    with RayExecutor("ray://" + cluster.address) as executor:
        results = executor.map(tasks(notes, range(60), wait_s=0.3), keep=lambda job, result: None)
        found = [next(results)]
        while len({file.name.split("-")[2] for file in notes.iterdir()}) < 2:  # both nodes are at work
            found.append(next(results))
        cluster.remove_node(node, allow_graceful=False)
        found += results
    assert found == [str(v**2).encode() for v in range(60)]
    tries = [file.name.split("-")[0] for file in notes.iterdir()]
    assert len(tries) > len(set(tries)) == 60


def test_machines_of_other_bits_are_told_apart() -> None:
    packages = {"numpy": "2.1", "onnx": "1.17"}
    mine = Facts(versions=packages, features=("avx2", "avx512_vnni"), threads=8, products="1")
    other = Facts(versions={**packages, "numpy": "2.2"}, features=("avx2",), threads=4, products="1")
    assert differences(mine, mine) == ""
    assert differences(mine, other) == (
        "numpy 2.1 here and 2.2 there; the processor here has avx512_vnni; 8 cores here and 4 there"
    )


def test_other_products_of_matrices_are_told_apart() -> None:
    mine = facts_here()
    assert differences(mine, facts_here()) == ""
    assert "a product of matrices has other bits" in differences(mine, msgspec.structs.replace(mine, products="other"))


def test_unknown_executors_are_refused() -> None:
    for wrong in ("slurm", "ray://", ""):
        with pytest.raises(BitalloyError, match=r"expected local, ray or ray://HOST:PORT"):
            check_executor(wrong)


def test_a_study_refuses_an_executor_that_there_is_not(inside: Inside) -> None:
    assert "expected local, ray or ray://HOST:PORT" in inside("study", "--executor", "slurm").refused()
    assert "--workers needs --executor ray" in inside("study", "--workers", 2).refused()
