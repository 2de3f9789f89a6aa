"""Rounding of weights in blocks by what enters and leaves their layers, against the paper's own formulas in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bitalloy
from bitalloy.calibrate import blocks
from bitalloy.calibrate.blocks import compensated, searched
from bitalloy.calibrate.moments import second_moments
from bitalloy.core.errors import BitalloyError, ModelError
from bitalloy.core.jobs import Contexts
from bitalloy.core.schemes import Plan
from bitalloy.core.work import Workspace
from bitalloy.corrections.rounding import WEIGHT_ROUNDING, lowest_blocks
from bitalloy.formats import find_format
from bitalloy.model.heads import find_heads
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.sensitivity.importance import RowWeights
from bitalloy.sensitivity.matrix import decibel
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import open_recipe, recipe_identity, recipe_opening

ROWS, INPUTS, MIDDLE, OUTPUTS, COUNT = 24, 48, 40, 8, 40
QUICK = bitalloy.Settings(
    schemes=("w4",), samples=8, probes=16, calibration_samples=24, equalize=False, bias_correction=False
)


def correlated(rng: np.random.Generator, rows: int, inputs: int) -> np.ndarray:
    """Rows that lie near a few directions."""
    mix = np.random.default_rng(11).standard_normal((inputs // 6, inputs))
    found = rng.standard_normal((rows, inputs // 6)) @ mix + 0.05 * rng.standard_normal((rows, inputs))
    return found.astype(np.float32)


def by_the_paper(weight: np.ndarray, moments: np.ndarray, block: int) -> np.ndarray:
    """GPTQ column by column with the explicit inverse of what is left (Frantar et al. 2022, equations 2 and 3).

    4 bits with a zero point; ranges of a block are the extremes of its weights when its first one comes up.
    """
    left, inputs = weight.astype(np.float64).T.copy(), len(weight)
    inverse = np.linalg.inv(moments + 0.01 * np.diag(moments).mean() * np.eye(inputs))
    found = np.zeros_like(left)
    for q in range(inputs):
        if q % block == 0:
            part = left[:, q : q + block].astype(np.float32)
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scale = ((high.astype(np.float64) - low) / 15).astype(np.float32)
            zero = np.rint(-low / scale.astype(np.float64))
        steps = np.clip(np.rint(left[:, q].astype(np.float32) / scale) + zero, 0, 15)
        found[:, q] = (steps - zero) * scale
        error = (left[:, q] - found[:, q]) / inverse[q, q]
        left -= np.outer(error, inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return found.T


@pytest.mark.parametrize("inputs", [12, 14])
def test_errors_are_compensated_as_the_paper_says(inputs: int) -> None:
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((inputs, 5)).astype(np.float32), correlated(rng, 200, inputs)
    moments = (x.T @ x / len(x)).astype(np.float32)
    values, params = compensated(weight, moments, find_format("uint4"), 4)
    np.testing.assert_allclose(values, by_the_paper(weight, moments.astype(np.float64), 4), rtol=1e-5, atol=1e-6)
    assert params.scale.shape == (-(-inputs // 4), 5) and (params.axis, params.block) == (0, 4)
    np.testing.assert_array_equal(find_format("uint4").reference(values, params), values)


@pytest.mark.parametrize("name", ["uint4", "int8"])
def test_ranges_of_blocks_have_the_least_error_of_the_product(name: str) -> None:
    """Tried anew for each block and output: no pair of cuts does better."""
    rng, block = np.random.default_rng(4), 6
    weight, x = rng.standard_normal((block, 3)).astype(np.float32) ** 3, correlated(rng, 100, block)
    moments, stored = x.T @ x, find_format(name)
    values, _ = searched(weight, moments, stored, block)
    lost = np.square(x @ (values - weight)).sum(axis=0)
    tried = []
    for below in blocks.CUTS:
        for above in blocks.CUTS:
            low, high = weight.min(axis=0, keepdims=True) * below, weight.max(axis=0, keepdims=True) * above
            params = stored.of_parts(low.astype(np.float32), high.astype(np.float32), axis=0, block=block)
            tried.append(np.square(x @ (stored.reference(weight, params) - weight)).sum(axis=0))
    np.testing.assert_allclose(lost, np.min(tried, axis=0), rtol=1e-3)


def test_what_layers_make_is_nearer_on_unseen_rows() -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((INPUTS, 32)).astype(np.float32)
    seen, unseen = correlated(rng, 400, INPUTS), correlated(rng, 400, INPUTS)
    stored, moments = find_format("uint4"), seen.T @ seen
    low, high = (f(weight.reshape(-1, 16, 32), axis=1) for f in (np.min, np.max))
    params = stored.of_parts(low, high, axis=0, block=16)
    lost = {
        "nearest": stored.reference(weight, params),
        "search": searched(weight, moments, stored, 16)[0],
        "gptq": compensated(weight, moments, stored, 16)[0],
    }
    error = {name: float(np.square(unseen @ (w - weight)).mean()) for name, w in lost.items()}
    assert error["search"] < 0.95 * error["nearest"]
    assert error["gptq"] < 0.5 * error["nearest"]


def test_a_diagonal_searches_ranges_alone() -> None:
    rng = np.random.default_rng(6)
    weight, diagonal = rng.standard_normal((10, 3)).astype(np.float32), rng.random(10).astype(np.float32)
    stored = find_format("uint4")
    one, two = compensated(weight, diagonal, stored, 4)[0], searched(weight, np.diag(diagonal), stored, 4)[0]
    np.testing.assert_array_equal(one, two)


def network(folder: Path) -> tuple[Path, Path]:
    """MatMul, Tanh, Gemm with the weight transposed; samples whose channels are correlated."""
    rng = np.random.default_rng(3)
    arrays = {
        "w": rng.standard_normal((INPUTS, MIDDLE)) * 0.05,
        "v": rng.standard_normal((OUTPUTS, MIDDLE)),
        "b": rng.standard_normal(OUTPUTS),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/up/MatMul"),
        helper.make_node("Tanh", ["h"], ["t"], name="/act/Tanh"),
        helper.make_node("Gemm", ["t", "v", "b"], ["y"], name="/down/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, OUTPUTS])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    folder.mkdir()
    path, feeds = folder / "network.onnx", folder / "feeds"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    feeds.mkdir()
    for i in range(COUNT):
        np.savez(feeds / f"{i:03d}.npz", x=correlated(rng, ROWS, INPUTS))
    return path, feeds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return network(tmp_path_factory.mktemp("rounding") / "network")


def analysed(files: tuple[Path, Path], stage: Any, work: Workspace | None = None, **settings: object) -> Any:
    model = bitalloy.load(files[0])
    return stage(model, bitalloy.open_data(model, files[1]), msgspec.structs.replace(QUICK, **settings), work=work)


@pytest.fixture(scope="module")
def kept(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The analysis with roundings in a run directory."""
    work = Workspace(bitalloy.RunDirectory(tmp_path_factory.mktemp("kept")))
    return analysed(files, bitalloy.analyze, work)


