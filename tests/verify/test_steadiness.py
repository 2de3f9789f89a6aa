"""A plan chosen among several is measured again, and a machine that changed is told."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import msgspec
import pytest

import bitalloy
from bitalloy.core.outcome import Steadiness
from bitalloy.core.plans import Budget, Keep
from bitalloy.core.records import Estimate
from bitalloy.core.schemes import BASELINE
from bitalloy.verify.steadiness import told_drift


def ratio(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.01, high=value + 0.01)


@pytest.mark.parametrize(
    ("sittings_ms", "told"),
    [((10.0, 10.4), False), ((10.0, 13.0), True), ((7.0, 7.0), True)],
)
def test_float_that_takes_another_time_than_before_is_told(sittings_ms: tuple[float, ...], told: bool) -> None:
    every = (10.0, *sittings_ms)
    found = Steadiness(priced_ms=10.0, sittings_ms=sittings_ms, drift=max(every) / min(every) - 1)
    notes = told_drift(found, ratio(0.7))
    assert bool(notes) == told
    if told:
        assert f"{sittings_ms[-1]:.3g} ms in the last" in notes[0]


@pytest.mark.parametrize(("at_last", "told"), [(0.71, False), (0.80, True)])
def test_a_plan_that_was_faster_by_luck_is_told(at_last: float, told: bool) -> None:
    found = Steadiness(priced_ms=10.0, sittings_ms=(10.0,), drift=0.0, chosen_ratio=ratio(0.70))
    notes = told_drift(found, ratio(at_last))
    assert [("0.70x" in note, "0.80x" in note) for note in notes] == ([(True, True)] if told else [])


@pytest.mark.parametrize("several", [False, True])
def test_a_winner_among_several_is_measured_again(inputs: Any, monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    """Every round keeps one unit more in float, so that the plans differ; or nothing is searched again.

    Prices say that INT8 halves every unit, whatever the machine does, so that there is something to lower.
    """
    model = bitalloy.load(inputs.classifier)
    settings = bitalloy.Settings(samples=2, probes=2, calibration_samples=2, schemes=("int8",))
    analysis = bitalloy.analyze(model, bitalloy.open_data(model, inputs.images), settings)

    def another(units: Any, asked: Budget, budget: Budget, planned: Any, measured: Any, *, repaired: bool) -> Any:
        chosen = dict(planned.plan.chosen.listed)
        if not several or not chosen:
            return None
        kept = Keep(scheme=BASELINE, pattern=next(iter(chosen)))
        return msgspec.structs.replace(asked, keep=(*asked.keep, kept)), planned.cost

    monkeypatch.setattr(import_module("bitalloy.verify.course"), "next_search", another)
    measured = bitalloy.measure_cost(analysis)
    units = tuple(
        msgspec.structs.replace(one, us={scheme: 100.0 if scheme == BASELINE else 50.0 for scheme in one.us})
        for one in measured.units
    )
    table = msgspec.structs.replace(measured, units=units, borders=())
    summary = bitalloy.verify(analysis, bitalloy.plan(analysis, Budget(min_sqnr_db=1.0), table=table)).summary
    found = summary.steadiness
    assert found is not None
    shipped = next(r for r in summary.rounds if r.shipped)
    if several:
        assert len(summary.rounds) > 1
        assert found.chosen_ratio is not None
        assert found.chosen_ratio.value == pytest.approx(shipped.measured_ratio, abs=1e-4)
        if found.chosen_ratio.value != 1:  # a plan that lowers nothing takes 1.0x by definition, in every sitting
            assert found.chosen_ratio.value != summary.latency_ratio
    elif len(summary.rounds) == 1:
        assert found.chosen_ratio is None and summary.latency_ratio == pytest.approx(shipped.measured_ratio, abs=1e-4)
    times = [found.priced_ms, *found.sittings_ms]
    assert found.drift >= max(times) / min(times) - 1 - 1e-3
    assert min(found.sittings_ms) <= summary.latency_ms.reference <= max(found.sittings_ms)


def test_estimates_have_no_drift(inside: Any, inputs: Any) -> None:
    inside.run(inputs.classifier, "--data", inputs.images, "--target", "tensorrt", *inside.REACHABLE).succeeded()
    assert inside.summary()["steadiness"] is None
    assert told_drift(None, ratio(0.7)) == []
