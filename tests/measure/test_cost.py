"""Cost tables of a simulated machine, whose true times are known, and what decides the key of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from bitalloy.core.plans import CostTable
from bitalloy.core.records import TensorSpec
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.store import StageInputs, key_of
from bitalloy.core.units import Edge, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.core.work import Workspace
from bitalloy.measure import cost
from bitalloy.measure.prices import latency_us
from bitalloy.rewrite.calibrated import Environment
from bitalloy.runtime.machine import Machine, this_machine
from bitalloy.runtime.steps import Step, once
from bitalloy.targets.placement import borders

SCHEMES = (
    Scheme(name=BASELINE),
    Scheme(name="int8", activation="uint8", weight="int8"),
    Scheme(name="int4", activation="int4", weight="int4"),
)
NAMES = tuple(scheme.name for scheme in SCHEMES)
SCALES = {BASELINE: 1.25, "int8": 1.5, "int4": 2.0}
"""Wall time over kernel time."""
PER_ELEMENT, EACH = {"int8": 0.25, "int4": 0.125}, {"int8": 30.0, "int4": 20.0}
OTHER_TIME = 11.0
"""What a profile spends outside units."""


def chain(count: int, narrow: Sequence[int] = ()) -> UnitGraph:
    """Units one after the other, all able to run in all schemes but the `narrow` ones, which stay float."""
    units = tuple(
        Unit(
            id=f"u{i}", kind="Drawn", region="", core=(f"u{i}",), tail=(), root=f"t{i}", inner=(), macs=0,
            weights=(WeightSite(tensor=f"w{i}", node=f"u{i}", slot=1, axis=0, elements=2 * i + 1),) * 2,
            allowed=(BASELINE,) if i in narrow else NAMES,
        )
        for i in range(count)
    )  # fmt: skip
    edges = tuple(
        UnitEdge(
            tensor=f"t{i}", uses=(Edge(tensor=f"t{i}", node=f"u{i + 1}", slot=0),), producer=f"u{i}",
            consumer=f"u{i + 1}", root=f"t{i}", rooted=True, elements=10 * (i + 1) ** 2,
        )
        for i in range(count - 1)
    )  # fmt: skip
    return UnitGraph(target="drawn", model_sha256="0" * 64, units=units, edges=edges, schemes=SCHEMES)


GIVEN = 1.3
"""Time of the float model as it was given over that after the graph rewrites."""
SHARES = {"inference": 1.0, "prefill": 0.25, "token": 0.25}
"""Step -> its part of the time of an inference."""


@dataclass(frozen=True)
class Model:
    """Stands for an artefact, for what traces it, and for what opens it."""

    plan: Plan
    large: bool
    folder: Path | None = None
    """Where it is placed."""

    @property
    def artefact(self) -> Model:
        return self

    def placed(self, folder: Path) -> Model:
        return replace(self, folder=folder)

    def session(self) -> None:
        """Open the model, large or not."""

    def reopener(self) -> str:
        return "kept"


class Simulated:
    """A machine on which every time follows from a plan, but for what disturbs all models of a round alike."""

    def __init__(self, units: UnitGraph, monkeypatch: pytest.MonkeyPatch, *, large: bool = False) -> None:
        self.units, self.large = units, large
        self.plans: list[Plan] = []
        self.folders: set[tuple[Path | None, str]] = set()
        self.together: list[bool] = []
        random = np.random.default_rng(3)
        self.kernel = {(u.id, s): float(random.uniform(100, 900)) for u in units.units for s in NAMES}
        self.kernel["u7", "int4"] = 0.0
        monkeypatch.setattr(cost, "trace", lambda model, names: model)
        monkeypatch.setattr(cost, "profile", self.profile)
        monkeypatch.setattr(cost, "reopeners", lambda models: ["kept"] * len(models))
        monkeypatch.setattr("bitalloy.measure.bench.time_sittings", self.time_sittings)

    def original(self) -> Any:
        return Model(Plan(), self.large)

    def artefact(self, plan: Plan) -> Any:
        self.plans.append(plan)
        return Model(plan, self.large)

    def profile(self, model: Model, step: Step, folder: Path, opener: object) -> list[SimpleNamespace]:
        """Two kernels for each unit, none where it takes no time, and two for what is no unit."""
        assert folder.is_dir() and (model.folder, step.name) not in self.folders
        self.folders.add((model.folder, step.name))
        found = [SimpleNamespace(unit=None, us=OTHER_TIME / 2)] * 2
        for unit in self.units.units:
            us = self.kernel[unit.id, model.plan.scheme_of(unit.id)] * SHARES[step.name]
            found += [SimpleNamespace(unit=unit.id, us=us * share) for share in (0.25, 0.75) if us]
        return found

    def time_sittings(
        self,
        models: Mapping[str, Any],
        steps: Sequence[Step],
        *,
        repeats: int,
        together: bool,
        progress: Callable[[int], None] | None,
    ) -> dict[str, np.ndarray]:
        self.together.append(together)
        assert all((opener == "kept") is not self.large for opener in models.values())
        names = [str(i) for i in range(len(self.plans))]
        assert [name for name in models] == (names if self.large else [*names, "given"])
        disturbed = np.array([[1.0, 4.0, 0.5], [1.0, 0.25, 3.0]])
        for _ in range(repeats if progress is not None else 0):
            progress(1)  # type: ignore[misc]
        shares = np.array([SHARES[step.name] for step in steps])
        times = {str(i): self.wall_us(plan) for i, plan in enumerate(self.plans)}
        times |= {} if self.large else {"given": GIVEN * self.wall_us(Plan())}
        return {name: us / 1e3 * disturbed[..., None] * shares for name, us in times.items()}

    def wall_us(self, plan: Plan) -> float:
        inside = sum(self.kernel[u.id, s := plan.scheme_of(u.id)] * SCALES[s] for u in self.units.units)
        crossed = borders(self.units, plan).items()
        return inside + sum(
            PER_ELEMENT[name] * elements + EACH[name] * count
            for conversion, (elements, count) in crossed
            for name in [conversion.source or conversion.sink]
        )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_table_holds_the_times_of_the_machine(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    units = chain(24, narrow=[5, 23])
    machine = Simulated(units, monkeypatch)
    steps: list[int] = []
    table = cost.measure(units, machine, [once({})], seed=seed, repeats=4, progress=steps.append)
    pure = [Plan(), *(Plan.of(name, *units.able(name)) for name in NAMES[1:])]
    assert machine.plans[:3] == pure and len(machine.plans) == 3 + 6 and machine.together == [True]
    assert steps == [1] * (len(machine.plans) + 4)
    for unit, found in zip(units.units, table.units, strict=True):
        assert found.unit == unit.id and set(found.us) == set(found.bytes) == set(unit.allowed)
        for name, us in found.us.items():
            assert us == pytest.approx(machine.kernel[unit.id, name] * SCALES[name], abs=6e-4) and us == round(us, 3)
    prices = {(b.source, b.sink): b for b in table.borders}
    assert set(prices) == {pair for name in NAMES[1:] for pair in ((name, ""), ("", name))}
    for ends, price in prices.items():
        name = "".join(ends)
        assert price.us_per_element == pytest.approx(PER_ELEMENT[name], rel=1e-3)
        assert price.us == pytest.approx(EACH[name], rel=1e-2)
    assert table.pure_us == pytest.approx({name: machine.wall_us(p) for name, p in zip(NAMES, pure, strict=True)})
    assert (table.target, table.device, table.threads) == ("drawn", this_machine().processor, this_machine().threads)
    assert table.fixed_us == 0 and not table.estimated and table.residual_percent < 0.01
    assert len(table.left_out_percent) == 6


def test_ratios_refer_to_the_model_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rewrites without any rounding save belongs to every plan, also to the one that lowers nothing."""
    units = chain(24, narrow=[5, 23])
    machine = Simulated(units, monkeypatch)
    table = cost.measure(units, machine, [once({})])
    assert table.float_us == pytest.approx(GIVEN * machine.wall_us(Plan()))
    unknown = msgspec.structs.replace(table, given_us=None)
    assert unknown.float_us == pytest.approx(machine.wall_us(Plan()), rel=1e-3)
    assert latency_us(table, units, Plan()) / table.float_us == pytest.approx(1 / GIVEN, rel=1e-3)