def test_moments_are_those_of_what_enters(files: tuple[Path, Path]) -> None:
    model, weights = bitalloy.load(files[0]), {"b": np.linspace(0.5, 2, ROWS)}
    feeds = [dict(np.load(files[1] / f"{i:03d}.npz")) for i in range(3)]
    entering = {"a": "t", "b": "t", "c": "x"}
    found = second_moments(model.model, entering, feeds, weights=lambda *_: weights)
    w = numpy_helper.to_array(next(i for i in onnx.load(files[0]).graph.initializer if i.name == "w"))
    t = [np.tanh(f["x"].astype(np.float64) @ w) for f in feeds]
    np.testing.assert_allclose(found["a"], np.mean([one.T @ one for one in t], axis=0), rtol=1e-3, atol=1e-4)
    expected = np.mean([one.T @ (one * weights["b"][:, None]) for one in t], axis=0)
    np.testing.assert_allclose(found["b"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["c"], np.mean([f["x"].T @ f["x"] for f in feeds], axis=0), rtol=1e-3, atol=1e-3)


def test_rows_count_as_their_gradient_does(tmp_path: Path) -> None:
    """Behind an orthogonal matrix every row of the gradient is as long as that of the signs, times the row's factor."""
    rng = np.random.default_rng(7)
    turn, factors = np.linalg.qr(rng.standard_normal((6, 6)))[0], np.array([[0.0], [1.0], [3.0]])
    arrays = {"w": rng.standard_normal((5, 6)), "turn": turn, "factors": factors}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/up/MatMul"),
        helper.make_node("MatMul", ["h", "turn"], ["t"], name="/turn/MatMul"),
        helper.make_node("Mul", ["t", "factors"], ["y"], name="/Mul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    model, x = bitalloy.load(path), rng.standard_normal((3, 5)).astype(np.float32)
    found = RowWeights(model, find_heads(model), ["h", "y"]).measure({"x": x}, sample=0, seed=0)
    energy = np.square(factors * (x @ arrays["w"] @ turn)).sum()
    np.testing.assert_allclose(found["h"], 6 * factors[:, 0] ** 2 / energy, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found["y"], np.full(3, 6) / energy, rtol=1e-4)


def test_what_gains_is_kept_and_shipped(kept: Any, files: tuple[Path, Path]) -> None:
    (correction,) = kept.corrections
    assert (correction.name, correction.places, correction.kept) == (WEIGHT_ROUNDING, 2, True)
    assert (correction.fitted_samples, correction.samples) == (16, 8)
    assert correction.with_db["y"] > correction.without_db["y"] + 1
    plain = analysed(files, bitalloy.calibrate, weight_rounding="nearest")
    assert plain.corrections == () and not plain.roundings.sites
    unseen = [kept.data.feeds(i) for i in kept.parts.verification]
    exact = OrtSession(files[0])
    error = {}
    for name, one in (("nearest", plain), ("chosen", kept)):
        session = OrtSession(one.variant(lowest_blocks(one.units)).to_bytes())
        error[name] = sum(float(np.square(session.run(f)["y"] - exact.run(f)["y"]).sum()) for f in unseen)
    assert error["chosen"] < 0.8 * error["nearest"]


def test_the_shipped_integers_are_those_of_the_recipe(kept: Any) -> None:
    model = onnx.load_from_string(kept.variant(lowest_blocks(kept.units)).to_bytes())
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(found) == len(kept.roundings.sites) == 2
    for node, across in zip(found, (False, True), strict=True):
        (own,) = (r for site, r in kept.roundings.sites.items() if f"->{node.name}#" in site)
        numbers = own.numbers if across else own.numbers.T
        packed = stored[node.input[1]].reshape(len(numbers), -1)
        unpacked = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(numbers), -1)[:, : numbers.shape[1]]
        np.testing.assert_array_equal(unpacked, numbers)
        scale = own.scale if across else own.scale.T
        np.testing.assert_array_equal(stored[node.input[2]], scale)


def test_predicted_and_switched_are_what_is_executed(kept: Any) -> None:
    plan = lowest_blocks(kept.units)
    for part in (plan, *(Plan({u: s}) for u, s in plan.items())):
        session = OrtSession(kept.variant(part).to_bytes())
        board, sites = Switchboard(kept.graph, kept.recipe()), rounded(kept.units, part)
        noise = signal = 0.0
        for i in kept.parts.probe[: kept.matrix.samples]:
            feeds = kept.data.feeds(i)
            done, y = session.run(feeds)["y"], board.run(feeds, board.gates([]))["y"]
            switched = board.run(feeds, board.gates(sites))["y"]
            np.testing.assert_allclose(switched, done, atol=0.02 * np.abs(done - y).max())
            noise, signal = noise + float(np.square(done - y).sum()), signal + float(np.square(y).sum())
        predicted = decibel(kept.matrix.damage(kept.matrix.select(sites)).mean(axis=0))[0]
        assert predicted == pytest.approx(10 * np.log10(signal / noise), abs=1.5)


def test_roundings_are_in_keys_and_jobs_by_their_file(kept: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    opening = recipe_opening(kept.recipe())
    again = open_recipe(opening.spec, Contexts())
    assert again == kept.recipe() and opening.kind == "recipe"
    for site, own in kept.roundings.sites.items():
        np.testing.assert_array_equal(again.roundings.sites[site].numbers, own.numbers)
    elsewhere = analysed(files, bitalloy.calibrate, Workspace(bitalloy.RunDirectory(tmp_path / "elsewhere")))
    assert recipe_opening(elsewhere.recipe()) != opening and elsewhere.executed == kept.executed
    other = analysed(files, bitalloy.calibrate, weight_rounding="search")
    assert other.corrections[0].kept and other.executed != kept.executed
    assert recipe_opening(other.recipe()).kind == "resident", "without a run directory they are in memory"
    assert recipe_identity(other.recipe()).kind == "recipe"
    path = Path(elsewhere.roundings.path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ModelError, match="has changed"):
        open_recipe(recipe_opening(elsewhere.recipe()).spec, Contexts())


def test_a_way_that_is_none_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(BitalloyError, match="auto, nearest, search, gptq, weighted"):
        analysed(files, bitalloy.calibrate, weight_rounding="awq")


def test_few_samples_and_other_schemes_leave_weights_at_their_nearest(files: tuple[Path, Path]) -> None:
    few = analysed(files, bitalloy.calibrate, calibration_samples=5)
    assert not few.corrections[0].kept and not few.roundings.sites
    assert "needs 4 samples" in few.corrections[0].reason
    assert analysed(files, bitalloy.calibrate, schemes=("int8",)).corrections == ()


def test_layers_that_read_one_constant_share_its_numbers(tmp_path: Path) -> None:
    """Two products with one matrix have the numbers for what enters both; a transposed reader has its own."""
    rng = np.random.default_rng(9)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/a/MatMul"),
        helper.make_node("Tanh", ["a"], ["t"], name="/t/Tanh"),
        helper.make_node("MatMul", ["t", "w"], ["b"], name="/b/MatMul"),
        helper.make_node("Gemm", ["b", "w"], ["y"], name="/c/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, 32])],
        [numpy_helper.from_array((rng.standard_normal((32, 32)) * 0.2).astype(np.float32), "w")],
    )
    path, feeds = tmp_path / "m.onnx", tmp_path / "feeds"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    feeds.mkdir()
    for i in range(12):
        np.savez(feeds / f"{i:03d}.npz", x=correlated(rng, ROWS, 32))
    found = analysed((path, feeds), bitalloy.calibrate, weight_rounding="gptq", calibration_samples=8)
    one, two, turned = (found.roundings.sites[f"w->/{name}#1 in w4"] for name in ("a/MatMul", "b/MatMul", "c/Gemm"))
    assert one.digest == two.digest != turned.digest
    x = [found.data.feeds(i)["x"] for i in found.parts.calibration[:4]]
    w = numpy_helper.to_array(graph.initializer[0])
    moments = sum(np.mean([r.T @ r for r in rows], axis=0) for rows in (x, [np.tanh(r @ w) for r in x]))
    values, _ = compensated(w, moments, find_format("uint4"), 32)
    stored = found.recipe().weight("w4", found.graph.node["/a/MatMul"], found.units.units[0].weights[0])
    assert np.mean(np.abs(stored.rounded - values) < 1e-5) > 0.98, "but for ties that float32 decides"
