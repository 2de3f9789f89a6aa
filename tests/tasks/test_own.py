"""Metrics of the user's own: what they are given, what their values become, and what decides that they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bitalloy
from bitalloy.core.errors import BudgetError, DataError
from bitalloy.core.plans import FIRST, Budget
from bitalloy.core.records import TensorSpec
from bitalloy.core.store import key_of
from bitalloy.tasks.own import Metric, OwnSession, as_metric, open_own
from bitalloy.tasks.own_code import code_digest
from bitalloy.verify.judging import limits_of

X = TensorSpec(name="x", dtype="FLOAT", shape=(2, 3))
SCALE = TensorSpec(name="scale", dtype="INT64", shape=())
Y, Z = TensorSpec(name="y", dtype="FLOAT", shape=(2, 3)), TensorSpec(name="z", dtype="FLOAT16", shape=(2,))


def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    assert feeds["x"].shape == (2, 3)
    return {"y": feeds["x"] * feeds["scale"], "z": feeds["x"].sum(1).astype(np.float16)}


SESSION = OwnSession(run, (X, SCALE), (Y, Z), {"x": "batch"})


def test_a_session_looks_like_one_of_onnx_runtime() -> None:
    assert [(i.name, i.shape, i.type) for i in SESSION.get_inputs()] == [
        ("x", ["batch", 3], "tensor(float)"), ("scale", [], "tensor(int64)"),
    ]  # fmt: skip
    assert [(o.name, o.type) for o in SESSION.get_outputs()] == [("y", "tensor(float)"), ("z", "tensor(float16)")]


def test_several_batches_run_one_after_the_other() -> None:
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    z, y = SESSION.run(["z", "y"], {"x": x, "scale": np.int64(2)})
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(z, x.sum(1))
    assert len(SESSION.run(None, {"x": x[:2], "scale": np.int64(1)})) == 2


@pytest.mark.parametrize(
    ("names", "x", "told"),
    [
        (["w"], np.zeros((2, 3)), "expected some of the outputs"),
        (None, np.zeros((3, 3)), r"shape \[3, 3\]; expected \[2, 3\]"),
        (None, np.zeros((2, 4)), r"expected \[2, 3\]"),
        (None, np.zeros((0, 3)), "one batch size above 0"),
    ],
)
def test_what_the_session_cannot_run_is_refused(names: Any, x: np.ndarray, told: str) -> None:
    with pytest.raises(DataError, match=told):
        SESSION.run(names, {"x": x, "scale": np.int64(1)})


def own(inputs: Any, metric: Metric, folder: Path, **how: Any) -> Any:
    return open_own(metric, bitalloy.load(inputs.two_inputs), folder, **how)


def labelled(count: int = 5) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        ({n: rng.standard_normal((1, 16)).astype(np.float32) for n in ("left", "right")}, np.array([i]))
        for i in range(count)
    ]


def error(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(abs(predictions - labels).mean())


def test_means_and_paired_drops_are_those_of_the_samples(inputs: Any, tmp_path: Path) -> None:
    data = own(inputs, Metric(error, labelled(), higher_is_better=False), tmp_path)
    guesses = {"float": np.arange(5.0), "worse": np.arange(5.0) + np.array([0, 0.5, 2, 0, 1])}
    models: dict[str, Callable[[Any], Any]] = {}
    seen: dict[str, list[Any]] = {name: [] for name in guesses}
    for sample in data.choose(None, 0):
        for name, guess in guesses.items():
            outputs = {data.outputs[0].name: np.array([[guess[sample]]])}
            models[name] = partial(lambda outputs, _: outputs, outputs)
        for name, one in data.task.observe(models, data, sample).items():
            seen[name].append(one)
    result = data.task.measure(seen, data, data.choose(None, 0), seed=0, resamples=2000)
    (metric,) = result.metrics
    assert (metric.name, metric.values["float"].value, metric.values["float"].n) == ("error", 0, 5)
    drop = metric.drops["worse"]
    assert metric.values["worse"].value == pytest.approx(0.7) and drop.value == pytest.approx(0.7)
    spread = np.std([0, 0.5, 2, 0, 1]) / np.sqrt(5)  # of a mean over samples
    assert drop.high - drop.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert not metric.against_float and metric.drop("worse") == pytest.approx(0.7)


def test_a_number_for_a_whole_model_has_no_interval(inputs: Any, tmp_path: Path) -> None:
    data = own(inputs, Metric(lambda session: {"f1": 0.5, "loss": 2}), tmp_path)
    seen = {name: [data.task.observe({"model": run}, data, 0)["model"]] for name in ("float", "other")}
    result = data.task.measure(seen, data, [0], seed=0)
    assert [(m.name, m.values["other"].value, m.values["other"].n, m.drops) for m in result.metrics] == [
        ("f1", 0.5, 0, {}), ("loss", 2.0, 0, {}),
    ]  # fmt: skip
    assert "unknown" in result.notes[0]
    metrics = {m.name: m for m in result.metrics}
    assert limits_of(Budget(max_drop={FIRST: 0.1, "loss": 1}), metrics) == {"f1": 0.1, "loss": 1}
    with pytest.raises(BudgetError, match="limits 'acc', but the metrics of the task are: f1, loss"):
        limits_of(Budget(max_drop={"acc": 0.1}), metrics)


@pytest.mark.parametrize("value", [np.nan, np.inf, "high", None, {}, {"a": np.nan}, np.zeros(3)])
def test_values_that_are_no_numbers_are_refused(inputs: Any, tmp_path: Path, value: object) -> None:
    function: Any = lambda session: value  # noqa: E731
    data = own(inputs, Metric(function, name="mine"), tmp_path)
    with pytest.raises(DataError, match="The metric 'mine' returned"):
        data.task.observe({"model": run}, data, 0)


def test_an_error_of_ones_own_function_names_the_metric(inputs: Any, tmp_path: Path) -> None:
    known: dict[str, float] = {}

    def mine(session: Any) -> float:
        return known["absent"]

    data = own(inputs, Metric(mine), tmp_path)
    with pytest.raises(DataError, match="The metric 'mine' fails with KeyError: 'absent'"):
        data.task.observe({"model": run}, data, 0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3, "evaluate is of type int"),
        (error, r"cannot be called with \(session\)"),
        (Metric(lambda session: 0.0, labels=[1]), r"cannot be called with \(predictions, labels\)"),
    ],
)
def test_what_is_no_metric_is_refused(given: object, told: str) -> None:
    with pytest.raises(DataError, match=told):
        as_metric(given)


def test_what_decides_the_values_decides_the_key(inputs: Any, tmp_path: Path) -> None:
    def key(metric: Metric) -> str:
        data = own(inputs, metric, tmp_path)
        samples = data.choose(None, 0)
        return key_of(data.inputs(samples, [file.name + str(file.parent) for file in data.images(samples)]))

    known = labelled()
    other_label, other_feeds = labelled(), labelled()
    other_label[2] = (other_label[2][0], np.array([7]))
    other_feeds[2][0]["left"][0, 0] += 1
    metrics = [
        Metric(error, known), Metric(error, other_label), Metric(error, other_feeds), Metric(error, labelled(4)),
        Metric(error, known, name="other"), Metric(error, known, higher_is_better=False),
        Metric(error, known, version="2"), Metric(lambda p, t: 0.0, known),
    ]  # fmt: skip
    assert key(Metric(error, labelled())) == key(metrics[0])
    assert len({key(metric) for metric in metrics}) == len(metrics)


def made(source: str, **known: object) -> Any:
    names: dict[str, Any] = dict(known)
    exec(source, names)
    return names["f"]


def test_code_without_a_file_is_told_by_what_it_does() -> None:
    first = code_digest(made("def f(s):\n    return 1.0"))
    assert first == code_digest(made("\n\ndef f(s):\n    return 1.0"))
    others = [
        made("def f(s):\n    return 2.0"),
        made("def f(s):\n    return s + 1.0"),
        made("def f(s, n=3):\n    return 1.0"),
        made("def f(s):\n    return [i for i in s]"),
        made("def f(s):\n    return [i + 1 for i in s]"),
        made("def outer(n):\n    def f(s):\n        return n\n    return f\nf = outer(3)"),
        made("def outer(n):\n    def f(s):\n        return n\n    return f\nf = outer(4)"),
        made("def f(s):\n    return X", X=np.zeros(3)),
        made("def f(s):\n    return X", X=np.ones(3)),
        made("def f(s):\n    return helper(s)", helper=made("def f(s):\n    return 1.0")),
        made("def f(s):\n    return helper(s)", helper=made("def f(s):\n    return 2.0")),
        made("def f(s):\n    return inner(s)", inner=made("def f(s):\n    return T", T=1.0)),
        made("def f(s):\n    return inner(s)", inner=made("def f(s):\n    return T", T=2.0)),
        made("def f(s):\n    return (lambda x: x > U)(s)", U=1.0),
        made("def f(s):\n    return (lambda x: x > U)(s)", U=2.0),
        made(
            "class M:\n    def __call__(s, x):\n        return s.g(x)\n    def g(s, x):\n        return x + 1\nf = M()"
        ),
        made(
            "class M:\n    def __call__(s, x):\n        return s.g(x)\n    def g(s, x):\n        return x - 1\nf = M()"
        ),
        made("def f(s):\n    return loader(s)", loader=SimpleNamespace(_fingerprint="a")),
        made("def f(s):\n    return loader(s)", loader=SimpleNamespace(_fingerprint="b")),
    ]
    assert len({first, *map(code_digest, others)}) == 1 + len(others)


def test_files_arguments_and_objects_count(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"

    def written(text: str) -> str:
        path.write_text(text)
        names: dict[str, Any] = {}
        exec(compile(text, str(path), "exec"), names)
        return code_digest(names["f"])

    one = written("LIMIT = 1\ndef f(s):\n    return LIMIT")
    assert written("LIMIT = 1\ndef f(s):\n    return LIMIT") == one
    assert written("LIMIT = 2\ndef f(s):\n    return LIMIT") != one

    class Mine:
        def __init__(self, top: int) -> None:
            self.top = top

        def __call__(self, session: object) -> float:
            return self.top

    assert code_digest(Mine(1)) == code_digest(Mine(1)) != code_digest(Mine(5))
    assert code_digest(partial(np.add, 1)) != code_digest(partial(np.add, 2))