def test_every_step_counts_as_often_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that takes a quarter of the time, and three runs of another quarter each, make the same table as one."""
    units = chain(24, narrow=[5, 23])
    single, several = [once({})], [Step("prefill", {}), Step("token", {}, times=3, graph="decoder")]
    one, three = (cost.measure(units, Simulated(units, monkeypatch), steps) for steps in (single, several))
    for a, b in zip(one.units, three.units, strict=True):
        assert b.us == pytest.approx(a.us, abs=2e-3)
    assert three.pure_us == pytest.approx(one.pure_us)
    for x, y in zip(one.borders, three.borders, strict=True):
        assert (x.us, x.us_per_element) == pytest.approx((y.us, y.us_per_element), rel=1e-6)


def test_schemes_that_no_unit_may_take_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    units = chain(8)
    narrowed = tuple(msgspec.structs.replace(u, allowed=NAMES[:2]) for u in units.units)
    units = msgspec.structs.replace(units, units=narrowed)
    machine = Simulated(units, monkeypatch)
    table = cost.measure(units, machine, [once({})])
    assert list(table.pure_us) == [BASELINE, "int8"] and machine.plans[:2] == [Plan(), Plan.of("int8", *units.allowed)]
    assert all(set(plan.values()) <= {BASELINE, "int8"} for plan in machine.plans)


def test_without_another_scheme_the_float_model_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    units = msgspec.structs.replace(chain(4, narrow=range(4)), schemes=SCHEMES[:1])
    machine = Simulated(units, monkeypatch)
    table = cost.measure(units, machine, [once({})])
    assert list(table.pure_us) == [BASELINE] and set(machine.plans) == {Plan()} and table.borders == ()


def test_of_a_large_model_there_are_fewer_variants_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    units = chain(12)
    machine = Simulated(units, monkeypatch, large=True)
    table = cost.measure(units, machine, [once({})])
    assert len(machine.plans) == 3 + 2 and machine.together == [False] and table.given_us is None


def test_weights_are_as_large_as_their_bits() -> None:
    """5 numbers: 20 bytes as floats, 5 in eight bits, and 3 in four."""
    assert [cost.stored_bytes(scheme, 5) for scheme in SCHEMES] == [20, 5, 3]


def test_sizes_of_weights_are_those_of_all_weights_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    units = chain(3)
    table = cost.measure(units, Simulated(units, monkeypatch), [once({})])
    assert [c.bytes for c in table.units] == [
        {BASELINE: 8, "int8": 2, "int4": 1}, {BASELINE: 24, "int8": 6, "int4": 3}, {BASELINE: 40, "int8": 10, "int4": 5}
    ]  # fmt: skip


def test_mixtures_change_the_scheme_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one scheme to each of the others alike, beginning with any; other seeds give other mixtures."""
    units = chain(60)
    mixtures: list[list[Plan]] = []
    for seed in range(40):
        machine = Simulated(units, monkeypatch)
        cost.measure(units, machine, [once({})], seed=seed)
        mixtures.append(machine.plans[3:])
    assert len({str(sorted(plan.items())) for plans in mixtures for plan in plans}) > 200
    pairs, starts = np.zeros((3, 3)), np.zeros(3)
    for place, switch in enumerate((0.05, 0.15, 0.4)):
        drawn = [[NAMES.index(p.scheme_of(f"u{i}")) for i in range(60)] for m in mixtures for p in m[place::3]]
        schemes = np.array(drawn)
        assert (np.diff(schemes, axis=1) != 0).mean() == pytest.approx(switch, rel=0.15)
        np.add.at(pairs, (schemes[:, :-1], schemes[:, 1:]), 1)
        starts += np.bincount([one[0] for one in drawn], minlength=3)
    changes = pairs[~np.eye(3, dtype=bool)]
    np.testing.assert_allclose(changes / changes.sum(), 1 / 6, rtol=0.2)
    assert starts / starts.sum() == pytest.approx(1 / 3, abs=0.1)


