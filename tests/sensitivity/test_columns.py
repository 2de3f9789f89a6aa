"""Several targets from one probe matrix: nothing runs twice, and what is predicted is what the rewritten model does."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.model.heads import Reference
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.cast import as_specified
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.columns import views
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.base import Target, split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.ort_cuda import ORT_CUDA
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe
from bitalloy.targets.tensorrt import TENSORRT

TARGETS = (ORT_CPU, TENSORRT, ORT_CUDA)


@pytest.fixture(scope="module")
def ranges(case):
    """Ranges of every tensor that one of the targets rounds."""
    values = [{**OrtSession(everything(case)).run(f), **f} for f in case.feeds]
    names = [name for name in values[0] if case.graph.value[name].dtype is not None]
    return {n: (min(float(v[n].min()) for v in values), max(float(v[n].max()) for v in values)) for n in names}


def everything(case) -> bytes:
    """The model with all its tensors as outputs."""
    import onnx

    model = onnx.load_model_from_string(case.graph.to_bytes())
    known = {o.name for o in model.graph.output}
    made = [v for n in model.graph.node for v in n.output if v and v not in known]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in made)
    return model.SerializeToString()


def recipes(case, ranges, targets: tuple[Target, ...]) -> list[Recipe]:
    return [Recipe(split(case.graph, t, case.heads), t, ranges) for t in targets]


def prober(case, ranges, targets: tuple[Target, ...]) -> Prober:
    return Prober(case.graph, case.heads, recipes(case, ranges, targets))


@pytest.fixture(scope="module")
def joint(case, ranges) -> dict[str, ProbeMatrix]:
    """Target -> its columns of one matrix."""
    together = prober(case, ranges, TARGETS)
    rows = [together.measure(f, sample=i, probes=64, seed=3) for i, f in enumerate(case.feeds)]
    found = views(case.graph, recipes(case, ranges, TARGETS))
    whole = ProbeMatrix.concatenate(rows)
    return {t.name: whole.view(v) for t, v in zip(TARGETS, found, strict=True)}


def test_more_targets_add_no_execution(case, ranges) -> None:
    counts = []
    for number in (1, 2, 3):
        one = prober(case, ranges, TARGETS[:number])
        one.measure(case.feeds[0], sample=0, probes=4, seed=0)
        counts.append((one.executions, len(one.sites)))
    executions, columns = zip(*counts, strict=True)
    assert executions == (1 + 2 * len(case.heads),) * 3  # one forward, and two probes at once for each head
    assert columns[0] < columns[1] < columns[2]


def test_first_target_keeps_its_numbers(case, ranges, joint) -> None:
    alone = prober(case, ranges, (ORT_CPU,))
    rows = alone.measure(case.feeds[0], sample=0, probes=64, seed=3)
    assert alone.sites == joint["ort-cpu"].sites
    for head, found in enumerate(joint["ort-cpu"].rows):
        np.testing.assert_allclose(rows.rows[head][0], found[0], rtol=1e-2, atol=1e-3 * np.abs(found[0]).max())


def test_what_targets_round_alike_is_one_column(case, ranges) -> None:
    twin = replace(TENSORRT, name="twin")
    both, one = prober(case, ranges, (TENSORRT, twin)), prober(case, ranges, (TENSORRT,))
    assert both.sites == one.sites
    offers = (replace(o, scheme=msgspec.structs.replace(o.scheme, activation="uint8")) for o in twin.offers[1:])
    coarse = replace(twin, offers=(twin.offers[0], *offers))
    found = prober(case, ranges, (TENSORRT, coarse)).sites
    added = set(found) - set(one.sites)
    assert added and all(name.endswith(" on twin") for name in added)
    assert not any("#1" in name for name in added), "weights have the same format on both"


def measured(case, ranges, target: Target, plan: Plan) -> np.ndarray:
    """SQNR in dB of the rewritten model on boxes and scores; the other heads of this random network bend too much."""
    (recipe,) = recipes(case, ranges, (target,))
    model = write_plan(case.graph, recipe, plan).model
    exact, mixed = OrtSession(case.graph.to_bytes()), OrtSession(as_specified(model))
    parts = [(Reference(exact.run(f), case.heads), mixed.run(f)) for f in case.feeds]
    errors, energies = [r.error(y) for r, y in parts], [r.energy for r, _ in parts]
    return decibel(np.mean(errors, axis=0) / np.mean(energies, axis=0))[:2]


def predicted(matrix: ProbeMatrix, units: UnitGraph, plan: Plan) -> np.ndarray:
    return decibel(matrix.damage(matrix.select(rounded(units, plan))).mean(axis=0))[:2]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_int8_of_another_target_is_predicted(case, ranges, joint, share) -> None:
    units = split(case.graph, TENSORRT, case.heads)
    rng = np.random.default_rng(int(10 * share))
    plan = Plan.of("int8", *(u for u in sorted(units.able("int8")) if rng.random() < share))
    found, expected = predicted(joint["tensorrt"], units, plan), measured(case, ranges, TENSORRT, plan)
    assert plan and np.abs(found - expected)[expected > 10].max() < 2.5


@pytest.mark.parametrize("target", [TENSORRT, ORT_CUDA], ids=lambda t: t.name)
def test_fp16_is_predicted(case, ranges, joint, target) -> None:
    units = split(case.graph, target, case.heads)
    plan = Plan.of("fp16", *units.able("fp16"))
    assert len(plan) == len(units.units)
    found, expected = predicted(joint[target.name], units, plan), measured(case, ranges, target, plan)
    assert (expected > 45).all() and (expected < 90).all()
    assert np.abs(found - expected).max() < 3
