"""Runs on a model, data and a metric that live in memory or in a module of the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tests.conftest import QUICK, Network

import bitalloy
from bitalloy.core.effort import EFFORTS
from bitalloy.core.status import Verdict
from bitalloy.pipeline.prepare import prepare

SETTINGS = bitalloy.Settings(samples=4, probes=2, calibration_samples=16)
OPTIONS = bitalloy.RunOptions(effort=EFFORTS["quick"])
COUNT = 120


def network() -> onnx.ModelProto:
    net = Network(5)
    x = net.op("Relu", net.gemm("x", 16, 512))
    proto = net.model({"x": (1, 16)}, {net.gemm(net.op("Relu", net.gemm(x, 512, 256)), 256, 4): (1, 4)})
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    return proto


def rows() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((COUNT, 16)).astype(np.float32)


def answers(model: bytes, x: np.ndarray) -> np.ndarray:
    """What a model answers on one row after the other, by ONNX Runtime alone; ranges taken at run time see one row."""
    session = onnxruntime.InferenceSession(model)
    return np.array([np.asarray(session.run(None, {"x": row[None]})[0]).argmax() for row in x])


def batches(labels: np.ndarray, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    x = rows()
    for at in range(start, COUNT, 25):
        yield x[at : at + 25], labels[at : at + 25]


def share(predictions: np.ndarray, labels: np.ndarray) -> float:
    assert predictions.shape == (1, 4) and labels.shape == (1,)
    return float((predictions.argmax(1) == labels).mean())


def test_a_metric_of_samples_is_judged_like_a_built_in_one(tmp_path: Path) -> None:
    proto = network()
    labels = answers(proto.SerializeToString(), rows())
    budget = bitalloy.Budget(max_drop={"share": 0.2})
    own = bitalloy.Metric(share, batches(labels, 50))

    def go(data: object, metric: object) -> Any:
        return bitalloy.run(
            proto, data=data, evaluate=metric, out=tmp_path, budget=budget, settings=SETTINGS, options=OPTIONS
        )

    found = go(batches(labels), own)
    measured = found.summary.metrics["share"]
    assert (measured.reference.value, measured.reference.n) == (1.0, 70)
    mixed = answers((tmp_path / "mixed.onnx").read_bytes(), rows()[50:])
    assert measured.mixed.value == pytest.approx((mixed == labels[50:]).mean())
    drop = measured.drop_mixed  # which plan ships depends on timing: one may lose nothing
    assert drop is not None and drop.low <= drop.value <= drop.high < 0.2
    (limit,) = found.status.limits
    assert limit.metric == "share" and limit.verdict == Verdict.MET
    assert found.summary.resolution == () and not measured.against_float
    # the files side by side give the same numbers
    given = found.analysis.given.source
    (beside,) = bitalloy.evaluate([given, tmp_path / "mixed.onnx"], bitalloy.Metric(share, batches(labels, 50)))
    (metric,) = beside.metrics
    assert metric.values[str(tmp_path / "mixed.onnx")].value == measured.mixed.value
    assert metric.drops == {str(tmp_path / "mixed.onnx"): measured.drop_mixed}
    # the analysis keeps off what is evaluated as long as there is something else
    unseen = np.concatenate([found.analysis.data.feeds(i)["x"] for i in found.analysis.parts.calibration[:16]])
    known = {row.tobytes() for row in rows()[50:]}
    assert not any(row.tobytes() in known for row in unseen)
    # the same numbers from another source are the same samples: nothing is measured again
    again = go(list(rows()), bitalloy.Metric(share, list(zip(rows()[50:], labels[50:], strict=True))))
    assert set(again.summary.seconds.values()) == {0.0}
    assert again.summary.metrics == found.summary.metrics


def test_a_number_for_a_whole_model_leaves_its_limit_undecided(tmp_path: Path) -> None:
    proto = network()
    x = rows()
    labels = answers(proto.SerializeToString(), x)

    def evaluate(session: bitalloy.OwnSession) -> dict[str, float]:
        (name,) = (entry.name for entry in session.get_inputs())
        guesses = session.run(None, {name: x})[0].argmax(1)
        return {"right": float((guesses == labels).mean()), "classes": len(set(guesses.tolist()))}

    found = bitalloy.run(
        ir.from_proto(proto),
        data={"x": x},
        evaluate=evaluate,
        out=tmp_path,
        budget=bitalloy.Budget(max_drop={"right": 0.2}),
        settings=SETTINGS,
        options=OPTIONS,
    )
    mixed = answers((tmp_path / "mixed.onnx").read_bytes(), x)
    summary = json.loads((tmp_path / "summary.json").read_text())
    right = summary["metrics"]["right"]
    assert right["float"]["value"] == 1 and right["mixed"]["value"] == pytest.approx((mixed == labels).mean())
    assert right["drop_mixed"] is None and summary["drop_estimates"] == {}
    assert summary["metrics"]["classes"]["float"]["value"] == len(set(labels.tolist()))
    (limit,) = summary["status"]["limits"]
    assert (limit["verdict"], limit["interval"]) == ("undecided", None)
    assert limit["got"] == pytest.approx(1 - (mixed == labels).mean()) and "error is unknown" in limit["reason"]
    assert found.summary.schemes and all(one.kept for one in found.summary.evaluations[:1])
    assert any("one number for a whole model" in note for note in summary["notes"])
    assert "interval unknown" in (tmp_path / "report.html").read_text()


def test_models_in_memory_are_one_model(tmp_path: Path) -> None:
    proto = network()
    forms: list[Any] = [proto, proto.SerializeToString(), ir.from_proto(proto)]
    feeds = rows()[:4]
    prepared = [prepare(form, out=tmp_path / str(i), data=feeds) for i, form in enumerate(forms)]
    x = {"x": feeds[:1]}
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, x)[0]
    for one in prepared:
        assert one.model.source.is_file() and tmp_path in one.model.source.parents
        got = onnxruntime.InferenceSession(one.model.source).run(None, x)[0]
        np.testing.assert_array_equal(got, wanted)
    assert prepared[0].model.info.sha256 == prepared[1].model.info.sha256
    again = prepare(proto, out=tmp_path / "0", data=feeds)
    assert again.model.source == prepared[0].model.source


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (3, "of type int; expected a path or a name"),
        (b"no model", "not an ONNX file"),
        (onnx.ModelProto(), "holds no ONNX graph"),
    ],
)
def test_what_is_no_model_is_refused(model: object, told: str, tmp_path: Path) -> None:
    with pytest.raises(bitalloy.ModelError, match=told):
        prepare(model, out=tmp_path, data=rows())


def test_a_torch_module_needs_example_inputs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(bitalloy.ModelError, match="Linear needs example_inputs"):
        prepare(torch.nn.Linear(4, 2), out=tmp_path, data=rows())


def test_a_wrong_example_is_told_by_its_cause(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    options = bitalloy.RunOptions(example_inputs=torch.zeros(1, 4))
    with pytest.raises(bitalloy.ModelError, match=r"with these example_inputs: .*\[1, 4\]") as refused:
        prepare(torch.nn.Linear(3, 2), out=tmp_path, data=rows(), options=options)
    assert "\x1b" not in str(refused.value) and "\n" not in str(refused.value)


def test_an_error_of_ones_own_preparation_is_told(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(bitalloy.DataError, match="preprocess fails on an item of the type dict with KeyError: 'image'"):
        prepare(inputs.two_inputs, out=tmp_path, data=[{"left": 1}], preprocess=lambda item: item["image"])


def test_prepared_files_and_labels_in_files_exclude_each_other(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(bitalloy.DataError, match="preprocess prepares samples for the model alone"):
        prepare(inputs.detector, out=tmp_path, data=inputs.scenes, evaluate=inputs.labels, preprocess=np.asarray)


def test_a_budget_reads_its_latency() -> None:
    assert bitalloy.Budget(latency="0.7x") == bitalloy.Budget(latency_ratio=0.7)
    assert bitalloy.Budget(latency="12 ms") == bitalloy.Budget(latency_ms=12)
    assert bitalloy.Budget(latency=None) == bitalloy.Budget()
    for wrong in ("soon", "0.7", "-1x", "nan ms"):
        with pytest.raises(bitalloy.BudgetError, match="expected a number with a unit"):
            bitalloy.Budget(latency=wrong)
    with pytest.raises(bitalloy.BudgetError, match="twice"):
        bitalloy.Budget(latency="0.7x", latency_ms=1)


def test_the_command_line_takes_functions(inside: Any, here: Path) -> None:
    onnx.save(network(), here / "model.onnx")
    np.savez(here / "raw.npz", x=(rows()[:40] * 100).astype(np.int16))
    (here / "mine_of_test.py").write_text(
        "import numpy as np\n"
        "def scaled(arrays):\n"
        "    return {'x': arrays['x'].astype(np.float32) / 100}\n"
        "def spread(session):\n"
        "    return float(np.ptp(session.run(None, {'x': np.ones((3, 16), np.float32)})[0]))\n"
    )
    words = ["run", "model.onnx", "--data", "raw.npz", *QUICK, "--effort", "quick", "--latency", "0.99x", "--json"]
    shown = inside(*words, "--metric", "mine_of_test:spread", "--preprocess", "mine_of_test:scaled").succeeded().out
    summary = json.loads(shown)
    session = onnxruntime.InferenceSession(here / "model.onnx")
    wanted = np.ptp(np.asarray(session.run(None, {"x": np.ones((1, 16), np.float32)})[0]))
    assert summary["metrics"]["spread"]["float"]["value"] == pytest.approx(float(wanted), rel=1e-5)
    assert summary["parts"]["available"] == 40
    assert "no module 'yours'" in inside(*words, "--metric", "yours:spread").refused()
    assert "has no 'median'" in inside(*words, "--metric", "mine_of_test:median").refused()
    assert "expected module:function" in inside(*words, "--preprocess", "mine_of_test").refused()
