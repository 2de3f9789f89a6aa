"""The writer of JSON: what it refuses, and that what is absent is told from what is no number."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, BudgetError
from bitalloy.core.plans import Budget
from bitalloy.core.records import Estimate, MetricValue, Secant


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_with_its_place(number: float) -> None:
    for content, place in (
        (Estimate(value=1.0, low=number, high=2.0), "'low'"),
        ({"heads": [{"y": None}, {"y": number}]}, "'heads.1.y'"),
        (Secant(heads=("y",), fractions=(1.0,), damage=((number,),), linear=(1.0,), samples=1), "'damage.0.0'"),
        (number, "'number'"),
    ):
        with pytest.raises(BitalloyError, match=f"{place} is not a finite number"):
            to_json(content)


def test_what_is_absent_and_what_is_called_null_are_written() -> None:
    content = {"a": None, "null": "null", "b": [1.5, MetricValue(value=1.0, low=0.5, high=2.0, n=3)]}
    found = json.loads(to_json(content))
    assert found == {"a": None, "null": "null", "b": [1.5, {"value": 1.0, "low": 0.5, "high": 2.0, "n": 3}]}
    assert to_json({"b": 1, "a": 2}, order="sorted") == b'{"a":2,"b":1}'
    assert to_json({"a": 1}, pretty=True) == b'{\n  "a": 1\n}'


def test_a_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(BitalloyError, match=r"not UTF-8 text: 'a\\xff'"):
        to_json({"name": "a\udcff"})
    with pytest.raises(BitalloyError) as error:
        to_json({"name": "\udcff" + 100 * "a"})
    assert f"text: '\\xff{74 * 'a'}. Rename" in str(error.value)


def test_an_integer_that_msgspec_cannot_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of it differ in how large integers may be in JSON; in MessagePack none goes beyond 64 bits."""
    monkeypatch.setattr(msgspec.json, "encode", lambda content, order: msgspec.msgpack.encode(content))
    with pytest.raises(BitalloyError, match=r"too large to be stored.*smaller numbers"):
        to_json({"n": 2**64})


@pytest.mark.parametrize(
    "limits",
    [
        {"latency_ratio": math.inf},
        {"latency_ms": math.nan},
        {"latency_ratio": -1.0},
        {"min_sqnr_db": 1e308},
        {"min_sqnr_db": -1e308},
        {"head_sqnr_db": {"y": math.inf}},
        {"max_drop": {"AP": math.nan}},
    ],
)
def test_a_budget_beyond_arithmetic_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="finite"):
        Budget(**limits)  # type: ignore[arg-type]
