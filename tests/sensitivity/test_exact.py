"""Exact measurement: segments against ONNX Runtime on rewritten models, shards, confirmation, the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import bitalloy
from bitalloy.core.errors import BitalloyError
from bitalloy.core.records import SensitivityTable
from bitalloy.core.schemes import Plan
from bitalloy.core.store import RunDirectory
from bitalloy.core.units import UnitGraph
from bitalloy.formats.affine import activation_params
from bitalloy.model.heads import head_of, is_divergence
from bitalloy.model.read import name_of
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.exact import Segment, Switchboard
from bitalloy.sensitivity.matrix import bend, decibel
from bitalloy.sensitivity.measuring import ALL_BUT_ONE, EVERYTHING, chosen_groups
from bitalloy.sensitivity.segments import cut, extract, reads
from bitalloy.targets.placement import ACTIVATIONS, Site, possible_sites, rounded, weight_site
from bitalloy.targets.recipe import stored_weight
from bitalloy.tasks.metric import MetricTable

QUICK = bitalloy.Settings(samples=4, probes=8, calibration_samples=8, bias_correction=False)


def able(units: UnitGraph) -> list[str]:
    """Units that may run in INT8, in order of their names."""
    return sorted(units.able("int8"))


def sites_of(units: UnitGraph, *names: str) -> frozenset[str]:
    """Sites of the plan with some units in INT8."""
    return rounded(units, Plan.of("int8", *names))


@dataclass(frozen=True)
class Place:
    """A calibrated model with a switchboard in small segments."""

    ready: Calibrated
    board: Switchboard


@pytest.fixture(scope="module")
def places(inputs: Any) -> dict[str, Place]:
    found = {}
    for name, data in (("classifier", inputs.images), ("detector", inputs.scenes)):
        model = bitalloy.load(getattr(inputs, name))
        ready = bitalloy.calibrate(model, bitalloy.open_data(model, data, limit=28), QUICK)
        found[name] = Place(ready, Switchboard(model, ready.recipe(), segments=8))
    return found


@pytest.fixture(params=["classifier", "detector"])
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    return places[request.param]


def with_output(graph: Any, tensor: str) -> OrtSession:
    """The float model with one more output."""
    proto = onnx.load_from_string(graph.to_bytes())
    if tensor not in {o.name for o in proto.graph.output}:
        proto.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    return OrtSession(proto.SerializeToString())


# -- segments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8, 1000])
def test_segments_one_after_another_are_the_network(place: Place, count: int) -> None:
    graph = place.ready.graph
    parts = cut(graph, count)
    assert len(parts) <= count
    assert [name_of(n) for part in parts for n in part] == [name_of(n) for n in graph.nodes]
    feeds = place.ready.data.feeds(0)
    values = dict(feeds)
    for part in parts:
        proto = ir.serde.serialize_model(extract(graph, part))
        onnx.checker.check_model(proto, full_check=True)
        session = OrtSession(proto.SerializeToString())
        assert set(session.input_names) == set(reads(part))
        values.update(session.run({name: values[name] for name in session.input_names}))
    for name, expected in OrtSession(graph.to_bytes()).run(feeds).items():
        np.testing.assert_allclose(values[name], expected, rtol=1e-4, atol=1e-4)


def test_branching_off_gives_the_same_bits_as_an_execution_from_the_start(place: Place) -> None:
    ready, board = place.ready, place.board
    feeds = ready.data.feeds(1)
    everything = rounded(ready.units, ready.units.lowest())
    for around in (frozenset[str](), everything):
        walk = board.walk(feeds, board.gates(around))
        for unit in able(ready.units):
            gates = board.gates(sites_of(ready.units, unit) ^ around)
            for name, y in board.run(feeds, gates).items():
                np.testing.assert_array_equal(walk.run(gates)[name], y, err_msg=unit)
        for name, y in walk.outputs.items():
            np.testing.assert_array_equal(walk.run(board.gates(around))[name], y)


def test_only_what_a_gate_changes_is_executed(places: dict[str, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    """For every unit, the segments that run are those that its sites reach along the edges of the graph."""
    place = places["detector"]
    graph, units = place.ready.graph, place.ready.units
    parts = [[name_of(n) for n in nodes] for nodes in cut(graph, 8)]
    ran: list[int] = []
    original = Segment.run

    def run(self: Segment, values: Any, gates: np.ndarray) -> Any:
        ran.append(next(i for i, names in enumerate(parts) if name_of(self._nodes[0]) in names))
        return original(self, values, gates)

    walk = place.board.walk(place.ready.data.feeds(0), place.board.gates(()))
    monkeypatch.setattr(Segment, "run", run)
    saved = 0
    for unit in units.units:
        if unit.id not in units.lowest():
            continue
        reached = {w.node for w in unit.weights} | {e.node for e in unit.inner}
        sites = sites_of(units, unit.id)
        reached |= {u.node for e in units.edges if {s.id for s in possible_sites(units, e)} & sites for u in e.uses}
        for node in graph.nodes:  # in topological order
            makers = (v.producer() for v in node.inputs if v is not None)
            if any(name_of(maker) in reached for maker in makers if maker is not None):
                reached.add(name_of(node))
        ran.clear()
        walk.run(place.board.gates(sites))
        assert ran == sorted(i for i, names in enumerate(parts) if reached & set(names)), unit.id
        saved += len(parts) - len(ran)
    assert saved > len(units.lowest())


def test_the_number_of_segments_does_not_matter(place: Place) -> None:
    ready = place.ready
    feeds = ready.data.feeds(0)
    whole = Switchboard(ready.graph, ready.recipe(), segments=1)
    for unit in able(ready.units):
        sites = sites_of(ready.units, unit)
        one, many = (b.run(feeds, b.gates(sites)) for b in (whole, place.board))
        for name in one:
            close = np.isclose(one[name], many[name], rtol=1e-3, atol=1e-3 * np.abs(one[name]).max())
            assert close.mean() > 0.99, unit  # a value on the edge of two steps may round the other way


def test_rounding_a_weight_is_the_model_with_the_rounded_weight(place: Place) -> None:
    """The oracle is a float model whose initializer was replaced."""
    from bitalloy.model.read import constant

    ready = place.ready
    feeds = ready.data.feeds(0)
    for unit in ready.units.units:
        for site in unit.weights:
            node = ready.graph.node[site.node]
            weight = constant(node.inputs[site.slot])
            assert weight is not None and site.axis is not None
            params = stored_weight(ready.units.scheme("int8"), node, site)
            assert params is not None
            shape = [1] * weight.ndim
            shape[site.axis] = -1
            scale = np.asarray(params.scale, np.float32).reshape(shape)
            proto = onnx.load_from_string(ready.graph.to_bytes())
            stored = next(i for i in proto.graph.initializer if i.name == site.tensor)
            stored.CopyFrom(onnx.numpy_helper.from_array(np.round(weight / scale).clip(-127, 127) * scale, site.tensor))
            expected = OrtSession(proto.SerializeToString()).run(feeds)
            for name, y in place.board.run(feeds, place.board.gates([weight_site(site, "int8").id])).items():
                tolerance = 1e-5 * float(np.abs(expected[name]).max())
                np.testing.assert_allclose(y, expected[name], rtol=1e-4, atol=tolerance, err_msg=site.id)


def test_rounding_an_input_is_the_model_on_a_rounded_image(place: Place) -> None:
    ready = place.ready
    edge = next(e for e in ready.units.edges if e.producer is None and e.consumer in ready.units.lowest())
    feeds = ready.data.feeds(0)
    params = activation_params(*ready.ranges[edge.root])
    x, scale, zero = feeds[edge.tensor], np.float32(params.scale), np.float32(params.zero_point)
    # coarser by half a step, so that rounding does something to images that are stored in 8 bits
    feeds = {edge.tensor: x + scale / 4}
    coarse = ((np.round(feeds[edge.tensor] / scale) + zero).clip(0, 255) - zero) * scale
    expected = OrtSession(ready.graph.to_bytes()).run({edge.tensor: coarse.astype(np.float32)})
    for name, y in place.board.run(feeds, place.board.gates([Site(edge.id, "int8", ACTIVATIONS).id])).items():
        np.testing.assert_allclose(y, expected[name], rtol=1e-4, atol=1e-4 * float(np.abs(y).max()))


def test_a_whole_plan_is_the_rewritten_model(place: Place) -> None:
    """All units in INT8: the switchboard against the artefact, unfused so that both round at the same places."""
    ready = place.ready
    everything = ready.units.lowest()
    artefact = OrtSession(ready.variant(everything).to_bytes(), optimize=False)
    reference = OrtSession(ready.graph.to_bytes())
    gaps, noise = np.zeros((2, len(ready.heads)))
    for index in range(8):
        feeds = ready.data.feeds(index)
        found, expected = (
            place.board.run(feeds, place.board.gates(rounded(ready.units, everything))),
            artefact.run(feeds),
        )
        exact = reference.run(feeds)
        for at, head in enumerate(ready.heads):
            a, b, y = (head_of(o, head) for o in (found, expected, exact))
            gaps[at] += np.square(a - b).sum()
            noise[at] += np.square(b - y).sum()
    # a value on the edge of two steps may round the other way
    assert (gaps < 0.05 * noise).all()


# -- tables ------------------------------------------------------------------------------------------


def test_one_at_a_time_is_what_the_outputs_say(places: dict[str, Place]) -> None:
    place = places["detector"]
    ready = place.ready
    table = bitalloy.measure_exact(ready, samples=3)
    assert table.method == "one-at-a-time" and table.samples == 3 and all(r.exact for r in table.rows)
    assert {r.id for r in table.rows} == ready.units.able("int8")
    reference = OrtSession(ready.graph.to_bytes())
    for unit in able(ready.units)[::3]:
        gates = place.board.gates(sites_of(ready.units, unit))
        for head in (h for h in ready.heads if h.scores is None):
            error = energy = 0.0
            for index in ready.parts.probe[:3]:
                feeds = ready.data.feeds(index)
                y = head_of(reference.run(feeds), head)
                found = head_of(place.board.run(feeds, gates), head)
                if head.kind:  # Bernoulli scores: nats of each sample
                    error += float((y * np.log(y / found) + (1 - y) * np.log((1 - y) / (1 - found))).sum())
                    energy += 1
                    continue
                error += float(np.square(found - y).sum())
                energy += float(np.square(y).sum())
            row = next(r for r in table.rows if r.id == unit and r.head == head.name).sqnr_db
            expected = 160.0 if error == 0 else min(160.0, 10 * np.log10(energy / error))
            if expected < 100:
                assert row.value == pytest.approx(expected, abs=0.05)
                assert row.low <= row.value <= row.high
            else:
                assert row.value > 100


def test_leave_one_out_is_all_rounded_but_the_unit(places: dict[str, Place]) -> None:
    ready, board = places["classifier"].ready, places["classifier"].board
    table = bitalloy.measure_exact(ready, mode=ALL_BUT_ONE, samples=2)
    value = {(r.scope, r.id): r.sqnr_db.value for r in table.rows}
    free = ready.units.able("int8")
    reference = OrtSession(ready.graph.to_bytes())
    for name, plan in (((("all", EVERYTHING)), free), *((("unit", u), free - {u}) for u in sorted(free)[:3])):
        error = energy = 0.0
        for index in ready.parts.probe[:2]:
            feeds = ready.data.feeds(index)
            y = head_of(reference.run(feeds), ready.heads[0])
            found = board.run(feeds, board.gates(sites_of(ready.units, *plan)))
            error += float(np.square(head_of(found, ready.heads[0]) - y).sum())
            energy += float(np.square(y).sum())
        assert value[name] == pytest.approx(10 * np.log10(energy / error), abs=0.3)


def test_a_region_left_out_leaves_out_its_units(places: dict[str, Place]) -> None:
    units = places["classifier"].ready.units
    for thing in chosen_groups(units, bitalloy.Selection(regions=("*",)), ALL_BUT_ONE):
        members = {u.id for u in units.units if thing.id == "(model)" or (u.region + "/").startswith(thing.id + "/")}
        assert thing.sites == sites_of(units, *units.able("int8") - members)


@pytest.mark.parametrize("option", ["units", "regions", "sites"])
def test_a_pattern_that_matches_nothing_is_an_error(places: dict[str, Place], option: str) -> None:
    with pytest.raises(BitalloyError, match=f"--{option} 'nowhere/\\*' matches no {option[:-1]}.*such as"):
        chosen_groups(places["classifier"].ready.units, bitalloy.Selection(**{option: ("nowhere/*",)}))


class BrokenError(Exception):
    """The power is gone."""


@dataclass(frozen=True)
class FailingData:
    """Samples of which one cannot be read: stands for a command that was killed there."""

    base: Any
    bad: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def feeds(self, index: int) -> dict[str, np.ndarray]:
        if index == self.bad:
            raise BrokenError
        return self.base.feeds(index)


def test_a_stopped_measurement_goes_on_from_its_shards(places: dict[str, Place], tmp_path: Path) -> None:
    ready = places["classifier"].ready
    expected = bitalloy.measure_exact(ready, samples=3)
    store = RunDirectory(tmp_path / "run")
    with pytest.raises(BrokenError):
        bitalloy.measure_exact(
            replace(ready, data=FailingData(ready.data, ready.parts.probe[2])),
            samples=3,
            work=bitalloy.Workspace(store),
        )
    kept = sorted(p.name for p in store.path.rglob("cache/exact-*/*"))
    assert len(kept) == 2 * sum(len(ready.units.able(s.name)) for s in ready.units.schemes if s.rounds)
    # what is there is not measured again: the first samples cannot even be read now
    again = replace(ready, data=FailingData(ready.data, ready.parts.probe[0]))
    assert bitalloy.measure_exact(again, samples=3, work=bitalloy.Workspace(store)) == expected
    some = bitalloy.Selection(units=(able(ready.units)[0],))
    part = bitalloy.measure_exact(again, some, samples=3, work=bitalloy.Workspace(store))
    assert set(part.rows) <= set(expected.rows)


# -- confirmation ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis(inputs: Any) -> bitalloy.Analysis:
    model = bitalloy.load(inputs.detector)
    return bitalloy.analyze(model, bitalloy.open_data(model, inputs.scenes, limit=12), QUICK)


def test_confirmed_rows_are_exact_and_the_prediction_moves_towards_them(analysis: bitalloy.Analysis) -> None:
    confirmed = bitalloy.confirm(analysis, 4)
    exact = {(r.id, r.head): r.sqnr_db for r in bitalloy.measure_exact(analysis, samples=4).rows}
    lowest: dict[str, float] = {}
    for row in analysis.table.rows:
        if row.scope == "unit" and row.part == "all" and not is_divergence(row.head):
            lowest[row.id] = min(lowest.get(row.id, np.inf), row.sqnr_db.value)
    worst = set(sorted(lowest, key=lambda u: lowest[u])[:4])
    gaps: dict[str, list[float]] = {"before": [], "after": []}
    for row in confirmed.table.rows:
        if row.scope != "unit" or row.part != "all":
            continue
        assert row.exact or row.id not in worst
        if not row.exact:
            continue
        assert row.sqnr_db == exact[row.id, row.head] and not row.flagged
        sites = sites_of(analysis.units, row.id)
        for when, found in (("before", analysis), ("after", confirmed)):
            linear = found.matrix.damage(found.matrix.select(sites)).mean(axis=0)
            head = found.matrix.heads.index(row.head)
            predicted = float(decibel(linear * bend(found.secant, linear))[head])
            if row.sqnr_db.value < 100:
                gaps[when].append(abs(predicted - row.sqnr_db.value))
    assert np.mean(gaps["after"]) < 0.5 * np.mean(gaps["before"])
    assert confirmed.matrix.digest != analysis.matrix.digest
    assert not any(r.exact for r in analysis.table.rows)


def test_confirmation_keeps_the_measured_damage_of_everything(analysis: bitalloy.Analysis) -> None:
    confirmed = bitalloy.confirm(analysis, 4)
    everything = rounded(analysis.units, analysis.units.lowest())
    matrix, secant = confirmed.matrix, confirmed.secant
    linear = matrix.damage(matrix.select(everything)).mean(axis=0)
    np.testing.assert_allclose(linear * bend(secant, linear), analysis.secant.damage[-1], rtol=1e-5)


# -- task metric -------------------------------------------------------------------------------------


def test_the_metric_table_is_the_evaluation_of_the_switched_network(inputs: Any, tmp_path: Path) -> None:
    from bitalloy.tasks.coco import read_coco
    from bitalloy.tasks.detection import DetectionData, evaluate_detection, paired_difference
    from bitalloy.tasks.open import image_spec
    from bitalloy.tasks.yolo import class_names

    model = bitalloy.load(inputs.detector)
    ready = bitalloy.calibrate(model, bitalloy.open_data(model, inputs.scenes, limit=12), QUICK)
    unit = able(ready.units)[0]
    table = bitalloy.measure_metric(ready, inputs.labels, bitalloy.Selection(units=(unit,)), limit=4)
    board = Switchboard(model, ready.recipe())
    spec = image_spec(model)
    assert spec is not None
    data = DetectionData(read_coco(inputs.labels), spec, class_names(model.metadata))
    float_, coarse = (
        evaluate_detection(partial(board.run, gates=g), data, limit=4)
        for g in (board.gates(()), board.gates(sites_of(ready.units, unit)))
    )
    assert (table.reference, table.rows[0].value) == (float_.ap, coarse.ap)
    drop = paired_difference(float_, coarse)
    found = table.rows[0].drop
    assert (found.value, found.low, found.high) == pytest.approx((drop.value, drop.low, drop.high))


def test_the_metric_needs_a_choice_and_a_detector(places: dict[str, Place], inputs: Any) -> None:
    with pytest.raises(BitalloyError, match="--units"):
        bitalloy.measure_metric(places["detector"].ready, inputs.labels, bitalloy.Selection())
    with pytest.raises(BitalloyError, match="--metric"):
        bitalloy.measure_metric(places["classifier"].ready, inputs.labels, bitalloy.Selection(units=("*",)))


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def sensitivity(inside: Any, inputs: Any) -> Iterator[Any]:
    quick = ("--samples", "4", "--probes", "2", "--calibration-samples", "8", "--out", "run")
    yield lambda *options: inside("sensitivity", inputs.classifier, "--data", inputs.images, *quick, *options)


def test_the_command_prints_the_worst_first_and_writes_tables(sensitivity: Any, inside: Any) -> None:
    found = msgspec.json.decode(sensitivity("--json").succeeded().out, type=SensitivityTable)
    shown = sensitivity().succeeded().out
    values = {r.id: r.sqnr_db.value for r in found.rows}
    order = [name for line in shown.splitlines() for name in values if f" {name} " in line]
    assert sorted(order, key=lambda name: (values[name], name)) == order and set(order) == set(values)
    assert inside.results() == {"sensitivity.json", "sensitivity.csv"}
    lines = list(csv.DictReader((inside.folder / "run" / "sensitivity.csv").read_text().splitlines()))
    assert {line["scope"] for line in lines} == {"site", "unit", "region"}
    assert {line["exact"] for line in lines} == {"false"}


def test_exact_and_confirmed_tables_say_so(sensitivity: Any, inside: Any) -> None:
    table = msgspec.json.decode(sensitivity("--confirm", "2", "--json").succeeded().out, type=SensitivityTable)
    assert len({r.id for r in table.rows if r.exact}) >= 2
    exact = msgspec.json.decode(
        sensitivity("--method", "exact", "--mode", "leave-one-out", "--units", "*Conv", "--json").succeeded().out,
        type=SensitivityTable,
    )
    assert exact.method == "leave-one-out" and {r.id.endswith("Conv") for r in exact.rows if r.scope == "unit"} == {
        True
    }
    stored = json.loads((inside.folder / "run" / "sensitivity_exact.json").read_text())
    assert stored["method"] == "leave-one-out"
    assert EVERYTHING in sensitivity("--method", "exact", "--mode", "leave-one-out").succeeded().out


def test_the_command_measures_the_metric(inside: Any, inputs: Any) -> None:
    found = inside(
        "sensitivity", inputs.detector, "--data", inputs.scenes, "--metric", "--eval", inputs.labels, "--units",
        "/conv0/*", "--calibration-samples", "4", "--limit", "4", "--json", "--out", "run",
    ).succeeded()  # fmt: skip
    table = msgspec.json.decode(found.out, type=MetricTable)
    assert table.metric == "AP50-95" and [r.id for r in table.rows] == ["/conv0/Conv"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--units", "nothing*"], ["--units", "'nothing*'", "such as"]),
        (["--method", "guess"], ["--method", "probe", "exact"]),
        (["--mode", "leave-one-out"], ["--mode", "--method exact"]),
        (["--method", "exact", "--mode", "some"], ["--mode", "one-at-a-time"]),
        (["--method", "exact", "--confirm", "3"], ["--confirm"]),
        (["--metric"], ["--metric", "--eval"]),
    ],
)
def test_what_makes_no_sense_is_refused(sensitivity: Any, options: list[str], words: list[str]) -> None:
    message = sensitivity(*options).refused()
    assert all(word in message for word in words), message


def test_help_teaches_by_examples(inside: Any) -> None:
    text = inside("sensitivity", "--help").succeeded().out
    assert text.count("bitalloy sensitivity") >= 3
