"""A format and a target that the package does not have, each one object, through everything that a run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from tests.conftest import Network, save_feeds

from bitalloy import Budget, Settings, analyze, apply, load, measure_cost, measure_exact, open_data, plan, verify
from bitalloy.core.errors import BitalloyError
from bitalloy.core.schemes import BASELINE, Granularity, Plan, Scheme
from bitalloy.core.units import UnitGraph
from bitalloy.formats import FORMATS
from bitalloy.formats.affine import Affine
from bitalloy.measure.cost import measure
from bitalloy.measure.prices import border_bytes, latency_us, saved_bytes
from bitalloy.model.weights import to_bytes
from bitalloy.pipeline.audit import audit_plan
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.ort import ORT, OrtSession
from bitalloy.runtime.steps import once
from bitalloy.search.problem import Problem
from bitalloy.search.program import Limits, Program
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.sensitivity.measuring import Selection
from bitalloy.targets import TARGETS
from bitalloy.targets.base import Core, Offer, Target, whole_kernel
from bitalloy.targets.devices import Device
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe
from bitalloy.verify.summary import predicted_sqnr

BLOCK = 32
UINT4 = Affine(name="scratch4", bits=4, signed=False, opset=21)
"""Activations in 16 steps."""


def has_weights(core: Core, nodes: Sequence[ir.Node]) -> str:
    return core.unfit if core.unfit or core.weights else "has no weights to store"


SCRATCH = Target(
    name="scratch",
    describe="Weights by block, INT8, weights in 4 bits, or those and activations in 4 bits",
    runtime=ORT,
    offers=(
        Offer(
            scheme=Scheme(name="w8b32", weight="int8", granularity=Granularity.BLOCK, block=BLOCK), refuse=has_weights
        ),
        Offer(scheme=Scheme(name="int8", activation="uint8", weight="int8", pair_limit=128), refuse=whole_kernel),
        Offer(scheme=Scheme(name="a8w4", activation="uint8", weight="int4"), refuse=whole_kernel),
        Offer(scheme=Scheme(name="a4w4", activation="scratch4", weight="int4"), refuse=whole_kernel),
    ),
    match=ORT_CPU.match,
    follows=ORT_CPU.follows,
    device=Device(
        id="scratch",
        name="scratch device",
        capability=10,
        operations_per_second={BASELINE: 1e9, "w8b32": 1e9, "int8": 4e9, "a8w4": 5e9, "a4w4": 8e9},
        bytes_per_second=1e9,
        start_us=0.1,
    ),
)
NAMES = ("w8b32", "int8", "a8w4", "a4w4")


def network() -> onnx.ModelProto:
    """Convolutions with a residual and a Concat, then Gemms whose inner sizes are no multiples of a block."""
    net = Network(5)
    x = net.op("Relu", net.conv("images", 3, 40, stride=2))
    y = net.op("Add", x, net.silu(net.conv(x, 40, 40)))
    z = net.op("Relu", net.conv(net.op("Concat", x, y, axis=1), 80, 48, stride=2))
    pooled = net.op("Flatten", net.op("ReduceMean", z, axes=[2, 3], keepdims=1), axis=1)
    hidden = net.op("Relu", net.gemm(pooled, 48, 70))
    return net.model({"images": (1, 3, 16, 16)}, {net.op("Identity", net.gemm(hidden, 70, 10)): (1, 10)})


@pytest.fixture(scope="module")
def registered() -> Iterator[pytest.MonkeyPatch]:
    """All that it takes: two entries in two tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, UINT4.name, UINT4)
        patch.setitem(TARGETS, SCRATCH.name, SCRATCH)
        yield patch


