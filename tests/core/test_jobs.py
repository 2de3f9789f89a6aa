"""Work as data: a job gives the same bytes in any process, and its result is stored as soon as it is there."""

from __future__ import annotations

import importlib
import inspect
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest

import bitalloy
from bitalloy.core.errors import BitalloyError, DataError, ModelError
from bitalloy.core.jobs import JOB_KINDS, Contexts, Job, LocalExecutor, Opening, perform, residents
from bitalloy.core.records import Record
from bitalloy.core.store import RunDirectory
from bitalloy.core.work import Silent, Workspace
from bitalloy.data.datasets import ArrayDataset
from bitalloy.rewrite.equalize import find_places, scale
from bitalloy.sensitivity.measuring import Selection, measure_exact
from bitalloy.tasks.evaluate import Evaluator
from bitalloy.tasks.metric import measure_metric

QUICK = bitalloy.Settings(samples=3, probes=2, calibration_samples=4, equalize=False, bias_correction=False)
ELSEWHERE = """
import pickle, sys
from bitalloy.core.jobs import Job, perform
jobs = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps([perform(Job.from_bytes(j) if isinstance(j, bytes) else j) for j in jobs]))
"""


class Recording(LocalExecutor):
    """Does jobs here, and remembers them with their results."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Job, bytes]] = []

    def map(
        self,
        jobs: Sequence[Job],
        *,
        keep: Callable[[Job, bytes], object],
        at_once: int = 1,
        scratch: Path | None = None,
    ) -> Generator[bytes]:
        def remember(job: Job, result: bytes) -> None:
            self.done.append((job, result))
            keep(job, result)

        yield from super().map(jobs, keep=remember, at_once=at_once, scratch=scratch)

    def of(self, kind: str) -> list[tuple[Job, bytes]]:
        """Jobs of a kind with their results, in the order of their shards."""
        return sorted(((j, r) for j, r in self.done if j.kind == kind), key=lambda pair: pair[0].shard)


def elsewhere(jobs: Sequence[Job | bytes]) -> list[bytes]:
    """Results of jobs in a process that has nothing but their bytes; each opens what it needs for itself."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=pickle.dumps(list(jobs)), capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return cast(list[bytes], pickle.loads(done.stdout))


def everything(inputs: Any, work: Workspace) -> list[object]:
    """All that is measured in jobs on a small detector."""
    model = bitalloy.load(inputs.detector)
    analysis = bitalloy.analyze(model, bitalloy.open_data(model, inputs.scenes, limit=12), QUICK, work=work)
    int8 = analysis.units.lowest_gated()
    some = Selection(units=tuple(sorted(int8)[:2]))
    exact = measure_exact(analysis, some, samples=3, work=work)
    metric = measure_metric(analysis, inputs.labels, some, limit=3, work=work)
    evaluator = Evaluator(analysis, [inputs.labels], 3, work)
    seen = evaluator.results({"float": evaluator.reference, "int8": evaluator.subject(int8)}, "evaluate", resamples=10)
    return [analysis.matrix.to_bytes(), analysis.calibration, analysis.table, exact, metric, seen]


@pytest.fixture(scope="module")
def recorded(inputs: Any) -> Recording:
    executor = Recording()
    everything(inputs, Workspace(executor=executor))
    return executor


@pytest.mark.parametrize("form", [lambda job: job, Job.to_bytes], ids=["pickled", "json"])
def test_another_process_gives_the_same_bytes(recorded: Recording, form: Callable[[Job], Job | bytes]) -> None:
    chosen = [recorded.of(kind)[-1] for kind in ("calibrate", "probe", "exact", "metric", "observed")]
    assert elsewhere([form(job) for job, _ in chosen]) == [result for _, result in chosen]
    assert all(residents(job) == () for job, _ in chosen)