HERE = Environment(
    machine=Machine(processor="one", features=("avx2",), threads=2), runtime="onnxruntime", version="1.0"
)


def analysis_of(units: UnitGraph, *, device: object = None, environment: Environment = HERE, **changes: Any) -> Any:
    """What a cost table is made from, without a model."""
    given = {"sha256": "a" * 64, "inputs": (), "name": "drawn", "seed": 0, **changes}
    return SimpleNamespace(
        graph=SimpleNamespace(info=SimpleNamespace(sha256=given["sha256"], inputs=given["inputs"]), large=False),
        target=SimpleNamespace(name=given["name"], device=device, rounds_apart=False),
        settings=SimpleNamespace(seed=given["seed"], workload=None),
        data=SimpleNamespace(feeds=lambda index: {"sample": index}),
        artefact=lambda plan: None,
        original=lambda: "as given",
        recipe=lambda: None,
        units=units,
        environment=environment,
    )


def key_of_table(analysis: Any) -> str:
    """The key under which the table of an analysis is stored."""

    class Asked(Workspace):
        def cached(self, stage: str, inputs: StageInputs, make: Callable[[], bytes]) -> bytes:
            raise KeyError(key_of(inputs))

    with pytest.raises(KeyError) as asked:
        cost.measure_cost(analysis, work=Asked())
    return str(asked.value.args[0])


