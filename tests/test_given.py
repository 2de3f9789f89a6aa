"""Records that users fill in: numbers of any kind that Python code has at hand, and clear words for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from bitalloy import BitalloyError, Budget, Settings
from bitalloy.core.plans import Keep
from bitalloy.core.records import Record, Workload


@pytest.mark.parametrize("kind", [np.float64, np.float32, lambda v: np.array(v), float])
def test_a_number_of_numpy_is_stored_as_the_same_number(kind: Callable[[float], Any]) -> None:
    given = Budget(latency_ratio=kind(0.5), head_sqnr_db={"boxes": kind(25)}, max_drop={"mAP": kind(0.25)})
    assert given == Budget(latency_ratio=0.5, head_sqnr_db={"boxes": 25}, max_drop={"mAP": 0.25})
    assert msgspec.json.decode(msgspec.json.encode(given), type=Budget) == given
    settings = Settings(samples=np.int64(4), seed=np.uint8(3), schemes=["w4", np.str_("int8")])  # type: ignore[arg-type]
    assert settings == Settings(samples=4, seed=3, schemes=("w4", "int8"))
    assert hash(settings) == hash(Settings(samples=4, seed=3, schemes=("w4", "int8")))


@pytest.mark.parametrize(
    ("record", "fields", "said"),
    [
        (Budget, {"latency_ratio": "0.7x"}, r"Budget\(latency_ratio='0.7x'\).*float"),
        (Budget, {"size_bytes": np.ones(3)}, r"Budget\(size_bytes=.*int"),
        (Budget, {"keep": ("int8:model",)}, r"Budget\(keep=.*Keep"),
        (Settings, {"samples": "many"}, r"Settings\(samples='many'\).*int"),
        (Settings, {"schemes": "w4"}, r"Settings\(schemes='w4'\).*array"),
        (Workload, {"prompt": 2.5}, r"Workload\(prompt=2.5\).*int"),
        (Keep, {"scheme": 4, "pattern": "a"}, r"Keep\(scheme=4\).*str"),
    ],
)
def test_another_type_is_refused_by_its_name(record: type[Record], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BitalloyError, match=said):
        record(**fields)
