"""Every small model is loaded, planned and shipped, and the shipped model runs as the plan says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.models.operators import OPERATORS, SAME
from tests.unpriced import empty_table

import bitalloy
from bitalloy.core.plans import Budget
from bitalloy.data.datasets import ArrayDataset
from bitalloy.model.load import load_graph

FEW = bitalloy.Settings(samples=2, probes=4, calibration_samples=4)
SAMPLES, FLOOR_DB = 8, 15.0


def execute(model: bytes, feeds: dict[str, np.ndarray], *, optimized: bool = True) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], feeds)[0], np.float64)


@pytest.mark.parametrize("name", OPERATORS)
def test_from_the_file_to_the_shipped_model(name: str, tmp_path: Path) -> None:
    make, operator = OPERATORS[name]
    given = make()
    assert len(given) < 20_000
    (tmp_path / "model.onnx").write_bytes(given)
    net = load_graph(tmp_path / "model.onnx")
    shape = [int(d) for d in net.info.inputs[0].shape]
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(SAMPLES + 4)]
    analysis = bitalloy.analyze(net, ArrayDataset(feeds[:SAMPLES]), FEW)
    assert not [n for n in analysis.notes if "No gradient passes" in n]
    units = analysis.units
    table = empty_table(units)
    prices = [
        msgspec.structs.replace(c, us={s: 1.0 if s == "fp32" else 0.5 if s == "int8" else 2.0 for s in c.us})
        for c in table.units
    ]
    planned = bitalloy.plan(
        analysis, Budget(min_sqnr_db=FLOOR_DB), table=msgspec.structs.replace(table, units=tuple(prices)), front=False
    )
    rounded = {u for u, scheme in planned.plan.chosen.items() if scheme == "int8"}
    products = {n.name for n in net.nodes if n.name in ("before", "behind") and n.op_type == "Conv"}
    products |= {n.name for n in net.nodes if n.name in ("over time", "of each")}
    assert products <= {n for u in units.units if u.id in rounded for n in u.core}
    bitalloy.apply(analysis, planned).save(tmp_path / "mixed.onnx")
    shipped = (tmp_path / "mixed.onnx").read_bytes()
    kinds = [n.op_type for n in onnx.load_from_string(shipped).graph.node]
    assert operator in kinds and "QuantizeLinear" in kinds
    for optimized in (True, False):
        pairs = [
            (execute(SAME.get(name, make)(), f), execute(shipped, f, optimized=optimized)) for f in feeds[SAMPLES:]
        ]
        error, signal = (
            sum(float((v**2).sum()) for v in each) for each in ([a - b for a, b in pairs], [a for a, _ in pairs])
        )
        assert 10 * np.log10(signal / error) > FLOOR_DB - 2
