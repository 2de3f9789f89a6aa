"""Names in the order of a person."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitalloy.core.order import natural


def test_numbers_count_as_numbers() -> None:
    names = ["model.10.cv2", "model.9", "model.10.cv1", "model.100", "head", "model.09x", ""]
    expected = ["", "head", "model.9", "model.09x", "model.10.cv1", "model.10.cv2", "model.100"]
    assert sorted(names, key=natural) == expected


@given(st.lists(st.integers(0, 10**30), min_size=1))
def test_by_the_value_of_the_number(values: list[int]) -> None:
    names = [f"unit{value}.x" for value in values]
    assert sorted(names, key=natural) == [f"unit{value}.x" for value in sorted(values)]


def test_a_number_may_have_any_length() -> None:
    assert natural("x" + "9" * 10_000) < natural("x1" + "0" * 10_000)
