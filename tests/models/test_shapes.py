"""Models of each kind are loaded, planned and shipped, and compared with an execution of the file by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from tests.models.shapes import INTEGERS, MODELS, SmallModel, nameless, tokens

from bitalloy.core.errors import ModelError
from bitalloy.core.records import Settings
from bitalloy.core.schemes import Plan
from bitalloy.core.work import Workspace
from bitalloy.model.heads import find_heads
from bitalloy.model.selected import SELECTED
from bitalloy.model.sizes import OpenSizes
from bitalloy.pipeline.calibrate import calibrate
from bitalloy.pipeline.prepare import prepare
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.runtime.artefact import Artefact
from bitalloy.verify.sizes import verify_sizes

LEAST_DB, LEAST_AGREEMENT = 15.0, 0.7
QUICK = Settings(calibration_samples=4, equalize=False, bias_correction=False)
INTEGER_KERNELS = {"MatMulIntegerToFloat", "QGemm"}


@dataclass(frozen=True)
class Shipped:
    """A model and what became of it."""

    small: SmallModel
    ready: Calibrated
    plan: Plan
    artefact: Artefact
    given: Path
    path: Path


def ship(small: SmallModel, folder: Path, settings: Settings = QUICK) -> Shipped:
    """All that can run in INT8 does."""
    given = folder / "model.onnx"
    onnx.save(small.model, given)
    (folder / "feeds").mkdir()
    for seed in range(6):
        np.savez(folder / "feeds" / f"{seed}.npz", **small.feeds(seed))  # type: ignore[arg-type]
    prepared = prepare(given, out=folder / "run", data=folder / "feeds")
    ready = calibrate(prepared.model, prepared.data, settings)
    plan = Plan({u.id: "int8" for u in ready.units.units if "int8" in u.choices})
    artefact = ready.artefact(plan)
    artefact.save(folder / "mixed.onnx")
    return Shipped(small, ready, plan, artefact, given, folder / "mixed.onnx")


def session(path: Path, *, optimized: bool = True, written: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if written is not None:
        options.optimized_model_filepath = str(written)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def agreement(wanted: np.ndarray, found: np.ndarray) -> float:
    """Share of equal numbers; of lists whose length depends on the data, of equal rows."""
    if wanted.shape == found.shape:
        return float((wanted == found).mean())
    one, other = ({tuple(row) for row in np.atleast_2d(rows).reshape(len(rows), -1)} for rows in (wanted, found))
    return len(one & other) / len(one | other)


def rows_found(wanted: np.ndarray, found: np.ndarray) -> float:
    """Share of rows that have a neighbour in another selection, closer than 15 dB, and the other way round."""
    one, other = (a.reshape(-1, a.shape[-1]) for a in (wanted, found))
    assert len(one) > 1
    distance = np.square(one[:, None] - other[None]).sum(-1)
    near = np.square(one).sum(-1).mean() / 10 ** (LEAST_DB / 10)
    return float(min((distance.min(1) < near).mean(), (distance.min(0) < near).mean()))


def compare(shipped: Shipped, shapes: Mapping[str, tuple[int, ...]], *, optimized: bool) -> None:
    reference, mixed = session(shipped.given), session(shipped.path, optimized=optimized)
    assert [o.name for o in mixed.get_outputs()] == [o.name for o in reference.get_outputs()]
    for seed in (100, 101):
        feeds = shipped.small.feeds(seed, shapes)
        for wanted, found in zip(reference.run(None, feeds), mixed.run(None, feeds), strict=True):
            assert wanted.dtype == found.dtype
            if wanted.dtype.kind == "f" and shipped.small.shown:
                assert rows_found(wanted, found) > LEAST_AGREEMENT
            elif wanted.dtype.kind == "f":
                assert wanted.shape == found.shape
                energy, noise = float(np.square(wanted).sum()), float(np.square(found - wanted).sum())
                assert noise > 0 and 10 * np.log10(energy / noise) > LEAST_DB
            else:
                rows = [a.T if a.ndim == 2 and a.shape[0] == 4 else a for a in (wanted, found)]
                assert agreement(*rows) > LEAST_AGREEMENT


@pytest.mark.parametrize("name", MODELS)
def test_it_is_taken_and_shipped(name: str, tmp_path: Path) -> None:
    small = MODELS[name]()
    shipped = ship(small, tmp_path)
    assert shipped.plan
    for optimized in (True, False):
        for shapes in ({}, *small.others):
            compare(shipped, shapes, optimized=optimized)
    declared = {i.name: i.shape for i in session(shipped.path).get_inputs()}
    is_open = any(not isinstance(d, int) for shape in declared.values() for d in shape)
    assert is_open == small.kept_open == bool(small.others)
    assert shipped.ready.graph.shown == small.shown
    if small.shown:
        assert {h.output for h in shipped.ready.heads} == set(small.shown)
        (note,) = shipped.ready.graph.changes
        assert all(f"'{shown}'" in note for shown in ("y", *small.shown))
    if small.last_int8:
        assert small.last_int8 in shipped.plan
        session(shipped.path, written=tmp_path / "optimized.onnx")
        kernels = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert INTEGER_KERNELS & set(kernels) and kernels[-1] != "DequantizeLinear"


def test_integer_outputs_are_all_tried() -> None:
    made = {node.op_type for make in INTEGERS.values() for node in make().model.graph.node}
    assert {"ArgMax", "ArgMin", "TopK", "Cast", "Greater", "Equal", "NonZero"} <= made


def test_what_cannot_stay_open_is_said(tmp_path: Path) -> None:
    shipped = ship(MODELS["weight_of_a_shape"](), tmp_path)
    (reason,) = shipped.artefact.bound.values()
    assert "'a_node'" in reason
    assert verify_sizes(shipped.ready, shipped.artefact, shipped.plan, Workspace()) == ()


def test_a_shipped_model_is_verified_at_three_sizes(tmp_path: Path) -> None:
    shipped = ship(tokens(), tmp_path)
    found = verify_sizes(shipped.ready, shipped.artefact, shipped.plan, Workspace())
    assert [v.shapes for v in found] == [{"x": (1, 24, 16)}, {"x": (1, 6, 16)}]
    assert all(v.sqnr_db["y"] > LEAST_DB and not v.failed for v in found)


def test_ranges_are_taken_at_all_sizes_that_are_asked_for(tmp_path: Path) -> None:
    further = Settings(calibration_samples=4, equalize=True, bias_correction=False, sizes=({"x": (1, 3, 4, 40)},))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = ship(nameless(), tmp_path / "one"), ship(nameless(), tmp_path / "two", further)
    ranges = two.ready.ranges
    assert any(ranges[t] != r for t, r in one.ready.ranges.items() if t in ranges)
    found = verify_sizes(two.ready, two.artefact, two.plan, Workspace())
    assert [v.shapes["x"] for v in found] == [(1, 3, 4, 40), (1, 3, 32, 32)]


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    graph = ship(nameless(), tmp_path).ready.graph
    sizes = OpenSizes(graph)
    assert sizes.completed({"x": (1, 3, 8, 40)}) == {"x": (1, 3, 8, 40)}
    for given in ({"x": (2, 3, 16, 16)}, {"x": (1, 3, 16)}, {"z": (1, 3, 16, 16)}):
        with pytest.raises(ModelError, match="--shape gives"):
            sizes.completed(given)


def test_a_shipped_model_that_fails_elsewhere_is_told(tmp_path: Path) -> None:
    shipped = ship(nameless(), tmp_path)
    closed = shipped.ready.graph.model  # the float model with the sizes of the samples
    found = verify_sizes(shipped.ready, Artefact({"model": closed}), shipped.plan, Workspace())
    assert found and all("ONNX Runtime" in v.failed for v in found)


def test_images_are_fed_as_many_at_a_time_as_the_batch(tmp_path: Path) -> None:
    small = MODELS["fixed_batch"]()
    onnx.save(small.model, tmp_path / "model.onnx")
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    prepared = prepare(tmp_path / "model.onnx", out=tmp_path / "run", data=tmp_path / "images")
    assert len(prepared.data) == 2
    first, second = prepared.data.feeds(0)["x"], prepared.data.feeds(1)["x"]
    assert first.shape == second.shape == (4, 3, 16, 16)
    reds = [*first[:, 0, 0, 0], *second[:, 0, 0, 0]]
    assert np.all(np.diff(reds[:6]) > 0) and reds[6:] == reds[:2]


def test_heads_of_probabilities_behind_an_index_are_their_logits(tmp_path: Path) -> None:
    shipped = ship(MODELS["arg_max"](), tmp_path)
    assert [(h.name, h.tensor) for h in find_heads(shipped.ready.graph)] == [("soft", "scores"), ("soft KL", "soft")]


def test_what_is_behind_a_selection_stays_in_float(tmp_path: Path) -> None:
    units = {u.id: u for u in ship(MODELS["computed_behind"](), tmp_path).ready.units.units}
    behind = units["product_node"]
    assert behind.choices == () and set(behind.refused.values()) == {SELECTED}
    assert "int8" in units["head_node"].choices
