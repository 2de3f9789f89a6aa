"""Light corrections in whole analyses and runs: kept where measurement says so, and then in the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bitalloy
from bitalloy.core.summaries import read_summary
from bitalloy.corrections.debiasing import WORSE_DB
from bitalloy.corrections.trials import BETTER_DB
from bitalloy.rewrite.equalize import CROSS_LAYER, SMOOTHING
from bitalloy.runtime.ort import OrtSession

ROWS, WIDTH, COUNT = 32, 16, 28
QUICK = bitalloy.Settings(samples=4, probes=2, calibration_samples=16, bias_correction=False)


def network(folder: Path, *, spread: int, mean: float) -> tuple[Path, Path]:
    """A normalization and two linear layers, the last in float; and samples.

    Args:
        folder: where to write.
        spread: channels of the normalization differ by up to 4^spread.
        mean: of its channels before their weight: far from 0, rounded weights move what the first layer makes.
    """
    rng = np.random.default_rng(3)
    gain = np.exp2(rng.permutation(np.linspace(-spread, spread, WIDTH)))
    arrays = {
        "gain": gain,
        "shift": mean * gain,
        "w": rng.standard_normal((WIDTH, WIDTH)) / gain[:, None] ** 0.5,
        "b": rng.standard_normal(WIDTH),
        "v": rng.standard_normal((WIDTH, 8)),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], name="/norm/LayerNormalization", axis=-1),
        helper.make_node("Gemm", ["n", "w", "b"], ["h"], name="/up/Gemm"),
        helper.make_node("Tanh", ["h"], ["t"], name="/act/Tanh"),
        helper.make_node("Gemm", ["t", "v"], ["y"], name="/down/Gemm"),
    ]
    if mean:
        nodes[2].op_type, nodes[2].name = "Identity", "/act/Identity"
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, 8])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    folder.mkdir()
    path = folder / "network.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    feeds = folder / "feeds"
    feeds.mkdir()
    for i in range(COUNT):
        np.savez(feeds / f"{i:03d}.npz", x=rng.standard_normal((ROWS, WIDTH)).astype(np.float32))
    return path, feeds


def calibrated(model: Path, feeds: Path, **settings: object) -> Any:
    loaded = bitalloy.load(model)
    data = bitalloy.open_data(loaded, feeds)
    return bitalloy.calibrate(loaded, data, msgspec.structs.replace(QUICK, **settings))


def sqnr(path: Path | bytes, given: Path, feeds: Path, samples: Sequence[int]) -> float:
    """By hand: outputs of two files."""
    one, two = OrtSession(given), OrtSession(path)
    signal = noise = 0.0
    for i in samples:
        sample = dict(np.load(feeds / f"{i:03d}.npz"))
        y, q = (s.run(sample)["y"].astype(np.float64) for s in (one, two))
        signal, noise = signal + np.square(y).sum(), noise + np.square(q - y).sum()
    return float(10 * np.log10(signal / noise))


def test_uneven_channels_are_scaled_and_the_file_stays_the_reference(tmp_path: Path) -> None:
    model, feeds = network(tmp_path / "uneven", spread=6, mean=0.0)
    on, off = calibrated(model, feeds), calibrated(model, feeds, equalize=False)
    assert off.corrections == () and off.graph is off.given
    smoothing, cross = on.corrections
    assert (smoothing.name, smoothing.places, smoothing.kept) == (SMOOTHING, 1, True)
    assert (cross.name, cross.places, cross.kept) == (CROSS_LAYER, 0, False)
    assert smoothing.samples == smoothing.fitted_samples == 8
    assert list(on.original().models.values()) == [model]
    assert on.graph.info.sha256 == off.graph.info.sha256 and on.executed != off.executed
    unseen = range(16, COUNT)
    gain = [sqnr(c.variant(c.units.lowest()).to_bytes(), model, feeds, unseen) for c in (off, on)]
    assert gain[1] > gain[0] + 1.0
    # the trial's ranges are those of 8 samples, which leave more room
    assert smoothing.with_db["y"] - smoothing.without_db["y"] == pytest.approx(gain[1] - gain[0], abs=3)


def test_even_channels_stay(tmp_path: Path) -> None:
    model, feeds = network(tmp_path / "even", spread=0, mean=0.0)
    ready = calibrated(model, feeds)
    assert not any(c.kept for c in ready.corrections)
    assert ready.graph is ready.given
    assert ready.executed == calibrated(model, feeds, equalize=False).executed


@pytest.fixture(scope="module")
def finished(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on a network whose rounded weights move means, everything in INT8 that can be."""
    folder = tmp_path_factory.mktemp("skewed")
    model, feeds = network(folder / "network", spread=0, mean=4.0)
    line = inputs.command_line(folder)
    options = (
        "--data",
        feeds,
        "--max-drop-db",
        "5",
        "--keep",
        "int8:/up/Gemm",
        "--keep",
        "int8:/down/Gemm",
        "--samples",
        "8",
        "--probes",
        "2",
        "--calibration-samples",
        "16",
    )
    line("run", model, *options, "--out", "run").succeeded()
    return line, model, feeds, options


def test_biases_are_corrected_in_the_shipped_model(finished: Any) -> None:
    line, model, feeds, _ = finished
    summary = read_summary((line.folder / "run" / "summary.json").read_bytes())
    bias = summary.corrections[-1]
    assert bias.name == "bias" and bias.places == 1
    assert bias.samples == bias.fitted_samples == 8
    changes = [bias.with_db[h] - bias.without_db[h] for h in bias.with_db]
    assert bias.kept and np.mean(changes) > BETTER_DB and min(changes) >= -WORSE_DB
    told = summary.sqnr_db["y"].mixed
    assert told.measured == pytest.approx(told.predicted, abs=1.5), "the matrix knows of the correction"
    shipped = line.folder / "run" / "mixed.onnx"
    assert summary.parts is not None and summary.parts.disjoint
    measured = [int(name.removesuffix(".npz")) for name in summary.parts.verification]
    assert sqnr(shipped, model, feeds, measured) == pytest.approx(told.measured, abs=0.05)
    # the units of the plan are all that can be in INT8
    assert sqnr(shipped, model, feeds, range(8, 16)) == pytest.approx(bias.with_db["y"], abs=0.5)


def test_corrections_can_be_switched_off(finished: Any) -> None:
    line, model, _, options = finished
    done = line("run", model, *options, "--no-bias-correction", "--no-equalize", "--out", "plain").succeeded()
    assert line.summary("plain")["corrections"] == []
    assert "Correction" not in done.out
    report = (line.folder / "run" / "report.html").read_text()
    assert (
        'id="corrections"' in report and 'id="corrections"' not in (line.folder / "plain" / "report.html").read_text()
    )
