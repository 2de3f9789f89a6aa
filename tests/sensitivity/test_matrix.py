"""Numbers of the probe matrix against their definitions, written as loops, and its intervals against other tables."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bitalloy.core.errors import DataError
from bitalloy.core.records import Estimate, Secant
from bitalloy.sensitivity import matrix as module
from bitalloy.sensitivity.matrix import (
    ProbeMatrix,
    bend,
    damage_interval,
    decibel,
    draws,
    estimate_sqnr,
    lognormal_limit,
    shrink,
    silent_heads,
    sqnr_interval,
    straight,
)

HEADS, SITES = ("boxes", "scores KL"), ("s", "t", "u", "v")
SAMPLES, PROBES = 5, (3, 2)


@pytest.fixture
def drawn() -> ProbeMatrix:
    random = np.random.default_rng(4)
    shapes = [(SAMPLES, probes, len(SITES)) for probes in PROBES]
    rows = tuple((random.normal(0.5, 1, shape)).astype(np.float32) for shape in shapes)
    own = tuple(random.uniform(0.1, 1, shape).astype(np.float32) for shape in shapes)
    executed = frozenset({("boxes", "t"), ("scores KL", "v")})
    return ProbeMatrix(HEADS, SITES, rows, own, random.uniform(1, 3, (SAMPLES, 2)), executed)


def factor(values: np.ndarray) -> float:
    """Positive part of 1 - variance of the mean over the squared mean."""
    flat = [float(v) for v in values.ravel()]
    mean = sum(flat) / len(flat)
    variance = sum((v - mean) ** 2 for v in flat) / (len(flat) - 1) / len(flat)
    return max(0.0, 1 - variance / mean**2)


def definition(matrix: ProbeMatrix, chosen: np.ndarray, samples: list[int] | None = None) -> np.ndarray:
    """(samples, heads), sites one by one; of repeated samples the variance is over all that are there."""
    columns = []
    for head in range(2):
        rows, own = matrix.rows[head].astype(float), matrix.own[head].astype(float)
        energy = matrix.energy[:, head]
        if samples is not None:
            rows, own, energy = rows[samples], own[samples], energy[samples]
        squares = sum(own[..., i] * c for i, c in enumerate(chosen))
        products = sum(rows[..., i] * c for i, c in enumerate(chosen)) ** 2 - squares
        total = squares + factor(np.asarray(products)) * products
        columns.append(np.asarray(total).mean(axis=1) / energy.mean())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("sites", [{"s"}, {"t", "v"}, {"s", "t", "u", "v"}])
@pytest.mark.parametrize("size", [1.0, 0.2])
def test_damage_is_that_of_the_definition(drawn: ProbeMatrix, sites: set[str], size: float) -> None:
    """Also where errors cancel, so that the products of parts are negative."""
    drawn = replace(drawn, rows=tuple(size * rows for rows in drawn.rows))
    chosen = np.array([float(s in sites) for s in SITES])
    np.testing.assert_array_equal(drawn.select([*sites, "unknown"]), chosen)
    np.testing.assert_allclose(drawn.damage(chosen), definition(drawn, chosen), rtol=1e-5)


def test_damage_of_single_sites(drawn: ProbeMatrix) -> None:
    alone = drawn.site_damage()
    assert alone.shape == (SAMPLES, 2, len(SITES))
    for i, chosen in enumerate(np.eye(len(SITES))):
        np.testing.assert_allclose(alone[..., i], definition(drawn, chosen), rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 0.2])
def test_a_draw_is_a_matrix_of_the_samples_that_it_drew(drawn: ProbeMatrix, size: float) -> None:
    """The variance of the mean is that of the n - 1 of the values, of repeated ones as well."""
    drawn = replace(drawn, rows=tuple(size * rows for rows in drawn.rows))
    chosen = np.array([1.0, 0.0, 1.0, 1.0])
    drawn_samples = [[0, 1, 2, 3, 4], [0, 0, 1, 4, 4], [2, 2, 2, 3, 1]]
    weights = np.array([[d.count(i) / SAMPLES for i in range(SAMPLES)] for d in drawn_samples])
    found = drawn.resampled(chosen, weights)
    expected = [definition(drawn, chosen, d).mean(axis=0) for d in drawn_samples]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_products_without_a_mean_are_shrunk_to_nothing() -> None:
    values = np.array([[1.0, -1.0], [3.0, -3.0]])[..., None]
    assert shrink(values).tolist() == [0.0] and shrink(np.zeros((3, 2, 4))).tolist() == [0.0] * 4
    assert shrink(np.full((1, 1, 3), 7.0)).tolist() == [0.0] * 3
    assert shrink(np.full((2, 1, 1), 7.0)).tolist() == [1.0]
    one = np.array([[[5.0, 1.0], [6.0, 9.0], [9.0, 2.0]]])
    np.testing.assert_allclose(shrink(one), [factor(one[..., 0]), factor(one[..., 1])])
    rows, own = (np.zeros((2, 2, 1), np.float32),) * 2
    silent = ProbeMatrix(("y",), ("s",), (rows,), (own,), np.ones((2, 1)))
    assert silent.resampled(np.ones(1), np.eye(2)).tolist() == [[0.0], [0.0]]


def test_one_value_says_nothing_of_products() -> None:
    rows, own = np.full((1, 1, 1), 3.0, np.float32), np.full((1, 1, 1), 4.0, np.float32)
    matrix = ProbeMatrix(("y",), ("s",), (rows,), (own,), np.full((1, 1), 2.0))
    assert matrix.damage(np.ones(1)).tolist() == [[2.0]]


def test_parts_of_a_matrix(drawn: ProbeMatrix) -> None:
    assert drawn.samples == SAMPLES and dict(drawn.column) == {"s": 0, "t": 1, "u": 2, "v": 3}
    assert drawn.plain.tolist() == [True, False]
    some = drawn.subset(slice(1, 3))
    for part in ("rows", "own"):
        for whole, cut in zip(getattr(drawn, part), getattr(some, part), strict=True):
            np.testing.assert_array_equal(cut, whole[1:3])
    np.testing.assert_array_equal(some.energy, drawn.energy[1:3])
    both = ProbeMatrix.concatenate([some, drawn.subset(slice(0, 1))])
    assert both.samples == 3 and both.heads == HEADS and both.executed == drawn.executed
    for part in ("rows", "own"):
        for whole, joined in zip(getattr(drawn, part), getattr(both, part), strict=True):
            np.testing.assert_array_equal(joined, whole[[1, 2, 0]])
    np.testing.assert_array_equal(both.energy, drawn.energy[[1, 2, 0]])


def test_a_view_has_the_columns_of_a_target(drawn: ProbeMatrix) -> None:
    found = drawn.view({"x": "v", "y": "unknown", "z": "s", "w": "t"})
    assert (found.sites, found.heads) == (("x", "z", "w"), HEADS)
    assert found.executed == {("boxes", "w"), ("scores KL", "x")}
    for part in ("rows", "own"):
        for whole, cut in zip(getattr(drawn, part), getattr(found, part), strict=True):
            np.testing.assert_array_equal(cut, whole[..., [3, 0, 1]])
    assert found.energy is drawn.energy and drawn.view({s: s for s in (*SITES, "more")}) is drawn


def test_scaled_columns_scale_errors_and_their_squares(drawn: ProbeMatrix) -> None:
    factors = np.array([[1.0, 2.0, 0.5, 0.0], [3.0, 1.0, 1.0, -1.0]])
    found = drawn.scaled(factors)
    for head in range(2):
        np.testing.assert_allclose(found.rows[head], drawn.rows[head] * factors[head], rtol=1e-6)
        np.testing.assert_allclose(found.own[head], drawn.own[head] * factors[head] ** 2, rtol=1e-6)
        assert found.rows[head].dtype == found.own[head].dtype == np.float32


def test_a_matrix_is_read_as_it_was_written(drawn: ProbeMatrix) -> None:
    for one in (drawn, replace(drawn, executed=frozenset())):
        read = ProbeMatrix.from_bytes(one.to_bytes())
        assert (read.heads, read.sites, read.executed) == (HEADS, SITES, one.executed)
        for part in ("rows", "own"):
            for a, b in zip(getattr(one, part), getattr(read, part), strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
        np.testing.assert_array_equal(one.energy, read.energy)
        assert read.digest == one.digest == hashlib.sha256(one.to_bytes()).hexdigest()
    assert drawn.digest == drawn.digest != drawn.subset(slice(0, 2)).digest


def test_decibels_stay_in_bounds() -> None:
    damage = np.array([1.0, 0.1, 1e-3, 2.0, 0.0, 1e-20, 1e9])
    np.testing.assert_allclose(decibel(damage), [0, 10, 30, -3.0103, 160, 160, -60], atol=1e-4)


def test_heads_without_energy_are_named() -> None:
    energy = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert silent_heads(("a", "b", "c KL"), energy) == ("a",)
    assert silent_heads(("b",), energy[:, 1:2]) == ()
    with pytest.raises(DataError, match=re.escape("(a, b) is zero on every sample")):
        silent_heads(("a", "b", "c KL"), energy * 0)


def test_draws_count_samples_drawn_with_replacement() -> None:
    """Each count is binomial: mean 1, variance 1 - 1 / n."""
    weights = draws(8, 3)
    assert weights.shape == (module.BOOTSTRAPS, 8) and module.BOOTSTRAPS >= 400
    counts = weights * 8
    np.testing.assert_allclose(counts, np.rint(counts))
    np.testing.assert_allclose(counts.sum(axis=1), 8)
    assert counts.var() == pytest.approx(7 / 8, rel=0.06) and counts.mean() == pytest.approx(1)
    np.testing.assert_array_equal(weights, draws(8, 3))
    assert (draws(8, 4) != weights).any()


SECANT = Secant(
    heads=HEADS, fractions=(0.5, 1.0), linear=(0.04, 2.0), samples=1,
    damage=((0.02, 0.5), (0.16, 1.0)),  # twice and four times the linear ones; as the linear ones, and half of them
)  # fmt: skip


@pytest.mark.parametrize(
    ("t", "factors"),
    [
        (0.0, (1, 1)), (0.25, (2**0.5, 1)), (0.5, (2, 1)), (0.75, (2 * 2**0.5, 0.5**0.5)), (1.0, (4, 0.5)),
        (3.0, (4, 0.5)),
    ],
)  # fmt: skip
def test_a_plan_bends_like_the_whole_network(t: float, factors: tuple[float, float]) -> None:
    """The logarithm of the factor is linear between the fractions, and constant beyond."""
    linear = t**2 * np.array([0.04, 2.0])
    np.testing.assert_allclose(bend(SECANT, linear), factors, rtol=1e-6)
    np.testing.assert_allclose(bend(SECANT, np.stack([linear, 0 * linear])), [factors, (1, 1)], rtol=1e-6)


def test_factors_are_bounded_and_damage_may_vanish() -> None:
    secant = Secant(heads=("y", "z"), fractions=(1.0,), linear=(1e-9, 0.0), samples=1, damage=((1.0, 1e-30),))
    np.testing.assert_allclose(bend(secant, np.array([1e-9, 0.0])), [1e6, 1.0])
    np.testing.assert_allclose(bend(secant, np.array([-1.0, 1e-30])), [1.0, 1.0])
    tiny = Secant(heads=("y",), fractions=(1.0,), linear=(1.0,), samples=1, damage=((1e-9,),))
    np.testing.assert_allclose(bend(tiny, np.array([1.0])), [1e-6])


@pytest.mark.parametrize(("head", "linear"), [(0, 0.01), (0, 0.03), (0, 0.08), (1, 0.3), (1, 3.0)])
def test_straight_is_the_inverse(head: int, linear: float) -> None:
    """Of a second head that bends down true damage grows in places only; the largest linear one is meant."""
    damages = np.full(2, linear)
    true = float((damages * bend(SECANT, damages))[head])
    found = straight(SECANT, true * (1 + 1e-9))
    assert found.shape == (2,)
    grown = np.linspace(0, found[head], 50)[:, None] * np.ones(2)
    assert (grown * bend(SECANT, grown))[:, head].max() <= true * (1 + 1e-6)
    assert found[head] == pytest.approx(linear, rel=1e-3)


def test_straight_ends_where_damage_first_leaves_the_limit() -> None:
    """Of the first head true damage is 1 at t = 1/2 and falls to 1/2 at t = 1; of the second it is the linear one."""
    secant = Secant(
        heads=HEADS, fractions=(0.5, 1.0), linear=(1.0, 1e-3), samples=1, damage=((1.0, 0.25e-3), (0.5, 1e-3))
    )
    t = np.linspace(0, 0.5, 100001)
    first = t[(t**2 * 4 ** (2 * t)) <= 0.8].max()
    np.testing.assert_allclose(straight(secant, np.array([0.8, 5e-4])), [first**2, 5e-4], rtol=2e-3)


def test_straight_reaches_twice_the_errors_and_no_further() -> None:
    found = straight(SECANT, np.array([np.inf, 0.0]))
    np.testing.assert_allclose(found, [4 * 0.04, 0.0])


def test_an_interval_is_percentiles_widened_by_student_s_t() -> None:
    """Both sides reach as far as the farther percentile, 2.5 or 97.5, of the draws."""
    resampled = 10 ** (-np.linspace(20, 30, 401) / 10)  # percentiles 20.25 and 29.75 dB
    for value, farther in ((24.0, 29.75 - 24.0), (26.0, 26.0 - 20.25)):
        found = sqnr_interval(10 ** (-value / 10), resampled, 0.0, 4)
        reach = farther * stats.t.ppf(0.975, 3) / stats.norm.ppf(0.975) * (4 / 3) ** 0.5
        assert (found.value, found.low, found.high) == pytest.approx((value, value - reach, value + reach), abs=2e-3)
    assert sqnr_interval(0.01, np.full(9, 0.01), 0.0, 2) == Estimate(value=20.0, low=20.0, high=20.0)
    wide = sqnr_interval(0.01, np.array([1e-16, 1e6] * 200), 0.0, 3)
    assert (wide.low, wide.high) == (-60.0, 160.0)


def test_one_sample_leaves_the_interval_open() -> None:
    assert sqnr_interval(1e-3, np.full(5, 1e-3), 1.0, 1) == Estimate(value=30.0, low=-60.0, high=160.0)


def test_numbers_are_stored_with_three_decimals() -> None:
    found = sqnr_interval(0.0123456, np.full(9, 0.0123456), 0.0, 5)
    assert (found.value, found.low, found.high) == (19.085, 19.085, 19.085)
    assert sqnr_interval(0.0123456, np.full(9, 0.0123456), 0.0, 1).value == 19.085
    spread = sqnr_interval(0.01, np.linspace(0.005, 0.02, 101), 0.0, 7)
    assert all(round(number, 3) == number for number in (spread.low, spread.high))


def test_estimates_of_heads_are_those_of_their_draws(drawn: ProbeMatrix) -> None:
    chosen, weights = np.array([1.0, 1.0, 0.0, 1.0]), draws(SAMPLES, 0)
    damage, resampled = definition(drawn, chosen).mean(axis=0), drawn.resampled(chosen, weights)
    most = np.array([olsson(of_head) for of_head in definition(drawn, chosen).T])
    for secant, bent in ((None, np.ones_like), (SECANT, lambda linear: bend(SECANT, linear))):
        found = estimate_sqnr(drawn, chosen, weights, secant)
        for head, (mean, draw, limit) in enumerate(
            zip(damage * bent(damage), (resampled * bent(resampled)).T, most * bent(most), strict=True)
        ):
            expected = sqnr_interval(mean, draw, limit, SAMPLES)
            assert found[head].value == pytest.approx(expected.value, abs=2e-3)
            assert (found[head].low, found[head].high) == pytest.approx((expected.low, expected.high), abs=5e-3)


def test_measured_damage_is_total_over_total(drawn: ProbeMatrix) -> None:
    damage, energy = np.array([1.0, 2.0, 6.0]) / 30, np.array([1.0, 0.5, 1.5])
    weights = np.array([[1, 1, 1], [3, 0, 0], [0, 2, 1]]) / 3
    found = damage_interval(damage, energy, weights)
    ratios = np.array([9 / 30 / 3, 1 / 30, 10 / 30 / 2.5])
    assert found == sqnr_interval(0.1, ratios, olsson(damage), 3)


def test_an_interval_goes_down_to_what_rare_samples_may_do() -> None:
    found = sqnr_interval(0.01, np.full(9, 0.01), 0.1, 5)
    assert (found.value, found.low, found.high) == (20.0, 10.0, 20.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_lognormal_limit_is_olsson_s(seed: int) -> None:
    damage = np.exp(np.random.default_rng(seed).normal(-3, 2 + seed, (9, 2)))
    assert (lognormal_limit(damage) > damage.mean(axis=0)).all() and not lognormal_limit(damage**0.1).any()
    np.testing.assert_allclose(lognormal_limit(damage), [olsson(of_head) for of_head in damage.T])
    with_zeros = np.concatenate([damage, np.zeros((3, 2))])
    np.testing.assert_allclose(lognormal_limit(with_zeros), 0.75 * lognormal_limit(damage))
    np.testing.assert_array_equal(lognormal_limit(np.array([[0.0, 2.0], [0.0, 0.0]])), [0.0, 0.0])


def olsson(damage: np.ndarray) -> float:
    """Upper end of the 95 % interval of a lognormal mean, "modified Cox" of Olsson, 2005; 0 without a heavy tail."""
    logs, n = np.log(damage[damage > 0]), int((damage > 0).sum())
    spread = (logs.var(ddof=1) / n + logs.var(ddof=1) ** 2 / (2 * (n - 1))) ** 0.5
    if logs.std(ddof=1) < 1:
        return 0.0
    upper = np.exp(logs.mean() + logs.var(ddof=1) / 2 + stats.t.ppf(0.975, n - 1) * spread)
    return float(upper * n / len(damage))
