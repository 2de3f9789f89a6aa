"""Intervals of 95 %, of every kind that is printed beside SQNR and predicted latency, cover known truths as often.

Truths are drawn, so that the share of intervals that hold them is known: an interval of 80 % would hold about 80 % of
them. Those of latency ratios are in `tests/measure/test_bench.py`, those of task metrics in
`tests/tasks/test_bootstrap.py`.
"""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from bitalloy.core.plans import CostTable, UnitCost
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitGraph
from bitalloy.measure.prices import latency_interval_us
from bitalloy.sensitivity.matrix import ProbeMatrix, damage_interval, draws, estimate_sqnr

TRIALS = 400
LEAST, MOST = 0.90, 0.985
"""Shares that 400 trials of intervals of 95 % nearly always lie within; those of 80 % lie below 0.87, of 99 % above."""


@pytest.mark.parametrize(("tail", "samples"), [*itertools.product((0.3, 0.7), (4, 16, 64)), (2.0, 16), (2.0, 64)])
def test_measured_sqnr(samples: int, tail: float) -> None:
    """Damage in parts of a sample's energy is lognormal: the mean of exp(N(0, s^2)) is exp(s^2 / 2).

    With s = 2, as the scores of a detector have it, one sample in thirty does half of all damage.
    """
    rng, weights, held = np.random.default_rng(1), draws(samples, 0), 0
    truth = -10 * np.log10(1e-3 * np.exp(tail**2 / 2))
    for _ in range(TRIALS):
        energy = rng.gamma(20, 1 / 20, samples)
        damage = 1e-3 * energy * np.exp(rng.normal(0, tail, samples))
        found = damage_interval(damage / energy.mean(), energy / energy.mean(), weights)
        held += found.low <= truth <= found.high
    assert LEAST <= held / TRIALS <= MOST


@pytest.mark.parametrize("samples", [4, 16])
def test_predicted_sqnr(samples: int) -> None:
    """One site: the mean of its own energies over samples and probes, whatever the signs of the projections."""
    rng, weights, held = np.random.default_rng(2), draws(samples, 0), 0
    truth = -10 * np.log10(1e-3 * np.exp(0.4**2 / 2))
    for _ in range(TRIALS):
        own = (1e-3 * np.exp(rng.normal(0, 0.4, (samples, 1, 1)))).repeat(2, axis=1).astype(np.float32)
        rows = (np.sqrt(own) * rng.choice([-1.0, 1.0], own.shape)).astype(np.float32)
        matrix = ProbeMatrix(("y",), ("site",), (rows,), (own,), np.ones((samples, 1)))
        (found,) = estimate_sqnr(matrix, matrix.select({"site"}), weights)
        held += found.low <= truth <= found.high
    assert LEAST <= held / TRIALS <= MOST


@pytest.mark.parametrize("left_out", [3, 8])
def test_predicted_latency(left_out: int) -> None:
    """The error of one more plan is of the same kind as those of the variants that were left out of the fits."""
    rng, held = np.random.default_rng(3), 0
    units = UnitGraph(model_sha256="", target="ort-cpu", schemes=(), units=(), edges=())
    table = CostTable(
        target="ort-cpu",
        device="none",
        threads=1,
        units=(UnitCost(unit="u", us={BASELINE: 100.0}, bytes={BASELINE: 4}),),
        borders=(),
        fixed_us=0.0,
        pure_us={BASELINE: 100.0},
        residual_percent=1.0,
    )
    for _ in range(TRIALS):
        errors = rng.normal(0, 5.0, left_out)
        found = latency_interval_us(msgspec.structs.replace(table, left_out_percent=tuple(errors)), units, Plan())
        assert found is not None and found.value == 100.0
        held += found.low <= 100.0 * (1 + rng.normal(0, 0.05)) <= found.high
    assert LEAST <= held / TRIALS <= MOST