def test_a_model_with_scaled_channels_is_opened_again(inputs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "feeds"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(4):
        np.savez(folder / f"{i}.npz", pixels=random.standard_normal((1, 24, 32, 3)).astype(np.float32))
    model = bitalloy.load(inputs.channels_last)
    (place,) = find_places(model)
    scaled = scale(scale(model, {place: [1, 0, 2, 0, -1, 0, 3, 0] * 16}), {place: [0, 1] * 64})
    executor = Recording()
    ready = bitalloy.calibrate(scaled, bitalloy.open_data(model, folder), QUICK, work=Workspace(executor=executor))
    measure_exact(ready, samples=1, work=Workspace(executor=executor))
    chosen = [executor.of("calibrate")[0], executor.of("exact")[0]]
    assert len(chosen[0][0].spec.graph.spec.factors) == 2
    assert elsewhere([job for job, _ in chosen]) == [result for _, result in chosen]


def test_what_is_in_memory_is_not_opened_again(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("graph", "files", "samples", "recipe", "labels"):
        monkeypatch.setitem(JOB_KINDS, kind, f"{__name__}:never")
    everything(inputs, Workspace(executor=Recording()))


def never(spec: Record, contexts: Contexts) -> object:
    raise AssertionError("this is open already")


def test_a_stopped_run_goes_on(inputs: Any, tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "run")
    expected = everything(inputs, Workspace(store))
    for stage in ("calibration", "probe", "evaluate"):
        (whole,) = (p for p in store.cache.glob(f"{stage}-*") if p.is_file())
        whole.unlink()
    lost = [next(iter(sorted(folder.iterdir()))) for folder in sorted(store.cache.glob("*.d"))]
    for file in lost:
        file.unlink()
    executor = Recording()
    assert everything(inputs, Workspace(RunDirectory(tmp_path / "run"), executor=executor)) == expected
    assert sorted(job.shard for job, _ in executor.done) == sorted(file.name for file in lost)


def test_changed_files_are_refused(inputs: Any, tmp_path: Path) -> None:
    model, scenes, labels = tmp_path / "model.onnx", tmp_path / "scenes" / "images", tmp_path / "scenes"
    shutil.copy(inputs.detector, model)
    shutil.copytree(inputs.labels.parent, labels)
    executor = Recording()
    work = Workspace(executor=executor)
    graph = bitalloy.load(model)
    analysis = bitalloy.analyze(graph, bitalloy.open_data(graph, scenes, limit=12), QUICK, work=work)
    evaluator = Evaluator(analysis, [labels / "instances.json"], 2, work)
    evaluator.results({"float": evaluator.reference}, "evaluate", resamples=0)
    (calibrate, ranges), (observed, _) = executor.of("calibrate")[0], executor.of("observed")[0]
    assert perform(calibrate) == ranges

    text = (labels / "instances.json").read_text()
    (labels / "instances.json").write_text(text.replace("square", "circus"))
    with pytest.raises(DataError, match=r"instances.json' has changed"):
        perform(observed)
    first, *others = sorted(scenes.iterdir())
    for image in others:
        shutil.copy(first, image)
    with pytest.raises(DataError, match=r"samples of 'images' have changed"):
        perform(calibrate)
    content = bytearray(model.read_bytes())
    at = content.rfind(graph.node[graph.nodes[0].name or ""].inputs[1].const_value.numpy().tobytes()[:16])  # type: ignore[union-attr]
    content[at] ^= 1
    model.write_bytes(content)
    with pytest.raises(ModelError, match=r"model.onnx' has changed"):
        perform(calibrate)
    model.unlink()
    with pytest.raises(ModelError, match="No model file"):
        perform(calibrate)


def test_samples_in_memory_bind_a_job_to_its_process(inputs: Any) -> None:
    model = bitalloy.load(inputs.two_inputs)
    random = np.random.default_rng(0)
    feeds = [{n: random.standard_normal((1, 16)).astype(np.float32) for n in ("left", "right")} for _ in range(4)]
    executor = Recording()
    bitalloy.calibrate(model, ArrayDataset(feeds, label="mine"), QUICK, work=Workspace(executor=executor))
    ((job, _),) = executor.of("calibrate")
    assert residents(job) == ("the data set 'mine'",)
    assert residents(Job.from_bytes(job.to_bytes())) == ("the data set 'mine'",)
    with pytest.raises(BitalloyError, match="only in the process that made it, because the data set 'mine'"):
        perform(job)


def test_probing_takes_no_more_results_than_it_needs(inputs: Any) -> None:
    model = bitalloy.load(inputs.classifier)
    images = bitalloy.open_data(model, inputs.images)
    data = ArrayDataset([images.feeds(i % len(images)) for i in range(36)])
    executor = Recording()
    settings = bitalloy.Settings(probes=2, calibration_samples=4, equalize=False, bias_correction=False)
    analysis = bitalloy.analyze(model, data, settings, work=Workspace(executor=executor))
    assert len(executor.of("probe")) == analysis.matrix.samples in (8, 12, 16)


# -- the machinery -----------------------------------------------------------------------------------


class Number(Record, frozen=True, kw_only=True):
    """Of a job in these tests."""

    value: int
    shared: Opening | None = None


class BrokenError(Exception):
    """What a job fails with here."""


def square(spec: Number, contexts: Contexts) -> bytes:
    if spec.value == 3:
        raise BrokenError
    offset = contexts.open(spec.shared).value if spec.shared else 0
    return str(spec.value**2 + offset).encode()


class Offset:
    """Something that is opened and closed."""

    log: ClassVar[list[str]] = []

    def __init__(self, value: int) -> None:
        self.value = value
        self.log.append(f"open {value}")

    def close(self) -> None:
        self.log.append(f"close {self.value}")


def offset(spec: Number, contexts: Contexts) -> Offset:
    return Offset(spec.value)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOB_KINDS, "square", f"{__name__}:square")
    monkeypatch.setitem(JOB_KINDS, "offset", f"{__name__}:offset")
    monkeypatch.setattr(Offset, "log", [])


def jobs_of(values: Sequence[int], *, groups: int = 1, shared: Opening | None = None) -> list[Job]:
    return [
        Job(
            kind="square",
            key="k" * 30,
            shard=str(value),
            spec=Number(value=value, shared=shared),
            group=str(i * groups // len(values)),
        )
        for i, value in enumerate(values)
    ]


def test_every_kind_of_work_is_a_function_of_a_record_and_contexts() -> None:
    for where in JOB_KINDS.values():
        module, _, name = where.partition(":")
        spec, contexts = inspect.signature(
            getattr(importlib.import_module(module), name), eval_str=True
        ).parameters.values()
        assert issubclass(spec.annotation, Record) and contexts.annotation is Contexts


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize(("at_once", "groups"), [(1, 1), (1, 3), (2, 5), (4, 1)])
def test_results_come_in_order(tmp_path: Path, at_once: int, groups: int) -> None:
    values = [9, 1, 8, 2, 7]
    jobs = jobs_of(values, groups=groups)
    store = RunDirectory(tmp_path / "run")
    store.put("square", "k" * 30, b"stored", "8")
    for expected in ([b"81", b"1", b"stored", b"4", b"49"],) * 2:
        assert list(Workspace(store).map(jobs, Silent(), at_once=at_once)) == expected
    assert list(Workspace().map(jobs, Silent(), at_once=at_once)) == [b"81", b"1", b"64", b"4", b"49"]


@pytest.mark.usefixtures("kinds")
def test_what_passes_is_closed_and_forgotten() -> None:
    contexts = Contexts()
    stays, goes = (Opening(kind="offset", spec=Number(value=value)) for value in (1, 2))
    first = contexts.open(stays)
    with contexts.passing():
        assert contexts.open(stays) is first
        contexts.keep(goes, contexts.open(goes))
    assert Offset.log == ["open 1", "open 2", "close 2"]
    assert contexts.find(goes) is None and contexts.find(stays) is first


@pytest.mark.usefixtures("kinds")
def test_each_result_is_stored_when_it_is_there(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "run")
    results = Workspace(store).map(jobs_of(range(6)), Silent())
    for value in range(3):
        assert next(results) == str(value**2).encode()
        assert store.has("square", "k" * 30, str(value))
    with pytest.raises(BrokenError):
        next(results)
    assert [store.has("square", "k" * 30, str(v)) for v in range(6)] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("kinds")
def test_a_group_that_fails_takes_nothing_from_those_beside_it(tmp_path: Path) -> None:
    store = RunDirectory(tmp_path / "run")
    with pytest.raises(BrokenError):
        list(Workspace(store).map(jobs_of([0, 1, 2, 3, 4, 5], groups=2), Silent(), at_once=2))
    assert [store.has("square", "k" * 30, str(v)) for v in range(6)] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("kinds")
def test_work_ends_where_no_more_results_are_taken() -> None:
    executor = Recording()
    results = Workspace(executor=executor).map(jobs_of([5, 6, 7]), Silent())
    assert next(results) == b"25"
    results.close()
    assert [job.shard for job, _ in executor.done] == ["5"]


@pytest.mark.usefixtures("kinds")
def test_what_a_group_opens_is_shared_and_closed_behind_it() -> None:
    shared = Opening(kind="offset", spec=Number(value=10))
    jobs = jobs_of([1, 2, 4, 5], groups=2, shared=shared)
    executor = LocalExecutor()
    assert list(Workspace(executor=executor).map(jobs, Silent())) == [b"11", b"14", b"26", b"35"]
    assert Offset.log == ["open 10", "close 10"] * 2
    other = Offset(20)
    with executor.contexts.holding((shared, other)):
        assert list(Workspace(executor=executor).map(jobs, Silent())) == [b"21", b"24", b"36", b"45"]
    assert Offset.log == ["open 10", "close 10"] * 2 + ["open 20"] and executor.contexts.find(shared) is None


@pytest.mark.usefixtures("kinds")
def test_progress_counts_what_is_stored_and_what_is_done(tmp_path: Path) -> None:
    class Counting(Silent):
        def __init__(self) -> None:
            self.steps, self._lock = 0, threading.Lock()

        def advance(self, steps: int = 1) -> None:
            with self._lock:
                self.steps += steps

    store = RunDirectory(tmp_path / "run")
    for _ in range(2):
        progress = Counting()
        list(Workspace(store).map(jobs_of([1, 2, 4], groups=3), progress, at_once=2))
        assert progress.steps == 3


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(BitalloyError, match="Unknown kind of work 'os:system'"):
        perform(Job(kind="os:system", key="", shard="", spec={"command": "true"}))