@pytest.fixture(scope="module", params=["auto", "minmax"])
def analysis(
    registered: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Analysis:
    """With ranges chosen among those of several methods, and with those of one."""
    folder = tmp_path_factory.mktemp("scratch")
    onnx.save(network(), folder / "net.onnx")
    model = load(folder / "net.onnx")
    data = open_data(model, save_feeds(folder / "feeds", count=36, images=(1, 3, 16, 16)))
    settings = Settings(targets=("scratch",), samples=8, probes=32, calibration_samples=12, range_method=request.param)
    return analyze(model, data, settings)


def pure(units: UnitGraph, scheme: str) -> Plan:
    return Plan.of(scheme, *units.able(scheme))


def drawn(units: UnitGraph, seed: int) -> Plan:
    """Each unit in any scheme that it may take."""
    generator = np.random.default_rng(seed)
    return Plan((u.id, str(generator.choice(u.allowed))) for u in units.units)


PLANS: dict[str, Callable[[UnitGraph], Plan]] = {
    **{name: lambda units, name=name: pure(units, name) for name in NAMES},  # type: ignore[misc]
    "lowest": UnitGraph.lowest,
    **{f"drawn {seed}": lambda units, seed=seed: drawn(units, seed) for seed in range(8)},  # type: ignore[misc]
}


class Executed:
    """Outputs of the float model and of rewritten ones, executed as they are written."""

    def __init__(self, analysis: Analysis, samples: int = 8) -> None:
        self._analysis = analysis
        self.feeds = [dict(analysis.data.feeds(i)) for i in analysis.parts.probe[:samples]]
        (self._output,) = analysis.graph.output_names
        self.exact = self.of(OrtSession(analysis.graph.to_bytes()))

    def of(self, session: OrtSession) -> np.ndarray:
        return np.stack([session.run(f)[self._output] for f in self.feeds]).astype(np.float64)

    def plan(self, plan: Plan, recipe: Recipe | None = None) -> np.ndarray:
        made = write_plan(self._analysis.graph, recipe or self._analysis.recipe(), plan)
        return self.of(OrtSession(made.to_bytes(), optimize=False))

    def sqnr_db(self, outputs: np.ndarray) -> float:
        return float(10 * np.log10(np.square(self.exact).sum() / np.square(outputs - self.exact).sum()))


@pytest.fixture(scope="module")
def executed(analysis: Analysis) -> Executed:
    return Executed(analysis)


def test_units_have_the_schemes_of_the_target(analysis: Analysis) -> None:
    units = {u.id: u for u in analysis.units.units}
    assert tuple(s.name for s in analysis.units.schemes) == (BASELINE, *NAMES)
    assert units["/conv2/Conv"].allowed == (BASELINE, *NAMES)
    assert units["/add5/Add"].allowed == (BASELINE, "int8", "a8w4", "a4w4")
    assert units["/add5/Add"].refused["w8b32"] == "has no weights to store"
    assert units["/reducemean9/ReduceMean"].allowed == (BASELINE,)
    assert units["/gemm13/Gemm"].allowed == (BASELINE, "w8b32")  # it makes an output
    assert set(analysis.units.lowest().counts()) == {"a4w4", "w8b32"}
    with pytest.raises(BitalloyError, match="has no weights to store"):
        write_plan(analysis.graph, analysis.recipe(), Plan.of("w8b32", "/add5/Add"))


@pytest.mark.parametrize("name", PLANS)
def test_a_rewritten_model_stores_what_the_plan_says(analysis: Analysis, name: str) -> None:
    chosen = PLANS[name](analysis.units)
    made = onnx.load_model_from_string(to_bytes(write_plan(analysis.graph, analysis.recipe(), chosen).model))
    onnx.checker.check_model(made, full_check=True)
    later = {"w8b32", "a8w4", "a4w4"} & set(chosen.values())
    assert made.opset_import[0].version == (21 if later else 17)
    (mean,) = (n for n in made.graph.node if n.op_type == "ReduceMean")
    assert len(mean.input) == (2 if later else 1)
    assert len({n.name for n in made.graph.node}) == len(made.graph.node)
    stored = {i.name: i for i in made.graph.initializer}
    makers = {name: node for node in made.graph.node for name in node.output}
    for unit in (u for u in analysis.units.units if u.weights):
        (node,) = (n for n in made.graph.node if n.name == unit.id)
        scheme, reader = chosen.scheme_of(unit.id), makers.get(node.input[1])
        if scheme == BASELINE:
            assert reader is None
            continue
        assert reader is not None and reader.op_type == "DequantizeLinear"
        weight, scale = stored[reader.input[0]], stored[reader.input[1]]
        assert weight.data_type == (TensorProto.INT4 if scheme.endswith("w4") else TensorProto.INT8)
        block = next((a.i for a in reader.attribute if a.name == "block_size"), 0)
        assert block == (BLOCK if scheme == "w8b32" else 0)
        # output channels come first in all of these, and input channels then
        wanted = list(weight.dims) if block else list(weight.dims[:1])
        if block:
            wanted[1] = -(-wanted[1] // BLOCK)
        assert list(scale.dims) == wanted
    zeros = [stored[n.input[2]] for n in made.graph.node if n.op_type == "QuantizeLinear"]
    kinds = {"int8": TensorProto.UINT8, "a8w4": TensorProto.UINT8, "a4w4": TensorProto.UINT4}
    assert {z.data_type for z in zeros} == {kinds[s] for s in chosen.values() if s in kinds}


@pytest.mark.parametrize("name", PLANS)
def test_exact_measurement_is_what_the_rewritten_model_does(analysis: Analysis, executed: Executed, name: str) -> None:
    """The switched network beside the written one, executed as it is."""
    chosen = PLANS[name](analysis.units)
    compare(analysis, analysis.recipe(), chosen, executed)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_where_the_levels_of_one_format_are_none_of_the_other(
    analysis: Analysis, executed: Executed, seed: int
) -> None:
    """Signed 4 bits beside UINT8: it matters which rounding comes first."""
    signed = (
        replace(o, scheme=msgspec.structs.replace(o.scheme, activation="int4")) if o.scheme.name == "a4w4" else o
        for o in SCRATCH.offers
    )
    device = replace(SCRATCH, offers=tuple(signed))
    units = msgspec.structs.replace(analysis.units, schemes=device.schemes)
    chosen = drawn(units, seed)
    compare(analysis, Recipe(units, device, analysis.ranges, analysis.offsets), chosen, executed)


def compare(analysis: Analysis, recipe: Recipe, chosen: Plan, executed: Executed) -> None:
    board = Switchboard(analysis.graph, recipe)
    gates = board.gates(rounded(recipe.units, chosen))
    (output,) = analysis.graph.output_names
    switched = np.stack([board.run(f, gates)[output] for f in executed.feeds])
    written = executed.plan(chosen, recipe)
    noise = np.square(written - executed.exact).sum()
    assert noise > 1e-7 * np.square(executed.exact).sum()
    # sums in another order fall on the other side of a rounding here and there
    assert np.square(switched - written).sum() < 1e-3 * noise


def test_less_precision_is_less_exact(analysis: Analysis, executed: Executed) -> None:
    """Of the model in one scheme wherever it can be, as executed."""
    found = [executed.sqnr_db(executed.plan(pure(analysis.units, name))) for name in NAMES]
    assert all(first > second + 3 for first, second in pairwise(found)), found


def test_predictions_are_what_is_measured(analysis: Analysis) -> None:
    """Of every unit in each scheme, by the probe matrix beside exact measurement."""
    measured = measure_exact(analysis, Selection(units=("*",)), samples=8)
    predicted = {(r.id, r.scheme, r.part): r.sqnr_db.value for r in analysis.table.rows if r.scope == "unit"}
    able = [(u.id, name) for name in NAMES for u in analysis.units.units if name in u.allowed]
    assert [(r.id, r.scheme) for r in measured.rows] == able
    gaps = {(r.id, r.scheme): r.sqnr_db.value - predicted[r.id, r.scheme, r.part] for r in measured.rows}
    for name in NAMES:
        own = [abs(gap) for (_, scheme), gap in gaps.items() if scheme == name]
        assert np.mean(own) < 1.5 and max(own) < 4.0, gaps


@pytest.mark.parametrize("name", PLANS)
def test_the_matrix_predicts_what_a_plan_does(analysis: Analysis, executed: Executed, name: str) -> None:
    chosen = PLANS[name](analysis.units)
    sites = rounded(analysis.units, chosen)
    assert sites <= set(analysis.matrix.sites)
    (predicted,) = predicted_sqnr(analysis, chosen)
    assert predicted.value == pytest.approx(executed.sqnr_db(executed.plan(chosen)), abs=2.5)


def test_the_solver_finds_the_best_of_all_plans(analysis: Analysis) -> None:
    """By enumeration, with four units on one path that have a choice, at several latencies."""
    free = ("/conv2/Conv", "/sigmoid3/Sigmoid", "/add5/Add", "/concat6/Concat", "/conv7/Conv")
    narrowed = tuple(
        u if u.id in free else msgspec.structs.replace(u, allowed=(BASELINE,)) for u in analysis.units.units
    )
    units = msgspec.structs.replace(analysis.units, units=narrowed)
    problem = Problem(units, analysis.matrix, analysis.secant, measure_cost(analysis), 10**6)
    plans = [Plan(zip(free, schemes, strict=True)) for schemes in product(*(units.allowed[u] for u in free))]
    assert len(plans) == 5 * 4 * 4 * 4 * 5
    times = np.array([problem.latency_us(p) for p in plans])
    chosen = np.array([problem.sites(p) for p in plans])
    damages = problem.aims @ problem.site_damage @ chosen.T
    program = Program(problem)
    for share in (0.05, 0.3, 0.6, 0.95):
        limit = float(times.min() + share * (times.max() - times.min()))
        found = program.solve(Limits(latency_us=limit), minimize="damage", gap=0.0)
        assert found is not None and found.solved
        at = plans.index(found.plan)
        assert times[at] <= limit * (1 + 1e-9)
        assert damages[at] == pytest.approx(damages[times <= limit].min(), rel=1e-6)


def test_costs_are_estimated_for_every_scheme(analysis: Analysis) -> None:
    table = measure_cost(analysis)
    assert table.estimated and list(table.pure_us) == [BASELINE, *NAMES]
    ends = {(b.source, b.sink) for b in table.borders}
    assert ends == {pair for name in ("int8", "a8w4", "a4w4") for pair in ((name, ""), ("", name))}
    for name in NAMES:
        assert table.pure_us[name] == latency_us(table, analysis.units, pure(analysis.units, name))
    assert sorted(table.pure_us, key=lambda s: -table.pure_us[s]) == [BASELINE, *NAMES]
    gemm = next(c for c in table.units if c.unit == "/gemm11/Gemm")
    weights = 70 * 48
    # what is left of a weight of 4 bytes, less the nodes, names and scales of a unit
    for name, share in (("w8b32", 3), ("int8", 3), ("a8w4", 3.5), ("a4w4", 3.5)):
        assert share * weights - 1500 < gemm.saved_bytes(name) < share * weights
        made = pure(analysis.units, name)
        written = len(to_bytes(write_plan(analysis.graph, analysis.recipe(), made).model))
        predicted = table.float_bytes - saved_bytes(table, made) + border_bytes(table, analysis.units, made)
        assert predicted == pytest.approx(written, rel=0.03)


def test_costs_are_measured_where_the_target_runs(analysis: Analysis) -> None:
    """Of the same target without a device: each scheme and mixtures of all, on this machine."""
    feeds = dict(analysis.data.feeds(0))
    table = measure(analysis.units, analysis, [once(feeds)], repeats=2)
    assert not table.estimated and list(table.pure_us) == [BASELINE, *NAMES]
    assert all(set(c.us) == set(analysis.units.allowed[c.unit]) for c in table.units)
    assert all(us >= 0 for c in table.units for us in c.us.values())
    lowest = latency_us(table, analysis.units, analysis.units.lowest())
    assert np.isfinite(lowest) and lowest > 0


@pytest.mark.parametrize("floor", [15.0, 25.0, 40.0])
def test_a_plan_is_made_shipped_and_audited(analysis: Analysis, executed: Executed, floor: float) -> None:
    planned = plan(analysis, Budget(min_sqnr_db=floor))
    chosen = planned.plan.chosen
    (head,) = planned.plan.heads
    assert head.predicted_db.value >= floor - 0.1
    found = executed.sqnr_db(executed.plan(chosen))
    assert head.predicted_db.value == pytest.approx(found, abs=4.0)
    assert planned.plan.predicted_latency_us == pytest.approx(
        latency_us(planned.cost, analysis.units, chosen), rel=1e-3
    )
    assert planned.plan.predicted_latency_us < planned.cost.float_us
    shipped = apply(analysis, planned)
    # nodes and scales, which no table counts, are a part of so small a file
    assert 0 < sum(shipped.sizes.values()) - planned.plan.predicted_size_bytes < 10_000
    audit = audit_plan(analysis, planned)
    assert {u.unit: u.planned for u in audit.units} == {u.id: chosen.scheme_of(u.id) for u in analysis.units.units}
    # this runtime has kernels for INT8 alone
    assert {u.executed for u in audit.units} <= {"int8", BASELINE, ""}
    assert {u.unit for u in audit.differences()} >= {u.unit for u in audit.units if u.executed and u.planned == "a4w4"}


def test_a_run_is_verified(analysis: Analysis, executed: Executed) -> None:
    found = verify(analysis, plan(analysis, Budget(min_sqnr_db=20.0)))
    chosen = found.planned.plan.chosen
    assert found.summary.schemes == chosen.counts()
    (name,) = found.summary.sqnr_db
    assert found.summary.sqnr_db[name].mixed.measured >= 19.0
    assert found.summary.latency_ms.mixed < found.summary.latency_ms.reference