def test_all_that_decides_a_table_is_part_of_its_key() -> None:
    units = chain(3)
    first, *others = units.units
    shape = TensorSpec(name="x", dtype="float32", shape=(1,))
    other_machine = {"processor": "another", "features": ("vnni",), "threads": 9}
    changed = [
        analysis_of(units, sha256="b" * 64),
        analysis_of(units, name="another"),
        analysis_of(units, seed=1),
        analysis_of(units, inputs=(shape,)),
        *(
            analysis_of(msgspec.structs.replace(units, units=(msgspec.structs.replace(first, **change), *others)))
            for change in ({"id": "v"}, {"core": ("u0", "v")}, {"tail": ("v",)}, {"allowed": NAMES[:2]})
        ),
        analysis_of(msgspec.structs.replace(units, edges=units.edges[1:])),
        *(analysis_of(units, environment=msgspec.structs.replace(HERE, **{n: "2"})) for n in ("runtime", "version")),
        *(
            analysis_of(
                units,
                environment=msgspec.structs.replace(
                    HERE, machine=msgspec.structs.replace(HERE.machine, **{name: value})
                ),
            )
            for name, value in other_machine.items()
        ),
    ]
    keys = [key_of_table(analysis) for analysis in (analysis_of(units), *changed)]
    assert len(set(keys)) == len(changed) + 1
    assert key_of_table(analysis_of(units)) == keys[0]


@pytest.mark.parametrize("device", [None, "a device that is not here"])
def test_a_table_is_measured_where_the_target_runs_and_estimated_elsewhere(
    device: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its sizes are learned in both cases."""
    units = chain(2)
    made: list[tuple[object, ...]] = []
    plain = CostTable(
        target="drawn", device="", threads=1, units=(), borders=(), fixed_us=0.0, pure_us={}, residual_percent=0.0
    )

    def measure(
        given: UnitGraph, models: Any, steps: Sequence[Step], *, seed: int, mixtures: int, progress: Any
    ) -> CostTable:
        progress(1)
        assert models.original() == "as given"
        made.append(("measured", given, *(dict(step.feeds) for step in steps), seed))
        return plain

    def estimate(graph: object, given: UnitGraph, other: object, workload: object, apart: bool) -> CostTable:
        assert workload is None and not apart, "a drawn network is no language model"
        made.append(("estimated", given, other))
        return msgspec.structs.replace(plain, estimated=True)

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(cost, "estimate_costs", estimate)
    monkeypatch.setattr(
        cost,
        "with_sizes",
        lambda table, _, __, shared, seed: msgspec.structs.replace(table, float_bytes=1000 + seed + len(shared)),
    )
    monkeypatch.setattr(cost, "shared_weights", lambda graph, recipe: ())
    table = cost.measure_cost(analysis_of(units, device=device, seed=5))
    assert made == [("measured", units, {"sample": 0}, 5) if device is None else ("estimated", units, device)]
    assert table == msgspec.structs.replace(plain, estimated=device is not None, float_bytes=1005)


def test_one_disturbed_sitting_of_a_large_model_does_not_count() -> None:
    quiet = np.full((2, 3, 4), [[[10.0]], [[5.0]]])
    disturbed = quiet.copy()
    disturbed[1, 1] *= 3
    disturbed[1, 2] *= 2
    assert cost._wall(disturbed, together=False).tolist() == cost._wall(quiet, together=False).tolist() == [10.0, 5.0]


def test_what_disturbs_a_round_of_all_models_does_not_count() -> None:
    quiet = np.full((2, 3, 4), [[[10.0]], [[5.0]]])
    disturbed = quiet * np.linspace(1, 3, 12).reshape(1, 3, 4)
    found = cost._wall(disturbed, together=True)
    assert found[1] / found[0] == pytest.approx(0.5)
